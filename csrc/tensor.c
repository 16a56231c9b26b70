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

/* ---- One object -> Tensor -------------------------------------------------------------------- */

COLD static bool fail_extent(const Args *args, const Tensor *t) {
    for (int d = 0; d < t->ndim; d++) {
        if (t->shape[d] < 0)
            return fail_buffer(args, t->name, "expected sizes >= 0, got %lld in dimension %d",
                               (long long)t->shape[d], d);
    }
    return fail_buffer(args, t->name, "expected sizes and strides of less than 2^60 bytes");
}

/* What a shape and strides from outside must hold before an address is computed from them: no
 * negative size, and every byte within 2^60 of the base pointer, which is aligned. An empty array
 * without memory gets an address, because even memcpy() of nothing wants one. */
static bool check_extent(const Args *args, Tensor *t) {
    static double somewhere;
    const int64_t limit = INT64_MAX >> 3, size = item_size(t->dtype);
    int64_t count = size, low = 0, high = size, signs = 0;
    bool empty = false, overflow = false, far = false; /* far: no matter in an empty array */
    for (int d = 0; d < t->ndim; d++) {
        int64_t n = t->shape[d], span;
        signs |= n;
        empty |= n == 0;
        if (n <= 1) continue;
        overflow |= __builtin_mul_overflow(count, n, &count);
        far |= __builtin_mul_overflow(n - 1, t->stride[d], &span);
        far |= __builtin_mul_overflow(span, size, &span);
        far |= span > limit || span < -limit;
        if (!far) *(span < 0 ? &low : &high) += span;
    }
    if (signs < 0 || overflow || count > limit) return fail_extent(args, t);
    if (empty) {
        if (!t->data) t->data = &somewhere;
        t->low = t->high = 0;
        return true;
    }
    uintptr_t at = (uintptr_t)t->data;
    t->low = at - (uint64_t)-low;
    t->high = at + (uint64_t)high;
    far |= high > limit || low < -limit;
    if (far || (at && (t->high < at || t->low > at))) return fail_extent(args, t);
    if (!at) return fail_buffer(args, t->name, "expected memory, got a null data pointer");
    return (at & (uintptr_t)(size - 1)) == 0 ||
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

/* The strides of C order, which a producer may leave out. */
static void set_dense(Tensor *t) {
    int64_t dense = 1;
    for (int d = t->ndim - 1; d >= 0; d--) {
        t->stride[d] = dense;
        if (t->shape[d] > 1 && __builtin_mul_overflow(dense, t->shape[d], &dense)) dense = 0;
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
    const int64_t *shape = d->shape, *strides = d->strides;
    for (int i = 0; i < t->ndim; i++) t->shape[i] = shape[i];
    if (strides) {
        for (int i = 0; i < t->ndim; i++) t->stride[i] = strides[i];
    } else {
        set_dense(t);
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

/* The types with the exchange API that came by. Two of torch (Tensor, Parameter) are the common
 * case; where the table is full, the last entry is overwritten. None of them is NumPy's. */
enum { PLACES = 8 };
static Producer cache[PLACES];
static int used;

static inline const Producer *known_producer(PyTypeObject *type) {
    for (int i = 0; i < used; i++) {
        if (cache[i].type == type) return &cache[i];
    }
    return NULL;
}

/* What is known of `type`, which is then looked up no more where it has the exchange API. */
static Producer producer_of(PyTypeObject *type) {
    const Producer *known = known_producer(type);
    if (known) return *known;
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
COLD static bool rename_error(const Args *args, const char *name, PyObject *object) {
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
bool to_tensor(const Args *args, Tensor *t, PyObject *object) {
    const Producer *known = known_producer(Py_TYPE(object));
    t->readonly = 0;
    if (!known && PyArray_Check(object)) return from_numpy(args, t, object);
    if (!known && PyCapsule_CheckExact(object)) return from_capsule(args, t, object);
    const DLPackExchangeAPI *api = known ? known->api : producer_of(Py_TYPE(object)).api;
    DLTensor d = {0};
    if (api->borrow(object, &d)) return rename_error(args, t->name, object);
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

COLD static bool refuse_wrapper(const Args *args, const char *name, PyObject *object) {
    return fail_type(args, name,
                     "expected a tensor with memory of its own, got %R: unwrap it first "
                     "(a DTensor with to_local())",
                     (PyObject *)Py_TYPE(object));
}

/* A capsule from __dlpack__: a new reference. */
static PyObject *capsule_of(const Args *args, const char *name, PyObject *object) {
    PyObject *source = detached(object), *capsule = NULL;
    PyObject *method = source ? PyObject_GetAttrString(source, "__dlpack__") : NULL;
    if (method) capsule = call_dlpack(args, source, method);
    Py_XDECREF(method);
    Py_XDECREF(source);
    if (!capsule || PyCapsule_CheckExact(capsule)) return capsule;
    fail_type(args, name, "expected __dlpack__ to return a capsule, got %R", capsule);
    Py_DECREF(capsule);
    return NULL;
}

/* export() of an object whose type is not in the table. */
static bool export_other(const Args *args, const char *name, PyObject **object) {
    if (PyArray_Check(*object)) return true;
    Producer producer = producer_of(Py_TYPE(*object));
    if (!producer.plain) return refuse_wrapper(args, name, *object);
    if (producer.api) return true;
    if (!PyObject_HasAttrString((PyObject *)Py_TYPE(*object), "__dlpack__"))
        return fail_type(args, name, "expected an array (NumPy, torch, DLPack), got %R",
                         (PyObject *)Py_TYPE(*object));
    PyObject *capsule = capsule_of(args, name, *object);
    if (capsule) *object = capsule;
    return capsule;
}

/* Run what Python code reading `*object` takes: afterwards it is a NumPy array, an instance of a
 * type with the exchange API, or, in the place of the object, a capsule (a new reference). */
bool export(const Args *args, const char *name, PyObject **object) {
    const Producer *known = known_producer(Py_TYPE(*object));
    if (known && known->plain) return true;
    return known ? refuse_wrapper(args, name, *object) : export_other(args, name, object);
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
