/* matmul.c: the CPU matrix product (see matmul.h), after Goto and van de Geijn, "Anatomy of
 * high-performance matrix multiplication" (2008): a KC x NC block of b is packed for the L2 cache,
 * an MC x KC block of a beside it, and a microkernel keeps MR x NR sums in registers. */
#include "matmul.h"

#include <omp.h>

#if defined(__AVX512F__)
enum { VEC_BYTES = 64, MR = 12 };
#elif defined(__AVX2__)
enum { VEC_BYTES = 32, MR = 6 };
#else
enum { VEC_BYTES = 16, MR = 4 };
#endif

typedef real vec __attribute__((vector_size(VEC_BYTES)));
typedef real loose __attribute__((vector_size(VEC_BYTES), aligned(sizeof(real))));

enum {
    LANES = VEC_BYTES / sizeof(real),
    NR = 2 * LANES,
    KC = 256,
    MC = 96,                       /* a multiple of every MR */
    NC = 2048 / (int)sizeof(real), /* a multiple of every NR */
    TILE_M = 2 * MC,
};

/* One thread's scratch: on the heap, for a thread's stack may be smaller than this. */
typedef struct {
    real a[MC * KC], b[KC * NC]; /* packed */
    real sums[TILE_M * NC];      /* a tile of c, where c's elements are no reals */
} __attribute__((aligned(64))) Work;

typedef real quad __attribute__((vector_size(4 * sizeof(real)), aligned(sizeof(real))));
#ifdef __clang__
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#elif defined(REAL_IS_DOUBLE)
typedef int64_t lanes __attribute__((vector_size(4 * sizeof(real))));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#else
typedef int32_t lanes __attribute__((vector_size(4 * sizeof(real))));
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

/* Four rows of `in`, `depth` long and `step` apart, to four columns of `out`, R apart. */
static inline void turn_four(real *restrict out, int R, const real *restrict in, int64_t step,
                             int64_t depth) {
    int64_t p = 0;
    for (; p + 4 <= depth; p += 4, in += 4, out += 4 * R) {
        quad a = *(const quad *)in, b = *(const quad *)(in + step);
        quad c = *(const quad *)(in + 2 * step), d = *(const quad *)(in + 3 * step);
        quad ab = PICK(a, b, 0, 4, 1, 5);
        quad cd = PICK(c, d, 0, 4, 1, 5);
        quad ba = PICK(a, b, 2, 6, 3, 7);
        quad dc = PICK(c, d, 2, 6, 3, 7);
        *(quad *)out = PICK(ab, cd, 0, 1, 4, 5);
        *(quad *)(out + R) = PICK(ab, cd, 2, 3, 6, 7);
        *(quad *)(out + 2 * R) = PICK(ba, dc, 0, 1, 4, 5);
        *(quad *)(out + 3 * R) = PICK(ba, dc, 2, 3, 6, 7);
    }
    for (; p < depth; p++, in++, out += R)
        for (int r = 0; r < 4; r++) out[r] = in[r * step];
}

/* `used` rows with contiguous columns to one panel. */
static inline void pack_rows(real *restrict out, const Tensor *m, int64_t at, int used,
                             int64_t depth, int R) {
    real converted[4 * KC];
    for (int r = 0; r < used; r += 4, at += 4 * m->stride[0]) {
        int count = used - r < 4 ? used - r : 4;
        const real *in = (const real *)m->data + at;
        int64_t step = m->stride[0];
        if (m->dtype != REAL_DTYPE) {
            for (int i = 0; i < count; i++) load(converted + i * KC, m, at + i * step, depth);
            in = converted, step = KC;
        }
        if (count == 4) {
            turn_four(out + r, R, in, step, depth);
        } else {
            for (int i = 0; i < count; i++)
                for (int64_t p = 0; p < depth; p++) out[p * R + r + i] = in[i * step + p];
        }
    }
}

/* out[i / R][p][i % R] = m[i0 + i, p0 + p], zeros beyond `count` rows: panels of R rows that the
 * microkernel reads front to back. */
static inline void pack(real *restrict out, const Tensor *m, int64_t i0, int64_t count, int64_t p0,
                        int64_t depth, int R) {
    for (int64_t i = 0; i < count; i += R, out += depth * R) {
        int used = count - i < R ? (int)(count - i) : R;
        int64_t at = (i0 + i) * m->stride[0] + p0 * m->stride[1];
        if (used < R) memset(out, 0, (size_t)(depth * R) * sizeof(real));
        if (m->stride[1] == 1 && m->stride[0] != 1) {
            pack_rows(out, m, at, used, depth, R);
        } else if (m->stride[0] == 1 && used == R) { /* a constant length: it matters */
            for (int64_t p = 0; p < depth; p++) load(out + p * R, m, at + p * m->stride[1], R);
        } else if (m->stride[0] == 1) {
            for (int64_t p = 0; p < depth; p++) load(out + p * R, m, at + p * m->stride[1], used);
        } else {
            for (int64_t p = 0; p < depth; p++)
                for (int r = 0; r < used; r++)
                    load(out + p * R + r, m, at + r * m->stride[0] + p * m->stride[1], 1);
        }
    }
}

