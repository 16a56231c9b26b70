// ptx.cuh: one PTX instruction a function (PTX ISA 8.0): floats, copies, barriers, clusters,
// programmatic dependent launch.
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

// ---- Copies to shared memory (sm_80) ------------------------------------------------------------

// 16 bytes, both places aligned; they are there for this thread after wait_for_copies().
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
        "l"(from)
        : "memory");
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- Barriers of part of a block ----------------------------------------------------------------

// Until `threads` threads have come to this one of the block's 16 barriers; __syncthreads() is 0.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- Clusters of blocks (sm_90) -----------------------------------------------------------------
// On older architectures every block is a cluster of its own.

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
}

// What this thread has read and written before it arrives comes before what any thread of the
// cluster does after it has waited. Every thread arrives and waits in turn.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Store to where `to`, in this block's shared memory, lies in that of the cluster's block `rank`.
__device__ __forceinline__ void store_remote(uint4 *to, uint32_t rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
    uint32_t here = (uint32_t)__cvta_generic_to_shared(to), there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
#else
    *to = value;
#endif
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
