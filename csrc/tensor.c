/* tensor.c: PyObject -> borrowed Tensor view.
 *
 * NumPy arrays are read through the NumPy C API; types with DLPack's C exchange API (torch from
 * 2.10 on) through its function table, found once per type; everything else through a capsule
 * from __dlpack__. All Python code of a producer runs, and all scalars are converted, before the
 * first check: what is checked is a copy that nobody can change. */
#include "tensor.h"

#define NPY_NO_DEPRECATED_API NPY_2_0_API_VERSION
#define NPY_TARGET_VERSION NPY_1_23_API_VERSION
#include <numpy/arrayobject.h>

#include <stdarg.h>
#include <string.h>

PyObject *ArgumentValueError, *ArgumentTypeError, *DLPackError;

/* ---- DLPack 1.x, as laid down in dlpack.h ---------------------------------------------------- */

typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} DLDataType;

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    DLDataType dtype;
    int64_t *shape, *strides;
    uint64_t byte_offset;
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor tensor;
    void *context;
    void (*deleter)(struct DLManagedTensor *);
} DLManagedTensor;

typedef struct DLManagedTensorVersioned {
    uint32_t major, minor;
    void *context;
    void (*deleter)(struct DLManagedTensorVersioned *);
    uint64_t flags;
    DLTensor tensor;
} DLManagedTensorVersioned;

typedef struct DLPackExchangeAPI {
    uint32_t major, minor;
    struct DLPackExchangeAPI *previous;
    void *allocator, *from_object, *to_object;
    int (*borrow)(void *object, DLTensor *out);
    void *current_stream;
} DLPackExchangeAPI;

enum { DL_CPU = 1, DL_CUDA = 2, DL_CUDA_HOST = 3, DL_CUDA_MANAGED = 13 };
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BFLOAT = 4, DL_BOOL = 6 };
#define DL_READ_ONLY 1u

/* ---- Small facts ----------------------------------------------------------------------------- */

int64_t item_size(Dtype dtype) {
    static const int8_t size[] = {
        [F32] = 4, [BF16] = 2, [F16] = 2, [F64] = 8, [I32] = 4, [I64] = 8, [U8] = 1, [BOOL] = 1};
    return size[dtype];
}

const char *dtype_name(Dtype dtype) {
    static const char *const name[] = {[F32] = "float32", [BF16] = "bfloat16", [F16] = "float16",
                                       [F64] = "float64", [I32] = "int32",     [I64] = "int64",
                                       [U8] = "uint8",    [BOOL] = "bool"};
    return name[dtype];
}

int64_t elements(const Tensor *t) {
    int64_t n = 1;
    for (int d = 0; d < t->ndim; d++) n *= t->shape[d];
    return n;
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

#define FAIL_WITH(type)                                                                            \
    va_list list;                                                                                  \
    va_start(list, format);                                                                        \
    fail(type, args->signature->function, name, format, list);                                     \
    va_end(list);                                                                                  \
    return false

bool fail_value(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(ArgumentValueError);
}

bool fail_type(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(ArgumentTypeError);
}

static bool fail_buffer(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(DLPackError);
}

/* ---- One object -> Tensor -------------------------------------------------------------------- */

/* What a shape and strides from outside must hold before an address is computed from them: no
 * negative size, and the first and last byte within 62 bits of the base pointer. */
static bool check_extent(const Args *args, const Tensor *t) {
    int64_t count = 1, low = 0, high = 0;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 0)
            return fail_buffer(args, t->name, "expected sizes >= 0, got %lld in dimension %d",
                               (long long)t->shape[d], d);
        if (t->shape[d] == 0) return true;
    }
    for (int d = 0; d < t->ndim; d++) {
        int64_t span, bytes;
        if (__builtin_mul_overflow(count, t->shape[d], &count) ||
            __builtin_mul_overflow(t->shape[d] - 1, t->stride[d], &span) ||
            __builtin_mul_overflow(span, item_size(t->dtype), &bytes) ||
            __builtin_add_overflow(bytes < 0 ? low : high, bytes, bytes < 0 ? &low : &high) ||
            count > INT64_MAX / 8 || high > INT64_MAX / 2 || low < INT64_MIN / 2)
            return fail_buffer(args, t->name, "expected an array of less than 2^62 bytes, got %s",
                               "one whose shape and strides overflow");
    }
    if (!t->data) return fail_buffer(args, t->name, "expected memory, got a null data pointer");
    return true;
}

