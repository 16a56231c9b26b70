/* tensor.h: Python arguments -> borrowed Tensor views, checked once for both backends. */
#ifndef FLATOUT_TENSOR_H
#define FLATOUT_TENSOR_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>

#include "cpu.h"

#define MAX_TENSORS 24
#define MAX_SCALARS 12
#define MAX_LISTS 5
#define COLD __attribute__((cold)) /* what a call without an error has no use for */
#define FEW_ITEMS 16               /* of all lists of a call: these take no heap memory */

/* An entry point's parameters, written as its Python signature:
 *   "rms_norm_bwd(>dx=dy, >dw?, >dw_partial?, dy, x, w, rstd, float offset)"
 * `>` output; `>dx=dy` output that may be the very array of another argument; `?` None allowed;
 * `float`, `int`: scalars; `list`: a sequence of tensors, `>list`: written. Every entry point takes
 * one more, optional argument: the CUDA stream as an int (default 0; not used on the CPU). */
typedef struct {
    const char *text;
    int ready, count;
    struct Param {
        char kind; /* 't' tensor, 'f' float, 'i' int, 'l' list */
        bool output, optional;
        int slot;  /* among those of its kind */
        int alias; /* the parameter whose very array it may be, or -1 */
        const char *name;
    } param[MAX_TENSORS + MAX_SCALARS];
    int array[MAX_TENSORS + MAX_LISTS], arrays; /* tensors and lists: inputs, then outputs */
    int tensor[MAX_TENSORS], tensors, lists;    /* tensor: the parameter of each slot */
    int output[MAX_TENSORS], outputs;           /* slots of tensors */
    const char *function; /* this and the names are made once for the process */
} Signature;

/* The parsed arguments of one call, in the order of their kind. */
typedef struct {
    const Signature *signature;
    Tensor tensor[MAX_TENSORS];
    Tensor *t[MAX_TENSORS]; /* NULL for None */
    TensorList list[MAX_LISTS];
    double f[MAX_SCALARS];
    int64_t i[MAX_SCALARS];
    int tensors, lists; /* how many there are */
    int device;
    void *stream;
    Tensor few[FEW_ITEMS], *items;            /* of all lists; items is few or the heap's */
    PyObject *owned[MAX_TENSORS + MAX_LISTS]; /* capsules and lists that live as long as the call */
    int owners;
} Args;

int tensor_init(PyObject *module); /* NumPy's API, the exception types; -1 on error */

/* Fill `args`; false with an exception set. After true, args_free() ends the call. */
bool parse(Args *args, Signature *signature, PyObject *const *argv, Py_ssize_t nargs);
void args_free(Args *args);

/* Checks for entry points: each returns true, or false with an exception that names the function,
 * the argument, what was expected and what came. A NULL tensor passes. */
bool is_float(const Args *args, const Tensor *t);
bool is_index(const Args *args, const Tensor *t); /* I32 or I64 */
bool is_stat(const Args *args, const Tensor *t, const Tensor *of);
bool is_dtype(const Args *args, const Tensor *t, Dtype dtype);
bool is_contiguous(const Args *args, const Tensor *t);
bool same_dtype(const Args *args, const Tensor *t, const Tensor *as);
bool same_shape(const Args *args, const Tensor *t, const Tensor *as);
bool has_shape(const Args *args, const Tensor *t, int ndim, const int64_t *shape);
bool has_ndim(const Args *args, const Tensor *t, int ndim);
bool rows_last(const Args *args, const Tensor *t); /* ndim >= 1, last dimension contiguous */
bool need_int(const Args *args, bool condition, const char *name, const char *expected,
              int64_t got);
bool need_float(const Args *args, bool condition, const char *name, const char *expected,
                double got);
bool need_both(const Args *args, const Tensor *t, const char *name, const Tensor *with,
               const char *other); /* or neither */
COLD bool fail_value(const Args *args, const char *name, const char *format, ...);
COLD bool fail_type(const Args *args, const char *name, const char *format, ...);

const char *dtype_name(Dtype dtype);

/* Between arguments.c, tensor.c and overlap.c. */
COLD bool fail_buffer(const Args *args, const char *name, const char *format, ...);
bool export(const Args *args, const char *name, PyObject **object);
bool to_tensor(const Args *args, Tensor *t, PyObject *object);
bool overlap(const Tensor *a, const Tensor *b);
bool same_view(const Tensor *a, const Tensor *b);
bool repeats_itself(const Tensor *t);
bool is_dense(const Tensor *t); /* in C order without gaps */

extern PyObject *ArgumentValueError, *ArgumentTypeError, *DLPackError;

#endif
