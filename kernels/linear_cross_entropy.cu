// linear_cross_entropy.cu: x w^T + bias and its cross-entropy, chunk by chunk (formulas:
// csrc/ops.h).
//
// Of a chunk: logits = x w^T by cuBLASLt (whose algorithms a first call chooses: choose()); one
// kernel that reads every row once, keeps it in shared memory and writes its gradient over it;
// dx = dlogits w; dw += dlogits^T x, in two parts where the logits lie in dw's own memory. A row of
// a large vocabulary is more than one block can keep beside others: a cluster of blocks has one
// row, each block a share of it, and they exchange their sums. A row that does not fit is read
// twice.
#include "cross_entropy.cuh"

#include "../csrc/cublaslt.h"

// A block's threads, a power of two. Few where clusters share a row: what a warp does once for its
// row, and not for each vector, is then a sixth of its instructions instead of a third.
constexpr int CLUSTER_THREADS = 128, LONE_THREADS = 256;
#if __CUDA_ARCH__ >= 900
constexpr int THREADS = CLUSTER_THREADS;
constexpr bool BULK = true; // one copy loads a block's share of a row, no instruction a vector
#else
constexpr int THREADS = LONE_THREADS;
constexpr bool BULK = false;
#endif
constexpr int WARPS = THREADS / 32;
constexpr int MOST_BLOCKS = 8;      // of a cluster
constexpr int64_t SHARE = 48 << 10; // bytes of a row in a block, with more at hand
// Blocks that must fit a multiprocessor, whose loads in flight make it fast: as many as need no
// spills.
constexpr int PLAIN_RESIDENT = 1024 / THREADS, RESIDENT = 768 / THREADS;

// ---- Sums come together -------------------------------------------------------------------------

// An index as 32 bits, those of NONE the largest.
__device__ __forceinline__ uint32_t short_index(int64_t index) {
    return index < INT32_MAX ? (uint32_t)index : INT32_MAX;
}
__device__ __forceinline__ int64_t long_index(uint32_t index) {
    return index == INT32_MAX ? NONE : index;
}

// The least of the warp's.
__device__ __forceinline__ int64_t first_index(int64_t index) {
    return long_index(__reduce_min_sync(~0u, short_index(index)));
}

// The largest of every LANES lanes, a power of two, in each of them; NaN gives way.
template <int LANES> __device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

__device__ __forceinline__ uint4 packed(const RowSums &r) {
    return make_uint4(__float_as_uint(r.softmax.max), __float_as_uint(r.softmax.rest),
                      short_index(r.largest), __float_as_uint(r.weighted));
}

__device__ __forceinline__ RowSums unpacked(uint4 p) {
    RowSums r;
    r.softmax.max = __uint_as_float(p.x), r.softmax.rest = __uint_as_float(p.y);
    r.largest = long_index(p.z);
    r.weighted = __uint_as_float(p.w);
    return r;
}

// The sums of every LANES lanes, a power of two, in each of them: what the first of those with the
// largest logit has, and the others' terms beside it. Beyond LANES lanes the same ones again.
template <int LANES, bool PLAIN> __device__ __forceinline__ RowSums join_lanes(RowSums r) {
    float top = lanes_max<LANES>(r.softmax.max);
    bool has_top = r.softmax.max == top;
    int first = __ffs(__ballot_sync(~0u, has_top)) - 1; // -1: all are NaN
    float rest = r.softmax.rest;
    if ((int)(threadIdx.x % LANES) != first) rest = ratio(r.softmax.max, top) * (1 + rest);
    r.largest = first_index(has_top ? r.largest : NONE);
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2) {
        rest += __shfl_xor_sync(~0u, rest, lane);
        if (!PLAIN) r.weighted += __shfl_xor_sync(~0u, r.weighted, lane);
    }
    r.softmax.max = top, r.softmax.rest = rest;
    return r;
}

