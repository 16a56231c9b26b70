// rms_norm.cu: RMSNorm, and RMSNorm of a sum, forward and backward (formulas: csrc/ops.h).
//
// Memory-bound: 2 elements moved per element forward (x in, y out), 4 with a residual, 3 backward
// (dy, x, dx), 4 with ds. A row stays in the registers of one group of threads between its sum and
// its result; item i of a thread is the 16-byte vector at column (i * blockDim.x + threadIdx.x):
//
//   block:     blockDim.y groups, a row each; a group is blockDim.x threads: part of a warp for
//              narrow rows, one warp, or several
//   forward:   a block per blockDim.y rows, many of them on an SM, which keeps the memory busy
//   backward:  dw is a sum over all rows, so one block a multiprocessor stays for many rows, and
//              the next row is loaded before this one is used (if the registers allow it)
//
// dw: every thread adds up its own columns over the rows of its group, the block adds up its
// groups, and a second kernel the blocks, each in a fixed order: no atomics, the same bits every
// time. dx may be dy: a row is written by the group that has read it, and by no other.
// Rows that are not whole 16-byte vectors, or too wide for the registers, take the plain kernels.
#include "common.cuh"

constexpr int FWD_ITEMS = 2;     // of a thread forward,
constexpr int WIDE_ITEMS = 4;    // and where a row would take too many threads
constexpr int FWD_THREADS = 128; // a block forward, where a row takes no more
constexpr int MAX_THREADS = 1024;
constexpr int PLAIN_THREADS = 256;

struct Weight {
    const void *data;
    Dtype dtype;
};

// An operand or result: rows `stride` elements apart.
template <typename T> struct Matrix {
    T *data;
    int64_t stride;
    __device__ T *row(int64_t n) const { return data + n * stride; }
};

__device__ __forceinline__ int column_of(int item, int vec) {
    return (item * blockDim.x + threadIdx.x) * vec;
}

// Multiplied by rather than divided: a division takes as long as the sum before it.
__device__ __forceinline__ float one_over(int H) { return __frcp_rn((float)H); }

// A sum over the threads of a row, for all of them; two calls in turn use two buffers, so that one
// barrier is enough. OWN_BARRIER: one for each group, so that they need not go in step; the block
// then takes all of its 16 barriers, which leaves room for few blocks.
template <bool OWN_BARRIER> struct RowSum {
    float (*part)[32];
    int turn = 0;
    __device__ float operator()(float x) {
        if (blockDim.x < 32) {
            for (int other = blockDim.x / 2; other > 0; other /= 2)
                x += __shfl_xor_sync(~0u, x, other);
            return x;
        }
        x = warp_sum(x);
        if (blockDim.x == 32) return x;
        int warps = blockDim.x / 32, lane = threadIdx.x % 32;
        float *mine = part[turn] + threadIdx.y * warps;
        if (lane == 0) mine[threadIdx.x / 32] = x;
        if (OWN_BARRIER) named_barrier(threadIdx.y + 1, blockDim.x);
        else __syncthreads();
        turn ^= 1;
        return warp_sum(lane < warps ? mine[lane] : 0.0f);
    }
};

// ---- Forward ------------------------------------------------------------------------------------

