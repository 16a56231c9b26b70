// ptx.cuh: one PTX instruction a function (PTX ISA 8.0): floats, barriers, programmatic dependent
// launch.
// Each section says from which architecture on it exists.
#pragma once
#include <stdint.h>

// ---- Floats (sm_80) -----------------------------------------------------------------------------

// 2^x to 2 units in the last place; 0 where that is less than the smallest normal number.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// NaN where a or b is, unlike fmaxf and fminf.
__device__ __forceinline__ float max_nan(float a, float b) {
    float y;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

__device__ __forceinline__ float min_nan(float a, float b) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// ---- Barriers of part of a block ----------------------------------------------------------------

// Until `threads` threads have come to this one of the block's 16 barriers; __syncthreads() is 0.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Programmatic dependent launch (sm_90) ------------------------------------------------------
// Nothing on older architectures: launch_after() then starts a kernel when the one before has ended.

// Wait until the kernel before this one in the stream has finished and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel of the stream start its prologue.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