// Those of no logit: nothing beside any other.
__device__ __forceinline__ RowSums no_sums() {
    RowSums r;
    r.softmax.rest = -1; // and its maximum's own term, which is 1
    return r;
}

// How a row's sums come together: lanes by shuffles, warps and then blocks by shared memory. Every
// block of a cluster sends its sums to all; whoever has those of all blocks knows too that they
// have read their shares of the row, which may be overwritten from then on.
struct Exchange {
    uint4 of_warp[WARPS], of_block[MOST_BLOCKS];
    uint64_t inbox;

    // By all threads, as early as can be: join() then need not wait for blocks that start late.
    __device__ __forceinline__ void begin(uint32_t size) {
        if (size == 1) return;
        if (threadIdx.x == 0) open_inbox(&inbox, size * sizeof *of_block);
        cluster_arrive();
    }

    // The row's sums, in every thread of the cluster, from those of its warps.
    template <bool PLAIN>
    __device__ __forceinline__ RowSums join(RowSums r, uint32_t rank, uint32_t size) {
        uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (lane == 0) of_warp[warp] = packed(r);
        __syncthreads();
        if (size == 1) return join_lanes<WARPS, PLAIN>(unpacked(of_warp[lane % WARPS]));
        cluster_wait(); // all inboxes are open
        if (warp == 0) {
            r = join_lanes<WARPS, PLAIN>(unpacked(of_warp[lane % WARPS]));
            if (lane < size) send(&of_block[rank], &inbox, lane, packed(r));
        }
        wait_for_inbox(&inbox);
        lane %= MOST_BLOCKS;
        return join_lanes<MOST_BLOCKS, PLAIN>(lane < size ? unpacked(of_block[lane]) : no_sums());
    }
};

