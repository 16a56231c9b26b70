// common.cuh: what the CUDA ops share: 16-byte vectors, reductions, rows, and the one launch().
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "../csrc/ops.h"
#include "ptx.cuh"

using bf16 = __nv_bfloat16;
using f16 = __half;

// ---- Values -------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <typename T> constexpr bool IS_BF16 = false;
template <> constexpr bool IS_BF16<bf16> = true;

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

// N elements as loaded, unpacked where they are used: a bf16 or fp16 value of its own takes a whole
// register, so this holds data in flight in half of them.
template <typename T, int N> struct Packed {
    uint32_t word[N * sizeof(T) / 4];

    __device__ __forceinline__ float operator[](int j) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(word[j]);
        uint32_t pair = word[j * sizeof(T) / 4];
        if constexpr (IS_BF16<T>) return __uint_as_float(j % 2 ? pair & 0xffff0000u : pair << 16);
        return __half2float(__ushort_as_half((unsigned short)(j % 2 ? pair >> 16 : pair)));
    }
};
template <typename T> struct Packed<T, 1> {
    T value;
    __device__ __forceinline__ float operator[](int) const { return to_float(value); }
};

// Not zero where an element is not.
template <typename T, int N> __device__ __forceinline__ uint32_t any_bits(const Packed<T, N> &p) {
    uint32_t bits = 0;
    if constexpr (N == 1) return p[0] != 0;
    else
        for (uint32_t word : p.word) bits |= word;
    return bits & (sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu);
}

template <typename T, int N> __device__ __forceinline__ Packed<T, N> load_packed(const T *from) {
    Packed<T, N> out;
    constexpr int BYTES = N * sizeof(T);
    if constexpr (N == 1) {
        out.value = *from;
    } else if constexpr (BYTES % 16 == 0) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; i++) {
            uint4 bits = ((const uint4 *)from)[i];
            out.word[4 * i] = bits.x, out.word[4 * i + 1] = bits.y;
            out.word[4 * i + 2] = bits.z, out.word[4 * i + 3] = bits.w;
        }
    } else {
        static_assert(BYTES == 8, "8 or a multiple of 16 bytes");
        uint2 bits = *(const uint2 *)from;
        out.word[0] = bits.x, out.word[1] = bits.y;
    }
    return out;
}

// From here on the values are unpacked again: the compiler must not keep the earlier ones, which
// take twice the registers or more.
template <typename T, int N> __device__ __forceinline__ void unpack_again(Packed<T, N> &in) {
#pragma unroll
    for (uint32_t &word : in.word) asm volatile("" : "+r"(word));
}

template <typename T, int N>
__device__ __forceinline__ void store(T *__restrict__ to, const Packed<T, N> &in) {
    static_assert(N * sizeof(T) % 16 == 0, "a multiple of 16 bytes");
#pragma unroll
    for (int i = 0; i < N * (int)sizeof(T) / 16; i++)
        ((uint4 *)to)[i] =
            make_uint4(in.word[4 * i], in.word[4 * i + 1], in.word[4 * i + 2], in.word[4 * i + 3]);
}

// Rounded to T.
template <typename T, int N> __device__ __forceinline__ Packed<T, N> pack(const float (&in)[N]) {
    Vec<T, N> values;
#pragma unroll
    for (int i = 0; i < N; i++) values.v[i] = from_float<T>(in[i]);
    return *reinterpret_cast<Packed<T, N> *>(&values);
}

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

// ---- Reductions: a fixed tree, so the same bits every time --------------------------------------

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
    for (int d = 0; d < t->ndim - 1; d++) {
        if (t->shape[d] > 0) continue;
        out->n = 0; // whatever the strides are
        return true;
    }
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

// device.cu, cached per device:
int multiprocessors(int device);
size_t max_shared_memory(int device); // of a block, static and dynamic, in bytes
const char *needs_hopper(int device); // NULL on compute capability 9.0, else the op's error
bool has_dependent_launch();          // whether the current device's code is for sm_90 or newer
static inline bool has_clusters() { return has_dependent_launch(); }

template <typename T> struct identity { using type = T; };

// The only ways to launch: on the caller's stream, with the error returned. The arguments are
// converted to the kernel's own parameter types, so a wrong one does not compile; they are not
// copied on the way, for a table of addresses is 30 KB.
template <typename... P>
static const char *launch_as(bool after, int cluster, void (*kernel)(P...), int64_t grid,
                             dim3 block, size_t smem, void *stream, const P &...arguments) {
    if (grid <= 0) return nullptr;
    if (grid > INT32_MAX) return "ValueError: more than 2^31 - 1 blocks; split the tensors";
    if (smem > 40 * 1024) { // the 48 KB that need no leave hold the static shared memory too
        cudaError_t raised = cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
        if (raised == cudaErrorInvalidValue)
            return "NotImplementedError: this size exceeds the shared memory of this GPU";
        if (raised != cudaSuccess) return cudaGetErrorString(raised);
    }
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    config.attrs = attributes;
    if (after && has_dependent_launch()) {
        cudaLaunchAttribute *overlap = &attributes[config.numAttrs++];
        overlap->id = cudaLaunchAttributeProgrammaticStreamSerialization;
        overlap->val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) { // whose blocks must find room together: as much shared memory as there is
        cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
        cudaLaunchAttribute *shape = &attributes[config.numAttrs++];
        shape->id = cudaLaunchAttributeClusterDimension;
        shape->val.clusterDim.x = cluster;
        shape->val.clusterDim.y = shape->val.clusterDim.z = 1;
    }
    config.gridDim = dim3((unsigned)grid);
    config.blockDim = block;
    config.dynamicSmemBytes = smem;
    config.stream = (cudaStream_t)stream;
    void *pointers[] = {(void *)&arguments...};
    cudaError_t error = cudaLaunchKernelExC(&config, (const void *)kernel, pointers);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename... P>
static const char *launch(void (*kernel)(P...), int64_t grid, dim3 block, size_t smem, void *stream,
                          const typename identity<P>::type &...arguments) {
    return launch_as(false, 1, kernel, grid, block, smem, stream, arguments...);
}

// The same for the second kernel of an op, which starts its prologue before the first has ended
// (programmatic dependent launch) and must wait_for_previous_kernel() before it reads.
template <typename... P>
static const char *launch_after(void (*kernel)(P...), int64_t grid, dim3 block, size_t smem,
                                void *stream, const typename identity<P>::type &...arguments) {
    return launch_as(true, 1, kernel, grid, block, smem, stream, arguments...);
}

// In clusters of `cluster` blocks, up to 8: where has_clusters().
template <typename... P>
static const char *launch_clusters(int cluster, void (*kernel)(P...), int64_t grid, dim3 block,
                                   size_t smem, void *stream,
                                   const typename identity<P>::type &...arguments) {
    return launch_as(false, cluster, kernel, grid, block, smem, stream, arguments...);
}

// `return call;` with T as the type of this dtype. Variadic, for the commas in template arguments.
#define BY_DTYPE(dtype, ...)                                             \
    switch (dtype) {                                                     \
    case BF16: {                                                         \
        using T = bf16;                                                  \
        return __VA_ARGS__;                                              \
    }                                                                    \
    case F16: {                                                          \
        using T = f16;                                                   \
        return __VA_ARGS__;                                              \
    }                                                                    \
    case F32: {                                                          \
        using T = float;                                                 \
        return __VA_ARGS__;                                              \
    }                                                                    \
    default: return "NotImplementedError: float64 runs on the CPU only"; \
    }
