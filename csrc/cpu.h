/* cpu.h: what the CPU ops share. Every csrc/<op>.c that includes this is compiled once in float
 * for each instruction set (data F32, BF16, F16) and once in double (data F64): `real` is the
 * type that arithmetic runs in, CPU(name) the symbol of this compilation. */
#ifndef FLATOUT_CPU_H
#define FLATOUT_CPU_H

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "ops.h"

int cpu_threads(void); /* 1 in a forked child: libgomp's threads do not survive fork() */
void cpu_set_threads(int count);
void cpu_set_serial(bool on); /* for the ops of this thread: too small for more than one */
int cpu_level(void); /* 0 plain, 1 AVX2, 2 AVX-512: the best that was compiled and runs here */
void cpu_init(void);

static inline int64_t last_dim(const Tensor *t) { return t->shape[t->ndim - 1]; }

/* The number of rows: the product of all dimensions but the last. */
static inline int64_t rows(const Tensor *t) {
    int64_t n = 1;
    for (int d = 0; d < t->ndim - 1; d++) n *= t->shape[d];
    return n;
}

static inline int64_t elements(const Tensor *t) {
    int64_t n = 1;
    for (int d = 0; d < t->ndim; d++) n *= t->shape[d];
    return n;
}

static inline int64_t item_size(Dtype dtype) {
    static const int8_t size[] = {
        [F32] = 4, [BF16] = 2, [F16] = 2, [F64] = 8, [I32] = 4, [I64] = 8, [U8] = 1, [BOOL] = 1};
    return size[dtype];
}

#ifdef VARIANT
#define CPU_CAT2(name, variant) name##_cpu_##variant
#define CPU_CAT(name, variant) CPU_CAT2(name, variant)
#define CPU(name) CPU_CAT(name, VARIANT)

#ifdef REAL_IS_DOUBLE
typedef double real;
#define REAL_DTYPE F64
#define REAL(function) function
#else
typedef float real;
#define REAL_DTYPE F32
#define REAL(function) function##f
#endif

/* A loop whose iterations write disjoint outputs; the result is the same for any thread count. */
#define PARALLEL _Pragma("omp parallel for schedule(static) num_threads(cpu_threads())")
#define SIMD _Pragma("omp simd")

/* Rows are worked on in strips on the stack, so that no op needs memory of its own. */
enum { STRIP = 512 };

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

static inline uint16_t float_to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
    return (uint16_t)((bits & 0x7fffffff) <= 0x7f800000 ? rounded : (bits >> 16 | 0x40));
}

static inline float f16_to_float(uint16_t bits) {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, rest = (uint32_t)(bits & 0x7fff) << 13;
    uint32_t wide = rest + (112u << 23);            /* the bias: 15 -> 127 */
    uint32_t top = rest + (224u << 23);             /* infinity, NaN */
    float tiny = (float)(bits & 0x7fff) * 0x1p-24f; /* subnormals are multiples of 2^-24 */
    uint32_t tiny_bits;
    memcpy(&tiny_bits, &tiny, 4);
    uint32_t out = sign | (rest >= 31u << 23 ? top : rest < 1u << 23 ? tiny_bits : wide);
    float value;
    memcpy(&value, &out, 4);
    return value;
}

static inline uint16_t float_to_f16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t normal = (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13;
    float magnitude;
    memcpy(&magnitude, &rest, 4);
    float shifted = magnitude + 0.5f; /* the sum's last bit is 2^-24: the FPU rounds subnormals */
    uint32_t shifted_bits;
    memcpy(&shifted_bits, &shifted, 4);
    uint32_t tiny = shifted_bits - 0x3f000000u;
    uint32_t out = rest > 0x7f800000u    ? 0x7e00u
                   : rest >= 0x477ff000u ? 0x7c00u /* 65520 and more round to infinity */
                   : rest < 0x38800000u  ? tiny
                                         : normal;
    return (uint16_t)(sign | out);
}