static bool dtype_of_dlpack(DLDataType d, Dtype *out) {
    if (d.lanes != 1) return false;
    switch (d.code << 8 | d.bits) {
    case DL_FLOAT << 8 | 32: *out = F32; return true;
    case DL_BFLOAT << 8 | 16: *out = BF16; return true;
    case DL_FLOAT << 8 | 16: *out = F16; return true;
    case DL_FLOAT << 8 | 64: *out = F64; return true;
    case DL_INT << 8 | 32: *out = I32; return true;
    case DL_INT << 8 | 64: *out = I64; return true;
    case DL_UINT << 8 | 8: *out = U8; return true;
    case DL_BOOL << 8 | 8: *out = BOOL; return true;
    default: return false;
    }
}

static bool from_dltensor(const Args *args, Tensor *t, const DLTensor *d) {
    if (d->device_type == DL_CPU || d->device_type == DL_CUDA_HOST) {
        t->device = -1;
    } else if (d->device_type == DL_CUDA || d->device_type == DL_CUDA_MANAGED) {
        t->device = d->device_id;
    } else {
        return fail_buffer(args, t->name, "expected a CPU or CUDA array, got DLPack device %d",
                           (int)d->device_type);
    }
    if (!dtype_of_dlpack(d->dtype, &t->dtype))
        return fail_type(args, t->name,
                         "expected float32, bfloat16, float16, float64, int32, int64, uint8 or "
                         "bool, got DLPack type (code %d, %d bits, %d lanes)",
                         d->dtype.code, d->dtype.bits, d->dtype.lanes);
    if (d->ndim < 0 || d->ndim > MAX_DIMS || (d->ndim && !d->shape))
        return fail_buffer(args, t->name, "expected 0 to %d dimensions with sizes, got %d",
                           MAX_DIMS, (int)d->ndim);
    t->ndim = d->ndim;
    for (int i = 0; i < t->ndim; i++) t->shape[i] = d->shape[i];
    int64_t dense = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        t->stride[i] = d->strides ? d->strides[i] : dense;
        if (__builtin_mul_overflow(dense, t->shape[i] > 1 ? t->shape[i] : 1, &dense)) dense = 0;
    }
    if (d->byte_offset > INT64_MAX / 2 ||
        (uintptr_t)d->data + d->byte_offset < (uintptr_t)d->data)
        return fail_buffer(args, t->name, "expected a byte offset below 2^62, got a larger one");
    t->data = d->data ? (char *)d->data + d->byte_offset : NULL;
    return check_extent(args, t);
}

static int bfloat16_code(PyArray_Descr *descr) {
    /* ml_dtypes registers bfloat16 with NumPy at run time; another type can share its kind and
     * size, so the scalar type itself is compared, taken once from the imported module. */
    static PyTypeObject *bfloat16;
    if (!bfloat16) {
        PyObject *modules = PyImport_GetModuleDict();
        PyObject *ml_dtypes = modules ? PyDict_GetItemString(modules, "ml_dtypes") : NULL;
        if (!ml_dtypes) return -1;
        bfloat16 = (PyTypeObject *)PyObject_GetAttrString(ml_dtypes, "bfloat16");
        if (!bfloat16) {
            PyErr_Clear();
            return -1;
        }
    }
    return descr->typeobj == bfloat16 ? BF16 : -1;
}

