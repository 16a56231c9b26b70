"""flatout on torch tensors: differentiable functions, nn modules, AdamW."""

from torch import ops as _ops

from .adamw import AdamW, adamw_step, clip_grad_norm_, global_norm
from .rms_norm import add_rms_norm, rms_norm

ops = _ops.flatout  # the registered ops, as torch.compile sees them

__all__ = [
    "AdamW",
    "adamw_step",
    "clip_grad_norm_",
    "global_norm",
    "add_rms_norm",
    "ops",
    "rms_norm",
]
