// attention_fwd.cu: attention's forward on Hopper (formulas: csrc/ops.h), after Shah et al.,
// "FlashAttention-3" (2024).
//
// 4 B Hq Sq Sk D FLOPs (causal: half) on the tensor cores, which read no more than 128 bytes of
// shared memory a clock: scores S = Q K^T take both operands from there, O += P V has P in
// registers. 2^x has a quarter to a half of the products' time of its own, so that
//  - in a warpgroup, the softmax of one block of keys runs under P V of the block before,
//  - warpgroups take turns: one issues its products while the other computes its softmax.
// One block of threads an SM, persistent: it draws tiles (BLOCK_M queries of one head) by a ticket,
// those with the most keys first, and loads the next tile's Q and K under the end of this one's.
// Roles: a producer warp that issues TMA loads and 2 or 3 consumer warpgroups of 64 queries each.
//
// An mbarrier is named for what its phase's end says. For every tile with keys, in turn:
//   q_full      Q has come                                producer, TMA -> consumers
//   q_empty     the last S of the tile is done            consumers -> producer
//   k_full[s], v_full[s]     stage s holds a block        producer, TMA -> consumers
//   k_empty[s], v_empty[s]   its products are done        consumers -> producer
// and for every tile:
//   tile_full   the mailbox holds the next tile           producer -> consumers
//   tile_empty  all have read it                          consumers -> producer
// Named barriers: TURN + g lets warpgroup g issue its products; OWN + g is warpgroup g's own.
//
// Shared memory (D = 128; D = 64), all tiles [D / 64][rows][64] in TMA's 128-byte swizzle:
//   Q        one 64-row slab a warpgroup      32 KB; 24 KB
//   K        STAGES blocks                    64 KB; 32 KB
//   V        STAGES blocks                    64 KB; 32 KB
//   O        one 64-row slab a warpgroup      32 KB; 24 KB: stored under the next tile's first S
//   barriers, mailbox                         192 B
#include "attention_fwd_step.cuh"
#include "sm90.cuh" // for Hopper alone, setup.py sees by this line

// ---- Producer -----------------------------------------------------------------------------------

template <int D>
__device__ __forceinline__ void load_queries(const FwdParams &p, uint32_t barrier,
                                             const Tile &tile) {
    using F = Fwd<D>;
    mbarrier_expect(barrier, F::WARPGROUPS * F::SLAB);
#pragma unroll
    for (int g = 0; g < F::WARPGROUPS; g++)
        load_tile<D, 64>(shared_at(F::Q + g * F::SLAB), &p.q, barrier, tile.q0 + tile.from + g * 64,
                         tile.head, tile.b, EVICT_FIRST);
}

template <int D>
__device__ __forceinline__ void load_keys(uint32_t to, const CUtensorMap *map, uint32_t full,
                                          const Tile &tile, int block, int head) {
    mbarrier_expect(full, Fwd<D>::BLOCK);
    load_tile<D, BLOCK_N>(to, map, full, tile.k0 + block * BLOCK_N, head, tile.b, EVICT_LAST);
}

// One thread. Blocks of keys go from the last to the first: the consumers then meet a causal mask
// at once, before they have anything to rescale.
template <int D> __device__ __forceinline__ void producer(const FwdParams &p) {
    using F = Fwd<D>;
    const uint32_t barriers = shared_at(F::BARRIERS);
    const int group = p.problem.Hq / max(p.problem.Hk, 1);
    unsigned count = 0, tiles = 0; // blocks, and tiles with keys, so far
    wait_for_previous_kernel();    // for the plan, and for q, k and v
    unsigned ticket = atomicAdd(&p.plan->next, 1u);
    for (int n = 0;; n++) {
        const Tile tile = tile_at(p.problem, p.order, p.plan, ticket, F::BLOCK_M, true);
        mbarrier_wait(barriers + 8 * TILE_EMPTY, (n & 1) ^ 1);
        *(Tile *)(shared + F::MAILBOX) = tile;
        mbarrier_arrive(barriers + 8 * TILE_FULL);
        if (tile.head < 0) return;
        const Blocks blocks = blocks_of<F::BLOCK_M>(p.problem, tile);
        for (int block = blocks.end - 1; block >= blocks.first; block--, count++) {
            const Stage s = stage_of(count);
            const uint32_t k_full = barriers + 8 * (K_FULL + s.index);
            const uint32_t v_full = barriers + 8 * (V_FULL + s.index);
            mbarrier_wait(barriers + 8 * (K_EMPTY + s.index), s.parity ^ 1);
            load_keys<D>(shared_at(F::K + s.index * F::BLOCK), &p.k, k_full, tile, block,
                         tile.head / group);
            if (block == blocks.end - 1) {
                mbarrier_wait(barriers + 8 * Q_EMPTY, (tiles++ & 1) ^ 1);
                load_queries<D>(p, barriers + 8 * Q_FULL, tile);
            }
            mbarrier_wait(barriers + 8 * (V_EMPTY + s.index), s.parity ^ 1);
            load_keys<D>(shared_at(F::V + s.index * F::BLOCK), &p.v, v_full, tile, block,
                         tile.head / group);
        }
        // Not before: a tile that waits for the end of a long one would be begun too late.
        ticket = atomicAdd(&p.plan->next, 1u);
    }
}

