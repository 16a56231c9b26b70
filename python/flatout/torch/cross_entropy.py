"""Cross-entropy of logits (formulas, reductions and options: csrc/ops.h), and what it shares with
linear_cross_entropy.py."""

import torch
from torch import Tensor

from .. import _C
from .._numpy import REDUCTIONS, check_shift
from ._library import (
    Op,
    apply,
    empty_like,
    expect_tensors,
    needs_grad,
    once_differentiable,
    rows,
    stat_dtype,
    stream,
)


def seq_of(target):
    return target.shape[-1] if target.ndim else 1


def new_stat(x, *shape):
    return x.new_empty(*(shape or [()]), dtype=stat_dtype(x))


def flat_rows(x, N):
    if x is None or (x.ndim == 1 and x.is_contiguous()):
        return x
    return x.reshape(N).contiguous()


def matrix(x, N):
    """x as the ops read it, (N, H)."""
    x = rows(x)
    return x if x.ndim == 2 else x.reshape(N, x.shape[-1])


def viewed(x, *shape):
    return None if x is None else x.view(shape)


def loss_outputs(x, target, reduction, accuracy, predicted):
    """loss, losses, lse, accuracy, predicted."""
    return (
        new_stat(x) if reduction else None,
        new_stat(x, *target.shape),
        new_stat(x, *target.shape),
        new_stat(x) if accuracy else None,
        target.new_empty(target.shape, dtype=torch.int64) if predicted else None,
    )


def loss_rows(out, target):
    """The same outputs as the ops write them, a row a target."""
    if target.ndim == 1:
        return out
    loss, losses, lse, accuracy, predicted = out
    N = target.numel()
    return loss, losses.view(N), lse.view(N), accuracy, viewed(predicted, N)


# ---- Registered ops --------------------------------------------------------------------------


def _fwd_outputs(logits, target, weight, num_items, ignore, reduction, *rest):
    *extras, want_low = rest[-3:]
    outputs = loss_outputs(logits, target, reduction, *extras)
    return (*outputs, new_stat(logits, *target.shape) if want_low else None)


def _fwd(out, logits, target, weight, num_items, *rest):
    ignore, reduction, shift, smoothing, z_loss, softcap, *_ = rest
    N = target.numel()
    _C.cross_entropy_fwd(
        *loss_rows(out[:5], target), viewed(out[5], N), new_stat(logits, 4),
        matrix(logits, N), flat_rows(target, N), weight, num_items,
        ignore, reduction, seq_of(target), shift, smoothing, z_loss, softcap, stream(logits),
    )  # fmt: skip


def _bwd_outputs(dloss, dlse, logits, *rest):
    return (empty_like(logits),)


def _bwd(out, dloss, dlse, logits, target, weight, num_items, lse, lse_low, *scalars):
    ignore, reduction, shift, smoothing, z_loss, softcap = scalars
    N, V = target.numel(), logits.shape[-1]
    _C.cross_entropy_bwd(
        out[0].view(N, V), new_stat(logits, 4), dloss if reduction else flat_rows(dloss, N),
        flat_rows(dlse, N), matrix(logits, N), flat_rows(target, N), weight,
        num_items, lse.view(N), viewed(lse_low, N),
        ignore, reduction, seq_of(target), shift, smoothing, z_loss, softcap, stream(logits),
    )  # fmt: skip


SCALARS = (
    "int ignore_index, int reduction, int shift, float label_smoothing, float z_loss, float softcap"
)
cross_entropy_fwd = Op(
    f"cross_entropy_fwd(Tensor logits, Tensor target, Tensor? class_weight, Tensor? num_items, "
    f"{SCALARS}, bool accuracy, bool predicted, bool lse_low)"
    f" -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fwd_outputs,
    _fwd,
)
cross_entropy_bwd = Op(
    f"cross_entropy_bwd(Tensor dloss, Tensor? dlse, Tensor logits, Tensor target, "
    f"Tensor? class_weight, Tensor? num_items, Tensor lse, Tensor? lse_low, {SCALARS}) -> Tensor",
    _bwd_outputs,
    _bwd,
)

# ---- Autograd --------------------------------------------------------------------------------


def mark_constant(ctx, lse, accuracy, predicted, return_lse):
    constant = accuracy, predicted, None if return_lse else lse
    ctx.mark_non_differentiable(*(x for x in constant if x is not None))
    ctx.set_materialize_grads(False)


def upstream(dloss, reduction, lse):
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
        mark_constant(ctx, lse, accuracy, predicted, return_lse)
        return loss if scalars[1] else losses, lse, accuracy, predicted

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, dlse, *_):
        saved = ctx.saved_tensors
        dloss = upstream(dloss, ctx.scalars[1], saved[4])
        dlogits = cross_entropy_bwd(dloss, dlse, *saved, *ctx.scalars)
        return dlogits, None, None, None, None, None, None


def _ask(ctx, inputs):
    inputs[-1] = inputs[0].is_cuda  # as in _CrossEntropy.forward


def _setup(ctx, inputs, outputs):
    ctx.scalars = inputs[4:10]
    ctx.save_for_backward(*inputs[:4], outputs[2], outputs[5] if inputs[-1] else None)
    ctx.set_materialize_grads(False)
    return 0 if ctx.scalars[1] else 1, 2


cross_entropy_fwd.differentiable((0,), _CrossEntropy, _setup, _ask)

# ---- Public function -------------------------------------------------------------------------


def scoring(function, x, target, reduction, shift, class_weight, num_items):
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


def results(out, target, reduction, shift, asked):
    """What the caller asked for; per-token results without the last `shift` places."""
    loss, lse, accuracy, predicted = out
    if shift:
        kept = max(0, seq_of(target) - shift)
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
    red, class_weight, num_items = scoring(
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
    return results(out, target, red, shift, (return_lse, *extras))
