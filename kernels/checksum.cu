// checksum.cu: whether two matrices are the same bit for bit, without a second one beside them: the
// choice of a matrix product's algorithm (csrc/cublaslt.h) compares checksums of results.
#include "common.cuh"

#include "../csrc/cublaslt.h"

constexpr int BLOCK = 256;

// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every bit of x changes half of the result.
__device__ __forceinline__ unsigned long long mixed(unsigned long long x) {
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

__device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint32_t bits_of(bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint32_t bits_of(f16 x) { return __half_as_ushort(x); }

// Sums of integers: the same in any order.
template <typename T>
__global__ void __launch_bounds__(BLOCK)
    checksum_kernel(unsigned long long *sum, const T *__restrict__ data, int64_t rows, int64_t cols,
                    int64_t stride) {
    unsigned long long first = 0, second = 0, dense = 0;
    for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
        for (int64_t c = threadIdx.x; c < cols; c += BLOCK) {
            T value = data[r * stride + c];
            float x = to_float(value);
            unsigned long long place = r * cols + c;
            unsigned long long mix = mixed(place + 0x9e3779b97f4a7c15u * (bits_of(value) + 1ull));
            first += mix, second += mixed(mix + 1);
            dense += x != 0 && isfinite(x);
        }
    }
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        first += __shfl_xor_sync(~0u, first, lane);
        second += __shfl_xor_sync(~0u, second, lane);
        dense += __shfl_xor_sync(~0u, dense, lane);
    }
    if (threadIdx.x % 32) return;
    atomicAdd(&sum[0], first);
    atomicAdd(&sum[1], second);
    atomicAdd(&sum[2], dense);
}

template <typename T>
static const char *run(unsigned long long *sum, const Tensor *t, int64_t rows, int64_t cols,
                       int64_t stride, void *stream) {
    int64_t blocks = rows < 4096 ? rows : 4096;
    return launch(checksum_kernel<T>, blocks, BLOCK, 0, stream, sum, (const T *)t->data, rows, cols,
                  stride);
}

extern "C" const char *checksum(unsigned long long *sum, const Tensor *t, void *stream) {
    bool in_rows = t->stride[1] == 1;
    int64_t rows = t->shape[in_rows ? 0 : 1], cols = t->shape[in_rows ? 1 : 0];
    int64_t stride = t->stride[in_rows ? 0 : 1];
    BY_DTYPE(t->dtype, run<T>(sum, t, rows, cols, stride, stream))
}
