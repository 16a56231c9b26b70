"""DLPack producers made with ctypes, honest and otherwise, for the tests of the tensor boundary."""

import ctypes as c

CPU, CUDA, CUDA_HOST = 1, 2, 3
INT, UINT, FLOAT, OPAQUE, BFLOAT, COMPLEX, BOOL = range(7)
READ_ONLY, COPIED = 1, 2


class DLTensor(c.Structure):
    _fields_ = [
        ("data", c.c_void_p),
        ("device_type", c.c_int32),
        ("device_id", c.c_int32),
        ("ndim", c.c_int32),
        ("code", c.c_uint8),
        ("bits", c.c_uint8),
        ("lanes", c.c_uint16),
        ("shape", c.c_void_p),
        ("strides", c.c_void_p),
        ("byte_offset", c.c_uint64),
    ]


class Legacy(c.Structure):
    _fields_ = [("tensor", DLTensor), ("context", c.c_void_p), ("deleter", c.c_void_p)]


class Versioned(c.Structure):
    _fields_ = [
        ("major", c.c_uint32),
        ("minor", c.c_uint32),
        ("context", c.c_void_p),
        ("deleter", c.c_void_p),
        ("flags", c.c_uint64),
        ("tensor", DLTensor),
    ]


_new = c.pythonapi.PyCapsule_New
_new.restype, _new.argtypes = c.py_object, [c.c_void_p, c.c_char_p, c.c_void_p]
_is_valid = c.pythonapi.PyCapsule_IsValid
_is_valid.argtypes = [c.c_void_p, c.c_char_p]
_pointer = c.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = c.c_void_p, [c.c_void_p, c.c_char_p]

deleted = []  # addresses of managed tensors whose deleter has run


@c.CFUNCTYPE(None, c.c_void_p)
def deleter(managed):
    deleted.append(managed)


@c.CFUNCTYPE(None, c.c_void_p)
def destructor(capsule):
    """As every producer's: an unconsumed capsule calls the deleter."""
    for name, kind in ((b"dltensor", Legacy), (b"dltensor_versioned", Versioned)):
        if _is_valid(capsule, name):
            managed = kind.from_address(_pointer(capsule, name))
            if managed.deleter:
                deleter(c.addressof(managed))


_destructor, _deleter = (c.cast(function, c.c_void_p) for function in (destructor, deleter))


class Producer:
    """An object whose __dlpack__ hands over a float32 array of `shape` at `address`, with any field
    of the DLTensor or of the managed tensor replaced. It must outlive its capsules."""

    def __init__(self, shape, address, *, versioned=True, name=None, no_shape=False, **fields):
        self.shape = (c.c_int64 * max(len(shape), 1))(*shape)
        strides = fields.pop("strides", None)
        self.strides = None if strides is None else (c.c_int64 * max(len(strides), 1))(*strides)
        kind = Versioned if versioned else Legacy
        self.managed = kind(deleter=_deleter)
        if versioned:
            self.managed.major = 1
        t = self.managed.tensor
        t.data, t.device_type, t.ndim = address, CPU, len(shape)
        t.code, t.bits, t.lanes = FLOAT, 32, 1
        t.shape = None if no_shape else c.addressof(self.shape)
        t.strides = None if strides is None else c.addressof(self.strides)
        for field, value in fields.items():
            setattr(t if hasattr(t, field) else self.managed, field, value)
        self.name = name or (b"dltensor_versioned" if versioned else b"dltensor")
        self.told = None  # the keywords of the last call

    def __dlpack__(self, **keywords):
        self.told = keywords
        return _new(c.addressof(self.managed), self.name, _destructor)

    def __dlpack_device__(self):
        return self.managed.tensor.device_type, self.managed.tensor.device_id
