"""Cross-entropy of logits, and of x @ weight.T whose logits exist only chunk by chunk
(formulas, reductions and options: csrc/ops.h)."""

import math
from operator import ge, or_

import torch
from torch import Tensor

from .. import _C
from .._numpy import CHUNK_BYTES as CPU_CHUNK_BYTES
from .._numpy import REDUCTIONS, check_chunk_size, check_shift, chunk_rows
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

CHUNK_BYTES = 300 << 20  # of logits on CUDA
WORKSPACE_BYTES = 32 << 20  # what cuBLASLt asks for on Hopper


def _seq(target):
    return target.shape[-1] if target.ndim else 1


def _new(x, *shape):
    return x.new_empty(*(shape or [()]), dtype=stat_dtype(x))


def _flat(x, N):
    if x is None or (x.ndim == 1 and x.is_contiguous()):
        return x
    return x.reshape(N).contiguous()


def _matrix(x, N):
    """x as the ops read it, (N, H)."""
    x = rows(x)
    return x if x.ndim == 2 else x.reshape(N, x.shape[-1])


def _operand(x):
    """x (rows, H) as cuBLASLt reads it: without rows that overlap, as an expanded tensor's do."""
    return x.contiguous() if x.is_cuda and x.stride(0) < x.shape[1] else x


def _view(x, *shape):
    return None if x is None else x.view(shape)


def _loss_outputs(x, target, reduction, accuracy, predicted):
    """loss, losses, lse, accuracy, predicted."""
    return (
        _new(x) if reduction else None,
        _new(x, *target.shape),
        _new(x, *target.shape),
        _new(x) if accuracy else None,
        target.new_empty(target.shape, dtype=torch.int64) if predicted else None,
    )


def _loss_rows(out, target):
    """The same outputs as the ops write them, a row a target."""
    if target.ndim == 1:
        return out
    loss, losses, lse, accuracy, predicted = out
    N = target.numel()
    return loss, losses.view(N), lse.view(N), accuracy, _view(predicted, N)


# ---- On logits -------------------------------------------------------------------------------


def _ce_fwd_outputs(logits, target, weight, num_items, ignore, reduction, *rest):
    *extras, want_low = rest[-3:]
    outputs = _loss_outputs(logits, target, reduction, *extras)
    return (*outputs, _new(logits, *target.shape) if want_low else None)


def _ce_fwd(out, logits, target, weight, num_items, *rest):
    ignore, reduction, shift, smoothing, z_loss, softcap, *_ = rest
    N = target.numel()
    _C.cross_entropy_fwd(
        *_loss_rows(out[:5], target), _view(out[5], N), _new(logits, 4),
        _matrix(logits, N), _flat(target, N), weight, num_items,
        ignore, reduction, _seq(target), shift, smoothing, z_loss, softcap, stream(logits),
    )  # fmt: skip


def _ce_bwd_outputs(dloss, dlse, logits, *rest):
    return (empty_like(logits),)


def _ce_bwd(out, dloss, dlse, logits, target, weight, num_items, lse, lse_low, *scalars):
    ignore, reduction, shift, smoothing, z_loss, softcap = scalars
    N, V = target.numel(), logits.shape[-1]
    _C.cross_entropy_bwd(
        out[0].view(N, V), _new(logits, 4), dloss if reduction else _flat(dloss, N),
        _flat(dlse, N), _matrix(logits, N), _flat(target, N), weight,
        num_items, lse.view(N), _view(lse_low, N),
        ignore, reduction, _seq(target), shift, smoothing, z_loss, softcap, stream(logits),
    )  # fmt: skip


SCALARS = (
    "int ignore_index, int reduction, int shift, float label_smoothing, float z_loss, float softcap"
)
cross_entropy_fwd = Op(
    f"cross_entropy_fwd(Tensor logits, Tensor target, Tensor? class_weight, Tensor? num_items, "
    f"{SCALARS}, bool accuracy, bool predicted, bool lse_low)"
    f" -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _ce_fwd_outputs,
    _ce_fwd,
)
cross_entropy_bwd = Op(
    f"cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor logits, Tensor target, "
    f"Tensor? class_weight, Tensor? num_items, Tensor lse, Tensor? lse_low, {SCALARS}) -> Tensor",
    _ce_bwd_outputs,
    _ce_bwd,
)


# ---- On x and weight -------------------------------------------------------------------------


