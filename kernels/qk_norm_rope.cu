// qk_norm_rope.cu: RMSNorm of each head of q and k, then rotary embedding (formulas: csrc/ops.h;
// the layout of the work: rope.cuh).
//
// Memory-bound: forward, q and k are read once and written once; backward, dq_out and q are read
// and dq is written. Forward, q and k are one list of heads, and a warp loads all that it needs at
// once and ends. The backward sums dw over all tokens: its blocks stay, some for q and some for k,
// each with a partial sum of its own, and a second kernel adds those up in their order.
#include "rope.cuh"

constexpr int NORM_WARPS = 8; // of a block forward: they share the weights
constexpr int NORM_HEADS = 2; // of a lane forward: one loads while one is summed up

struct Weight {
    const void *data;
    Dtype dtype;
};

// The sum over the `lanes` (a power of two) neighbours that share a head.
__device__ __forceinline__ float head_sum(float x, int lanes) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
        if (other < lanes) x += __shfl_xor_sync(~0u, x, other);
    return x;
}

// round(w * round(x * r)): rms_norm's two roundings.
template <typename T, int VEC>
__device__ __forceinline__ void norm(float (&x)[VEC], float r, const float *w) {
#pragma unroll
    for (int j = 0; j < VEC; j++) x[j] = rounded<T>(rounded<T>(x[j] * r) * w[j]);
}

// The weights of q and of k as floats, for a block: (2, D).
__device__ __forceinline__ void stage_weights(float *weights, Weight qw, Weight kw, int D) {
    for (int d = threadIdx.x; d < 2 * D; d += blockDim.x) {
        Weight w = d < D ? qw : kw;
        float value[1];
        load_any<1>(value, w.data, w.dtype, d < D ? d : d - D);
        weights[d] = value[0];
    }
}

template <typename T, typename C>
__global__ void __launch_bounds__(NORM_WARPS * 32, sizeof(C) == 2 ? 4 : 3)
    qk_norm_rope_fwd_kernel(Heads<T> q_out, Heads<T> k_out, float *__restrict__ q_rstd,
                            float *__restrict__ k_rstd, Heads<const T> q, Heads<const T> k,
                            Weight qw, Weight kw, Table cos, Table sin, Shape n, float eps,
                            int lanes, unsigned groups) {
    constexpr int VEC = Pair<T>::VEC;
    extern __shared__ __align__(16) float weights[]; // (2, D): of q and of k
    Work at(blockIdx.x * NORM_WARPS + threadIdx.x / 32, n, groups);
    int lane = threadIdx.x % 32, column = lane % lanes * VEC, half = n.D / 2, step = 32 / lanes;
    int heads = at.token < n.B * n.S ? n.Hq + n.Hk : 0;
    int first = at.group * step * NORM_HEADS + lane / lanes;
    Pair<T> x[NORM_HEADS] = {};
    Angles<C, VEC> angles = {};
#pragma unroll
    for (int i = 0; i < NORM_HEADS; i++) {
        int h = first + i * step;
        if (h >= heads) continue;
        x[i].read(h < n.Hq ? q.at(at.b, at.s, h) : k.at(at.b, at.s, h - n.Hq), column, half);
    }
    if (first < heads) angles.read(cos, sin, at.b, at.s, column, half);
    stage_weights(weights, qw, kw, n.D);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < NORM_HEADS; i++) {
        int h = first + i * step;
        float sum = 0, x1[VEC], x2[VEC];
        x[i].floats(x1, x2);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += x1[j] * x1[j] + x2[j] * x2[j];
        float r = rsqrtf(head_sum(sum, lanes) / (float)n.D + eps);
        if (h >= heads) continue;
        unpack_again(x[i].x1), unpack_again(x[i].x2);
        x[i].floats(x1, x2);
        bool is_q = h < n.Hq;
        T *to = is_q ? q_out.at(at.b, at.s, h) : k_out.at(at.b, at.s, h - n.Hq);
        float *rstd = is_q ? q_rstd : k_rstd;
        int64_t token = at.token;
        if (rstd && column == 0) rstd[is_q ? token * n.Hq + h : token * n.Hk + h - n.Hq] = r;
        const float *w = weights + (is_q ? 0 : n.D);
        norm<T, VEC>(x1, r, w + column);
        norm<T, VEC>(x2, r, w + half + column);
        angles.rotate(x1, x2);
        store<T, VEC>(to + column, x1);
        store<T, VEC>(to + half + column, x2);
    }
}

