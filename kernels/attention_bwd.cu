// attention_bwd.cu: attention's backward on Hopper (formulas: csrc/ops.h), after Shah et al.,
// "FlashAttention-3" (2024). Three kernels:
//
//  rows    delta = sum_d dout out - dlse and lse in powers of 2, a row of queries each (bandwidth);
//  main    persistent, one block of threads an SM: takes tiles of BLOCK_N keys by a ticket, those
//          with the most queries first, keeps K and V, and passes over the queries' blocks, the
//          last first. 10 B Hq Sq Sk D FLOPs (causal: half), as much bound by the 128 bytes of
//          shared memory a clock as by the tensor cores, for which P^T and dS^T stay in registers:
//              S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ = dS K (dS by shared
//          memory). dQ is summed over the blocks of keys in global memory, in float. In order: the
//          block of keys n adds after n - 1 has, so every bit is the same each time. A block with
//          a lower ticket never waits for one with a higher, so that none waits for ever;
//  finish  rounds dQ, and sums dK and dV over the query heads of a group (bandwidth). Where there
//          are tiles enough for all SMs, a tile takes the whole group itself instead.
//
// Roles of the main kernel: a producer warp (TMA loads), a writer warp (adds dQ), two consumer
// warpgroups of 64 keys each. An mbarrier is named for what its phase's end says:
//   q_full[s], do_full[s]     stage s holds Q, lse; dO, delta    producer, TMA -> consumers
//   q_empty[s], do_empty[s]   their products are done            consumers -> producer
//   kv_full, kv_empty         K and V; dK and dV are stored      producer, TMA <-> consumers
//   tile_full[s], tile_empty[s]   slot s holds a tile; all are through with it
// Named barriers: DS both halves of dS are there; DQ_EMPTY + g, DQ_FULL + g warpgroup g's part of
// dQ may be written, is written; OWN + g warpgroup g's own.
//
// Shared memory (D = 128: 64 queries a block; D = 64: 128), tiles [columns / 64][rows][64] in TMA's
// 128-byte swizzle:
//   K, V      BLOCK_N keys, later dK, dV     64 KB;  32 KB
//   Q, dO     STAGES blocks of queries each  64 KB;  64 KB
//   dS        STAGES x BLOCK_M x BLOCK_N     32 KB;  64 KB: with two, one barrier a step is enough
//   dQ        float, 64 x 64 a warpgroup     32 KB;  32 KB
//   lse, delta    STAGES x BLOCK_M each       1 KB;   2 KB
//   barriers, mailbox
#include "attention.cuh"
#include <stdlib.h>

constexpr int BLOCK_N = 128; // keys: dK and dV take D registers of each of 256 threads
constexpr int THREADS = 3 * WARPGROUP, GROUPS = 2;
constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;

template <int D> struct Bwd {
    // S, dP, dK and dV are 2 D / 2 + 2 BLOCK_M / 2 registers: 192.
    static constexpr int BLOCK_M = D == 128 ? 64 : 128;
    static constexpr int KEYS = BLOCK_N * D * 2, QUERIES = BLOCK_M * D * 2; // bytes of a tile
    static constexpr int DSCORES = BLOCK_M * BLOCK_N * 2, DQ_PART = 64 * 64 * 4;
    static constexpr int ROWS = BLOCK_M * 4; // bytes of lse or delta
    static constexpr int K = 0, V = K + KEYS, Q = V + KEYS, DO = Q + STAGES * QUERIES;
    static constexpr int DS = DO + STAGES * QUERIES, DQ = DS + STAGES * DSCORES;
    static constexpr int LSE = DQ + GROUPS * DQ_PART, DELTA = LSE + STAGES * ROWS;
    static constexpr int BARRIERS = DELTA + STAGES * ROWS, MAILBOX = BARRIERS + 128;
    static constexpr int BYTES = MAILBOX + 128;
    static_assert(BYTES <= 227 << 10, "");
};

enum {
    KV_FULL,
    KV_EMPTY,
    Q_FULL,
    Q_EMPTY = 4,
    DO_FULL = 6,
    DO_EMPTY = 8,
    TILE_FULL = 10,
    TILE_EMPTY = 12
};
enum { DS_READY = 1, DQ_EMPTY = 2, DQ_FULL = 4, OWN = 6 };

// Where dK or dV go: the gradient, or each query head's share of it.
struct Output {
    CUtensorMap map;
    Memory memory;
};

struct BwdParams {
    CUtensorMap q, k, v, dout, rows, dq;
    Output dk, dv;
    Problem problem;
    Order order;
    Plan *plan;
    int copies;    // of lse and delta
    int *turn;     // (B, Hq, Sq): how many blocks of keys have added to the dQ from this row on
    int group;     // query heads of a key head
    int heads;     // of them, those that one tile takes: 1, or group
    bool in_order; // dQ's sums
    bool rotate, linear;
    float *dq_data;
    bool store_first; // in order and dense: the first to add stores instead, over what was there
    float score_scale, log2_scale;
    float cap, slope; // from tanh to powers of 2, -1; without softcap 1, 0
};

// The blocks of queries that see some key of the tile, and which of those see all of them. A tile
// passes over them from `start` on, around the end, and so for each of its heads.
struct Blocks {
    int first, end;
    int whole_first, whole_end;
    int start;

    // Down where dQ is summed in order: the tiles of a head meet at the last block, which they all
    // have, and stay as far apart as they began. Else up from the tile's own place: they never add
    // to one block at a time.
    __device__ __forceinline__ int after(int block, bool in_order) const {
        if (in_order) return block == first ? end - 1 : block - 1;
        return block + 1 == end ? first : block + 1;
    }
};

__device__ __forceinline__ Blocks uniform(const Blocks &b) {
    return {uniform(b.first), uniform(b.end), uniform(b.whole_first), uniform(b.whole_end),
            uniform(b.start)};
}

// A place of the mailbox. It stays as it is until all are through with the tile, so that nobody
// needs registers for it.
struct Slot {
    Tile tile;
    Blocks blocks;
};
template <int D> __device__ __forceinline__ Slot *slot_in(const Stage &s) {
    return (Slot *)(shared + Bwd<D>::MAILBOX) + s.index;
}

template <int BLOCK_M>
__device__ __forceinline__ Blocks blocks_of(const Problem &p, const Tile &tile, bool in_order,
                                            bool rotate) {
    const int last_key = min(tile.from + BLOCK_N, tile.sk) - 1;
    const Range top = queries_seen(p, tile, tile.from);
    const Range bottom = queries_seen(p, tile, last_key);
    Blocks blocks = {top.from / BLOCK_M, 0, (bottom.from + BLOCK_M - 1) / BLOCK_M, 0, 0};
    blocks.end = bottom.to > top.from ? (bottom.to + BLOCK_M - 1) / BLOCK_M : blocks.first;
    blocks.whole_end = tile.from + BLOCK_N <= tile.sk ? max(top.to, 0) / BLOCK_M : 0;
    const int last = blocks.end - 1, own = rotate ? tile.from / BLOCK_M : 0;
    blocks.start = in_order ? last : min(max(own, blocks.first), last);
    return blocks;
}

