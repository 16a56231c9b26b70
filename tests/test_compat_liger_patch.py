import copy
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
from peers import tiny_model, tokens

transformers = pytest.importorskip("transformers")

import flatout.compat.liger as liger  # noqa: E402
from flatout import hf  # noqa: E402
from flatout.compat.liger import AutoLigerKernelForCausalLM  # noqa: E402
from flatout.compat.liger.transformers import monkey_patch  # noqa: E402

NAMES = ["Qwen3", "Qwen2", "Llama", "Mistral"]
OPS = ("rms_norm", "swiglu", "rope")


def apply(name, **options):
    getattr(liger, f"apply_liger_kernel_to_{name.lower()}")(**options)


def step(model, **options):
    """The output with labels, and every gradient."""
    ids, labels = tokens()
    model.zero_grad()
    output = model(input_ids=ids, labels=labels, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same_step(model, want):
    output, grads = step(model)
    torch.testing.assert_close(output.loss, want[0].loss)
    for name, grad in want[1].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    return output


def active(model):
    report = hf.report(model)
    return {op for op in OPS if report.active(op)}


@pytest.fixture
def undo():
    yield
    for name in NAMES:
        liger.undo_liger_kernel(name.lower())


@pytest.mark.parametrize("name", NAMES)
def test_model(name):
    model, other = tiny_model(name), tiny_model(name)
    want, names = step(model), list(model.state_dict())
    modeling = vars(__import__(type(model).__module__, fromlist=["x"])).copy()
    apply(name, model=model)
    assert active(model) == set(OPS) and not active(other)
    assert vars(__import__(type(other).__module__, fromlist=["x"])) == modeling
    assert list(model.state_dict()) == names
    assert hf.report(model).active("linear_cross_entropy") == [""]
    assert not hf.report(other).active("linear_cross_entropy")
    output = assert_same_step(model, want)
    assert output.logits is None and output.token_accuracy is None
    full, _ = step(model, skip_logits=False)
    torch.testing.assert_close(full.logits, want[0].logits)
    counted, _ = step(model, return_token_accuracy=True, num_items_in_batch=7)
    labels = tokens()[1][:, 1:]
    valid = labels != -100
    right = want[0].logits[:, :-1].argmax(-1) == labels
    torch.testing.assert_close(counted.token_accuracy, right[valid].float().mean())
    torch.testing.assert_close(counted.loss, want[0].loss * valid.sum() / 7)
    model.eval()
    assert step(model)[0].logits is not None
    assert step(model, skip_logits=True)[0].logits is None
    ids = tokens()[0]
    torch.testing.assert_close(model(ids).logits, want[0].logits)
    apply(name, model=model)
    hf.unpatch(model)
    assert not active(model) and type(model) is type(other)


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_gives_the_loss_back(name):
    model = tiny_model(name)
    before = model.loss_function
    apply(name, model=model, cross_entropy=True, fused_linear_cross_entropy=False)
    assert model.loss_function is not before
    hf.unpatch(model)
    assert model.loss_function is before


@pytest.mark.parametrize("name", NAMES)
def test_norms_look_like_ligers(name):
    model = tiny_model(name)
    apply(name, model=model)
    norms = [m for m in model.modules() if type(m).__name__ == f"{name}RMSNorm"]
    assert len(norms) >= 5
    for norm in norms:
        seen = (norm.offset, norm.casting_mode, norm.in_place, norm.row_mode)
        assert seen == (0.0, "llama", True, None)
        assert norm.extra_repr() == (
            f"weight_shape=({norm.weight.numel()},), eps={norm.variance_epsilon}, offset=0.0, "
            "in_place=True, row_mode=None"
        )


def test_loss_options_beside_attention():
    """Every layer gets them as keywords; attention refuses what it does not know."""
    model = tiny_model()
    apply("Llama", model=hf.patch(model, linear_cross_entropy=False))
    assert hf.report(model).active("attention")
    want, options = step(model)[0].loss, {"return_token_accuracy": True, "ignore_index": -100}
    output, _ = step(model, **options, label_smoothing=0.0, final_logit_softcapping=None)
    torch.testing.assert_close(output.loss, want)


@pytest.mark.parametrize("without", OPS)
def test_one_op_left_out(without):
    model = tiny_model()
    apply("Llama", model=model, **{without: False})
    assert active(model) == set(OPS) - {without}


def test_labels_of_every_kind():
    model = tiny_model()
    apply("Llama", model=model)
    ids, labels = tokens()
    want = model(ids, labels=labels).loss
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, want)
    torch.testing.assert_close(model(ids, shift_labels=shifted, skip_logits=False).loss, want)
    torch.testing.assert_close(model(ids, labels=labels, return_dict=False)[0], want)
    assert model(ids).logits.shape == (2, 12, 48) and model(ids).loss is None
    with pytest.raises(ValueError, match="skip_logits"):
        model(ids, skip_logits=True)


def test_cross_entropy_on_logits():
    model, function = tiny_model(), F.cross_entropy
    want = step(model)
    apply("Llama", model=model, cross_entropy=True, fused_linear_cross_entropy=False)
    assert not hf.report(model).active("linear_cross_entropy")
    output = assert_same_step(model, want)
    torch.testing.assert_close(output.logits, want[0].logits)
    assert F.cross_entropy is function
    counted, _ = step(model, num_items_in_batch=torch.tensor(7))
    count = (tokens()[1][:, 1:] != -100).sum()
    torch.testing.assert_close(counted.loss, want[0].loss * count / 7)


