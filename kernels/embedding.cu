// embedding.cu: rows of a table by their ids, the sum of gradients per row (formulas: csrc/ops.h).
//
// Memory-bound: forward copies N rows; backward reads dy once and writes every row of the table
// once (ids that come sorted: those they name twice, for all is cleared first).
// Backward: the ids are sorted, so the terms of a row of the table lie side by side, and are cut
// into pieces of equally many terms: an id may be as frequent as a text's padding. A row whose
// terms are all in one piece is written there; of the others every piece writes its share of the
// sum, which a second kernel adds up in order.
// Ids that do not come sorted are sorted by the kernel that clears the table, which leaves out the
// rows that they name: embedding_sort.cuh.
#include "embedding_sort.cuh"

constexpr int BLOCK = 128;
constexpr int ITEMS = 4; // vectors that a thread of the forward copies, all loads before the stores
constexpr int AHEAD = 8; // rows of dy that a thread loads before it adds them: 64 registers in all
constexpr int GROUPS = 4; // of BLOCK threads that add up one row's shares

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

// Terms of the sums in the order of their ids, cut into pieces.
struct Terms {
    Ids ids;
    const int64_t *order; // where each stands in dy
    int64_t count, each;  // each: terms of a piece

    __device__ bool joined(int64_t i) const { // to the term before it
        return i > 0 && i < count && ids[i - 1] == ids[i];
    }
};

// Rounded to T.
template <typename T, int VEC>
__device__ __forceinline__ void store_sum(T *to, const float (&sum)[VEC]) {
    if constexpr (VEC == 1) *to = from_float<T>(sum[0]);
    else store_whole(to, pack<T, VEC>(sum).word);
}

enum : int64_t { GO_ON = -1, BEFORE = -2, AFTER = -3, NOWHERE = -4 };

// What to do with the sum after term i of the piece begin .. end - 1: go on where the next has the
// same row; else it goes to a row of the table, or into the shares of a row whose terms began
// BEFORE the piece or go on AFTER it, or NOWHERE: the id names no row.
__device__ int64_t goal(int64_t i, int64_t begin, int64_t end, Terms terms, int64_t V) {
    int64_t id = terms.ids[i];
    bool more = terms.joined(i + 1);
    if (more && i + 1 < end) return GO_ON;
    if (id < 0 || id >= V) return NOWHERE;
    if (begin > 0 && terms.ids[begin - 1] == id) return BEFORE;
    return more ? AFTER : id;
}

// partial's row 2 p: the share of a row whose terms began before piece p; row 2 p + 1: of one whose
// terms begin in p and go on after it.
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    embedding_bwd_kernel(T *__restrict__ dw, int64_t dw_stride, float *__restrict__ partial,
                         const T *__restrict__ dy, int64_t dy_stride, Terms terms, int64_t V,
                         int64_t H, unsigned spans) {
    __shared__ int64_t offset[BLOCK], goals[BLOCK]; // of BLOCK terms: in dy; goal()
    int64_t piece = blockIdx.x / spans, begin = piece * terms.each;
    int64_t end = min(begin + terms.each, terms.count);
    int64_t h = ((int64_t)(blockIdx.x % spans) * BLOCK + threadIdx.x) * VEC;
    float sum[VEC] = {};
    wait_for_previous_kernel();
    for (int64_t i = begin; i < end; i += BLOCK) {
        int count = min(end - i, (int64_t)BLOCK);
        __syncthreads();
        if (threadIdx.x < count) {
            offset[threadIdx.x] = terms.order[i + threadIdx.x] * dy_stride;
            goals[threadIdx.x] = goal(i + threadIdx.x, begin, end, terms, V);
        }
        __syncthreads();
        for (int n = 0; n < count && h < H; n += AHEAD) {
            Packed<T, VEC> value[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++)
                if (n + k < count) value[k] = load_packed<T, VEC>(dy + offset[n + k] + h);
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                if (n + k >= count) break;
#pragma unroll
                for (int j = 0; j < VEC; j++) sum[j] += value[k][j];
                int64_t row = goals[n + k];
                if (row == GO_ON) continue;
                float *share = partial + (2 * piece + (row == AFTER)) * H + h;
                if (row >= 0) store_sum<T, VEC>(dw + row * dw_stride + h, sum);
                else if (row != NOWHERE) store<float, VEC>(share, sum);
#pragma unroll
                for (int j = 0; j < VEC; j++) sum[j] = 0;
            }
        }
    }
}

// The last piece, from this one on, that begins with a term of row v.
__device__ int64_t last_piece(int64_t v, int64_t piece, Terms terms) {
    int64_t after = (terms.count + terms.each - 1) / terms.each;
    while (after - piece > 1) {
        int64_t middle = (piece + after) / 2;
        if (terms.ids[middle * terms.each] <= v) piece = middle;
        else after = middle;
    }
    return piece;
}

