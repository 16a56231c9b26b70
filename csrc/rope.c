/* rope.c: rotary embedding, alone and after a per-head RMSNorm (formulas: ops.h). */
#include "cpu.h"

/* A strip of the tables of one position: cos and sin of both halves of a head. */
typedef struct {
    const Tensor *cos, *sin;
    bool transpose; /* the backward's rotation: sin's halves swapped and negated */
    int64_t token, from, n;
    real c1[STRIP], s1[STRIP], c2[STRIP], s2[STRIP];
} Table;

/* Column `from` .. of token's tables, kept while the heads of one token pass by. */
static void want_table(Table *t, int64_t token, int64_t from) {
    int64_t half = last_dim(t->cos) / 2, n = least(half - from, STRIP);
    if (t->token == token && t->from == from) return;
    t->token = token, t->from = from, t->n = n;
    int64_t c = row_start(t->cos, token) + from, s = row_start(t->sin, token) + from;
    load(t->c1, t->cos, c, n);
    load(t->c2, t->cos, c + half, n);
    load(t->transpose ? t->s2 : t->s1, t->sin, s, n);
    load(t->transpose ? t->s1 : t->s2, t->sin, s + half, n);
    if (!t->transpose) return;
    SIMD
    for (int64_t i = 0; i < n; i++) t->s1[i] = -t->s1[i], t->s2[i] = -t->s2[i];
}

/* Both halves of a head's strip, rotated in place. */
static void rotate(const Table *t, real *restrict x1, real *restrict x2) {
    SIMD
    for (int64_t i = 0; i < t->n; i++) {
        real a = x1[i], b = x2[i];
        x1[i] = a * t->c1[i] - b * t->s1[i];
        x2[i] = b * t->c2[i] + a * t->s2[i];
    }
}

/* Where the heads of a token begin; head h is h * stride[2] further on. */
static int64_t token_start(const Tensor *x, int64_t token) {
    return token / x->shape[1] * x->stride[0] + token % x->shape[1] * x->stride[1];
}

/* ---- Rotation alone -------------------------------------------------------------------------- */

static void rotate_token(Tensor *out, const Tensor *x, Table *t, int64_t token) {
    int64_t half = last_dim(x) / 2, in = token_start(x, token), to = token_start(out, token);
    for (int64_t h = 0; h < x->shape[2]; h++) {
        for (int64_t from = 0; from < half; from += STRIP) {
            real x1[STRIP], x2[STRIP];
            want_table(t, token, from);
            load(x1, x, in + from, t->n);
            load(x2, x, in + half + from, t->n);
            rotate(t, x1, x2);
            store(out, to + from, x1, t->n);
            store(out, to + half + from, x2, t->n);
        }
        in += x->stride[2], to += out->stride[2];
    }
}

static void rotate_all(Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k,
                       const Tensor *cos, const Tensor *sin, bool transpose) {
    int64_t tokens = rows(cos);
    PARALLEL
    for (int64_t token = 0; token < tokens; token++) {
        Table t;
        t.cos = cos, t.sin = sin, t.transpose = transpose, t.token = -1;
        rotate_token(q_out, q, &t, token);
        if (k) rotate_token(k_out, k, &t, token);
    }
}

const char *CPU(rope_fwd)(Tensor *q_out, Tensor *k_out, const Tensor *q, const Tensor *k,
                          const Tensor *cos, const Tensor *sin, void *stream) {
    (void)stream;
    rotate_all(q_out, k_out, q, k, cos, sin, false);
    return NULL;
}

const char *CPU(rope_bwd)(Tensor *dq, Tensor *dk, const Tensor *dq_out, const Tensor *dk_out,
                          const Tensor *cos, const Tensor *sin, void *stream) {
    (void)stream;
    rotate_all(dq, dk, dq_out, dk_out, cos, sin, true);
    return NULL;
}

/* ---- RMSNorm of each head, then rotation ----------------------------------------------------- */

/* v = round(w * round(v * r)): rms_norm's two roundings. */
static void norm(real *v, const Tensor *w, int64_t from, int64_t n, real r, Dtype dtype) {
    real buffer[STRIP];
    const real *weight = load_or_view(buffer, w, from, n);
    normalize(v, n, r, dtype, 0);
    SIMD
    for (int64_t i = 0; i < n; i++) v[i] *= weight[i];
    round_to(dtype, v, n);
}

static void norm_rotate_token(Tensor *out, Tensor *rstd, const Tensor *x, const Tensor *w, Table *t,
                              double eps, int64_t token) {
    int64_t half = last_dim(x) / 2, in = token_start(x, token), to = token_start(out, token);
    for (int64_t h = 0; h < x->shape[2]; h++) {
        int64_t row = token * x->shape[2] + h;
        real r = row_rstd(x, row, eps);
        if (rstd) store(rstd, row, &r, 1);
        for (int64_t from = 0; from < half; from += STRIP) {
            real x1[STRIP], x2[STRIP];
            want_table(t, token, from);
            load(x1, x, in + from, t->n);
            load(x2, x, in + half + from, t->n);
            norm(x1, w, from, t->n, r, x->dtype);
            norm(x2, w, half + from, t->n, r, x->dtype);
            rotate(t, x1, x2);
            store(out, to + from, x1, t->n);
            store(out, to + half + from, x2, t->n);
        }
        in += x->stride[2], to += out->stride[2];
    }
}

