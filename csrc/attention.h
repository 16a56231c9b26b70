/* attention.h: what attention's forward and backward on the CPU share, after Dao et al.,
 * "FlashAttention" (2022): scores exist one tile of BLOCK_K keys x BLOCK_Q queries at a time.
 *
 * A tile is transposed, S^T (keys, queries): each vector holds one key's scores of many queries,
 * so that maxima and sums over keys need no shuffles, and every product has contiguous rows on its
 * right, whatever the head dimension:
 *   S^T = K Q^T,  O^T += V^T P^T,  dP^T = V dO^T,  dQ^T += K^T dS^T,  dV += P^T dO,  dK += dS^T Q
 * Masked scores are -inf. A masked probability is 0, but 0 times a NaN that no query may see is
 * NaN, so a tile that is masked in part looks for such values first. */
#ifndef FLATOUT_ATTENTION_H
#define FLATOUT_ATTENTION_H

#include <omp.h>

#include "cpu.h"

#ifdef __AVX512F__
enum { VEC_BYTES = 64, MR = 8 };
#elif defined(__AVX2__)
enum { VEC_BYTES = 32, MR = 4 };
#else
enum { VEC_BYTES = 16, MR = 4 };
#endif
enum { LANES = VEC_BYTES / sizeof(real), BLOCK_Q = 96, BLOCK_K = 48, CHUNK = 4 * BLOCK_Q };
typedef real vec __attribute__((vector_size(VEC_BYTES), may_alias));
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))

INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
INLINE i64 round_up(i64 n, i64 to) { return (n + to - 1) / to * to; }

/* ---- Products of tiles ----------------------------------------------------------------------- */

/* mr rows and nv vectors of c (rows of ldc) = or += a b; a's element (r, p) is at
 * r a_row + p a_col. */
