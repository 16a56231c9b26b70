// embedding.cu: rows of a table by their ids, the sum of gradients per row (formulas: csrc/ops.h).
//
// Memory-bound: forward copies N rows; backward reads dy once and writes the table once.
// Backward: the ids come sorted, so the terms of a row of the table lie side by side. A block has
// some rows, far apart, for a tokenizer's frequent ids are neighbours, and BLOCK vectors of each;
// it looks up where the terms of every row begin and end, and writes sums, or zeros: a row by one
// of its GROUPS. The terms of a frequent id (a text's padding, say) are shared out between the
// groups, whose sums are added in order.
#include "common.cuh"

constexpr int BLOCK = 128;
constexpr int ITEMS = 4;  // of a thread forward
constexpr int GROUPS = 4; // of BLOCK threads in a block of the backward: two blocks fill an SM
constexpr int ROWS = 128; // of the table for such a block, at most: it looks them all up at once
constexpr int AHEAD = 4;  // terms that a thread has on their way: more take too many registers
constexpr int MANY = 64;  // terms of a row, at most, for one group

struct Ids {
    const void *data;
    bool wide; // I64
    __device__ int64_t operator[](int64_t n) const {
        return wide ? ((const int64_t *)data)[n] : ((const int32_t *)data)[n];
    }
};

template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    embedding_fwd_kernel(T *__restrict__ y, int64_t y_stride, Ids ids, const T *__restrict__ w,
                         int64_t w_stride, int64_t V, int64_t H, unsigned spans) {
    constexpr int STEP = BLOCK * VEC;
    int64_t n = blockIdx.x / spans, id = ids[n];
    int64_t first = (int64_t)(blockIdx.x % spans) * ITEMS * STEP + threadIdx.x * VEC;
    float nan[VEC];
#pragma unroll
    for (int j = 0; j < VEC; j++) nan[j] = NAN;
    Packed<T, VEC> row[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        row[i] = pack<T, VEC>(nan);
        if (first + i * STEP < H && id >= 0 && id < V)
            row[i] = load_packed<T, VEC>(w + id * w_stride + first + i * STEP);
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        T *to = y + n * y_stride + first + i * STEP;
        if (first + i * STEP >= H) return;
        if constexpr (VEC == 1) *to = row[i].value;
        else store_whole(to, row[i].word);
    }
}

// How many of the N ascending ids are below v.
__device__ __forceinline__ int64_t count_below(int64_t v, Ids ids, int64_t N) {
    int64_t low = 0;
    while (low < N) {
        int64_t middle = (low + N) / 2;
        if (ids[middle] < v) low = middle + 1;
        else N = middle;
    }
    return low;
}

// The sum of the rows order[begin .. end - 1] of dy, at column h.
template <typename T, int VEC>
__device__ __forceinline__ void sum_rows(float (&sum)[VEC], const T *dy, int64_t stride,
                                         const int64_t *order, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += AHEAD) {
        Packed<T, VEC> value[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++)
            if (i + k < end) value[k] = load_packed<T, VEC>(dy + order[i + k] * stride);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) {
            if (i + k >= end) break;
#pragma unroll
            for (int j = 0; j < VEC; j++) sum[j] += value[k][j];
        }
    }
}

// Rounded to T.
template <typename T, int VEC>
__device__ __forceinline__ void store_sum(T *to, const float (&sum)[VEC]) {
    if constexpr (VEC == 1) *to = from_float<T>(sum[0]);
    else store_whole(to, pack<T, VEC>(sum).word);
}

