// rms_norm.cu: RMSNorm forward and backward (formulas: csrc/ops.h).
//
// Memory-bound: forward moves 2 elements per element (x in, y out), backward 3 (dy, x, dx). One
// block per row at a time; the second look at a row comes out of the caches. dw: every block adds
// its rows into a sum of its own in shared memory, a second kernel adds the blocks' sums in their
// order: no atomics, the same bits every time.
#include "common.cuh"

constexpr int BLOCK = 256;
constexpr int BLOCKS_PER_SM = 8; // 2048 threads: full occupancy at <= 32 registers

// Shared memory for the sum over one block's rows; wider rows add up in global memory instead.
constexpr int64_t MAX_SMEM_BYTES = 96 * 1024; // two blocks to a multiprocessor

struct Weight {
    const void *data;
    Dtype dtype;
};

// The norm of x, or with `residual` of s = x + residual, which is stored first and read back.
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    rms_norm_fwd_kernel(T *__restrict__ y, T *s, float *__restrict__ rstd, const T *x,
                        const T *__restrict__ residual, Weight w, int64_t N, int64_t H,
                        int64_t y_stride, int64_t s_stride, int64_t x_stride,
                        int64_t residual_stride, float eps, float offset) {
    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        const T *x_row = x + row * x_stride;
        float sum = 0;
        for (int64_t h = threadIdx.x * VEC; h < H; h += BLOCK * VEC) {
            float v[VEC];
            load<T, VEC>(v, x_row + h);
            if (residual) {
                float other[VEC];
                load<T, VEC>(other, residual + row * residual_stride + h);
#pragma unroll
                for (int i = 0; i < VEC; i++) v[i] = rounded<T>(v[i] + other[i]);
                store<T, VEC>(s + row * s_stride + h, v);
            }
#pragma unroll
            for (int i = 0; i < VEC; i++) sum += v[i] * v[i];
        }
        if (residual) x_row = s + row * s_stride; // each thread reads back what it wrote itself
        float r = rsqrtf(block_sum(sum) / (float)H + eps);
        for (int64_t h = threadIdx.x * VEC; h < H; h += BLOCK * VEC) {
            float v[VEC], weight[VEC];
            load<T, VEC>(v, x_row + h);
            load_any<VEC>(weight, w.data, w.dtype, h);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float xhat = offset == 0 ? rounded<T>(v[i] * r) : v[i] * r;
                v[i] = xhat * (weight[i] + offset);
            }
            store<T, VEC>(y + row * y_stride + h, v);
        }
        if (rstd && threadIdx.x == 0) rstd[row] = r;
    }
}

// Block p takes rows p, p + gridDim.x, ...; its sum of dy * xhat ends in dw_partial[p].
template <typename T, int VEC>
__global__ void __launch_bounds__(BLOCK)
    rms_norm_bwd_kernel(T *__restrict__ dx, float *__restrict__ dw_partial,
                        const T *__restrict__ dy, const T *__restrict__ ds, const T *__restrict__ x,
                        Weight w, const float *__restrict__ rstd, int64_t N, int64_t H,
                        int64_t dx_stride, int64_t dy_stride, int64_t ds_stride, int64_t x_stride,
                        float offset, bool in_shared) {
    extern __shared__ float shared_sum[]; // (H,)
    float *global_sum = dw_partial ? dw_partial + blockIdx.x * H : nullptr;
    float *sum = in_shared ? shared_sum : global_sum;
    // Every thread only ever touches its own columns of `sum`: no barrier is needed for it.
    if (sum)
        for (int64_t h = threadIdx.x * VEC; h < H; h += BLOCK * VEC)
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[h + i] = 0;
    for (int64_t row = blockIdx.x; row < N; row += gridDim.x) {
        const T *x_row = x + row * x_stride, *dy_row = dy + row * dy_stride;
        float r = rstd[row], dot = 0;
        for (int64_t h = threadIdx.x * VEC; h < H; h += BLOCK * VEC) {
            float v[VEC], g[VEC], weight[VEC];
            load<T, VEC>(v, x_row + h);
            load<T, VEC>(g, dy_row + h);
            load_any<VEC>(weight, w.data, w.dtype, h);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float xhat = v[i] * r;
                dot += g[i] * (weight[i] + offset) * xhat;
                if (sum) sum[h + i] += g[i] * (offset == 0 ? rounded<T>(xhat) : xhat);
            }
        }
        float mean = block_sum(dot) / (float)H;
        for (int64_t h = threadIdx.x * VEC; h < H; h += BLOCK * VEC) {
            float v[VEC], g[VEC], weight[VEC], residual[VEC] = {};
            load<T, VEC>(v, x_row + h);
            load<T, VEC>(g, dy_row + h);
            load_any<VEC>(weight, w.data, w.dtype, h);
            if (ds) load<T, VEC>(residual, ds + row * ds_stride + h);
#pragma unroll
            for (int i = 0; i < VEC; i++)
                v[i] = r * (g[i] * (weight[i] + offset) - v[i] * r * mean) + residual[i];
            store<T, VEC>(dx + row * dx_stride + h, v);
        }
    }
    if (in_shared)
        for (int64_t h = threadIdx.x * VEC; h < H; h += BLOCK * VEC)