// A block's share of a row: its vectors begin .. end - 1, each used by one thread alone. KEEP: in
// shared memory; else read again for each use. The row's first and last vectors may be edges, of
// which a part lies outside.
template <typename T, bool KEEP> struct Share {
    static constexpr int VEC = RowVectors<T>::VEC;
    T *row;
    RowVectors<T, int> vectors;
    int begin, end;
    uint4 *kept;
    uint64_t *inbox; // of the bulk copy

    __device__ __forceinline__ Share(T *row, int64_t V, uint32_t rank, uint32_t size)
        : row(row), vectors(row, V) {
        extern __shared__ uint4 shared[];
        __shared__ uint64_t arrived;
        int share = (vectors.count + size - 1) >> (__ffs(size) - 1); // size: a power of two
        begin = rank * share, end = min(begin + share, vectors.count);
        kept = shared, inbox = &arrived;
    }

    // f(k) for each of this thread's vectors.
    template <typename F> __device__ __forceinline__ void each(F f) const {
        for (int k = begin + threadIdx.x; k < end; k += THREADS) f(k);
    }
    // The same for the whole ones, without a test of each.
    template <typename F> __device__ __forceinline__ void each_whole(F f) const {
        int k = begin + threadIdx.x, last = whole_end();
        if (k < whole_begin()) k += THREADS;
#pragma unroll 4
        for (; k < last; k += THREADS) f(k);
    }
    __device__ __forceinline__ int whole_begin() const { return max(begin, vectors.lead > 0); }
    __device__ __forceinline__ int whole_end() const {
        return min(end, (vectors.V + vectors.lead) / VEC);
    }
    template <typename F> __device__ __forceinline__ void each_edge(F f) const {
        int last = vectors.count - 1;
        if (vectors.lead == 0 && vectors.V % VEC == 0) return; // most often
#pragma unroll 1
        for (int k = 0; k <= last; k += max(last, 1))
            if (!vectors.whole(k) && owns(k)) f(k);
    }
    __device__ __forceinline__ bool owns(int k) const {
        return k >= begin && k < end && (k - begin) % THREADS == threadIdx.x;
    }

    // Loads of the vectors to keep, which get() may read after wait().
    __device__ __forceinline__ void start() const {
        if (!KEEP) return;
        const T *aligned = row - vectors.lead;
        if (BULK) {
            if (threadIdx.x == 0) start_bulk(aligned);
            __syncthreads(); // from here on anyone may wait for the inbox: it is open
        } else {
            each_whole([&](int k) { copy_async(kept + (k - begin), aligned + (int64_t)k * VEC); });
        }
        each_edge([&](int k) { store<T, VEC>((T *)(kept + (k - begin)), padded(k)); });
    }
    __device__ __forceinline__ void start_bulk(const T *aligned) const {
        int first = whole_begin(), bytes = max(whole_end() - first, 0) * 16;
        open_inbox(inbox, bytes);
        if (bytes > 0) // else the inbox has all that it was opened for
            copy_bulk(kept + (first - begin), aligned + (int64_t)first * VEC, bytes, inbox);
    }
    __device__ __forceinline__ void wait() const {
        if (!KEEP) return;
        if (BULK) wait_for_inbox(inbox);
        else wait_for_copies();
    }
    __device__ __forceinline__ Packed<T, VEC> get(int k) const {
        return KEEP ? load_packed<T, VEC>((const T *)(kept + (k - begin))) : padded(k);
    }
    __device__ __forceinline__ Packed<T, VEC> padded(int k) const {
        if (vectors.whole(k)) return load_packed<T, VEC>(row + vectors.first(k));
        float z[VEC];
        vectors.load_or_pad(z, row, k);
        return pack<T, VEC>(z);
    }

    // f(logit, index) in the row's place.
    template <typename F> __device__ __forceinline__ void write(F f) const {
        T *aligned = row - vectors.lead;
        each_whole([&](int k) {
            Packed<T, VEC> z = get(k);
            float d[VEC];
#pragma unroll
            for (int j = 0; j < VEC; j++) d[j] = f(z[j], vectors.first(k) + j);
            store_whole(aligned + (int64_t)k * VEC, pack<T, VEC>(d).word);
        });
        each_edge([&](int k) {
            Packed<T, VEC> z = get(k);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                int v = vectors.first(k) + j;
                if (v >= 0 && v < vectors.V) row[v] = from_float<T>(f(z[j], v));
            }
        });
    }
};

// ---- The sums of a row --------------------------------------------------------------------------

// The larger of the values in two words, or of their halves; NaN gives way.
template <typename T> __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    if constexpr (sizeof(T) == 4)
        return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
    return IS_BF16<T> ? max_bf16x2(a, b) : max_f16x2(a, b);
}

// The largest logit of this warp's vectors; NaN gives way.
template <typename T> __device__ __forceinline__ float largest_of(const Share<T, true> &share) {
    constexpr int VEC = RowVectors<T>::VEC;
    float none[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) none[j] = -INFINITY;
    Packed<T, VEC> top = pack<T, VEC>(none);
#pragma unroll 4
    for (int k = share.begin + threadIdx.x; k < share.end; k += THREADS) {
        Packed<T, VEC> z = share.get(k);
#pragma unroll
        for (int i = 0; i < 4; i++) top.word[i] = larger<T>(top.word[i], z.word[i]);
    }
#pragma unroll
    for (int i = 1; i < 4; i++) top.word[0] = larger<T>(top.word[0], top.word[i]);
    return lanes_max<32>(fmaxf(top[0], top[1])); // fp32: top[1] is no larger
}

// The sum of exp(z - shift), by halves.
template <typename T, int VEC>
__device__ __forceinline__ float exp_sum(const Packed<T, VEC> &z, float shift) {
    float e[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) e[j] = exp_of<T>(z[j], shift);
#pragma unroll
    for (int n = VEC / 2; n > 0; n /= 2)
#pragma unroll
        for (int j = 0; j < n; j++) e[j] += e[j + n];
    return e[0];
}

