/* matmul.c: the CPU matrix product (see matmul.h), after Goto and van de Geijn, "Anatomy of
 * high-performance matrix multiplication" (2008): a KC x NC block of b is packed for the L2 cache,
 * an MC x KC block of a beside it, and a microkernel keeps MR x NR sums in registers. */
#pragma GCC optimize("fp-contract=fast") /* ISO C mode would not fuse a * b + c */
#include "matmul.h"

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
    NC = 1024 / (int)sizeof(real), /* a multiple of every NR */
    TILE_M = 2 * MC,
};

/* out[i / R][p][i % R] = m[i0 + i, p0 + p], zeros beyond `count` rows: panels of R rows that the
 * microkernel reads front to back. */
static inline void pack(real *restrict out, const Tensor *m, int64_t i0, int64_t count, int64_t p0,
                        int64_t depth, int R) {
    for (int64_t i = 0; i < count; i += R, out += depth * R) {
        int64_t used = count - i < R ? count - i : R;
        int64_t at = (i0 + i) * m->stride[0] + p0 * m->stride[1];
        if (used < R) memset(out, 0, (size_t)(depth * R) * sizeof(real));
        if (m->stride[0] == 1) {
            if (used == R)
                for (int64_t p = 0; p < depth; p++) load(out + p * R, m, at + p * m->stride[1], R);
            else
                for (int64_t p = 0; p < depth; p++)
                    load(out + p * R, m, at + p * m->stride[1], used);
        } else {
            real row[KC];
            for (int r = 0; r < used; r++, at += m->stride[0]) {
                if (m->stride[1] == 1) {
                    load(row, m, at, depth);
                } else {
                    for (int64_t p = 0; p < depth; p++) load(row + p, m, at + p * m->stride[1], 1);
                }
                for (int64_t p = 0; p < depth; p++) out[p * R + r] = row[p];
            }
        }
    }
}

/* c (MR, NR) = or += one panel of a times one panel of b. */
static inline void microkernel(real *c, int64_t ldc, const real *restrict a, const real *restrict b,
                               int64_t depth, bool add) {
    vec sum[MR][2] = {0};
    for (int64_t p = 0; p < depth; p++, a += MR, b += NR) {
        vec left = *(const loose *)b, right = *(const loose *)(b + LANES);
        _Pragma("GCC unroll 16") for (int r = 0; r < MR; r++) {
            sum[r][0] += a[r] * left;
            sum[r][1] += a[r] * right;
        }
    }
    _Pragma("GCC unroll 16") for (int r = 0; r < MR; r++) {
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
static void multiply(real *c, int64_t ldc, const Tensor *a, int64_t i0, int64_t m, const Tensor *bt,
                     int64_t j0, int64_t n, bool add) {
    real packed_a[MC * KC] __attribute__((aligned(64)));
    real packed_b[KC * NC] __attribute__((aligned(64)));
    int64_t k = a->shape[1];
    for (int64_t j = 0; j < n; j += NC) {
        int64_t columns = n - j < NC ? n - j : NC;
        for (int64_t p = 0; p < k; p += KC) {
            int64_t depth = k - p < KC ? k - p : KC;
            pack(packed_b, bt, j0 + j, columns, p, depth, NR);
            for (int64_t i = 0; i < m; i += MC) {
                int64_t rows = m - i < MC ? m - i : MC;
                pack(packed_a, a, i0 + i, rows, p, depth, MR);
                multiply_block(c + i * ldc + j, ldc, packed_a, packed_b, rows, columns, depth,
                               add || p > 0);
            }
        }
        for (int64_t i = 0; i < m && k == 0 && !add; i++)
            memset(c + i * ldc + j, 0, (size_t)columns * sizeof(real));
    }
}

void CPU(gemm)(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col,
               const real *b, int64_t b_row, int64_t b_col, int beta, real *c, int64_t ldc) {
    Dtype dtype = sizeof(real) == 8 ? F64 : F32;
    Tensor left = {.data = (void *)a, .shape = {m, k}, .stride = {a_row, a_col}, .dtype = dtype};
    Tensor right = {.data = (void *)b, .shape = {n, k}, .stride = {b_col, b_row}, .dtype = dtype};
    multiply(c, ldc, &left, 0, m, &right, 0, n, beta);
}

/* One tile of matmul's c: the sums in `real`, then bias, then the old c, one rounding. */
static void matmul_tile(const Tensor *c, const Tensor *a, const Tensor *bt, const Tensor *bias,
                        int beta, int64_t i0, int64_t m, int64_t j0) {
    real sums[TILE_M * NC] __attribute__((aligned(64))), row[NC];
    int64_t n = c->shape[1] - j0 < NC ? c->shape[1] - j0 : NC;
    multiply(sums, NC, a, i0, m, bt, j0, n, false);
    for (int64_t i = 0; i < m; i++) {
        real *sum = sums + i * NC;
        int64_t at = (i0 + i) * c->stride[0] + j0;
        if (bias) {
            load(row, bias, j0, n);
            SIMD
            for (int64_t j = 0; j < n; j++) sum[j] += row[j];
        }
        if (beta) {
            load(row, c, at, n);
            SIMD
            for (int64_t j = 0; j < n; j++) sum[j] += row[j];
        }
        store(c, at, sum, n);
    }
}

void CPU(matmul)(const Tensor *c, const Tensor *a, const Tensor *b, const Tensor *bias, int beta) {
    Tensor bt = transpose(b);
    /* At least a tile per thread, of full panels: the result depends on no choice made here. */
    int64_t m = c->shape[0], across = (c->shape[1] + NC - 1) / NC;
    int64_t wanted = across ? (cpu_threads() + across - 1) / across : 1;
    int64_t height = ((m + wanted - 1) / wanted + MR - 1) / MR * MR;
    if (height > TILE_M) height = TILE_M;
    int64_t down = height ? (m + height - 1) / height : 0;
    PARALLEL_DYNAMIC
    for (int64_t tile = 0; tile < down * across; tile++) {
        int64_t i = tile / across * height;
        matmul_tile(c, a, &bt, bias, beta, i, m - i < height ? m - i : height, tile % across * NC);
    }
}