template <typename T>
__global__ void __launch_bounds__(BLOCK)
    qk_norm_rope_fwd_plain_kernel(Heads<T> q_out, Heads<T> k_out, float *__restrict__ q_rstd,
                                  float *__restrict__ k_rstd, Heads<const T> q, Heads<const T> k,
                                  Weight qw, Weight kw, Table cos, Table sin, Shape n, float eps) {
    int64_t warp = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, heads = n.Hq + n.Hk;
    if (warp >= n.B * n.S * heads) return;
    int64_t token = warp / heads, b = token / n.S, s = token % n.S;
    int h = (int)(warp % heads), half = n.D / 2;
    bool is_q = h < n.Hq;
    const T *from = is_q ? q.at(b, s, h) : k.at(b, s, h - n.Hq);
    T *to = is_q ? q_out.at(b, s, h) : k_out.at(b, s, h - n.Hq);
    Weight w = is_q ? qw : kw;
    float *rstd = is_q ? q_rstd : k_rstd;
    float sum = 0;
    for (int d = threadIdx.x % 32; d < n.D; d += 32) sum += to_float(from[d]) * to_float(from[d]);
    float r = rsqrtf(warp_sum(sum) / (float)n.D + eps);
    if (rstd && threadIdx.x % 32 == 0) rstd[is_q ? token * n.Hq + h : token * n.Hk + h - n.Hq] = r;
    for (int column = threadIdx.x % 32; column < half; column += 32) {
        Angles<float, 1> angles = angles_at(cos, sin, b, s, column, half);
        float x1[1] = {to_float(from[column])}, x2[1] = {to_float(from[half + column])};
        float w1[1], w2[1];
        load_any<1>(w1, w.data, w.dtype, column);
        load_any<1>(w2, w.data, w.dtype, column + half);
        norm<T, 1>(x1, r, w1);
        norm<T, 1>(x2, r, w2);
        angles.rotate(x1, x2);
        to[column] = from_float<T>(x1[0]);
        to[half + column] = from_float<T>(x2[0]);
    }
}

// Of q and of k: a kernel parameter that a block indexes.
template <typename G> struct Both { G of[2]; };

// What the norm's backward reads and writes, of q or of k.
template <typename T> struct NormGradient {
    Heads<T> dx;
    float *dw_partial; // (P, D), or NULL
    Heads<const T> dout, x;
    Weight w;
    const float *rstd;
    int heads;
};

// Blocks of qk_norm_rope_bwd that fit a multiprocessor: bf16 on Hopper has just enough registers
// for 5. The host counts on as many (bwd_blocks).
template <typename T, typename C> constexpr int bwd_resident() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    return IS_BF16<T> && IS_BF16<C> ? 5 : 3;
#else
    return IS_BF16<T> && IS_BF16<C> ? 4 : 3;
#endif
}

// This block's share: its index and the count of the blocks with the same work.
struct Share {
    int of, block, blocks;

    // The first q_blocks blocks work on q, the others on k.
    __device__ Share(int q_blocks)
        : of((int)blockIdx.x >= q_blocks), block(of ? blockIdx.x - q_blocks : blockIdx.x),
          blocks(of ? gridDim.x - q_blocks : q_blocks) {}
};