INLINE void corner(int mr, int nv, real *c, i64 ldc, const real *a, i64 a_row, i64 a_col,
                   const real *b, i64 ldb, i64 depth, bool add) {
    vec sum[MR][2];
#pragma GCC unroll 8
    for (int r = 0; r < mr; r++) {
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) sum[r][v] = (vec){0};
    }
    for (i64 p = 0; p < depth; p++, a += a_col, b += ldb) {
#pragma GCC unroll 8
        for (int r = 0; r < mr; r++) {
#pragma GCC unroll 2
            for (int v = 0; v < nv; v++) sum[r][v] += a[r * a_row] * ((const vec *)b)[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < mr; r++) {
        vec *to = (vec *)(c + r * ldc);
#pragma GCC unroll 2
        for (int v = 0; v < nv; v++) {
            if (add) sum[r][v] += to[v];
            to[v] = sum[r][v];
        }
    }
}

INLINE void columns(int nv, real *c, i64 ldc, const real *a, i64 a_row, i64 a_col, const real *b,
                    i64 ldb, i64 m, i64 depth, bool add) {
    i64 i = 0;
    for (; i + MR <= m; i += MR)
        corner(MR, nv, c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, depth, add);
    for (; i < m; i++)
        corner(1, nv, c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, depth, add);
}

/* c (m, n) = or += a (m, depth) b (depth, n); n, ldb, ldc are multiples of LANES. Everything lies
 * in the cache already, so nothing is packed. */
static inline void product(real *c, i64 ldc, const real *a, i64 a_row, i64 a_col, const real *b,
                           i64 ldb, i64 m, i64 n, i64 depth, bool add) {
    i64 j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
        columns(2, c + j, ldc, a, a_row, a_col, b + j, ldb, m, depth, add);
    if (j < n) columns(1, c + j, ldc, a, a_row, a_col, b + j, ldb, m, depth, add);
}

/* ---- Elementwise functions ------------------------------------------------------------------- */

/* exp of a number that is not large (x <= 0, but for rounding): leaner than vexp. */
INLINE real exp_small(real x) {
#ifdef REAL_IS_DOUBLE
    return exp(x);
#else
    /* Its last bit is 1: the sum's low bits are n + 127. */
    const float magic = 12582912.0f + 127.0f;
    float shifted = x * 1.44269504f + magic, n = shifted - magic, scale;
    float p = exp_reduced(x, n);
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits <<= 23;
    memcpy(&scale, &bits, 4);
    return x < -87.0f ? 0.0f : p * scale;
#endif
}

static inline bool all_finite(const real *x, i64 n) {
    int bad = 0;
#pragma omp simd reduction(| : bad)
    for (i64 i = 0; i < n; i++) bad |= x[i] - x[i] != 0;
    return !bad;
}

/* ---- The problem, its sequences, its tiles --------------------------------------------------- */

/* Rows q0 .. q0 + sq of batch entry b's queries over rows k0 .. k0 + sk of its keys. */
typedef struct {
    i64 b, q0, sq, k0, sk;
} Sequence;

typedef struct {
    Tensor q, k, v, out, dout, dq, dk, dv; /* (B, S, H, D); packed: B = 1 */
    real *lse;
    const real *dlse;
    i64 left, right; /* OPEN: no bound */
    real scale, softcap;
    i64 Hq, Hk, D, width; /* width: D rounded up to whole vectors */
    Sequence *sequences;
    i64 count;
    int threads; /* asked once: the scratch is made for so many */
} Problem;

/* Keys j0 .. j0 + nk of a sequence against columns c0 .. c1 of the block of queries at i0. */
typedef struct {
    i64 i0, nq, j0, nk, c0, c1;
    i64 shift;   /* query i is aligned with key i + shift */
    bool masked; /* some pair in it is */
} Tile;

/* One thread's scratch. */
typedef struct {
    real *q_t, *dout_t, *o_t; /* (D, BLOCK_Q); o_t: out^T or dq^T */
    real *q, *dout;           /* (BLOCK_Q, width) */
    real *k, *v, *dk, *dv;    /* (longest sk, width) */
    real *s, *ds;             /* (BLOCK_K, BLOCK_Q), S^T then P^T; dP^T then dS^T */
    real *max, *sum, *dlse;   /* (BLOCK_Q,); in the backward max: lse, sum: dout . out */
} Work;

static const i64 OPEN = (i64)1 << 40;

static inline Tensor as_dense(const Tensor *t) {
    Tensor view = {0};
    if (!t) return view;
    view = *t;
    if (t->ndim == 4) return view;
    view.ndim = 4, view.shape[0] = 1, view.stride[0] = 0;
    for (int d = 0; d < 3; d++) view.shape[d + 1] = t->shape[d], view.stride[d + 1] = t->stride[d];
    return view;
}

static inline const char *check_lengths(const Tensor *cu, i64 total, i64 bound, bool queries) {
    const int32_t *at = cu->data;
    i64 n = cu->shape[0];
    if (at[0] != 0)
        return queries ? "ValueError: cu_seqlens_q: expected 0 first"
                       : "ValueError: cu_seqlens_k: expected 0 first";
    for (i64 s = 1; s < n; s++) {
        if (at[s] < at[s - 1])
            return queries ? "ValueError: cu_seqlens_q: expected entries that never decrease"
                           : "ValueError: cu_seqlens_k: expected entries that never decrease";
        if (bound > 0 && at[s] - at[s - 1] > bound)
            return queries ? "ValueError: max_seqlen_q: a sequence of cu_seqlens_q is longer"
                           : "ValueError: max_seqlen_k: a sequence of cu_seqlens_k is longer";
    }
    if (at[n - 1] > total)
        return queries ? "ValueError: cu_seqlens_q: the last entry exceeds the rows of q"
                       : "ValueError: cu_seqlens_k: the last entry exceeds the rows of k";
    return NULL;
}

/* The sequences that are not empty. Rows of q (of k) that belong to none are one more sequence
 * without keys (without queries). */
static inline const char *find_sequences(Problem *p, const Tensor *cu_q, const Tensor *cu_k,
                                         i64 max_q, i64 max_k) {
    i64 B = p->q.shape[0], Sq = p->q.shape[1], Sk = p->k.shape[1];
    i64 most_sequences = cu_q ? cu_q->shape[0] + 1 : B;
    const char *error = cu_q ? check_lengths(cu_q, Sq, max_q, true) : NULL;
    if (cu_q && !error) error = check_lengths(cu_k, Sk, max_k, false);
    if (error) return error;
    p->sequences = calloc((size_t)most_sequences + 1, sizeof *p->sequences);
    if (!p->sequences) return "MemoryError: no memory for the list of sequences";
    if (!cu_q) {
        for (i64 b = 0; b < B; b++) p->sequences[b] = (Sequence){b, 0, Sq, 0, Sk};
        p->count = B;
        return NULL;
    }
    const int32_t *q = cu_q->data, *k = cu_k->data;
    i64 n = cu_q->shape[0] - 1;
    for (i64 s = 0; s < n; s++) {
        Sequence one = {0, q[s], q[s + 1] - q[s], k[s], k[s + 1] - k[s]};
        if (one.sq || one.sk) p->sequences[p->count++] = one;
    }
    if (q[n] < Sq) p->sequences[p->count++] = (Sequence){0, q[n], Sq - q[n], 0, 0};
    if (k[n] < Sk) p->sequences[p->count++] = (Sequence){0, 0, 0, k[n], Sk - k[n]};
    return NULL;
}

static inline void set_problem(Problem *p, const Tensor *q, const Tensor *k, const Tensor *v,
                               const Tensor *out, const Tensor *lse, double scale, i64 left,
                               i64 right, double softcap) {
    *p = (Problem){.q = as_dense(q), .k = as_dense(k), .v = as_dense(v), .out = as_dense(out)};
    p->lse = lse->data;
    p->left = left < 0 ? OPEN : least(left, OPEN);
    p->right = right < 0 ? OPEN : least(right, OPEN);
    p->scale = (real)scale, p->softcap = (real)softcap;
    p->Hq = p->q.shape[2], p->Hk = p->k.shape[2], p->D = p->q.shape[3];
    p->width = round_up(most(p->D, 1), LANES);
    p->threads = cpu_threads();
}

/* The keys that some query of i0 .. i0 + nq sees. */
static inline void key_range(const Problem *p, const Sequence *s, i64 i0, i64 nq, i64 *from,
                             i64 *to) {
    i64 shift = s->sk - s->sq;
    *from = most(0, i0 + shift - p->left);
    *to = least(s->sk, i0 + nq + shift + p->right);
}

/* The tile at key j0; false if no pair in it is visible. */
static inline bool make_tile(const Problem *p, const Sequence *s, i64 i0, i64 nq, i64 j0, i64 to,
                             Tile *t) {
    *t =
        (Tile){.i0 = i0, .nq = nq, .j0 = j0, .nk = least(BLOCK_K, to - j0), .shift = s->sk - s->sq};
    i64 first = j0 - t->shift - i0, last = first + t->nk - 1; /* columns on their diagonals */
    t->c0 = most(0, first - p->right) / LANES * LANES;
    t->c1 = round_up(least(nq, last + p->left + 1), LANES);
    t->masked = last - p->right > t->c0 || first + p->left < least(t->c1, nq) - 1;
    return t->c0 < t->c1;
}

/* The columns of the tile that see its key j: from .. to. */
INLINE void visible(const Problem *p, const Tile *t, i64 j, i64 *from, i64 *to) {
    i64 diagonal = t->j0 + j - t->shift - t->i0;
    *from = least(t->c1, most(t->c0, diagonal - p->right));
    *to = most(*from, least(t->c1, diagonal + p->left + 1));
}

static inline void fill_masked(const Problem *p, const Tile *t, real *tile, real value) {
    for (i64 j = 0; t->masked && j < t->nk; j++) {
        i64 from, to;
        visible(p, t, j, &from, &to);
        for (i64 i = t->c0; i < from; i++) tile[j * BLOCK_Q + i] = value;
        for (i64 i = to; i < t->c1; i++) tile[j * BLOCK_Q + i] = value;
    }
}

/* c[i ci + j cj + d cd] += tile[j, i] x[i xi + j xj + d] over the visible pairs alone. */
static inline void product_visible(const Problem *p, const Tile *t, real *c, i64 ci, i64 cj, i64 cd,
                                   const real *tile, const real *x, i64 xi, i64 xj) {
    for (i64 j = 0; j < t->nk; j++) {
        i64 from, to;
        visible(p, t, j, &from, &to);
        for (i64 i = from; i < least(to, t->nq); i++) {
            for (i64 d = 0; d < p->D; d++)
                c[i * ci + j * cj + d * cd] += tile[j * BLOCK_Q + i] * x[i * xi + j * xj + d];
        }
    }
}

/* o_t (D, BLOCK_Q) += x^T tile, where x (keys, width) is k or v. */
static inline void add_over_keys(const Problem *p, const Tile *t, real *o_t, const real *tile,
                                 const real *x) {
    if (t->masked && !all_finite(x, t->nk * p->width)) {
        product_visible(p, t, o_t, 1, 0, BLOCK_Q, tile, x, 0, p->width);
        return;
    }
    product(o_t + t->c0, BLOCK_Q, x, 1, p->width, tile + t->c0, BLOCK_Q, p->D, t->c1 - t->c0, t->nk,
            true);
}

/* c (keys, width) += tile x, where x (queries, width) is q or dout. */
static inline void add_over_queries(const Problem *p, const Tile *t, real *c, const real *tile,
                                    const real *x) {
    if (t->masked && !all_finite(x, t->nq * p->width)) {
        product_visible(p, t, c, 0, p->width, 1, tile, x, p->width, 0);
        return;
    }
    product(c, p->width, tile + t->c0, BLOCK_Q, 1, x + t->c0 * p->width, p->width, t->nk, p->width,
            least(t->c1, t->nq) - t->c0, true);
}

/* ---- Rows in and out ------------------------------------------------------------------------- */

/* rows (n, width), zeros beyond D, = scale * t[b, at .. at + n, h, :]. */
static inline void load_rows(const Problem *p, real *to, const Tensor *t, i64 b, i64 at, i64 h,
                             i64 n, real scale) {
    for (i64 r = 0; r < n; r++, to += p->width) {
        load(to, t, b * t->stride[0] + (at + r) * t->stride[1] + h * t->stride[2], p->D);
        if (scale != 1) {
            SIMD
            for (i64 d = 0; d < p->D; d++) to[d] *= scale;
        }
        for (i64 d = p->D; d < p->width; d++) to[d] = 0;
    }
}

static inline void load_keys(const Problem *p, const Sequence *s, i64 kv_head, i64 from, i64 to,
                             const Work *w) {
    i64 n = most(0, to - from), at = from * p->width;
    load_rows(p, w->k + at, &p->k, s->b, s->k0 + from, kv_head, n, 1);
    load_rows(p, w->v + at, &p->v, s->b, s->k0 + from, kv_head, n, 1);
}

static inline void store_row(const Problem *p, const Tensor *t, i64 b, i64 row, i64 h,
                             const real *from) {
    store(t, b * t->stride[0] + row * t->stride[1] + h * t->stride[2], from, p->D);
}

/* to (D, BLOCK_Q), zeros beyond column n, = rows (n, width)^T. */
static inline void transpose_rows(const Problem *p, real *restrict to, const real *restrict rows,
                                  i64 n) {
    if (n < BLOCK_Q) memset(to, 0, (size_t)(p->D * BLOCK_Q) * sizeof(real));
    for (i64 i = 0; i < n; i++) {
        for (i64 d = 0; d < p->D; d++) to[d * BLOCK_Q + i] = rows[i * p->width + d];
    }
}

/* t[b, row .. row + n, h, :] = the columns of o_t, each times its factor. */
static inline void store_transposed(const Problem *p, const Tensor *t, i64 b, i64 row, i64 h, i64 n,
                                    const real *o_t, const real *factor, real *scratch) {
    for (i64 i = 0; i < n; i++) {
        for (i64 d = 0; d < p->D; d++) scratch[d] = o_t[d * BLOCK_Q + i] * factor[i];
        store_row(p, t, b, row + i, h, scratch);
    }
}

static inline void scores(const Problem *p, const Tile *t, const Work *w) {
    i64 n = t->c1 - t->c0;
    product(w->s + t->c0, BLOCK_Q, w->k + t->j0 * p->width, p->width, 1, w->q_t + t->c0, BLOCK_Q,
            t->nk, n, p->D, false);
    if (p->softcap == 0) return;
    real cap = p->softcap, inverse = 1 / cap;
    for (i64 j = 0; j < t->nk; j++) {
        real *s = w->s + j * BLOCK_Q + t->c0;
        SIMD
        for (i64 i = 0; i < n; i++) s[i] = cap * vtanh(s[i] * inverse);
    }
}

/* Scratch for every thread in one allocation; NULL where it would be too much, even to count. */
static inline Work *make_work(const Problem *p, bool backward) {
    i64 longest = 0, threads = p->threads;
    for (i64 s = 0; s < p->count; s++) longest = most(longest, p->sequences[s].sk);
    i64 D = most(p->D, 1), width = p->width, sums = backward ? longest : 0;
    const i64 shape[][2] = {
        {D, BLOCK_Q},       {D, BLOCK_Q},     {D, BLOCK_Q},  {BLOCK_Q, width}, {BLOCK_Q, width},
        {longest, width},   {longest, width}, {sums, width}, {sums, width},    {BLOCK_K, BLOCK_Q},
        {BLOCK_K, BLOCK_Q}, {1, BLOCK_Q},     {1, BLOCK_Q},  {1, BLOCK_Q}};
    enum { PARTS = sizeof shape / sizeof *shape };
    i64 size[PARTS], head = round_up((i64)sizeof(Work) * threads, 64), each = 0, bytes;
    bool overflow = false;
    for (int i = 0; i < PARTS; i++) {
        overflow |= __builtin_mul_overflow(shape[i][0], shape[i][1], &size[i]);
        overflow |= __builtin_add_overflow(each, size[i], &each);
    }
    overflow |= __builtin_mul_overflow(each, threads * (i64)sizeof(real), &bytes);
    overflow |= __builtin_add_overflow(bytes, head + 63, &bytes);
    char *memory = overflow ? NULL : aligned_alloc(64, (size_t)(bytes / 64 * 64));
    if (!memory) return NULL;
    real *at = (real *)(memory + head);
    for (i64 n = 0; n < threads; n++) {
        Work *w = (Work *)memory + n;
        real **const part[PARTS] = {&w->q_t, &w->dout_t, &w->o_t, &w->q,   &w->dout,
                                    &w->k,   &w->v,      &w->dk,  &w->dv,  &w->s,
                                    &w->ds,  &w->max,    &w->sum, &w->dlse};
        for (int i = 0; i < PARTS; i++) *part[i] = at, at += size[i];
    }
    return (Work *)memory;
}

#endif
