"""Rotary embedding (Su et al., 2021), alone and after Qwen3's per-head RMSNorm (csrc/ops.h)."""

import torch

from .. import _C
from ._library import (
    Op,
    all_tensors,
    apply,
    eager,
    empty_like,
    expect_tensors,
    needs_grad,
    once_differentiable,
    partial_rows,
    set_last_flag,
    stat_dtype,
    stream,
)


def _heads(x):
    """x as the ops read it: any strides, but a contiguous last dimension."""
    if x is None or ((x.is_contiguous() or x.stride(-1) == 1) and not x.is_neg()):
        return x
    return x.resolve_neg().contiguous()


def _fwd_outputs(q, k, cos, sin):
    return empty_like(q), None if k is None else empty_like(k)


def _rotate(op, out, q, k, cos, sin):
    op(*out, _heads(q), _heads(k), _heads(cos), _heads(sin), stream(q))


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
    def backward(ctx, dq_out, dk_out=None):
        cos, sin = ctx.saved_tensors
        if dq_out is None:  # only k_out was used
            dq, dk = None, None if dk_out is None else rope_bwd(dk_out, None, cos, sin)[0]
        else:
            dq, dk = rope_bwd(dq_out, dk_out, cos, sin)
            dk = None if dk_out is None else dk
        return dq, dk, None, None


def _setup(ctx, inputs, outputs):
    ctx.save_for_backward(*inputs[2:])
    ctx.set_materialize_grads(False)
    return (0,) if inputs[1] is None else (0, 1)


rope_fwd.differentiable((0, 1), _Rope, _setup)


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


def _refuse_what_torch_refuses(x, name):
    """torch refuses these too, but only after x has been overwritten."""
    view = x._is_view()
    if not torch.is_grad_enabled() or not (x.requires_grad or (view and x._base.requires_grad)):
        return
    if (x._base if view else x).is_leaf:
        raise RuntimeError(f"rope: {name}: a leaf that requires grad cannot be changed in place")
    autograd = torch._C._autograd
    if view and autograd._get_creation_meta(x) != autograd.CreationMeta.DEFAULT:
        raise RuntimeError(
            f"rope: {name}: one of the several views of split, chunk or unbind, or a view made "
            "under no_grad, cannot be changed in place: use slices, or inplace=False"
        )


def _rope_inplace(q, k, cos, sin):
    if not eager(q):  # compilers and subclasses see an ordinary op and a copy
        for x, out in zip((q, k), rope(q, k, cos, sin), strict=True):
            if x is not None:
                x.copy_(out)
        return q, k
    _refuse_what_torch_refuses(q, "q")
    if k is not None:
        _refuse_what_torch_refuses(k, "k")
    _C.rope_fwd(q, k, q, k, _heads(cos), _heads(sin), stream(q))
    if needs_grad(q, k):
        return tuple(None if x is None else apply(_Rotated, x, cos, sin) for x in (q, k))
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
    if not all_tensors(q, k, cos, sin):
        expect_tensors("rope", ("k",), q=q, k=k, cos=cos, sin=sin)
    if inplace:
        return _rope_inplace(q, k, cos, sin)
    if needs_grad(q, k):
        return apply(_Rope, q, k, cos, sin)
    q_out, k_out = rope_fwd(q, k, cos, sin)
    return q_out, None if k is None else k_out


# ---- RMSNorm of each head, then the rotation -----------------------------------------------------


def _head_stat(x):
    return x.new_empty(*x.shape[:-1], dtype=stat_dtype(x))


def _norm_fwd_outputs(q, k, q_weight, k_weight, cos, sin, eps, need_rstd):
    rstd = (_head_stat(q), _head_stat(k)) if need_rstd else (None, None)
    return empty_like(q), empty_like(k), *rstd


def _norm_fwd(out, q, k, q_weight, k_weight, cos, sin, eps, need_rstd):
    inputs = [_heads(x) for x in (q, k, q_weight, k_weight, cos, sin)]
    _C.qk_norm_rope_fwd(*out, *inputs, eps, stream(q))


def _norm_bwd_outputs(
    dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, need_dqw, need_dkw
):
    dqw = empty_like(q_weight) if need_dqw else None
    dkw = empty_like(k_weight) if need_dkw else None
    return empty_like(q), empty_like(k), dqw, dkw


def _norm_bwd(
    out, dq_out, dk_out, q, k, q_weight, k_weight, q_rstd, k_rstd, cos, sin, need_dqw, need_dkw
):
    P, D, dtype = partial_rows(q, blocks=5), q.shape[-1], stat_dtype(q)
    partials = [q.new_empty(P, D, dtype=dtype) if need else None for need in (need_dqw, need_dkw)]
    inputs = [_heads(x) for x in (dq_out, dk_out, q, k, q_weight, k_weight)]
    tables = _heads(cos), _heads(sin)
    _C.qk_norm_rope_bwd(*out, *partials, *inputs, q_rstd, k_rstd, *tables, stream(q))


qk_norm_rope_fwd = Op(
    "qk_norm_rope_fwd(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " float eps, bool need_rstd) -> (Tensor, Tensor, Tensor, Tensor)",
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
        q_out, k_out, *rstd = qk_norm_rope_fwd(*inputs, cos, sin, eps, True)
        ctx.save_for_backward(*inputs, *rstd, cos, sin)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_out, dk_out):
        need = ctx.needs_input_grad[2:4]
        dq, dk, dqw, dkw = qk_norm_rope_bwd(dq_out, dk_out, *ctx.saved_tensors, *need)
        return dq, dk, dqw if need[0] else None, dkw if need[1] else None, None, None, None


def _norm_setup(ctx, inputs, outputs):
    ctx.save_for_backward(*inputs[:4], *outputs[2:], *inputs[4:6])
    return 0, 1


qk_norm_rope_fwd.differentiable((0, 1, 2, 3), _QKNormRope, _norm_setup, set_last_flag)


_OVERWRITES = (
    "qk_norm_rope: inplace=True overwrites q and k, which their gradients need: "
    "use inplace=False, or torch.no_grad()"
)


def _qk_norm_rope_inplace(q, k, q_weight, k_weight, cos, sin, eps):
    if not eager(q):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, q_weight, k_weight)):
            raise RuntimeError(_OVERWRITES)
        out = qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, eps, False)
        return q.copy_(out[0]), k.copy_(out[1])
    rest = [_heads(x) for x in (q_weight, k_weight, cos, sin)]
    _C.qk_norm_rope_fwd(q, k, None, None, q, k, *rest, eps, stream(q))
    _increment_version(q, k)
    return q, k


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
    if not all_tensors(q, k, q_weight, k_weight, cos, sin):
        expect_tensors("qk_norm_rope", q=q, k=k, cos=cos, sin=sin)
        expect_tensors("qk_norm_rope", q_weight=q_weight, k_weight=k_weight)
    if needs_grad(q, k, q_weight, k_weight):
        if inplace:
            raise RuntimeError(_OVERWRITES)
        return apply(_QKNormRope, q, k, q_weight, k_weight, cos, sin, eps)
    if inplace:
        return _qk_norm_rope_inplace(q, k, q_weight, k_weight, cos, sin, eps)
    return qk_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, eps, False)[:2]
