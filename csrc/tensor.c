/* tensor.c: PyObject -> borrowed Tensor view.
 *
 * NumPy arrays are read through the NumPy C API; types with DLPack's C exchange API (torch from
 * 2.10 on) through its function table, found once per type; everything else through a capsule
 * from __dlpack__. All Python code of a producer runs, and all scalars are converted, before the
 * first array is looked at: what is checked is a copy that nobody can change. */
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
enum { DL_READ_ONLY = 1, DL_COPIED = 2 }; /* a copy must not be written to either */

/* ---- Small facts ----------------------------------------------------------------------------- */

int64_t item_size(Dtype dtype) {
    static const int8_t size[] = {
        [F32] = 4, [BF16] = 2, [F16] = 2, [F64] = 8, [I32] = 4, [I64] = 8, [U8] = 1, [BOOL] = 1};
    return size[dtype];
}

const char *dtype_name(Dtype dtype) {
    static const char *const name[] = {
        [F32] = "float32", [BF16] = "bfloat16", [F16] = "float16", [F64] = "float64",
        [I32] = "int32",   [I64] = "int64",     [U8] = "uint8",    [BOOL] = "bool"};
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

static bool fail_buffer(const Args *args, const char *name, const char *format, ...) {
    FAIL_WITH(DLPackError);
}

/* ---- One object -> Tensor -------------------------------------------------------------------- */

/* What a shape and strides from outside must hold before an address is computed from them: no
 * negative size, and every byte within 2^60 of the base pointer, which is aligned. An empty array
 * without memory gets an address, because even memcpy() of nothing wants one. */
static bool check_extent(const Args *args, Tensor *t) {
    static double somewhere;
    const int64_t limit = INT64_MAX >> 3, size = item_size(t->dtype);
    int64_t count = size, low = 0, high = size;
    bool empty = false, overflow = false;
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 0)
            return fail_buffer(args, t->name, "expected sizes >= 0, got %lld in dimension %d",
                               (long long)t->shape[d], d);
        empty |= t->shape[d] == 0;
    }
    for (int d = 0; d < t->ndim && !overflow; d++) {
        int64_t steps = t->shape[d] > 1 ? t->shape[d] - 1 : 0, span = 0;
        overflow = __builtin_mul_overflow(count, steps + 1, &count) || count > limit;
        if (overflow || empty) continue; /* no address is computed in an empty array */
        overflow = __builtin_mul_overflow(steps * size, t->stride[d], &span) || span > limit ||
                   span < -limit;
        *(span < 0 ? &low : &high) += overflow ? 0 : span;
        overflow |= high > limit || low < -limit;
    }
    uintptr_t at = (uintptr_t)t->data;
    if (overflow || (!empty && (at + (uint64_t)high < at || at < (uint64_t)-low) && at))
        return fail_buffer(args, t->name, "expected sizes and strides of less than 2^60 bytes");
    if (empty) {
        if (!at) t->data = &somewhere;
        return true;
    }
    if (!at) return fail_buffer(args, t->name, "expected memory, got a null data pointer");
    return at % (size_t)size == 0 ||
           fail_buffer(args, t->name, "expected memory aligned to %d bytes", (int)size);
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
        if (d->device_id < 0)
            return fail_buffer(args, t->name, "expected a CUDA device, got %d", d->device_id);
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
    if (d->byte_offset > INT64_MAX >> 3 || (uintptr_t)d->data + d->byte_offset < (uintptr_t)d->data)
        return fail_buffer(args, t->name, "expected a byte offset below 2^60, got a larger one");
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

/* numpy.ma's arrays: the mask would be lost without a word. */
static bool is_masked(PyTypeObject *type) {
    static PyObject *masked;
    PyObject *ma = masked ? NULL : PyDict_GetItemString(PyImport_GetModuleDict(), "numpy.ma");
    if (ma) masked = PyObject_GetAttrString(ma, "MaskedArray");
    if (!masked) PyErr_Clear();
    return masked && PyType_IsSubtype(type, (PyTypeObject *)masked);
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
    if (dtype < 0 || PyArray_ISBYTESWAPPED(array))
        return fail_type(args, t->name,
                         "expected native float32, float64, float16, ml_dtypes.bfloat16, int32, "
                         "int64, uint8 or bool, got %R",
                         descr);
    if (!PyArray_CheckExact(object) && is_masked(Py_TYPE(object)))
        return fail_type(args, t->name, "expected a plain array, got a masked one");
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

/* What is known of `type`, looked up once where it has the exchange API. Two torch types (Tensor,
 * Parameter) are the common case; where the table is full, the last entry is overwritten. */
static Producer producer_of(PyTypeObject *type) {
    enum { PLACES = 8 };
    static Producer cache[PLACES];
    static int used;
    for (int i = 0; i < used; i++) {
        if (cache[i].type == type) return cache[i];
    }
    Producer found = {.type = type, .plain = is_plain_type(type)};
    PyObject *capsule = PyObject_GetAttrString((PyObject *)type, "__dlpack_c_exchange_api__");
    if (capsule && PyCapsule_IsValid(capsule, "dlpack_exchange_api")) {
        found.api = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
        while (found.api && found.api->major != 1) found.api = found.api->previous;
        if (found.api && !found.api->borrow) found.api = NULL;
    }
    Py_XDECREF(capsule);
    PyErr_Clear();
    if (!found.api) return found;
    int place = used < PLACES ? used++ : PLACES - 1;
    PyTypeObject *old = cache[place].type;
    Py_INCREF((PyObject *)type);
    cache[place] = found;
    Py_XDECREF((PyObject *)old); /* may run Python code: the table is whole again by now */
    return found;
}

/* The pending error becomes a TypeError that names the argument. */
static bool rename_error(const Args *args, const char *name, PyObject *object) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    fail_type(args, name, "expected a dense array with memory of its own, got %R (%S)",
              (PyObject *)Py_TYPE(object), value ? value : Py_None);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    return false;
}

