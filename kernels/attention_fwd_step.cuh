// attention_fwd_step.cuh: how the consumers of attention's forward take a tile's blocks of keys:
// scores, online softmax, sums. What it is a part of: attention_fwd.cu.
#pragma once
#include "attention.cuh"

constexpr int BLOCK_N = 128; // keys. 176 fill the registers too, but leave no room for O's slab

template <int D> struct Fwd {
    // 64 more accumulators a thread (D = 128) leave registers for two warpgroups of 232, and for
    // three of 160 without them.
    static constexpr int WARPGROUPS = D == 128 ? 2 : 3;
    static constexpr int THREADS = WARPGROUP * (WARPGROUPS + 1);
    static constexpr int BLOCK_M = 64 * WARPGROUPS;
    static constexpr int PRODUCER_REGISTERS = WARPGROUPS == 2 ? 40 : 32;
    static constexpr int CONSUMER_REGISTERS = WARPGROUPS == 2 ? 232 : 160;

    static constexpr int SLAB = 64 * D * 2, BLOCK = BLOCK_N * D * 2; // bytes
    static constexpr int Q = 0, K = Q + WARPGROUPS * SLAB, V = K + STAGES * BLOCK;
    static constexpr int O = V + STAGES * BLOCK, BARRIERS = O + WARPGROUPS * SLAB;
    static constexpr int MAILBOX = BARRIERS + 128, BYTES = MAILBOX + 64;
    static_assert(BYTES <= 227 << 10, "");
};

enum { Q_FULL, Q_EMPTY, TILE_FULL, TILE_EMPTY, K_FULL, K_EMPTY = 6, V_FULL = 8, V_EMPTY = 10 };
enum { TURN = 1, OWN = 4 };

struct FwdParams {
    CUtensorMap q, k, v, out;
    Problem problem;
    Order order;
    Plan *plan;
    float *lse;
    Memory q_memory, k_memory, v_memory, out_memory;
    float score_scale; // of raw scores, before the softcap
    float log2_scale;  // from scores to powers of 2; positive
};

// The blocks of keys that some query of the tile sees, and which of those all of them see whole.
template <int BLOCK_M>
__device__ __forceinline__ Blocks blocks_of(const Problem &p, const Tile &tile) {
    Range top = keys_seen(p, tile, tile.from);
    Range bottom = keys_seen(p, tile, min(tile.from + BLOCK_M, tile.sq) - 1);
    Blocks blocks = {top.from / BLOCK_N, 0, (bottom.from + BLOCK_N - 1) / BLOCK_N, 0};
    blocks.end = bottom.to > top.from ? (bottom.to + BLOCK_N - 1) / BLOCK_N : blocks.first;
    blocks.whole_end = max(top.to, 0) / BLOCK_N;
    return blocks;
}

// ---- Consumers ----------------------------------------------------------------------------------

// What a thread of a consumer keeps of its two rows: lane / 4 and 8 more of its warp's 16.
template <int D> struct Rows2 {
    float out[D / 2];        // sum of p v, relative to top
    uint32_t p[BLOCK_N / 4]; // of the last block, rounded
    float top[2], sum[2], fade[2];
};

template <int D>
__device__ __forceinline__ void keys_of_rows(Range (&seen)[2], const Problem &p, const Tile &tile,
                                             const Consumer &c, int block) {
    const int row = tile.from + c.group * 64 + c.thread / 32 * 16 + c.thread % 32 / 4;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        seen[r] = keys_seen(p, tile, row + 8 * r);
        seen[r].from -= block * BLOCK_N, seen[r].to -= block * BLOCK_N;
    }
}

__device__ __forceinline__ void mask(float (&s)[BLOCK_N / 2], const Range (&seen)[2]) {
    const int column = threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < BLOCK_N / 2; i++) {
        const int r = i / 2 % 2, key = column + i / 4 * 8 + i % 2;
        if (key < seen[r].from || key >= seen[r].to) s[i] = -INFINITY;
    }
}

// Softcap, or a scale that is not positive: afterwards the score is a power of 2.
__device__ __forceinline__ float transformed(const FwdParams &p, float s) {
    const float cap = p.problem.softcap * LOG2E, x = s * p.score_scale;
    return cap == 0.0f ? x : cap * tanh_exact(x);
}

// Scores -> probabilities relative to the new maxima; the sums, of this thread's columns alone,
// follow them.
template <int D>
__device__ __forceinline__ void online_softmax(Rows2<D> &rows, float (&s)[BLOCK_N / 2],
                                               float scale) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float top = rows.top[r];
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j++)
            top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float base = top == -INFINITY ? 0.0f : top * scale; // -inf - -inf would be NaN
        rows.fade[r] = exp2_approx(fmaf(rows.top[r], scale, -base));
        rows.top[r] = top;
        float sum = rows.sum[r] * rows.fade[r];
#pragma unroll
        for (int j = 0; j < BLOCK_N / 8; j++) {
            float &a = s[4 * j + 2 * r], &b = s[4 * j + 2 * r + 1];
            a = exp2_approx(fmaf(a, scale, -base)), b = exp2_approx(fmaf(b, scale, -base));
            sum += a + b;
        }
        rows.sum[r] = sum;
    }
}

// S = Q K^T, started.
template <typename T, int D>
__device__ __forceinline__ void start_scores(float (&s)[BLOCK_N / 2], const Consumer &c,
                                             int stage) {
    using F = Fwd<D>;
    const uint32_t q = shared_at(F::Q + c.group * F::SLAB), k = shared_at(F::K + stage * F::BLOCK);
    pin(s);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < D / 16; i++)
        wgmma<T, false>(s, along_columns<64>(q, i), along_columns<BLOCK_N>(k, i), i != 0);
    wgmma_commit();
}

