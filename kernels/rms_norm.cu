// rms_norm.cu: RMSNorm, and RMSNorm of a sum, forward and backward (formulas: csrc/ops.h).
//
// Memory-bound: 2 elements moved per element forward (x in, y out), 4 with a residual, 3 backward
// (dy, x, dx), 4 with ds.
//
// Forward: one row a block, held in registers between the sum and the result; enough blocks fit an
// SM to keep the memory busy. Backward: dw is a sum over all rows, so a block must stay for many
// rows, and few can be there at once; a ring of STAGES rows in shared memory keeps the memory busy:
//
//   row:     0        1        2        3        4 ...      blockIdx.x + row * gridDim.x
//   stage:   0        1        2        3        0 ...      [x | dy | ds]
//            copied ahead while the block works on an earlier row, out of registers
//
// A row is read from shared memory once, into registers; the barrier inside the row's reduction
// then proves that all have read it, so the stage is refilled right behind that barrier.
// dx may be dy: a row is written by the block that has copied it, and by no other.
// dw: every thread adds up its own columns in registers over all rows of its block; a second
// kernel adds the blocks' sums in their order: no atomics, the same bits every time.
// Rows that are not whole 16-byte vectors, or too wide for the registers, take the plain kernels.
#include "common.cuh"

constexpr int STAGES = 4;        // 4 x 24 KB (bf16, 4096 wide, x | dy | ds): two blocks fit an SM
constexpr int MAX_ITEMS = 3;     // vectors per thread; at 4 the backward's registers spill
constexpr int MAX_THREADS = 512; // at 128 registers each, one block fills an SM
constexpr int PLAIN_THREADS = 256;
constexpr int BLOCKS_PER_SM = 2;
constexpr size_t STATIC_BYTES = 1024; // of shared memory, at most, beside the ring

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

// A sum over the block with one barrier: two calls in turn use two buffers, so a buffer is written
// again only behind the barrier of the call between.
struct BlockSum {
    float (*part)[32];
    int turn = 0;
    __device__ float operator()(float x) {
        int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
        x = warp_sum(x);
        if (lane == 0) part[turn][warp] = x;
        __syncthreads();
        x = warp_sum(lane < warps ? part[turn][lane] : 0.0f);
        turn ^= 1;
        return x;
    }
};

// ---- Forward ------------------------------------------------------------------------------------
// T: x's type; ITEMS: 16-byte vectors of a row per thread; item i's column: i * threads + thread.

template <typename T, int ITEMS, bool ADD>
__global__ void __launch_bounds__(MAX_THREADS)
    rms_norm_fwd_kernel(Matrix<T> y, Matrix<T> s, float *__restrict__ rstd, Matrix<const T> x,
                        Matrix<const T> residual, Weight w, int H, float eps, float offset) {
    constexpr int VEC = 16 / sizeof(T);
    __shared__ float part[2][32];
    BlockSum sum_over_block{part};
    int64_t row = blockIdx.x;
    Packed<T, VEC> in[ITEMS], other[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = (i * blockDim.x + threadIdx.x) * VEC;
        if (h >= H) continue;
        in[i] = load_packed<T, VEC>(x.row(row) + h);
        if (ADD) other[i] = load_packed<T, VEC>(residual.row(row) + h);
    }
    float v[ITEMS][VEC], sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = (i * blockDim.x + threadIdx.x) * VEC;
        if (h >= H) continue;
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            v[i][j] = ADD ? rounded<T>(in[i][j] + other[i][j]) : in[i][j];
            sum += v[i][j] * v[i][j];
        }
        if (ADD) store<T, VEC>(s.row(row) + h, v[i]);
    }
    float r = rsqrtf(sum_over_block(sum) / (float)H + eps);
    if (rstd && threadIdx.x == 0) rstd[row] = r;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = (i * blockDim.x + threadIdx.x) * VEC;
        if (h >= H) continue;
        float weight[VEC];
        load_any<VEC>(weight, w.data, w.dtype, h);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            float xhat = offset == 0 ? rounded<T>(v[i][j] * r) : v[i][j] * r;
            v[i][j] = xhat * (weight[j] + offset);
        }
        store<T, VEC>(y.row(row) + h, v[i]);
    }
}

// ---- The ring -----------------------------------------------------------------------------------

