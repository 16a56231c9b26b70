"""liger_kernel.transformers: modules, patching; AutoLigerKernelForCausalLM on first use."""

from .modules import (
    LigerBlockSparseTop2MLP,
    LigerCrossEntropyLoss,
    LigerExperts,
    LigerFalconH1SwiGLUMLP,
    LigerFusedAddRMSNorm,
    LigerFusedLinearCrossEntropyLoss,
    LigerPhi3SwiGLUMLP,
    LigerQwen3MoeSwiGLUMLP,
    LigerRMSNorm,
    LigerSwiGLUMLP,
    liger_rotary_pos_emb,
)
from .monkey_patch import (
    _apply_liger_kernel as _apply_liger_kernel,
)
from .monkey_patch import (
    _apply_liger_kernel_to_instance as _apply_liger_kernel_to_instance,
)
from .monkey_patch import (
    apply_liger_kernel_to_llama,
    apply_liger_kernel_to_mistral,
    apply_liger_kernel_to_qwen2,
    apply_liger_kernel_to_qwen3,
    undo_liger_kernel,
)

__all__ = [
    "LigerBlockSparseTop2MLP",
    "LigerCrossEntropyLoss",
    "LigerExperts",
    "LigerFalconH1SwiGLUMLP",
    "LigerFusedAddRMSNorm",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerPhi3SwiGLUMLP",
    "LigerQwen3MoeSwiGLUMLP",
    "LigerRMSNorm",
    "LigerSwiGLUMLP",
    "apply_liger_kernel_to_llama",
    "apply_liger_kernel_to_mistral",
    "apply_liger_kernel_to_qwen2",
    "apply_liger_kernel_to_qwen3",
    "liger_rotary_pos_emb",
    "undo_liger_kernel",
]


def __getattr__(name):
    if name == "AutoLigerKernelForCausalLM":  # the one name that needs transformers to exist
        from .auto_model import AutoLigerKernelForCausalLM

        return AutoLigerKernelForCausalLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
