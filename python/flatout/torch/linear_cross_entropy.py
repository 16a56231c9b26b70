"""Cross-entropy of x @ weight.T, whose logits exist only chunk by chunk (formulas, reductions and
options: csrc/ops.h)."""

import math
from operator import ge, or_

import torch

from .. import _C
from .._numpy import CHUNK_BYTES as CPU_CHUNK_BYTES
from .._numpy import check_chunk_size, chunk_rows
from ._library import (
    Op,
    apply,
    autocasts,
    eager,
    empty_like,
    expect_tensors,
    has_memory,
    needs_grad,
    once_differentiable,
    rows,
    stat_dtype,
    stream,
)
from .cross_entropy import (
    SCALARS,
    flat_rows,
    loss_outputs,
    loss_rows,
    mark_constant,
    matrix,
    new_stat,
    results,
    scoring,
    seq_of,
    upstream,
)

CHUNK_BYTES = 300 << 20  # of logits on CUDA
WORKSPACE_BYTES = 32 << 20  # what cuBLASLt asks for on Hopper


# ---- Registered ops --------------------------------------------------------------------------


def _operand(x):
    """x (rows, H) as cuBLASLt reads it: without rows that overlap, as an expanded tensor's do."""
    return x.contiguous() if x.is_cuda and x.stride(0) < x.shape[1] else x


def _scratch(x, weight, target, chunk, fp32_accum, dw, db):
    """dw_accum, db_accum, logits_chunk, stats, workspace."""
    N, (V, H), on_gpu = target.numel(), weight.shape, x.is_cuda
    sums = fp32_accum and dw is not None and x.dtype != stat_dtype(x)
    C = max(1, min(chunk, N)) if chunk else chunk_rows(N, V, x.element_size(), _budget(x))
    logits, workspace = None, WORKSPACE_BYTES
    chunked = on_gpu and not chunk and C < N
    room = chunked and dw is not None and dw.is_contiguous()
    if room and (spare := _spare_bytes(dw, N)) <= CHUNK_BYTES:
        # all logits lie in dw's memory, and a part of them in the workspace as dw is made
        C, logits, workspace = N, dw, workspace + spare
    elif chunked and sums and N * x.element_size() <= H * 4:
        C = N  # all logits take no more memory than the sums of chunks, and need none
    elif room and sums and H >= C:
        logits = dw  # until the sums are rounded into it
    return (
        new_stat(x, *weight.shape) if sums and C < N else None,
        new_stat(x, V) if db is not None else None,
        _logits(x, C, V) if logits is None else logits,
        new_stat(x, 4),
        torch.empty(workspace, dtype=torch.uint8, device=x.device) if on_gpu else None,
    )