// From sm_90 on, thread 0 copies whole rows, and a barrier in shared memory tells all of their
// arrival. Before, every thread copies the vectors that it will read, and waits for its own.
template <typename T, int OPERANDS> struct Ring {
    Matrix<const T> operand[OPERANDS]; // data NULL: not there
    char *stages;
    uint64_t *full; // [STAGES]
    int64_t N;
    uint32_t row_bytes;

    __device__ T *at(int stage, int which) const {
        return (T *)(stages + ((int64_t)stage * OPERANDS + which) * row_bytes);
    }

    // Start copying row `row` into `stage`. All threads call this.
    __device__ void fill(int stage, int64_t row) const {
        if constexpr (HAS_BULK_COPY) {
            if (threadIdx.x == 0 && row < N) fill_in_bulk(stage, row);
        } else {
            for (int i = 0; i < OPERANDS && row < N; i++)
                for (uint32_t byte = threadIdx.x * 16; operand[i].data && byte < row_bytes;
                     byte += blockDim.x * 16)
                    copy_async((char *)at(stage, i) + byte,
                               (const char *)operand[i].row(row) + byte);
            end_copy_group(); // without copies too: wait() counts groups
        }
    }

    __device__ void fill_in_bulk(int stage, int64_t row) const {
        uint32_t bytes = 0;
#pragma unroll
        for (int i = 0; i < OPERANDS; i++) bytes += operand[i].data ? row_bytes : 0;
        mbarrier_expect(&full[stage], bytes);
#pragma unroll
        for (int i = 0; i < OPERANDS; i++)
            if (operand[i].data)
                bulk_load(at(stage, i), operand[i].row(row), row_bytes, &full[stage]);
    }

    __device__ void start() const {
        if constexpr (HAS_BULK_COPY) {
            if (threadIdx.x == 0) {
                for (int s = 0; s < STAGES; s++) mbarrier_init(&full[s], 1);
                mbarrier_init_fence();
            }
            __syncthreads();
        }
        for (int s = 0; s < STAGES; s++) fill(s, blockIdx.x + (int64_t)s * gridDim.x);
    }

    // Until the row in `stage`, the oldest one under way, is there.
    __device__ void wait(int stage, int parity) const {
        if constexpr (HAS_BULK_COPY) mbarrier_wait(&full[stage], parity);
        else wait_for_copy_groups<STAGES - 1>();
    }
};

// ---- Backward -----------------------------------------------------------------------------------

template <typename T, int ITEMS>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    rms_norm_bwd_kernel(Matrix<T> dx, float *__restrict__ dw_partial, Matrix<const T> dy,
                        Matrix<const T> ds, Matrix<const T> x, Weight w,
                        const float *__restrict__ rstd, int64_t N, int H, float offset) {
    constexpr int VEC = 16 / sizeof(T);
    extern __shared__ __align__(128) char stages[];
    __shared__ uint64_t full[STAGES];
    __shared__ float part[2][32];
    BlockSum sum_over_block{part};
    Ring<T, 3> ring{{x, dy, ds}, stages, full, N, (uint32_t)(H * sizeof(T))};
    ring.start();
    float dw[ITEMS][VEC] = {};
    int stage = 0, parity = 0;
    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        float r = rstd[row], dot = 0;
        ring.wait(stage, parity);
        float xhat[ITEMS][VEC], g[ITEMS][VEC];
        Packed<T, VEC> residual[ITEMS];
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int h = (i * blockDim.x + threadIdx.x) * VEC;
            if (h >= H) continue;
            float weight[VEC];
            load_any<VEC>(weight, w.data, w.dtype, h);
            load<T, VEC>(xhat[i], ring.at(stage, 0) + h);
            load<T, VEC>(g[i], ring.at(stage, 1) + h);
            if (ds.data) residual[i] = load_packed<T, VEC>(ring.at(stage, 2) + h);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                xhat[i][j] *= r;
                dw[i][j] += g[i][j] * (offset == 0 ? rounded<T>(xhat[i][j]) : xhat[i][j]);
                g[i][j] *= weight[j] + offset;
                dot += g[i][j] * xhat[i][j];
            }
        }
        float mean = sum_over_block(dot) / (float)H;
        ring.fill(stage, row + (int64_t)STAGES * gridDim.x);
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int h = (i * blockDim.x + threadIdx.x) * VEC;
            if (h >= H) continue;
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                g[i][j] = r * (g[i][j] - xhat[i][j] * mean);
                if (ds.data) g[i][j] += residual[i][j];
            }
            store<T, VEC>(dx.row(row) + h, g[i]);
        }
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    let_next_kernel_start();
    if (!dw_partial) return;
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int h = (i * blockDim.x + threadIdx.x) * VEC;
        if (h >= H) continue;
#pragma unroll
        for (int j = 0; j < VEC; j += 4)
            *(float4 *)(dw_partial + (int64_t)blockIdx.x * H + h + j) =
                make_float4(dw[i][j], dw[i][j + 1], dw[i][j + 2], dw[i][j + 3]);
    }
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

// How a row is spread over a block's registers; threads 0: it cannot be. operands: of the ring,
// which has max_bytes.
struct Plan {
    int items, threads;
    size_t ring_bytes;
};

