// attention_bwd.cu: attention's backward on Hopper (formulas: csrc/ops.h), after Shah et al.,
// "FlashAttention-3" (2024). Two or three kernels (packed sequences: another before them, the plan
// of attention_plan.cu):
//
//  rows    delta = sum_d dout out - dlse and lse in powers of 2, a row of queries each (bandwidth);
//  main    persistent, one block of threads an SM: takes tiles of BLOCK_N keys of one query head by
//          a ticket, those with the most queries first, keeps K and V, and passes over the blocks
//          of queries. 10 B Hq Sq Sk D FLOPs (causal: half), as much bound by the 128 bytes of
//          shared memory a clock as by the tensor cores, for which P^T and dS^T stay in registers:
//              S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q, dQ = dS K (dS by shared
//          memory). dQ is summed over the blocks of keys in global memory, in float, as they come.
//          In order (deterministic) the block of keys number n adds after number n + 1, and the
//          tiles are drawn from the last keys on, so that none waits for ever. Under a causal
//          mask n reaches a block of queries BLOCK_N / BLOCK_M steps after n + 1, where both begin
//          together, and then does not wait; without a mask it waits a step for each later block
//          of keys. Slower either way, under a causal mask because the longest tiles come last;
//  finish  rounds dQ, and sums the shares of dK and dV, each rounded, over the query heads of a
//          group (bandwidth). Tiles that took all heads of a group would need no shares, but are
//          so few and so unequal under a causal mask that multiprocessors idle at the end.
//          Most often the main kernel does this itself, head after head, beside the products
//          (attention_bwd_units.cuh); it is a kernel in order, for packed sequences, where few
//          queries see a key (short sequences, narrow windows), and where a group's heads have more
//          than 4096 columns in all.
//
// Roles of the main kernel: a producer warp (TMA loads), a writer warp (adds dQ, stores dK and dV),
// two more that finish the gradients, or in order wait for the writer's turns and pass them on
// (attention_bwd_dq.cuh), two consumer warpgroups of 64 keys each. An mbarrier is named for what
// its phase's end says:
//   q_full[s], do_full[s]     stage s holds Q, lse; dO, delta    producer, TMA -> consumers
//   q_empty[s], do_empty[s]   their products are done            consumers -> producer
//   kv_full                   K and V                            producer, TMA -> consumers
//   keys_ready[s]             dK and dV of slot s's tile lie     consumers -> writer
//                             over K and V, or are stored
//   kv_empty                  they have been read                writer -> producer
//   tile_full[s], tile_empty[s]   slot s holds a tile; all are through with it
// Named barriers: DS_READY both halves of dS are there; DQ_EMPTY + g, DQ_FULL + g warpgroup g's
// part of dQ may be written, is written; OWN + g warpgroup g's own; in order, TURN_COME a block of
// queries may be added to, TURN_DONE it has been.
//
// Shared memory (D = 128: 64 queries a block; D = 64: 128), tiles [columns / 64][rows][64] in TMA's
// 128-byte swizzle:
//   K, V      BLOCK_N keys, later dK, dV     64 KB;  32 KB
//   Q, dO     STAGES blocks of queries each, 64 KB;  64 KB
//             after the last tile 8 KB for each consumer warp (do_units())
//   dS        STAGES x BLOCK_M x BLOCK_N     32 KB;  64 KB: with two, one barrier a step is enough
//   dQ        float, 64 x 64 a warpgroup     32 KB;  32 KB
//   lse, delta    STAGES x BLOCK_M each       1 KB;   2 KB
//   barriers, mailbox                        256 B
//   8 KB for each of the two warps that finish
#include "attention_bwd_dq.cuh"
#include "attention_bwd_step.cuh"
#include "sm90.cuh" // for Hopper alone, setup.py sees by this line

// ---- Tiles --------------------------------------------------------------------------------------

// The blocks of queries that see some key of the tile, and which of those see all of them.
template <int BLOCK_M>
__device__ __forceinline__ Blocks blocks_of(const Problem &p, const Tile &tile) {
    const int last_key = min(tile.from + BLOCK_N, tile.sk) - 1;
    const Range top = queries_seen(p, tile, tile.from);
    const Range bottom = queries_seen(p, tile, last_key);
    Blocks blocks = {top.from / BLOCK_M, 0, (bottom.from + BLOCK_M - 1) / BLOCK_M, 0};
    blocks.end = bottom.to > top.from ? (bottom.to + BLOCK_M - 1) / BLOCK_M : blocks.first;
    blocks.whole_end = tile.from + BLOCK_N <= tile.sk ? max(top.to, 0) / BLOCK_M : 0;
    return blocks;
}

