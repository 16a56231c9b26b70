// rope.cu: rotary embedding (formulas: csrc/ops.h; the layout of the work: rope.cuh).
//
// Memory-bound: q and k, one list of Hq + Hk heads, are read once and written once. A warp loads
// all that it needs at once, and ends. cos and sin come from memory once per token, and from the
// caches for its other heads.
#include "rope.cuh"

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

// ---- Launchers ----------------------------------------------------------------------------------

template <typename T, bool BACK>
static const char *rotate(Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k,
                          const Tensor *cos, const Tensor *sin, void *stream) {
    Shape n = shape_of(q, k);
    const Tensor *t[] = {q_out, k_out, q, k, cos, sin};
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

extern "C" const char *rope_fwd_cuda(Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k,
                                     const Tensor *cos, const Tensor *sin, void *stream) {
    BY_DTYPE(q->dtype, rotate<T, false>(q_out, k_out, q, k, cos, sin, stream))
}

extern "C" const char *rope_bwd_cuda(Tensor *dq, Tensor *dk, const Tensor *dq_out,
                                     const Tensor *dk_out, const Tensor *cos, const Tensor *sin,
                                     void *stream) {
    BY_DTYPE(dq->dtype, rotate<T, true>(dq, dk, dq_out, dk_out, cos, sin, stream))
}