static bool from_numpy(const Args *args, Tensor *t, PyObject *object) {
    PyArrayObject *array = (PyArrayObject *)object;
    PyArray_Descr *descr = PyArray_DESCR(array);
    int dtype = -1;
    switch (descr->type_num) {
    case NPY_FLOAT: dtype = F32; break;
    case NPY_DOUBLE: dtype = F64; break;
    case NPY_HALF: dtype = F16; break;
    case NPY_INT: dtype = I32; break;
    case NPY_LONG:
    case NPY_LONGLONG: dtype = I64; break;
    case NPY_UBYTE: dtype = U8; break;
    case NPY_BOOL: dtype = BOOL; break;
    default: dtype = bfloat16_code(descr);
    }
    if (dtype < 0 || PyArray_ISBYTESWAPPED(array) || !PyArray_ISALIGNED(array))
        return fail_type(args, t->name,
                         "expected an aligned array of native float32, float64, float16, "
                         "ml_dtypes.bfloat16, int32 or int64, got %R",
                         descr);
    static PyObject *masked; /* a mask would be lost without a word */
    if (!PyArray_CheckExact(object)) {
        PyObject *ma = masked ? NULL : PyDict_GetItemString(PyImport_GetModuleDict(), "numpy.ma");
        if (ma) masked = PyObject_GetAttrString(ma, "MaskedArray");
        if (masked && PyObject_IsInstance(object, masked) == 1)
            return fail_type(args, t->name, "expected a plain array, got a masked one");
        PyErr_Clear();
    }
    t->dtype = (Dtype)dtype;
    t->device = -1;
    t->ndim = PyArray_NDIM(array);
    t->data = PyArray_DATA(array);
    t->readonly = !PyArray_ISWRITEABLE(array);
    if (t->ndim > MAX_DIMS)
        return fail_value(args, t->name, "expected at most %d dimensions, got %d", MAX_DIMS,
                          t->ndim);
    int64_t size = item_size(t->dtype);
    for (int d = 0; d < t->ndim; d++) {
        int64_t bytes = PyArray_STRIDES(array)[d];
        t->shape[d] = PyArray_DIMS(array)[d];
        t->stride[d] = bytes / size;
        if (bytes % size && t->shape[d] > 1)
            return fail_value(args, t->name, "expected strides in whole elements, got %lld bytes",
                              (long long)bytes);
    }
    return check_extent(args, t);
}

/* True where instances of `type` hold their own memory: torch's wrapper tensors (fake tensors,
 * DTensor, ...) inherit the exchange API but define __torch_dispatch__ and have no data. */
static bool is_plain_type(PyTypeObject *type) {
    PyObject *dispatch = PyObject_GetAttrString((PyObject *)type, "__torch_dispatch__");
    if (!dispatch) {
        PyErr_Clear();
        return true;
    }
    PyObject *torch_c = PyDict_GetItemString(PyImport_GetModuleDict(), "torch._C");
    PyObject *disabled =
        torch_c ? PyObject_GetAttrString(torch_c, "_disabled_torch_dispatch_impl") : NULL;
    if (!disabled) PyErr_Clear();
    bool plain = !disabled || dispatch == disabled;
    Py_XDECREF(disabled);
    Py_DECREF(dispatch);
    return plain;
}

typedef struct {
    PyTypeObject *type; /* a strong reference: an address could be used again */
    const DLPackExchangeAPI *api;
    bool plain;
} Producer;

/* What is known of `type`, looked up once. Two torch types (Tensor, Parameter) are the common
 * case; where the table is full, the last entry is overwritten. */
static const Producer *producer_of(PyTypeObject *type) {
    static Producer cache[8];
    int slot = 0;
    for (; slot < 7 && cache[slot].type; slot++) {
        if (cache[slot].type == type) return &cache[slot];
    }
    if (cache[slot].type == type) return &cache[slot];
    Producer found = {.type = type, .plain = is_plain_type(type)};
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        found.api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        while (found.api && found.api->major != 1) found.api = found.api->previous;
        if (found.api && !found.api->borrow) found.api = NULL;
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    Py_INCREF((PyObject *)type);
    PyTypeObject *old = cache[slot].type;
    cache[slot] = found;
    Py_XDECREF((PyObject *)old);
    return &cache[slot];
}

/* "torch.Tensor is not supported: <the pending error's text>", with the argument's name. */
static bool rename_error(const Args *args, Tensor *t, PyObject *object) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    fail_type(args, t->name, "expected a dense array with memory of its own, got %R (%S)",
              (PyObject *)Py_TYPE(object), value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return false;
}