__device__ __forceinline__ int first_head(const BwdParams &p, const Tile &tile) {
    return tile.head * p.heads;
}

// ---- Producer -----------------------------------------------------------------------------------

template <int D>
__device__ __forceinline__ void load_queries(const CUtensorMap *map, const BwdParams &p,
                                             uint32_t to, uint32_t to_rows, uint32_t full,
                                             const Tile &tile, int row, int head, int which) {
    using B = Bwd<D>;
    mbarrier_expect(full, B::QUERIES + B::ROWS);
    load_tile<D, B::BLOCK_M>(to, map, full, row, head, tile.b, EVICT_LAST);
    const int line = (which * p.problem.B + tile.b) * p.problem.Hq + head, copy = -row & 3;
    tma_load(to_rows, &p.rows, full, row + copy, line * p.copies + copy, EVICT_LAST);
}

template <int D> __device__ __forceinline__ void load_keys(const BwdParams &p, const Tile &tile) {
    using B = Bwd<D>;
    const uint32_t full = shared_at(B::BARRIERS + 8 * KV_FULL);
    const int row = tile.k0 + tile.from, head = first_head(p, tile) / p.group;
    mbarrier_expect(full, 2 * B::KEYS);
    load_tile<D, BLOCK_N>(shared_at(B::K), &p.k, full, row, head, tile.b, EVICT_FIRST);
    load_tile<D, BLOCK_N>(shared_at(B::V), &p.v, full, row, head, tile.b, EVICT_FIRST);
}

// One thread.
template <int D> __device__ __forceinline__ void producer(const BwdParams &p) {
    using B = Bwd<D>;
    const uint32_t barriers = shared_at(B::BARRIERS);
    unsigned count = 0, tiles = 0; // blocks of queries, and tiles with queries, so far
    unsigned ticket = atomicAdd(&p.plan->next, 1u);
    for (int n = 0;; n++) {
        const Stage place = stage_of(n);
        Slot &slot = *slot_in<D>(place);
        const Tile &tile = slot.tile; // read again wherever it is used: registers are few
        const Blocks &blocks = slot.blocks;
        mbarrier_wait(barriers + 8 * (TILE_EMPTY + place.index), place.parity ^ 1);
        slot.tile =
            tile_at(p.problem, p.order, p.plan, ticket, p.problem.Hq / p.heads, BLOCK_N, false);
        slot.blocks = blocks_of<B::BLOCK_M>(p.problem, tile, p.in_order, p.rotate);
        mbarrier_arrive(barriers + 8 * (TILE_FULL + place.index));
        if (tile.head < 0) return;
        ticket = atomicAdd(&p.plan->next, 1u); // has come when it is needed
        const int steps = (blocks.end - blocks.first) * p.heads;
        int head = first_head(p, tile), block = blocks.start;
        for (int i = 0; i < steps; i++, count++, block = blocks.after(block, p.in_order)) {
            if (i && block == blocks.start) head++;
            const Stage s = stage_of(count);
            const int row = tile.q0 + block * B::BLOCK_M;
            mbarrier_wait(barriers + 8 * (Q_EMPTY + s.index), s.parity ^ 1);
            load_queries<D>(&p.q, p, shared_at(B::Q + s.index * B::QUERIES),
                            shared_at(B::LSE + s.index * B::ROWS),
                            barriers + 8 * (Q_FULL + s.index), tile, row, head, 0);
            if (i == 0) {
                mbarrier_wait(barriers + 8 * KV_EMPTY, (tiles++ & 1) ^ 1);
                load_keys<D>(p, tile);
            }
            mbarrier_wait(barriers + 8 * (DO_EMPTY + s.index), s.parity ^ 1);
            load_queries<D>(&p.dout, p, shared_at(B::DO + s.index * B::QUERIES),
                            shared_at(B::DELTA + s.index * B::ROWS),
                            barriers + 8 * (DO_FULL + s.index), tile, row, head, 1);
        }
    }
}

// ---- Writer -------------------------------------------------------------------------------------

// Until the blocks of keys before the tile's have added their dQ of this block of queries.
template <int BLOCK_M>
__device__ __forceinline__ int wait_for_turn(const BwdParams &p, const Tile &tile, int block,
                                             const int *turn) {
    const int before = keys_seen(p.problem, tile, block * BLOCK_M).from / BLOCK_N;
    const int mine = tile.from / BLOCK_N - before;
    while (load_acquire(turn) < mine) {}
    fence_async();
    return mine;
}

// dQ's part of warpgroup g: 64 columns from 64 g on (D = 128), or 64 rows from 64 g on.
template <int D>
__device__ __forceinline__ void add_dq(const BwdParams &p, uint32_t from, const Tile &tile,
                                       int block, int g, int head, bool store) {
    const int row = tile.q0 + block * Bwd<D>::BLOCK_M + (D == 128 ? 0 : 64 * g);
    const int column = D == 128 ? 64 * g : 0, line = tile.b * p.problem.Hq + head;
    if (p.linear) {
        float *to = p.dq_data + ((int64_t)line * (p.problem.Sq / 64) + block) * 8192 + g * 4096;
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 "
                     "[%0], [%1], %2, %3;" ::"l"(to),
                     "r"(from), "r"(16384), "l"(EVICT_LAST)
                     : "memory");
        bulk_commit();
        return;
    }
#pragma unroll
    for (int box = 0; box < 2; box++) {
        const uint32_t part = from + box * 64 * 128;
        if (store) tma_store(&p.dq, part, column + 32 * box, row, line);
        else tma_add(&p.dq, part, column + 32 * box, row, line, EVICT_LAST);
    }
    bulk_commit();
}