// The row whose terms begin in the piece and go on after it: its shares, in order by GROUPS groups,
// then the groups' sums.
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK *GROUPS)
    embedding_bwd_shares_kernel(T *__restrict__ dw, int64_t dw_stride,
                                const float *__restrict__ partial, Terms terms, int64_t V,
                                int64_t H, unsigned spans) {
    __shared__ float sums[GROUPS][BLOCK][VEC];
    int64_t piece = blockIdx.x / spans, begin = piece * terms.each, next = begin + terms.each;
    int64_t h = ((int64_t)(blockIdx.x % spans) * BLOCK + threadIdx.x) * VEC;
    wait_for_previous_kernel();
    if (!terms.joined(next)) return;
    int64_t v = terms.ids[next];
    if (v < 0 || v >= V || (begin > 0 && terms.ids[begin - 1] == v)) return;
    int64_t count = last_piece(v, piece, terms) - piece; // shares after the first
    int64_t many = (count + GROUPS - 1) / GROUPS, p = piece + 1 + threadIdx.y * many;
    int64_t last = min(p + many, piece + 1 + count);
    float sum[VEC] = {}, share[VEC];
    if (h < H && threadIdx.y == 0) load<float, VEC>(sum, partial + (2 * piece + 1) * H + h);
#pragma unroll 4
    for (; h < H && p < last; p++) {
        load<float, VEC>(share, partial + 2 * p * H + h);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum[j] += share[j];
    }
    for (int j = 0; j < VEC; j++) sums[threadIdx.y][threadIdx.x][j] = sum[j];
    __syncthreads();
    if (threadIdx.y > 0 || h >= H) return;
    for (int g = 1; g < GROUPS; g++)
        for (int j = 0; j < VEC; j++) sum[j] += sums[g][threadIdx.x][j];
    store<T, VEC>(dw + v * dw_stride + h, sum);
}

// ---- Host side ----------------------------------------------------------------------------------

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

static const char *clear(Tensor *dw, void *stream) {
    int64_t size = dw->dtype == F32 ? 4 : 2, V = dw->shape[0], pitch = dw->stride[0] * size;
    size_t width = (size_t)(dw->shape[1] * size);
    char *lowest = (char *)dw->data + (pitch < 0 ? (V - 1) * pitch : 0);
    pitch = pitch < 0 ? -pitch : pitch;
    cudaError_t error =
        V == 1 || (size_t)pitch == width
            ? cudaMemsetAsync(lowest, 0, (size_t)V * width, (cudaStream_t)stream)
            : cudaMemset2DAsync(lowest, (size_t)pitch, 0, width, (size_t)V, (cudaStream_t)stream);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// The rows that no id names are cleared, and the others left as they are.
static const char *sort_and_clear(Tensor *dw, Tensor *sorted, const Tensor *ids, void *stream) {
    int64_t size = dw->dtype == F32 ? 4 : 2, V = dw->shape[0], all_bins = V + 2;
    int64_t blocks = multiprocessors(dw->device); // one each at a time: equal shares, whole rounds
    if (!blocks) blocks = 1;
    blocks *= (all_bins + MOST_BINS * blocks - 1) / (MOST_BINS * blocks);
    int64_t bins = (all_bins + blocks - 1) / blocks;
    return launch(ids->dtype == I64 ? embedding_bwd_sort_kernel<int64_t>
                                    : embedding_bwd_sort_kernel<int32_t>,
                  (all_bins + bins - 1) / bins, SORTERS, sort_bytes(bins), stream, (char *)dw->data,
                  dw->stride[0] * size, dw->shape[1] * size, (int64_t *)sorted->data, ids->data,
                  (int)ids->shape[0], V, (int)bins);
}

template <typename T>
static const char *bwd(Tensor *dw, Tensor *partial, Tensor *sorted, const Tensor *dy,
                       const Tensor *ids, const Tensor *order, void *stream) {
    constexpr int VEC = 16 / sizeof(T);
    bool wide = both_wide(dw, dy, VEC) && (uintptr_t)partial->data % 32 == 0;
    int64_t N = dy->shape[0], V = dw->shape[0], H = dw->shape[1], P = partial->shape[0] / 2;
    if (!V || !H) return nullptr;
    const char *error = order ? clear(dw, stream) : sort_and_clear(dw, sorted, ids, stream);
    if (error || !N) return error;
    Terms terms = {ids_of(order ? ids : sorted), (const int64_t *)(order ? order : sorted)->data, N,
                   (N + P - 1) / P};
    if (!order) terms.order += N;
    int64_t pieces = (N + terms.each - 1) / terms.each, width = BLOCK * (wide ? VEC : 1);
    int64_t spans = (H + width - 1) / width;
    float *shares = (float *)partial->data;
    error = launch_as(!order, 1, wide ? embedding_bwd_kernel<T, VEC> : embedding_bwd_kernel<T, 1>,
                      pieces * spans, BLOCK, 0, stream, (T *)dw->data, dw->stride[0], shares,
                      (const T *)dy->data, dy->stride[0], terms, V, H, (unsigned)spans);
    if (error) return error;
    width = BLOCK * (wide ? 4 : 1), spans = (H + width - 1) / width;
    return launch_after(wide ? embedding_bwd_shares_kernel<T, 4>
                             : embedding_bwd_shares_kernel<T, 1>,
                        (pieces - 1) * spans, dim3(BLOCK, GROUPS), 0, stream, (T *)dw->data,
                        dw->stride[0], shares, terms, V, H, (unsigned)spans);
}

extern "C" const char *embedding_fwd_cuda(Tensor *y, const Tensor *ids, const Tensor *w,
                                          void *stream) {
    BY_DTYPE(w->dtype, fwd<T>(y, ids, w, stream))
}

extern "C" const char *embedding_bwd_cuda(Tensor *dw, Tensor *partial, Tensor *sorted,
                                          const Tensor *dy, const Tensor *ids, const Tensor *order,
                                          void *stream) {
    BY_DTYPE(dw->dtype, bwd<T>(dw, partial, sorted, dy, ids, order, stream))
}
