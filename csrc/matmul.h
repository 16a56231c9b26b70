/* matmul.h: the CPU matrix product, blocked, packed and register-tiled (matmul.c). In every
 * product the order of each element's sum is fixed by k alone: the result is bitwise the same for
 * any number of threads, any tiling of m and n and any strides. */
#ifndef FLATOUT_MATMUL_H
#define FLATOUT_MATMUL_H

#include "cpu.h"

/* c = round(a b + bias (+ c where beta is 1)) of 2-D views with any strides and float dtypes,
 * parallel over tiles of c: c (m, n), a (m, k), b (k, n), bias (n,) contiguous or NULL. The sums
 * run in `real` and are rounded once. c overlaps neither a nor b. NULL, or an error string: each
 * thread packs into heap memory of up to 1 MiB. */
const char *CPU(matmul)(const Tensor *c, const Tensor *a, const Tensor *b, const Tensor *bias,
                        int beta);

/* The transpose of a 2-D view. */
static inline Tensor transpose(const Tensor *t) {
    Tensor out = *t;
    out.shape[0] = t->shape[1], out.shape[1] = t->shape[0];
    out.stride[0] = t->stride[1], out.stride[1] = t->stride[0];
    return out;
}

#endif
