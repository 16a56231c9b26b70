/* cublaslt.c: cuBLASLt, looked for at run time, and one product as it sees it (see cublaslt.h; its
 * manual: cuBLAS 13, "Using the cuBLASLt API"). */
#ifdef FLATOUT_CUDA_ARCHS
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include "cublaslt_problem.h"

/* ---- The library ----------------------------------------------------------------------------- */

enum { COMPUTE_32F = 68, EPILOGUE_BIAS = 4, COMPUTE_TYPE_REDUCTION = 2 };
enum { DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8 };
enum { PREFER_WORKSPACE = 1, PREFER_REDUCTIONS = 3, PREFER_ALIGNMENT_A = 5 }; /* then B, C, D */

Library lt;

#define NO_LIBRARY                                                                           \
    "RuntimeError: cuBLASLt not found: install torch for CUDA or nvidia-cublas, or put the " \
    "folder of libcublasLt.so.13 (or .12) into LD_LIBRARY_PATH"

/* In a folder of NVIDIA's wheels below `site`. */
static void *open_below(const char *site) {
    static const char *const names[] = {"nvidia/cu13/lib/libcublasLt.so.13",
                                        "nvidia/cublas/lib/libcublasLt.so.13",
                                        "nvidia/cublas/lib/libcublasLt.so.12"};
    char path[4096];
    void *library = NULL;
    for (size_t n = 0; !library && n < sizeof names / sizeof *names; n++) {
        if (snprintf(path, sizeof path, "%s/%s", site, names[n]) < (int)sizeof path)
            library = dlopen(path, RTLD_LAZY);
    }
    return library;
}

/* The one in this process already, torch's as a rule; else the wheels on sys.path; else the
 * system's. The caller holds the interpreter's lock. */
static void *open_library(void) {
    static const char *const names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
    void *library = NULL;
    for (int n = 0; !library && n < 2; n++) library = dlopen(names[n], RTLD_LAZY | RTLD_NOLOAD);
    PyObject *path = PySys_GetObject("path"); /* borrowed */
    for (Py_ssize_t i = 0; !library && path && PyList_Check(path) && i < PyList_Size(path); i++) {
        PyObject *item = PyList_GetItem(path, i); /* borrowed */
        const char *site = PyUnicode_Check(item) ? PyUnicode_AsUTF8AndSize(item, NULL) : NULL;
        if (site) library = open_below(site);
        else PyErr_Clear();
    }
    for (int n = 0; !library && n < 2; n++) library = dlopen(names[n], RTLD_LAZY);
    return library;
}

static const char *load_library(void) {
    if (lt.library || lt.error) return lt.error;
    void *library = open_library();
    if (!library) return lt.error = NO_LIBRARY;
    struct {
        const char *name;
        void *address; /* of a pointer to a function */
    } wanted[] = {
        {"cublasLtGetVersion", &lt.GetVersion},
        {"cublasLtCreate", &lt.Create},
        {"cublasLtMatmulDescCreate", &lt.MatmulDescCreate},
        {"cublasLtMatmulDescDestroy", &lt.MatmulDescDestroy},
        {"cublasLtMatmulDescSetAttribute", &lt.MatmulDescSetAttribute},
        {"cublasLtMatrixLayoutCreate", &lt.MatrixLayoutCreate},
        {"cublasLtMatrixLayoutDestroy", &lt.MatrixLayoutDestroy},
        {"cublasLtMatmulPreferenceCreate", &lt.MatmulPreferenceCreate},
        {"cublasLtMatmulPreferenceDestroy", &lt.MatmulPreferenceDestroy},
        {"cublasLtMatmulPreferenceSetAttribute", &lt.MatmulPreferenceSetAttribute},
        {"cublasLtMatmulAlgoGetHeuristic", &lt.MatmulAlgoGetHeuristic},
        {"cublasLtMatmulAlgoCheck", &lt.MatmulAlgoCheck},
        {"cublasLtMatmul", &lt.Matmul},
    };
    for (size_t n = 0; n < sizeof wanted / sizeof *wanted; n++) {
        void *symbol = dlsym(library, wanted[n].name);
        if (!symbol) return lt.error = "RuntimeError: cuBLASLt: a function is missing in it";
        memcpy(wanted[n].address, &symbol, sizeof symbol);
    }
    lt.library = library;
    return NULL;
}

/* The library allocates here: not a thing to do while a stream is captured, but allowed so. */
static const char *handle_of(int device, Handle *handle) {
    static Handle handles[64];
    if (device < 0 || device >= 64) return "RuntimeError: no such CUDA device";
    if (!handles[device]) {
        enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
        cudaThreadExchangeStreamCaptureMode(&mode);
        int status = lt.Create(&handles[device]);
        cudaThreadExchangeStreamCaptureMode(&mode);
        if (status != SUCCESS) {
            handles[device] = NULL;
            return "RuntimeError: cuBLASLt cannot be initialized on this GPU";
        }
    }
    *handle = handles[device];
    return NULL;
}

/* ---- One product ----------------------------------------------------------------------------- */

static int64_t alignment_of(const void *p) {
    int64_t lowest = (int64_t)((uintptr_t)p & -(uintptr_t)p);
    return !lowest || lowest > 256 ? 256 : lowest;
}

static int cuda_type(Dtype dtype) { return dtype == BF16 ? 14 : dtype == F16 ? 2 : 0; }

