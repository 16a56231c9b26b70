/* arguments.c: the arguments of a call, parsed by the entry point's signature, and the checks that
 * entry points make. Errors name the function, the argument, what was expected and what came. */
#include "tensor.h"

#include <stdarg.h>
#include <string.h>

const char *dtype_name(Dtype dtype) {
    static const char *const name[] = {
        [F32] = "float32", [BF16] = "bfloat16", [F16] = "float16", [F64] = "float64",
        [I32] = "int32",   [I64] = "int64",     [U8] = "uint8",    [BOOL] = "bool"};
    return name[dtype];
}

static bool fail(PyObject *type, const char *function, const char *name, const char *format,
                 va_list list) {
    PyObject *what = PyUnicode_FromFormatV(format, list);
    if (what) {
        PyErr_Format(type, "%s: %s: %U", function, name, what);
        Py_DECREF(what);
    }
    return false;
}

#define FAIL_WITH(type)                                        \
    va_list list;                                              \
    va_start(list, format);                                    \
    fail(type, args->signature->function, name, format, list); \
    va_end(list);                                              \
    return false

bool fail_value(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(ArgumentValueError);
}

bool fail_type(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(ArgumentTypeError);
}

bool fail_buffer(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(DLPackError);
}

/* ---- Outputs --------------------------------------------------------------------------------- */

static bool check_output(const Args *args, const Tensor *out) {
    if (out->readonly) return fail_value(args, out->name, "output array is read-only");
    if (repeats_itself(out))
        return fail_value(args, out->name, "output repeats its own memory (a stride of 0)");
    return true;
}

/* A tensor and the bytes that it spans, found once for all the pairs of a call. */
typedef struct {
    const Tensor *tensor;
    uintptr_t low, high;
} Extent;

static Extent extent_of(const Tensor *t) {
    Extent e = {.tensor = t};
    if (t && elements(t)) byte_range(t, &e.low, &e.high);
    return e;
}

/* `out` may share memory with `other` where the signature says so and both are one view. */
static bool check_apart(const Args *args, const Extent *out, const Extent *other,
                        const char *alias) {
    const Tensor *a = out->tensor, *b = other->tensor;
    if (a == b || out->high <= other->low || other->high <= out->low) return true;
    if (alias && !strcmp(alias, b->name) && same_view(a, b)) return true;
    if (!overlap(a, b)) return true;
    return fail_value(args, a->name, "output overlaps %s in memory", b->name);
}

/* An output must be writable and share memory with nothing but what it may be. (Lists among
 * themselves are the wrapper's to check.) */
static bool check_outputs(const Args *args) {
    const Signature *s = args->signature;
    Extent tensor[MAX_TENSORS];
    for (int i = 0; i < args->tensors; i++) tensor[i] = extent_of(args->t[i]);
    for (int p = 0, t = 0, l = 0; p < s->count; p++) {
        const struct Param *param = &s->param[p];
        const TensorList *list = param->kind == 'l' ? &args->list[l++] : NULL;
        const Extent *out = param->kind == 't' ? &tensor[t++] : NULL;
        if (!param->output) continue;
        for (int64_t n = 0; list && n < list->n; n++) {
            Extent item = extent_of(&list->items[n]);
            if (!check_output(args, item.tensor)) return false;
            for (int i = 0; i < args->tensors; i++) {
                if (!check_apart(args, &item, &tensor[i], NULL)) return false;
            }
        }
        if (!out || !out->tensor) continue;
        if (!check_output(args, out->tensor)) return false;
        for (int i = 0; i < args->tensors; i++) {
            if (!check_apart(args, out, &tensor[i], param->alias)) return false;
        }
        for (int i = 0; i < args->lists; i++) {
            for (int64_t n = 0; n < args->list[i].n; n++) {
                Extent item = extent_of(&args->list[i].items[n]);
                if (!check_apart(args, out, &item, NULL)) return false;
            }
        }
    }
    return true;
}

/* ---- Signatures and calls -------------------------------------------------------------------- */

static const char *word(const char *from, const char *to) {
    char *copy = PyMem_Malloc((size_t)(to - from) + 1);
    if (!copy) return NULL;
    memcpy(copy, from, (size_t)(to - from));
    copy[to - from] = 0;
    return copy;
}

static bool starts(const char **at, const char *prefix) {
    size_t n = strlen(prefix);
    if (strncmp(*at, prefix, n)) return false;
    *at += n;
    return true;
}

static bool compile_signature(Signature *s) {
    const char *at = strchr(s->text, '(');
    s->function = word(s->text, at);
    for (at++; *at != ')' && s->count < MAX_TENSORS + MAX_SCALARS;) {
        while (*at == ' ' || *at == ',') at++;
        struct Param *p = &s->param[s->count++];
        p->output = starts(&at, ">");
        p->kind = starts(&at, "list ")    ? 'l'
                  : starts(&at, "float ") ? 'f'
                  : starts(&at, "int ")   ? 'i'
                                          : 't';
        const char *end = at + strcspn(at, "=?,)");
        p->name = word(at, end);
        if (*end == '=') {
            at = end + 1;
            end = at + strcspn(at, "?,)");
            p->alias = word(at, end);
        }
        p->optional = *end == '?';
        at = end + p->optional;
        if (!p->name) s->function = NULL;
    }
    s->ready = s->function != NULL;
    if (!s->ready) PyErr_NoMemory();
    return s->ready;
}