template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK *GROUPS, 2)
    embedding_bwd_kernel(T *__restrict__ dw, int64_t dw_stride, const T *__restrict__ dy,
                         int64_t dy_stride, Ids ids, const int64_t *__restrict__ order, int64_t N,
                         int64_t V, int64_t H, unsigned spans) {
    __shared__ int64_t begin[ROWS], end[ROWS];
    __shared__ float part[GROUPS][BLOCK][VEC];
    int64_t first = blockIdx.x / spans, step = gridDim.x / spans; // its rows: first + r * step
    int64_t h = ((int64_t)(blockIdx.x % spans) * BLOCK + threadIdx.x) * VEC;
    int rows = (V - first + step - 1) / step, group = threadIdx.y;
    int thread = group * BLOCK + threadIdx.x;
    if (thread < 2 * rows) {
        int r = thread / 2, next = thread % 2;
        (next ? end : begin)[r] = count_below(first + r * step + next, ids, N);
    }
    __syncthreads();
    auto terms = [&](int r) { return end[r] - begin[r]; };
    for (int r = group; r < rows && h < H; r += GROUPS) {
        if (terms(r) > MANY) continue;
        float sum[VEC] = {};
        sum_rows<T, VEC>(sum, dy + h, dy_stride, order, begin[r], end[r]);
        store_sum<T, VEC>(dw + (first + r * step) * dw_stride + h, sum);
    }
    if (!__syncthreads_or(thread < rows && terms(thread) > MANY)) return;
    for (int r = 0; r < rows; r++) {
        if (terms(r) <= MANY) continue;
        int64_t share = (terms(r) + GROUPS - 1) / GROUPS, from = begin[r] + group * share;
        float sum[VEC] = {};
        if (h < H) sum_rows<T, VEC>(sum, dy + h, dy_stride, order, from, min(from + share, end[r]));
#pragma unroll
        for (int j = 0; j < VEC; j++) part[group][threadIdx.x][j] = sum[j];
        __syncthreads();
        for (int g = 1; group == 0 && g < GROUPS; g++)
            for (int j = 0; j < VEC; j++) sum[j] += part[g][threadIdx.x][j];
        if (group == 0 && h < H) store_sum<T, VEC>(dw + (first + r * step) * dw_stride + h, sum);
        __syncthreads(); // part is read
    }
}

static Ids ids_of(const Tensor *t) { return {t->data, t->dtype == I64}; }

// Vectors where the rows of both are aligned for them.
static bool both_wide(const Tensor *a, const Tensor *b, int vec) {
    Rows ra, rb;
    return as_rows(a, &ra) && as_rows(b, &rb) && vectors_of(a, &ra, vec) && vectors_of(b, &rb, vec);
}

template <typename T>
static const char *fwd(Tensor *y, const Tensor *ids, const Tensor *w, void *stream) {
    constexpr int VEC = 16 / sizeof(T);
    bool wide = both_wide(y, w, VEC);
    int64_t N = y->shape[0], H = y->shape[1], span = ITEMS * BLOCK * (wide ? VEC : 1);
    int64_t spans = (H + span - 1) / span;
    return launch(wide ? embedding_fwd_kernel<T, VEC> : embedding_fwd_kernel<T, 1>, N * spans,
                  BLOCK, 0, stream, (T *)y->data, y->stride[0], ids_of(ids), (const T *)w->data,
                  w->stride[0], w->shape[0], H, (unsigned)spans);
}

template <typename T>
static const char *bwd(Tensor *dw, const Tensor *dy, const Tensor *ids, const Tensor *order,
                       void *stream) {
    constexpr int VEC = 16 / sizeof(T);
    bool wide = both_wide(dw, dy, VEC);
    int64_t V = dw->shape[0], H = dw->shape[1], span = BLOCK * (wide ? VEC : 1);
    int64_t spans = (H + span - 1) / span;
    int64_t each = V * spans / (8 * multiprocessors(dw->device)); // rows: all of the GPU has work
    each = each < 1 ? 1 : each < ROWS ? each : ROWS;
    return launch(wide ? embedding_bwd_kernel<T, VEC> : embedding_bwd_kernel<T, 1>,
                  (V + each - 1) / each * spans, dim3(BLOCK, GROUPS), 0, stream, (T *)dw->data,
                  dw->stride[0], (const T *)dy->data, dy->stride[0], ids_of(ids),
                  (const int64_t *)order->data, dy->shape[0], V, H, (unsigned)spans);
}

extern "C" const char *embedding_fwd_cuda(Tensor *y, const Tensor *ids, const Tensor *w,
                                          void *stream) {
    BY_DTYPE(w->dtype, fwd<T>(y, ids, w, stream))
}

extern "C" const char *embedding_bwd_cuda(Tensor *dw, const Tensor *dy, const Tensor *ids,
                                          const Tensor *order, void *stream) {
    BY_DTYPE(dw->dtype, bwd<T>(dw, dy, ids, order, stream))
}
