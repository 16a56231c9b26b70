"""flash_attn.ops.triton: layer_norm (here without Triton)."""
