"""RMSNorm, and RMSNorm of a residual sum (Zhang and Sennrich, 2019; formulas: csrc/ops.h)."""

import torch
from torch.autograd.function import once_differentiable

from .. import _C
from ._library import (
    Op,
    empty_like,
    expect_tensors,
    needs_grad,
    partial_rows,
    rows,
    stat_dtype,
    stream,
)


def _row_stat(x):
    n = 1
    for size in x.shape[:-1]:
        n *= size
    return torch.empty(n, dtype=stat_dtype(x), device=x.device)


def _fwd_outputs(x, weight, eps, offset):
    return empty_like(x), _row_stat(x)


def _fwd(out, x, weight, eps, offset):
    y, rstd = out
    _C.rms_norm_fwd(y, rstd, rows(x), rows(weight), eps, offset, stream(x))


def _bwd_outputs(dy, x, weight, rstd, offset, need_dw):
    return empty_like(x), weight.new_empty(weight.shape if need_dw else 0)


def _partial(x, need_dw):
    if not need_dw:
        return None
    return torch.empty(partial_rows(x), x.shape[-1], dtype=stat_dtype(x), device=x.device)


def _bwd(out, dy, x, weight, rstd, offset, need_dw):
    dx, dw = out[0], out[1] if need_dw else None
    partial = _partial(x, need_dw)
    _C.rms_norm_bwd(dx, dw, partial, rows(dy), rows(x), rows(weight), rstd, offset, stream(x))


rms_norm_fwd = Op(
    "rms_norm_fwd(Tensor x, Tensor weight, float eps, float offset) -> (Tensor, Tensor)",
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
        y, rstd = rms_norm_fwd(x, weight, eps, offset)
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


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, *, offset: float = 0.0
) -> torch.Tensor:
    """RMSNorm over the last dimension.

    y = weight * round(x / sqrt(mean(x^2) + eps)), rounded to x's dtype before the weight, as
    Llama and Qwen do; with offset != 0 (Gemma) y = (offset + weight) * x / sqrt(...), one rounding.
    x (..., H), weight (H,) of any float dtype; returns (..., H) of x's dtype. Differentiable once.
    """
    if not (isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)):
        expect_tensors("rms_norm", x=x, weight=weight)
    if needs_grad(x, weight):
        return _RMSNorm.apply(x, weight, eps, offset)
    return rms_norm_fwd(x, weight, eps, offset)[0]


def _add_fwd_outputs(x, residual, weight, eps, offset):
    return empty_like(x), empty_like(x), _row_stat(x)


def _add_fwd(out, x, residual, weight, eps, offset):
    y, s, rstd = out
    _C.add_rms_norm_fwd(y, s, rstd, rows(x), rows(residual), rows(weight), eps, offset, stream(x))


def _add_bwd_outputs(dy, ds, s, weight, rstd, offset, need_dw):
    return empty_like(s), weight.new_empty(weight.shape if need_dw else 0)


def _add_bwd(out, dy, ds, s, weight, rstd, offset, need_dw):
    dx, dw = out[0], out[1] if need_dw else None
    ds = None if ds is None else rows(ds)
    partial = _partial(s, need_dw)
    _C.add_rms_norm_bwd(
        dx, dw, partial, rows(dy), ds, rows(s), rows(weight), rstd, offset, stream(s)
    )


add_rms_norm_fwd = Op(
    "add_rms_norm_fwd(Tensor x, Tensor residual, Tensor weight, float eps, float offset)"
    " -> (Tensor, Tensor, Tensor)",
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
        y, s, rstd = add_rms_norm_fwd(x, residual, weight, eps, offset)
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
    expect_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    if needs_grad(x, residual, weight):
        return _AddRMSNorm.apply(x, residual, weight, eps, offset)
    return add_rms_norm_fwd(x, residual, weight, eps, offset)[:2]
