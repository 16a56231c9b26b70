"""flash_attn.ops.triton.layer_norm: rms_norm_fn."""

import torch

import flatout.torch as ft
from flatout.compat import refuse


def rms_norm_fn(
    x,
    weight,
    bias,
    residual=None,
    x1=None,
    weight1=None,
    bias1=None,
    eps=1e-6,
    dropout_p=0.0,
    rowscale=None,
    prenorm=False,
    residual_in_fp32=False,
    zero_centered_weight=False,
    return_dropout_mask=False,
    out_dtype=None,
    out=None,
    residual_out=None,
):
    """RMSNorm of x + residual, all in fp32, one rounding -> y, or with prenorm (y, residual).

    x and residual (..., H), weight and bias (H,) or bias None; zero_centered_weight norms with
    1 + weight. y has x's dtype or out_dtype and comes from the unrounded sum; the returned
    residual, that sum, has the dtype of the given one, else fp32 with residual_in_fp32, else x's.
    16-bit inputs are widened first, since flatout's op rounds before the weight as Llama does.
    Not served: x1, weight1, bias1, dropout_p, rowscale, return_dropout_mask, out, residual_out.
    """
    refuse(
        "rms_norm_fn",
        x1=x1 is not None,
        weight1=weight1 is not None,
        bias1=bias1 is not None,
        dropout_p=dropout_p != 0,
        rowscale=rowscale is not None,
        return_dropout_mask=return_dropout_mask,
        out=out is not None,
        residual_out=residual_out is not None,
    )
    stat = torch.float64 if x.dtype == torch.float64 else torch.float32
    total = x.to(stat) if residual is None else x.to(stat) + residual.to(stat)
    offset = 1.0 if zero_centered_weight else 0.0
    y = ft.rms_norm(total, weight.to(stat), eps, offset=offset)
    if bias is not None:
        y = y + bias.to(stat)
    y = y.to(out_dtype or x.dtype)
    if not prenorm:
        return y
    if residual is None and not residual_in_fp32:
        return y, x
    return y, total.to(stat if residual is None else residual.dtype)
