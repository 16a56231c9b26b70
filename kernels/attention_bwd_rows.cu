// attention_bwd_rows.cu: what attention's backward does before and after its main kernel, which
// attention_bwd.cu describes: a pass over the rows of queries, and one over the gradients where the
// main kernel does not finish them. Both are bound by bandwidth.
#include "attention_bwd.cuh"
#include "sm90.cuh" // for Hopper alone, setup.py sees by this line

constexpr int ROWS_BLOCK = 256, ROWS_TILE = 64; // threads, rows

struct RowsParams {
    Memory q, out, dout;
    const float *lse, *dlse; // (B, Hq, Sq)
    float *rows;             // (2, B, Hq, copies, stride): lse in powers of 2, delta
    float *dq;               // (places, Sq, 8 LANES), to be zero, or NULL
    int *turn;               // (B, Hq, Sq), or NULL
    Plan *plan;
    Progress *progress; // (B, Hq)
    int B, Hq, Sq, D, stride, copies, places;
};

// LANES threads a row, 8 elements each. TMA begins at multiples of 16 bytes, packed sequences do
// not: there copy k begins k floats later, so that one of four suits any row. delta is not finite
// wherever the row of q or dout is not: the main kernel knows by it which masked tiles hold what
// must not be multiplied by 0. A finite lse vouches for q; of rows that see no key, q is looked at.
template <typename T, int LANES>
__global__ void __launch_bounds__(ROWS_BLOCK) attention_bwd_rows_kernel(const RowsParams p) {
    wait_for_previous_kernel(); // the plan kernel, where there is one
    if (blockIdx.x == 0 && threadIdx.x == 0) p.plan->next = p.plan->next_unit = 0;
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
        if (p.dq && line < p.places) {
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
        if (lane == 0 && p.turn) p.turn[at] = 0;
        if (lane == 0 && row == 0) p.progress[line] = {0, 0};
    }
}

struct FinishParams {
    Memory dq, dk, dv;
    Problem problem;
    bool store_first;
    const float *sums; // (B, Hq, Sq, width): dQ unscaled, columns as store_dq() has them
    const void *dk_shares, *dv_shares; // (B, Sk, Hq, D)
    int width, group_size;
    unsigned dq_chunks, dk_chunks; // 8 elements each
};

template <typename T> __device__ __forceinline__ void finish_dq(const FinishParams &p, unsigned i) {
    const Problem &n = p.problem;
    const unsigned chunks = n.D / 8, row_head = i / chunks, chunk = i - row_head * chunks;
    const unsigned entry_row = row_head / n.Hq, head = row_head - entry_row * n.Hq;
    const unsigned b = entry_row / n.Sq, row = entry_row - b * n.Sq;
    const int64_t at = ((int64_t)b * n.Hq + head) * n.Sq + row;
    const float *from = p.sums + at * p.width + column_of_sums(chunk * 8);
    const Tile whole = {0, n.Sq, 0, n.Sk};
    const Range seen = keys_seen(n, whole, row);
    const bool nothing = p.store_first && seen.to <= seen.from; // nobody has written its sums
    float dq[8];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 two = *(const float2 *)(from + 8 * j);
        dq[2 * j] = nothing ? 0.0f : two.x * n.scale;
        dq[2 * j + 1] = nothing ? 0.0f : two.y * n.scale;
    }
    store<T, 8>(p.dq.at<T>(b, row, head) + chunk * 8, dq);
}

template <typename T>
__device__ __forceinline__ void sum_shares(const FinishParams &p, const Memory &to,
                                           const void *shares, unsigned i) {
    const Problem &n = p.problem;
    const unsigned chunks = n.D / 8, row_head = i / chunks, chunk = i - row_head * chunks;
    const unsigned entry_row = row_head / n.Hk, head = row_head - entry_row * n.Hk;
    const unsigned b = entry_row / n.Sk, row = entry_row - b * n.Sk;
    const T *from = (const T *)shares + ((int64_t)row_head * p.group_size * chunks + chunk) * 8;
    float sum[8] = {};
    for (int g = 0; g < p.group_size; g++) {
        float x[8];
        load<T, 8>(x, from + (int64_t)g * n.D);
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

const char *attention_bwd_rows(const BwdParams &p, const Workspace &w, const Tensors &t,
                               void *stream) {
    const Problem &problem = p.problem;
    RowsParams rows = {memory_of(t.q), memory_of(t.out), memory_of(t.dout)};
    rows.lse = (const float *)t.lse->data;
    rows.dlse = t.dlse ? (const float *)t.dlse->data : nullptr;
    rows.rows = (float *)(t.memory + w.rows), rows.turn = p.in_order ? p.turn : nullptr;
    rows.plan = p.plan;
    rows.dq = p.store_first ? nullptr : (float *)(t.memory + w.dq);
    rows.progress = p.progress, rows.places = p.places;
    rows.B = problem.B, rows.Hq = problem.Hq, rows.Sq = problem.Sq, rows.D = problem.D;
    rows.stride = (int)w.stride, rows.copies = w.copies;
    const int64_t tiles = (problem.Sq + ROWS_TILE - 1) / ROWS_TILE;
    const int64_t blocks = (int64_t)problem.B * problem.Hq * tiles;
    const bool planned = problem.packed || !blocks; // else the rows kernel starts the tickets
    if (planned) {
        const char *error = attention_plan(p.plan, problem, problem.cu_k, problem.Sk, BLOCK_N,
                                           w.capacity, p.in_order, stream);
        if (error) return error;
    }
    const bool wide = w.width == 128;
    auto kernel = t.q->dtype == BF16 ? wide ? attention_bwd_rows_kernel<bf16, 16>
                                            : attention_bwd_rows_kernel<bf16, 8>
                  : wide ? attention_bwd_rows_kernel<f16, 16>
                                     : attention_bwd_rows_kernel<f16, 8>;
    if (planned) return launch_after(kernel, blocks, ROWS_BLOCK, 0, stream, rows);
    return launch(kernel, blocks, ROWS_BLOCK, 0, stream, rows);
}

const char *attention_bwd_finish(const BwdParams &p, const Workspace &w, const Tensors &t,
                                 void *stream) {
    const Problem &problem = p.problem;
    FinishParams f = {memory_of(t.dq), memory_of(t.dk), memory_of(t.dv)};
    f.problem = problem, f.store_first = p.store_first;
    f.sums = (const float *)(t.memory + w.dq);
    f.dk_shares = t.memory + w.dk, f.dv_shares = t.memory + w.dv;
    f.width = w.width, f.group_size = p.group_size;
    const int64_t chunks = problem.D / 8, dq_chunks = chunks * problem.B * problem.Sq * problem.Hq;
    // Shares of a group of no query heads (0): dK and dV are sums of nothing.
    const int64_t dk_chunks = p.group_size != 1 ? chunks * problem.B * problem.Sk * problem.Hk : 0;
    const int64_t all = dq_chunks + 2 * dk_chunks;
    if (all > UINT32_MAX - ROWS_BLOCK) return MANY_TILES;
    f.dq_chunks = (unsigned)dq_chunks, f.dk_chunks = (unsigned)dk_chunks;
    auto kernel =
        t.q->dtype == BF16 ? attention_bwd_finish_kernel<bf16> : attention_bwd_finish_kernel<f16>;
    return launch_after(kernel, (all + ROWS_BLOCK - 1) / ROWS_BLOCK, ROWS_BLOCK, 0, stream, f);
}