// ---- Consumers ----------------------------------------------------------------------------------

// out /= sum, and lse. Bit r of the result: the thread's part of row r has an infinity or NaN.
template <int D>
__device__ __forceinline__ int normalize(Rows2<D> &rows, const FwdParams &p, const Tile &tile,
                                         const Consumer &c) {
    const int first = tile.from + c.group * 64 + c.thread / 32 * 16 + c.thread % 32 / 4;
    const int64_t head = (int64_t)tile.b * p.problem.Hq + tile.head;
    int bad = 0;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float sum = rows.sum[r], check = 0.0f;
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
        const float lse = (rows.top[r] * p.log2_scale + log2f(sum)) * LN2;
        const int row = first + 8 * r;
        if (c.thread % 4 == 0 && row < tile.sq)
            p.lse[head * p.problem.Sq + tile.q0 + row] = sum == 0.0f ? -INFINITY : lse;
#pragma unroll
        for (int j = 0; j < D / 8; j++) {
            float &x = rows.out[4 * j + 2 * r], &y = rows.out[4 * j + 2 * r + 1];
            x *= inverse, y *= inverse;
            check = fmaf(0.0f, x, fmaf(0.0f, y, check));
        }
        bad |= (check != 0.0f && (sum == 0.0f || lse < INFINITY)) << r;
    }
    return bad;
}

// One row of out again, by a warp, from the keys that it sees alone: the weight of a masked key is
// 0, but 0 times an infinity or NaN in V is NaN.
template <typename T, int D>
__device__ __forceinline__ void repair_row(char *slab, const FwdParams &p, const Tile &tile,
                                           int query, int row) {
    constexpr int N = D / 32; // columns of a lane
    const int lane = threadIdx.x % 32, column = lane * N;
    const int kv_head = tile.head / (p.problem.Hq / p.problem.Hk);
    const Range seen = keys_seen(p.problem, tile, query);
    const int64_t head = (int64_t)tile.b * p.problem.Hq + tile.head;
    const float lse = p.lse[head * p.problem.Sq + tile.q0 + query] * LOG2E;
    float q[N] = {}, out[N] = {};
    const bool inside = column < p.problem.D;
    if (inside) load<T, N>(q, p.q_memory.at<T>(tile.b, tile.q0 + query, tile.head) + column);
#pragma unroll 1
    for (int key = seen.from; key < seen.to; key++) {
        float k[N] = {}, v[N] = {}, s = 0.0f;
        if (inside) {
            load<T, N>(k, p.k_memory.at<T>(tile.b, tile.k0 + key, kv_head) + column);
            load<T, N>(v, p.v_memory.at<T>(tile.b, tile.k0 + key, kv_head) + column);
        }
#pragma unroll
        for (int j = 0; j < N; j++) s = fmaf(q[j], k[j], s);
#pragma unroll
        for (int n = 16; n > 0; n /= 2) s += __shfl_xor_sync(~0u, s, n);
        if (p.log2_scale == 1.0f) s = transformed(p, s);
        const float weight = exp2_approx(fmaf(s, p.log2_scale, -lse));
#pragma unroll
        for (int j = 0; j < N; j++) out[j] = fmaf(weight, v[j], out[j]);
    }
    const int chunk = column / 8;
    store<T, N>(
        (T *)(slab + (chunk / 8 * 64 + row) * 128 + (chunk % 8 ^ row % 8) * 16) + column % 8, out);
}

// The warp's rows of the slab whose bit is set in some thread of theirs.
template <typename T, int D>
__device__ __forceinline__ void repair_rows(int slab, const FwdParams &p, const Tile &tile,
                                            int query, int row, int bad) {
    __syncwarp(); // the slab's rows, and their lse
#pragma unroll 1
    for (int r = 0; r < 2; r++) {
        const unsigned lanes = __ballot_sync(~0u, bad >> r & 1);
#pragma unroll 1
        for (int i = 0; i < 8; i++) {
            const int at = 8 * r + i;
            if (lanes >> 4 * i & 0xf && query + at < tile.sq)
                repair_row<T, D>(shared + slab, p, tile, query + at, row + at);
        }
    }
}