// Of each of q and k, warps take heads in turn, 32 / lanes at a time, token after token; a block's
// sum of dy * xhat ends in dw_partial[block].
template <typename T, typename C>
__global__ void __launch_bounds__(BLOCK, bwd_resident<T, C>())
    qk_norm_rope_bwd_kernel(const __grid_constant__ Both<NormGradient<T>> both, Table cos,
                            Table sin, Shape n, int q_blocks, int lanes) {
    constexpr int VEC = Pair<T>::VEC;
    extern __shared__ __align__(16) float part[]; // (BLOCK / lanes, D), one sum per group of lanes
    Share share(q_blocks);
    const NormGradient<T> &g = both.of[share.of];
    float *weight = part + BLOCK / lanes * n.D; // (D,)
    for (int d = threadIdx.x; d < n.D; d += BLOCK) {
        float value[1];
        load_any<1>(value, g.w.data, g.w.dtype, d);
        weight[d] = value[0];
    }
    __syncthreads();
    int lane = threadIdx.x % 32, column = lane % lanes * VEC, half = n.D / 2, step = 32 / lanes;
    unsigned groups = (g.heads + step - 1) / step, units = (unsigned)(n.B * n.S) * groups;
    float dw1[VEC] = {}, dw2[VEC] = {};
    for (unsigned unit = share.block * WARPS + threadIdx.x / 32; unit < units;
         unit += share.blocks * WARPS) {
        Work at(unit, n, groups);
        int h = at.group * step + lane / lanes;
        Pair<T> x = {}, d = {};
        float r = 0;
        if (h < g.heads) {
            x.read(g.x.at(at.b, at.s, h), column, half);
            d.read(g.dout.at(at.b, at.s, h), column, half);
            r = g.rstd[(int64_t)at.token * g.heads + h];
        }
        float x1[VEC], x2[VEC], d1[VEC], d2[VEC], w[VEC], dot = 0;
        x.floats(x1, x2), d.floats(d1, d2);
        Angles<C, VEC> angles;
        angles.read(cos, sin, at.b, at.s, column, half);
        angles.rotate_back(d1, d2);
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            x1[j] *= r, x2[j] *= r;
            dw1[j] += d1[j] * rounded<T>(x1[j]), dw2[j] += d2[j] * rounded<T>(x2[j]);
        }
        load<float, VEC>(w, weight + column);
#pragma unroll
        for (int j = 0; j < VEC; j++) d1[j] *= w[j], dot += d1[j] * x1[j];
        load<float, VEC>(w, weight + half + column);
#pragma unroll
        for (int j = 0; j < VEC; j++) d2[j] *= w[j], dot += d2[j] * x2[j];
        float mean = head_sum(dot, lanes) / (float)n.D;
        if (h >= g.heads) continue;
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            d1[j] = r * (d1[j] - x1[j] * mean);
            d2[j] = r * (d2[j] - x2[j] * mean);
        }
        T *to = g.dx.at(at.b, at.s, h);
        store<T, VEC>(to + column, d1);
        store<T, VEC>(to + half + column, d2);
    }
    let_next_kernel_start();
    if (!g.dw_partial) return;
    float *mine = part + threadIdx.x / lanes * n.D;
#pragma unroll
    for (int j = 0; j < VEC; j++) mine[column + j] = dw1[j], mine[half + column + j] = dw2[j];
    __syncthreads();
    for (int d = threadIdx.x; d < n.D; d += BLOCK) {
        float sum = 0;
        for (int group = 0; group < BLOCK / lanes; group++) sum += part[group * n.D + d];
        g.dw_partial[(int64_t)share.block * n.D + d] = sum;
    }
}

// The same for any D and alignment: a warp per head; its sum grows in shared memory (WARPS, D).
template <typename T>
__global__ void __launch_bounds__(BLOCK, 1)
    qk_norm_rope_bwd_plain_kernel(const __grid_constant__ Both<NormGradient<T>> both, Table cos,
                                  Table sin, Shape n, int q_blocks) {
    extern __shared__ float part[];
    Share share(q_blocks);
    const NormGradient<T> &g = both.of[share.of];
    int half = n.D / 2, lane = threadIdx.x % 32;
    float *dw = part + threadIdx.x / 32 * n.D;
    for (int d = lane; g.dw_partial && d < n.D; d += 32) dw[d] = 0;
    __syncwarp();
    int64_t heads = n.B * n.S * g.heads;
    for (int64_t i = (int64_t)share.block * WARPS + threadIdx.x / 32; i < heads;
         i += (int64_t)share.blocks * WARPS) {
        int64_t token = i / g.heads, b = token / n.S, s = token % n.S;
        int h = (int)(i % g.heads);
        const T *x = g.x.at(b, s, h), *dout = g.dout.at(b, s, h);
        T *dx = g.dx.at(b, s, h);
        float r = g.rstd[i], dot = 0, mean = 0;
        for (int pass = 0; pass < 2; pass++) { // the mean, then dx
            for (int column = lane; column < half; column += 32) {
                Angles<float, 1> angles = angles_at(cos, sin, b, s, column, half);
                float d1[1] = {to_float(dout[column])}, d2[1] = {to_float(dout[half + column])};
                float x1 = to_float(x[column]) * r, x2 = to_float(x[half + column]) * r;
                float w1[1], w2[1];
                load_any<1>(w1, g.w.data, g.w.dtype, column);
                load_any<1>(w2, g.w.data, g.w.dtype, column + half);
                angles.rotate_back(d1, d2);
                if (pass == 0) {
                    dot += d1[0] * w1[0] * x1 + d2[0] * w2[0] * x2;
                    if (g.dw_partial) {
                        dw[column] += d1[0] * rounded<T>(x1);
                        dw[half + column] += d2[0] * rounded<T>(x2);
                    }
                } else {
                    dx[column] = from_float<T>(r * (d1[0] * w1[0] - x1 * mean));
                    dx[half + column] = from_float<T>(r * (d2[0] * w2[0] - x2 * mean));
                }
            }
            mean = warp_sum(dot) / (float)n.D;
        }
    }
    let_next_kernel_start();
    if (!g.dw_partial) return;
    __syncthreads();
    for (int d = threadIdx.x; d < n.D; d += BLOCK) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; warp++) sum += part[warp * n.D + d];
        g.dw_partial[(int64_t)share.block * n.D + d] = sum;
    }
}

