/* rms_norm.c: RMSNorm, and RMSNorm of a sum (formulas: ops.h). */
#include "cpu.h"

static void norm_row(Tensor *y, const Tensor *x, const Tensor *w, int64_t row, real r,
                     double offset) {
    int64_t H = last_dim(x), from = row_start(x, row), to = row_start(y, row);
    for (int64_t h = 0; h < H; h += STRIP) {
        int64_t n = least(H - h, STRIP);
        real v[STRIP], weight[STRIP];
        load(v, x, from + h, n);
        load(weight, w, h, n);
        normalize(v, n, r, x->dtype, offset);
        SIMD
        for (int64_t i = 0; i < n; i++) v[i] *= weight[i] + (real)offset;
        store(y, to + h, v, n);
    }
}

const char *CPU(rms_norm_fwd)(Tensor *y, Tensor *rstd, const Tensor *x, const Tensor *w, double eps,
                              double offset, void *stream) {
    (void)stream;
    int64_t N = rows(x);
    PARALLEL
    for (int64_t row = 0; row < N; row++) {
        real r = row_rstd(x, row, eps);
        norm_row(y, x, w, row, r, offset);
        if (rstd) store(rstd, row, &r, 1);
    }
    return NULL;
}

const char *CPU(add_rms_norm_fwd)(Tensor *y, Tensor *s, Tensor *rstd, const Tensor *x,
                                  const Tensor *r, const Tensor *w, double eps, double offset,
                                  void *stream) {
    (void)stream;
    int64_t N = rows(x), H = last_dim(x);
    PARALLEL
    for (int64_t row = 0; row < N; row++) {
        int64_t xs = row_start(x, row), rs = row_start(r, row), ss = row_start(s, row);
        for (int64_t h = 0; h < H; h += STRIP) {
            int64_t n = least(H - h, STRIP);
            real v[STRIP], residual[STRIP];
            load(v, x, xs + h, n);
            load(residual, r, rs + h, n);
            SIMD
            for (int64_t i = 0; i < n; i++) v[i] += residual[i];
            store(s, ss + h, v, n);
        }
        real scale = row_rstd(s, row, eps);
        norm_row(y, s, w, row, scale, offset);
        if (rstd) store(rstd, row, &scale, 1);
    }
    return NULL;
}

/* dx of one row, and its dy * xhat added to the partial sum `dw` (NULL for a frozen weight). */
static void bwd_row(Tensor *dx, real *dw, const Tensor *dy, const Tensor *ds, const Tensor *x,
                    const Tensor *w, real r, double offset, int64_t row) {
    int64_t H = last_dim(x), xs = row_start(x, row), dys = row_start(dy, row);
    int64_t dxs = row_start(dx, row), dss = ds ? row_start(ds, row) : 0;
    real v[STRIP], g[STRIP], weight[STRIP];
    double dot = 0;
    for (int64_t h = 0; h < H; h += STRIP) {
        int64_t n = least(H - h, STRIP);
        load(v, x, xs + h, n);
        load(g, dy, dys + h, n);
        load(weight, w, h, n);
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < n; i++)
            dot += (double)(g[i] * (weight[i] + (real)offset)) * (v[i] * r);
        if (!dw) continue;
        normalize(v, n, r, x->dtype, offset);
        SIMD
        for (int64_t i = 0; i < n; i++) dw[h + i] += g[i] * v[i];
    }
    real mean = (real)(dot / (double)H);
    for (int64_t h = 0; h < H; h += STRIP) {
        int64_t n = least(H - h, STRIP);
        real residual[STRIP] = {0};
        load(v, x, xs + h, n);
        load(g, dy, dys + h, n);
        load(weight, w, h, n);
        if (ds) load(residual, ds, dss + h, n);
        SIMD
        for (int64_t i = 0; i < n; i++)
            v[i] = r * (g[i] * (weight[i] + (real)offset) - v[i] * r * mean) + residual[i];
        store(dx, dxs + h, v, n);
    }
}

static const char *bwd(Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy,
                       const Tensor *ds, const Tensor *x, const Tensor *w, const Tensor *rstd,
                       double offset) {
    /* Rows in P blocks, a partial sum each: P alone decides the order of the sums. */
    int64_t N = rows(x), H = last_dim(x), P = dw ? dw_partial->shape[0] : 64;
    int64_t block = (N + P - 1) / P;
    PARALLEL
    for (int64_t p = 0; p < P; p++) {
        real *partial = dw ? (real *)dw_partial->data + p * H : NULL;
        if (partial) memset(partial, 0, (size_t)H * sizeof(real));
        for (int64_t row = p * block; row < N && row < (p + 1) * block; row++)
            bwd_row(dx, partial, dy, ds, x, w, ((const real *)rstd->data)[row], offset, row);
    }
    if (dw) sum_partials(dw, dw_partial);
    return NULL;
}

const char *CPU(rms_norm_bwd)(Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy,
                              const Tensor *x, const Tensor *w, const Tensor *rstd, double offset,
                              void *stream) {
    (void)stream;
    return bwd(dx, dw, dw_partial, dy, NULL, x, w, rstd, offset);
}

const char *CPU(add_rms_norm_bwd)(Tensor *dx, Tensor *dw, Tensor *dw_partial, const Tensor *dy,
                                  const Tensor *ds, const Tensor *s, const Tensor *w,
                                  const Tensor *rstd, double offset, void *stream) {
    (void)stream;
    return bwd(dx, dw, dw_partial, dy, ds, s, w, rstd, offset);
}