// One warp, of which one thread works.
template <int D> __device__ __forceinline__ void writer(const BwdParams &p) {
    using B = Bwd<D>;
    const uint32_t barriers = shared_at(B::BARRIERS);
    const bool elected = elect_one();
    constexpr int BOTH = WARPGROUP + 32;
    for (int n = 0;; n++) {
        const Stage slot = stage_of(n);
        mbarrier_wait(barriers + 8 * (TILE_FULL + slot.index), slot.parity);
        const Tile &tile = slot_in<D>(slot)->tile;
        if (tile.head < 0) return;
        const Blocks &blocks = slot_in<D>(slot)->blocks;
        const int head = first_head(p, tile);
        for (int h = head; h < head + p.heads; h++) {
            int block = blocks.start;
            for (int i = blocks.first; i < blocks.end;
                 i++, block = blocks.after(block, p.in_order)) {
                const int64_t line = (int64_t)tile.b * p.problem.Hq + h;
                int *turn = p.turn + line * p.problem.Sq + tile.q0 + block * B::BLOCK_M;
                int mine = 0;
                named_barrier(DQ_FULL, BOTH);
                if (elected) {
                    if (p.in_order) mine = wait_for_turn<B::BLOCK_M>(p, tile, block, turn);
                    add_dq<D>(p, shared_at(B::DQ), tile, block, 0, h, p.store_first && mine == 0);
                }
                __syncwarp();
                named_barrier(DQ_FULL + 1, BOTH);
                if (elected) {
                    add_dq<D>(p, shared_at(B::DQ + B::DQ_PART), tile, block, 1, h,
                              p.store_first && mine == 0);
                    bulk_wait_read<1>();
                }
                __syncwarp();
                named_barrier_arrive(DQ_EMPTY, BOTH);
                if (elected) bulk_wait_read<0>();
                __syncwarp();
                named_barrier_arrive(DQ_EMPTY + 1, BOTH);
                if (elected && p.in_order) {
                    bulk_wait<0>();
                    fence_async();
                    add_release(turn, 1);
                }
                __syncwarp();
            }
        }
        mbarrier_arrive(barriers + 8 * (TILE_EMPTY + slot.index));
    }
}

// ---- Consumers ----------------------------------------------------------------------------------

struct Consumer {
    int group, thread;
};

// One block of queries against the tile's keys, as a consumer sees it.
struct Step {
    Stage s;
    int block;
    bool masked;
};

// The queries that this thread's two keys are seen by, counted from the block's first.
template <int D>
__device__ __forceinline__ void queries_of_keys(Range (&seen)[2], const Problem &p,
                                                const Tile &tile, const Consumer &c, int block) {
    const int key = tile.from + c.group * 64 + c.thread / 32 * 16 + c.thread % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        seen[r] = queries_seen(p, tile, key + 8 * r);
        seen[r].from -= block * Bwd<D>::BLOCK_M, seen[r].to -= block * Bwd<D>::BLOCK_M;
        if (key + 8 * r >= tile.sk) seen[r].to = seen[r].from;
    }
}

template <int N>
__device__ __forceinline__ void zero_masked(float (&x)[N], const Range (&seen)[2]) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int r = i / 2 % 2, query = column + i / 4 * 8 + i % 2;
        if (query < seen[r].from || query >= seen[r].to) x[i] = 0.0f;
    }
}

// a b^T of the warpgroup's 64 keys (K or V) and a block of queries (Q or dO), started.
template <typename T, int D, int N>
__device__ __forceinline__ void start_scores(float (&sum)[N], const Consumer &c, int keys,
                                             int queries) {
    const uint32_t a = shared_at(keys + c.group * 64 * 128), b = shared_at(queries);
    pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
        wgmma<T, false>(sum, along_columns<BLOCK_N>(a, i), along_columns<Bwd<D>::BLOCK_M>(b, i),
                        i != 0);
    wgmma_commit();
}

// lse or delta of the columns 8 j + 2 (lane % 4) and the next.
__device__ __forceinline__ float2 two_columns(const float *row, int j) {
    return *(const float2 *)(row + 8 * j + threadIdx.x % 4 * 2);
}

// The same for N columns a thread, read while a product runs. 128 queries are read one by one
// instead: they would take half as many registers as the scores.
template <int N> struct Columns {
    static constexpr bool KEPT = N == 32;
    const float *row;
    float2 kept[KEPT ? N / 4 : 1];

    __device__ __forceinline__ explicit Columns(const float *row) : row(row) {
#pragma unroll
        for (int j = 0; KEPT && j < N / 4; j++) kept[j] = two_columns(row, j);
    }
    __device__ __forceinline__ float2 operator[](int j) const {
        if (KEPT) return kept[j];
        asm volatile("" ::: "memory"); // no earlier
        return two_columns(row, j);
    }
};

// S^T -> P^T.
template <int N>
__device__ __forceinline__ void probabilities(float (&s)[N], const Columns<N> &lse, float scale) {
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 l = lse[j];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            s[4 * j + 2 * r] = exp2_approx(fmaf(s[4 * j + 2 * r], scale, -l.x));
            s[4 * j + 2 * r + 1] = exp2_approx(fmaf(s[4 * j + 2 * r + 1], scale, -l.y));
        }
    }
}

// dP^T -> dS^T. True where a row of queries, or its gradient, may hold an infinity or NaN.
template <int N>
__device__ __forceinline__ bool dscores(float (&dp)[N], const float (&p)[N],
                                        const Columns<N> &delta) {
    float check = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 d = delta[j];
        check = fmaf(0.0f, d.x, fmaf(0.0f, d.y, check));
#pragma unroll
        for (int r = 0; r < 2; r++) {
            dp[4 * j + 2 * r] = p[4 * j + 2 * r] * (dp[4 * j + 2 * r] - d.x);
            dp[4 * j + 2 * r + 1] = p[4 * j + 2 * r + 1] * (dp[4 * j + 2 * r + 1] - d.y);
        }
    }
    return check != 0.0f;
}

// Under a softcap, or a scale that is not positive, first scores -> their tanh (or their powers of
// 2), then both of the above at once: dS has the tanh's derivative too.
template <int N> __device__ __forceinline__ void transform(float (&s)[N], const BwdParams &params) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        s[i] *= params.score_scale;
        if (params.problem.softcap != 0.0f) s[i] = tanh_exact(s[i]);
    }
}

template <int N>
__device__ __forceinline__ bool dscores_capped(float (&dp)[N], float (&s)[N], const float *lse,
                                               const float *delta, const BwdParams &params) {
    float check = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 l = two_columns(lse, j), d = two_columns(delta, j);
        check = fmaf(0.0f, d.x, fmaf(0.0f, d.y, check));
#pragma unroll
        for (int i = 4 * j; i < 4 * j + 4; i++) {
            const float t = s[i], p = exp2_approx(fmaf(t, params.cap, -(i % 2 ? l.y : l.x)));
            dp[i] = p * (dp[i] - (i % 2 ? d.y : d.x)) * fmaf(t * params.slope, t, 1.0f);
            s[i] = p;
        }
    }
    return check != 0.0f;
}

template <typename T, int N>
__device__ __forceinline__ void round_pairs(uint32_t (&to)[N / 2], const float (&from)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) to[i] = pack_pair<T>(from[2 * i], from[2 * i + 1]);
}

// dS^T, (64 keys, BLOCK_M) of this warpgroup, into dS [2][BLOCK_M][64 keys].
template <int BLOCK_M, int A>
__device__ __forceinline__ void store_dscores(uint32_t to, const uint32_t (&ds)[A],
                                              const Consumer &c) {
    const int lane = c.thread % 32, matrix = lane / 8, chunk = c.thread / 32 * 2 + matrix % 2;
#pragma unroll
    for (int j = 0; j < BLOCK_M / 16; j++) {
        const int query = 16 * j + matrix / 2 * 8 + lane % 8;
        store_matrices_transposed(to + (c.group * BLOCK_M + query) * 128 + (chunk ^ query % 8) * 16,
                                  ds[4 * j], ds[4 * j + 1], ds[4 * j + 2], ds[4 * j + 3]);
    }
}