#pragma unroll
            for (int i = 0; i < VEC; i++) global_sum[h + i] = sum[h + i];
}

// dw[h] = sum over p, in its order, of dw_partial[p, h]: 32 columns x 8 groups of rows per block.
__global__ void __launch_bounds__(BLOCK)
    rms_norm_bwd_dw_kernel(void *dw, Dtype dtype, const float *__restrict__ dw_partial, int P,
                           int64_t H) {
    __shared__ float part[BLOCK / 32][32];
    int64_t h = (int64_t)blockIdx.x * 32 + threadIdx.x % 32;
    int group = threadIdx.x / 32;
    float sum = 0;
    if (h < H)
        for (int p = group; p < P; p += BLOCK / 32) sum += dw_partial[p * H + h];
    part[group][threadIdx.x % 32] = sum;
    __syncthreads();
    if (group || h >= H) return;
    for (int other = 1; other < BLOCK / 32; other++) sum += part[other][threadIdx.x];
    store_any(dw, dtype, h, sum);
}

// 16-byte vectors where everything is aligned for them, single elements elsewhere.
template <typename T>
static const char *fwd(Tensor *y, Tensor *s, Tensor *rstd, const Tensor *x, const Tensor *residual,
                       const Tensor *w, double eps, double offset, void *stream) {
    Rows xr, yr, wr, sr = {}, rr = {};
    if (!as_rows(x, &xr) || !as_rows(y, &yr) || !as_rows(w, &wr) ||
        (residual && (!as_rows(s, &sr) || !as_rows(residual, &rr))))
        return NOT_ROWS;
    constexpr int VEC = 16 / sizeof(T);
    bool wide = vectors_of(x, &xr, VEC) && vectors_of(y, &yr, VEC) && vectors_of(w, &wr, VEC) &&
                (!residual || (vectors_of(s, &sr, VEC) && vectors_of(residual, &rr, VEC)));
    auto kernel = wide ? rms_norm_fwd_kernel<T, VEC> : rms_norm_fwd_kernel<T, 1>;
    int64_t most = (int64_t)multiprocessors(x->device) * BLOCKS_PER_SM;
    return launch(kernel, xr.n < most ? xr.n : most, BLOCK, 0, stream, (T *)y->data,
                  residual ? (T *)s->data : nullptr, rstd ? (float *)rstd->data : nullptr,
                  (const T *)x->data, residual ? (const T *)residual->data : nullptr,
                  Weight{w->data, w->dtype}, xr.n, xr.width, yr.stride, sr.stride, xr.stride,
                  rr.stride, (float)eps, (float)offset);
}

template <typename T>
static const char *bwd(Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy,
                       const Tensor *ds, const Tensor *x, const Tensor *w, const Tensor *rstd,
                       double offset, void *stream) {
    Rows xr, dxr, dyr, dsr = {}, wr;
    if (!as_rows(x, &xr) || !as_rows(dx, &dxr) || !as_rows(dy, &dyr) || !as_rows(w, &wr) ||
        (ds && !as_rows(ds, &dsr)))
        return NOT_ROWS;
    constexpr int VEC = 16 / sizeof(T);
    bool wide = vectors_of(x, &xr, VEC) && vectors_of(dx, &dxr, VEC) && vectors_of(dy, &dyr, VEC) &&
                vectors_of(w, &wr, VEC) && (!ds || vectors_of(ds, &dsr, VEC));
    auto kernel = wide ? rms_norm_bwd_kernel<T, VEC> : rms_norm_bwd_kernel<T, 1>;
    int64_t sum_bytes = xr.width * (int64_t)sizeof(float);
    bool in_shared = dw && sum_bytes <= MAX_SMEM_BYTES;
    int64_t P = dw ? dw_partial->shape[0] : (int64_t)multiprocessors(x->device) * BLOCKS_PER_SM;
    const char *error =
        launch(kernel, dw || xr.n > P ? P : xr.n, BLOCK, in_shared ? (size_t)sum_bytes : 0, stream,
               (T *)dx->data, dw ? (float *)dw_partial->data : nullptr, (const T *)dy->data,
               ds ? (const T *)ds->data : nullptr, (const T *)x->data, Weight{w->data, w->dtype},
               (const float *)rstd->data, xr.n, xr.width, dxr.stride, dyr.stride, dsr.stride,
               xr.stride, (float)offset, in_shared);
    if (error || !dw) return error;
    return launch(rms_norm_bwd_dw_kernel, (xr.width + 31) / 32, BLOCK, 0, stream, dw->data,
                  dw->dtype, (const float *)dw_partial->data, (int)P, xr.width);
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