// The sums of this warp's vectors of a plain row: first the largest logit, which costs little, so
// that nothing is scaled anew afterwards. Its term is left out where it stands; a vector that has
// none like it adds up to less than 1, most often.
template <typename T> __device__ __forceinline__ RowSums warp_sums(const Share<T, true> &share) {
    constexpr int VEC = RowVectors<T>::VEC;
    RowSums r;
    float top = largest_of(share), shift = top == -INFINITY ? 0.0f : top, rest = 0;
    int largest = -1; // where this lane left out a term
#pragma unroll 2
    for (int k = share.begin + threadIdx.x; k < share.end; k += THREADS) {
        Packed<T, VEC> z = share.get(k);
        float part = exp_sum(z, shift);
        if (!(part < 1)) { // NaN too: inf - inf
            part = 0;
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                if (largest < 0 && z[j] == top) largest = share.vectors.first(k) + j;
                else part += exp_of<T>(z[j], shift);
            }
        }
        rest += part;
    }
    // One term stays out of the warp's sum.
    int left_out = __popc(__ballot_sync(~0u, largest >= 0));
    r.softmax.max = top, r.softmax.rest = warp_sum(rest) + (float)max(left_out - 1, 0);
    r.largest = first_index(largest < 0 ? NONE : largest);
    return r;
}

// The same vector by vector, in one pass, for rows that are not kept or not plain.
template <typename T, bool PLAIN, bool KEEP>
__device__ __forceinline__ RowSums warp_sums(const Share<T, KEEP> &share, const Labels &labels,
                                             bool want_largest, float origin) {
    constexpr int VEC = RowVectors<T>::VEC;
    RowSums r;
    share.each([&](int k) {
        Packed<T, VEC> packed = share.get(k);
        float z[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) z[j] = packed[j];
        add_vector<T, PLAIN>(r, z, share.vectors.first(k), labels, want_largest, origin);
    });
    return join_lanes<32, PLAIN>(r);
}

// ---- One row ------------------------------------------------------------------------------------

// d z_y. Where y's logit is the largest, p - 1 is no difference of nearly equal numbers so.
template <bool PLAIN>
__device__ __forceinline__ float gradient_at_label(float z, int64_t y, const Softmax &s,
                                                   float inverse, const RowGradient &g,
                                                   const Labels &labels) {
    float p = expf(z - s.max) * inverse, less_one = z == s.max ? -s.rest * inverse : p - 1;
    return finished<PLAIN>(g.own * less_one + g.other * p, z, y, g.smooth, labels);
}