// ---- Producer -----------------------------------------------------------------------------------

// A block of rows of Q or dO, and line `which` of lse and delta beside it.
template <int D>
__device__ __forceinline__ void load_queries(const CUtensorMap *map, const BwdParams &p,
                                             uint32_t to, uint32_t to_rows, uint32_t full,
                                             const Tile &tile, int block, int which) {
    using B = Bwd<D>;
    const int row = tile.q0 + block * B::BLOCK_M;
    mbarrier_expect(full, B::QUERIES + B::ROWS);
    load_tile<D, B::BLOCK_M>(to, map, full, row, tile.head, tile.b, EVICT_LAST);
    const int line = (which * p.problem.B + tile.b) * p.problem.Hq + tile.head;
    const int copy = -row & 3; // that begins at 16 bytes with this row
    tma_load(to_rows, &p.rows, full, row + copy, line * p.copies + copy, EVICT_LAST);
}

template <int D>
__device__ __forceinline__ void load_q(const BwdParams &p, const Tile &tile, int block,
                                       const Stage &s) {
    using B = Bwd<D>;
    const uint32_t barriers = shared_at(B::BARRIERS);
    mbarrier_wait(barriers + 8 * (Q_EMPTY + s.index), s.parity ^ 1);
    load_queries<D>(&p.q, p, shared_at(B::Q + s.index * B::QUERIES),
                    shared_at(B::LSE + s.index * B::ROWS), barriers + 8 * (Q_FULL + s.index), tile,
                    block, 0);
}

template <int D>
__device__ __forceinline__ void load_dout(const BwdParams &p, const Tile &tile, int block,
                                          const Stage &s) {
    using B = Bwd<D>;
    const uint32_t barriers = shared_at(B::BARRIERS);
    mbarrier_wait(barriers + 8 * (DO_EMPTY + s.index), s.parity ^ 1);
    load_queries<D>(&p.dout, p, shared_at(B::DO + s.index * B::QUERIES),
                    shared_at(B::DELTA + s.index * B::ROWS), barriers + 8 * (DO_FULL + s.index),
                    tile, block, 1);
}

template <int D> __device__ __forceinline__ void load_keys(const BwdParams &p, const Tile &tile) {
    using B = Bwd<D>;
    const uint32_t full = shared_at(B::BARRIERS + 8 * KV_FULL);
    const int row = tile.k0 + tile.from, head = tile.head / p.group_size;
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
        slot.tile = tile_at(p.problem, p.order, p.plan, ticket, BLOCK_N, false);
        slot.blocks = blocks_of<B::BLOCK_M>(p.problem, tile);
        mbarrier_arrive(barriers + 8 * (TILE_FULL + place.index));
        if (tile.head < 0) return;
        // In the order in which their places become free: dO's of a block, then Q's of the next.
        for (int block = blocks.first; block < blocks.end; block++, count++) {
            if (block == blocks.first) {
                load_q<D>(p, tile, block, stage_of(count));
                mbarrier_wait(barriers + 8 * KV_EMPTY, (tiles++ & 1) ^ 1);
                load_keys<D>(p, tile);
            }
            load_dout<D>(p, tile, block, stage_of(count));
            if (block + 1 < blocks.end) load_q<D>(p, tile, block + 1, stage_of(count + 1));
        }
        // Not before: a tile that waits for the end of a long one would be begun too late.
        ticket = atomicAdd(&p.plan->next, 1u);
    }
}

// ---- Consumers ----------------------------------------------------------------------------------