@pytest.mark.parametrize("name", NAMES)
def test_models_made_later(name, undo):
    before = tiny_model(name)
    want = step(before)
    modeling = __import__(type(before).__module__, fromlist=["x"])
    kept = vars(modeling).copy()
    apply(name)
    apply(name, rms_norm=True)  # again: nothing is patched twice
    assert vars(modeling) == kept
    model = tiny_model(name)
    assert active(model) == set(OPS)
    assert assert_same_step(model, want).logits is None
    assert active(type(before.model)(before.config)) == set(OPS)
    assert not active(before) and step(before)[0].logits is not None
    liger.undo_liger_kernel(name.lower())
    assert not active(tiny_model(name)) and vars(modeling) == kept


def test_models_loaded_later(undo, tmp_path):
    saved = tiny_model()
    want = step(saved)
    saved.save_pretrained(tmp_path)
    apply("Llama", swiglu=False)
    for auto in (transformers.LlamaForCausalLM, transformers.AutoModelForCausalLM):
        model = auto.from_pretrained(tmp_path).train()
        assert active(model) == {"rms_norm", "rope"}
        assert assert_same_step(model, want).logits is None
    model, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert active(model) and not info["missing_keys"]
    liger.undo_liger_kernel("llama")
    assert not active(transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_auto_class(tmp_path):
    saved = tiny_model("Qwen3")
    want = step(saved)
    saved.save_pretrained(tmp_path)
    model = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, rope=False).train()
    assert active(model) == {"rms_norm", "swiglu"}
    assert assert_same_step(model, want).logits is None
    assert active(AutoLigerKernelForCausalLM.from_config(saved.config)) == set(OPS)
    assert not active(tiny_model("Qwen3"))
    bloom = transformers.BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1)
    assert not active(AutoLigerKernelForCausalLM.from_config(bloom))


def test_auto_class_on_the_meta_device(caplog):
    config = tiny_model().config
    with torch.device("meta"):
        model = AutoLigerKernelForCausalLM.from_config(config)
    assert "LlamaForCausalLM on the meta device: nothing is patched" in caplog.text
    assert not active(model)
    apply("Llama", model=model.to_empty(device="cpu"))
    assert active(model) == set(OPS)
    caplog.clear()
    AutoLigerKernelForCausalLM.from_config(config)
    assert not caplog.text


def test_auto_class_leaves_the_class_as_it_was(undo, monkeypatch):
    """Liger's function for the model type is what patches; an earlier patch of the class stays."""
    config = tiny_model().config
    apply("Llama", rope=False)
    assert active(AutoLigerKernelForCausalLM.from_config(config, swiglu=False)) == {
        "rms_norm",
        "rope",
    }
    assert active(tiny_model()) == {"rms_norm", "swiglu"}
    calls, functions = [], monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    monkeypatch.setitem(functions, "llama", lambda rope=True: calls.append(rope))
    AutoLigerKernelForCausalLM.from_config(config, rope=False)
    assert calls == [False] and active(tiny_model()) == {"rms_norm", "swiglu"}
    with pytest.raises(TypeError, match="unknown_option"):
        AutoLigerKernelForCausalLM.from_config(config, unknown_option=1)
    assert active(tiny_model()) == {"rms_norm", "swiglu"}


def test_by_model_type(undo, caplog):
    model = tiny_model()
    liger._apply_liger_kernel_to_instance(model, rope=False, geglu=True)
    assert active(model) == {"rms_norm", "swiglu"}
    liger._apply_liger_kernel("llama", geglu=True)
    assert active(tiny_model()) == set(OPS)
    with caplog.at_level(logging.WARNING):
        liger._apply_liger_kernel("bloom")
        liger._apply_liger_kernel_to_instance(torch.nn.Linear(2, 2))
    assert caplog.text.count("nothing done") == 2
    assert set(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN) == {name.lower() for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls(name):
    with pytest.raises(AssertionError, match="cannot both be True"):
        apply(name, cross_entropy=True)
    with pytest.raises(TypeError, match="geglu"):
        apply(name, geglu=True)


def test_copies_and_pickles():
    model = tiny_model()
    apply("Llama", model=model)
    want = step(model)
    copied = copy.deepcopy(model)
    assert active(copied) == set(OPS)
    assert assert_same_step(copied, want).logits is None
    norm = pickle.loads(pickle.dumps(model.model.norm))
    assert norm.extra_repr() == model.model.norm.extra_repr()


def test_gradient_checkpointing_and_bf16_autocast():
    model = tiny_model()
    want = step(model)
    apply("Llama", model=model)
    model.gradient_checkpointing_enable()
    assert assert_same_step(model, want).logits is None
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = step(model)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, want[0].loss, rtol=2e-2, atol=2e-2)


def test_lm_head_that_is_more_than_linear_keeps_the_logits():
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = tiny_model()
    model.lm_head.__class__ = Adapted
    apply("Llama", model=model)
    output, _ = step(model)
    assert output.logits is not None and output.loss.isfinite()


def test_readme(undo):
    """README.md of Liger: "Use Model-Specific Patching APIs"."""
    from flatout.compat.liger.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        losses.append(step(model)[0].loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