struct WeightGradient {
    void *dw; // NULL: frozen
    Dtype dtype;
    const float *partial;
    int P;
};

constexpr int DW_BLOCK = 1024; // 32 warps for 32 columns, whose sums shared memory transposes

// dw[d] = sum over p, in a fixed tree, of partial[p, d]. A block takes 32 columns of q's or of k's:
// warp w first rows w, w + 32, ... of all of them, coalesced, then what all warps have of one.
__global__ void __launch_bounds__(DW_BLOCK)
    qk_norm_rope_bwd_dw_kernel(const __grid_constant__ Both<WeightGradient> both, int D) {
    __shared__ float part[32][33];
    int spans = (D + 31) / 32, of = blockIdx.x >= spans, first = (blockIdx.x - of * spans) * 32;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const WeightGradient &g = both.of[of];
    wait_for_previous_kernel();
    if (!g.dw) return;
    float sum = 0;
    if (first + lane < D) {
#pragma unroll 8
        for (int p = warp; p < g.P; p += 32) sum += g.partial[(int64_t)p * D + first + lane];
    }
    part[warp][lane] = sum;
    __syncthreads();
    sum = warp_sum(part[lane][warp]);
    if (lane == 0 && first + warp < D) store_any(g.dw, g.dtype, first + warp, sum);
}

// ---- Launchers ----------------------------------------------------------------------------------

template <typename T>
static const char *norm_fwd(Tensor *q_out, Tensor *k_out, Tensor *q_rstd, Tensor *k_rstd,
                            const Tensor *q, const Tensor *k, const Tensor *qw, const Tensor *kw,
                            const Tensor *cos, const Tensor *sin, double eps, void *stream) {
    Shape n = shape_of(q, k);
    const Tensor *t[] = {q_out, k_out, q, k, cos, sin, qw, kw};
    int lanes = known_tables(q, cos, sin) && fits_warps(n) ? lanes_for<T>(n.D, t, 8) : 0;
    int64_t groups = lanes ? groups_of(n.Hq + n.Hk, NORM_HEADS * 32 / lanes) : 0;
    float *qr = q_rstd ? (float *)q_rstd->data : nullptr;
    float *kr = k_rstd ? (float *)k_rstd->data : nullptr;
    Weight wq = {qw->data, qw->dtype}, wk = {kw->data, kw->dtype};
    if (lanes)
        return launch(cos->dtype == F32 ? qk_norm_rope_fwd_kernel<T, float>
                                        : qk_norm_rope_fwd_kernel<T, T>,
                      blocks_for(n.B * n.S * groups, NORM_WARPS), NORM_WARPS * 32,
                      2 * n.D * sizeof(float), stream, heads_of<T>(q_out), heads_of<T>(k_out), qr,
                      kr, heads_of<const T>(q), heads_of<const T>(k), wq, wk, table_of(cos),
                      table_of(sin), n, (float)eps, lanes, (unsigned)groups);
    return launch(qk_norm_rope_fwd_plain_kernel<T>, blocks_for(n.B * n.S * (n.Hq + n.Hk)), BLOCK, 0,
                  stream, heads_of<T>(q_out), heads_of<T>(k_out), qr, kr, heads_of<const T>(q),
                  heads_of<const T>(k), wq, wk, table_of(cos), table_of(sin), n, (float)eps);
}

struct Gradient {
    Tensor *dx, *dw, *partial;
    const Tensor *dout, *x, *w, *rstd;
};

template <typename T> static NormGradient<T> norm_gradient(const Gradient &g) {
    return {heads_of<T>(g.dx),         g.dw ? (float *)g.partial->data : nullptr,
            heads_of<const T>(g.dout), heads_of<const T>(g.x),
            {g.w->data, g.w->dtype},   (const float *)g.rstd->data,
            (int)g.x->shape[2]};
}

