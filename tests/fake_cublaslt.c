/* fake_cublaslt.c: what csrc/cublaslt.c calls of cuBLASLt and of the CUDA runtime, on the CPU and
 * in fp32, for tests/test_cublaslt.py. Time is a counter that every product advances. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

/* ---- What the tests set and look at ---------------------------------------------------------- */

enum { KINDS = 5 };
/* By algorithm: the time it takes, what every fourth call takes besides, and the first; whether its
 * result differs in a bit, and whether it fails. */
EXPORT double cost[KINDS], lapse[KINDS], loading[KINDS];
EXPORT int calls[KINDS];
EXPORT int is_wrong[KINDS], fails[KINDS];
EXPORT int is_capturing, products, heuristics, live;
EXPORT uint64_t used; /* the last product's algorithm */
static double clock_ms;

/* ---- cuBLASLt -------------------------------------------------------------------------------- */

typedef struct {
    int type;
    uint64_t rows, cols;
    int64_t ld;
} Layout;

typedef struct {
    int transa, transb, epilogue;
    const float *bias;
} Product;

typedef struct {
    uint64_t workspace;
} Preference;

typedef struct {
    uint64_t data[8];
} Algorithm;

typedef struct {
    Algorithm algorithm;
    size_t workspace;
    int status;
    float waves;
    int reserved[4];
} Candidate;

static void *make(size_t size) {
    live++;
    return calloc(1, size);
}

static int drop(void *p) {
    live--;
    free(p);
    return 0;
}

EXPORT size_t cublasLtGetVersion(void) { return 130100; }
EXPORT int cublasLtCreate(void **handle) { return *handle = (void *)8, 0; }

EXPORT int cublasLtMatmulDescCreate(void **out, int compute, int scale) {
    *out = make(sizeof(Product));
    return compute == 68 && scale == 0 ? 0 : 7;
}
EXPORT int cublasLtMatmulDescDestroy(void *p) { return drop(p); }
EXPORT int cublasLtMatmulDescSetAttribute(Product *p, int name, const void *value, size_t size) {
    if (name == 3 && size == 4) return memcpy(&p->transa, value, 4), 0;
    if (name == 4 && size == 4) return memcpy(&p->transb, value, 4), 0;
    if (name == 7 && size == 4) return memcpy(&p->epilogue, value, 4), 0;
    if (name == 8 && size == 8) return memcpy(&p->bias, value, 8), 0;
    return 7;
}

EXPORT int cublasLtMatrixLayoutCreate(void **out, int type, uint64_t rows, uint64_t cols,
                                      int64_t ld) {
    Layout *l = *out = make(sizeof *l);
    *l = (Layout){type, rows, cols, ld};
    return type == 0 && ld >= (int64_t)rows ? 0 : 7;
}
EXPORT int cublasLtMatrixLayoutDestroy(void *p) { return drop(p); }