// sum += a x, a in registers, x a block of queries (Q or dO), started.
template <typename T, int D, int N, int A>
__device__ __forceinline__ void start_sum(float (&sum)[N], uint32_t (&a)[A], uint32_t x) {
    pin(a), pin(sum);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < A / 4; i++) wgmma<T>(sum, a + 4 * i, along_rows<Bwd<D>::BLOCK_M>(x, i));
    wgmma_commit();
}

// This warpgroup's part of dQ, started.
template <typename T, int D>
__device__ __forceinline__ void start_dq(float (&dq)[32], const Consumer &c, int ds) {
    using B = Bwd<D>;
    const uint32_t a = shared_at(ds + (D == 128 ? 0 : c.group * 64 * 128));
    const uint32_t k = shared_at(B::K + (D == 128 ? c.group * BLOCK_N * 128 : 0));
    pin(dq);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++)
        wgmma<T, true>(dq, along_columns<B::BLOCK_M>(a, i), along_rows<BLOCK_N>(k, i), i != 0);
    wgmma_commit();
}

// The same over the visible pairs alone, where K has an infinity or NaN.
template <typename T, int D>
__device__ __forceinline__ void multiply_dq(float (&dq)[32], const BwdParams &p, const Tile &tile,
                                            const Consumer &c, const Step &step) {
    using B = Bwd<D>;
    const int lane = c.thread % 32, first = (D == 128 ? 0 : c.group * 64) + c.thread / 32 * 16;
    const char *ds = shared + B::DS + step.s.index * B::DSCORES;
    uint32_t a[BLOCK_N / 4];
    Range seen[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const int row = first + lane / 4 + 8 * r, query = step.block * B::BLOCK_M + row;
        seen[r] = keys_seen(p.problem, tile, query);
        seen[r].from -= tile.from, seen[r].to -= tile.from;
        if (query >= tile.sq) seen[r].to = seen[r].from;
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j++) a[2 * j + r] = pair_of<B::BLOCK_M>(ds, row, j, lane);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) dq[i] = 0.0f;
    multiply_visible<T, BLOCK_N>(dq, a, shared + B::K + (D == 128 ? c.group * BLOCK_N * 128 : 0),
                                 seen, lane);
}

// dQ's part, [2][64 rows][32 floats] in the 128-byte swizzle. Of every 32 columns a thread has 8,
// 16 a + 8 b + 2 (lane % 4) + e; it writes them as two chunks of 4, and the finish kernel undoes
// that order: column 16 a + 8 b + 2 i + e lies at 8 i + 4 a + 2 b + e. No bank is hit twice.
__device__ __forceinline__ void store_dq(char *to, const float (&dq)[32], int thread) {
    const int lane = thread % 32, first = thread / 32 * 16 + lane / 4;
#pragma unroll
    for (int half = 0; half < 4; half++) { // 16 columns
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = first + 8 * r, chunk = lane % 4 * 2 + half % 2, i = 8 * half + 2 * r;
            *(float4 *)(to + (half / 2 * 64 + row) * 128 + (chunk ^ row % 8) * 16) =
                make_float4(dq[i], dq[i + 1], dq[i + 4], dq[i + 5]);
        }
    }
}

// What a step has computed by the time of its last three products.
template <int D> struct Products {
    uint32_t p[Bwd<D>::BLOCK_M / 4], ds[Bwd<D>::BLOCK_M / 4]; // P^T, dS^T, rounded
};

template <int D>
__device__ __forceinline__ void hand_over_dq(const Consumer &c, const float (&dq)[32]) {
    using B = Bwd<D>;
    named_barrier(DQ_EMPTY + c.group, WARPGROUP + 32);
    store_dq(shared + B::DQ + c.group * B::DQ_PART, dq, c.thread);
    fence_async_shared();
    named_barrier_arrive(DQ_FULL + c.group, WARPGROUP + 32);
}

// dV is started before the barrier: no tensor core idles at it.
template <typename T, int D>
__device__ __forceinline__ void products(float (&dk)[D / 2], float (&dv)[D / 2], Products<D> &a,
                                         const Consumer &c, const Step &step) {
    using B = Bwd<D>;
    const int st = step.s.index;
    const bool first = c.thread == 0; // arrives for the warpgroup
    float dq[32];
    start_sum<T, D>(dv, a.p, shared_at(B::DO + st * B::QUERIES));
    fence_async_shared();
    named_barrier(DS_READY, GROUPS * WARPGROUP);
    start_dq<T, D>(dq, c, B::DS + st * B::DSCORES);
    wgmma_wait<1>();
    pin(dv), pin(a.p);
    if (first) mbarrier_arrive(shared_at(B::BARRIERS + 8 * (DO_EMPTY + st)));
    start_sum<T, D>(dk, a.ds, shared_at(B::Q + st * B::QUERIES));
    wgmma_wait<1>();
    pin(dq);
    hand_over_dq<D>(c, dq);
    wgmma_wait<0>();
    pin(dk), pin(a.ds);
    if (first) mbarrier_arrive(shared_at(B::BARRIERS + 8 * (Q_EMPTY + st)));
}

// The same past infinities and NaN behind the mask, without tensor cores.
template <typename T, int D>
__device__ __forceinline__ void
visible_products(float (&dk)[D / 2], float (&dv)[D / 2], const Products<D> &a, const BwdParams &p,
                 const Tile &tile, const Consumer &in, const Step &step) {
    using B = Bwd<D>;
    const Consumer c = {in.group, here(in.thread)};
    const int st = step.s.index, lane = c.thread % 32;
    Range seen[2];
    queries_of_keys<D>(seen, p.problem, tile, c, step.block);
    multiply_visible<T, B::BLOCK_M>(dv, a.p, shared + B::DO + st * B::QUERIES, seen, lane);
    multiply_visible<T, B::BLOCK_M>(dk, a.ds, shared + B::Q + st * B::QUERIES, seen, lane);
    fence_async_shared();
    named_barrier(DS_READY, GROUPS * WARPGROUP);
    float dq[32];
    multiply_dq<T, D>(dq, p, tile, c, step);
    hand_over_dq<D>(c, dq);
    if (c.thread > 0) return;
    mbarrier_arrive(shared_at(B::BARRIERS + 8 * (DO_EMPTY + st)));
    mbarrier_arrive(shared_at(B::BARRIERS + 8 * (Q_EMPTY + st)));
}

