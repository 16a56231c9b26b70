// rope.cu: rotary embedding, alone and after a per-head RMSNorm (formulas: csrc/ops.h).
//
// Memory-bound: q and k read once and written once (backward of the normed form: dq_out, q read, dq
// written); cos and sin come from memory once per token and from L1 for its other heads. In the
// streaming kernels a warp takes a group of heads of one token, and `lanes` of its lanes a head,
// one 16-byte vector of each half per lane:
//
//   lane:      0 .. lanes-1 | lanes .. 2*lanes-1 | ...          D = 128, bf16: lanes = 8, 4 heads
//   head:      h            | h + 1              | ...          at a time
//   columns:   c = lane % lanes: [c*VEC, +VEC) and [D/2 + c*VEC, +VEC)
//
// Forward, and backward of the rotation, a warp loads all that it needs at once and ends: many
// short-lived warps read faster than few that loop. The normed form's backward sums dw over all
// tokens, so its blocks stay. Q and k count as one list of Hq + Hk heads. Head sizes that do not
// fit this form, and unaligned tensors, take the plain kernels: a warp per head, one element at a
// time.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = WARPS * 32;
constexpr int NORM_WARPS = 8; // of qk_norm_rope_fwd: they share the weights
constexpr int NORM_HEADS = 2; // of a lane there: one loads while one is summed up
constexpr int BWD_BLOCKS = 5; // of qk_norm_rope_bwd a multiprocessor: 640 threads
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
[[maybe_unused]] constexpr int BWD_RESIDENT = BWD_BLOCKS; // just enough registers for bf16
#else
[[maybe_unused]] constexpr int BWD_RESIDENT = 4;
#endif

// (B, S, H, D) with a contiguous last dimension.
template <typename T> struct Heads {
    T *data;
    int64_t batch, token; // strides in elements
    int head;
    __device__ T *at(int64_t b, int64_t s, int h) const {
        return data + b * batch + s * token + (int64_t)h * head;
    }
};

struct Table {
    const void *data;
    Dtype dtype;
    int64_t batch, token;
};

struct Shape {
    int64_t B, S;
    int Hq, Hk, D;
};

struct Weight {
    const void *data;
    Dtype dtype;
};

// cos and sin of both halves of a head, N columns of each, kept as they are stored (C): at 8
// columns 32 registers of floats would leave too few warps on an SM to keep the memory busy.
template <typename C, int N> struct Angles {
    Packed<C, N> c1, c2, s1, s2;

    __device__ void read(Table cos, Table sin, int64_t b, int64_t s, int column, int half) {
        const C *c = (const C *)cos.data + b * cos.batch + s * cos.token + column;
        const C *d = (const C *)sin.data + b * sin.batch + s * sin.token + column;
        c1 = load_packed<C, N>(c), c2 = load_packed<C, N>(c + half);
        s1 = load_packed<C, N>(d), s2 = load_packed<C, N>(d + half);
    }

    __device__ void rotate(float (&x1)[N], float (&x2)[N]) const {
#pragma unroll
        for (int j = 0; j < N; j++) {
            float a = x1[j], b = x2[j];
            x1[j] = a * c1[j] - b * s1[j];
            x2[j] = b * c2[j] + a * s2[j];
        }
    }

    // The transpose: the backward.
    __device__ void rotate_back(float (&x1)[N], float (&x2)[N]) const {
#pragma unroll
        for (int j = 0; j < N; j++) {
            float a = x1[j], b = x2[j];
            x1[j] = a * c1[j] + b * s2[j];
            x2[j] = b * c2[j] - a * s1[j];
        }
    }
};

// One column, of tables of any dtype.
__device__ __forceinline__ Angles<float, 1> angles_at(Table cos, Table sin, int64_t b, int64_t s,
                                                      int column, int half) {
    float c1[1], c2[1], s1[1], s2[1];
    int64_t c = b * cos.batch + s * cos.token + column, d = b * sin.batch + s * sin.token + column;
    load_any<1>(c1, cos.data, cos.dtype, c);
    load_any<1>(c2, cos.data, cos.dtype, c + half);
    load_any<1>(s1, sin.data, sin.dtype, d);
    load_any<1>(s2, sin.data, sin.dtype, d + half);
    return {{c1[0]}, {c2[0]}, {s1[0]}, {s2[0]}};
}