// The scores of one row, where scores.losses is given, and with `gradient` the logits' gradient in
// their place. One kernel for both, so that the scores have the same bits with a gradient and
// without. Row i of logits has label first_row + i. dloss NULL: 1; dlse or NULL.
template <typename T, bool PLAIN, bool KEEP>
__global__ void __launch_bounds__(THREADS, PLAIN ? PLAIN_RESIDENT : RESIDENT)
    linear_cross_entropy_kernel(T *logits, int64_t stride, int64_t first_row, Labels labels,
                                Scores scores, const float *__restrict__ dloss,
                                const float *__restrict__ dlse, bool gradient) {
    constexpr int VEC = RowVectors<T>::VEC;
    __shared__ Exchange exchange;
    uint32_t rank = cluster_rank(), size = cluster_size();
    int64_t i = blockIdx.x >> (__ffs(size) - 1);
    T *row = logits + i * stride;
    Share<T, KEEP> share(row, labels.V, rank, size);
    share.start(); // before anything that waits for memory
    exchange.begin(size);
    int64_t n = first_row + i, y = labels.of(n);
    float cap = PLAIN ? 0 : (float)labels.o.softcap;
    float label_logit = y >= 0 ? capped(to_float(row[y]), cap) : 0;
    float origin = PLAIN ? 0 : origin_of(row, labels);
    float upstream = dloss ? dloss[labels.o.reduction == REDUCE_NONE ? n : 0] : 1;
    RowGradient g = gradient_of(labels, y, upstream, dlse ? dlse[n] : 0, scores.stats);

    share.wait();
    RowSums r;
    if constexpr (PLAIN && KEEP) r = warp_sums(share);
    else r = warp_sums<T, PLAIN>(share, labels, scores.want_largest, origin);
    // Here the label's logit has come: after join() some block writes its gradient in that place.
    label_logit = __shfl_sync(~0u, label_logit, 0);
    r = exchange.join<PLAIN>(r, rank, size);
    float top = r.softmax.max, log_sum = top == INFINITY ? NAN : log1pf(r.softmax.rest);
    float inverse = top == INFINITY ? NAN : 1 / (1 + r.softmax.rest);
    if (scores.losses && rank == 0 && threadIdx.x == 0)
        scores.write<PLAIN, float>(n, y, labels, top, log_sum, label_logit, r, origin);
    if (!gradient) return;

    g.finish(top + log_sum);
    bool zero = g.zero(); // even where logits are infinite
    float factor = (g.own + g.other) * inverse;
    if (zero) share.write([](float, int) { return 0.0f; });
    else
        share.write([&](float z, int v) {
            z = capped(z, cap);
            return finished<PLAIN>(factor * exp_of<T>(z, top), z, v, g.smooth, labels);
        });
    int own = y >= 0 && !zero ? ((int)y + share.vectors.lead) / VEC - share.begin : -1;
    if (own >= 0 && own < share.end - share.begin && own % THREADS == threadIdx.x)
        row[y] =
            from_float<T>(gradient_at_label<PLAIN>(label_logit, y, r.softmax, inverse, g, labels));
}

// logits: those of the rows from first_row on, which with `gradient` become their gradients.
template <typename T>
static const char *launch_rows(const Tensor *logits, int64_t first_row, const Labels &labels,
                               const Scores &scores, const Tensor *dloss, const Tensor *dlse,
                               bool gradient, void *stream) {
    constexpr int64_t VEC = RowVectors<T>::VEC;
    int64_t count = (labels.V + 2 * (VEC - 1)) / VEC; // of vectors, at the worst place of a row
    int cluster = 1, most = has_clusters() ? MOST_BLOCKS : 1;
    while (cluster < most && count * 16 > SHARE * cluster) cluster *= 2;
    size_t share = (count + cluster - 1) / cluster * 16, room = max_shared_memory(logits->device);
    bool keep = share + 1024 <= room, plain = is_plain(labels);
    auto kernel = keep    ? plain ? linear_cross_entropy_kernel<T, true, true>
                                  : linear_cross_entropy_kernel<T, false, true>
                     : plain ? linear_cross_entropy_kernel<T, true, false>
                          : linear_cross_entropy_kernel<T, false, false>;
    int threads = has_clusters() ? CLUSTER_THREADS : LONE_THREADS; // as the code was compiled
    return launch_clusters(cluster, kernel, logits->shape[0] * cluster, threads, keep ? share : 0,
                           stream, (T *)logits->data, logits->stride[0], first_row, labels, scores,
                           floats(dloss), floats(dlse), gradient);
}

// ---- Column sums and roundings ------------------------------------------------------------------

constexpr int COLUMNS = 32, GROUPS = 16; // of columns and of rows a block

// db_accum = or += the column sums of one chunk, each taken in double, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(COLUMNS *GROUPS)
    column_sums_kernel(float *__restrict__ sums, const T *__restrict__ dlogits, int64_t stride,
                       int64_t rows, int64_t V, bool first) {
    __shared__ double part[GROUPS][COLUMNS];
    int column = threadIdx.x % COLUMNS, group = threadIdx.x / COLUMNS;
    int64_t v = (int64_t)blockIdx.x * COLUMNS + column;
    double sum = 0;
    if (v < V) {
#pragma unroll 8
        for (int64_t n = group; n < rows; n += GROUPS) sum += to_float(dlogits[n * stride + v]);
    }
    part[group][column] = sum;
    __syncthreads();
    if (group || v >= V) return;
    for (int g = 1; g < GROUPS; g++) sum += part[g][column];
    sums[v] = (float)(first ? sum : sums[v] + sum);
}

