"""RMSNorm, and RMSNorm of a residual sum (Zhang and Sennrich, 2019; formulas: csrc/ops.h)."""

import math

import torch
from torch import Tensor

from .. import _C
from ._library import (
    Op,
    apply,
    empty_like,
    expect_tensors,
    needs_grad,
    once_differentiable,
    partial_rows,
    rows,
    set_last_flag,
    stat_dtype,
    stream,
)


def _row_stat(x):
    return x.new_empty(math.prod(x.shape[:-1]), dtype=stat_dtype(x))


def _fwd_outputs(x, weight, eps, offset, need_rstd):
    return empty_like(x), _row_stat(x) if need_rstd else None


def _fwd(out, x, weight, eps, offset, need_rstd):
    _C.rms_norm_fwd(*out, rows(x), rows(weight), eps, offset, stream(x))


def _bwd_outputs(dy, x, weight, rstd, offset, need_dw):
    return empty_like(x), empty_like(weight) if need_dw else None


def _partial(x, need_dw):
    if not need_dw:
        return None
    return x.new_empty(partial_rows(x), x.shape[-1], dtype=stat_dtype(x))


def _bwd(out, dy, x, weight, rstd, offset, need_dw):
    partial = _partial(x, need_dw)
    _C.rms_norm_bwd(*out, partial, rows(dy), rows(x), rows(weight), rstd, offset, stream(x))


rms_norm_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset, bool need_rstd)"
    " -> (Tensor, Tensor)",
    _fwd_outputs,
    _fwd,
)
rms_norm_bwd = Op(
    "rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float offset, bool need_dw)"
    " -> (Tensor, Tensor)",
    _bwd_outputs,
    _bwd,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        y, rstd = rms_norm_fwd(x, weight, eps, offset, True)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        need_dw = ctx.needs_input_grad[1]
        dx, dw = rms_norm_bwd(dy, x, weight, rstd, ctx.offset, need_dw)
        return dx, dw if need_dw else None, None, None


def _setup(ctx, inputs, outputs):
    x, weight, _, ctx.offset, _ = inputs
    ctx.save_for_backward(x, weight, outputs[1])
    return (0,)


rms_norm_fwd.differentiable((0, 1), _RMSNorm, _setup, set_last_flag)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """RMSNorm over the last dimension.

    y = weight * round(x / sqrt(mean(x^2) + eps)), rounded to x's dtype before the weight, as
    Llama and Qwen do; with offset != 0 (Gemma) y = (offset + weight) * x / sqrt(...), one rounding.
    x (..., H), weight (H,) of any float dtype; returns (..., H) of x's dtype. Differentiable once.
    """
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor)):
        expect_tensors("rms_norm", x=x, weight=weight)
    if needs_grad(x, weight):
        return apply(_RMSNorm, x, weight, eps, offset)
    return rms_norm_fwd(x, weight, eps, offset, False)[0]


def _add_fwd_outputs(x, residual, weight, eps, offset, need_rstd):
    return empty_like(x), empty_like(x), _row_stat(x) if need_rstd else None


def _add_fwd(out, x, residual, weight, eps, offset, need_rstd):
    _C.add_rms_norm_fwd(*out, rows(x), rows(residual), rows(weight), eps, offset, stream(x))


def _add_bwd_outputs(dy, ds, s, weight, rstd, offset, need_dw):
    return empty_like(s), empty_like(weight) if need_dw else None


def _add_bwd(out, dy, ds, s, weight, rstd, offset, need_dw):
    ds = None if ds is None else rows(ds)
    partial = _partial(s, need_dw)
    _C.add_rms_norm_bwd(*out, partial, rows(dy), ds, rows(s), rows(weight), rstd, offset, stream(s))


add_rms_norm_fwd = Op(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps, float offset,"
    " bool need_rstd) -> (Tensor, Tensor, Tensor)",
    _add_fwd_outputs,
    _add_fwd,
)
add_rms_norm_bwd = Op(
    "add_rms_norm_bwd(Tensor dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd, float offset,"
    " bool need_dw) -> (Tensor, Tensor)",
    _add_bwd_outputs,
    _add_bwd,
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        y, s, rstd = add_rms_norm_fwd(x, residual, weight, eps, offset, True)
        ctx.save_for_backward(s, weight, rstd)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        s, weight, rstd = ctx.saved_tensors
        if dy is None:  # only the sum was used
            return ds, ds, None, None, None
        need_dw = ctx.needs_input_grad[2]
        dx, dw = add_rms_norm_bwd(dy, ds, s, weight, rstd, ctx.offset, need_dw)
        return dx, dx, dw if need_dw else None, None, None


def _add_setup(ctx, inputs, outputs):
    _, _, weight, _, ctx.offset, _ = inputs
    ctx.save_for_backward(outputs[1], weight, outputs[2])
    ctx.set_materialize_grads(False)
    return 0, 1


add_rms_norm_fwd.differentiable((0, 1, 2), _AddRMSNorm, _add_setup, set_last_flag)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, new_residual): new_residual = x + residual rounded to x's dtype, y = rms_norm of it.

    x, residual (..., H) of one dtype, weight (H,); both results (..., H). Differentiable once."""
    if not (isinstance(x, Tensor) and isinstance(residual, Tensor) and isinstance(weight, Tensor)):
        expect_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    if needs_grad(x, residual, weight):
        return apply(_AddRMSNorm, x, residual, weight, eps, offset)
    return add_rms_norm_fwd(x, residual, weight, eps, offset, False)[:2]