// W: the weight's type. WHOLE: the threads' vectors end where the row does, as for most sizes in
// use. The weight is loaded with the row, not behind the barrier, where nothing would hide it.
template <typename T, typename W, int ITEMS, bool ADD, bool WHOLE>
__global__ void __launch_bounds__(MAX_THREADS)
    rms_norm_fwd_kernel(Matrix<T> y, Matrix<T> s, float *__restrict__ rstd, Matrix<const T> x,
                        Matrix<const T> residual, const W *__restrict__ w, int64_t N, int H,
                        float eps, float offset) {
    constexpr int VEC = 16 / sizeof(T);
    constexpr bool EARLY = ITEMS == FWD_ITEMS; // or there are too few registers
    __shared__ float part[2][32];
    RowSum<false> sum_over_row{part};
    int64_t row = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    bool live = row < N; // the threads beyond the last row meet the others at the barriers
    Packed<T, VEC> in[ITEMS], other[ITEMS];
    Packed<W, VEC> weight[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = column_of(i, VEC);
        if (!live || (!WHOLE && h >= H)) continue;
        in[i] = load_packed<T, VEC>(x.row(row) + h);
        if (ADD) other[i] = load_packed<T, VEC>(residual.row(row) + h);
        if (EARLY) weight[i] = load_packed<W, VEC>(w + h);
    }
    float v[VEC], sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = column_of(i, VEC);
        if (!live || (!WHOLE && h >= H)) continue;
        if (ADD) {
#pragma unroll
            for (int j = 0; j < VEC; j++) v[j] = in[i][j] + other[i][j];
            in[i] = pack<T, VEC>(v); // rounded
            store<T, VEC>(s.row(row) + h, in[i]);
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += in[i][j] * in[i][j];
    }
    float r = rsqrtf(sum_over_row(sum) * one_over(H) + eps);
    if (!live) return;
    if (rstd && threadIdx.x == 0) rstd[row] = r;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = column_of(i, VEC);
        if (!WHOLE && h >= H) continue;
        if (!EARLY) weight[i] = load_packed<W, VEC>(w + h);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            float xhat = in[i][j] * r;
            v[j] = (offset == 0 ? rounded<T>(xhat) : xhat) * (weight[i][j] + offset);
        }
        store<T, VEC>(y.row(row) + h, v);
    }
}

// ---- Backward -----------------------------------------------------------------------------------

// What a thread has of a row, as loaded; zeros beyond the last row and column.
template <typename T, int ITEMS, bool WHOLE> struct Operands {
    static constexpr int VEC = 16 / sizeof(T);
    Packed<T, VEC> x[ITEMS], dy[ITEMS];
    float rstd;

    __device__ void read(Matrix<const T> all_x, Matrix<const T> all_dy, const float *all_rstd,
                         int row, int N, int H) {
        rstd = row < N ? all_rstd[row] : 0.0f;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int h = column_of(i, VEC);
            x[i] = {}, dy[i] = {};
            if (row >= N || (!WHOLE && h >= H)) continue;
            x[i] = load_packed<T, VEC>(all_x.row(row) + h);
            dy[i] = load_packed<T, VEC>(all_dy.row(row) + h);
        }
    }
};

// dw_partial[blockIdx.x] = the sum over the block's groups, in their order, of dw.
template <int ITEMS, int VEC>
__device__ void write_partial(float *dw_partial, const float (&dw)[ITEMS][VEC], int H) {
    extern __shared__ __align__(16) float sums[]; // (blockDim.y, H)
    float *mine = blockDim.y > 1 ? sums + threadIdx.y * H : dw_partial + (int64_t)blockIdx.x * H;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = column_of(i, VEC);
        if (h >= H) continue;
#pragma unroll
        for (int j = 0; j < VEC; j += 4)
            *(float4 *)(mine + h + j) =
                make_float4(dw[i][j], dw[i][j + 1], dw[i][j + 2], dw[i][j + 3]);
    }
    if (blockDim.y == 1) return;
    __syncthreads();
    int thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    for (int h = thread; h < H; h += threads) {
        float sum = 0;
        for (int group = 0; group < blockDim.y; group++) sum += sums[group * H + h];
        dw_partial[(int64_t)blockIdx.x * H + h] = sum;
    }
}

// Of ITEMS vectors a thread and operand: the registers then fill a multiprocessor.
template <int ITEMS> constexpr int BWD_THREADS = ITEMS == 1 ? 1024 : 512;