/* A capsule is borrowed from, never consumed: its own destructor calls the deleter. */
static bool from_capsule(const Args *args, Tensor *t, PyObject *capsule) {
    if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
        const DLManagedTensorVersioned *m = PyCapsule_GetPointer(capsule, "dltensor_versioned");
        if (m->major != 1)
            return fail_buffer(args, t->name, "expected DLPack version 1, got %u", m->major);
        t->readonly = m->flags & (DL_READ_ONLY | DL_COPIED);
        return from_dltensor(args, t, &m->tensor);
    }
    if (PyCapsule_IsValid(capsule, "dltensor"))
        return from_dltensor(
            args, t, &((DLManagedTensor *)PyCapsule_GetPointer(capsule, "dltensor"))->tensor);
    const char *name = PyCapsule_GetName(capsule);
    return fail_buffer(args, t->name, "expected an unused DLPack capsule, got one named %s",
                       name ? name : "NULL");
}

/* No Python code runs from here on: `object` is what export() left. */
static bool to_tensor(const Args *args, Tensor *t, PyObject *object) {
    t->readonly = 0;
    if (PyArray_Check(object)) return from_numpy(args, t, object);
    if (PyCapsule_CheckExact(object)) return from_capsule(args, t, object);
    DLTensor d = {0};
    if (producer_of(Py_TYPE(object)).api->borrow(object, &d))
        return rename_error(args, t->name, object);
    return from_dltensor(args, t, &d);
}

/* Keyword arguments of __dlpack__: a CUDA producer is told the stream that will read (1 is the
 * legacy default stream, 0 is not allowed); a CPU producer must not be given one. */
static PyObject *dlpack_arguments(const Args *args, PyObject *object, bool version) {
    PyObject *device = PyObject_CallMethod(object, "__dlpack_device__", NULL);
    int type = DL_CPU, index = 0;
    bool known = device && PyTuple_Check(device) && PyArg_ParseTuple(device, "ii", &type, &index);
    if (!known) PyErr_Clear();
    Py_XDECREF(device);
    bool cuda = type == DL_CUDA || type == DL_CUDA_MANAGED;
    Py_ssize_t stream = args->stream ? (Py_ssize_t)args->stream : 1;
    if (cuda && version)
        return Py_BuildValue("{s:(ii),s:n}", "max_version", 1, 3, "stream", stream);
    if (cuda) return Py_BuildValue("{s:n}", "stream", stream);
    return version ? Py_BuildValue("{s:(ii)}", "max_version", 1, 3) : PyDict_New();
}

static PyObject *call_dlpack(const Args *args, PyObject *object, PyObject *method) {
    PyObject *none = PyTuple_New(0), *capsule = NULL;
    for (int version = 1; version >= 0 && none && !capsule; version--) {
        if (!version && !PyErr_ExceptionMatches(PyExc_TypeError)) break;
        PyErr_Clear(); /* a producer of before DLPack 1.0 does not know max_version */
        PyObject *keywords = dlpack_arguments(args, object, version);
        capsule = keywords ? PyObject_Call(method, none, keywords) : NULL;
        Py_XDECREF(keywords);
    }
    Py_XDECREF(none);
    return capsule;
}

/* torch before 2.10 exports nothing that requires a gradient. A new reference. */
static PyObject *detached(PyObject *object) {
    PyObject *flag = PyObject_GetAttrString(object, "requires_grad");
    if (!flag) PyErr_Clear();
    bool detach = flag == Py_True;
    Py_XDECREF(flag);
    return detach ? PyObject_CallMethod(object, "detach", NULL) : Py_NewRef(object);
}