/* `__dlpack__`: `*owner` keeps the capsule alive for the call. */
static bool from_capsule(const Args *args, Tensor *t, PyObject *object, PyObject *method,
                         PyObject **owner) {
    static PyObject *versioned_kwargs, *empty;
    if (!versioned_kwargs) versioned_kwargs = Py_BuildValue("{s:(ii)}", "max_version", 1, 3);
    if (!empty) empty = PyTuple_New(0);
    if (!versioned_kwargs || !empty) return false;
    PyObject *capsule = PyObject_Call(method, empty, versioned_kwargs);
    if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) { /* a producer of before 1.0 */
        PyErr_Clear();
        capsule = PyObject_CallNoArgs(method);
    }
    if (!capsule) return false;
    *owner = capsule;
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        const DLManagedTensorVersioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (m->major != 1)
            return fail_buffer(args, t->name, "expected DLPack version 1, got %u", m->major);
        t->readonly = (m->flags & DL_READ_ONLY) != 0;
        return from_dltensor(args, t, &m->tensor);
    }
    if (PyCapsule_IsValid(capsule, "dltensor"))
        return from_dltensor(
            args, t, &((DLManagedTensor *)PyCapsule_GetPointer(capsule, "dltensor"))->tensor);
    if (PyCapsule_CheckExact(capsule))
        return fail_buffer(args, t->name, "expected an unused DLPack capsule, got one named %s",
                           PyCapsule_GetName(capsule) ? PyCapsule_GetName(capsule) : "NULL");
    return fail_type(args, t->name, "expected __dlpack__ to return a capsule, got %R", capsule);
    (void)object;
}

static bool to_tensor(const Args *args, Tensor *t, PyObject *object, PyObject **owner) {
    t->readonly = 0;
    if (PyArray_Check(object)) return from_numpy(args, t, object);
    const Producer *producer = producer_of(Py_TYPE(object));
    if (!producer->plain)
        return fail_type(args, t->name,
                         "expected a tensor with memory of its own, got %R: unwrap it first "
                         "(a DTensor with to_local())",
                         (PyObject *)Py_TYPE(object));
    if (producer->api) {
        DLTensor d = {0};
        if (producer->api->borrow(object, &d)) return rename_error(args, t, object);
        return from_dltensor(args, t, &d);
    }
    PyObject *method = PyObject_GetAttrString(object, "__dlpack__");
    if (!method) {
        PyErr_Clear();
        return fail_type(args, t->name, "expected an array (NumPy, torch, DLPack), got %R",
                         (PyObject *)Py_TYPE(object));
    }
    bool ok = from_capsule(args, t, object, method, owner);
    Py_DECREF(method);
    return ok;
}

/* ---- Overlap --------------------------------------------------------------------------------- */

static void byte_range(const Tensor *t, uintptr_t *low, uintptr_t *high) {
    int64_t first = 0, last = 0, size = item_size(t->dtype);
    for (int d = 0; d < t->ndim; d++) {
        int64_t span = (t->shape[d] - 1) * t->stride[d] * size;
        *(span < 0 ? &first : &last) += span;
    }
    *low = (uintptr_t)t->data + first;
    *high = (uintptr_t)t->data + last + size;
}

/* Merge dimensions that lie densely in one another, from the innermost on: a block of `width`
 * elements that repeats with one `pitch`. False where it repeats in more than one way. */
static bool as_rows(const Tensor *t, int64_t *width, int64_t *pitch) {
    *width = 1, *pitch = 0;
    int64_t count = 1;
    for (int d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] == 1) continue;
        if (*pitch == 0 && t->stride[d] == *width) {
            *width *= t->shape[d];
        } else if (*pitch == 0) {
            *pitch = t->stride[d], count = t->shape[d];
        } else if (t->stride[d] == *pitch * count) {
            count *= t->shape[d];
        } else {
            return false;
        }
    }
    return true;
}

/* True only where two views surely share an element: slices of one packed buffer, whose ranges
 * interleave, are told apart by their place within the pitch they have in common. */