// W: the weight's type.
template <typename T, typename W, int ITEMS, bool WHOLE>
__global__ void __launch_bounds__(BWD_THREADS<ITEMS>, 1)
    rms_norm_bwd_kernel(Matrix<T> dx, float *__restrict__ dw_partial, Matrix<const T> dy,
                        Matrix<const T> ds, Matrix<const T> x, const W *__restrict__ w,
                        const float *__restrict__ rstd, int N, int H, float offset) {
    constexpr int VEC = 16 / sizeof(T);
    constexpr bool AHEAD = ITEMS == 1;                     // there is room for the next row,
    constexpr bool KEEP = AHEAD && sizeof(W) <= sizeof(T); // and for the weight
    __shared__ float part[2][32];
    RowSum<true> sum_over_row{part};
    int row = blockIdx.x * blockDim.y + threadIdx.y, step = gridDim.x * blockDim.y;
    float share = one_over(H);
    Operands<T, ITEMS, WHOLE> now, next;
    now.read(x, dy, rstd, row, N, H);
    Packed<W, VEC> weight[ITEMS] = {};
    float dw[ITEMS][VEC] = {};
#pragma unroll
    for (int i = 0; KEEP && i < ITEMS; i++) {
        int h = column_of(i, VEC);
        if (WHOLE || h < H) weight[i] = load_packed<W, VEC>(w + h);
    }
    // All groups go round equally often: those of one warp shuffle together. Two rounds in turn: a
    // copy of next to now would have to wait for it before the row after it is asked for.
#pragma unroll 2
    for (int first = blockIdx.x * blockDim.y; first < N; first += step, row += step) {
        if (AHEAD) next.read(x, dy, rstd, row + step, N, H);
        Packed<T, VEC> residual[ITEMS] = {};
        float r = now.rstd, dot = 0;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int h = column_of(i, VEC);
            if (AHEAD && ds.data && row < N && (WHOLE || h < H))
                residual[i] = load_packed<T, VEC>(ds.row(row) + h);
            if (!KEEP && (WHOLE || h < H)) weight[i] = load_packed<W, VEC>(w + h);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float xhat = now.x[i][j] * r;
                dw[i][j] += now.dy[i][j] * (offset == 0 ? rounded<T>(xhat) : xhat);
                dot += now.dy[i][j] * (weight[i][j] + offset) * xhat;
            }
        }
        float mean = sum_over_row(dot) * share;
        if (!KEEP) asm volatile("" : "+l"(w)); // or the compiler would keep the weight after all
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int h = column_of(i, VEC);
            if (row >= N || (!WHOLE && h >= H)) continue;
            float out[VEC];
            unpack_again(now.x[i]), unpack_again(now.dy[i]), unpack_again(weight[i]);
            if (!KEEP) weight[i] = load_packed<W, VEC>(w + h);
            if (!AHEAD && ds.data) residual[i] = load_packed<T, VEC>(ds.row(row) + h);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                float g = now.dy[i][j] * (weight[i][j] + offset);
                out[j] = r * (g - now.x[i][j] * r * mean) + residual[i][j];
            }
            store<T, VEC>(dx.row(row) + h, out);
        }
        if (AHEAD) now = next;
        else now.read(x, dy, rstd, row + step, N, H);
    }
    let_next_kernel_start();
    if (dw_partial) write_partial<ITEMS, VEC>(dw_partial, dw, H);
}

// ---- Plain kernels: any width, any alignment; one element at a time -----------------------------

template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    rms_norm_fwd_plain_kernel(Matrix<T> y, Matrix<T> s, float *__restrict__ rstd, Matrix<const T> x,
                              Matrix<const T> residual, Weight w, int64_t N, int64_t H, float eps,
                              float offset) {
    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        const T *from = x.row(row);
        float sum = 0;
        for (int64_t h = threadIdx.x; h < H; h += PLAIN_THREADS) {
            float v = to_float(from[h]);
            if (residual.data) {
                v = rounded<T>(v + to_float(residual.row(row)[h]));
                s.row(row)[h] = from_float<T>(v);
            }
            sum += v * v;
        }
        float r = rsqrtf(block_sum(sum) / (float)H + eps);
        if (residual.data) from = s.row(row); // each thread reads back what it wrote itself
        for (int64_t h = threadIdx.x; h < H; h += PLAIN_THREADS) {
            float weight[1], v = to_float(from[h]) * r;
            load_any<1>(weight, w.data, w.dtype, h);
            y.row(row)[h] = from_float<T>((offset == 0 ? rounded<T>(v) : v) * (weight[0] + offset));
        }
        if (rstd && threadIdx.x == 0) rstd[row] = r;
    }
}

