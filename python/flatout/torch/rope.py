"""Rotary embedding (Su et al., 2021), alone and after Qwen3's per-head RMSNorm (csrc/ops.h)."""

import torch
from torch.autograd.function import once_differentiable

from .. import _C
from ._library import (
    Op,
    eager,
    empty_like,
    expect_tensors,
    needs_grad,
    partial_rows,
    stat_dtype,
    stream,
)


def _heads(x):
    """x as the ops read it: any strides, but a contiguous last dimension."""
    if x is None or (x.stride(-1) == 1 and not x.is_neg()):
        return x
    return x.resolve_neg().contiguous()


def _like(q, k):
    return empty_like(q), q.new_empty(0) if k is None else empty_like(k)


def _fwd_outputs(q, k, cos, sin):
    return _like(q, k)


def _rotate(op, out, q, k, cos, sin):
    k_out = None if k is None else out[1]
    op(out[0], k_out, _heads(q), _heads(k), _heads(cos), _heads(sin), stream(q))


def _fwd(out, q, k, cos, sin):
    _rotate(_C.rope_fwd, out, q, k, cos, sin)


def _bwd(out, dq_out, dk_out, cos, sin):
    _rotate(_C.rope_bwd, out, dq_out, dk_out, cos, sin)


rope_fwd = Op(
    "rope_fwd(Tensor q, Tensor? k, Tensor cos, Tensor sin) -> (Tensor, Tensor)", _fwd_outputs, _fwd
)
rope_bwd = Op(
    "rope_bwd(Tensor dq_out, Tensor? dk_out, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    _fwd_outputs,
    _bwd,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        q_out, k_out = rope_fwd(q, k, cos, sin)
        return q_out, None if k is None else k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        cos, sin = ctx.saved_tensors
        if dq_out is None:  # only k_out was used
            dq, dk = None, None if dk_out is None else rope_bwd(dk_out, None, cos, sin)[0]
        else:
            dq, dk = rope_bwd(dq_out, dk_out, cos, sin)
            dk = None if dk_out is None else dk
        return dq, dk, None, None


class _Rotated(torch.autograd.Function):
    """Records that x has been rotated. One tensor at a time: torch takes a view that is changed in
    place only as a single output."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_out):
        return rope_bwd(dx_out, None, *ctx.saved_tensors)[0], None, None


def _refuse_leaf(x, name):
    """torch refuses this too, but only after x has been overwritten."""
    leaf = x._base if x._is_view() else x
    if leaf.is_leaf and leaf.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"rope: {name}: a leaf that requires grad cannot be changed in place")


def _rope_inplace(q, k, cos, sin):
    if not eager(q):  # compilers and subclasses see an ordinary op and a copy
        for x, out in zip((q, k), rope(q, k, cos, sin), strict=True):
            if x is not None:
                x.copy_(out)
        return q, k
    _refuse_leaf(q, "q")
    if k is not None:
        _refuse_leaf(k, "k")
    _C.rope_fwd(q, k, q, k, _heads(cos), _heads(sin), stream(q))
    if needs_grad(q, k):
        return _Rotated.apply(q, cos, sin), None if k is None else _Rotated.apply(k, cos, sin)
    _increment_version(q, k)
    return q, k


def _increment_version(*tensors):
    for x in tensors:
        if x is not None:
            torch.autograd.graph.increment_version(x)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inplace: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """HF's rotate-half rotation of q and k: out = x * cos + rotate_half(x) * sin, one rounding.

    q (B, S, Hq, D), k (B, S, Hk, D) or None, with cos, sin (S, D), (1, S, D) or (B, S, D); or
    packed q (T, Hq, D), k (T, Hk, D) with cos, sin (T, D). D is even; cos and sin hold both halves,
    may be of another float dtype, and get no gradient. inplace=True overwrites q and k, which need
    a contiguous last dimension. Returns (q_out, k_out). Differentiable once.
    """
    expect_tensors("rope", ("k",), q=q, k=k, cos=cos, sin=sin)
    if inplace:
        return _rope_inplace(q, k, cos, sin)
    if needs_grad(q, k):
        return _Rope.apply(q, k, cos, sin)
    q_out, k_out = rope_fwd(q, k, cos, sin)
    return q_out, None if k is None else k_out


# ---- RMSNorm of each head, then the rotation -----------------------------------------------------


def _head_stat(x):
    return torch.empty(x.shape[:-1], dtype=stat_dtype(x), device=x.device)


def _norm_fwd_outputs(q, k, q_weight, k_weight, cos, sin, eps):
    return empty_like(q), empty_like(k), _head_stat(q), _head_stat(k)


def _norm_fwd(out, q, k, q_weight, k_weight, cos, sin, eps):
    inputs = (_heads(x) for x in (q, k, q_weight, k_weight, cos, sin))
    _C.qk_norm_rope_fwd(*out, *inputs, eps, stream(q))


def _norm_bwd_outputs(
    dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, need_dqw, need_dkw
):
    dqw = q_weight.new_empty(q_weight.shape if need_dqw else 0)
    dkw = k_weight.new_empty(k_weight.shape if need_dkw else 0)
    return empty_like(q), empty_like(k), dqw, dkw


def _norm_bwd(
    out, dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, need_dqw, need_dkw
):
    dq, dk, dqw, dkw = out
    size, dtype = (partial_rows(q), q.shape[-1]), stat_dtype(q)
    dqw, dq_partial = (dqw, q.new_empty(size, dtype=dtype)) if need_dqw else (None, None)
    dkw, dk_partial = (dkw, q.new_empty(size, dtype=dtype)) if need_dkw else (None, None)
    inputs = (_heads(x) for x in (dq_out, dk_out, q, k, q_weight, k_weight))
    tables = _heads(cos), _heads(sin)
    _C.qk_norm_rope_bwd(
        dq, dk, dqw, dkw, dq_partial, dk_partial, *inputs, q_rstd, k_rstd, *tables, stream(q)
    )


qk_norm_rope_fwd = Op(
    "qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_fwd_outputs,
    _norm_fwd,
)
qk_norm_rope_bwd = Op(
    "qk_norm_rope_bwd(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight,"
    " Tensor k_weight, Tensor q_rstd, Tensor k_rstd, Tensor cos, Tensor sin, bool need_dqw,"
    " bool need_dkw) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_bwd_outputs,
    _norm_bwd,
)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps):
        inputs = (q, k, q_weight, k_weight)
        q_out, k_out, *rstd = qk_norm_rope_fwd(*inputs, cos, sin, eps)
        ctx.save_for_backward(*inputs, *rstd, cos, sin)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        need = ctx.needs_input_grad[2:4]
        dq, dk, dqw, dkw = qk_norm_rope_bwd(dq_out, dk_out, *ctx.saved_tensors, *need)
        return dq, dk, dqw if need[0] else None, dkw if need[1] else None, None, None, None


def _qk_norm_rope_eager(q, k, q_weight, k_weight, cos, sin, eps, inplace):
    """Without gradients nobody needs the statistics."""
    out = (q, k) if inplace else (empty_like(q), empty_like(k))
    inputs = (q, k) if inplace else (_heads(q), _heads(k))
    rest = (_heads(q_weight), _heads(k_weight), _heads(cos), _heads(sin))
    _C.qk_norm_rope_fwd(*out, None, None, *inputs, *rest, eps, stream(q))
    if inplace:
        _increment_version(q, k)
    return out


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float = 1e-6,
    *,
    inplace: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3's attention inputs: rope of rms_norm(q, q_weight) and of rms_norm(k, k_weight).

    The norms are over each head, with rms_norm's roundings; shapes as in rope, q_weight and
    k_weight (D,). inplace=True overwrites q and k, which the backward would need: it raises
    RuntimeError where a gradient is wanted. Returns (q_out, k_out). Differentiable once.
    """
    expect_tensors("qk_norm_rope", q=q, k=k, cos=cos, sin=sin)
    expect_tensors("qk_norm_rope", q_weight=q_weight, k_weight=k_weight)
    if needs_grad(q, k, q_weight, k_weight):
        if inplace:
            raise RuntimeError(
                "qk_norm_rope: inplace=True overwrites q and k, which their gradients need: "
                "use inplace=False, or torch.no_grad()"
            )
        return _QKNormRope.apply(q, k, q_weight, k_weight, cos, sin, eps)
    if eager(q):
        return _qk_norm_rope_eager(q, k, q_weight, k_weight, cos, sin, eps, inplace)
    out = qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, eps)[:2]
    return (q.copy_(out[0]), k.copy_(out[1])) if inplace else out
