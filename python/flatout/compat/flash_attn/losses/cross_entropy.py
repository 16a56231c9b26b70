"""flash_attn.losses.cross_entropy: CrossEntropyLoss."""

from torch import nn

import flatout.torch as ft
from flatout.compat import refuse


class CrossEntropyLoss(nn.Module):
    """Cross-entropy of logits, over `flatout.torch.cross_entropy`.

    forward(input (N, V), target (N,)) -> fp32 loss: () for "mean" and "sum", (N,) for "none"; with
    return_z_loss (loss, z_loss). The z term lse_square_scale * lse^2 is part of loss; z_loss,
    without a gradient, is that part alone. logit_scale multiplies the logits in fp32 first.
    inplace_backward is accepted, and the logits stay as they are. Not served: process_group
    (a vocabulary split over processes) and precomputed_lse.
    """

    def __init__(
        self,
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
        logit_scale=1.0,
        lse_square_scale=0.0,
        inplace_backward=False,
        process_group=None,
        return_z_loss=False,
    ):
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise NotImplementedError(f"CrossEntropyLoss: flatout does not support {reduction=}")
        refuse("CrossEntropyLoss", process_group=process_group is not None)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(self, input, target, precomputed_lse=None):
        refuse("CrossEntropyLoss", precomputed_lse=precomputed_lse is not None)
        if self.logit_scale != 1.0:
            input = (input if input.element_size() >= 4 else input.float()) * self.logit_scale
        result = ft.cross_entropy(
            input,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.lse_square_scale,
            return_lse=self.return_z_loss,
        )
        if not self.return_z_loss:
            return result
        loss, lse = result
        valid = target != self.ignore_index
        z_loss = (self.lse_square_scale * lse.detach().square()).masked_fill(~valid, 0.0)
        if self.reduction == "mean":
            z_loss = z_loss.sum() / valid.sum()
        elif self.reduction == "sum":
            z_loss = z_loss.sum()
        return loss, z_loss
