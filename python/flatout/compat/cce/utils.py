"""cut_cross_entropy.utils: compute_z_loss, softcapping."""

import torch

from . import IGNORE_INDEX


def softcapping(logits, softcap):
    """softcap * tanh(logits / softcap), what linear_cross_entropy's softcap does to its logits."""
    return softcap * torch.tanh(logits / softcap)


def compute_z_loss(lse, targets=None, shift=False, ignore_index=IGNORE_INDEX, reduction="mean"):
    """lse^2 of linear_cross_entropy(..., return_lse=True), reduced.

    lse (..., T - s); targets (..., T), of which targets[..., s:] count, s = int(shift): where they
    are ignore_index the term is 0, and "mean" divides by the others' number. ValueError for a
    reduction other than "mean", "sum" and "none".
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"Invalid reduction: {reduction}")
    terms, count = lse.square(), lse.numel()
    if targets is not None:
        valid = targets[..., int(shift) :] != ignore_index
        terms, count = terms.masked_fill(~valid, 0.0), valid.sum()
    if reduction == "none":
        return terms
    return terms.sum() / count if reduction == "mean" else terms.sum()
