"""SwiGLU's gating (Shazeer, 2020; formulas: csrc/ops.h)."""

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
    rows,
    stream,
)


def _fwd_outputs(gate, up):
    if up is not None:
        return (empty_like(gate),)
    *lead, n = gate.shape
    return (gate.new_empty(*lead, n // 2),)


def _fwd(out, gate, up):
    _C.swiglu_fwd(*out, rows(gate), None if up is None else rows(up), stream(gate))


def _bwd_outputs(dy, gate, up):
    return empty_like(gate), None if up is None else empty_like(up)


def _bwd(out, dy, gate, up):
    up = None if up is None else rows(up)
    _C.swiglu_bwd(*out, rows(dy), rows(gate), up, stream(gate))


swiglu_fwd = Op("swiglu_fwd(Tensor gate, Tensor? up) -> Tensor", _fwd_outputs, _fwd)
swiglu_bwd = Op(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor? up) -> (Tensor, Tensor)", _bwd_outputs, _bwd
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = swiglu_bwd(dy, gate, up)
        return dgate, None if up is None else dup


def _setup(ctx, inputs, outputs):
    ctx.save_for_backward(*inputs)
    return (0,)


swiglu_fwd.differentiable((0, 1), _SwiGLU, _setup)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)) rounded to gate's dtype before the product.

    gate, up (..., I) of one dtype; up=None: gate holds [gate | up] in its last dimension (..., 2I),
    and its gradient is one tensor of that shape. Returns (..., I). Differentiable once.
    """
    if not (isinstance(gate, Tensor) and isinstance(up, Tensor)):
        expect_tensors("swiglu", ("up",), gate=gate, up=up)
    if up is None and (gate.ndim < 1 or gate.shape[-1] % 2):
        raise _C.ArgumentValueError(
            f"swiglu: gate: expected [gate | up] in an even last dimension, got {gate.shape}"
        )
    return apply(_SwiGLU, gate, up) if needs_grad(gate, up) else swiglu_fwd(gate, up)