// Both halves of a head's columns, as stored.
template <typename T> struct Pair {
    static constexpr int VEC = 16 / sizeof(T);
    Packed<T, VEC> x1, x2;

    __device__ void read(const T *head, int column, int half) {
        x1 = load_packed<T, VEC>(head + column);
        x2 = load_packed<T, VEC>(head + half + column);
    }
    __device__ void floats(float (&a)[VEC], float (&b)[VEC]) const {
#pragma unroll
        for (int j = 0; j < VEC; j++) a[j] = x1[j], b[j] = x2[j];
    }
};

// The sum over the `lanes` (a power of two) neighbours that share a head.
__device__ __forceinline__ float head_sum(float x, int lanes) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
        if (other < lanes) x += __shfl_xor_sync(~0u, x, other);
    return x;
}

// What a warp works on: group `group` of the heads of token s of sequence b. Counts of tokens times
// groups fit 32 bits (fits_warps): 64-bit divisions would take as long as the loads.
struct Work {
    unsigned token, b, s, group;

    __device__ Work(unsigned unit, const Shape &n, unsigned groups) {
        token = unit / groups, group = unit - token * groups;
        b = token / (unsigned)n.S, s = token - b * (unsigned)n.S;
    }
};

// ---- Rotation -----------------------------------------------------------------------------------

template <typename T, typename C, bool BACK>
__global__ void __launch_bounds__(BLOCK, 8)
    rope_kernel(Heads<T> q_out, Heads<T> k_out, Heads<const T> q, Heads<const T> k, Table cos,
                Table sin, Shape n, int lanes, unsigned groups) {
    constexpr int VEC = Pair<T>::VEC;
    Work at(blockIdx.x * WARPS + threadIdx.x / 32, n, groups);
    int lane = threadIdx.x % 32, column = lane % lanes * VEC, half = n.D / 2;
    int h = at.group * (32 / lanes) + lane / lanes;
    if (at.token >= n.B * n.S || h >= n.Hq + n.Hk) return;
    bool is_q = h < n.Hq;
    Pair<T> x;
    x.read(is_q ? q.at(at.b, at.s, h) : k.at(at.b, at.s, h - n.Hq), column, half);
    Angles<C, VEC> angles;
    angles.read(cos, sin, at.b, at.s, column, half);
    float x1[VEC], x2[VEC];
    x.floats(x1, x2);
    if (BACK) angles.rotate_back(x1, x2);
    else angles.rotate(x1, x2);
    T *to = is_q ? q_out.at(at.b, at.s, h) : k_out.at(at.b, at.s, h - n.Hq);
    store<T, VEC>(to + column, x1);
    store<T, VEC>(to + half + column, x2);
}

template <typename T, bool BACK>
__global__ void __launch_bounds__(BLOCK)
    rope_plain_kernel(Heads<T> q_out, Heads<T> k_out, Heads<const T> q, Heads<const T> k, Table cos,
                      Table sin, Shape n) {
    int64_t warp = (int64_t)blockIdx.x * WARPS + threadIdx.x / 32, heads = n.Hq + n.Hk;
    if (warp >= n.B * n.S * heads) return;
    int64_t b = warp / heads / n.S, s = warp / heads % n.S;
    int h = (int)(warp % heads), half = n.D / 2;
    const T *from = h < n.Hq ? q.at(b, s, h) : k.at(b, s, h - n.Hq);
    T *to = h < n.Hq ? q_out.at(b, s, h) : k_out.at(b, s, h - n.Hq);
    for (int column = threadIdx.x % 32; column < half; column += 32) {
        Angles<float, 1> angles = angles_at(cos, sin, b, s, column, half);
        float x1[1] = {to_float(from[column])}, x2[1] = {to_float(from[half + column])};
        if (BACK) angles.rotate_back(x1, x2);
        else angles.rotate(x1, x2);
        to[column] = from_float<T>(x1[0]);
        to[half + column] = from_float<T>(x2[0]);
    }
}

