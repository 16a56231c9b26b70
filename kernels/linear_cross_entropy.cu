// linear_cross_entropy.cu: x w^T + bias and its cross-entropy, chunk by chunk (formulas:
// csrc/ops.h).
//
// Of a chunk: logits = x w^T by cuBLASLt (whose algorithms a first call chooses: choose()); one
// kernel that reads every row once, keeps it in shared memory and writes its gradient over it
// (linear_cross_entropy_rows.cuh); dx = dlogits w; dw += dlogits^T x, in two parts where the logits
// lie in dw's own memory.
#include "linear_cross_entropy_rows.cuh"

#include "../csrc/cublaslt.h"

// ---- The rows of a chunk ------------------------------------------------------------------------

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
