/* cublaslt.h: matrix products on CUDA by NVIDIA's cuBLASLt, which is looked for at run time.
 *
 * The library's heuristic names a first algorithm and others that it holds for nearly as fast.
 * gemm_choose() times them on the caller's own operands, once per product (shape, dtypes, layouts,
 * beta, GPU), and gemm() runs the chosen one from then on: of those within 2 % of the fastest the
 * heuristic's first. Only candidates whose result is, bit for bit, the first one's take part: the
 * choice changes the time that a product takes, and nothing else. Two environment variables are
 * read, where a product is new:
 *
 *   FLATOUT_GEMM_TUNE=off     no timing: always the heuristic's first
 *   FLATOUT_GEMM_CACHE=FILE   choices are kept in FILE, by GPU, driver and version of cuBLASLt
 */
#ifndef FLATOUT_CUBLASLT_H
#define FLATOUT_CUBLASLT_H

#include "ops.h"

#ifdef __cplusplus
#include <cstddef>
extern "C" {
#else
#include <stddef.h>
#endif
#pragma GCC visibility push(hidden)

/* d = round(a b + bias (+ d where beta is 1)), sums in fp32 (fp32 operands: no TF32).
 * d (m, n) with contiguous rows; a (m, k), b (k, n) each with rows or columns contiguous; all on
 * the current device; a and b BF16, F16 or F32 of one dtype, d of that dtype or F32; bias (n,) of
 * d's dtype, contiguous, or NULL. workspace: U8, from which cuBLASLt may take scratch. */
typedef struct {
    const Tensor *d, *a, *b, *bias, *workspace;
    int beta;
} Gemm;

/* On the stream, without waiting; NULL, or an error. */
const char *gemm(const Gemm *g, void *stream);

/* Whether gemm_choose() would measure: not for small products (a few microseconds are not worth
 * it), not a second time, not without a workspace, not with FLATOUT_GEMM_TUNE=off, not where this
 * process has measured for 5 s, not while the stream is captured into a graph. */
bool gemm_is_open(const Gemm *g, void *stream);

/* Choose the algorithm of this product. Overwrites d with a b, several times, and waits for the
 * stream. a and b hold numbers like those to come, hardly any of them 0, or nothing is chosen: on
 * zeros all algorithms agree. */
const char *gemm_choose(const Gemm *g, void *stream);

/* kernels/checksum.cu: adds to sum[0], sum[1] (device memory) a checksum of the bits of the matrix
 * t, the same for any order of its elements' visit, and to sum[2] the count of its elements that
 * are finite and not 0. */
const char *checksum(unsigned long long *sum, const Tensor *t, void *stream);

/* cublaslt_file.c: the choices in FLATOUT_GEMM_CACHE: lines of a key, a tab and an algorithm. */
bool gemm_file_find(const char *key, uint64_t algorithm[8]);
void gemm_file_add(const char *key, const uint64_t algorithm[8]);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