// ---- RMSNorm of each head, then rotation --------------------------------------------------------

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
__global__ void __launch_bounds__(BLOCK, IS_BF16<T> &&IS_BF16<C> ? BWD_RESIDENT : 3)
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

// dw[d] = sum over p, in a fixed tree, of partial[p, d]: a warp per d, of q's and then of k's.
__global__ void __launch_bounds__(BLOCK)
    qk_norm_rope_bwd_dw_kernel(const __grid_constant__ Both<WeightGradient> both, int D) {
    int warp = blockIdx.x * WARPS + threadIdx.x / 32, d = warp % D;
    const WeightGradient &g = both.of[warp >= D];
    wait_for_previous_kernel();
    if (warp >= 2 * D || !g.dw) return;
    float sum = 0;
    for (int p = threadIdx.x % 32; p < g.P; p += 32) sum += g.partial[(int64_t)p * D + d];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) store_any(g.dw, g.dtype, d, sum);
}

// ---- Launchers ----------------------------------------------------------------------------------

template <typename T> static Heads<T> heads_of(const Tensor *t) {
    if (!t) return {};
    return {(T *)t->data, t->stride[0], t->stride[1], t->shape[2] > 1 ? (int)t->stride[2] : 0};
}

static Table table_of(const Tensor *t) { return {t->data, t->dtype, t->stride[0], t->stride[1]}; }

static Shape shape_of(const Tensor *q, const Tensor *k) {
    return {q->shape[0], q->shape[1], (int)q->shape[2], k ? (int)k->shape[2] : 0, (int)q->shape[3]};
}

#define FAR_HEADS "ValueError: heads lie 2^31 elements or more apart; copy first"

// Heads holds the distance between heads in 32 bits.
static bool far_heads(const Tensor *const *t, int count) {
    for (int i = 0; i < count; i++)
        if (t[i] && t[i]->ndim == 4 && t[i]->shape[2] > 1 && t[i]->stride[2] > INT32_MAX)
            return true;
    return false;
}

// Every head of t begins on a 16-byte boundary, and not 2^31 elements or more from its token's
// first (NULL does).
static bool aligned(const Tensor *t) {
    if (!t) return true;
    int64_t vec = t->dtype == F32 ? 4 : 8;
    bool ok = (uintptr_t)t->data % 16 == 0;
    for (int d = 0; d < t->ndim - 1; d++) ok = ok && (t->shape[d] <= 1 || t->stride[d] % vec == 0);
    return ok && (t->ndim < 4 || t->stride[2] * t->shape[2] <= INT32_MAX);
}

// Lanes per head of the streaming kernels, 0 where they do not fit: half a head must be a power of
// two of vectors, at most a warp's, and everything aligned for vectors.
template <typename T> static int lanes_for(int D, const Tensor *const *t, int count) {
    constexpr int VEC = Pair<T>::VEC;
    int lanes = D / 2 / VEC;
    if (D % 16 || lanes < 1 || lanes > 32 || (lanes & (lanes - 1))) return 0;
    for (int i = 0; i < count; i++)
        if (!aligned(t[i])) return 0;
    return lanes;
}

// The streaming kernels know tables of q's dtype and of float32.
static bool known_tables(const Tensor *q, const Tensor *cos, const Tensor *sin) {
    return cos->dtype == sin->dtype && (cos->dtype == q->dtype || cos->dtype == F32);
}

static int64_t blocks_for(int64_t warps, int a_block = WARPS) {
    return (warps + a_block - 1) / a_block;
}

static int64_t groups_of(int64_t heads, int64_t together) {
    return (heads + together - 1) / together;
}

// Warps of the streaming kernels are counted in 32 bits, up to a block or a round beyond the last.
static bool fits_warps(const Shape &n) { return n.B * n.S * (n.Hq + n.Hk) < (int64_t)1 << 31; }