// The warpgroup's 64 rows of dK or dV, over K or V.
template <typename T, int D>
__device__ __forceinline__ void store_keys(const Output &to, const float (&sum)[D / 2], int at,
                                           const BwdParams &p, const Tile &tile,
                                           const Consumer &c) {
    const int row = tile.from + c.group * 64, rows = min(64, tile.sk - row);
    store_accumulator<T, BLOCK_N>(shared_at(at), c.group * 64, sum);
    if (rows <= 0 || by_tma(p, tile, row)) return;
    named_barrier(OWN + c.group, WARPGROUP);
    store_rows<T, BLOCK_N>(to.memory.at<T>(tile.b, tile.k0 + row, tile.head), to.memory.row,
                           shared + at, c.group * 64, rows, p.problem.D);
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
    int block = blocks.first;
    // Loops of their own: nothing of a mask, nor of the softcap, is in the one that has the time.
#pragma unroll 1
    while (block < blocks.end) {
        if (CAP || block < blocks.whole_first || block >= blocks.whole_end) {
            masked_block<T, D, CAP>(dk, dv, p, tile, c, {stage_of(count), block}, bad_keys);
            block++, count++;
        } else if constexpr (!CAP) {
#pragma unroll 1
            do {
                whole_block<T, D>(dk, dv, p, c, {stage_of(count), block});
                block++, count++;
            } while (block < blocks.whole_end);
        }
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) dk[i] *= p.problem.scale;
    named_barrier(DS_READY, GROUPS * WARPGROUP); // both have read K and V
    store_keys<T, D>(p.dv, dv, B::V, p, tile, c);
    store_keys<T, D>(p.dk, dk, B::K, p, tile, c);
    fence_async_shared();
}

template <typename T, int D, bool CAP>
__device__ __forceinline__ void consumer(const BwdParams &p, const Consumer &c) {
    using B = Bwd<D>;
    unsigned count = 0, tiles = 0;
    if (c.thread < 32) named_barrier_arrive(DQ_EMPTY + c.group, WITH_WRITER); // for the writer
    for (int n = 0;; n++) {
        const Stage slot = stage_of(n);
        mbarrier_wait(shared_at(B::BARRIERS + 8 * (TILE_FULL + slot.index)), slot.parity);
        const Tile &tile = slot_in<D>(slot)->tile;
        if (uniform(tile.head) < 0) break;
        const Blocks blocks = uniform(slot_in<D>(slot)->blocks);
        if (blocks.end <= blocks.first) {
            store_nothing<T>(p.dk, p, tile, c);
            store_nothing<T>(p.dv, p, tile, c);
        } else {
            one_tile<T, D, CAP>(p, tile, c, blocks, count, tiles);
            count += blocks.end - blocks.first, tiles++;
        }
        mbarrier_arrive(shared_at(B::BARRIERS + 8 * (KEYS_READY + slot.index)));
        mbarrier_arrive(shared_at(B::BARRIERS + 8 * (TILE_EMPTY + slot.index)));
    }
    // Nobody loads Q and dO any more, and both warpgroups have read them: they met at DS_READY
    // after the last block.
    const int warp = c.group * 4 + c.thread / 32;
    if (p.units.count) do_units<T, D>(p, B::Q + warp * UNIT_BUFFER);
}

// ---- Main kernel --------------------------------------------------------------------------------

__device__ __forceinline__ void init_barriers(uint32_t barriers, bool in_order) {
    // The consumers, the writer's warp, and those of its turns.
    const int of_tile = GROUPS * WARPGROUP + (in_order ? 3 : 1) * 32;
    mbarrier_init(barriers + 8 * KV_FULL, 1);
    mbarrier_init(barriers + 8 * KV_EMPTY, 1);
    for (int s = 0; s < STAGES; s++) {
        mbarrier_init(barriers + 8 * (Q_FULL + s), 1);
        mbarrier_init(barriers + 8 * (DO_FULL + s), 1);
        mbarrier_init(barriers + 8 * (Q_EMPTY + s), GROUPS);
        mbarrier_init(barriers + 8 * (DO_EMPTY + s), GROUPS);
        mbarrier_init(barriers + 8 * (TILE_FULL + s), 1);
        mbarrier_init(barriers + 8 * (TILE_EMPTY + s), of_tile);
        mbarrier_init(barriers + 8 * (KEYS_READY + s), GROUPS * WARPGROUP);
    }
    mbarrier_init_fence();
}

template <typename T, int D, bool CAP>
__global__ void __launch_bounds__(THREADS, 1)
    attention_bwd_kernel(const __grid_constant__ BwdParams p) {
    using B = Bwd<D>;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // uniform, for the compiler too
    if (warp == 0 && elect_one()) init_barriers(shared_at(B::BARRIERS), p.in_order);
    __syncthreads();
    wait_for_previous_kernel();
    if (warp < 4) {
        keep_registers<PRODUCER_REGISTERS>();
        if (warp == 0 && elect_one()) producer<D>(p);
        if (warp == 1) writer<D>(p);
        if (warp == 2 && p.in_order) wait_for_turns<D>(p);
        if (warp == 3 && p.in_order) pass_turns<D>(p);
        if (warp >= 2 && p.units.count)
            do_units<T, D>(p, B::UNIT_BUFFERS + (warp - 2) * UNIT_BUFFER);
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int thread = threadIdx.x % WARPGROUP;
        consumer<T, D, CAP>(p, {warp / 4 - 1, thread});
    }
}