/* args->owners keeps `item` (a new reference, or NULL with an exception set) for the call. */
static bool own(Args *args, PyObject *item) {
    if (item && !args->owners) args->owners = PyList_New(0);
    bool ok = item && args->owners && PyList_Append(args->owners, item) == 0;
    Py_XDECREF(item);
    return ok;
}

/* Run what Python code reading `*object` takes: afterwards it is a NumPy array, an instance of a
 * type with the exchange API, or a capsule that args->owners holds. */
static bool export(Args *args, const char *name, PyObject **object) {
    if (PyArray_Check(*object)) return true;
    Producer producer = producer_of(Py_TYPE(*object));
    if (!producer.plain)
        return fail_type(args, name,
                         "expected a tensor with memory of its own, got %R: unwrap it first "
                         "(a DTensor with to_local())",
                         (PyObject *)Py_TYPE(*object));
    if (producer.api) return true;
    if (!PyObject_HasAttrString((PyObject *)Py_TYPE(*object), "__dlpack__"))
        return fail_type(args, name, "expected an array (NumPy, torch, DLPack), got %R",
                         (PyObject *)Py_TYPE(*object));
    PyObject *source = detached(*object), *capsule = NULL;
    PyObject *method = source ? PyObject_GetAttrString(source, "__dlpack__") : NULL;
    if (method) capsule = call_dlpack(args, source, method);
    Py_XDECREF(method);
    Py_XDECREF(source);
    *object = capsule;
    if (!own(args, capsule)) return false;
    return PyCapsule_CheckExact(capsule) ||
           fail_type(args, name, "expected __dlpack__ to return a capsule, got %R", capsule);
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

typedef struct {
    int64_t stride, count; /* in bytes */
} Span;

/* The bytes of `t` as *base + sum_i k_i * stride_i, 0 <= k_i < count_i: strides positive and
 * rising, dense dimensions merged, so that spans[0] is a block of bytes. Returns how many. */
static int to_spans(const Tensor *t, Span *spans, uintptr_t *base) {
    int n = 1;
    int64_t size = item_size(t->dtype);
    *base = (uintptr_t)t->data;
    spans[0] = (Span){1, size};
    for (int d = 0; d < t->ndim; d++) {
        Span new = {t->stride[d] * size, t->shape[d]};
        if (new.count == 1 || new.stride == 0) continue;
        if (new.stride < 0) {
            *base += (uintptr_t)((new.count - 1) * new.stride);
            new.stride = -new.stride;
        }
        int at = n++;
        for (; at > 1 && spans[at - 1].stride > new.stride; at--) spans[at] = spans[at - 1];
        spans[at] = new;
    }
    int merged = 1;
    for (int i = 1; i < n; i++) {
        Span *last = &spans[merged - 1];
        if (spans[i].stride == last->stride * last->count) {
            last->count *= spans[i].count;
        } else {
            spans[merged++] = spans[i];
        }
    }
    return merged;
}

/* stride * k with low <= k <= high */
typedef struct {
    int64_t stride, low, high;
} Term;

static int add_terms(Term *terms, int n, const Span *spans, int count, bool minus) {
    for (int i = 0; i < count; i++) {
        int at = 0;
        while (at < n && terms[at].stride > spans[i].stride) at++;
        if (at == n || terms[at].stride != spans[i].stride) {
            memmove(&terms[at + 1], &terms[at], (size_t)(n++ - at) * sizeof *terms);
            terms[at] = (Term){.stride = spans[i].stride};
        }
        *(minus ? &terms[at].low : &terms[at].high) += (minus ? -1 : 1) * (spans[i].count - 1);
    }
    return n;
}

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

/* Whether sum_i stride_i * k_i = target for some k, strides falling to 1. Exact: a stride that is
 * as long as all below it together leaves two values of k to try, and arrays are made of such.
 * Where they are not and the search grows long, the answer is yes. */
static bool has_solution(const Term *term, int n, int64_t target, int *steps) {
    if (n == 0) return target == 0;
    int64_t low = 0, high = 0;
    for (int i = 1; i < n; i++) {
        low += term[i].stride * term[i].low;
        high += term[i].stride * term[i].high;
    }
    int64_t first = -floor_div(high - target, term->stride);
    int64_t last = floor_div(target - low, term->stride);
    if (first < term->low) first = term->low;
    if (last > term->high) last = term->high;
    for (int64_t k = first; k <= last; k++) {
        if (--*steps < 0 || has_solution(term + 1, n - 1, target - term->stride * k, steps))
            return true;
    }
    return false;
}

/* Whether two views share a byte. Slices of one packed buffer, whose ranges interleave, do not. */
static bool overlap(const Tensor *a, const Tensor *b) {
    if (a->device != b->device || !elements(a) || !elements(b)) return false;
    uintptr_t a_low, a_high, b_low, b_high;
    byte_range(a, &a_low, &a_high);
    byte_range(b, &b_low, &b_high);
    if (a_high <= b_low || b_high <= a_low) return false;
    Span spans[MAX_DIMS + 1];
    Term terms[2 * (MAX_DIMS + 1)];
    int n = add_terms(terms, 0, spans, to_spans(a, spans, &a_low), false);
    n = add_terms(terms, n, spans, to_spans(b, spans, &b_low), true);
    int steps = 1 << 16;
    return has_solution(terms, n, (int64_t)(b_low - a_low), &steps);
}

static bool same_view(const Tensor *a, const Tensor *b) {
    if (a->data != b->data || a->ndim != b->ndim || a->dtype != b->dtype) return false;
    for (int d = 0; d < a->ndim; d++) {
        if (a->shape[d] != b->shape[d] || (a->shape[d] > 1 && a->stride[d] != b->stride[d]))
            return false;
    }
    return true;
}

/* Whether an element may be reached in two ways: a stride of 0, or one shorter than what lies
 * below it. */
static bool repeats_itself(const Tensor *t) {
    if (!elements(t)) return false; /* NumPy gives an empty array strides of 0 */
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] > 1 && t->stride[d] == 0) return true;
    }
    Span spans[MAX_DIMS + 1];
    uintptr_t base;
    int64_t reach = 0;
    int n = to_spans(t, spans, &base);
    for (int i = 0; i < n; i++) {
        if (i && spans[i].stride <= reach) return true;
        reach += (spans[i].count - 1) * spans[i].stride;
    }
    return false;
}