template <typename T, bool BACK>
static const char *rotate(Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k,
                          const Tensor *cos, const Tensor *sin, void *stream) {
    Shape n = shape_of(q, k);
    const Tensor *t[] = {q_out, k_out, q, k, cos, sin};
    if (far_heads(t, 6)) return FAR_HEADS;
    int lanes = known_tables(q, cos, sin) && fits_warps(n) ? lanes_for<T>(n.D, t, 6) : 0;
    int64_t groups = lanes ? groups_of(n.Hq + n.Hk, 32 / lanes) : 0;
    if (lanes)
        return launch(cos->dtype == F32 ? rope_kernel<T, float, BACK> : rope_kernel<T, T, BACK>,
                      blocks_for(n.B * n.S * groups), BLOCK, 0, stream, heads_of<T>(q_out),
                      heads_of<T>(k_out), heads_of<const T>(q), heads_of<const T>(k), table_of(cos),
                      table_of(sin), n, lanes, (unsigned)groups);
    return launch(rope_plain_kernel<T, BACK>, blocks_for(n.B * n.S * (n.Hq + n.Hk)), BLOCK, 0,
                  stream, heads_of<T>(q_out), heads_of<T>(k_out), heads_of<const T>(q),
                  heads_of<const T>(k), table_of(cos), table_of(sin), n);
}

template <typename T>
static const char *norm_fwd(Tensor *q_out, Tensor *k_out, Tensor *q_rstd, Tensor *k_rstd,
                            const Tensor *q, const Tensor *k, const Tensor *qw, const Tensor *kw,
                            const Tensor *cos, const Tensor *sin, double eps, void *stream) {
    Shape n = shape_of(q, k);
    const Tensor *t[] = {q_out, k_out, q, k, cos, sin, qw, kw};
    if (far_heads(t, 8)) return FAR_HEADS;
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

template <typename T>
static const char *norm_bwd(const Gradient &q, const Gradient &k, const Tensor *cos,
                            const Tensor *sin, void *stream) {
    Shape n = shape_of(q.x, k.x);
    const Tensor *t[] = {q.dx, q.dout, q.x, q.w, k.dx, k.dout, k.x, k.w, cos, sin};
    if (far_heads(t, 10)) return FAR_HEADS;
    int lanes = known_tables(q.x, cos, sin) && fits_warps(n) ? lanes_for<T>(n.D, t, 10) : 0;
    // Blocks are shared out by heads; each has a partial sum of its own.
    int64_t blocks = BWD_BLOCKS * (int64_t)multiprocessors(q.x->device);
    int64_t heads = n.Hq + n.Hk, of_q = heads ? blocks * n.Hq / heads : 0, of_k = blocks - of_q;
    if (of_q == 0) of_q = 1; // for an empty q too: its dw is zeros
    if (of_k == 0) of_k = 1;
    if (q.dw && of_q > q.partial->shape[0]) of_q = q.partial->shape[0];
    if (k.dw && of_k > k.partial->shape[0]) of_k = k.partial->shape[0];
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
        qk_norm_rope_bwd_dw_kernel, blocks_for(2 * n.D), BLOCK, 0, stream,
        Both<WeightGradient>{{weight_gradient(q, (int)of_q), weight_gradient(k, (int)of_k)}}, n.D);
}

extern "C" const char *rope_fwd_cuda(Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k,
                                     const Tensor *cos, const Tensor *sin, void *stream) {
    BY_DTYPE(q->dtype, rotate<T, false>(q_out, k_out, q, k, cos, sin, stream))
}

extern "C" const char *rope_bwd_cuda(Tensor *dq, Tensor *dk, const Tensor *dq_out,
                                     const Tensor *dk_out, const Tensor *cos, const Tensor *sin,
                                     void *stream) {
    BY_DTYPE(dq->dtype, rotate<T, true>(dq, dk, dq_out, dk_out, cos, sin, stream))
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
