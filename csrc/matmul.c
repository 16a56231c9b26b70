/* matmul.c: the CPU matrix product (see matmul.h). */
#include "matmul.h"

void CPU(gemm)(int64_t m, int64_t n, int64_t k, const real *a, int64_t a_row, int64_t a_col,
               const real *b, int64_t b_row, int64_t b_col, int beta, real *c, int64_t ldc) {
    for (int64_t i = 0; i < m; i++) {
        if (!beta) memset(c + i * ldc, 0, (size_t)n * sizeof(real));
        for (int64_t p = 0; p < k; p++) {
            real factor = a[i * a_row + p * a_col];
            for (int64_t j = 0; j < n; j++) c[i * ldc + j] += factor * b[p * b_row + j * b_col];
        }
    }
}

void CPU(matmul)(const Tensor *c, const Tensor *a, const Tensor *b, const Tensor *bias, int beta) {
    int64_t m = c->shape[0], n = c->shape[1], k = a->shape[1];
    PARALLEL for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            real sum = 0, x, y;
            for (int64_t p = 0; p < k; p++) {
                load(&x, a, i * a->stride[0] + p * a->stride[1], 1);
                load(&y, b, p * b->stride[0] + j * b->stride[1], 1);
                sum += x * y;
            }
            if (bias) load(&x, bias, j, 1), sum += x;
            if (beta) load(&x, c, i * c->stride[0] + j * c->stride[1], 1), sum += x;
            store(c, i * c->stride[0] + j * c->stride[1], &sum, 1);
        }
    }
}
