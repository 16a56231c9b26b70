import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from flatout import compat
from flatout.compat import cce, liger
from flatout.compat.flash_attn.layers.rotary import apply_rotary_emb
from flatout.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from flatout.compat.flash_attn.ops.rms_norm import rms_norm


def run(code):
    paths = [str(Path(__file__).parent), *sys.path]  # for peers.py
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


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
import liger_kernel.ops.swiglu as swiglu, liger_kernel.transformers.rope
swiglu.LigerSiLUMulFunction, liger_kernel.transformers.rope.liger_rotary_pos_emb
from liger_kernel.utils import infer_device
from cut_cross_entropy import linear_cross_entropy
from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropy
from cut_cross_entropy.transformers import cce_patch
assert Same is LigerRMSNorm and Same.__module__.startswith("flatout.compat")
assert importlib.util.find_spec("liger_kernel") is not None
from transformers.utils import is_liger_kernel_available
assert is_liger_kernel_available()
from transformers.integrations.liger import apply_liger_kernel
from peers import tiny_model
model = tiny_model()
apply_liger_kernel(model, {"swiglu": False})  # what Trainer does with use_liger_kernel=True
assert type(model.model.norm).extra_repr is LigerRMSNorm.extra_repr
unshadow("flash_attn")
assert not any(name.split(".")[0] == "flash_attn" for name in sys.modules)
""")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("transformers", [".transformers", ""])
@pytest.mark.parametrize("ops", [".ops", ""])
def test_peers_paths_below_flatout_compat(transformers, ops):
    """The name of a peer's package is all that has to be replaced, whichever module is imported."""
    result = run(f"""
import flatout.compat.liger.ops.swiglu as swiglu, flatout.compat.liger.transformers.rope
from flatout.compat.liger{transformers}.rms_norm import LigerRMSNorm
from flatout.compat.liger{transformers}.functional import liger_rms_norm
from flatout.compat.liger{transformers}.rope import liger_rotary_pos_emb_gpt_oss
from flatout.compat.liger{transformers}.trainer_integration import _apply_liger_kernel
from flatout.compat.liger{ops}.cross_entropy import LigerCrossEntropyFunction
from flatout.compat.liger.ops.utils import is_hip
from flatout.compat.cce.constants import IGNORE_INDEX
from flatout.compat.cce.linear_cross_entropy import LinearCrossEntropyImpl
from flatout.compat.cce.vocab_parallel.utils import VocabParallelOptions
from flatout.compat.cce.vocab_parallel import utils as vocab_parallel_utils
from flatout.compat.cce import utils
assert utils.compute_z_loss and vocab_parallel_utils.VocabParallelOptions is VocabParallelOptions
import flatout.compat.cce
from flatout.compat import liger
assert liger.LigerRMSNorm is LigerRMSNorm and liger.ops.swiglu is swiglu
assert liger.LigerCrossEntropyFunction is LigerCrossEntropyFunction
assert flatout.compat.cce.linear_cross_entropy.__name__ == "linear_cross_entropy"
""")
    assert result.returncode == 0, result.stderr


def test_shadow_refuses_when_the_real_package_is_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn.losses", types.ModuleType("flash_attn.losses"))
    with pytest.raises(RuntimeError, match="the real flash_attn.losses is already imported"):
        compat.shadow("flash_attn")
    assert "flash_attn" not in sys.modules


def test_shadow_knows_its_names():
    with pytest.raises(ValueError, match="liger_kernel, cut_cross_entropy, flash_attn"):
        compat.shadow("torch")


@pytest.mark.parametrize("name", ["liger", "cce", "flash_attn", "flash_attn_interface"])
def test_all_lists_what_is_there(name):
    module = importlib.import_module(f"flatout.compat.{name}")
    for public in module.__all__:
        assert hasattr(module, public), public


def test_what_liger_finds_on_the_machine(monkeypatch):
    def there(module, name, answer):
        monkeypatch.setattr(module, name, lambda: answer)

    utils = liger.utils
    there(torch.xpu, "is_available", True)  # of no use to flatout
    for cuda, device in ((True, "cuda"), (False, "cpu")):
        there(torch.cuda, "is_available", cuda)
        assert utils.infer_device() == device
    for nccl, gloo, backend in ((True, True, "nccl"), (False, True, "gloo")):
        there(torch.distributed, "is_nccl_available", nccl)
        there(torch.distributed, "is_gloo_available", gloo)
        assert utils.infer_comm_backend() == backend
    there(torch.distributed, "is_gloo_available", False)
    with pytest.raises(RuntimeError, match="no backend"):
        utils.infer_comm_backend()


def test_a_stand_in_is_no_public_name():
    assert "liger_cross_entropy_kernel" not in liger.__all__
    assert liger.liger_cross_entropy_kernel is liger.ops.liger_cross_entropy_kernel


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    def step(x, norm, weight, target, q, k, cos, sin):
        y, total = liger.liger_fused_add_rms_norm(x, 2 * x, norm, 1e-6)
        y = liger.liger_swiglu(liger.liger_rms_norm(y, norm, 1e-6, 1.0, "gemma"), total)
        y = rms_norm(y, norm, 1e-6)
        heads = liger.liger_rotary_pos_emb(q, k, cos, sin)
        rotated = apply_rotary_emb(q.transpose(1, 2), cos[0, :, :4], sin[0, :, :4])
        rows = y.flatten(0, 1)
        fused = liger.liger_fused_linear_cross_entropy(
            rows, weight, target, lse_square_scale=1e-3, return_z_loss=True
        )
        return (
            fused.loss
            + liger.liger_cross_entropy(rows @ weight.T, target)
            + cce.linear_cross_entropy(y, weight, target.view(2, 6), shift=1)
            + CrossEntropyLoss()(rows @ weight.T, target)
            + sum(t.sum() for t in (*heads, rotated))
        )

    shapes = [(2, 6, 16), (16,), (30, 16), None, (2, 2, 6, 8), (2, 2, 6, 8), (1, 6, 8), (1, 6, 8)]
    args = [
        torch.randn(s, requires_grad=True) if s else torch.randint(0, 30, (12,)) for s in shapes
    ]
    leaves = args[:3] + args[4:6]
    want = step(*args)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(t, leaves) for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