// The slab is free once the last tile's store has read it.
template <typename T, int D>
__device__ __forceinline__ void store_out(const float (&out)[D / 2], int bad, const FwdParams &p,
                                          const Tile &tile, const Consumer &c) {
    using F = Fwd<D>;
    const int slab = F::O + c.group * F::SLAB, row = tile.from + c.group * 64;
    const int rows = min(64, tile.sq - row), at = tile.q0 + row, warp_row = c.thread / 32 * 16;
    if (c.thread == 0) bulk_wait_read<0>();
    named_barrier(OWN + c.group, WARPGROUP);
    store_accumulator<T, 64>(shared_at(slab), 0, out);
    if (__any_sync(~0u, bad)) repair_rows<T, D>(slab, p, tile, row + warp_row, warp_row, bad);
    fence_async_shared();
    named_barrier(OWN + c.group, WARPGROUP);
    if (rows <= 0) return;
    if (rows == 64 || !p.problem.packed) { // TMA leaves rows beyond the tensor alone
        if (c.thread > 0) return;
        store_tile<D, 64>(&p.out, shared_at(slab), at, tile.head, tile.b);
        bulk_commit();
    } else {
        store_rows<T, 64>(p.out_memory.at<T>(tile.b, at, tile.head), p.out_memory.row,
                          shared + slab, 0, rows, p.problem.D);
    }
}

// Queries that see no key.
template <typename T>
__device__ __forceinline__ void store_nothing(const FwdParams &p, const Tile &tile,
                                              const Consumer &c) {
    const int row = tile.from + c.group * 64, rows = min(64, tile.sq - row);
    const int64_t at = tile.q0 + row, head = (int64_t)tile.b * p.problem.Hq + tile.head;
    zero_rows(p.out_memory.at<T>(tile.b, at, tile.head), p.out_memory.row, rows, p.problem.D);
    if (c.thread < rows) p.lse[head * p.problem.Sq + at + c.thread] = -INFINITY;
}

template <typename T, int D, bool CAP>
__device__ __forceinline__ void consumer(const FwdParams &p, const Consumer &c) {
    using F = Fwd<D>;
    unsigned count = 0, tiles = 0;
    if (c.group == 0) named_barrier_arrive(TURN, 2 * WARPGROUP); // for the last one: it is our turn
    for (int n = 0;; n++) {
        mbarrier_wait(shared_at(F::BARRIERS + 8 * TILE_FULL), n & 1);
        const Tile tile = *(const Tile *)(shared + F::MAILBOX);
        mbarrier_arrive(shared_at(F::BARRIERS + 8 * TILE_EMPTY));
        if (uniform(tile.head) < 0) break;
        const Blocks blocks = uniform(blocks_of<F::BLOCK_M>(p.problem, tile));
        if (blocks.end <= blocks.first) {
            store_nothing<T>(p, tile, c);
            continue;
        }
        Rows2<D> rows;
        all_blocks<T, D, CAP>(rows, p, tile, c, blocks, count, tiles);
        count += blocks.end - blocks.first, tiles++;
        const int bad = normalize(rows, p, tile, c);
        store_out<T, D>(rows.out, bad, p, tile, c);
    }
    if (c.thread == 0) bulk_wait_read<0>(); // shared memory must outlive the last store
}

// ---- Kernel -------------------------------------------------------------------------------------

template <int D> __device__ __forceinline__ void init_barriers(uint32_t barriers) {
    const int groups = Fwd<D>::WARPGROUPS;
    mbarrier_init(barriers + 8 * Q_FULL, 1);
    mbarrier_init(barriers + 8 * Q_EMPTY, groups);
    mbarrier_init(barriers + 8 * TILE_FULL, 1);
    mbarrier_init(barriers + 8 * TILE_EMPTY, groups * WARPGROUP);
    for (int s = 0; s < STAGES; s++) {
        mbarrier_init(barriers + 8 * (K_FULL + s), 1);
        mbarrier_init(barriers + 8 * (V_FULL + s), 1);
        mbarrier_init(barriers + 8 * (K_EMPTY + s), groups);
        mbarrier_init(barriers + 8 * (V_EMPTY + s), groups);
    }
    mbarrier_init_fence();
}