// out += P V, started.
template <typename T, int D> __device__ __forceinline__ void start_out(Rows2<D> &rows, int stage) {
    using F = Fwd<D>;
    const uint32_t v = shared_at(F::V + stage * F::BLOCK);
    pin(rows.p), pin(rows.out);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < BLOCK_N / 16; i++)
        wgmma<T>(rows.out, rows.p + 4 * i, along_rows<BLOCK_N>(v, i));
    wgmma_commit();
}

template <int D, bool CAP>
__device__ __forceinline__ void softmax_of_block(Rows2<D> &rows, float (&s)[BLOCK_N / 2],
                                                 const FwdParams &p, const Tile &tile,
                                                 const Consumer &c, int block, bool masked) {
    if constexpr (CAP) {
#pragma unroll
        for (int i = 0; i < BLOCK_N / 2; i++) s[i] = transformed(p, s[i]);
    }
    if (masked) {
        Range seen[2];
        keys_of_rows<D>(seen, p.problem, tile, c, block);
        mask(s, seen);
    }
    online_softmax(rows, s, p.log2_scale);
}

template <typename T, int D>
__device__ __forceinline__ void round_and_fade(Rows2<D> &rows, const float (&s)[BLOCK_N / 2]) {
#pragma unroll
    for (int i = 0; i < BLOCK_N / 4; i++) rows.p[i] = pack_pair<T>(s[2 * i], s[2 * i + 1]);
#pragma unroll
    for (int i = 0; i < D / 2; i++) rows.out[i] *= rows.fade[i / 2 % 2];
}

// The blocks before `block`, down to `until`. Every step starts S of a block, k, and P V of the one
// before, and computes the softmax of S while P V runs.
template <typename T, int D, bool CAP, bool MASKED>
__device__ __forceinline__ void steps(Rows2<D> &rows, Stage &k, unsigned &count, int &block,
                                      int until, const FwdParams &p, const Tile &tile,
                                      const Consumer &c) {
    using F = Fwd<D>;
    const bool first = c.thread == 0; // arrives for the warpgroup
#pragma unroll 1
    while (block > until) {
        float s[BLOCK_N / 2];
        const Stage v = k;
        k = stage_of(++count), block--;
        mbarrier_wait(shared_at(F::BARRIERS + 8 * (K_FULL + k.index)), k.parity);
        named_barrier(TURN + c.group, 2 * WARPGROUP);
        start_scores<T, D>(s, c, k.index);
        mbarrier_wait(shared_at(F::BARRIERS + 8 * (V_FULL + v.index)), v.parity);
        start_out<T, D>(rows, v.index);
        named_barrier_arrive(TURN + (c.group + 1) % F::WARPGROUPS, 2 * WARPGROUP);
        wgmma_wait<1>();
        pin(s);
        if (first) mbarrier_arrive(shared_at(F::BARRIERS + 8 * (K_EMPTY + k.index)));
        softmax_of_block<D, CAP>(rows, s, p, tile, c, block, MASKED);
        pin(s);
        // This phase has ended. The wait is here as a branch: without one ptxas moves the
        // exponentials behind wgmma_wait(), where no product runs.
        mbarrier_wait(shared_at(F::BARRIERS + 8 * (V_FULL + v.index)), v.parity);
        wgmma_wait<0>();
        pin(rows.out), pin(rows.p);
        if (first) mbarrier_arrive(shared_at(F::BARRIERS + 8 * (V_EMPTY + v.index)));
        round_and_fade<T, D>(rows, s);
    }
}

template <typename T, int D, bool CAP>
__device__ __forceinline__ void all_blocks(Rows2<D> &rows, const FwdParams &p, const Tile &tile,
                                           const Consumer &c, const Blocks &blocks, unsigned count,
                                           unsigned tiles) {
    using F = Fwd<D>;
    const bool first = c.thread == 0; // arrives for the warpgroup
#pragma unroll
    for (int i = 0; i < D / 2; i++) rows.out[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < 2; r++) rows.top[r] = -INFINITY, rows.sum[r] = 0.0f;
    int block = blocks.end - 1;
    Stage k = stage_of(count);
    mbarrier_wait(shared_at(F::BARRIERS + 8 * Q_FULL), tiles & 1);
    mbarrier_wait(shared_at(F::BARRIERS + 8 * (K_FULL + k.index)), k.parity);
    {
        float s[BLOCK_N / 2];
        start_scores<T, D>(s, c, k.index);
        wgmma_wait<0>();
        pin(s);
        if (first) mbarrier_arrive(shared_at(F::BARRIERS + 8 * (K_EMPTY + k.index)));
        const bool masked = block >= blocks.whole_end || block < blocks.whole_first;
        softmax_of_block<D, CAP>(rows, s, p, tile, c, block, masked);
        round_and_fade<T, D>(rows, s);
    }
    // A mask costs registers, which the loop between has not got.
    const int whole = min(max(blocks.whole_first, blocks.first), block);
    const int whole_end = max(blocks.whole_end, whole);
    steps<T, D, CAP, true>(rows, k, count, block, whole_end, p, tile, c);
    steps<T, D, CAP, false>(rows, k, count, block, whole, p, tile, c);
    steps<T, D, CAP, true>(rows, k, count, block, blocks.first, p, tile, c);
    if (first) mbarrier_arrive(shared_at(F::BARRIERS + 8 * Q_EMPTY));
    mbarrier_wait(shared_at(F::BARRIERS + 8 * (V_FULL + k.index)), k.parity);
    start_out<T, D>(rows, k.index);
    wgmma_wait<0>();
    pin(rows.out), pin(rows.p);
    if (first) mbarrier_arrive(shared_at(F::BARRIERS + 8 * (V_EMPTY + k.index)));
}
