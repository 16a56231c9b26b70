/* swiglu.c: silu(gate) * up (formulas: ops.h). */
#include "cpu.h"

/* Where strip number `strip` begins: its row, its first column, and its length. */
typedef struct {
    int64_t row, from, n;
} Strip;

static int64_t strips(const Tensor *t) { return (last_dim(t) + STRIP - 1) / STRIP; }

static Strip strip_of(const Tensor *t, int64_t strip) {
    int64_t per_row = strips(t), from = strip % per_row * STRIP;
    int64_t left = last_dim(t) - from;
    return (Strip){strip / per_row, from, least(left, STRIP)};
}

static const real *view_strip(real *buffer, const Tensor *t, Strip s) {
    return load_or_view(buffer, t, row_start(t, s.row) + s.from, s.n);
}

static void store_strip(const Tensor *t, Strip s, const real *v) {
    store(t, row_start(t, s.row) + s.from, v, s.n);
}

const char *CPU(swiglu_fwd)(Tensor *y, const Tensor *gate, const Tensor *up, void *stream) {
    (void)stream;
    int64_t count = rows(gate) * strips(gate);
    PARALLEL
    for (int64_t i = 0; i < count; i++) {
        Strip s = strip_of(gate, i);
        real buffer[2][STRIP], silu[STRIP];
        const real *g = view_strip(buffer[0], gate, s), *u = view_strip(buffer[1], up, s);
        SIMD
        for (int64_t j = 0; j < s.n; j++) silu[j] = g[j] / (1 + vexp(-g[j]));
        round_to(gate->dtype, silu, s.n);
        SIMD
        for (int64_t j = 0; j < s.n; j++) silu[j] *= u[j];
        store_strip(y, s, silu);
    }
    return NULL;
}

const char *CPU(swiglu_bwd)(Tensor *dgate, Tensor *dup, const Tensor *dy, const Tensor *gate,
                            const Tensor *up, void *stream) {
    (void)stream;
    int64_t count = rows(gate) * strips(gate);
    PARALLEL
    for (int64_t i = 0; i < count; i++) {
        Strip s = strip_of(gate, i);
        real buffer[3][STRIP], dg[STRIP], silu[STRIP];
        const real *g = view_strip(buffer[0], gate, s), *u = view_strip(buffer[1], up, s);
        const real *d = view_strip(buffer[2], dy, s);
        SIMD
        for (int64_t j = 0; j < s.n; j++) {
            real sigmoid = 1 / (1 + vexp(-g[j]));
            silu[j] = g[j] / (1 + vexp(-g[j]));
            dg[j] = d[j] * u[j] * sigmoid * (1 + g[j] * (1 - sigmoid));
        }
        round_to(gate->dtype, silu, s.n);
        SIMD
        for (int64_t j = 0; j < s.n; j++) silu[j] *= d[j];
        store_strip(dgate, s, dg);
        store_strip(dup, s, silu);
    }
    return NULL;
}
