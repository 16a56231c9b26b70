"""flash_attn.ops.rms_norm: rms_norm."""

from .triton.layer_norm import rms_norm_fn


def rms_norm(x, weight, epsilon):
    """x (..., H) * rsqrt(mean x^2 + epsilon) * weight (H,), in fp32 with one rounding."""
    return rms_norm_fn(x, weight, None, eps=epsilon)