template <typename T>
static const char *add_columns(const Tensor *db_accum, const Tensor *dlogits, bool first,
                               void *stream) {
    int64_t V = dlogits->shape[1];
    return launch(column_sums_kernel<T>, (V + COLUMNS - 1) / COLUMNS, COLUMNS * GROUPS, 0, stream,
                  floats(db_accum), (const T *)dlogits->data, dlogits->stride[0], dlogits->shape[0],
                  V, first);
}

// One row of `to` from that of `from`: N elements of a thread at once.
template <typename T, int N>
__global__ void __launch_bounds__(BLOCK)
    round_kernel(T *__restrict__ to, int64_t to_stride, const float *__restrict__ from,
                 int64_t from_stride, int64_t width) {
    int64_t row = blockIdx.x;
    for (int64_t v = threadIdx.x * N; v < width; v += BLOCK * N) {
        float values[N];
        load<float, N>(values, from + row * from_stride + v);
        store<T, N>(to + row * to_stride + v, values);
    }
}

template <typename T>
static const char *round_to(const Tensor *to, const Tensor *from, void *stream) {
    int64_t width = to->shape[to->ndim - 1], rows = to->ndim > 1 ? to->shape[0] : 1;
    int64_t to_stride = to->ndim > 1 ? to->stride[0] : width;
    int64_t from_stride = from->ndim > 1 ? from->stride[0] : width;
    bool vectors = (uintptr_t)to->data % 16 == 0 && (uintptr_t)from->data % 16 == 0 &&
                   (width | (rows > 1 ? to_stride | from_stride : 0)) % 4 == 0;
    auto kernel = vectors ? round_kernel<T, 4> : round_kernel<T, 1>;
    return launch(kernel, rows, BLOCK, 0, stream, (T *)to->data, to_stride, floats(from),
                  from_stride, width);
}

static const char *round_rows(const Tensor *to, const Tensor *from, void *stream) {
    BY_DTYPE(to->dtype, round_to<T>(to, from, stream))
}

// ---- The chunks ---------------------------------------------------------------------------------

struct Call {
    const Tensor *dx, *dw, *db, *dw_accum, *db_accum, *logits, *workspace;
    const Tensor *x, *w, *bias;
    void *stream;

    const Tensor *sum_of_dw() const { return dw_accum && dw ? dw_accum : dw; }
    bool has_gradient() const { return dx || dw || db; }
    bool in_dw() const { return logits_in_dw(logits, dw, dw_accum); }
};

static int64_t item_size(const Tensor *t) { return t->dtype == F32 ? 4 : 2; }

// Rows first .. first + n of a matrix.
static Tensor rows_of(const Tensor *t, int64_t first, int64_t n) {
    Tensor part = *t;
    part.data = (char *)t->data + first * t->stride[0] * item_size(t);
    part.shape[0] = n;
    return part;
}

static Tensor transpose(const Tensor *t) {
    Tensor out = *t;
    out.shape[0] = t->shape[1], out.shape[1] = t->shape[0];
    out.stride[0] = t->stride[1], out.stride[1] = t->stride[0];
    return out;
}

// A chunk's matrices and its products.
struct Chunk {
    int64_t first; // row
    Tensor x, logits, dx, dw, dlogits_columns, w_columns, workspace;
    Gemm forward, of_x, of_w;
    // Where dw lies over the logits: its rows on them, made last, from columns that were spared.
    Tensor dw_over, over, spare, spare_columns;
    Gemm of_w_over;