def _spare_bytes(dw, N):
    """What linear_cross_entropy needs beside cuBLASLt's workspace to have the logits of N rows in
    dw's memory (csrc/ops.h); infinite where they do not fit."""
    (V, H), per = dw.shape, 16 // dw.element_size()
    stride = -(-V // per) * per
    if N * stride > V * H:
        return math.inf
    under = min(V, -(-N * stride // (128 * H)) * 128)
    return N * -(-under // per) * 16


def _budget(x):
    return CHUNK_BYTES if x.is_cuda else CPU_CHUNK_BYTES


def _logits(x, C, V):
    """Scratch (C, V); on CUDA with rows on 16-byte boundaries, as tensor cores want them."""
    if not x.is_cuda:
        return x.new_empty(C, V)
    per = 16 // x.element_size()
    return x.new_empty(C, -(-V // per) * per)[:, :V]


def _gradient_outputs(x, weight, bias, need_dx, need_dw, need_db):
    return (
        empty_like(x) if need_dx else None,
        empty_like(weight) if need_dw else None,
        empty_like(bias) if need_db else None,
    )


def _gradient_rows(grads, N):
    dx, dw, db = grads
    return None if dx is None else dx.view(N, dx.shape[-1]), dw, db


def _fwd_outputs(x, weight, target, bias, class_weight, num_items, *rest):
    reduction, (accuracy, predicted, *needs) = rest[1], rest[-5:]
    return loss_outputs(x, target, reduction, accuracy, predicted) + _gradient_outputs(
        x, weight, bias, *needs
    )


def _fwd(out, x, weight, target, bias, class_weight, num_items, *rest):
    ignore, reduction, shift, smoothing, z_loss, softcap, chunk, fp32_accum = rest[:8]
    N = target.numel()
    _C.linear_cross_entropy_fwd(
        *loss_rows(out[:5], target), *_gradient_rows(out[5:], N),
        *_scratch(x, weight, target, chunk, fp32_accum, *out[6:]),
        _operand(matrix(x, N)), _operand(rows(weight)), flat_rows(target, N),
        bias if bias is None else rows(bias), class_weight, num_items,
        ignore, reduction, seq_of(target), shift, smoothing, z_loss, softcap, stream(x),
    )  # fmt: skip


def _bwd_outputs(dloss, dlse, x, weight, target, bias, *rest):
    return _gradient_outputs(x, weight, bias, *rest[-3:])


def _bwd(out, dloss, dlse, x, weight, target, bias, class_weight, num_items, lse, *rest):
    ignore, reduction, shift, smoothing, z_loss, softcap, chunk, fp32_accum, *_ = rest
    N = target.numel()
    _C.linear_cross_entropy_bwd(
        *_gradient_rows(out, N),
        *_scratch(x, weight, target, chunk, fp32_accum, *out[1:]),
        dloss if reduction else flat_rows(dloss, N), flat_rows(dlse, N), _operand(matrix(x, N)),
        _operand(rows(weight)), flat_rows(target, N), bias if bias is None else rows(bias),
        class_weight, num_items, lse.view(N),
        ignore, reduction, seq_of(target), shift, smoothing, z_loss, softcap, stream(x),
    )  # fmt: skip


LINEAR = f"{SCALARS}, int chunk_size, bool fp32_accum"
NEEDS = "bool need_dx, bool need_dw, bool need_db"
linear_cross_entropy_fwd = Op(
    f"linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor target, Tensor? bias, "
    f"Tensor? class_weight, Tensor? num_items, {LINEAR}, bool return_lse, "
    f"bool accuracy, bool predicted, {NEEDS})"
    f" -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_outputs,
    _fwd,
)
linear_cross_entropy_bwd = Op(
    f"linear_cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor x, Tensor weight, "
    f"Tensor target, Tensor? bias, Tensor? class_weight, Tensor? num_items, Tensor lse, "
    f"{LINEAR}, {NEEDS}) -> (Tensor, Tensor, Tensor)",
    _bwd_outputs,
    _bwd,
)

# ---- Autograd --------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    """With a reduction the forward computes the gradients for an upstream gradient of 1, while the
    logits are there; the first backward scales them in place, and any other starts with the same
    ones, computed anew. Not in float16: there most would be 0 before the scale of the loss
    (GradScaler's) came to save them."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, class_weight, num_items, scalars, extras):
        need_dx, need_dw, _, need_db, *_ = ctx.needs_input_grad
        ctx.needs = need_dx, need_dw, need_db
        direct = eager(x)
        ctx.early = early = _early(x, scalars, extras[0], direct)
        operands = (x, weight, target, bias, class_weight, num_items)
        needs = ctx.needs if early else (False, False, False)
        out = linear_cross_entropy_fwd(*operands, *scalars, *extras, *needs)
        loss, losses, lse, accuracy, predicted, *grads = out
        ctx.grads, ctx.scalars = None, scalars
        if not early:
            grads = []
        elif direct:
            ctx.grads, grads = grads, []
        ctx.save_for_backward(*operands, lse, *grads)
        mark_constant(ctx, lse, accuracy, predicted, extras[0])
        return loss if scalars[1] else losses, lse, accuracy, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dlse, *_):
        if dloss is None and dlse is None:
            return (None,) * 8
        *operands, lse = ctx.saved_tensors[:7]
        if dlse is not None or not ctx.early:
            ctx.grads = None  # before memory for others is needed
            dloss = upstream(dloss, ctx.scalars[1], lse)
            return _masked(_computed(ctx, dloss, dlse, *operands, lse), ctx.needs)
        kept = ctx.saved_tensors[7:]
        grads = kept or ctx.grads or _computed(ctx, lse.new_ones(()), None, *operands, lse)
        if not kept and eager(dloss) and has_memory(dloss):
            ctx.grads = None
            wanted = [g for g, need in zip(grads, ctx.needs, strict=True) if need]
            _C.scale(wanted, dloss, stream(dloss))
        else:
            grads = [None if g is None else (g * dloss).to(g.dtype) for g in grads]
        return _masked(grads, ctx.needs)


def _computed(ctx, *args):
    return linear_cross_entropy_bwd(*args, *ctx.scalars, *ctx.needs)


def _early(x, scalars, return_lse, direct):
    """Whether the forward computes the gradients: not in a graph whose backward may have to compute
    them again, for a gradient of lse."""
    return scalars[1] and x.dtype != torch.float16 and (direct or not return_lse)


def _masked(grads, needs):
    """In the order of the inputs: x, weight, target, bias, ..."""
    dx, dw, db = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return dx, dw, None, db, None, None, None, None


def _ask(ctx, inputs):
    need_dx, need_dw, _, need_db, *_ = ctx.needs_input_grad
    ctx.needs = need_dx, need_dw, need_db
    if _early(inputs[0], inputs[6:14], inputs[14], eager(inputs[0])):
        inputs[-3:] = map(or_, inputs[-3:], ctx.needs)


def _setup(ctx, inputs, outputs):
    ctx.grads, ctx.scalars = None, inputs[6:14]
    reduction = ctx.scalars[1]
    ctx.early = reduction and all(map(ge, inputs[-3:], ctx.needs))
    ctx.save_for_backward(*inputs[:6], outputs[2], *(outputs[5:] if ctx.early else ()))
    ctx.set_materialize_grads(False)
    return 0 if reduction else 1, 2


linear_cross_entropy_fwd.differentiable((0, 1, 3), _LinearCrossEntropy, _setup, _ask)

# ---- Public function -------------------------------------------------------------------------


def _cast(x, weight, bias):
    """Under autocast everything runs in its dtype, else in x's."""
    if autocasts(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: int = 0,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    num_items: float | torch.Tensor | None = None,
    chunk_size: int | None = None,
    accum_dtype=None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predicted: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Cross-entropy of the logits x @ weight.T + bias, of which only one chunk exists at a time.

    x (..., H), weight (V, H), target (...) int32 or int64, bias (V,); the logits have x's dtype
    (autocast's under autocast), everything after them float32. Returns the loss, float32: a scalar,
    or (...) for reduction "none"; then, each if asked for, lse (...) (log sum exp of a row's
    logits, differentiable), accuracy (the share of rows not ignored whose largest logit is the
    label's) and predicted (...) (its index, -1 in ignored rows).

    ignore_index: rows with this label count for nothing. reduction: "mean" over the rows not
    ignored (weighted by class_weight (V,)), "sum" or "none"; num_items, a number or a tensor of
    one element, replaces the mean's divisor. A mean over no row is NaN with gradients of 0.
    shift: position s is scored against target s + shift of the last dimension, and per-token
    results have shape (..., T - shift). z_loss: adds z_loss * lse^2. softcap c: logits become
    c tanh(logits / c). chunk_size: rows whose logits exist at once; by default, on CUDA, all rows
    where their logits fit into the memory of weight's gradient, and the part that is saved while
    that is written (about 2 N^2 V / H bytes in 16 bits) into 300 MiB, else a multiple of 128 within
    300 MiB. accum_dtype: torch.float32 sums a 16-bit weight's gradient over several chunks in
    float32, rounded once; without a chunk_size, on CUDA, the chunks then lie in the gradient's own
    memory, or all rows are one chunk where they are at most 2 H.

    With a reduction the forward computes the gradients too, except in float16: there the scale of
    the loss (GradScaler's) must come first, and the backward computes the logits anew.
    Exact: no gradient is filtered. On the CPU a label out of range raises IndexError; on CUDA its
    row is NaN. Differentiable once, in x, weight and bias.
    """
    function = "linear_cross_entropy"
    expect_tensors(function, ("bias",), x=x, weight=weight, target=target, bias=bias)
    x, weight, bias = _cast(x, weight, bias)
    red, class_weight, num_items = scoring(
        function, x, target, reduction, shift, class_weight, num_items
    )
    if weight.ndim != 2:
        raise _C.ArgumentValueError(
            f"{function}: weight: expected 2 dimensions, got shape {tuple(weight.shape)}"
        )
    check_chunk_size(function, chunk_size)
    if accum_dtype not in (None, torch.float32, x.dtype):
        raise _C.ArgumentValueError(
            f"{function}: accum_dtype: expected None or torch.float32, got {accum_dtype!r}"
        )
    scalars = (ignore_index, red, shift, float(label_smoothing), float(z_loss), float(softcap),
               chunk_size or 0, accum_dtype == torch.float32)  # fmt: skip
    extras = (return_lse, return_accuracy, return_predicted)
    operands = (x, weight, target, bias, class_weight, num_items)
    if needs_grad(x, weight, bias):
        out = apply(_LinearCrossEntropy, *operands, scalars, extras)
    else:
        loss, losses, *rest = linear_cross_entropy_fwd(
            *operands, *scalars, *extras, False, False, False
        )
        out = (loss if red else losses, *rest[:3])
    return results(out, target, red, shift, extras)
