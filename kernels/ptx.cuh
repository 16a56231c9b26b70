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

// Of both halves; NaN gives way.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
    uint32_t y;
    asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// ---- Copies and stores (sm_80) ------------------------------------------------------------------

// 16 bytes, both places aligned; they are there for this thread after wait_for_copies().
__device__ __forceinline__ void copy_async(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async(void *to, const void *from) {
    copy_async((uint32_t)__cvta_generic_to_shared(to), from);
}

__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// 16 bytes to global memory in one instruction, where the compiler would make several of a plain
// store: for values that come from two branches.
__device__ __forceinline__ void store_whole(void *to, const uint32_t (&word)[4]) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(word[0]), "r"(word[1]),
                 "r"(word[2]), "r"(word[3])
                 : "memory");
}

// ---- Barriers of part of a block ----------------------------------------------------------------

// Until `threads` threads have come to this one of the block's 16 barriers; __syncthreads() is 0.
__device__ __forceinline__ void named_barrier(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// The same, for warps that wait at different places of the code: bar.sync is for one place
// (synccheck finds it). All threads of a warp come together.
__device__ __forceinline__ void named_barrier_apart(int barrier, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
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

// An inbox counts bytes that arrive asynchronously in a block's shared memory: an mbarrier there,
// whose one phase ends when as many have come as it was opened for. Blocks of a cluster send 16
// bytes to each other's: open_inbox(), cluster_arrive(), cluster_wait(), send(), wait_for_inbox().
// A copy from global memory comes to a block's own: open_inbox(), copy_bulk(), __syncthreads(),
// wait_for_inbox().

// One thread of each block.
__device__ __forceinline__ void open_inbox(uint64_t *inbox, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    uint32_t at = (uint32_t)__cvta_generic_to_shared(inbox);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n"
                 "fence.mbarrier_init.release.cluster;\n"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at),
                 "r"(bytes)
                 : "memory");
#endif
}

// All threads: after the wait, all blocks have begun and opened their inboxes. It orders nothing
// else: barrier.cluster.arrive.release would have every warp fence all of memory.
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// To where `to` and `inbox`, places in this block's shared memory, lie in that of the cluster's
// block `rank`.
__device__ __forceinline__ void send(uint4 *to, uint64_t *inbox, uint32_t rank, uint4 value) {
#if __CUDA_ARCH__ >= 900
    uint32_t place, word;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(place)
        : "r"((uint32_t)__cvta_generic_to_shared(to)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(word)
        : "r"((uint32_t)__cvta_generic_to_shared(inbox)), "r"(rank));
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 "
                 "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(place),
                 "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(word)
                 : "memory");
#else
    *to = value;
#endif
}

// By the thread that opened the inbox. The fence: the copy is of the async proxy, and must see the
// inbox's initialization, an ordinary write. `bytes`: a multiple of 16; both places aligned.
__device__ __forceinline__ void copy_bulk(void *to, const void *from, uint32_t bytes,
                                          uint64_t *inbox) {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;\n"
                 "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(bytes), "r"((uint32_t)__cvta_generic_to_shared(inbox))
                 : "memory");
#endif
}

// All threads, until all of the bytes have come; they are then visible.
__device__ __forceinline__ void wait_for_inbox(uint64_t *inbox) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred p;\n"
        "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0;\n"
        "@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"((uint32_t)__cvta_generic_to_shared(inbox))
        : "memory");
#endif
}

// ---- Programmatic dependent launch (sm_90) ------------------------------------------------------
// Nothing on older architectures: launch_after() then starts a kernel when the one before has
// ended.

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