template <typename T, int D, bool CAP>
__global__ void __launch_bounds__(Fwd<D>::THREADS, 1)
    attention_fwd_kernel(const __grid_constant__ FwdParams p) {
    using F = Fwd<D>;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0); // uniform, for the compiler too
    if (warp == 0 && elect_one()) {
        tma_prefetch(&p.q);
        init_barriers<D>(shared_at(F::BARRIERS));
    }
    __syncthreads();
    if (warp < 4) {
        keep_registers<F::PRODUCER_REGISTERS>();
        if (warp == 0 && elect_one()) producer<D>(p);
    } else {
        take_registers<F::CONSUMER_REGISTERS>();
        const int thread = threadIdx.x % WARPGROUP;
        consumer<T, D, CAP>(p, {warp / 4 - 1, thread});
    }
}

// ---- Launchers ----------------------------------------------------------------------------------

// 16 MiB of K and V stay in L2 beside what streams through it.
constexpr int64_t L2_BUDGET = 16 << 20;

static Order order_of(const Problem &p, int rows) {
    int group = p.Hk ? p.Hq / p.Hk : 1, heads = p.B * p.Hq;
    int64_t keys = (int64_t)p.Sk * p.D * 4; // bytes of K and V of a head
    return {(unsigned)(p.Sq + rows - 1) / rows, (unsigned)heads,
            (unsigned)heads_together(L2_BUDGET, keys, group, heads), true};
}

static int block_m(int64_t D) { return D > 64 ? Fwd<128>::BLOCK_M : Fwd<64>::BLOCK_M; }

static int64_t capacity_of(int64_t rows, int64_t sequences, int64_t D) {
    return plan_capacity(rows, sequences, block_m(D));
}

static int64_t bytes_of(int64_t capacity) { return (int64_t)sizeof(Plan) + 8 * capacity; }

extern "C" int64_t attention_workspace_cuda(const AttentionShape *shape) {
    if (shape->backward) return attention_bwd_workspace(*shape);
    return bytes_of(capacity_of(shape->sequences >= 0 ? shape->Sq : 0, shape->sequences, shape->D));
}

template <typename T, int D> static const char *run(FwdParams &p, int64_t capacity, void *stream) {
    using F = Fwd<D>;
    const Problem &problem = p.problem;
    p.order = order_of(problem, F::BLOCK_M);
    int64_t tiles =
        problem.packed ? capacity * problem.Hq : (int64_t)p.order.blocks * p.order.heads;
    if (tiles == 0) return nullptr;
    if (tiles > INT32_MAX) return MANY_TILES;
    int device;
    cudaGetDevice(&device);
    int64_t blocks = multiprocessors(device);
    bool cap = problem.softcap != 0 || problem.scale <= 0;
    auto kernel = cap ? attention_fwd_kernel<T, D, true> : attention_fwd_kernel<T, D, false>;
    const char *error = attention_plan(p.plan, problem, problem.cu_q, problem.Sq, F::BLOCK_M,
                                       capacity, true, stream);
    if (error) return error;
    return launch_after(kernel, tiles < blocks ? tiles : blocks, F::THREADS, F::BYTES, stream, p);
}

extern "C" const char *attention_fwd_cuda(Tensor *out, Tensor *lse, Tensor *workspace,
                                          const Tensor *q, const Tensor *k, const Tensor *v,
                                          const Tensor *cu_q, const Tensor *cu_k, int64_t max_q,
                                          int64_t max_k, double scale, int64_t left, int64_t right,
                                          double softcap, void *stream) {
    (void)max_q, (void)max_k; // the tiles are counted on the device
    FwdParams p = {};
    const char *error = set_problem(&p.problem, q, k, cu_q, cu_k, scale, left, right, softcap);
    if (error) return error;
    const Problem &problem = p.problem;
    const bool wide = problem.D > 64;
    const int64_t capacity =
        capacity_of(problem.packed ? problem.Sq : 0, problem.sequences, problem.D);
    if (!has_workspace(workspace, bytes_of(capacity))) return SMALL_WORKSPACE;
    p.plan = (Plan *)workspace->data, p.lse = (float *)lse->data;
    p.q_memory = memory_of(q), p.k_memory = memory_of(k), p.v_memory = memory_of(v);
    p.out_memory = memory_of(out);
    p.score_scale = softcap != 0 ? (float)(scale / softcap) : (float)(scale * LOG2E);
    p.log2_scale = softcap != 0 || scale <= 0 ? 1.0f : (float)(scale * LOG2E);
    if (!error) error = make_map(&p.q, q, 64);
    if (!error) error = make_map(&p.k, k, BLOCK_N);
    if (!error) error = make_map(&p.v, v, BLOCK_N);
    if (!error) error = make_map(&p.out, out, 64);
    if (error) return error;
    if (q->dtype == BF16)
        return wide ? run<bf16, 128>(p, capacity, stream) : run<bf16, 64>(p, capacity, stream);
    return wide ? run<f16, 128>(p, capacity, stream) : run<f16, 64>(p, capacity, stream);
}
