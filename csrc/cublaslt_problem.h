/* cublaslt_problem.h: a product as cuBLASLt sees it, for cublaslt.c and cublaslt_choice.c. What is
 * used of cublasLt.h is declared here: its ABI is the same in CUDA 12 and 13, and the build needs
 * no header. */
#ifndef FLATOUT_CUBLASLT_PROBLEM_H
#define FLATOUT_CUBLASLT_PROBLEM_H

#include <cuda_runtime_api.h>

#include "cublaslt.h"

enum { SUCCESS = 0 };
typedef void *Handle, *Desc; /* Desc: of a product, a matrix or a preference */
typedef struct {
    uint64_t data[8]; /* the library's own; it may be kept and used by the same version */
} Algorithm;

typedef struct {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
} Candidate;

typedef struct {
    void *library;
    const char *error;
    size_t (*GetVersion)(void);
    int (*Create)(Handle *);
    int (*MatmulDescCreate)(Desc *, int compute, int scale);
    int (*MatmulDescDestroy)(Desc);
    int (*MatmulDescSetAttribute)(Desc, int, const void *, size_t);
    int (*MatrixLayoutCreate)(Desc *, int type, uint64_t rows, uint64_t cols, int64_t ld);
    int (*MatrixLayoutDestroy)(Desc);
    int (*MatmulPreferenceCreate)(Desc *);
    int (*MatmulPreferenceDestroy)(Desc);
    int (*MatmulPreferenceSetAttribute)(Desc, int, const void *, size_t);
    int (*MatmulAlgoGetHeuristic)(Handle, Desc, Desc a, Desc b, Desc c, Desc d, Desc preference,
                                  int asked, Candidate *, int *found);
    int (*MatmulAlgoCheck)(Handle, Desc, Desc a, Desc b, Desc c, Desc d, const Algorithm *,
                           Candidate *);
    int (*Matmul)(Handle, Desc, const void *alpha, const void *A, Desc a, const void *B, Desc b,
                  const void *beta, const void *C, Desc c, void *D, Desc d, const Algorithm *,
                  void *workspace, size_t bytes, cudaStream_t);
} Library;

/* cuBLASLt's matrices have contiguous columns, so that it sees every one of ours transposed, and
 * computes d^T = b^T a^T: its A is our b and its B our a. */
typedef struct {
    uint64_t rows, cols;
    int64_t ld;
    int type, transposed;
    int64_t alignment; /* of the address, up to 256 */
} Operand;

/* All that decides which algorithms there are and how fast they are; compared as bytes. */
typedef struct {
    Operand a, b, d;
    int64_t bias_alignment; /* 0: no bias */
    int64_t workspace;
    int32_t beta, device;
} Key;

/* The last bytes of the workspace hold checksums while candidates are compared. */
enum { CHECKSUM_BYTES = 4096, MOST_CANDIDATES = 12 };

typedef struct {
    const Gemm *g;
    Key key;
    cudaStream_t stream;
    Handle handle;
    Desc product, a, b, d;
} Problem;

#pragma GCC visibility push(hidden)

extern Library lt; /* filled by the first open_problem() */

/* For lookups; no library is needed. */
const char *to_key(Key *key, const Gemm *g);

/* Callers hold a lock; close_problem() afterwards, whatever came of it. */
const char *open_problem(Problem *p, const Gemm *g, void *stream);
void close_problem(Problem *p);

/* Up to `most` candidates, the heuristic's first one first. */
int candidates_of(const Problem *p, Candidate *out, int most);

const char *run(const Problem *p, const Algorithm *algorithm, int beta);

#pragma GCC visibility pop
#endif
