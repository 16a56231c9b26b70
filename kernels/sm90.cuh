// sm90.cuh: one PTX instruction of Hopper's own (sm_90a, PTX ISA 8.0) a function: mbarriers, TMA,
// wgmma, stmatrix, register budgets, fences. A file that includes this is compiled for sm_90a
// alone.
#pragma once
#include "common.cuh"

#include <cuda.h>

// ---- Shared memory ------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void *p) {
    return (uint32_t)__cvta_generic_to_shared(p);
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t to, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ void store_matrices_transposed(uint32_t to, uint32_t a, uint32_t b,
                                                          uint32_t c, uint32_t d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- Roles --------------------------------------------------------------------------------------

// In one thread of the warp, always the same one.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}"
                 : "=r"(elected));
    return elected;
}

// All four warps of a warpgroup give registers back to, or take them from, the block's pool.
template <int COUNT> __device__ __forceinline__ void keep_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- Named barriers -----------------------------------------------------------------------------

// Counts as come to this one, without waiting (named_barrier() of ptx.cuh waits).
__device__ __forceinline__ void named_barrier_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// named_barrier(), and whether x holds in any of its threads.
__device__ __forceinline__ bool named_barrier_any(int barrier, int threads, bool x) {
    uint32_t any;
    asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %3, 0;\nbar.red.or.pred q, %1, %2, p;\n"
                 "selp.b32 %0, 1, 0, q;\n}"
                 : "=r"(any)
                 : "r"(barrier), "r"(threads), "r"((uint32_t)x)
                 : "memory");
    return any;
}

// ---- mbarriers: a phase ends when all arrivals and all expected bytes have come -----------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// After the last mbarrier_init, before the barrier that all threads pass.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and has the phase wait for so many bytes of copies too.
__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// Until the phase of this parity has ended. A fresh barrier is in phase 0: parity 1 passes at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile("{\n.reg .pred p;\n"
                 "WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n"
                 "@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
                 "r"(parity), "r"(10000000)
                 : "memory");
}

// ---- TMA: boxes of a tensor to and from shared memory -------------------------------------------

constexpr uint64_t EVICT_FIRST = 0x12F0000000000000, EVICT_LAST = 0x14F0000000000000; // L2 hints

__device__ __forceinline__ void tma_prefetch(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// One thread: the box at these coordinates, innermost first, elements outside as zeros.
__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                         int c0, int c1, int c2, int c3, uint64_t hint) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(hint)
                 : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t to, const CUtensorMap *map, uint32_t barrier,
                                         int c0, int c1, uint64_t hint) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to),
                 "l"(map), "r"(barrier), "r"(c0), "r"(c1), "l"(hint)
                 : "memory");
}

// One thread: elements outside the tensor are not written.
__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int c0, int c1,
                                          int c2, int c3) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], "
                 "[%1];" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
                 : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap *map, uint32_t from, int c0, int c1,
                                          int c2) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
            map),
        "r"(from), "r"(c0), "r"(c1), "r"(c2)
        : "memory");
}

