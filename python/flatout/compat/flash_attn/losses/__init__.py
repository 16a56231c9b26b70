"""flash_attn.losses: cross_entropy."""
