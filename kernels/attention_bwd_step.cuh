// attention_bwd_step.cuh: one block of queries against the keys of a tile, as the consumers of
// attention's backward compute it. What it is a part of: attention_bwd.cu.
#pragma once
#include "attention_bwd.cuh"

// One block of queries against the tile's keys, as a consumer sees it.
struct Step {
    Stage s;
    int block;
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
        if (j % 4 == 0) asm volatile("" ::: "memory"); // no earlier
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

// dP^T -> dS^T, from P^T in float, or as it is rounded for dV where registers are too few (rms
// errors of dQ and dK: sqrt(3/2) times what they would be).
template <int D> constexpr bool ROUNDED_P = D == 64;

template <typename T, int D, int N>
__device__ __forceinline__ void dscores(float (&dp)[N], const float (&p)[N],
                                        const uint32_t (&rounded)[N / 2], const Columns<N> &delta) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        const float2 d = delta[i / 2];
        const float low = ROUNDED_P<D> ? low_half<T>(rounded[i]) : p[2 * i];
        const float high = ROUNDED_P<D> ? high_half<T>(rounded[i]) : p[2 * i + 1];
        dp[2 * i] = low * (dp[2 * i] - d.x);
        dp[2 * i + 1] = high * (dp[2 * i + 1] - d.y);
    }
}

// Under a softcap, or a scale that is not positive: first scores -> their tanh, or powers of 2;
// those -> P^T; and the tanh's derivative in dS^T.
template <int N> __device__ __forceinline__ void transform(float (&s)[N], const BwdParams &params) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        s[i] *= params.score_scale;
        if (params.problem.softcap != 0.0f) s[i] = tanh_exact(s[i]);
    }
}

template <int N>
__device__ __forceinline__ void times_slopes(float (&ds)[N], const float (&t)[N], float slope) {
#pragma unroll
    for (int i = 0; i < N; i++) ds[i] *= fmaf(t[i] * slope, t[i], 1.0f);
}

