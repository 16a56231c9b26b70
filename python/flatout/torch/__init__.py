"""flatout on torch tensors: differentiable functions, nn modules, AdamW."""

from torch import ops as _ops

from .adamw import AdamW, adamw_step, clip_grad_norm_, global_norm
from .attention import attention
from .cross_entropy import cross_entropy
from .embedding import embedding
from .linear_cross_entropy import linear_cross_entropy
from .nn import LinearCrossEntropyLoss, RMSNorm, SwiGLUMLP
from .rms_norm import add_rms_norm, rms_norm
from .rope import qk_norm_rope, rope
from .swiglu import swiglu

ops = _ops.flatout  # the registered ops, as torch.compile sees them

__all__ = [
    "AdamW",
    "LinearCrossEntropyLoss",
    "RMSNorm",
    "SwiGLUMLP",
    "adamw_step",
    "clip_grad_norm_",
    "global_norm",
    "add_rms_norm",
    "attention",
    "cross_entropy",
    "embedding",
    "linear_cross_entropy",
    "ops",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "swiglu",
]