/* t (rows, cols) as cuBLASLt sees it; false where neither its rows nor its columns will do. */
static bool to_operand(Operand *o, const Tensor *t) {
    int64_t rows = t->shape[0], cols = t->shape[1];
    bool in_rows = cols == 1 || t->stride[1] == 1;
    int64_t wide = in_rows ? cols : rows, ld = in_rows ? t->stride[0] : t->stride[1];
    if ((in_rows ? rows : cols) == 1) ld = wide;
    if (!in_rows && rows != 1 && t->stride[0] != 1) return false;
    *o = (Operand){.rows = (uint64_t)wide,
                   .cols = (uint64_t)(in_rows ? rows : cols),
                   .ld = ld,
                   .type = cuda_type(t->dtype),
                   .transposed = !in_rows,
                   .alignment = alignment_of(t->data)};
    return ld >= wide;
}

const char *to_key(Key *key, const Gemm *g) {
    memset(key, 0, sizeof *key); /* the gaps too */
    if (!to_operand(&key->a, g->a) || !to_operand(&key->b, g->b) || !to_operand(&key->d, g->d) ||
        key->d.transposed)
        return "ValueError: rows that overlap or have gaps between their elements; copy first";
    if (g->a->shape[0] > INT32_MAX || g->a->shape[1] > INT32_MAX || g->b->shape[1] > INT32_MAX)
        return "ValueError: more than 2^31 - 1 rows or columns; split the tensors";
    if (g->bias && g->bias->dtype != g->d->dtype)
        return "NotImplementedError: bias: expected the dtype of x on CUDA";
    key->bias_alignment = g->bias ? alignment_of(g->bias->data) : 0;
    int64_t bytes = g->workspace ? g->workspace->shape[0] / 256 * 256 - CHECKSUM_BYTES : 0;
    bool aligned = g->workspace && (uintptr_t)g->workspace->data % 256 == 0;
    key->workspace = aligned && bytes > 0 ? bytes : 0;
    key->beta = g->beta;
    key->device = g->d->device;
    return NULL;
}

void close_problem(Problem *p) {
    if (p->product) lt.MatmulDescDestroy(p->product);
    if (p->a) lt.MatrixLayoutDestroy(p->a);
    if (p->b) lt.MatrixLayoutDestroy(p->b);
    if (p->d) lt.MatrixLayoutDestroy(p->d);
}

static int make_layout(Desc *out, const Operand *o) {
    return lt.MatrixLayoutCreate(out, o->type, o->rows, o->cols, o->ld);
}

const char *open_problem(Problem *p, const Gemm *g, void *stream) {
    *p = (Problem){.g = g, .stream = stream};
    const char *error = to_key(&p->key, g);
    if (!error) error = load_library();
    if (!error) error = handle_of(p->key.device, &p->handle);
    if (error) return error;
    const Key *k = &p->key;
    int32_t a = k->a.transposed, b = k->b.transposed;
    int bad = lt.MatmulDescCreate(&p->product, COMPUTE_32F, cuda_type(F32)) ||
              lt.MatmulDescSetAttribute(p->product, DESC_TRANSA, &b, sizeof b) ||
              lt.MatmulDescSetAttribute(p->product, DESC_TRANSB, &a, sizeof a) ||
              make_layout(&p->a, &k->a) || make_layout(&p->b, &k->b) || make_layout(&p->d, &k->d);
    if (g->bias && !bad) {
        uint32_t epilogue = EPILOGUE_BIAS;
        bad = lt.MatmulDescSetAttribute(p->product, DESC_EPILOGUE, &epilogue, sizeof epilogue) ||
              lt.MatmulDescSetAttribute(p->product, DESC_BIAS_POINTER, &g->bias->data,
                                        sizeof g->bias->data);
    }
    return bad ? "RuntimeError: cuBLASLt refuses the description of a matrix product" : NULL;
}

const char *run(const Problem *p, const Algorithm *algorithm, int beta) {
    const Gemm *g = p->g;
    float one = 1, kept = (float)beta;
    void *d = g->d->data, *workspace = p->key.workspace ? g->workspace->data : NULL;
    int status =
        lt.Matmul(p->handle, p->product, &one, g->b->data, p->b, g->a->data, p->a, &kept, d, p->d,
                  d, p->d, algorithm, workspace, (size_t)p->key.workspace, p->stream);
    return status == SUCCESS ? NULL : "RuntimeError: cuBLASLt failed in a matrix product";
}

/* Up to `most` candidates, best first; sums of parts of k only in fp32. */
int candidates_of(const Problem *p, Candidate *out, int most) {
    const Key *k = &p->key;
    uint64_t workspace = (uint64_t)k->workspace;
    uint32_t reductions = COMPUTE_TYPE_REDUCTION;
    int64_t alignments[] = {k->b.alignment, k->a.alignment, k->d.alignment, k->d.alignment};
    Desc prefer = NULL;
    int found = 0;
    int bad =
        lt.MatmulPreferenceCreate(&prefer) ||
        lt.MatmulPreferenceSetAttribute(prefer, PREFER_WORKSPACE, &workspace, sizeof workspace) ||
        lt.MatmulPreferenceSetAttribute(prefer, PREFER_REDUCTIONS, &reductions, sizeof reductions);
    for (int i = 0; i < 4 && !bad; i++) {
        uint32_t bytes = (uint32_t)alignments[i];
        bad = lt.MatmulPreferenceSetAttribute(prefer, PREFER_ALIGNMENT_A + i, &bytes, sizeof bytes);
    }
    if (!bad)
        bad = lt.MatmulAlgoGetHeuristic(p->handle, p->product, p->b, p->a, p->d, p->d, prefer, most,
                                        out, &found);
    if (prefer) lt.MatmulPreferenceDestroy(prefer);
    return bad ? 0 : found;
}
#else
enum { BUILT_WITHOUT_CUDA };
#endif
