// attention_bwd_dq.cuh: the writer of attention's backward, which adds up dQ in global memory and
// stores dK and dV. What this is a part of: attention_bwd.cu.
//
// In order (deterministic) the tiles of keys add to a block of queries one after another, last keys
// first. A block of queries has a counter of those that have added; a tile's turn comes when the
// counter has reached the number of tiles behind it.
//   1. attention_bwd_rows.cu sets the counters to 0.
//   2. wait_for_turns(), at most a block ahead of the writer, polls the counter, fences, TURN_COME.
//   3. The writer adds both parts of dQ, waits until they are in memory, TURN_DONE.
//   4. pass_turns() adds 1 to the counter, with release.
// Tiles are drawn in this order, too: whoever waits, waits for one that runs already.
#pragma once
#include "attention_bwd_units.cuh"

constexpr int OF_TURN = 64; // threads: the writer's warp and wait_for_turns()'s, or pass_turns()'s

// Calls of_tile(tile, blocks, slot) for every tile, with all lanes of one warp.
template <int D, typename F> __device__ __forceinline__ void every_tile(const F &of_tile) {
    const uint32_t barriers = shared_at(Bwd<D>::BARRIERS);
    for (int n = 0;; n++) {
        const Stage slot = stage_of(n);
        mbarrier_wait(barriers + 8 * (TILE_FULL + slot.index), slot.parity);
        const Tile &tile = slot_in<D>(slot)->tile;
        if (tile.head < 0) return;
        of_tile(tile, slot_in<D>(slot)->blocks, slot);
        mbarrier_arrive(barriers + 8 * (TILE_EMPTY + slot.index));
    }
}

// Calls of_block(tile, block) for every block of queries of every tile, in the consumers' order.
template <int D, typename F> __device__ __forceinline__ void every_block(const F &of_block) {
    every_tile<D>([&](const Tile &tile, const Blocks &blocks, const Stage &) {
        for (int block = blocks.first; block < blocks.end; block++) of_block(tile, block);
    });
}

// The tile's place among the blocks of keys that add to a block of queries, last keys first: so
// many add before it.
template <int BLOCK_M>
__device__ __forceinline__ int turn_of(const BwdParams &p, const Tile &tile, int block) {
    const int last = min((block + 1) * BLOCK_M, tile.sq) - 1;
    return (keys_seen(p.problem, tile, last).to - 1) / BLOCK_N - tile.from / BLOCK_N;
}

// The counter of those that have added.
template <int BLOCK_M>
__device__ __forceinline__ int *turn_at(const BwdParams &p, const Tile &tile, int block) {
    return p.turn + (int64_t)line_of(p, tile) * p.problem.Sq + tile.q0 + block * BLOCK_M;
}

// wait_for_turns() and pass_turns() have warps of their own: a poll, its fences and those of a
// release each take about as long as a trip to L2, and the writer has its own stores to wait for.
template <int D> __device__ __forceinline__ void wait_for_turns(const BwdParams &p) {
    constexpr int M = Bwd<D>::BLOCK_M;
    const bool elected = elect_one();
    every_block<D>([&](const Tile &tile, int block) {
        const int mine = turn_of<M>(p, tile, block);
        if (elected && mine > 0) {
            const int *turn = turn_at<M>(p, tile, block);
            while (load_acquire(turn) < mine) {}
            fence_async();
        }
        __syncwarp();
        named_barrier_apart(TURN_COME, OF_TURN);
    });
}

template <int D> __device__ __forceinline__ void pass_turns(const BwdParams &p) {
    const bool elected = elect_one();
    every_block<D>([&](const Tile &tile, int block) {
        named_barrier_apart(TURN_DONE, OF_TURN);
        if (elected) add_release(turn_at<Bwd<D>::BLOCK_M>(p, tile, block), 1);
        __syncwarp();
    });
}

// dQ's part of warpgroup g: 64 columns from 64 g on (D = 128), or 64 rows from 64 g on.
template <int D>
__device__ __forceinline__ void add_dq(const BwdParams &p, uint32_t from, const Tile &tile,
                                       int block, int g, bool store) {
    const int row = tile.q0 + block * Bwd<D>::BLOCK_M + (D == 128 ? 0 : 64 * g);
    const int column = D == 128 ? 64 * g : 0, line = line_of(p, tile) % p.places;
#pragma unroll
    for (int box = 0; box < 2; box++) {
        const uint32_t part = from + box * 64 * 128;
        if (store) tma_store(&p.dq, part, column + 32 * box, row, line);
        else tma_add(&p.dq, part, column + 32 * box, row, line, EVICT_LAST);
    }
    bulk_commit();
}

// Both parts of dQ of one block of queries, as the consumers hand them over. One warp, of which one
// thread works.
template <int D>
__device__ __forceinline__ void write_block(const BwdParams &p, const Tile &tile, int block,
                                            bool elected) {
    using B = Bwd<D>;
    const bool store = p.store_first && turn_of<B::BLOCK_M>(p, tile, block) == 0;
    if (p.in_order) named_barrier_apart(TURN_COME, OF_TURN);
    named_barrier(DQ_FULL, WITH_WRITER);
    if (elected) add_dq<D>(p, shared_at(B::DQ), tile, block, 0, store);
    __syncwarp();
    named_barrier(DQ_FULL + 1, WITH_WRITER);
    if (elected) {
        add_dq<D>(p, shared_at(B::DQ + B::DQ_PART), tile, block, 1, store);
        bulk_wait_read<1>();
    }
    __syncwarp();
    named_barrier_arrive(DQ_EMPTY, WITH_WRITER);
    if (elected) bulk_wait_read<0>();
    __syncwarp();
    named_barrier_arrive(DQ_EMPTY + 1, WITH_WRITER);
    if (!p.in_order) return;
    if (elected) bulk_wait<0>();
    __syncwarp();
    named_barrier_apart(TURN_DONE, OF_TURN);
}

// dK and dV of the tile, as the consumers leave them over K and V. One thread.
template <int D> __device__ __forceinline__ void write_keys(const BwdParams &p, const Tile &tile) {
    using B = Bwd<D>;
    for (int g = 0; g < GROUPS; g++) {
        const int row = tile.from + g * 64;
        if (!by_tma(p, tile, row)) continue;
        store_tile<D, BLOCK_N>(&p.dv.map, shared_at(B::V + g * 64 * 128), tile.k0 + row, tile.head,
                               tile.b);
        store_tile<D, BLOCK_N>(&p.dk.map, shared_at(B::K + g * 64 * 128), tile.k0 + row, tile.head,
                               tile.b);
    }
    bulk_commit();
    bulk_wait_read<0>();
    mbarrier_arrive(shared_at(B::BARRIERS + 8 * KV_EMPTY));
}

template <int D> __device__ __forceinline__ void writer(const BwdParams &p) {
    const bool elected = elect_one();
    every_tile<D>([&](const Tile &tile, const Blocks &blocks, const Stage &slot) {
        if (elected && p.units.count) wait_for_place(p, tile);
        __syncwarp();
        for (int block = blocks.first; block < blocks.end; block++)
            write_block<D>(p, tile, block, elected);
        mbarrier_wait(shared_at(Bwd<D>::BARRIERS + 8 * (KEYS_READY + slot.index)), slot.parity);
        if (elected && blocks.first < blocks.end) write_keys<D>(p, tile);
        if (elected && p.units.count) tile_is_done(p, tile);
        __syncwarp();
    });
}