/* A sequence of arrays, as a list of our own with every item exported. */
static bool export_list(Args *args, const char *name, PyObject **object) {
    PyObject *type = (PyObject *)Py_TYPE(*object);
    bool plain = PyList_CheckExact(*object) || PyTuple_CheckExact(*object);
    bool array = !plain && PyObject_HasAttrString(type, "__dlpack__");
    PyObject *items = array ? NULL : PySequence_List(*object);
    if (!items && (array || PyErr_ExceptionMatches(PyExc_TypeError))) {
        PyErr_Clear();
        return fail_type(args, name, "expected a sequence of arrays, got %R", type);
    }
    *object = items;
    if (!own(args, items)) return false;
    for (Py_ssize_t n = 0; n < PyList_Size(items); n++) {
        PyObject *item = PyList_GetItem(items, n), *source = item;
        if (!export(args, name, &item)) return false;
        if (item != source && PyList_SetItem(items, n, Py_NewRef(item))) return false;
    }
    return true;
}

static bool to_list(const Args *args, TensorList *list, const char *name, PyObject *objects) {
    int64_t n = PyList_Size(objects);
    Tensor *items = PyMem_Calloc((size_t)n + 1, sizeof *items);
    if (!items) PyErr_NoMemory();
    list->items = items;
    if (items) items->name = name; /* an empty list has a name too */
    for (; items && list->n < n; list->n++) {
        items[list->n].name = name;
        if (!to_tensor(args, &items[list->n], PyList_GetItem(objects, list->n))) return false;
    }
    return items;
}

static bool one_device(Args *args, const Tensor *t, const Tensor **first) {
    if (!*first) {
        *first = t;
        args->device = t->device;
        return true;
    }
    if (t->device == args->device) return true;
    return fail_value(args, t->name, "expected the device of %s (%d; -1 is the CPU), got %d",
                      (*first)->name, args->device, t->device);
}

static bool same_device(Args *args) {
    const Tensor *first = NULL;
    args->device = -1;
    for (int i = 0; i < args->tensors; i++) {
        if (args->t[i] && !one_device(args, args->t[i], &first)) return false;
    }
    for (int l = 0; l < args->lists; l++) {
        for (int64_t n = 0; n < args->list[l].n; n++) {
            if (!one_device(args, &args->list[l].items[n], &first)) return false;
        }
    }
    return true;
}

static bool to_scalar(Args *args, const struct Param *p, PyObject *object, int f, int i) {
    if (p->kind == 'f') {
        args->f[f] = PyFloat_AsDouble(object);
        if (args->f[f] != -1.0 || !PyErr_Occurred()) return true;
    } else {
        args->i[i] = PyLong_AsLongLong(object);
        if (args->i[i] != -1 || !PyErr_Occurred()) return true;
    }
    bool overflow = PyErr_ExceptionMatches(PyExc_OverflowError);
    if (!overflow && !PyErr_ExceptionMatches(PyExc_TypeError)) return false;
    PyErr_Clear();
    return (overflow ? fail_value
                     : fail_type)(args, p->name, "expected %s, got %R",
                                  p->kind == 'f' ? "a real number" : "a 64-bit integer", object);
}

/* Everything that may run Python code: conversions, iteration, __dlpack__. */
static bool run_python(Args *args, PyObject *const *argv, PyObject **object) {
    const Signature *s = args->signature;
    bool ok = true;
    for (int p = 0, f = 0, i = 0; ok && p < s->count; p++) {
        const struct Param *param = &s->param[p];
        object[p] = argv[p];
        if (param->kind == 'f') ok = to_scalar(args, param, argv[p], f++, i);
        if (param->kind == 'i') ok = to_scalar(args, param, argv[p], f, i++);
        if (param->kind == 'l') ok = export_list(args, param->name, &object[p]);
        if (param->kind == 't' && !(param->optional && argv[p] == Py_None))
            ok = export(args, param->name, &object[p]);
    }
    return ok;
}

/* The arrays of all inputs, or of all outputs: these come second, for they are mostly made like an
 * input, and what is wrong with it must be told of the input. */
static bool read_arrays(Args *args, PyObject *const *argv, PyObject **object, bool outputs) {
    const Signature *s = args->signature;
    bool ok = true;
    int t = 0, l = 0;
    for (int p = 0; ok && p < s->count; p++) {
        const struct Param *param = &s->param[p];
        bool now = param->output == outputs;
        if (param->kind == 'l') {
            ok = !now || to_list(args, &args->list[l], param->name, object[p]);
            l++;
        }
        if (param->kind != 't') continue;
        bool none = param->optional && argv[p] == Py_None;
        args->t[t] = none ? NULL : &args->tensor[t];
        args->tensor[t].name = param->name;
        ok = none || !now || to_tensor(args, &args->tensor[t], object[p]);
        t++;
    }
    args->tensors = t, args->lists = l;
    return ok;
}