def _linear_scratch(x, weight, target, chunk, fp32_accum, dw, db):
    """dw_accum, db_accum, logits_chunk, stats, workspace."""
    N, (V, H), on_gpu = target.numel(), weight.shape, x.is_cuda
    sums = fp32_accum and dw is not None and x.dtype != stat_dtype(x)
    C = max(1, min(chunk, N)) if chunk else chunk_rows(N, V, x.element_size(), _budget(x))
    spare, free = 0, on_gpu and not chunk
    inside = free and C < N and dw is not None and dw.is_contiguous()
    if inside and (spare := _spare_bytes(dw, N)) <= CHUNK_BYTES:
        C = N  # all logits lie in dw's memory, and a part of them beside it as dw is made
    elif free and sums and N * x.element_size() <= H * 4:
        C, inside = N, False  # they take no more memory than the sums of chunks, and need none
    else:  # the sums are rounded into dw at the end: until then its memory can hold the logits
        spare, inside = 0, inside and sums and H >= C
    workspace = WORKSPACE_BYTES + spare if inside else WORKSPACE_BYTES
    return (
        _new(x, *weight.shape) if sums and C < N else None,
        _new(x, V) if db is not None else None,
        dw if inside else _logits(x, C, V),
        _new(x, 4),
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


def _linear_fwd_outputs(x, weight, target, bias, class_weight, num_items, *rest):
    reduction, (accuracy, predicted, *needs) = rest[1], rest[-5:]
    return _loss_outputs(x, target, reduction, accuracy, predicted) + _gradient_outputs(
        x, weight, bias, *needs
    )


def _linear_fwd(out, x, weight, target, bias, class_weight, num_items, *rest):
    ignore, reduction, shift, smoothing, z_loss, softcap, chunk, fp32_accum = rest[:8]
    N = target.numel()
    _C.linear_cross_entropy_fwd(
        *_loss_rows(out[:5], target), *_gradient_rows(out[5:], N),
        *_linear_scratch(x, weight, target, chunk, fp32_accum, *out[6:]),
        _operand(_matrix(x, N)), _operand(rows(weight)), _flat(target, N),
        bias if bias is None else rows(bias), class_weight, num_items,
        ignore, reduction, _seq(target), shift, smoothing, z_loss, softcap, stream(x),
    )  # fmt: skip


def _linear_bwd_outputs(dloss, dlse, x, weight, target, bias, *rest):
    return _gradient_outputs(x, weight, bias, *rest[-3:])


def _linear_bwd(out, dloss, dlse, x, weight, target, bias, class_weight, num_items, lse, *rest):
    ignore, reduction, shift, smoothing, z_loss, softcap, chunk, fp32_accum, *_ = rest
    N = target.numel()
    _C.linear_cross_entropy_bwd(
        *_gradient_rows(out, N),
        *_linear_scratch(x, weight, target, chunk, fp32_accum, *out[1:]),
        dloss if reduction else _flat(dloss, N), _flat(dlse, N), _operand(_matrix(x, N)),
        _operand(rows(weight)), _flat(target, N), bias if bias is None else rows(bias),
        class_weight, num_items, lse.view(N),
        ignore, reduction, _seq(target), shift, smoothing, z_loss, softcap, stream(x),
    )  # fmt: skip


LINEAR = f"{SCALARS}, int chunk_size, bool fp32_accum"
NEEDS = "bool need_dx, bool need_dw, bool need_db"
linear_cross_entropy_fwd = Op(
    f"linear_cross_entropy_fwd(Tensor x, Tensor weight, Tensor target, Tensor? bias, "
    f"Tensor? class_weight, Tensor? num_items, {LINEAR}, bool return_lse, "
    f"bool accuracy, bool predicted, {NEEDS})"
    f" -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_fwd_outputs,
    _linear_fwd,
)
linear_cross_entropy_bwd = Op(
    f"linear_cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor x, Tensor weight, "
    f"Tensor target, Tensor? bias, Tensor? class_weight, Tensor? num_items, Tensor lse, "
    f"{LINEAR}, {NEEDS}) -> (Tensor, Tensor, Tensor)",
    _linear_bwd_outputs,
    _linear_bwd,
)


# ---- Autograd --------------------------------------------------------------------------------


def _mark(ctx, lse, accuracy, predicted, return_lse):
    constant = accuracy, predicted, None if return_lse else lse
    ctx.mark_non_differentiable(*(x for x in constant if x is not None))
    ctx.set_materialize_grads(False)


def _upstream(dloss, reduction, lse):
    """dloss, zeros where only lse has a gradient."""
    if dloss is None:
        return torch.zeros_like(lse) if reduction == 0 else lse.new_zeros(())
    return dloss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, weight, num_items, scalars, extras, return_lse):
        split = logits.is_cuda  # the CPU's backward has no use for lse's low part
        out = cross_entropy_fwd(logits, target, weight, num_items, *scalars, *extras, split)
        loss, losses, lse, accuracy, predicted, lse_low = out
        lse_low = lse_low if split else None
        ctx.save_for_backward(logits, target, weight, num_items, lse, lse_low)
        ctx.scalars = scalars
        _mark(ctx, lse, accuracy, predicted, return_lse)
        return loss if scalars[1] else losses, lse, accuracy, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dlse, *_):
        saved = ctx.saved_tensors
        dloss = _upstream(dloss, ctx.scalars[1], saved[4])
        dlogits = cross_entropy_bwd(dloss, dlse, *saved, *ctx.scalars)
        return dlogits, None, None, None, None, None, None


