// embedding_sort.cuh: the kernel of embedding's backward that sorts ids and clears the rows of the
// table that none of them names. What this is a part of: embedding.cu.
//
// A stable counting sort. Bin 0 has the ids below 0, bin 1 + v those of row v, bin V + 1 those from
// V on. A block has some neighbouring bins: it reads all ids, puts those of its bins in place and
// clears the rows of the empty bins. Each of its warps counts some neighbouring ids by bin, so an
// id's place follows from its bin's start, the counts of the warps before, and the ids before it in
// its own warp.
#pragma once
#include "common.cuh"

constexpr int SORTERS = 1024, WARPS = SORTERS / 32; // threads and warps of a block
constexpr int EACH = EMBEDDING_SORTED / SORTERS;    // ids of a thread, at most
// Of a block, at most: any number will do whose counts have room, as asserted below. With this one
// the 132 blocks of a round on an H100 have a table of up to 168,958 rows.
constexpr int MOST_BINS = 1280;
constexpr size_t sort_bytes(int64_t bins) { return sizeof(uint16_t) * ((WARPS + 1) * bins + 1); }
static_assert(sort_bytes(MOST_BINS) <= 96 << 10, "a block has 99 KB where there is least (8.6)");

struct Bins {
    int64_t first;    // bin
    int bins;         // from there on
    uint16_t *counts; // (WARPS, bins): a warp's ids in a bin; then those of the warps before
    uint16_t *starts; // (bins + 1): how many of the block's ids lie in the bins before

    __device__ uint16_t *of_warp(int warp) const { return counts + warp * bins; }
};

// The place of this thread's id i among all ids; a warp has `items` times 32 of them.
__device__ __forceinline__ int place_of(int i, int items) {
    return (threadIdx.x / 32 * items + i) * 32 + threadIdx.x % 32;
}

// bin[i]: of this thread's id i, counted from the block's first; -1: before it; block.bins: behind
// the last, or no id.
template <typename I>
__device__ __forceinline__ void find_bins(int (&bin)[EACH], const I (&id)[EACH], int N, int items,
                                          int64_t V, Bins block) {
    int64_t last = block.first + block.bins;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int64_t of_table = min(max((int64_t)id[i], (int64_t)-1), V) + 1;
        bool is_id = i < items && place_of(i, items) < N;
        bin[i] = of_table < block.first ? -1 : (int)(min(of_table, last) - block.first);
        if (!is_id) bin[i] = block.bins;
    }
}

// bin[i] becomes, for an id in one of the block's bins, that bin and above its 16 bits the number
// of the warp's ids before it in the same bin; else -1. Fills in the warp's counts; returns how
// many of the warp's ids lie before the block's bins.
__device__ __forceinline__ int rank_in_bins(int (&bin)[EACH], Bins block) {
    uint16_t *counts = block.of_warp(threadIdx.x / 32);
    int before = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        before += bin[i] < 0;
        bool own = bin[i] >= 0 && bin[i] < block.bins;
        if (__any_sync(0xffffffffu, own)) {
            unsigned same = __match_any_sync(0xffffffffu, bin[i]);
            int lower = __popc(same & ((1u << threadIdx.x % 32) - 1)), b = bin[i];
            int counted = own ? counts[b] : 0;
            __syncwarp();
            if (own && lower == 0) counts[b] = counted + __popc(same);
            __syncwarp();
            bin[i] = b | (counted + lower) << 16;
        }
        if (!own) bin[i] = -1;
    }
    return __reduce_add_sync(0xffffffffu, before);
}

// The sum of x over the threads before this one.
__device__ __forceinline__ int sum_before(int x) {
    __shared__ int part[WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
    }
    if (lane == 31) part[warp] = sum;
    __syncthreads();
    return sum - x + __reduce_add_sync(0xffffffffu, lane < warp ? part[lane] : 0);
}

// The counts of bin b of the warps become the sums of those before; returns the sum of all.
__device__ __forceinline__ int add_up(int b, Bins block) {
    constexpr int TOGETHER = 16; // loads before their stores
    int sum = 0;
    for (int warp = 0; warp < WARPS; warp += TOGETHER) {
        int found[TOGETHER];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) found[k] = block.of_warp(warp + k)[b];
#pragma unroll
        for (int k = 0; k < TOGETHER; k++) {
            block.of_warp(warp + k)[b] = sum;
            sum += found[k];
        }
    }
    return sum;
}

// starts, from counts. Every thread has some neighbouring bins.
__device__ __forceinline__ void find_starts(Bins block) {
    int many = (block.bins + SORTERS - 1) / SORTERS;
    int begin = min((int)threadIdx.x * many, block.bins), end = min(begin + many, block.bins);
    int sum = 0;
    for (int b = begin; b < end; b++) {
        block.starts[b] = sum;
        sum += add_up(b, block);
    }
    int before = sum_before(sum);
    for (int b = begin; b < end; b++) block.starts[b] += before;
    if (threadIdx.x == SORTERS - 1) block.starts[block.bins] = before + sum;
}

// Zeros in a row, by a warp: bytes, and between them whole vectors.
__device__ __forceinline__ void clear_row(char *row, int64_t bytes) {
    int lane = threadIdx.x % 32;
    int64_t begin = min((int64_t)(-(uintptr_t)row % 16), bytes);
    int64_t end = begin + (bytes - begin) / 16 * 16;
    if (lane < begin) row[lane] = 0;
    for (int64_t at = begin + 16 * lane; at < end; at += 16 * 32)
        *(uint4 *)(row + at) = make_uint4(0, 0, 0, 0);
    if (end + lane < bytes) row[end + lane] = 0;
}

// sorted (2, N): the ids in ascending order, those that name no row as -1 and V; where each stood.
// dw: rows of `width` bytes, `pitch` bytes apart.
template <typename I>
__global__ void __launch_bounds__(SORTERS)
    embedding_bwd_sort_kernel(char *__restrict__ dw, int64_t pitch, int64_t width,
                              int64_t *__restrict__ sorted, const void *__restrict__ ids, int N,
                              int64_t V, int bins) {
    extern __shared__ uint4 memory[];
    __shared__ int before; // ids in the bins of the blocks before
    uint16_t *counts = (uint16_t *)memory;
    Bins block = {(int64_t)blockIdx.x * bins, bins, counts, counts + WARPS * bins};
    int items = (N + SORTERS - 1) / SORTERS, warp = threadIdx.x / 32, bin[EACH];
    I id[EACH]; // all loads on their way together: no use of one before the __syncthreads() below
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int n = place_of(i, items);
        id[i] = i < items && n < N ? ((const I *)ids)[n] : 0;
    }
    let_next_kernel_start();
    for (int i = threadIdx.x; i < WARPS * bins / 8; i += SORTERS)
        memory[i] = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) before = 0;
    __syncthreads();
    find_bins(bin, id, N, items, V, block);
    int found = rank_in_bins(bin, block);
    if (threadIdx.x % 32 == 0) atomicAdd(&before, found);
    __syncthreads();
    find_starts(block);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        if (bin[i] < 0) continue;
        int b = bin[i] & 0xffff, rank = bin[i] >> 16;
        int at = before + block.starts[b] + block.of_warp(warp)[b] + rank;
        sorted[at] = block.first + b - 1;
        sorted[N + at] = place_of(i, items);
    }
    for (int b = warp; b < bins; b += WARPS) {
        int64_t v = block.first + b - 1;
        if (v < 0 || v >= V || block.starts[b] != block.starts[b + 1]) continue;
        clear_row(dw + v * pitch, width);
    }
}