bool parse(Args *args, Signature *s, PyObject *const *argv, Py_ssize_t nargs) {
    if (!s->ready && !compile_signature(s)) return false;
    args->signature = s;
    args->owners = NULL;
    memset(args->list, 0, sizeof args->list);
    if (nargs != s->count && nargs != s->count + 1) {
        PyErr_Format(PyExc_TypeError, "%s takes %d arguments and a stream, got %zd", s->text,
                     s->count, nargs);
        return false;
    }
    args->stream = nargs > s->count ? PyLong_AsVoidPtr(argv[s->count]) : NULL;
    if (!args->stream && PyErr_Occurred()) return false;
    PyObject *object[MAX_TENSORS + MAX_SCALARS];
    bool ok = run_python(args, argv, object) && read_arrays(args, argv, object, false) &&
              read_arrays(args, argv, object, true);
    ok = ok && same_device(args) && check_outputs(args);
    if (!ok) args_free(args);
    return ok;
}

void args_free(Args *args) {
    for (int l = 0; l < MAX_LISTS; l++) PyMem_Free((void *)args->list[l].items);
    memset(args->list, 0, sizeof args->list);
    if (!args->owners) return;
    PyObject *type, *value, *trace; /* a deleter may run Python code, and an error may be pending */
    PyErr_Fetch(&type, &value, &trace);
    Py_CLEAR(args->owners);
    PyErr_Restore(type, value, trace);
}

/* ---- Checks ---------------------------------------------------------------------------------- */

static PyObject *shape_tuple(int ndim, const int64_t *shape) {
    PyObject *tuple = PyTuple_New(ndim);
    for (int d = 0; tuple && d < ndim; d++) {
        if (PyTuple_SetItem(tuple, d, PyLong_FromLongLong(shape[d]))) Py_CLEAR(tuple);
    }
    return tuple;
}

bool has_shape(const Args *args, const Tensor *t, int ndim, const int64_t *shape) {
    if (!t) return true;
    bool ok = t->ndim == ndim;
    for (int d = 0; ok && d < ndim; d++) ok = t->shape[d] == shape[d];
    if (ok) return true;
    PyObject *want = shape_tuple(ndim, shape), *got = shape_tuple(t->ndim, t->shape);
    if (want && got) fail_value(args, t->name, "expected shape %S, got %S", want, got);
    Py_XDECREF(want);
    Py_XDECREF(got);
    return false;
}

bool same_shape(const Args *args, const Tensor *t, const Tensor *as) {
    return has_shape(args, t, as->ndim, as->shape);
}

bool has_ndim(const Args *args, const Tensor *t, int ndim) {
    if (!t || t->ndim == ndim) return true;
    return fail_value(args, t->name, "expected %d dimensions, got %d", ndim, t->ndim);
}

bool is_dtype(const Args *args, const Tensor *t, Dtype dtype) {
    if (!t || t->dtype == dtype) return true;
    return fail_type(args, t->name, "expected %s, got %s", dtype_name(dtype), dtype_name(t->dtype));
}

bool same_dtype(const Args *args, const Tensor *t, const Tensor *as) {
    if (!t || t->dtype == as->dtype) return true;
    return fail_type(args, t->name, "expected %s as %s has, got %s", dtype_name(as->dtype),
                     as->name, dtype_name(t->dtype));
}

bool is_stat(const Args *args, const Tensor *t, const Tensor *of) {
    return is_dtype(args, t, of->dtype == F64 ? F64 : F32) && is_contiguous(args, t);
}

bool is_float(const Args *args, const Tensor *t) {
    if (!t || t->dtype <= F64) return true;
    return fail_type(args, t->name, "expected a floating dtype, got %s", dtype_name(t->dtype));
}

bool is_index(const Args *args, const Tensor *t) {
    if (!t || t->dtype == I32 || t->dtype == I64) return true;
    return fail_type(args, t->name, "expected int32 or int64, got %s", dtype_name(t->dtype));
}

bool is_contiguous(const Args *args, const Tensor *t) {
    if (!t || is_dense(t) || !elements(t)) return true;
    return fail_value(args, t->name, "expected a contiguous array");
}

bool rows_last(const Args *args, const Tensor *t) {
    if (!t) return true;
    if (t->ndim < 1) return fail_value(args, t->name, "expected at least 1 dimension, got 0");
    if (t->stride[t->ndim - 1] == 1 || t->shape[t->ndim - 1] <= 1 || !elements(t)) return true;
    return fail_value(args, t->name, "expected a contiguous last dimension, got a stride of %lld",
                      (long long)t->stride[t->ndim - 1]);
}

bool need(const Args *args, bool condition, const char *name, const char *expected) {
    return condition || fail_value(args, name, "expected %s", expected);
}