/* Element `at` .. `at + n` of t's memory (any dtype) -> reals. */
static inline void load(real *restrict out, const Tensor *t, int64_t at, int64_t n) {
    if (t->dtype == BF16) {
        const uint16_t *in = (const uint16_t *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = (real)bf16_to_float(in[i]);
    } else if (t->dtype == F16) {
        const uint16_t *in = (const uint16_t *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = (real)f16_to_float(in[i]);
    } else if (t->dtype == F32) {
        const float *in = (const float *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = (real)in[i];
    } else {
        const double *in = (const double *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = (real)in[i];
    }
}

/* Reals -> t's dtype, rounded to nearest even. */
static inline void store(const Tensor *t, int64_t at, const real *restrict in, int64_t n) {
    if (t->dtype == BF16) {
        uint16_t *out = (uint16_t *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = float_to_bf16((float)in[i]);
    } else if (t->dtype == F16) {
        uint16_t *out = (uint16_t *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = float_to_f16((float)in[i]);
    } else if (t->dtype == F32) {
        float *out = (float *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = (float)in[i];
    } else {
        double *out = (double *)t->data + at;
        SIMD
        for (int64_t i = 0; i < n; i++) out[i] = (double)in[i];
    }
}

/* The same without a copy where t's elements are reals already: `buffer` or t's own memory. */
static inline const real *load_or_view(real *buffer, const Tensor *t, int64_t at, int64_t n) {
    if (t->dtype == REAL_DTYPE) return (const real *)t->data + at;
    load(buffer, t, at, n);
    return buffer;
}

/* The value that a tensor of this dtype would hold. */
static inline void round_to(Dtype dtype, real *v, int64_t n) {
    if (dtype == BF16) {
        SIMD
        for (int64_t i = 0; i < n; i++) v[i] = (real)bf16_to_float(float_to_bf16((float)v[i]));
    } else if (dtype == F16) {
        SIMD
        for (int64_t i = 0; i < n; i++) v[i] = (real)f16_to_float(float_to_f16((float)v[i]));
    }
}

/* Where row n begins, in elements, for any strides. */
static inline int64_t row_start(const Tensor *t, int64_t n) {
    int64_t at = 0;
    for (int d = t->ndim - 2; d >= 0; d--) {
        at += n % t->shape[d] * t->stride[d];
        n /= t->shape[d];
    }
    return at;
}

#ifndef REAL_IS_DOUBLE
/* e^r of r = x - n ln2, |r| <= ln2 / 2, by a polynomial (Cephes' expf): e^x = 2^n e^r. */
static inline float exp_reduced(float x, float n) {
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * r * r + r + 1.0f;
}
#endif

/* exp for a vectorized loop: 1 ulp or so; exp(-inf) = 0, NaN stays NaN, no overflow trap. */
static inline real vexp(real x) {
#ifdef REAL_IS_DOUBLE
    return exp(x);
#else
    float clamped = x > 88.72f ? 88.72f : x < -87.33f ? -87.33f : x;
    float n = (clamped * 1.44269504f + 12582912.0f) - 12582912.0f;
    float p = exp_reduced(clamped, n);
    /* 2^n in two steps, so that n = 128 does not overflow on the way. */
    int32_t half = (int32_t)n >> 1, other = (int32_t)n - half;
    uint32_t a = (uint32_t)(half + 127) << 23, b = (uint32_t)(other + 127) << 23;
    float scale_a, scale_b;
    memcpy(&scale_a, &a, 4);
    memcpy(&scale_b, &b, 4);
    float y = p * scale_a * scale_b;
    y = x > 88.72f ? INFINITY : x < -87.33f ? 0.0f : y;
    return x != x ? x : y;
#endif
}

/* tanh for a vectorized loop: 2 ulp or so. */
static inline real vtanh(real x) {
#ifdef REAL_IS_DOUBLE
    return tanh(x);
#else
    /* Small |x| by an odd polynomial (Cephes' tanhf), the others by exp. */
    float a = fabsf(x), s = x * x;
    float p = -5.70498872745e-3f;
    p = p * s + 2.06390887954e-2f;
    p = p * s - 5.37397155531e-2f;
    p = p * s + 1.33314422036e-1f;
    p = p * s - 3.33332819422e-1f;
    float large = copysignf(1.0f - 2.0f / (vexp(2.0f * a) + 1.0f), x);
    float y = a < 0.625f ? p * s * x + x : large;
    return x != x ? x : y;
#endif
}

/* ---- What the norms share -------------------------------------------------------------------- */

/* sum_h v_h^2 of a strip, in double: the statistics are exact to float's last bit. */
static inline double sum_squares(const real *v, int64_t n) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += (double)v[i] * v[i];
    return sum;
}

/* xhat = round(x * rstd), or without the rounding for Gemma's offset form. */
static inline void normalize(real *v, int64_t n, real r, Dtype dtype, double offset) {
    SIMD
    for (int64_t i = 0; i < n; i++) v[i] *= r;
    if (offset == 0) round_to(dtype, v, n);
}

/* 1 / sqrt(mean x^2 + eps) of one row. */
static inline real row_rstd(const Tensor *x, int64_t row, double eps) {
    int64_t H = last_dim(x), at = row_start(x, row);
    double sum = 0;
    for (int64_t h = 0; h < H; h += STRIP) {
        int64_t n = least(H - h, STRIP);
        real v[STRIP];
        sum += sum_squares(load_or_view(v, x, at + h, n), n);
    }
    return (real)(1.0 / sqrt(sum / (double)H + eps));
}

/* dw = the partial sums, added in their order. */
static inline void sum_partials(Tensor *dw, const Tensor *partial) {
    int64_t P = partial->shape[0], H = last_dim(partial);
    PARALLEL
    for (int64_t h = 0; h < H; h += STRIP) {
        int64_t n = least(H - h, STRIP);
        real sum[STRIP] = {0};
        for (int64_t p = 0; p < P; p++) {
            const real *part = (const real *)partial->data + p * H + h;
            SIMD
            for (int64_t i = 0; i < n; i++) sum[i] += part[i];
        }
        store(dw, h, sum, n);
    }
}

#endif
#endif
