"""Liger 0.8's names over flatout: `from flatout.compat.liger import apply_liger_kernel_to_llama`.

Everything of `.transformers` (modules, functional forms, patching) and of `.ops` (the Function
classes) is here too.
"""

from flatout.compat import alias_submodules

from .ops import (
    LigerCrossEntropyFunction,
    LigerFusedAddRMSNormFunction,
    LigerFusedGateUpSiLUMulFunction,
    LigerFusedLinearCrossEntropyFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSiLUMulFunction,
)
from .ops import liger_cross_entropy_kernel as liger_cross_entropy_kernel
from .transformers import *  # noqa: F403
from .transformers import __all__ as _transformers_all
from .transformers import __getattr__ as __getattr__
from .transformers import _apply_liger_kernel as _apply_liger_kernel
from .transformers import _apply_liger_kernel_to_instance as _apply_liger_kernel_to_instance
from .transformers.functional import (
    CrossEntropyOutput,
    liger_cross_entropy,
    liger_fused_add_rms_norm,
    liger_fused_linear_cross_entropy,
    liger_rms_norm,
    liger_rope,
    liger_swiglu,
)
from .transformers.model.loss_utils import LigerForCausalLMLoss
from .transformers.modules import liger_rotary_pos_emb_gpt_oss, liger_rotary_pos_emb_vision

__version__ = "0.8.5"

__all__ = [
    *_transformers_all,
    "CrossEntropyOutput",
    "LigerCrossEntropyFunction",
    "LigerForCausalLMLoss",
    "LigerFusedAddRMSNormFunction",
    "LigerFusedGateUpSiLUMulFunction",
    "LigerFusedLinearCrossEntropyFunction",
    "LigerRMSNormFunction",
    "LigerRopeFunction",
    "LigerSiLUMulFunction",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_rms_norm",
    "liger_rope",
    "liger_rotary_pos_emb_gpt_oss",
    "liger_rotary_pos_emb_vision",
    "liger_swiglu",
]

alias_submodules(__name__)
