"""flatout: LLM training ops in C and CUDA C, on NumPy arrays here and on torch tensors in
`flatout.torch`. Formulas: csrc/ops.h; every function's docstring gives shapes and dtypes."""

from ._C import ArgumentTypeError, ArgumentValueError, DLPackError
from ._info import info
from ._numpy import *  # noqa: F403
from ._numpy import __all__ as _numpy_all

__all__ = ["ArgumentTypeError", "ArgumentValueError", "DLPackError", "info", *_numpy_all]