static bool overlap(const Tensor *a, const Tensor *b) {
    if (a->device != b->device || !elements(a) || !elements(b)) return false;
    uintptr_t a_low, a_high, b_low, b_high;
    byte_range(a, &a_low, &a_high);
    byte_range(b, &b_low, &b_high);
    if (a_high <= b_low || b_high <= a_low) return false;
    int64_t a_width, a_pitch, b_width, b_pitch, a_size = item_size(a->dtype),
                                                b_size = item_size(b->dtype);
    if (!as_rows(a, &a_width, &a_pitch) || !as_rows(b, &b_width, &b_pitch))
        return a->data == b->data;
    a_width *= a_size, a_pitch *= a_size, b_width *= b_size, b_pitch *= b_size;
    if (a_pitch == 0 && b_pitch == 0) return true;
    int64_t pitch = a_pitch ? a_pitch : b_pitch;
    if ((b_pitch && b_pitch != pitch) || pitch <= 0) return a->data == b->data;
    int64_t apart = (int64_t)((uintptr_t)b->data - (uintptr_t)a->data) % pitch;
    if (apart < 0) apart += pitch;
    return apart < a_width || pitch - apart < b_width;
}

static bool same_view(const Tensor *a, const Tensor *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return false;
    for (int d = 0; d < a->ndim; d++) {
        if (a->shape[d] != b->shape[d] || (a->shape[d] > 1 && a->stride[d] != b->stride[d]))
            return false;
    }
    return true;
}

static bool repeats_itself(const Tensor *t) {
    if (!elements(t)) return false; /* NumPy gives an empty array strides of 0 */
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] > 1 && t->stride[d] == 0) return true;
    }
    return false;
}