// The same, added to what is there (float, each element atomically).
__device__ __forceinline__ void tma_add(const CUtensorMap *map, uint32_t from, int c0, int c1,
                                        int c2, uint64_t hint) {
    asm volatile("cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group"
                 ".L2::cache_hint [%0, {%2, %3, %4}], [%1], %5;" ::"l"(map),
                 "r"(from), "r"(c0), "r"(c1), "r"(c2), "l"(hint)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until at most PENDING of this thread's newest groups have yet to read shared memory.
template <int PENDING> __device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Until at most PENDING of them have yet to write global memory.
template <int PENDING> __device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---- Order between threads' own accesses and those of TMA and wgmma -----------------------------

// By the threads that have written shared memory, before the barrier ahead of its TMA or wgmma use.
__device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for all memory.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

__device__ __forceinline__ int load_acquire(const int *from) {
    int x;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// What the counter had before it is one more. (The compiler's atomicAdd() first looks whether other
// lanes add, too, which takes registers.)
__device__ __forceinline__ unsigned next_number(unsigned *counter) {
    unsigned number;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(number)
                 : "l"(counter)
                 : "memory");
    return number;
}

__device__ __forceinline__ void add_release(int *to, int x) {
    asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}

// ---- wgmma: a warpgroup's asynchronous matrix products ------------------------------------------
// An accumulator d of m64nN: row 16 warp + lane / 4 + 8 r, column 8 j + 2 (lane % 4) + e is
// d[4 j + 2 r + e]. A in registers has the same layout, two 16-bit elements a register, so that an
// accumulator's pairs, rounded, are the A of the next product.

// Before the first product, and after other instructions wrote accumulators or A registers.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Nothing moves across this: a compiler that knows nothing of asynchronous products must neither
// read their registers early nor write them late.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(d[i])::"memory");
}

// Operands in shared memory lie as [columns / 64][ROWS][64] 16-bit elements, as TMA writes them
// with 128-byte swizzle, at a multiple of 1024 bytes: rows are 128 bytes, and 16-byte chunk c of
// row r is at c ^ (r % 8). The descriptor's offsets are in units of 16 bytes.
// The products run along the columns: 16 of them from column 16 k on.
// (at >> 4 is there once, so that each further descriptor costs one addition.)
template <int ROWS> __device__ __forceinline__ uint64_t along_columns(uint32_t at, int k) {
    const uint32_t offset = (k % 4) * 32 + (k / 4) * ROWS * 128;
    return ((at >> 4) + (offset >> 4) + (1u << 16)) | (uint64_t)(1024 >> 4 | 1 << 30) << 32;
}

// The products run along the rows: 16 of them from row 16 k on.
template <int ROWS> __device__ __forceinline__ uint64_t along_rows(uint32_t at, int k) {
    const uint32_t offset = k * 16 * 128;
    return ((at >> 4) + (offset >> 4) + (uint32_t)(ROWS * 128 >> 4 << 16)) |
           (uint64_t)(1024 >> 4 | 1 << 30) << 32;
}

#define ACCUMULATE_8(d, i)                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define ACCUMULATE_32(d) \
    ACCUMULATE_8(d, 0), ACCUMULATE_8(d, 8), ACCUMULATE_8(d, 16), ACCUMULATE_8(d, 24)
#define ACCUMULATE_64(d)                                                             \
    ACCUMULATE_32(d), ACCUMULATE_8(d, 32), ACCUMULATE_8(d, 40), ACCUMULATE_8(d, 48), \
        ACCUMULATE_8(d, 56)
#define REGISTERS_32                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d (64, N) = or += a b; TRANSPOSED: b's descriptor is along rows.
#define WGMMA_SHARED(N, HALF, A, B, ADD, TB)                                                   \
    template <typename T, bool TRANSPOSED>                                                     \
    __device__ __forceinline__ void wgmma(float(&d)[HALF], uint64_t a, uint64_t b, bool add) { \
        if constexpr (IS_BF16<T>)                                                              \
            asm volatile(WGMMA_SHARED_TEXT(N, HALF, "bf16.bf16", A, B, ADD, TB)                \
                         : ACCUMULATE_##HALF(d)                                                \
                         : "l"(a), "l"(b), "r"((int)add), "n"((int)TRANSPOSED));               \
        else                                                                                   \
            asm volatile(WGMMA_SHARED_TEXT(N, HALF, "f16.f16", A, B, ADD, TB)                  \
                         : ACCUMULATE_##HALF(d)                                                \
                         : "l"(a), "l"(b), "r"((int)add), "n"((int)TRANSPOSED));               \
    }
#define WGMMA_SHARED_TEXT(N, HALF, TYPES, A, B, ADD, TB)                         \
    "{\n.reg .pred p;\nsetp.ne.b32 p, " ADD ", 0;\n"                             \
    "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPES " {" REGISTERS_##HALF \
        "}, " A ", " B ", p, 1, 1, 0, " TB ";\n}\n"
WGMMA_SHARED("64", 32, "%32", "%33", "%34", "%35")
WGMMA_SHARED("128", 64, "%64", "%65", "%66", "%67")

// d (64, N) += a b with a in registers, b's descriptor along rows.
#define WGMMA_REGISTERS(N, HALF, A, B)                                                      \
    template <typename T>                                                                   \
    __device__ __forceinline__ void wgmma(float(&d)[HALF], const uint32_t *a, uint64_t b) { \
        if constexpr (IS_BF16<T>)                                                           \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.bf16.bf16 "         \
                         "{" REGISTERS_##HALF "}, {" A "}, " B ", 1, 1, 1, 1;\n"            \
                         : ACCUMULATE_##HALF(d)                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
        else                                                                                \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" N "k16.f32.f16.f16 "           \
                         "{" REGISTERS_##HALF "}, {" A "}, " B ", 1, 1, 1, 1;\n"            \
                         : ACCUMULATE_##HALF(d)                                             \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));             \
    }
WGMMA_REGISTERS("64", 32, "%32, %33, %34, %35", "%36")
WGMMA_REGISTERS("128", 64, "%64, %65, %66, %67", "%68")

// Two accumulators, rounded to T: the first in the low half.
template <typename T> __device__ __forceinline__ uint32_t pack_pair(float low, float high) {
    uint32_t pair;
    if constexpr (IS_BF16<T>)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
