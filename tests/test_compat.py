import importlib
import subprocess
import sys

import pytest

from flatout import compat


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_shadow_gives_the_peers_paths():
    result = run("""
import importlib.util, sys
from flatout.compat import shadow, unshadow
assert shadow("flash_attn").__name__ == "flatout.compat.flash_attn"
shadow("flash_attn")
shadow("flash_attn_interface")
shadow("liger_kernel")
shadow("cut_cross_entropy")
from flash_attn import flash_attn_func
from flash_attn.bert_padding import pad_input, unpad_input, index_first_axis
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.ops.triton.layer_norm import rms_norm_fn
import flash_attn.losses.cross_entropy
flash_attn.losses.cross_entropy.CrossEntropyLoss()
from flash_attn_interface import flash_attn_varlen_func
from liger_kernel.transformers import apply_liger_kernel_to_llama, LigerRMSNorm
from liger_kernel.transformers import _apply_liger_kernel_to_instance
from liger_kernel.transformers.rms_norm import LigerRMSNorm as Same
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.transformers.functional import liger_rms_norm
from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropy
from cut_cross_entropy.transformers import cce_patch
assert Same is LigerRMSNorm and Same.__module__.startswith("flatout.compat")
assert importlib.util.find_spec("liger_kernel") is not None
from transformers.utils import is_liger_kernel_available
assert is_liger_kernel_available()
unshadow("flash_attn")
assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
""")
    assert result.returncode == 0, result.stderr


def test_shadow_refuses_when_the_real_package_is_there():
    pytest.importorskip("cut_cross_entropy")
    result = run(
        "import cut_cross_entropy; import flatout.compat as c; c.shadow('cut_cross_entropy')"
    )
    assert "RuntimeError: shadow: the real cut_cross_entropy is already imported" in result.stderr


def test_shadow_knows_its_names():
    with pytest.raises(ValueError, match="liger_kernel, cut_cross_entropy, flash_attn"):
        compat.shadow("torch")


@pytest.mark.parametrize("name", ["liger", "cce", "flash_attn", "flash_attn_interface"])
def test_all_lists_what_is_there(name):
    module = importlib.import_module(f"flatout.compat.{name}")
    for public in module.__all__:
        assert hasattr(module, public), public