// ---- Launcher -----------------------------------------------------------------------------------

// Q, dO and the sums of dQ of the heads whose tiles run together stay in L2.
constexpr int64_t L2_BUDGET = 32 << 20;
constexpr int MULTIPROCESSORS = 132; // of a Hopper, at most: the workspace is of no device
// Queries that see a key, at least: for a tile's products to outlast two warps' finishing of what
// it leaves; and for no writer to wait for a place, too. Chosen by timing on an H100: 32 causal
// heads of 128, 512 to 16384 rows.
constexpr int64_t UNITS_FROM = 1024, PLACES_FROM = 2048;

// How many queries see a key, about.
static int64_t queries_of_key(const AttentionShape &p) {
    const bool open_left = p.left < 0, open_right = p.right < 0;
    if (open_left || open_right) return open_left && open_right ? p.Sq : p.Sq / 2;
    return p.left < p.Sq && p.right < p.Sq - p.left ? p.left + p.right + 1 : p.Sq;
}

// Whether the main kernel finishes the gradients itself. Not in order, where its two warps have the
// turns; nor for packed sequences, whose heads all end together; nor where tiles are short, or the
// shares of one key exceed a buffer.
static bool has_units(const AttentionShape &p) {
    const bool any = p.B > 0 && p.Hq > 0 && p.Hk > 0 && p.Sq > 0 && p.Sk > 0;
    return any && p.sequences < 0 && !p.deterministic && queries_of_key(p) >= UNITS_FROM &&
           p.Hq / p.Hk * p.D * 2 <= UNIT_BUFFER &&
           p.B * p.Hq * (p.Sq + 2 * p.Sk) <= INT32_MAX; // more than there are units
}

// Lines whose sums of dQ are there at a time: all; or, where each gives up its place when it is
// finished, those whose tiles run together, as many before them, and what all multiprocessors may
// begin beyond them. Never fewer than `together`, unless that is all: else a tile would wait for
// one that is drawn after it, for ever (attention_bwd_units.cuh).
static int64_t places_of(const AttentionShape &p, const Workspace &w) {
    const int64_t lines = p.B * p.Hq, blocks = (p.Sk + BLOCK_N - 1) / BLOCK_N;
    if (!w.has_units || queries_of_key(p) < PLACES_FROM) return lines;
    const int64_t places = 2 * w.together + MULTIPROCESSORS / blocks;
    return places < lines ? places : lines;
}