template <typename T, int D, bool CAP>
__device__ __forceinline__ void one_block(float (&dk)[D / 2], float (&dv)[D / 2],
                                          const BwdParams &p, const Tile &tile, const Consumer &c,
                                          const Step &step, bool bad_keys) {
    using B = Bwd<D>;
    constexpr int M = B::BLOCK_M;
    const int st = step.s.index;
    const float *lse = (const float *)(shared + B::LSE + st * B::ROWS);
    const float *delta = (const float *)(shared + B::DELTA + st * B::ROWS);
    bool unsafe; // rows of Q or dO may hold infinities or NaN
    float s[M / 2], dp[M / 2];
    mbarrier_wait(shared_at(B::BARRIERS + 8 * (Q_FULL + st)), step.s.parity);
    start_scores<T, D>(s, c, B::K, B::Q + st * B::QUERIES);
    if constexpr (CAP) {
        mbarrier_wait(shared_at(B::BARRIERS + 8 * (DO_FULL + st)), step.s.parity);
        start_scores<T, D>(dp, c, B::V, B::DO + st * B::QUERIES);
        wgmma_wait<1>();
        pin(s);
        transform(s, p);
        wgmma_wait<0>();
        pin(dp);
        unsafe = dscores_capped(dp, s, lse, delta, p);
    } else {
        const Columns<M / 2> of_s(lse);
        mbarrier_wait(shared_at(B::BARRIERS + 8 * (DO_FULL + st)), step.s.parity);
        start_scores<T, D>(dp, c, B::V, B::DO + st * B::QUERIES);
        wgmma_wait<1>();
        pin(s);
        probabilities(s, of_s, p.log2_scale);
        pin(s); // not put off until dP has come
        const Columns<M / 2> of_dp(delta);
        wgmma_wait<0>();
        pin(dp);
        unsafe = dscores(dp, s, of_dp);
    }
    if (step.masked) {
        Range seen[2];
        queries_of_keys<D>(seen, p.problem, tile, {c.group, here(c.thread)}, step.block);
        zero_masked(s, seen), zero_masked(dp, seen);
        unsafe = uniform(named_barrier_any(OWN + c.group, WARPGROUP, unsafe) || bad_keys);
    } else unsafe = false;
    Products<D> a;
    round_pairs<T>(a.p, s), round_pairs<T>(a.ds, dp);
    store_dscores<M>(shared_at(B::DS + st * B::DSCORES), a.ds, c);
    if (unsafe) visible_products<T, D>(dk, dv, a, p, tile, c, step);
    else products<T, D>(dk, dv, a, c, step);
}

// The warpgroup's 64 rows of dK or dV, over K or V.
template <typename T, int D>
__device__ __forceinline__ void store_keys(const Output &to, const float (&sum)[D / 2], int at,
                                           const BwdParams &p, const Tile &tile,
                                           const Consumer &c) {
    const int row = tile.from + c.group * 64, rows = min(64, tile.sk - row);
    stage<T, BLOCK_N>(shared_at(at), c.group * 64, sum);
    fence_async_shared();
    named_barrier(OWN + c.group, WARPGROUP);
    if (rows <= 0) return;
    if (rows == 64 || !p.problem.packed) { // TMA leaves rows beyond the tensor alone
        if (c.thread > 0) return;
        const uint32_t from = shared_at(at + c.group * 64 * 128);
        store_tile<D, BLOCK_N>(&to.map, from, tile.k0 + row, tile.head, tile.b);
        bulk_commit();
    } else {
        store_rows<T, BLOCK_N>(to.memory.at<T>(tile.b, tile.k0 + row, tile.head), to.memory.row,
                               shared + at, c.group * 64, rows, p.problem.D);
    }
}

// Keys that no query sees.
template <typename T>
__device__ __forceinline__ void store_nothing(const Output &to, const BwdParams &p,
                                              const Tile &tile, const Consumer &c) {
    const int row = tile.from + c.group * 64, rows = min(64, tile.sk - row);
    zero_rows(to.memory.at<T>(tile.b, tile.k0 + row, tile.head), to.memory.row, rows, p.problem.D);
}

template <typename T, int D, bool CAP>
__device__ __forceinline__ void one_tile(const BwdParams &p, const Tile &tile, const Consumer &c,
                                         const Blocks &blocks, unsigned count, unsigned tiles) {
    using B = Bwd<D>;
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] = dv[i] = 0.0f;
    mbarrier_wait(shared_at(B::BARRIERS + 8 * KV_FULL), tiles & 1);
    const int part = D == 128 ? c.group * BLOCK_N * 128 : 0; // of K that its dQ takes
    const bool bad_keys = uniform(
        named_barrier_any(OWN + c.group, WARPGROUP,
                          holds_not_finite<T>(shared + B::K + part, BLOCK_N * 128, c.thread)));
    const int steps = (blocks.end - blocks.first) * p.heads;
    int block = blocks.start;
#pragma unroll 1
    for (int i = 0; i < steps; i++, block = blocks.after(block, p.in_order)) {
        const bool masked = block >= blocks.whole_end || block < blocks.whole_first;
        one_block<T, D, CAP>(dk, dv, p, tile, c, {stage_of(count + i), block, masked}, bad_keys);
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] *= p.problem.scale;
    named_barrier(DS_READY, GROUPS * WARPGROUP); // both have read K and V
    store_keys<T, D>(p.dv, dv, B::V, p, tile, c);
    store_keys<T, D>(p.dk, dk, B::K, p, tile, c);
    named_barrier(OWN + c.group, WARPGROUP);
    if (c.thread > 0) return;
    bulk_wait_read<0>();
    mbarrier_arrive(shared_at(B::BARRIERS + 8 * KV_EMPTY));
}

template <typename T, int D, bool CAP>
__device__ __forceinline__ void consumer(const BwdParams &p, const Consumer &c) {
    using B = Bwd<D>;
    unsigned count = 0, tiles = 0;
    if (c.thread < 32) named_barrier_arrive(DQ_EMPTY + c.group, WARPGROUP + 32); // for the writer
    for (int n = 0;; n++) {
        const Stage slot = stage_of(n);
        mbarrier_wait(shared_at(B::BARRIERS + 8 * (TILE_FULL + slot.index)), slot.parity);
        const Tile &tile = slot_in<D>(slot)->tile;
        if (uniform(tile.head) < 0) return;
        const Blocks blocks = uniform(slot_in<D>(slot)->blocks);
        if (blocks.end <= blocks.first) {
            store_nothing<T>(p.dk, p, tile, c);
            store_nothing<T>(p.dv, p, tile, c);
        } else {
            one_tile<T, D, CAP>(p, tile, c, blocks, count, tiles);
            count += (blocks.end - blocks.first) * p.heads, tiles++;
        }
        mbarrier_arrive(shared_at(B::BARRIERS + 8 * (TILE_EMPTY + slot.index)));
    }
}

// ---- Main kernel --------------------------------------------------------------------------------