// The sum of dy * xhat over the block's rows grows in dw_partial[blockIdx.x] itself: a thread only
// ever touches its own columns.
template <typename T>
__global__ void __launch_bounds__(PLAIN_THREADS)
    rms_norm_bwd_plain_kernel(Matrix<T> dx, float *__restrict__ dw_partial, Matrix<const T> dy,
                              Matrix<const T> ds, Matrix<const T> x, Weight w,
                              const float *__restrict__ rstd, int64_t N, int64_t H, float offset) {
    float *dw = dw_partial ? dw_partial + blockIdx.x * H : nullptr;
    for (int64_t h = threadIdx.x; dw && h < H; h += PLAIN_THREADS) dw[h] = 0;
    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        float r = rstd[row], dot = 0, weight[1];
        for (int64_t h = threadIdx.x; h < H; h += PLAIN_THREADS) {
            float xhat = to_float(x.row(row)[h]) * r, g = to_float(dy.row(row)[h]);
            load_any<1>(weight, w.data, w.dtype, h);
            dot += g * (weight[0] + offset) * xhat;
            if (dw) dw[h] += g * (offset == 0 ? rounded<T>(xhat) : xhat);
        }
        float mean = block_sum(dot) / (float)H;
        for (int64_t h = threadIdx.x; h < H; h += PLAIN_THREADS) {
            float xhat = to_float(x.row(row)[h]) * r;
            load_any<1>(weight, w.data, w.dtype, h);
            float g = to_float(dy.row(row)[h]) * (weight[0] + offset);
            float residual = ds.data ? to_float(ds.row(row)[h]) : 0.0f;
            dx.row(row)[h] = from_float<T>(r * (g - xhat * mean) + residual);
        }
    }
    let_next_kernel_start();
}

// dw[h] = sum over p, in a fixed tree, of dw_partial[p, h]: 32 columns x DW_GROUPS groups of rows a
// block. Small blocks: they must fit beside the first kernel's to start before it ends.
constexpr int DW_GROUPS = 8;

__global__ void __launch_bounds__(32 * DW_GROUPS)
    rms_norm_bwd_dw_kernel(void *dw, Dtype dtype, const float *__restrict__ dw_partial, int P,
                           int64_t H) {
    __shared__ float part[DW_GROUPS][32];
    int column = threadIdx.x % 32, group = threadIdx.x / 32;
    int64_t h = (int64_t)blockIdx.x * 32 + column;
    wait_for_previous_kernel();
    float sum = 0;
    if (h < H) {
#pragma unroll 8
        for (int p = group; p < P; p += DW_GROUPS) sum += dw_partial[p * H + h];
    }
    part[group][column] = sum;
    __syncthreads();
    if (group || h >= H) return;
#pragma unroll
    for (int other = 1; other < DW_GROUPS; other++) sum += part[other][column];
    store_any(dw, dtype, h, sum);
}

// ---- Launchers ----------------------------------------------------------------------------------

// A block: x threads a row, y rows; x 0: the row does not fit.
static dim3 block_for(int64_t vectors, int items, int max_threads, int wanted) {
    int64_t threads = (vectors + items - 1) / items, whole = 1;
    while (whole < threads && whole < 32) whole *= 2;
    if (threads > 32) whole = (threads + 31) / 32 * 32;
    if (whole > max_threads) return dim3(0);
    int rows = whole < wanted ? (int)(wanted / whole) : 1;
    if (whole > 32 && rows > 15) rows = 15; // as many barriers of their own as there are
    return dim3((int)whole, rows);
}

static bool is_whole(int64_t H, int64_t vec, int items, dim3 block) {
    return H == vec * items * block.x;
}

template <typename T> static Matrix<T> matrix(const Tensor *t, const Rows &r) {
    return {t ? (T *)t->data : nullptr, r.stride};
}

// Vectors where all of these are aligned for them.
static bool all_vectors(const Tensor *const *t, const Rows *r, int count, int vec) {
    for (int i = 0; i < count; i++)
        if (t[i] && !vectors_of(t[i], &r[i], vec)) return false;
    return true;
}

template <typename W> struct Type { using type = W; };

// f(Type<W>()) with W as the weight's type; an error for a pair of types that is not compiled.
template <typename T, typename F> static const char *by_weight(Dtype w, F f) {
    if (w == F32) return f(Type<float>());
    if constexpr (sizeof(T) == 2) return f(Type<T>());
    else return w == BF16 ? f(Type<bf16>()) : f(Type<f16>());
}

