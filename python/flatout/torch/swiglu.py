"""SwiGLU's gating (Shazeer, 2020; formulas: csrc/ops.h)."""

import torch
from torch.autograd.function import once_differentiable

from .. import _C
from ._library import Op, empty_like, expect_tensors, needs_grad, rows, stream


def _halves(x):
    return x.chunk(2, -1)


def _fwd_outputs(gate, up):
    return (empty_like(gate),)


def _fwd(out, gate, up):
    _C.swiglu_fwd(out[0], rows(gate), rows(up), stream(gate))


def _bwd_outputs(dy, gate, up):
    return empty_like(gate), empty_like(up)


def _bwd(out, dy, gate, up):
    _C.swiglu_bwd(*out, rows(dy), rows(gate), rows(up), stream(gate))


def _packed_fwd_outputs(x):
    return (x.new_empty((*x.shape[:-1], x.shape[-1] // 2)),)


def _packed_fwd(out, x):
    _C.swiglu_fwd(out[0], *_halves(rows(x)), stream(x))


def _packed_bwd_outputs(dy, x):
    return (empty_like(x),)


def _packed_bwd(out, dy, x):
    _C.swiglu_bwd(*_halves(out[0]), rows(dy), *_halves(rows(x)), stream(x))


swiglu_fwd = Op("swiglu_fwd(Tensor gate, Tensor up) -> Tensor", _fwd_outputs, _fwd)
swiglu_bwd = Op(
    "swiglu_bwd(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)", _bwd_outputs, _bwd
)
swiglu_packed_fwd = Op(
    "swiglu_packed_fwd(Tensor gate_up) -> Tensor", _packed_fwd_outputs, _packed_fwd
)
swiglu_packed_bwd = Op(
    "swiglu_packed_bwd(Tensor dy, Tensor gate_up) -> Tensor", _packed_bwd_outputs, _packed_bwd
)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return swiglu_bwd(dy, *ctx.saved_tensors)


class _SwiGLUPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return swiglu_packed_fwd(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return swiglu_packed_bwd(dy, *ctx.saved_tensors)


def swiglu(gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """silu(gate) * up, silu(z) = z / (1 + exp(-z)) rounded to gate's dtype before the product.

    gate, up (..., I) of one dtype; up=None: gate holds [gate | up] in its last dimension (..., 2I),
    and its gradient is one tensor of that shape. Returns (..., I). Differentiable once.
    """
    expect_tensors("swiglu", ("up",), gate=gate, up=up)
    if up is not None:
        return _SwiGLU.apply(gate, up) if needs_grad(gate, up) else swiglu_fwd(gate, up)
    if gate.ndim < 1 or gate.shape[-1] % 2:
        raise _C.ArgumentValueError(
            f"swiglu: gate: expected [gate | up] in an even last dimension, got {gate.shape}"
        )
    return _SwiGLUPacked.apply(gate) if needs_grad(gate) else swiglu_packed_fwd(gate)