static Plan plan_for(int64_t H, int64_t vec, int operands, int64_t element, size_t max_bytes) {
    int64_t vectors = H / vec;
    int items = vectors <= 128 ? 1 : vectors <= 1024 ? 2 : MAX_ITEMS;
    int64_t threads = ((vectors + items - 1) / items + 31) / 32 * 32;
    size_t bytes = (size_t)(STAGES * operands * H * element);
    if (threads > MAX_THREADS || bytes > max_bytes) return {0, 0, 0};
    return {items, (int)threads, bytes};
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

template <typename T, bool ADD> static auto fwd_kernel(int items) {
    return items == 1   ? rms_norm_fwd_kernel<T, 1, ADD>
           : items == 2 ? rms_norm_fwd_kernel<T, 2, ADD>
                        : rms_norm_fwd_kernel<T, MAX_ITEMS, ADD>;
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
    Weight weight = {w->data, w->dtype};
    Plan plan = plan_for(H, VEC, 0, sizeof(T), 0);
    if (!plan.threads || N > INT32_MAX || !all_vectors(t, r, 5, VEC))
        return launch(rms_norm_fwd_plain_kernel<T>, N < 8 * sms ? N : 8 * sms, PLAIN_THREADS, 0,
                      stream, matrix<T>(y, r[1]), matrix<T>(s, r[3]), rstd_data,
                      matrix<const T>(x, r[0]), matrix<const T>(residual, r[4]), weight, N, H,
                      (float)eps, (float)offset);
    auto kernel = residual ? fwd_kernel<T, true>(plan.items) : fwd_kernel<T, false>(plan.items);
    return launch(kernel, N, plan.threads, 0, stream, matrix<T>(y, r[1]), matrix<T>(s, r[3]),
                  rstd_data, matrix<const T>(x, r[0]), matrix<const T>(residual, r[4]), weight,
                  (int)H, (float)eps, (float)offset);
}

template <typename T>
static const char *bwd(Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy,
                       const Tensor *ds, const Tensor *x, const Tensor *w, const Tensor *rstd,
                       double offset, void *stream) {
    const Tensor *t[] = {x, dx, w, dy, ds};
    Rows r[5] = {};
    for (int i = 0; i < 5; i++)
        if (t[i] && !as_rows(t[i], &r[i])) return NOT_ROWS;
    constexpr int VEC = 16 / sizeof(T);
    int64_t N = r[0].n, H = r[0].width;
    int64_t P = dw ? dw_partial->shape[0] : BLOCKS_PER_SM * multiprocessors(x->device);
    float *partial = dw ? (float *)dw_partial->data : nullptr;
    Weight weight = {w->data, w->dtype};
    const float *rstd_data = (const float *)rstd->data;
    Plan plan = plan_for(H, VEC, 3, sizeof(T), max_shared_memory(x->device) - STATIC_BYTES);
    const char *error;
    if (!plan.threads || !all_vectors(t, r, 5, VEC)) {
        error = launch(rms_norm_bwd_plain_kernel<T>,
                       dw      ? P
                       : N < P ? N
                               : P,
                       PLAIN_THREADS, 0, stream, matrix<T>(dx, r[1]), partial,
                       matrix<const T>(dy, r[3]), matrix<const T>(ds, r[4]),
                       matrix<const T>(x, r[0]), weight, rstd_data, N, H, (float)offset);
    } else {
        auto kernel = plan.items == 1   ? rms_norm_bwd_kernel<T, 1>
                      : plan.items == 2 ? rms_norm_bwd_kernel<T, 2>
                                        : rms_norm_bwd_kernel<T, MAX_ITEMS>;
        error = launch(kernel,
                       dw      ? P
                       : N < P ? N
                               : P,
                       plan.threads, plan.ring_bytes, stream, matrix<T>(dx, r[1]), partial,
                       matrix<const T>(dy, r[3]), matrix<const T>(ds, r[4]),
                       matrix<const T>(x, r[0]), weight, rstd_data, N, (int)H, (float)offset);
    }
    if (error || !dw) return error;
    return launch_after(rms_norm_bwd_dw_kernel, (H + 31) / 32, 32 * DW_GROUPS, 0, stream, dw->data,
                        dw->dtype, (const float *)partial, (int)P, H);
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
    BY_DTYPE(x->dtype, bwd<T>(dx, dw, dw_partial, dy, nullptr, x, w, rstd, offset, stream))
}

extern "C" const char *add_rms_norm_bwd_cuda(Tensor *dx, Tensor *dw, Tensor *dw_partial,
                                             const Tensor *dy, const Tensor *ds, const Tensor *s,
                                             const Tensor *w, const Tensor *rstd, double offset,
                                             void *stream) {
    BY_DTYPE(s->dtype, bwd<T>(dx, dw, dw_partial, dy, ds, s, w, rstd, offset, stream))
}
