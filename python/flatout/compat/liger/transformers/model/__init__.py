"""liger_kernel.transformers.model: loss_utils."""