// bfloat16 with float16 is left to the plain kernels.
static bool is_paired(Dtype x, Dtype w) { return w == F32 || x == F32 || x == w; }

template <typename T, typename W> static auto fwd_kernel(int items, bool add, bool whole) {
    if (items == WIDE_ITEMS)
        return add ? rms_norm_fwd_kernel<T, W, WIDE_ITEMS, true, false>
                   : rms_norm_fwd_kernel<T, W, WIDE_ITEMS, false, false>;
    if (add)
        return whole ? rms_norm_fwd_kernel<T, W, FWD_ITEMS, true, true>
                     : rms_norm_fwd_kernel<T, W, FWD_ITEMS, true, false>;
    return whole ? rms_norm_fwd_kernel<T, W, FWD_ITEMS, false, true>
                 : rms_norm_fwd_kernel<T, W, FWD_ITEMS, false, false>;
}

template <typename T>
static const char *fwd(Tensor *y, Tensor *s, Tensor *rstd, const Tensor *x, const Tensor *residual,
                       const Tensor *w, double eps, double offset, void *stream) {
    const Tensor *t[] = {x, y, w, s, residual};
    Rows r[5] = {};
    for (int i = 0; i < 5; i++)
        if (t[i] && !as_rows(t[i], &r[i])) return NOT_ROWS;
    constexpr int VEC = 16 / sizeof(T);
    int64_t N = r[0].n, H = r[0].width, sms = multiprocessors(x->device);
    float *rstd_data = rstd ? (float *)rstd->data : nullptr;
    int items = H / VEC <= FWD_ITEMS * MAX_THREADS ? FWD_ITEMS : WIDE_ITEMS;
    dim3 block = block_for(H / VEC, items, MAX_THREADS, FWD_THREADS);
    if (!block.x || !is_paired(x->dtype, w->dtype) || !all_vectors(t, r, 5, VEC))
        return launch(rms_norm_fwd_plain_kernel<T>, N < 8 * sms ? N : 8 * sms, PLAIN_THREADS, 0,
                      stream, matrix<T>(y, r[1]), matrix<T>(s, r[3]), rstd_data,
                      matrix<const T>(x, r[0]), matrix<const T>(residual, r[4]),
                      Weight{w->data, w->dtype}, N, H, (float)eps, (float)offset);
    bool whole = is_whole(H, VEC, items, block);
    return by_weight<T>(w->dtype, [&](auto type) {
        using W = typename decltype(type)::type;
        return launch(fwd_kernel<T, W>(items, residual, whole), (N + block.y - 1) / block.y, block,
                      0, stream, matrix<T>(y, r[1]), matrix<T>(s, r[3]), rstd_data,
                      matrix<const T>(x, r[0]), matrix<const T>(residual, r[4]), (const W *)w->data,
                      N, (int)H, (float)eps, (float)offset);
    });
}

struct Gradients {
    Tensor *dx;
    float *dw_partial; // NULL: the weight is frozen
    const Tensor *dy, *ds, *x, *w, *rstd;
    double offset;
};

// The kernels of W and ITEMS take what the plain ones take, w as its type.
template <typename T, typename W, int ITEMS>
static const char *bwd_vectors(const Gradients &g, const Rows *r, dim3 block, int64_t blocks,
                               void *stream) {
    size_t smem = g.dw_partial && block.y > 1 ? block.y * r[0].width * sizeof(float) : 0;
    bool whole = is_whole(r[0].width, 16 / sizeof(T), ITEMS, block);
    return launch(whole ? rms_norm_bwd_kernel<T, W, ITEMS, true>
                        : rms_norm_bwd_kernel<T, W, ITEMS, false>,
                  blocks, block, smem, stream, matrix<T>(g.dx, r[1]), g.dw_partial,
                  matrix<const T>(g.dy, r[3]), matrix<const T>(g.ds, r[4]),
                  matrix<const T>(g.x, r[0]), (const W *)g.w->data, (const float *)g.rstd->data,
                  r[0].n, (int)r[0].width, (float)g.offset);
}

template <typename T, int ITEMS>
static const char *bwd_items(const Gradients &g, const Rows *r, dim3 block, int64_t blocks,
                             void *stream) {
    return by_weight<T>(g.w->dtype, [&](auto type) {
        return bwd_vectors<T, typename decltype(type)::type, ITEMS>(g, r, block, blocks, stream);
    });
}