    Chunk(const Call &c, int64_t first, int64_t n) : first(first) {
        const Tensor *space = c.workspace ? &workspace : nullptr;
        x = rows_of(c.x, first, n);
        logits = rows_of(c.logits, 0, n);
        if (space) workspace = *c.workspace;
        if (c.dx) dx = rows_of(c.dx, first, n);
        if (c.dw) dw = *c.sum_of_dw();
        dlogits_columns = transpose(&logits), w_columns = transpose(c.w);
        if (c.in_dw()) divide(c);
        forward = {&logits, &x, &w_columns, c.bias, space, 0};
        of_x = {&dx, &logits, c.w, nullptr, space, 0};
        of_w = {&dw, &dlogits_columns, &x, nullptr, space, first > 0};
        of_w_over = {&dw_over, &spare_columns, &x, nullptr, space, 0};
    }
    Chunk(const Chunk &) = delete; // it points into itself

    void divide(const Call &c) {
        int64_t under = dw_rows_on_logits(&logits, c.dw), V = c.dw->shape[0];
        over = logits, over.shape[1] = under;
        dw_over = rows_of(c.dw, 0, under), dw = rows_of(c.dw, under, V - under);
        dlogits_columns = rows_of(&dlogits_columns, under, V - under);
        int64_t start =
            spare_logits(&spare, &logits, under, item_size(&logits), workspace.shape[0]);
        spare.data = (char *)workspace.data + start;
        workspace.shape[0] = start;
        spare_columns = transpose(&spare);
    }
};

