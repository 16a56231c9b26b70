"""flatout on torch tensors: differentiable functions, nn modules, AdamW."""

from torch import ops as _ops

from .rms_norm import add_rms_norm, rms_norm

ops = _ops.flatout  # the registered ops, as torch.compile sees them

__all__ = ["add_rms_norm", "ops", "rms_norm"]
