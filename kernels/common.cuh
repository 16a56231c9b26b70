// common.cuh: what the CUDA ops share: 16-byte vectors, reductions, rows, and the one launch().
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "../csrc/ops.h"

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- Values -------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16_rn(x);
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }

// The value that T would hold.
template <typename T> __device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<T>(x));
}

// N elements moved by one instruction (16 bytes where N * sizeof(T) is 16).
template <typename T, int N> struct alignas(sizeof(T) * N) Vec { T v[N]; };

template <typename T, int N>
__device__ __forceinline__ void load(float (&out)[N], const T *__restrict__ from) {
    Vec<T, N> packed = *reinterpret_cast<const Vec<T, N> *>(from);
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = to_float(packed.v[i]);
}

template <typename T, int N>
__device__ __forceinline__ void store(T *__restrict__ to, const float (&in)[N]) {
    Vec<T, N> packed;
#pragma unroll
    for (int i = 0; i < N; i++) packed.v[i] = from_float<T>(in[i]);
    *reinterpret_cast<Vec<T, N> *>(to) = packed;
}

// A small operand (a weight) whose dtype is not worth a template: the branch is the same for all.
template <int N>
__device__ __forceinline__ void load_any(float (&out)[N], const void *from, Dtype dtype,
                                         int64_t at) {
    if (dtype == BF16) {
        load<bf16, N>(out, (const bf16 *)from + at);
    } else if (dtype == F16) {
        load<f16, N>(out, (const f16 *)from + at);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) out[i] = ((const float *)from)[at + i];
    }
}

__device__ __forceinline__ void store_any(void *to, Dtype dtype, int64_t at, float value) {
    if (dtype == BF16) {
        ((bf16 *)to)[at] = from_float<bf16>(value);
    } else if (dtype == F16) {
        ((f16 *)to)[at] = from_float<f16>(value);
    } else {
        ((float *)to)[at] = value;
    }
}

// ---- Reductions: a fixed tree, so the same bits every time ---------------------------------------

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

// The sum over the block, in every thread. blockDim.x is a multiple of 32, at most 1024.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float part[32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads(); // part may still be read by the call before
    if (lane == 0) part[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? part[lane] : 0.0f);
}

// ---- Host side ----------------------------------------------------------------------------------

// A tensor as N rows that lie `stride` elements apart, each `width` long.
struct Rows {
    int64_t n, width, stride;
};

// False where the leading dimensions do not merge into one stride.
static inline bool as_rows(const Tensor *t, Rows *out) {
    out->n = 1, out->width = t->shape[t->ndim - 1], out->stride = out->width;
    bool first = true;
    for (int d = t->ndim - 2; d >= 0; d--) {
        if (t->shape[d] == 1) continue;
        if (first) out->stride = t->stride[d];
        else if (t->stride[d] != out->stride * out->n) return false;
        first = false;
        out->n *= t->shape[d];
    }
    return true;
}

#define NOT_ROWS "ValueError: leading dimensions must merge into rows of one stride; copy first"

// True where every row of t begins on a 16-byte boundary and is a whole number of vectors.
static inline bool vectors_of(const Tensor *t, const Rows *r, int64_t n) {
    return (uintptr_t)t->data % 16 == 0 && r->stride % n == 0 && r->width % n == 0;
}

template <typename T> struct identity { using type = T; };

// The only way to launch: on the caller's stream, with the error returned. The arguments are
// converted to the kernel's own parameter types, so a wrong one does not compile.
template <typename... P>
static const char *launch(void (*kernel)(P...), int64_t grid, int block, size_t smem, void *stream,
                          typename identity<P>::type... arguments) {
    if (grid <= 0) return nullptr;
    if (smem > 48 * 1024) {
        cudaError_t raised = cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
        if (raised != cudaSuccess) return cudaGetErrorString(raised);
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = smem;
    config.stream = (cudaStream_t)stream;
    cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// `call` with T as the type of this dtype.
#define BY_DTYPE(dtype, call)                                            \
    switch (dtype) {                                                     \
    case BF16: {                                                         \
        using T = bf16;                                                  \
        return call;                                                     \
    }                                                                    \
    case F16: {                                                          \
        using T = f16;                                                   \
        return call;                                                     \
    }                                                                    \
    case F32: {                                                          \
        using T = float;                                                 \
        return call;                                                     \
    }                                                                    \
    default: return "NotImplementedError: float64 runs on the CPU only"; \
    }

int multiprocessors(int device); // device.cu