// Whether a row of queries, or its gradient, may hold an infinity or NaN.
template <int N> __device__ __forceinline__ bool any_not_finite(const float *delta) {
    float check = 0.0f;
#pragma unroll
    for (int j = 0; j < N / 4; j++) {
        const float2 d = two_columns(delta, j);
        check = fmaf(0.0f, d.x, fmaf(0.0f, d.y, check));
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
// 16 a + 8 b + 2 (lane % 4) + e; it writes them as two chunks of 4: column 16 a + 8 b + 2 i + e
// lies at 8 i + 4 a + 2 b + e, which column_of_sums() undoes. No bank is hit twice.
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
    named_barrier(DQ_EMPTY + c.group, WITH_WRITER);
    store_dq(shared + B::DQ + c.group * B::DQ_PART, dq, c.thread);
    fence_async_shared();
    named_barrier_arrive(DQ_FULL + c.group, WITH_WRITER);
}

// Computes dQ and dK and ends dV, which the caller has started: the tensor cores work while the
// warpgroups meet at DS_READY.
template <typename T, int D>
__device__ __forceinline__ void products(float (&dk)[D / 2], float (&dv)[D / 2], Products<D> &a,
                                         const Consumer &c, const Step &step) {
    using B = Bwd<D>;
    const int st = step.s.index;
    const bool first = c.thread == 0; // arrives for the warpgroup
    float dq[32];
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

// sum += a x over the visible pairs alone, x a block of queries: past infinities and NaN behind the
// mask, without tensor cores.
template <typename T, int D, int A>
__device__ __forceinline__ void add_visible(float (&sum)[D / 2], const uint32_t (&a)[A], int x,
                                            const BwdParams &p, const Tile &tile,
                                            const Consumer &in, const Step &step) {
    const Consumer c = {in.group, opaque(in.thread)};
    Range seen[2];
    queries_of_keys<D>(seen, p.problem, tile, c, step.block);
    multiply_visible<T, Bwd<D>::BLOCK_M>(sum, a, shared + x, seen, c.thread % 32);
}

// The same as products() over the visible pairs alone; dV has been added already.
template <typename T, int D>
__device__ __forceinline__ void visible_products(float (&dk)[D / 2], const Products<D> &a,
                                                 const BwdParams &p, const Tile &tile,
                                                 const Consumer &c, const Step &step) {
    using B = Bwd<D>;
    const int st = step.s.index;
    add_visible<T, D>(dk, a.ds, B::Q + st * B::QUERIES, p, tile, c, step);
    fence_async_shared();
    named_barrier(DS_READY, GROUPS * WARPGROUP);
    float dq[32];
    multiply_dq<T, D>(dq, p, tile, {c.group, opaque(c.thread)}, step);
    hand_over_dq<D>(c, dq);
    if (c.thread > 0) return;
    mbarrier_arrive(shared_at(B::BARRIERS + 8 * (DO_EMPTY + st)));
    mbarrier_arrive(shared_at(B::BARRIERS + 8 * (Q_EMPTY + st)));
}

template <int D> __device__ __forceinline__ const float *lse_of(const Stage &s) {
    return (const float *)(shared + Bwd<D>::LSE + s.index * Bwd<D>::ROWS);
}
template <int D> __device__ __forceinline__ const float *delta_of(const Stage &s) {
    return (const float *)(shared + Bwd<D>::DELTA + s.index * Bwd<D>::ROWS);
}

// S^T and dP^T of a block, both started; returns lse's columns, read meanwhile.
template <typename T, int D, int N>
__device__ __forceinline__ Columns<N> start_both(float (&s)[N], float (&dp)[N], const Consumer &c,
                                                 const Step &step) {
    using B = Bwd<D>;
    const int st = step.s.index;
    mbarrier_wait(shared_at(B::BARRIERS + 8 * (Q_FULL + st)), step.s.parity);
    start_scores<T, D>(s, c, B::K, B::Q + st * B::QUERIES);
    const Columns<N> of_s(lse_of<D>(step.s));
    mbarrier_wait(shared_at(B::BARRIERS + 8 * (DO_FULL + st)), step.s.parity);
    start_scores<T, D>(dp, c, B::V, B::DO + st * B::QUERIES);
    return of_s;
}

// A block of queries that all see every key of the tile. P is computed while dP's product runs, dS
// while dV's does.
template <typename T, int D>
__device__ __forceinline__ void whole_block(float (&dk)[D / 2], float (&dv)[D / 2],
                                            const BwdParams &p, const Consumer &c,
                                            const Step &step) {
    using B = Bwd<D>;
    constexpr int M = B::BLOCK_M;
    const int st = step.s.index;
    float s[M / 2], dp[M / 2];
    Products<D> a;
    const Columns<M / 2> of_s = start_both<T, D>(s, dp, c, step);
    wgmma_wait<1>();
    pin(s);
    probabilities(s, of_s, p.log2_scale);
    round_pairs<T>(a.p, s);
    start_sum<T, D>(dv, a.p, shared_at(B::DO + st * B::QUERIES));
    const Columns<M / 2> of_dp(delta_of<D>(step.s));
    wgmma_wait<1>();
    pin(dp);
    dscores<T, D>(dp, s, a.p, of_dp);
    round_pairs<T>(a.ds, dp);
    store_dscores<M>(shared_at(B::DS + st * B::DSCORES), a.ds, c);
    products<T, D>(dk, dv, a, c, step);
}

// A block with a mask, or under a softcap; 0 times NaN is kept out (visible_products()).
template <typename T, int D, bool CAP>
__device__ __forceinline__ void masked_block(float (&dk)[D / 2], float (&dv)[D / 2],
                                             const BwdParams &p, const Tile &tile,
                                             const Consumer &in, const Step &step, bool bad_keys) {
    using B = Bwd<D>;
    constexpr int M = B::BLOCK_M;
    const Consumer c = {in.group, opaque(in.thread)};
    const int st = step.s.index;
    float s[M / 2], dp[M / 2];
    Products<D> a;
    const Columns<M / 2> of_s = start_both<T, D>(s, dp, c, step);
    wgmma_wait<0>();
    pin(s), pin(dp);
    Range seen[2];
    queries_of_keys<D>(seen, p.problem, tile, c, step.block);
    if constexpr (CAP) {
        float t[M / 2];
        transform(s, p);
#pragma unroll
        for (int i = 0; i < M / 2; i++) t[i] = s[i];
        probabilities(s, of_s, p.cap);
        zero_masked(s, seen);
        round_pairs<T>(a.p, s);
        dscores<T, D>(dp, s, a.p, Columns<M / 2>(delta_of<D>(step.s)));
        times_slopes(dp, t, p.slope);
    } else {
        probabilities(s, of_s, p.log2_scale);
        zero_masked(s, seen);
        round_pairs<T>(a.p, s);
        dscores<T, D>(dp, s, a.p, Columns<M / 2>(delta_of<D>(step.s)));
    }
    zero_masked(dp, seen);
    const bool unsafe = uniform(
        named_barrier_any(OWN + c.group, WARPGROUP, any_not_finite<M / 2>(delta_of<D>(step.s))) ||
        bad_keys);
    if (unsafe) add_visible<T, D>(dv, a.p, B::DO + st * B::QUERIES, p, tile, c, step);
    round_pairs<T>(a.ds, dp);
    store_dscores<M>(shared_at(B::DS + st * B::DSCORES), a.ds, c);
    if (unsafe) {
        visible_products<T, D>(dk, a, p, tile, c, step);
    } else {
        start_sum<T, D>(dv, a.p, shared_at(B::DO + st * B::QUERIES));
        products<T, D>(dk, dv, a, c, step);
    }
}
