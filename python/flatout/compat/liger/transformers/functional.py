"""liger_kernel.transformers.functional: the *Function classes of ..ops as functions."""

from dataclasses import dataclass

import torch

from ..ops import (
    LigerCrossEntropyFunction,
    LigerFusedAddRMSNormFunction,
    LigerFusedLinearCrossEntropyFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
)


@dataclass
class CrossEntropyOutput:
    """What the losses return when they are asked for more than the loss."""

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    predicted_tokens: torch.Tensor | None = None


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    """RMSNorm of X (..., H) with W (H,): see ops.LigerRMSNormFunction."""
    return LigerRMSNormFunction.apply(X, W, eps, offset, casting_mode, in_place)


def liger_fused_add_rms_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    """(Y, S): S = X + R and its RMSNorm, all (..., H): see ops.LigerFusedAddRMSNormFunction."""
    return LigerFusedAddRMSNormFunction.apply(X, R, W, eps, offset, casting_mode, in_place)


def liger_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """Rotary embedding of q and k (B, H, S, D) -> (q, k): see ops.LigerRopeFunction."""
    return LigerRopeFunction.apply(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)


def liger_swiglu(a, b):
    """silu(a) * b, both (..., I)."""
    return LigerSiLUMulFunction.apply(a, b)


def liger_cross_entropy(
    input,
    target,
    weight=None,
    size_average=None,
    ignore_index=-100,
    reduce=None,
    reduction="mean",
    label_smoothing=0.0,
    lse_square_scale=0.0,
    softcap=None,
    return_z_loss=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
):
    """Cross-entropy of input (N, V), target (N,): see ops.LigerCrossEntropyFunction.

    The loss, or a CrossEntropyOutput if any return flag is set. size_average and reduce, torch's
    deprecated names, are NotImplementedError (Liger ignores them).
    """
    for name, value in (("size_average", size_average), ("reduce", reduce)):
        if value is not None:
            raise NotImplementedError(f"liger_cross_entropy: flatout does not support {name}")
    result = LigerCrossEntropyFunction.apply(
        input,
        target,
        weight,
        ignore_index,
        lse_square_scale,
        label_smoothing,
        reduction,
        softcap,
        return_z_loss,
        return_token_accuracy,
        return_predicted_tokens,
    )
    more = return_z_loss or return_token_accuracy or return_predicted_tokens
    return CrossEntropyOutput(*result) if more else result[0]


def liger_fused_linear_cross_entropy(
    input,
    weight,
    target,
    bias=None,
    ce_weight=None,
    ignore_index=-100,
    lse_square_scale=0.0,
    label_smoothing=0.0,
    reduction="mean",
    softcap=None,
    return_z_loss=False,
    accum_dtype=None,
    use_token_scaling=False,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    chunk_mem_const=1,
):
    """Cross-entropy of input (N, H) times weight (V, H): ops.LigerFusedLinearCrossEntropyFunction.

    The loss, or a CrossEntropyOutput if any return flag is set.
    """
    result = LigerFusedLinearCrossEntropyFunction.apply(
        input,
        weight,
        target,
        bias,
        ce_weight,
        ignore_index,
        lse_square_scale,
        label_smoothing,
        reduction,
        softcap,
        return_z_loss,
        accum_dtype,
        use_token_scaling,
        return_token_accuracy,
        return_predicted_tokens,
        None,
        None,
        chunk_mem_const,
    )
    more = return_z_loss or return_token_accuracy or return_predicted_tokens
    return CrossEntropyOutput(*result) if more else result[0]