def _ask(ctx, inputs):
    inputs[-1] = inputs[0].is_cuda  # as in _CrossEntropy.forward


def _setup(ctx, inputs, outputs):
    ctx.scalars = inputs[4:10]
    ctx.save_for_backward(*inputs[:4], outputs[2], outputs[5] if inputs[-1] else None)
    ctx.set_materialize_grads(False)
    return 0 if ctx.scalars[1] else 1, 2


cross_entropy_fwd.differentiable(_CrossEntropy, _setup, _ask)


class _LinearCrossEntropy(torch.autograd.Function):
    """With a reduction the forward computes the gradients for an upstream gradient of 1, while the
    logits are there; the first backward scales them in place, and any other starts anew. Not in
    float16: there most would be 0 before the scale of the loss (GradScaler's) came to save them."""

    @staticmethod
    def forward(ctx, x, weight, target, bias, class_weight, num_items, scalars, extras):
        need_dx, need_dw, _, need_db, *_ = ctx.needs_input_grad
        ctx.needs = need_dx, need_dw, need_db
        direct = eager(x)
        early = _early(x, scalars, extras[0], direct)
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
        _mark(ctx, lse, accuracy, predicted, extras[0])
        return loss if scalars[1] else losses, lse, accuracy, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dlse, *_):
        if dlse is None:
            if ctx.grads is not None and eager(dloss) and has_memory(dloss):
                grads, ctx.grads = ctx.grads, None
                wanted = [g for g, need in zip(grads, ctx.needs, strict=True) if need]
                _C.scale(wanted, dloss, stream(dloss))
                return _masked(grads, ctx.needs)
            if grads := ctx.grads or ctx.saved_tensors[7:]:
                grads = [None if g is None else (g * dloss).to(g.dtype) for g in grads]
                return _masked(grads, ctx.needs)
        ctx.grads = None  # before memory for others is needed
        operands, lse = ctx.saved_tensors[:6], ctx.saved_tensors[6]
        dloss = _upstream(dloss, ctx.scalars[1], lse)
        grads = linear_cross_entropy_bwd(dloss, dlse, *operands, lse, *ctx.scalars, *ctx.needs)
        return _masked(grads, ctx.needs)


def _early(x, scalars, return_lse, direct):
    """Whether the forward computes the gradients: not in a graph whose backward may have to compute
    them again, for a gradient of lse."""
    return scalars[1] and x.dtype != torch.float16 and (direct or not return_lse)


def _masked(grads, needs):
    """In the order of the inputs: x, weight, target, bias, ..."""
    dx, dw, db = [g if need else None for g, need in zip(grads, needs, strict=True)]
    return dx, dw, None, db, None, None, None, None


def _linear_ask(ctx, inputs):
    need_dx, need_dw, _, need_db, *_ = ctx.needs_input_grad
    ctx.needs = need_dx, need_dw, need_db
    if _early(inputs[0], inputs[6:14], inputs[14], eager(inputs[0])):
        inputs[-3:] = map(or_, inputs[-3:], ctx.needs)