const char *CPU(qk_norm_rope_fwd)(Tensor *q_out, Tensor *k_out, Tensor *q_rstd, Tensor *k_rstd,
                                  const Tensor *q, const Tensor *k, const Tensor *qw,
                                  const Tensor *kw, const Tensor *cos, const Tensor *sin,
                                  double eps, void *stream) {
    (void)stream;
    int64_t tokens = rows(cos);
    PARALLEL
    for (int64_t token = 0; token < tokens; token++) {
        Table t;
        t.cos = cos, t.sin = sin, t.transpose = false, t.token = -1;
        norm_rotate_token(q_out, q_rstd, q, qw, &t, eps, token);
        norm_rotate_token(k_out, k_rstd, k, kw, &t, eps, token);
    }
    return NULL;
}

/* One half of a head's strip in the norm's backward: dy, x -> g = dy * w, xhat = x * r. */
static double dot_half(real *dw, const real *dy, real *x, const Tensor *w, int64_t from, int64_t n,
                       real r, Dtype dtype) {
    real buffer[STRIP];
    const real *weight = load_or_view(buffer, w, from, n);
    double dot = 0;
    SIMD
    for (int64_t i = 0; i < n; i++) x[i] *= r;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < n; i++) dot += (double)(dy[i] * weight[i]) * x[i];
    if (!dw) return dot;
    round_to(dtype, x, n);
    SIMD
    for (int64_t i = 0; i < n; i++) dw[from + i] += dy[i] * x[i];
    return dot;
}

static void store_half(Tensor *dx, int64_t at, const real *dy, real *x, const Tensor *w,
                       int64_t from, int64_t n, real r, real mean) {
    real buffer[STRIP];
    const real *weight = load_or_view(buffer, w, from, n);
    SIMD
    for (int64_t i = 0; i < n; i++) x[i] = r * (dy[i] * weight[i] - x[i] * r * mean);
    store(dx, at, x, n);
}

/* What the norm's backward reads and writes, of q or of k. */
typedef struct {
    Tensor *dx;
    const Tensor *dout, *x, *w, *rstd;
} NormGradient;

static void norm_bwd_token(const NormGradient *g, real *dw, Table *t, int64_t token) {
    const Tensor *x = g->x;
    int64_t half = last_dim(x) / 2, at = token_start(x, token);
    int64_t from_out = token_start(g->dout, token), to = token_start(g->dx, token);
    for (int64_t h = 0; h < x->shape[2]; h++) {
        real r = ((const real *)g->rstd->data)[token * x->shape[2] + h], mean = 0;
        double dot = 0;
        for (int pass = 0; pass < 2; pass++) { /* the mean, then dx */
            for (int64_t from = 0; from < half; from += STRIP) {
                real d1[STRIP], d2[STRIP], x1[STRIP], x2[STRIP];
                want_table(t, token, from);
                load(d1, g->dout, from_out + from, t->n);
                load(d2, g->dout, from_out + half + from, t->n);
                rotate(t, d1, d2);
                load(x1, x, at + from, t->n);
                load(x2, x, at + half + from, t->n);
                if (pass == 0) {
                    dot += dot_half(dw, d1, x1, g->w, from, t->n, r, x->dtype);
                    dot += dot_half(dw, d2, x2, g->w, half + from, t->n, r, x->dtype);
                } else {
                    store_half(g->dx, to + from, d1, x1, g->w, from, t->n, r, mean);
                    store_half(g->dx, to + half + from, d2, x2, g->w, half + from, t->n, r, mean);
                }
            }
            mean = (real)(dot / (double)(2 * half));
        }
        at += x->stride[2], from_out += g->dout->stride[2], to += g->dx->stride[2];
    }
}

/* Tokens in P blocks, a partial sum each: P alone decides the order of the sums. */
static void norm_rope_bwd(const NormGradient *g, Tensor *dw, Tensor *partials, const Tensor *cos,
                          const Tensor *sin) {
    int64_t tokens = rows(cos), D = last_dim(g->x), P = dw ? partials->shape[0] : 64;
    int64_t block = (tokens + P - 1) / P;
    PARALLEL
    for (int64_t p = 0; p < P; p++) {
        real *partial = dw ? (real *)partials->data + p * D : NULL;
        if (partial) memset(partial, 0, (size_t)D * sizeof(real));
        Table t;
        t.cos = cos, t.sin = sin, t.transpose = true, t.token = -1;
        for (int64_t token = p * block; token < tokens && token < (p + 1) * block; token++)
            norm_bwd_token(g, partial, &t, token);
    }
    if (dw) sum_partials(dw, partials);
}

const char *CPU(qk_norm_rope_bwd)(Tensor *dq, Tensor *dk, Tensor *dqw, Tensor *dkw,
                                  Tensor *dqw_partial, Tensor *dkw_partial, const Tensor *dq_out,
                                  const Tensor *dk_out, const Tensor *q, const Tensor *k,
                                  const Tensor *qw, const Tensor *kw, const Tensor *q_rstd,
                                  const Tensor *k_rstd, const Tensor *cos, const Tensor *sin,
                                  void *stream) {
    (void)stream;
    norm_rope_bwd(&(NormGradient){dq, dq_out, q, qw, q_rstd}, dqw, dqw_partial, cos, sin);
    norm_rope_bwd(&(NormGradient){dk, dk_out, k, kw, k_rstd}, dkw, dkw_partial, cos, sin);
    return NULL;
}