__device__ __forceinline__ void init_barriers(uint32_t barriers) {
    mbarrier_init(barriers + 8 * KV_FULL, 1);
    mbarrier_init(barriers + 8 * KV_EMPTY, GROUPS);
    for (int s = 0; s < STAGES; s++) {
        mbarrier_init(barriers + 8 * (Q_FULL + s), 1);
        mbarrier_init(barriers + 8 * (DO_FULL + s), 1);
        mbarrier_init(barriers + 8 * (Q_EMPTY + s), GROUPS);
        mbarrier_init(barriers + 8 * (DO_EMPTY + s), GROUPS);
        mbarrier_init(barriers + 8 * (TILE_FULL + s), 1);
        mbarrier_init(barriers + 8 * (TILE_EMPTY + s), GROUPS * WARPGROUP + 32);
    }
    mbarrier_init_fence();
}

template <typename T, int D, bool CAP>
__global__ void __launch_bounds__(THREADS, 1)
    attention_bwd_kernel(const __grid_constant__ BwdParams p) {
    using B = Bwd<D>;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // uniform, for the compiler too
    if (warp == 0 && elect_one()) init_barriers(shared_at(B::BARRIERS));
    __syncthreads();
    wait_for_previous_kernel();
    if (warp < 4) {
        keep_registers<PRODUCER_REGISTERS>();
        if (warp == 0 && elect_one()) producer<D>(p);
        if (warp == 1) writer<D>(p);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int thread = threadIdx.x % WARPGROUP;
        consumer<T, D, CAP>(p, {warp / 4 - 1, thread});
    }
}

// ---- Before and after ---------------------------------------------------------------------------

constexpr int ROWS_BLOCK = 256, ROWS_TILE = 64; // threads, rows

struct RowsParams {
    Memory q, out, dout;
    const float *lse, *dlse; // (B, Hq, Sq)
    float *rows;             // (2, B, Hq, copies, stride): lse in powers of 2, delta
    float *dq;               // (B, Hq, Sq, 8 LANES), to be zero, or NULL
    int *turn;               // (B, Hq, Sq)
    Plan *plan;
    int B, Hq, Sq, D, stride, copies;
};