def _linear_setup(ctx, inputs, outputs):
    ctx.grads, ctx.scalars = None, inputs[6:14]
    reduction = ctx.scalars[1]
    complete = reduction and all(map(ge, inputs[-3:], ctx.needs))
    ctx.save_for_backward(*inputs[:6], outputs[2], *(outputs[5:] if complete else ()))
    ctx.set_materialize_grads(False)
    return 0 if reduction else 1, 2


linear_cross_entropy_fwd.differentiable(_LinearCrossEntropy, _linear_setup, _linear_ask)


# ---- Public functions ------------------------------------------------------------------------


def _scoring(function, x, target, reduction, shift, class_weight, num_items):
    """The checks and conversions of what both functions take."""
    if reduction not in REDUCTIONS:
        raise _C.ArgumentValueError(
            f"{function}: reduction: expected none, mean or sum, got {reduction!r}"
        )
    if not x.ndim:
        raise _C.ArgumentValueError(f"{function}: x: expected at least 1 dimension, got 0")
    if x.shape[:-1] != target.shape:
        raise _C.ArgumentValueError(
            f"{function}: target: expected shape {tuple(x.shape[:-1])}, got {tuple(target.shape)}"
        )
    check_shift(function, shift, target)
    if class_weight is not None:
        expect_tensors(function, class_weight=class_weight)
        class_weight = class_weight.to(stat_dtype(x)).contiguous()
    if num_items is not None:
        if reduction == "none":
            raise _C.ArgumentValueError(f"{function}: num_items: expected None with reduction none")
        if isinstance(num_items, torch.Tensor):
            num_items = num_items.to(x.device, stat_dtype(x)).reshape(1)
        else:
            num_items = torch.full((1,), num_items, dtype=stat_dtype(x), device=x.device)
    return REDUCTIONS[reduction], class_weight, num_items


def _results(out, target, reduction, shift, asked):
    """What the caller asked for; per-token results without the last `shift` places."""
    loss, lse, accuracy, predicted = out
    if shift:
        kept = max(0, _seq(target) - shift)
        loss = loss if reduction else loss[..., :kept]
        lse = lse[..., :kept]
        predicted = None if predicted is None else predicted[..., :kept]
    values = [v for v, want in zip((lse, accuracy, predicted), asked, strict=True) if want]
    return (loss, *values) if values else loss


def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: int = 0,
    class_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    num_items: float | torch.Tensor | None = None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predicted: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Cross-entropy of logits (..., V) for target (...), int32 or int64; computed in float32.

    The options are linear_cross_entropy's, and so are the results.
    """
    if not (isinstance(logits, Tensor) and isinstance(target, Tensor)):
        expect_tensors("cross_entropy", logits=logits, target=target)
    red, class_weight, num_items = _scoring(
        "cross_entropy", logits, target, reduction, shift, class_weight, num_items
    )
    scalars = (ignore_index, red, shift, float(label_smoothing), float(z_loss), float(softcap))
    extras = (return_accuracy, return_predicted)
    if needs_grad(logits):
        out = apply(
            _CrossEntropy, logits, target, class_weight, num_items, scalars, extras, return_lse
        )
    else:
        loss, losses, *rest = cross_entropy_fwd(
            logits, target, class_weight, num_items, *scalars, *extras, False
        )
        out = (loss if red else losses, *rest[:3])
    return _results(out, target, red, shift, (return_lse, *extras))


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
    where their logits fit into the memory of weight's gradient and 300 MiB beside it hold what is
    needed of them as that is written (N rows with 2 N^2 V / H bytes, in 16 bits), else a multiple
    of 128 within 300 MiB. accum_dtype: torch.float32 sums a 16-bit weight's gradient over several
    chunks in float32, rounded once; without a chunk_size, on CUDA, the chunks then lie in the
    gradient's own memory, or all rows are one chunk where they are at most 2 H.

    With a reduction the forward computes the gradients too, except in float16: there the scale of
    the loss (GradScaler's) must come first, and the backward computes the logits anew.
    Exact: no gradient is filtered. On the CPU a label out of range raises IndexError; on CUDA its
    row is NaN. Differentiable once, in x, weight and bias.
    """
    function = "linear_cross_entropy"
    expect_tensors(function, ("bias",), x=x, weight=weight, target=target, bias=bias)
    x, weight, bias = _cast(x, weight, bias)
    red, class_weight, num_items = _scoring(
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
    return _results(out, target, red, shift, extras)