static const char *copy_rows(const Tensor *to, const Tensor *from, void *stream) {
    size_t item = item_size(to), width = to->shape[1] * item;
    if (!width || !to->shape[0]) return nullptr;
    cudaError_t status =
        cudaMemcpy2DAsync(to->data, to->stride[0] * item, from->data, from->stride[0] * item, width,
                          to->shape[0], cudaMemcpyDeviceToDevice, (cudaStream_t)stream);
    return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

// The algorithms for chunks of n rows, before the outputs hold anything; whether such a chunk is
// the first one, whose dw replaces, and whether one comes later, whose dw adds. The logits of x
// stand for their gradients, which need not be dense.
static const char *choose(const Call &c, int64_t n, bool first, bool later) {
    if (n == 0) return nullptr;
    Chunk chunk(c, 0, n);
    Gemm more = chunk.of_w;
    more.beta = 1;
    const Gemm *wanted[5] = {&chunk.forward};
    int count = 1;
    if (c.dx) wanted[count++] = &chunk.of_x;
    if (c.dw && first) wanted[count++] = &chunk.of_w;
    if (c.dw && later) wanted[count++] = &more;
    if (c.in_dw()) wanted[count++] = &chunk.of_w_over;
    bool open = false;
    for (int i = 0; i < count; i++) open = open || gemm_is_open(wanted[i], c.stream);
    if (!open) return nullptr;
    const char *error = gemm_choose(&chunk.forward, c.stream);
    if (!error) error = gemm(&chunk.forward, c.stream);
    if (!error && c.in_dw()) error = copy_rows(&chunk.spare, &chunk.over, c.stream);
    for (int i = 1; i < count && !error; i++) error = gemm_choose(wanted[i], c.stream);
    return error;
}

static const char *chunk_columns(const Call &c, const Chunk &chunk) {
    BY_DTYPE(chunk.logits.dtype,
             add_columns<T>(c.db_accum, &chunk.logits, chunk.first == 0, c.stream))
}

static const char *chunk_gradients(const Call &c, const Chunk &chunk) {
    const char *error = c.dx ? gemm(&chunk.of_x, c.stream) : nullptr;
    if (!error && c.db) error = chunk_columns(c, chunk);
    if (!error && c.dw) error = gemm(&chunk.of_w, c.stream);
    if (error || !c.in_dw()) return error;
    error = copy_rows(&chunk.spare, &chunk.over, c.stream);
    return error ? error : gemm(&chunk.of_w_over, c.stream);
}

static const char *score_chunk(const Call &c, const Chunk &chunk, const Labels &labels,
                               const Scores &scores, const Tensor *dloss, const Tensor *dlse) {
    BY_DTYPE(chunk.logits.dtype, launch_rows<T>(&chunk.logits, chunk.first, labels, scores, dloss,
                                                dlse, c.has_gradient(), c.stream))
}

static const char *all_chunks(const Call &c, const Labels &labels, const Scores &scores,
                              const Tensor *num_items, const Tensor *dloss, const Tensor *dlse,
                              Tensor *stats) {
    if (c.x->dtype == F64) return "NotImplementedError: float64 runs on the CPU only";
    int64_t N = labels.N, C = c.logits->shape[0], first = 0;
    const char *error = cross_entropy_stats(labels, stats, num_items, c.stream);
    if (!error && N > C) error = choose(c, N % C, /*first=*/false, /*later=*/true);
    if (!error) error = choose(c, N < C ? N : C, /*first=*/true, /*later=*/N >= 2 * C);
    do { // once even for no rows, which makes dw and db zero
        if (error) return error;
        int64_t n = N - first < C ? N - first : C;
        Chunk chunk(c, first, n);
        error = gemm(&chunk.forward, c.stream);
        if (!error) error = score_chunk(c, chunk, labels, scores, dloss, dlse);
        if (!error) error = chunk_gradients(c, chunk);
        first += n;
    } while (first < N);
    if (!error && c.dw && c.dw_accum) error = round_rows(c.dw, c.dw_accum, c.stream);
    if (!error && c.db) error = round_rows(c.db, c.db_accum, c.stream);
    return error;
}

extern "C" const char *linear_cross_entropy_fwd_cuda(
    Tensor *loss, Tensor *losses, Tensor *lse, Tensor *accuracy, Tensor *predicted, Tensor *dx,
    Tensor *dw, Tensor *db, Tensor *dw_accum, Tensor *db_accum, Tensor *logits_chunk, Tensor *stats,
    Tensor *workspace, const Tensor *x, const Tensor *w, const Tensor *target, const Tensor *bias,
    const Tensor *class_weight, const Tensor *num_items, const LossOptions *options, void *stream) {
    Call call = {dx, dw, db, dw_accum, db_accum, logits_chunk, workspace, x, w, bias, stream};
    Labels labels = labels_of(target, class_weight, x->shape[0], w->shape[0], options);
    Scores scores = scores_of(losses, lse, nullptr, predicted, stats, accuracy);
    const char *error = all_chunks(call, labels, scores, num_items, nullptr, nullptr, stats);
    return error ? error : cross_entropy_reduce(labels, scores, loss, accuracy, stream);
}

extern "C" const char *linear_cross_entropy_bwd_cuda(
    Tensor *dx, Tensor *dw, Tensor *db, Tensor *dw_accum, Tensor *db_accum, Tensor *logits_chunk,
    Tensor *stats, Tensor *workspace, const Tensor *dloss, const Tensor *dlse, const Tensor *x,
    const Tensor *w, const Tensor *target, const Tensor *bias, const Tensor *class_weight,
    const Tensor *num_items, const Tensor *lse, const LossOptions *options, void *stream) {
    (void)lse; // the rows are read for it anyway
    Call call = {dx, dw, db, dw_accum, db_accum, logits_chunk, workspace, x, w, bias, stream};
    if (!call.has_gradient()) return nullptr;
    Labels labels = labels_of(target, class_weight, x->shape[0], w->shape[0], options);
    Scores scores = scores_of(nullptr, nullptr, nullptr, nullptr, stats, nullptr);
    return all_chunks(call, labels, scores, num_items, dloss, dlse, stats);
}