// LANES threads a row, 8 elements each. TMA begins at multiples of 16 bytes, packed sequences do
// not: there copy k begins k floats later, so that one of four suits any row. delta is not finite wherever the row of q or dout is not:
// the main kernel knows by it which masked tiles hold what must not be multiplied by 0. A finite
// lse vouches for q; without one, rows that see no key are looked at.
template <typename T, int LANES>
__global__ void __launch_bounds__(ROWS_BLOCK) attention_bwd_rows_kernel(const RowsParams p) {
    wait_for_previous_kernel(); // the plan kernel, where there is one
    if (blockIdx.x == 0 && threadIdx.x == 0) p.plan->next = 0;
    const int blocks = (p.Sq + ROWS_TILE - 1) / ROWS_TILE, line = blockIdx.x / blocks;
    const int first = (blockIdx.x - line * blocks) * ROWS_TILE, lane = threadIdx.x % LANES;
    const int b = line / p.Hq, head = line - b * p.Hq;
#pragma unroll
    for (int i = 0; i < ROWS_TILE * LANES / ROWS_BLOCK; i++) {
        const int row = first + (i * ROWS_BLOCK + (int)threadIdx.x) / LANES;
        const int64_t at = (int64_t)line * p.Sq + row;
        const bool inside = row < p.Sq && lane * 8 < p.D;
        const float lse = row < p.Sq ? p.lse[at] : 0.0f;
        const bool nothing = lse == -INFINITY;
        float dot = 0.0f, out[8], dout[8];
        if (inside) {
            const Memory &other = nothing ? p.q : p.out;
            load<T, 8>(out, other.at<T>(b, row, head) + lane * 8);
            load<T, 8>(dout, p.dout.at<T>(b, row, head) + lane * 8);
#pragma unroll
            for (int j = 0; j < 8; j++)
                dot = nothing ? dot + (0.0f * dout[j] + 0.0f * out[j]) : fmaf(dout[j], out[j], dot);
        }
#pragma unroll
        for (int n = LANES / 2; n > 0; n /= 2) dot += __shfl_xor_sync(~0u, dot, n);
        if (row >= p.Sq) continue;
        if (p.dq) {
            float4 *zero = (float4 *)(p.dq + (at * LANES + lane) * 8);
            zero[0] = zero[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
        if (lane >= p.copies) continue;
        if (!nothing) dot = dot - (p.dlse ? p.dlse[at] : 0.0f) + 0.0f * lse;
        float *to = p.rows + ((int64_t)line * p.copies + lane) * p.stride + row + lane;
        float *to_delta = to + (int64_t)p.B * p.Hq * p.copies * p.stride;
        to[0] = nothing ? 0.0f : lse * LOG2E, to_delta[0] = dot;
        const int behind = row == p.Sq - 1 ? p.copies - lane : 1;
        for (int i = 1; i < behind; i++) to[i] = to_delta[i] = 0.0f;
        if (lane == 0) p.turn[at] = 0;
    }
}

struct FinishParams {
    Memory dq, dk, dv;
    const float *sums; // (B, Hq, Sq, width): dQ unscaled, columns as store_dq() has them
    const float *lse;  // (B, Hq, Sq)
    const void *dk_shares, *dv_shares; // (B, Sk, Hq, D)
    int Hq, Hk, Sq, Sk, D, width, group;
    unsigned dq_chunks, dk_chunks; // 8 elements each
    float scale;
};

template <typename T> __device__ __forceinline__ void finish_dq(const FinishParams &p, unsigned i) {
    const unsigned chunks = p.D / 8, row_head = i / chunks, chunk = i - row_head * chunks;
    const unsigned entry_row = row_head / p.Hq, head = row_head - entry_row * p.Hq;
    const unsigned b = entry_row / p.Sq, row = entry_row - b * p.Sq;
    const int64_t at = ((int64_t)b * p.Hq + head) * p.Sq + row;
    const float *from = p.sums + at * p.width + chunk / 4 * 32 + chunk % 4 * 2;
    const bool nothing = p.lse[at] == -INFINITY; // nobody has written its sums
    float dq[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 two = *(const float2 *)(from + 8 * j);
        dq[2 * j] = nothing ? 0.0f : two.x * p.scale;
        dq[2 * j + 1] = nothing ? 0.0f : two.y * p.scale;
    }
    store<T, 8>(p.dq.at<T>(b, row, head) + chunk * 8, dq);
}

template <typename T>
__device__ __forceinline__ void sum_shares(const FinishParams &p, const Memory &to,
                                           const void *shares, unsigned i) {
    const unsigned chunks = p.D / 8, row_head = i / chunks, chunk = i - row_head * chunks;
    const unsigned entry_row = row_head / p.Hk, head = row_head - entry_row * p.Hk;
    const unsigned b = entry_row / p.Sk, row = entry_row - b * p.Sk;
    const T *from = (const T *)shares + ((int64_t)row_head * p.group * chunks + chunk) * 8;
    float sum[8] = {};
    for (int g = 0; g < p.group; g++) {
        float x[8];
        load<T, 8>(x, from + (int64_t)g * p.D);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += x[j];
    }
    store<T, 8>(to.at<T>(b, row, head) + chunk * 8, sum);
}

template <typename T>
__global__ void __launch_bounds__(ROWS_BLOCK) attention_bwd_finish_kernel(const FinishParams p) {
    wait_for_previous_kernel();
    unsigned i = blockIdx.x * ROWS_BLOCK + threadIdx.x;
    if (i < p.dq_chunks) return finish_dq<T>(p, i);
    i -= p.dq_chunks;
    if (i < p.dk_chunks) return sum_shares<T>(p, p.dk, p.dk_shares, i);
    i -= p.dk_chunks;
    if (i < p.dk_chunks) sum_shares<T>(p, p.dv, p.dv_shares, i);
}

// ---- Launchers ----------------------------------------------------------------------------------

// Q, dO and the sums of dQ of the heads whose tiles run together stay in L2.
constexpr int64_t L2_BUDGET = 32 << 20;
// With so many tiles of key heads (three for each of 132 SMs) a tile takes its group's query heads.
constexpr int64_t ENOUGH_TILES = 396;

// The workspace's parts, in bytes from its begin; it is a function of the shapes alone.
struct Workspace {
    int64_t plan, rows, turn, dq, dk, dv, end;
    int64_t stride, capacity; // floats of a line of rows, tiles
    int heads, width, copies; // of a group's that one tile takes; columns of dq; of lse and delta
};

static Workspace workspace_of(const AttentionShape &p) {
    const int64_t lines = p.B * p.Hq, blocks = (p.Sk + BLOCK_N - 1) / BLOCK_N;
    const int64_t group = p.Hk ? p.Hq / p.Hk : 1;
    Workspace w = {};
    w.width = p.D > 64 || p.capped ? 128 : 64;
    w.heads =
        (int)(p.B * p.Hk * blocks >= (getenv("FO_TILES") ? atol(getenv("FO_TILES")) : ENOUGH_TILES)
                  ? group
                  : 1);
    w.copies = p.sequences >= 0 ? 4 : 1;
    w.stride = (p.Sq + w.copies - 1 + 3) / 4 * 4;
    w.capacity = plan_capacity(p.sequences >= 0 ? p.Sk : 0, p.sequences, BLOCK_N);
    const int64_t shares = w.heads < group ? p.B * p.Sk * p.Hq * p.D * 2 : 0;
    const int64_t bytes[] = {(int64_t)sizeof(Plan) + 8 * w.capacity,
                             8 * lines * w.copies * w.stride,
                             4 * lines * p.Sq,
                             4 * lines * p.Sq * w.width,
                             shares,
                             shares};
    int64_t *const part[] = {&w.plan, &w.rows, &w.turn, &w.dq, &w.dk, &w.dv};
    for (int i = 0; i < 6; i++) *part[i] = w.end, w.end += (bytes[i] + 255) / 256 * 256;
    return w;
}

int64_t attention_bwd_workspace(const AttentionShape &shape) { return workspace_of(shape).end; }

static const char *make_float_map(CUtensorMap *map, void *data, int ndim, const cuuint64_t *shape,
                                  const cuuint64_t *stride, const cuuint32_t *box, bool swizzled) {
    *map = {};
    for (int d = 0; d < ndim; d++) {
        if (shape[d] == 0) return nullptr; // no tile of it is ever loaded
    }
    const cuuint32_t step[] = {1, 1, 1};
    CUresult result =
        tensor_map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, ndim, data, shape, stride, box,
                             step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                             swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? nullptr : REFUSED_MAP;
}

// Where a tile's dK or dV go: `to`, or a share of it of every query head.
static const char *make_output(Output *out, const Tensor *to, const Problem &p, bool shares,
                               void *at) {
    Tensor t = as_dense(to);
    if (shares) {
        t.data = at, t.shape[2] = p.Hq;
        t.stride[2] = p.D, t.stride[1] = (int64_t)p.Hq * p.D, t.stride[0] = t.stride[1] * p.Sk;
    }
    out->memory = memory_of(&t);
    return make_map(&out->map, &t, 64);
}

static const char *make_maps(BwdParams *p, const Workspace &w, char *memory, const Tensor *q,
                             const Tensor *k, const Tensor *v, const Tensor *dout, Tensor *dk,
                             Tensor *dv) {
    const Problem &problem = p->problem;
    const int block_m = w.width == 128 ? 64 : 128;
    const bool shares = w.heads < p->group;
    const cuuint64_t lines = (cuuint64_t)problem.B * problem.Hq, Sq = (cuuint64_t)problem.Sq;
    const cuuint64_t width = (cuuint64_t)w.width;
    const cuuint64_t copies = (cuuint64_t)w.copies;
    const cuuint64_t rows_shape[] = {Sq ? Sq + copies - 1 : 0, 2 * lines * copies};
    const cuuint64_t rows_stride[] = {(cuuint64_t)w.stride * 4};
    const cuuint64_t dq_shape[] = {width, Sq, lines}, dq_stride[] = {width * 4, Sq * width * 4};
    const cuuint32_t rows_box[] = {(cuuint32_t)block_m, 1}, dq_box[] = {32, 64, 1};
    const char *error = make_map(&p->q, q, block_m);
    if (!error) error = make_map(&p->dout, dout, block_m);
    if (!error) error = make_map(&p->k, k, BLOCK_N);
    if (!error) error = make_map(&p->v, v, BLOCK_N);
    if (!error) error = make_output(&p->dk, dk, problem, shares, memory + w.dk);
    if (!error) error = make_output(&p->dv, dv, problem, shares, memory + w.dv);
    if (!error)
        error =
            make_float_map(&p->rows, memory + w.rows, 2, rows_shape, rows_stride, rows_box, false);
    if (!error) error = make_float_map(&p->dq, memory + w.dq, 3, dq_shape, dq_stride, dq_box, true);
    return error;
}

template <typename T>
static const char *launch_rows(const BwdParams &p, const Workspace &w, char *memory,
                               const Tensor *q, const Tensor *out, const Tensor *dout,
                               const Tensor *lse, const Tensor *dlse, void *stream) {
    const Problem &problem = p.problem;
    RowsParams rows = {memory_of(q), memory_of(out), memory_of(dout)};
    rows.lse = (const float *)lse->data, rows.dlse = dlse ? (const float *)dlse->data : nullptr;
    rows.rows = (float *)(memory + w.rows), rows.turn = p.turn, rows.plan = p.plan;
    rows.dq = p.store_first ? nullptr : (float *)(memory + w.dq);
    rows.B = problem.B, rows.Hq = problem.Hq, rows.Sq = problem.Sq, rows.D = problem.D;
    rows.stride = (int)w.stride, rows.copies = w.copies;
    int64_t blocks = (int64_t)problem.B * problem.Hq * ((problem.Sq + ROWS_TILE - 1) / ROWS_TILE);
    const char *error = nullptr;
    if (problem.packed || !blocks)
        error =
            launch(attention_plan_kernel, 1, problem.packed ? PLAN_THREADS : 32, 0, stream, p.plan,
                   problem.cu_k, problem.sequences, problem.Sk, BLOCK_N, (int)w.capacity, false);
    if (error) return error;
    auto kernel =
        w.width == 128 ? attention_bwd_rows_kernel<T, 16> : attention_bwd_rows_kernel<T, 8>;
    if (problem.packed) return launch_after(kernel, blocks, ROWS_BLOCK, 0, stream, rows);
    return launch(kernel, blocks, ROWS_BLOCK, 0, stream, rows);
}

template <typename T>
static const char *launch_main(BwdParams &p, const Workspace &w, void *stream) {
    const Problem &problem = p.problem;
    const int64_t heads = (int64_t)problem.B * problem.Hq / w.heads;
    const int64_t head_bytes = (int64_t)problem.Sq * problem.D * 8; // of Q, dO and dQ
    p.order = {(unsigned)((problem.Sk + BLOCK_N - 1) / BLOCK_N), (unsigned)heads,
               (unsigned)heads_together(getenv("FO_L2") ? atol(getenv("FO_L2")) << 20 : L2_BUDGET,
                                        head_bytes * w.heads, 1, heads),
               false};
    int64_t tiles = problem.packed ? w.capacity * heads : p.order.blocks * heads;
    if (problem.Sk == 0 || tiles == 0) return nullptr;
    if (tiles > INT32_MAX) return MANY_TILES;
    int device;
    cudaGetDevice(&device);
    int64_t grid = multiprocessors(device);
    bool cap = problem.softcap != 0 || problem.scale <= 0;
    auto kernel = cap             ? attention_bwd_kernel<T, 128, true>
                  : w.width == 64 ? attention_bwd_kernel<T, 64, false>
                                  : attention_bwd_kernel<T, 128, false>;
    int smem = w.width == 64 ? Bwd<64>::BYTES : Bwd<128>::BYTES;
    return launch_after(kernel, tiles < grid ? tiles : grid, THREADS, smem, stream, p);
}

template <typename T>
static const char *launch_finish(const BwdParams &p, const Workspace &w, char *memory,
                                 const Tensor *dq, const Tensor *dk, const Tensor *dv,
                                 const Tensor *lse, void *stream) {
    const Problem &problem = p.problem;
    FinishParams f = {memory_of(dq), memory_of(dk), memory_of(dv)};
    f.sums = (const float *)(memory + w.dq), f.lse = (const float *)lse->data;
    f.dk_shares = memory + w.dk, f.dv_shares = memory + w.dv;
    f.Hq = problem.Hq, f.Hk = problem.Hk, f.Sq = problem.Sq, f.Sk = problem.Sk, f.D = problem.D;
    f.width = w.width, f.group = p.group, f.scale = problem.scale;
    const int64_t chunks = problem.D / 8, dq_chunks = chunks * problem.B * problem.Sq * problem.Hq;
    const int64_t dk_chunks = w.heads < p.group ? chunks * problem.B * problem.Sk * problem.Hk : 0;
    const int64_t all = dq_chunks + 2 * dk_chunks;
    if (all > UINT32_MAX - ROWS_BLOCK) return MANY_TILES;
    f.dq_chunks = (unsigned)dq_chunks, f.dk_chunks = (unsigned)dk_chunks;
    return launch_after(attention_bwd_finish_kernel<T>, (all + ROWS_BLOCK - 1) / ROWS_BLOCK,
                        ROWS_BLOCK, 0, stream, f);
}

template <typename T>
static const char *run(BwdParams &p, const Workspace &w, char *memory, Tensor *dq, Tensor *dk,
                       Tensor *dv, const Tensor *dout, const Tensor *dlse, const Tensor *q,
                       const Tensor *out, const Tensor *lse, void *stream) {
    const char *error = launch_rows<T>(p, w, memory, q, out, dout, lse, dlse, stream);
    if (!error) error = launch_main<T>(p, w, stream);
    if (!error) error = launch_finish<T>(p, w, memory, dq, dk, dv, lse, stream);
    return error;
}

extern "C" const char *attention_bwd_cuda(Tensor *dq, Tensor *dk, Tensor *dv, Tensor *workspace,
                                          const Tensor *dout, const Tensor *dlse, const Tensor *q,
                                          const Tensor *k, const Tensor *v, const Tensor *out,
                                          const Tensor *lse, const Tensor *cu_q, const Tensor *cu_k,
                                          int64_t max_q, int64_t max_k, double scale, int64_t left,
                                          int64_t right, double softcap, int64_t deterministic,
                                          void *stream) {
    (void)max_q, (void)max_k; // the tiles are counted on the device
    BwdParams p = {};
    Problem &problem = p.problem;
    const char *error = set_problem(&problem, q, k, cu_q, cu_k, scale, left, right, softcap);
    if (error) return error;
    const Workspace w =
        workspace_of({1, problem.B, problem.Sq, problem.Sk, problem.Hq, problem.Hk, problem.D,
                      problem.packed ? problem.sequences : -1, softcap != 0 || scale <= 0});
    if (!has_workspace(workspace, w.end)) return SMALL_WORKSPACE;
    if (!has_16_byte_rows(dq) || !has_16_byte_rows(dk) || !has_16_byte_rows(dv) ||
        !has_16_byte_rows(out))
        return BAD_STRIDES;
    char *memory = (char *)workspace->data;
    p.plan = (Plan *)(memory + w.plan), p.turn = (int *)(memory + w.turn);
    p.group = problem.Hk ? problem.Hq / problem.Hk : 1, p.heads = w.heads, p.copies = w.copies;
    p.dq_data = (float *)(memory + w.dq), p.linear = getenv("FO_LIN") ? atoi(getenv("FO_LIN")) : 0;
    p.rotate = getenv("FO_ROT") ? atoi(getenv("FO_ROT")) : 1;
    p.in_order = deterministic, p.store_first = deterministic && !problem.packed;
    p.score_scale = softcap != 0 ? (float)(scale / softcap) : (float)(scale * LOG2E);
    p.log2_scale = (float)(scale * LOG2E);
    p.cap = softcap != 0 ? (float)(softcap * LOG2E) : 1.0f, p.slope = softcap != 0 ? -1.0f : 0.0f;
    error = make_maps(&p, w, memory, q, k, v, dout, dk, dv);
    if (error) return error;
    if (q->dtype == BF16)
        return run<bf16>(p, w, memory, dq, dk, dv, dout, dlse, q, out, lse, stream);
    return run<f16>(p, w, memory, dq, dk, dv, dout, dlse, q, out, lse, stream);
}