EXPORT int cublasLtMatmulPreferenceCreate(void **out) { return *out = make(sizeof(Preference)), 0; }
EXPORT int cublasLtMatmulPreferenceDestroy(void *p) { return drop(p); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(Preference *p, int name, const void *value,
                                                size_t size) {
    if (name == 1 && size == 8) return memcpy(&p->workspace, value, 8), 0;
    return size == 4 && (name == 3 || (name >= 5 && name <= 8)) ? 0 : 7;
}

static bool fits(const Product *p, const Layout *a, const Layout *b, const Layout *d) {
    uint64_t m = p->transa ? a->cols : a->rows, k = p->transa ? a->rows : a->cols;
    uint64_t n = p->transb ? b->rows : b->cols, l = p->transb ? b->cols : b->rows;
    return m == d->rows && n == d->cols && k == l;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(void *handle, Product *p, Layout *a, Layout *b, Layout *c,
                                          Layout *d, Preference *prefer, int asked, Candidate *out,
                                          int *found) {
    heuristics++;
    *found = 0;
    if (handle != (void *)8 || c != d || !prefer || !fits(p, a, b, d)) return 7;
    for (int i = 0; i < asked && i < KINDS; i++)
        out[(*found)++] = (Candidate){.algorithm.data = {(uint64_t)i, 0xabc}};
    return 0;
}

EXPORT int cublasLtMatmulAlgoCheck(void *handle, Product *p, Layout *a, Layout *b, Layout *c,
                                   Layout *d, const Algorithm *algorithm, Candidate *out) {
    (void)handle, (void)p, (void)a, (void)b, (void)c, (void)d;
    memset(out, 0, sizeof *out);
    return algorithm->data[0] < KINDS && algorithm->data[1] == 0xabc ? 0 : 7;
}

static float at(const float *m, const Layout *l, int transposed, uint64_t row, uint64_t col) {
    return transposed ? m[col + row * (uint64_t)l->ld] : m[row + col * (uint64_t)l->ld];
}

/* A product too large to be computed here is a pattern. */
EXPORT int cublasLtMatmul(void *handle, const Product *p, const float *alpha, const float *A,
                          const Layout *a, const float *B, const Layout *b, const float *beta,
                          const float *C, const Layout *c, float *D, const Layout *d,
                          const Algorithm *algorithm, void *workspace, size_t bytes, void *stream) {
    (void)stream;
    int kind = (int)algorithm->data[0];
    if (handle != (void *)8 || *alpha != 1 || C != D || c != d || !fits(p, a, b, d) ||
        kind >= KINDS || (bytes != 0) != (workspace != NULL) || fails[kind])
        return 7;
    uint64_t depth = p->transa ? a->rows : a->cols;
    bool large = (double)d->rows * (double)d->cols * (double)depth > 1e9;
    for (uint64_t col = 0; col < d->cols; col++) {
        for (uint64_t row = 0; row < d->rows; row++) {
            float *to = &D[row + col * (uint64_t)d->ld];
            double sum = large ? (double)(row % 61 + 7 * col % 67) + 1 : 0;
            for (uint64_t k = 0; k < depth && !large; k++)
                sum += (double)at(A, a, p->transa, row, k) * (double)at(B, b, p->transb, k, col);
            if (p->epilogue == 4) sum += (double)p->bias[row];
            *to = (float)(*beta != 0 ? sum + (double)*beta * (double)*to : sum);
        }
    }
    if (is_wrong[kind]) D[0] += 1;
    products++, used = algorithm->data[0], clock_ms += cost[kind] + loading[kind];
    if (++calls[kind] % 4 == 0) clock_ms += lapse[kind];
    loading[kind] = 0;
    return 0;
}

/* ---- The CUDA runtime ------------------------------------------------------------------------ */

EXPORT int cudaThreadExchangeStreamCaptureMode(int *mode) { return *mode = 0, 0; }
EXPORT int cudaStreamIsCapturing(void *stream, int *status) {
    (void)stream;
    return *status = is_capturing, 0;
}
EXPORT int cudaStreamSynchronize(void *stream) { return (void)stream, is_capturing; }
EXPORT int cudaMemsetAsync(void *to, int value, size_t size, void *stream) {
    (void)stream;
    return memset(to, value, size), 0;
}
EXPORT int cudaMemset2DAsync(void *to, size_t pitch, int value, size_t width, size_t rows,
                             void *stream) {
    (void)stream;
    for (size_t r = 0; r < rows; r++) memset((char *)to + r * pitch, value, width);
    return 0;
}
EXPORT int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    (void)kind, (void)stream;
    return memcpy(to, from, size), 0;
}
EXPORT int cudaEventCreate(double **event) { return *event = make(sizeof **event), 0; }
EXPORT int cudaEventDestroy(double *event) { return drop(event); }
EXPORT int cudaEventRecord(double *event, void *stream) {
    (void)stream;
    return *event = clock_ms, 0;
}
EXPORT int cudaEventElapsedTime(float *ms, const double *from, const double *to) {
    return *ms = (float)(*to - *from), 0;
}
EXPORT int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
EXPORT const char *cudaGetErrorString(int error) { return error ? "failed" : "fine"; }
EXPORT int cudaGetDeviceProperties(char *properties, int device) {
    (void)device;
    return strcpy(properties, "A fake GPU"), 0; /* the name comes first */
}
EXPORT int cudaGetDeviceProperties_v2(char *properties, int device) { /* as CUDA 12 calls it */
    return cudaGetDeviceProperties(properties, device);
}