static bool check_output(const Args *args, const Tensor *out) {
    if (out->readonly) return fail_value(args, out->name, "output array is read-only");
    if (repeats_itself(out))
        return fail_value(args, out->name, "output repeats its own memory (a stride of 0)");
    return true;
}

/* `out` may share memory with `other` where the signature says so and both are one view. */
static bool check_apart(const Args *args, const Tensor *out, const Tensor *other,
                        const char *alias) {
    if (!other || other == out) return true;
    if (alias && !strcmp(alias, other->name) && same_view(out, other)) return true;
    if (!overlap(out, other)) return true;
    return fail_value(args, out->name, "output overlaps %s in memory", other->name);
}

/* An output must be writable and share memory with nothing but what it may be. (Lists among
 * themselves are the wrapper's to check.) */
static bool check_outputs(const Args *args) {
    const Signature *s = args->signature;
    for (int p = 0, t = 0, l = 0; p < s->count; p++) {
        const struct Param *param = &s->param[p];
        const TensorList *list = param->kind == 'l' ? &args->list[l++] : NULL;
        const Tensor *out = param->kind == 't' ? args->t[t++] : NULL;
        if (!param->output) continue;
        for (int64_t n = 0; list && n < list->n; n++) {
            if (!check_output(args, &list->items[n])) return false;
            for (int i = 0; i < args->tensors; i++) {
                if (!check_apart(args, &list->items[n], args->t[i], NULL)) return false;
            }
        }
        if (!out) continue;
        if (!check_output(args, out)) return false;
        for (int i = 0; i < args->tensors; i++) {
            if (!check_apart(args, out, args->t[i], param->alias)) return false;
        }
        for (int i = 0; i < args->lists; i++) {
            for (int64_t n = 0; n < args->list[i].n; n++) {
                if (!check_apart(args, out, &args->list[i].items[n], NULL)) return false;
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
    bool array = PyArray_Check(*object) || PyObject_HasAttrString(type, "__dlpack__");
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
    bool ok = run_python(args, argv, object);
    int t = 0, l = 0;
    for (int p = 0; ok && p < s->count; p++) {
        const char *name = s->param[p].name;
        if (s->param[p].kind == 'l') ok = to_list(args, &args->list[l++], name, object[p]);
        if (s->param[p].kind != 't') continue;
        bool none = s->param[p].optional && argv[p] == Py_None;
        args->t[t] = none ? NULL : &args->tensor[t];
        args->tensor[t].name = name;
        ok = none || to_tensor(args, &args->tensor[t], object[p]);
        t++;
    }
    args->tensors = t, args->lists = l;
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
    ArgumentTypeError =
        new_exception(module, "flatout.ArgumentTypeError",
                      "A wrong type or dtype (also a RuntimeError, as torch raises).",
                      PyExc_TypeError, PyExc_RuntimeError);
    DLPackError = new_exception(module, "flatout.DLPackError",
                                "A DLPack producer handed over something invalid.",
                                PyExc_BufferError, PyExc_ValueError);
    return ArgumentValueError && ArgumentTypeError && DLPackError ? 0 : -1;
}
