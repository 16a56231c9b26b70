// embedding.cu: rows of a table by their ids, the sum of gradients per row (formulas: csrc/ops.h).
//
// Memory-bound: forward copies N rows; backward reads dy once and touches the table's rows that are
// named. Backward: order sorts the ids, so equal ones lie side by side; the block that stands at
// the first of a run adds up the whole run, in the order of n. A block covers BLOCK vectors of a
// row, so that a run of one frequent id is still spread over several blocks.
#include "common.cuh"

constexpr int BLOCK = 128;

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
    int64_t n = blockIdx.x / spans, h = ((int64_t)(blockIdx.x % spans) * BLOCK + threadIdx.x) * VEC;
    if (h >= H) return;
    int64_t id = ids[n];
    T *to = y + n * y_stride + h;
    Packed<T, VEC> row;
    if (id >= 0 && id < V) {
        row = load_packed<T, VEC>(w + id * w_stride + h);
    } else {
        float nan[VEC];
#pragma unroll
        for (int j = 0; j < VEC; j++) nan[j] = NAN;
        row = pack<T, VEC>(nan);
    }
    if constexpr (VEC == 1) *to = row.value;
    else store_whole(to, row.word);
}

template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    embedding_bwd_kernel(T *__restrict__ dw, int64_t dw_stride, const T *__restrict__ dy,
                         int64_t dy_stride, Ids ids, const int64_t *__restrict__ order, int64_t N,
                         int64_t V, int64_t H, unsigned spans) {
    int64_t i = blockIdx.x / spans, h = ((int64_t)(blockIdx.x % spans) * BLOCK + threadIdx.x) * VEC;
    int64_t id = ids[order[i]];
    if (h >= H || id < 0 || id >= V || (i > 0 && ids[order[i - 1]] == id)) return;
    float sum[VEC] = {}, value[VEC];
    for (; i < N && ids[order[i]] == id; i++) {
        load<T, VEC>(value, dy + order[i] * dy_stride + h);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum[j] += value[j];
    }
    load<T, VEC>(value, dw + id * dw_stride + h);
#pragma unroll
    for (int j = 0; j < VEC; j++) sum[j] += value[j];
    store<T, VEC>(dw + id * dw_stride + h, sum);
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
    int64_t N = y->shape[0], H = y->shape[1], span = BLOCK * (wide ? VEC : 1);
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
    int64_t N = dy->shape[0], H = dy->shape[1], span = BLOCK * (wide ? VEC : 1);
    int64_t spans = (H + span - 1) / span;
    return launch(wide ? embedding_bwd_kernel<T, VEC> : embedding_bwd_kernel<T, 1>, N * spans,
                  BLOCK, 0, stream, (T *)dw->data, dw->stride[0], (const T *)dy->data,
                  dy->stride[0], ids_of(ids), (const int64_t *)order->data, N, dw->shape[0], H,
                  (unsigned)spans);
}

extern "C" const char *embedding_fwd_cuda(Tensor *y, const Tensor *ids, const Tensor *w,
                                          void *stream) {
    BY_DTYPE(w->dtype, fwd<T>(y, ids, w, stream))
}

extern "C" const char *embedding_bwd_cuda(Tensor *dw, const Tensor *dy, const Tensor *ids,
                                          const Tensor *order, void *stream) {
    BY_DTYPE(dw->dtype, bwd<T>(dw, dy, ids, order, stream))
}
