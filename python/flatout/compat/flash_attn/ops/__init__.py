"""flash_attn.ops: rms_norm, triton.layer_norm."""