static Workspace workspace_of(const AttentionShape &p) {
    const int64_t lines = p.B * p.Hq;
    Workspace w = {};
    w.width = p.D > 64 || p.capped ? 128 : 64;
    w.copies = p.sequences >= 0 ? 4 : 1;
    w.stride = (p.Sq + w.copies - 1 + 3) / 4 * 4;
    w.capacity = plan_capacity(p.sequences >= 0 ? p.Sk : 0, p.sequences, BLOCK_N);
    w.together = heads_together(L2_BUDGET, p.Sq * p.D * 8, 1, lines);
    w.has_units = has_units(p), w.places = places_of(p, w);
    const int64_t shares = p.Hk < p.Hq ? p.B * p.Sk * p.Hq * p.D * 2 : 0;
    const int64_t bytes[] = {(int64_t)sizeof(Plan) + 8 * w.capacity,
                             8 * lines * w.copies * w.stride,
                             p.deterministic ? 4 * lines * p.Sq : 0,
                             (int64_t)sizeof(Progress) * lines,
                             4 * w.places * p.Sq * w.width,
                             shares,
                             shares};
    int64_t *const part[] = {&w.plan, &w.rows, &w.turn, &w.progress, &w.dq, &w.dk, &w.dv};
    for (int i = 0; i < 7; i++) *part[i] = w.end, w.end += (bytes[i] + 255) / 256 * 256;
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

static Units units_of(const BwdParams &p, const Workspace &w, const Tensors &t) {
    if (!w.has_units) return {};
    const Problem &problem = p.problem;
    Units u = {memory_of(t.dq), {memory_of(t.dk), memory_of(t.dv)}};
    u.shares[0] = t.memory + w.dk, u.shares[1] = t.memory + w.dv;
    u.sums = (float *)(t.memory + w.dq), u.next = &p.plan->next_unit;
    u.lines = problem.B * problem.Hq, u.share_bytes = p.group_size * problem.D * 2;
    u.key_rows = UNIT_BUFFER / u.share_bytes;
    u.of_keys = p.group_size > 1 ? parts_of(problem.Sk, u.key_rows) : 0;
    u.of_group = p.group_size * parts_of(problem.Sq, DQ_ROWS) + 2 * u.of_keys;
    u.count = u.lines / p.group_size * u.of_group;
    return u;
}

static const char *make_maps(BwdParams *p, const Workspace &w, const Tensors &t) {
    const Problem &problem = p->problem;
    const int block_m = w.width == 128 ? 64 : 128;
    const bool shares = p->group_size > 1;
    const cuuint64_t lines = (cuuint64_t)problem.B * problem.Hq, Sq = (cuuint64_t)problem.Sq;
    const cuuint64_t width = (cuuint64_t)w.width;
    const cuuint64_t copies = (cuuint64_t)w.copies;
    const cuuint64_t rows_shape[] = {Sq ? Sq + copies - 1 : 0, 2 * lines * copies};
    const cuuint64_t rows_stride[] = {(cuuint64_t)w.stride * 4};
    const cuuint64_t dq_shape[] = {width, Sq, (cuuint64_t)p->places},
                     dq_stride[] = {width * 4, Sq * width * 4};
    const cuuint32_t rows_box[] = {(cuuint32_t)block_m, 1}, dq_box[] = {32, 64, 1};
    const char *error = make_map(&p->q, t.q, block_m);
    if (!error) error = make_map(&p->dout, t.dout, block_m);
    if (!error) error = make_map(&p->k, t.k, BLOCK_N);
    if (!error) error = make_map(&p->v, t.v, BLOCK_N);
    if (!error) error = make_output(&p->dk, t.dk, problem, shares, t.memory + w.dk);
    if (!error) error = make_output(&p->dv, t.dv, problem, shares, t.memory + w.dv);
    if (!error)
        error = make_float_map(&p->rows, t.memory + w.rows, 2, rows_shape, rows_stride, rows_box,
                               false);
    if (!error)
        error = make_float_map(&p->dq, t.memory + w.dq, 3, dq_shape, dq_stride, dq_box, true);
    return error;
}

template <typename T> static const char *run(BwdParams &p, const Workspace &w, void *stream) {
    const Problem &problem = p.problem;
    const int64_t heads = (int64_t)problem.B * problem.Hq;
    p.order = {(unsigned)((problem.Sk + BLOCK_N - 1) / BLOCK_N), (unsigned)heads,
               (unsigned)w.together, p.in_order};
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
    const Workspace w = workspace_of({1, problem.B, problem.Sq, problem.Sk, problem.Hq, problem.Hk,
                                      problem.D, problem.packed ? problem.sequences : -1, left,
                                      right, softcap != 0 || scale <= 0, deterministic});
    if (!has_workspace(workspace, w.end)) return SMALL_WORKSPACE;
    if (!has_16_byte_rows(dq) || !has_16_byte_rows(dk) || !has_16_byte_rows(dv) ||
        !has_16_byte_rows(out))
        return BAD_STRIDES;
    char *memory = (char *)workspace->data;
    const Tensors tensors = {dq, dk, dv, dout, dlse, q, k, v, out, lse, memory};
    p.plan = (Plan *)(memory + w.plan), p.turn = (int *)(memory + w.turn);
    p.group_size = problem.Hk ? problem.Hq / problem.Hk : 1, p.copies = w.copies;
    p.in_order = deterministic, p.store_first = deterministic && !problem.packed;
    p.score_scale = softcap != 0 ? (float)(scale / softcap) : (float)(scale * LOG2E);
    p.log2_scale = (float)(scale * LOG2E);
    p.cap = softcap != 0 ? (float)(softcap * LOG2E) : 1.0f, p.slope = softcap != 0 ? -1.0f : 0.0f;
    p.units = units_of(p, w, tensors), p.places = (int)w.places;
    p.progress = (Progress *)(memory + w.progress);
    error = make_maps(&p, w, tensors);
    if (!error) error = attention_bwd_rows(p, w, tensors, stream);
    if (!error) error = q->dtype == BF16 ? run<bf16>(p, w, stream) : run<f16>(p, w, stream);
    return error || p.units.count ? error : attention_bwd_finish(p, w, tensors, stream);
}
