// rope.cuh: what rope.cu and qk_norm_rope.cu share: heads, tables of angles, and who works on what.
//
// In the streaming kernels a warp takes a group of heads of one token, and `lanes` of its lanes a
// head, one 16-byte vector of each half per lane:
//
//   lane:      0 .. lanes-1 | lanes .. 2*lanes-1 | ...          D = 128, bf16: lanes = 8, 4 heads
//   head:      h            | h + 1              | ...          at a time
//   columns:   c = lane % lanes: [c*VEC, +VEC) and [D/2 + c*VEC, +VEC)
//
// Head sizes that do not fit this form, and unaligned tensors, take the plain kernels: a warp per
// head, one element at a time.
#pragma once
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int BLOCK = WARPS * 32;

// (B, S, H, D) with a contiguous last dimension.
template <typename T> struct Heads {
    T *data;
    int64_t batch, token, head; // strides in elements
    __device__ T *at(int64_t b, int64_t s, int h) const {
        return data + b * batch + s * token + h * head;
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

// What a warp works on: group `group` of the heads of token s of sequence b. Counts of tokens times
// groups fit 32 bits (fits_warps): 64-bit divisions would take as long as the loads.
struct Work {
    unsigned token, b, s, group;

    __device__ Work(unsigned unit, const Shape &n, unsigned groups) {
        token = unit / groups, group = unit - token * groups;
        b = token / (unsigned)n.S, s = token - b * (unsigned)n.S;
    }
};

// ---- Host side ----------------------------------------------------------------------------------

template <typename T> static Heads<T> heads_of(const Tensor *t) {
    if (!t) return {};
    return {(T *)t->data, t->stride[0], t->stride[1], t->stride[2]};
}

static Table table_of(const Tensor *t) { return {t->data, t->dtype, t->stride[0], t->stride[1]}; }

static Shape shape_of(const Tensor *q, const Tensor *k) {
    return {q->shape[0], q->shape[1], (int)q->shape[2], k ? (int)k->shape[2] : 0, (int)q->shape[3]};
}

// Every head of t begins on a 16-byte boundary (NULL does).
static bool aligned(const Tensor *t) {
    if (!t) return true;
    int64_t vec = t->dtype == F32 ? 4 : 8;
    bool ok = (uintptr_t)t->data % 16 == 0;
    for (int d = 0; d < t->ndim - 1; d++) ok = ok && (t->shape[d] <= 1 || t->stride[d] % vec == 0);
    return ok;
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
