"""cut-cross-entropy's names over flatout: `from flatout.compat.cce import linear_cross_entropy`.

Both the release on PyPI (25.1.1) and the later source (25.6.4) can be called: the fourth positional
argument is ignore_index if it is an int, else the bias. flatout's gradients are exact, never
filtered, so filter_eps, filter_e_grad and filter_c_grad change nothing, and every impl is the same
op; those that stand for an fp32 accumulation of dc ("cce_exact", "cce_kahan_...") give it, as
accum_c_fp32 does. vocab_parallel_options is NotImplementedError.
"""

import enum
import inspect

import torch
from torch import nn

import flatout.torch as ft
from flatout.compat import alias_submodules, refuse

from .vocab_parallel import VocabParallelOptions

__version__ = "25.6.4"

__all__ = [
    "LinearCrossEntropy",
    "LinearCrossEntropyImpl",
    "VocabParallelOptions",
    "linear_cross_entropy",
]

IGNORE_INDEX = -100


class LinearCrossEntropyImpl(enum.IntEnum):
    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()
    CCE_KAHAN_FULL_C = enum.auto()
    CCE_KAHAN_FULL_E = enum.auto()
    CCE_EXACT = enum.auto()
    CCE_KAHAN_FULL_C_FULL_E = enum.auto()
    CCE_KAHAN_FULL = enum.auto()


_IMPLS = {impl.name.lower(): impl for impl in LinearCrossEntropyImpl}
_UNCHANGED = (LinearCrossEntropyImpl.CCE, LinearCrossEntropyImpl.TORCH_COMPILE)


def impl_of(impl):
    """The LinearCrossEntropyImpl of a name or of itself; NotImplementedError for another."""
    if isinstance(impl, LinearCrossEntropyImpl):
        return impl
    if impl not in _IMPLS:
        raise NotImplementedError(f"{impl} is not implemented.")
    return _IMPLS[impl]


def _later(
    e,
    c,
    targets,
    bias=None,
    ignore_index=IGNORE_INDEX,
    softcap=None,
    reduction="mean",
    shift=0,
    return_lse=False,
    filter_eps="auto",
    accum_e_fp32=False,
    accum_c_fp32=False,
    filter_e_grad=True,
    filter_c_grad=True,
    impl=LinearCrossEntropyImpl.CCE,
    vocab_parallel_options=None,
):
    refuse("linear_cross_entropy", vocab_parallel_options=vocab_parallel_options is not None)
    exact = impl_of(impl) not in _UNCHANGED
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"Unknown reduction {reduction}")
    shift = int(shift)
    if shift and not 0 <= shift < targets.shape[-1]:
        raise ValueError(f"shift must be in 0 .. {targets.shape[-1] - 1}, got {shift}")
    result = ft.linear_cross_entropy(
        e,
        c,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        reduction=reduction,
        shift=shift,
        softcap=softcap or 0.0,
        accum_dtype=torch.float32 if exact or accum_c_fp32 else None,
        return_lse=return_lse,
    )
    if not return_lse:
        return result
    loss, lse = result
    return loss, lse.masked_fill(targets[..., shift:] == ignore_index, 0.0)


def _released(
    e,
    c,
    targets,
    ignore_index=IGNORE_INDEX,
    softcap=None,
    reduction="mean",
    shift=False,
    filter_eps="high",
    impl=LinearCrossEntropyImpl.CCE,
):
    return _later(e, c, targets, None, ignore_index, softcap, reduction, bool(shift), impl=impl)


def linear_cross_entropy(e, c, targets, *args, **kwargs):
    """Cross-entropy of the logits e c^T (+ bias), without ever holding them all.

    e (..., T, D), c (V, D), targets (..., T), bias (V,) -> fp32 loss: () or, for reduction "none",
    (..., T - shift) with 0 where ignored; "mean" over no target at all is NaN. shift s (True: 1)
    scores e[..., :-s, :] against targets[..., s:]. return_lse adds the log-sum-exp, (..., T - s),
    0 where ignored. Gradients have the inputs' dtypes; fp32 softmax;
    under autocast e, c and bias are cast first, as by a linear layer.
    """
    if args and isinstance(args[0], int):
        return _released(e, c, targets, *args, **kwargs)
    return _later(e, c, targets, *args, **kwargs)


linear_cross_entropy.__signature__ = inspect.signature(_later)


class LinearCrossEntropy(nn.Module):
    """linear_cross_entropy with these options; forward(e, c, targets, bias=None).

    25.1.1's positional order (..., reduction, filter_eps, shift, impl) is told from 25.6.4's by the
    fourth argument, a string, float or None there and a number of places here.
    """

    def __init__(
        self,
        ignore_index=IGNORE_INDEX,
        softcap=None,
        reduction="mean",
        shift=0,
        filter_eps="auto",
        accum_e_fp32=False,
        accum_c_fp32=False,
        filter_e_grad=True,
        filter_c_grad=True,
        impl=LinearCrossEntropyImpl.CCE,
        return_lse=False,
    ):
        super().__init__()
        if not isinstance(shift, int):
            shift, filter_eps = (filter_eps if isinstance(filter_eps, int) else False), shift
            accum_e_fp32, impl = False, accum_e_fp32 or impl
        self.ignore_index = ignore_index
        self.softcap = softcap
        self.reduction = reduction
        self.shift = shift
        self.filter_eps = filter_eps
        self.accum_e_fp32 = accum_e_fp32
        self.accum_c_fp32 = accum_c_fp32
        self.filter_e_grad = filter_e_grad
        self.filter_c_grad = filter_c_grad
        self.impl = impl
        self.return_lse = return_lse

    def forward(self, e, c, targets, bias=None):
        return linear_cross_entropy(
            e,
            c,
            targets,
            bias,
            self.ignore_index,
            self.softcap,
            self.reduction,
            self.shift,
            self.return_lse,
            self.filter_eps,
            self.accum_e_fp32,
            self.accum_c_fp32,
            self.filter_e_grad,
            self.filter_c_grad,
            self.impl,
        )


alias_submodules(__name__)