/* An output must be writable and share memory with nothing but what it may be. */
static bool check_outputs(const Args *args, int tensors) {
    const Signature *s = args->signature;
    for (int p = 0, o = 0; p < s->count && o < tensors; p++) {
        if (s->param[p].kind != 't') continue;
        const Tensor *out = args->t[o++];
        if (!out || !s->param[p].output) continue;
        if (out->readonly) return fail_value(args, out->name, "output array is read-only");
        if (repeats_itself(out))
            return fail_value(args, out->name, "output repeats its own memory (a stride of 0)");
        for (int i = 0; i < tensors; i++) {
            const Tensor *other = args->t[i];
            if (!other || i == o - 1 || !overlap(out, other)) continue;
            if (s->param[p].inplace && same_view(out, other)) continue;
            return fail_value(args, out->name, "output overlaps %s in memory", other->name);
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
        p->inplace = starts(&at, "=");
        p->output = p->inplace | starts(&at, ">");
        p->kind = starts(&at, "list ")    ? 'l'
                  : starts(&at, "float ") ? 'f'
                  : starts(&at, "int ")   ? 'i'
                                          : 't';
        const char *end = at + strcspn(at, "?,)");
        p->name = word(at, end);
        p->optional = *end == '?';
        at = end + p->optional;
        if (!p->name) s->function = NULL;
    }
    s->ready = s->function != NULL;
    if (!s->ready) PyErr_NoMemory();
    return s->ready;
}

static bool to_list(Args *args, TensorList *list, const struct Param *p, PyObject *object,
                    PyObject *owners) {
    PyObject *fast = PySequence_Tuple(object);
    if (!fast) {
        PyErr_Clear();
        return fail_type(args, p->name, "expected a sequence of arrays, got %R",
                         (PyObject *)Py_TYPE(object));
    }
    list->n = PyTuple_Size(fast);
    Tensor *items = PyMem_Calloc((size_t)list->n + 1, sizeof *items);
    list->items = items;
    bool ok = items && PyList_Append(owners, fast) == 0;
    if (!items) PyErr_NoMemory();
    Py_DECREF(fast);
    for (int64_t n = 0; ok && n < list->n; n++) {
        PyObject *owner = NULL;
        items[n].name = p->name;
        ok = to_tensor(args, &items[n], PyTuple_GetItem(fast, n), &owner);
        if (owner) {
            ok = PyList_Append(owners, owner) == 0 && ok;
            Py_DECREF(owner);
        }
        if (ok && p->output && items[n].readonly)
            ok = fail_value(args, p->name, "output array %lld is read-only", (long long)n);
    }
    return ok;
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

static bool same_device(Args *args, int tensors, int lists) {
    const Tensor *first = NULL;
    args->device = -1;
    for (int i = 0; i < tensors; i++) {
        if (args->t[i] && !one_device(args, args->t[i], &first)) return false;
    }
    for (int l = 0; l < lists; l++) {
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
    if (!PyErr_ExceptionMatches(PyExc_TypeError) && !PyErr_ExceptionMatches(PyExc_OverflowError))
        return false;
    PyErr_Clear();
    return fail_type(args, p->name, "expected %s, got %R",
                     p->kind == 'f' ? "a real number" : "a 64-bit integer", object);
}

bool parse(Args *args, Signature *s, PyObject *const *argv, Py_ssize_t nargs) {
    if (!s->ready && !compile_signature(s)) return false;
    args->signature = s;
    if (nargs != s->count && nargs != s->count + 1) {
        PyErr_Format(PyExc_TypeError, "%s takes %d arguments and a stream, got %zd", s->text,
                     s->count, nargs);
        return false;
    }
    int t = 0, f = 0, i = 0, l = 0;
    PyObject *owners = NULL;
    bool ok = true;
    memset(args->list, 0, sizeof args->list);
    for (int p = 0; ok && p < s->count; p++) { /* scalars first: their code may run Python */
        if (s->param[p].kind == 'f') ok = to_scalar(args, &s->param[p], argv[p], f++, i);
        if (s->param[p].kind == 'i') ok = to_scalar(args, &s->param[p], argv[p], f, i++);
    }
    args->stream = nargs > s->count ? PyLong_AsVoidPtr(argv[s->count]) : NULL;
    ok = ok && !(args->stream == NULL && PyErr_Occurred());
    for (int p = 0; ok && p < s->count; p++) {
        const struct Param *param = &s->param[p];
        if (param->kind == 'f' || param->kind == 'i') continue;
        if (param->kind == 'l') {
            if (!owners && !(owners = PyList_New(0))) return false;
            ok = to_list(args, &args->list[l++], param, argv[p], owners);
            continue;
        }
        args->t[t] = argv[p] == Py_None && param->optional ? NULL : &args->tensor[t];
        args->tensor[t].name = param->name;
        PyObject *owner = NULL;
        if (args->t[t]) ok = to_tensor(args, &args->tensor[t], argv[p], &owner);
        t++;
        if (owner) {
            if (!owners) owners = PyList_New(0);
            ok = owners && PyList_Append(owners, owner) == 0 && ok;
            Py_DECREF(owner);
        }
    }
    ok = ok && same_device(args, t, l) && check_outputs(args, t);
    args->owners = owners;
    if (!ok) args_free(args);
    return ok;
}

void args_free(Args *args) {
    for (int l = 0; l < MAX_LISTS; l++) PyMem_Free((void *)args->list[l].items);
    memset(args->list, 0, sizeof args->list);
    Py_CLEAR(args->owners);
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
    return fail_type(args, t->name, "expected %s, got %s", dtype_name(dtype),
                     dtype_name(t->dtype));
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
    if (!t) return true;
    int64_t dense = 1;
    for (int d = t->ndim - 1; d >= 0; d--) {
        if (t->shape[d] != 1 && t->stride[d] != dense && elements(t))
            return fail_value(args, t->name, "expected a contiguous array");
        dense *= t->shape[d];
    }
    return true;
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

/* ---- Init ------------------------------------------------------------------------------------ */

static PyObject *new_exception(PyObject *module, const char *name, const char *doc, PyObject *a,
                               PyObject *b) {
    PyObject *bases = PyTuple_Pack(2, a, b);
    PyObject *type = bases ? PyErr_NewExceptionWithDoc(name, doc, bases, NULL) : NULL;
    Py_XDECREF(bases);
    if (type && PyModule_AddObjectRef(module, strrchr(name, '.') + 1, type)) Py_CLEAR(type);
    return type;
}

int tensor_init(PyObject *module) {
    if (PyArray_ImportNumPyAPI() < 0) return -1;
    ArgumentValueError = new_exception(
        module, "flatout.ArgumentValueError",
        "A wrong shape, size, stride, device or value (also a RuntimeError, as torch raises).",
        PyExc_ValueError, PyExc_RuntimeError);
    ArgumentTypeError = new_exception(
        module, "flatout.ArgumentTypeError",
        "A wrong type or dtype (also a RuntimeError, as torch raises).", PyExc_TypeError,
        PyExc_RuntimeError);
    DLPackError = new_exception(module, "flatout.DLPackError",
                                "A DLPack producer handed over something invalid.",
                                PyExc_BufferError, PyExc_ValueError);
    return ArgumentValueError && ArgumentTypeError && DLPackError ? 0 : -1;
}