static WeightGradient weight_gradient(const Gradient &g, int P) {
    if (!g.dw) return {};
    return {g.dw->data, g.dw->dtype, (const float *)g.partial->data, P};
}

// As many blocks as fit the device, shared out to q and k by their heads; at most one per partial
// sum, and one at least: where there is no token, dw is zeros.
struct BackwardBlocks {
    int64_t q, k;
};

static BackwardBlocks bwd_blocks(const Gradient &q, const Gradient &k, const Tensor *cos) {
    int device = q.x->device, resident = q.x->dtype != BF16 || cos->dtype != BF16 ? 3
                                         : needs_hopper(device)                   ? 4
                                                                                  : 5;
    int64_t heads = q.x->shape[2] + k.x->shape[2], all = resident * multiprocessors(device);
    BackwardBlocks blocks = {heads ? all * q.x->shape[2] / heads : 0, 0};
    blocks.k = all - blocks.q;
    if (q.dw && blocks.q > q.partial->shape[0]) blocks.q = q.partial->shape[0];
    if (k.dw && blocks.k > k.partial->shape[0]) blocks.k = k.partial->shape[0];
    if (blocks.q == 0) blocks.q = 1;
    if (blocks.k == 0) blocks.k = 1;
    return blocks;
}

template <typename T>
static const char *norm_bwd(const Gradient &q, const Gradient &k, const Tensor *cos,
                            const Tensor *sin, void *stream) {
    Shape n = shape_of(q.x, k.x);
    const Tensor *t[] = {q.dx, q.dout, q.x, q.w, k.dx, k.dout, k.x, k.w, cos, sin};
    int lanes = known_tables(q.x, cos, sin) && fits_warps(n) ? lanes_for<T>(n.D, t, 10) : 0;
    if (n.B * n.S == 0 && !q.dw && !k.dw) return nullptr;
    auto [of_q, of_k] = bwd_blocks(q, k, cos);
    size_t smem = (size_t)(lanes ? BLOCK / lanes + 1 : WARPS) * n.D * sizeof(float);
    Both<NormGradient<T>> both = {{norm_gradient<T>(q), norm_gradient<T>(k)}};
    const char *error = lanes ? launch(cos->dtype == F32 ? qk_norm_rope_bwd_kernel<T, float>
                                                         : qk_norm_rope_bwd_kernel<T, T>,
                                       of_q + of_k, BLOCK, smem, stream, both, table_of(cos),
                                       table_of(sin), n, (int)of_q, lanes)
                              : launch(qk_norm_rope_bwd_plain_kernel<T>, of_q + of_k, BLOCK, smem,
                                       stream, both, table_of(cos), table_of(sin), n, (int)of_q);
    if (error || (!q.dw && !k.dw)) return error;
    return launch_after(
        qk_norm_rope_bwd_dw_kernel, 2 * ((n.D + 31) / 32), DW_BLOCK, 0, stream,
        Both<WeightGradient>{{weight_gradient(q, (int)of_q), weight_gradient(k, (int)of_k)}}, n.D);
}

extern "C" const char *qk_norm_rope_fwd_cuda(Tensor *q_out, Tensor *k_out, Tensor *q_rstd,
                                             Tensor *k_rstd, const Tensor *q, const Tensor *k,
                                             const Tensor *qw, const Tensor *kw, const Tensor *cos,
                                             const Tensor *sin, double eps, void *stream) {
    BY_DTYPE(q->dtype,
             norm_fwd<T>(q_out, k_out, q_rstd, k_rstd, q, k, qw, kw, cos, sin, eps, stream))
}

extern "C" const char *qk_norm_rope_bwd_cuda(Tensor *dq, Tensor *dk, Tensor *dqw, Tensor *dkw,
                                             Tensor *dqw_partial, Tensor *dkw_partial,
                                             const Tensor *dq_out, const Tensor *dk_out,
                                             const Tensor *q, const Tensor *k, const Tensor *qw,
                                             const Tensor *kw, const Tensor *q_rstd,
                                             const Tensor *k_rstd, const Tensor *cos,
                                             const Tensor *sin, void *stream) {
    Gradient of_q = {dq, dqw, dqw_partial, dq_out, q, qw, q_rstd};
    Gradient of_k = {dk, dkw, dkw_partial, dk_out, k, kw, k_rstd};
    BY_DTYPE(q->dtype, norm_bwd<T>(of_q, of_k, cos, sin, stream))
}
