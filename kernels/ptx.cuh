// ptx.cuh: one PTX instruction a function (PTX ISA 8.0): copies to shared memory, mbarriers,
// programmatic dependent launch. Each section says from which architecture on it exists.
#pragma once
#include <stdint.h>

#if __CUDA_ARCH__ >= 900
constexpr bool HAS_BULK_COPY = true;
#else
constexpr bool HAS_BULK_COPY = false;
#endif

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// ---- Copies by the thread itself (sm_80): 16 bytes, past L1 ---------------------------------------

__device__ __forceinline__ void copy_async(void *to_shared, const void *from_global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to_shared)),
                 "l"(from_global)
                 : "memory");
}

// All copies of this thread since the last group become one.
__device__ __forceinline__ void end_copy_group() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all of this thread's groups have come but the PENDING newest.
template <int PENDING> __device__ __forceinline__ void wait_for_copy_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- mbarrier (sm_90): a phase ends when `arrivals` arrived and the expected bytes came ----------

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals)
                 : "memory");
}

// Makes initialized barriers visible to the copy engine.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint64_t *barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

// Returns once the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{\n"
                     ".reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n"
                     "}"
                     : "=r"(done)
                     : "r"(shared_address(barrier)), "r"(parity)
                     : "memory");
    } while (!done);
}

// ---- Bulk copy (sm_90): bytes and both addresses are multiples of 16 ----------------------------

__device__ __forceinline__ void bulk_load(void *to_shared, const void *from_global, uint32_t bytes,
                                          uint64_t *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], "
                 "%2, [%3];" ::"r"(shared_address(to_shared)),
                 "l"(from_global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
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
