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

COLD static bool fail(PyObject *type, const char *function, const char *name, const char *format,
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

/* Whether the spans of memory meet, which most do not. An empty array's meets none. */
static inline bool spans_meet(const Tensor *a, const Tensor *b) {
    return a->low < b->high && b->low < a->high;
}

/* `out` may share memory with `other` where the signature says so and both are one view. */
static bool check_apart(const Args *args, const Tensor *out, const Tensor *other, bool alias) {
    if (!spans_meet(out, other) || (alias && same_view(out, other)) || !overlap(out, other))
        return true;
    return fail_value(args, out->name, "output overlaps %s in memory", other->name);
}

/* An output tensor against every other tensor, each pair of outputs once. */
static bool check_tensor(const Args *args, int slot) {
    const Signature *s = args->signature;
    const Tensor *out = args->t[slot];
    if (out->low == out->high) return true;
    for (int other = 0; other < s->tensors; other++) {
        const Tensor *t = args->t[other];
        if (!t || !spans_meet(out, t) || (other <= slot && s->param[s->tensor[other]].output))
            continue;
        bool alias = s->param[s->tensor[slot]].alias == s->tensor[other];
        if (!check_apart(args, out, t, alias)) return false;
    }
    return true;
}

/* The arrays of a list against the tensors, where either is an output. */
static bool check_list(const Args *args, int p) {
    const Signature *s = args->signature;
    const TensorList *list = &args->list[s->param[p].slot];
    bool output = s->param[p].output;
    for (int64_t i = 0; i < list->n; i++) {
        const Tensor *item = &list->items[i];
        if (output && !check_output(args, item)) return false;
        for (int slot = 0; slot < s->tensors; slot++) {
            const Tensor *t = args->t[slot];
            if (!t || !spans_meet(item, t)) continue;
            bool written = s->param[s->tensor[slot]].output;
            if (output ? !check_apart(args, item, t, false)
                       : written && !check_apart(args, t, item, false))
                return false;
        }
    }
    return true;
}

/* An output must be writable and share memory with nothing but what it may be. (Lists among
 * themselves are the wrapper's to check.) */
static bool check_outputs(const Args *args) {
    const Signature *s = args->signature;
    for (int o = 0; o < s->outputs; o++) {
        const Tensor *t = args->t[s->output[o]];
        if (t && !check_output(args, t)) return false;
    }
    for (int o = 0; o < s->outputs; o++) {
        if (args->t[s->output[o]] && !check_tensor(args, s->output[o])) return false;
    }
    for (int p = 0; s->lists && p < s->count; p++) {
        if (s->param[p].kind == 'l' && !check_list(args, p)) return false;
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

/* The parameter of this name, which ends in a `,`, `?` or `)`; -1 where there is none. */
static int find_param(const Signature *s, const char *name) {
    size_t n = strcspn(name, ",?)");
    for (int p = 0; p < s->count; p++) {
        if (strlen(s->param[p].name) == n && !strncmp(s->param[p].name, name, n)) return p;
    }
    return -1;
}

/* What the other parameters decide: which one an output may be, and the order of reading. Outputs
 * come second, for they are mostly made like an input, and what is wrong with it must be told of
 * the input. */
static void finish_signature(Signature *s, const char *const *alias) {
    for (int outputs = 0; outputs <= 1; outputs++) {
        for (int p = 0; p < s->count; p++) {
            bool array = s->param[p].kind == 't' || s->param[p].kind == 'l';
            if (array && s->param[p].output == outputs) s->array[s->arrays++] = p;
        }
    }
    int floats = 0, ints = 0;
    for (int p = 0; p < s->count; p++) {
        struct Param *param = &s->param[p];
        if (param->kind == 't') s->tensor[s->tensors] = p;
        if (param->kind == 't' && param->output) s->output[s->outputs++] = s->tensors;
        param->alias = alias[p] ? find_param(s, alias[p]) : -1;
        param->slot = param->kind == 't'   ? s->tensors++
                      : param->kind == 'l' ? s->lists++
                      : param->kind == 'f' ? floats++
                                           : ints++;
    }
    s->ready = 1;
}

static bool compile_signature(Signature *s) {
    const char *alias[MAX_TENSORS + MAX_SCALARS] = {NULL};
    const char *at = strchr(s->text, '(');
    bool ok = (s->function = word(s->text, at));
    s->count = 0;
    for (at++; *at != ')' && s->count < MAX_TENSORS + MAX_SCALARS;) {
        while (*at == ' ' || *at == ',') at++;
        struct Param *p = &s->param[s->count++];
        p->output = starts(&at, ">");
        p->kind = starts(&at, "list ")    ? 'l'
                  : starts(&at, "float ") ? 'f'
                  : starts(&at, "int ")   ? 'i'
                                          : 't';
        const char *end = at + strcspn(at, "=?,)");
        ok = (p->name = word(at, end)) && ok;
        if (*end == '=') {
            alias[s->count - 1] = end + 1;
            end += strcspn(end, "?,)");
        }
        p->optional = *end == '?';
        at = end + p->optional;
    }
    if (ok) finish_signature(s, alias);
    if (!ok) PyErr_NoMemory();
    return ok;
}

/* Of a tuple or list: a borrowed reference. */
static PyObject *item_of(PyObject *items, Py_ssize_t n) {
    return PyTuple_CheckExact(items) ? PyTuple_GetItem(items, n) : PyList_GetItem(items, n);
}

/* Put the capsule, whose reference is taken, in the place of item n: of a tuple, in a list. */
static bool put_capsule(PyObject **items, Py_ssize_t n, PyObject *capsule) {
    if (PyTuple_CheckExact(*items)) {
        PyObject *tuple = *items, *list = PySequence_List(tuple);
        if (!list) return Py_DECREF(capsule), false;
        *items = list;
        Py_DECREF(tuple);
    }
    return !PyList_SetItem(*items, n, capsule);
}

/* A sequence of arrays, as a tuple (the caller's, or made of the sequence) or, where there are
 * capsules, a list of our own, with every item exported. */
static bool export_list(Args *args, const char *name, PyObject **object) {
    PyObject *type = (PyObject *)Py_TYPE(*object);
    bool plain = PyList_CheckExact(*object) || PyTuple_CheckExact(*object);
    bool array = !plain && PyObject_HasAttrString(type, "__dlpack__");
    PyObject *items = array ? NULL : PySequence_Tuple(*object);
    if (!items && (array || PyErr_ExceptionMatches(PyExc_TypeError))) {
        PyErr_Clear();
        return fail_type(args, name, "expected a sequence of arrays, got %R", type);
    }
    if (!items) return false;
    PyObject **owned = &args->owned[args->owners++];
    *owned = items;
    Py_ssize_t count = PyTuple_Size(items);
    for (Py_ssize_t n = 0; n < count; n++) {
        PyObject *item = item_of(*owned, n), *source = item;
        if (!export(args, name, &item)) return false;
        if (item != source && !put_capsule(owned, n, item)) return false;
    }
    *object = *owned;
    return true;
}

/* Room for the arrays of all lists, and for the name of a list without any. */
static bool allocate_items(Args *args, PyObject *const *object) {
    const Signature *s = args->signature;
    size_t n = 0;
    for (int p = 0; p < s->count; p++) {
        if (s->param[p].kind == 'l') n += (size_t)PyObject_Size(object[p]) + 1;
    }
    if (n <= FEW_ITEMS) return true;
    Tensor *items = PyMem_Malloc(n * sizeof *items);
    if (!items) return PyErr_NoMemory(), false;
    args->items = items;
    return true;
}

static bool to_list(const Args *args, TensorList *list, Tensor *items, const char *name,
                    PyObject *objects) {
    Py_ssize_t count = PyObject_Size(objects);
    items->name = name;
    *list = (TensorList){items, 0};
    for (; list->n < count; list->n++) {
        items[list->n].name = name;
        if (!to_tensor(args, &items[list->n], item_of(objects, list->n))) return false;
    }
    return true;
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

static bool to_scalar(Args *args, const struct Param *p, PyObject *object) {
    if (p->kind == 'f') {
        double value = args->f[p->slot] = PyFloat_AsDouble(object);
        if (value != -1.0 || !PyErr_Occurred()) return true;
    } else {
        int64_t value = args->i[p->slot] = PyLong_AsLongLong(object);
        if (value != -1 || !PyErr_Occurred()) return true;
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
    for (int p = 0; p < s->count; p++) {
        const struct Param *param = &s->param[p];
        object[p] = argv[p];
        if (param->kind == 't') {
            if (param->optional && argv[p] == Py_None) continue;
            if (!export(args, param->name, &object[p])) return false;
            if (object[p] != argv[p]) args->owned[args->owners++] = object[p];
        } else if (param->kind == 'l') {
            if (!export_list(args, param->name, &object[p])) return false;
        } else if (!to_scalar(args, param, argv[p])) {
            return false;
        }
    }
    return true;
}

static bool read_tensor(Args *args, const struct Param *param, PyObject *const *object, int p) {
    Tensor *t = &args->tensor[param->slot];
    t->name = param->name;
    if (param->optional && object[p] == Py_None) {
        args->t[param->slot] = NULL;
        return true;
    }
    args->t[param->slot] = t;
    const struct Param *alias = param->alias < 0 ? NULL : &args->signature->param[param->alias];
    bool read_before = alias && (!alias->output || param->alias < p);
    if (!read_before || object[p] != object[param->alias]) return to_tensor(args, t, object[p]);
    *t = args->tensor[alias->slot];
    t->name = param->name;
    return true;
}

static bool read_arrays(Args *args, PyObject *const *object) {
    const Signature *s = args->signature;
    if (s->lists && !allocate_items(args, object)) return false;
    Tensor *items = args->items;
    for (int a = 0; a < s->arrays; a++) {
        int p = s->array[a];
        const struct Param *param = &s->param[p];
        if (param->kind == 't') {
            if (!read_tensor(args, param, object, p)) return false;
        } else {
            TensorList *list = &args->list[param->slot];
            if (!to_list(args, list, items, param->name, object[p])) return false;
            items += list->n + 1;
        }
    }
    args->tensors = s->tensors, args->lists = s->lists;
    return true;
}

bool parse(Args *args, Signature *s, PyObject *const *argv, Py_ssize_t nargs) {
    if (!s->ready && !compile_signature(s)) return false;
    args->signature = s;
    args->items = args->few;
    args->owners = 0;
    if (nargs != s->count && nargs != s->count + 1) {
        PyErr_Format(PyExc_TypeError, "%s takes %d arguments and a stream, got %zd", s->text,
                     s->count, nargs);
        return false;
    }
    args->stream = nargs > s->count ? PyLong_AsVoidPtr(argv[s->count]) : NULL;
    if (!args->stream && PyErr_Occurred()) return false;
    PyObject *object[MAX_TENSORS + MAX_SCALARS];
    bool ok = run_python(args, argv, object) && read_arrays(args, object);
    ok = ok && same_device(args) && check_outputs(args);
    if (!ok) args_free(args);
    return ok;
}

void args_free(Args *args) {
    if (args->items != args->few) PyMem_Free(args->items);
    args->items = args->few;
    if (!args->owners) return;
    PyObject *type, *value, *trace; /* a deleter may run Python code, and an error may be pending */
    PyErr_Fetch(&type, &value, &trace);
    while (args->owners) Py_DECREF(args->owned[--args->owners]);
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
    PyObject *got = shape_tuple(t->ndim, t->stride);
    if (got)
        fail_value(args, t->name, "expected a contiguous array, got strides of %S elements", got);
    Py_XDECREF(got);
    return false;
}

bool rows_last(const Args *args, const Tensor *t) {
    if (!t) return true;
    if (t->ndim < 1) return fail_value(args, t->name, "expected at least 1 dimension, got 0");
    if (t->stride[t->ndim - 1] == 1 || t->shape[t->ndim - 1] <= 1 || !elements(t)) return true;
    return fail_value(args, t->name, "expected a contiguous last dimension, got a stride of %lld",
                      (long long)t->stride[t->ndim - 1]);
}

bool need_int(const Args *args, bool condition, const char *name, const char *expected,
              int64_t got) {
    return condition || fail_value(args, name, "expected %s, got %lld", expected, (long long)got);
}

bool need_float(const Args *args, bool condition, const char *name, const char *expected,
                double value) {
    if (condition) return true;
    PyObject *got = PyFloat_FromDouble(value);
    if (got) fail_value(args, name, "expected %s, got %S", expected, got);
    Py_XDECREF(got);
    return false;
}

bool need_both(const Args *args, const Tensor *t, const char *name, const Tensor *with,
               const char *other) {
    return !t == !with ||
           fail_value(args, name, "expected an array exactly where %s is one, got %s", other,
                      t ? "an array" : "None");
}