/* c (MR, NR) = or += one panel of a times one panel of b. */
static inline void microkernel(real *c, int64_t ldc, const real *restrict a, const real *restrict b,
                               int64_t depth, bool add) {
    vec sum[MR][2] = {0};
    for (int64_t p = 0; p < depth; p++, a += MR, b += NR) {
        vec left = *(const loose *)b, right = *(const loose *)(b + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            sum[r][0] += a[r] * left;
            sum[r][1] += a[r] * right;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++) {
        loose *to = (loose *)(c + r * ldc), *on = (loose *)(c + r * ldc + LANES);
        *to = add ? *to + sum[r][0] : sum[r][0];
        *on = add ? *on + sum[r][1] : sum[r][1];
    }
}

/* The same for a corner of rows x columns: full arithmetic, a partial store. */
static void corner(real *c, int64_t ldc, const real *a, const real *b, int64_t depth, bool add,
                   int64_t rows, int64_t columns) {
    real full[MR * NR];
    microkernel(full, NR, a, b, depth, false);
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < columns; j++)
            c[i * ldc + j] = add ? c[i * ldc + j] + full[i * NR + j] : full[i * NR + j];
    }
}

/* c (m, n) = or += packed a (m, depth) times packed b (depth, n). */
static void multiply_block(real *c, int64_t ldc, const real *a, const real *b, int64_t m, int64_t n,
                           int64_t depth, bool add) {
    for (int64_t j = 0; j < n; j += NR) {
        for (int64_t i = 0; i < m; i += MR) {
            int64_t rows = m - i < MR ? m - i : MR, columns = n - j < NR ? n - j : NR;
            if (rows == MR && columns == NR)
                microkernel(c + i * ldc + j, ldc, a + i * depth, b + j * depth, depth, add);
            else
                corner(c + i * ldc + j, ldc, a + i * depth, b + j * depth, depth, add, rows,
                       columns);
        }
    }
}

/* c (m, n) = or += a[i0 .., :] bt[j0 .., :]^T. */
static void multiply(Work *w, real *c, int64_t ldc, const Tensor *a, int64_t i0, int64_t m,
                     const Tensor *bt, int64_t j0, int64_t n, bool add) {
    int64_t k = a->shape[1];
    for (int64_t j = 0; j < n; j += NC) {
        int64_t columns = least(n - j, NC);
        for (int64_t p = 0; p < k; p += KC) {
            int64_t depth = least(k - p, KC);
            pack(w->b, bt, j0 + j, columns, p, depth, NR);
            for (int64_t i = 0; i < m; i += MC) {
                int64_t rows = least(m - i, MC);
                pack(w->a, a, i0 + i, rows, p, depth, MR);
                multiply_block(c + i * ldc + j, ldc, w->a, w->b, rows, columns, depth,
                               add || p > 0);
            }
        }
        for (int64_t i = 0; i < m && k == 0 && !add; i++)
            memset(c + i * ldc + j, 0, (size_t)columns * sizeof(real));
    }
}

/* Row by row: c = round(sums + bias (+ c)); sums may be c itself. */
static void finish_tile(const Tensor *c, const Tensor *bias, int beta, const real *sums, int64_t ld,
                        int64_t i0, int64_t m, int64_t j0, int64_t n) {
    real row[NC], add[NC];
    for (int64_t i = 0; i < m; i++) {
        int64_t at = (i0 + i) * c->stride[0] + j0;
        memcpy(row, sums + i * ld, (size_t)n * sizeof(real));
        if (bias) {
            load(add, bias, j0, n);
            SIMD
            for (int64_t j = 0; j < n; j++) row[j] += add[j];
        }
        if (beta) {
            load(add, c, at, n);
            SIMD
            for (int64_t j = 0; j < n; j++) row[j] += add[j];
        }
        store(c, at, row, n);
    }
}

/* One tile of matmul's c. Where c's elements are reals the sums need no other place. */
static void matmul_tile(Work *w, const Tensor *c, const Tensor *a, const Tensor *bt,
                        const Tensor *bias, int beta, int64_t i0, int64_t m, int64_t j0) {
    int64_t n = least(c->shape[1] - j0, NC);
    if (c->dtype == REAL_DTYPE) {
        real *to = (real *)c->data + i0 * c->stride[0] + j0;
        multiply(w, to, c->stride[0], a, i0, m, bt, j0, n, beta);
        if (bias) finish_tile(c, bias, /*beta=*/0, to, c->stride[0], i0, m, j0, n);
    } else {
        multiply(w, w->sums, NC, a, i0, m, bt, j0, n, false);
        finish_tile(c, bias, beta, w->sums, NC, i0, m, j0, n);
    }
}

const char *CPU(matmul)(const Tensor *c, const Tensor *a, const Tensor *b, const Tensor *bias,
                        int beta) {
    Tensor bt = transpose(b);
    int threads = cpu_threads();
    /* At least a tile per thread, of full panels: the result depends on no choice made here. */
    int64_t m = c->shape[0], across = (c->shape[1] + NC - 1) / NC;
    int64_t wanted = across ? (threads + across - 1) / across : 1;
    int64_t most = c->dtype == REAL_DTYPE ? 8 * MC : TILE_M;
    int64_t height = ((m + wanted - 1) / wanted + MR - 1) / MR * MR;
    if (height > most) height = most;
    int64_t down = height ? (m + height - 1) / height : 0;
    if (threads > down * across) threads = (int)(down * across);
    if (threads == 0) return NULL;
    Work *work = aligned_alloc(64, (size_t)threads * sizeof *work);
    if (!work) return "MemoryError: no memory for the tiles of a matrix product";
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t tile = 0; tile < down * across; tile++) {
        int64_t i = tile / across * height, j = tile % across * NC;
        int64_t rows = least(m - i, height);
        matmul_tile(&work[omp_get_thread_num()], c, a, &bt, bias, beta, i, rows, j);
    }
    free(work);
    return NULL;
}