template <typename T>
static const char *bwd_plain(const Gradients &g, const Rows *r, int64_t blocks, void *stream) {
    return launch(rms_norm_bwd_plain_kernel<T>, blocks, PLAIN_THREADS, 0, stream,
                  matrix<T>(g.dx, r[1]), g.dw_partial, matrix<const T>(g.dy, r[3]),
                  matrix<const T>(g.ds, r[4]), matrix<const T>(g.x, r[0]),
                  Weight{g.w->data, g.w->dtype}, (const float *)g.rstd->data, r[0].n, r[0].width,
                  (float)g.offset);
}

template <typename T>
static const char *bwd(const Gradients &g, Tensor *dw, int64_t P, void *stream) {
    const Tensor *t[] = {g.x, g.dx, g.w, g.dy, g.ds};
    Rows r[5] = {};
    for (int i = 0; i < 5; i++)
        if (t[i] && !as_rows(t[i], &r[i])) return NOT_ROWS;
    constexpr int VEC = 16 / sizeof(T);
    int64_t N = r[0].n, H = r[0].width, sms = multiprocessors(g.x->device);
    int items = H / VEC <= BWD_THREADS<1> ? 1 : WIDE_ITEMS;
    int most = items == 1 ? BWD_THREADS<1> : BWD_THREADS<WIDE_ITEMS>;
    dim3 block = block_for(H / VEC, items, most, most);
    bool paired = is_paired(g.x->dtype, g.w->dtype);
    bool plain = !block.x || !paired || N >= 1 << 30 || !all_vectors(t, r, 5, VEC);
    // As many blocks as there are multiprocessors, rows for them and partial sums.
    int64_t blocks = plain ? 2 * sms : sms, most_blocks = plain ? N : (N + block.y - 1) / block.y;
    if (blocks > most_blocks) blocks = most_blocks;
    if (dw && blocks > P) blocks = P;
    const char *error = plain        ? bwd_plain<T>(g, r, blocks, stream)
                        : items == 1 ? bwd_items<T, 1>(g, r, block, blocks, stream)
                                     : bwd_items<T, WIDE_ITEMS>(g, r, block, blocks, stream);
    if (error || !dw) return error;
    return launch_after(rms_norm_bwd_dw_kernel, (H + 31) / 32, 32 * DW_GROUPS, 0, stream, dw->data,
                        dw->dtype, (const float *)g.dw_partial, (int)blocks, H);
}

extern "C" const char *rms_norm_fwd_cuda(Tensor *y, Tensor *rstd, const Tensor *x, const Tensor *w,
                                         double eps, double offset, void *stream) {
    BY_DTYPE(x->dtype, fwd<T>(y, nullptr, rstd, x, nullptr, w, eps, offset, stream))
}

extern "C" const char *add_rms_norm_fwd_cuda(Tensor *y, Tensor *s, Tensor *rstd, const Tensor *x,
                                             const Tensor *r, const Tensor *w, double eps,
                                             double offset, void *stream) {
    BY_DTYPE(x->dtype, fwd<T>(y, s, rstd, x, r, w, eps, offset, stream))
}

extern "C" const char *rms_norm_bwd_cuda(Tensor *dx, Tensor *dw, Tensor *dw_partial,
                                         const Tensor *dy, const Tensor *x, const Tensor *w,
                                         const Tensor *rstd, double offset, void *stream) {
    return add_rms_norm_bwd_cuda(dx, dw, dw_partial, dy, nullptr, x, w, rstd, offset, stream);
}

extern "C" const char *add_rms_norm_bwd_cuda(Tensor *dx, Tensor *dw, Tensor *dw_partial,
                                             const Tensor *dy, const Tensor *ds, const Tensor *s,
                                             const Tensor *w, const Tensor *rstd, double offset,
                                             void *stream) {
    Gradients g = {dx, dw ? (float *)dw_partial->data : nullptr, dy, ds, s, w, rstd, offset};
    BY_DTYPE(s->dtype, bwd<T>(g, dw, dw ? dw_partial->shape[0] : 0, stream))
}
