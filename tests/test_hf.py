"""flatout.hf: patch, fuse, kernelize and report on tiny models, against the unpatched ones."""

import copy
import functools
import pickle
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")
from tiny_models import (  # noqa: E402
    LLAMA_FORM,
    assert_same_step,
    difference,
    logits,
    make,
    step,
    tokens,
)

import flatout.torch as ft  # noqa: E402
from flatout import hf  # noqa: E402

WAYS = [hf.patch, hf.fuse]
OPS = {"rms_norm", "swiglu", "rope", "attention", "linear_cross_entropy"}


def labels_of(ids):
    labels = ids.clone()
    labels[0, 3] = -100
    return labels


NOT_FUSED = "its result differs from the fused layer's"
if transformers.__version__ < "5":
    NOT_FUSED = "its forward returns a tuple"


def states(model, op):
    return {ops[op] for ops in hf.report(model).values() if op in ops}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LLAMA_FORM)
def test_training_equals_eager(kind, way):
    model, reference, ids = way(make(kind)), make(kind), tokens()
    for op in OPS | ({"fused layer", "embedding"} if way is hf.fuse else set()):
        assert states(model, op) == {"flatout"}
    assert_same_step(model, reference, input_ids=ids, labels=labels_of(ids))
    assert difference(logits(model, input_ids=ids), logits(reference, input_ids=ids)) <= 1e-5
    assert model.train()(input_ids=ids, labels=ids).logits is None
    out = model.eval()(input_ids=ids, labels=ids)
    assert difference(out.logits, reference.eval()(input_ids=ids).logits) <= 1e-5


def test_what_is_patched_really_runs(monkeypatch):
    called = set()
    names = ["rms_norm", "swiglu", "rope", "attention", "linear_cross_entropy"]
    fused = ["add_rms_norm", "qk_norm_rope", "embedding"]
    for name in names + fused:
        op = getattr(ft, name)
        spy = lambda *a, op=op, name=name, **k: (called.add(name), op(*a, **k))[1]  # noqa: E731
        monkeypatch.setattr(ft, name, spy)
    model = hf.patch(make("Qwen3"))
    called.clear()
    step(model, input_ids=tokens(), labels=tokens())
    assert called == set(names)
    hf.fuse(model)
    called.clear()
    step(model, input_ids=tokens(), labels=tokens())
    assert called == {*names, *fused} - {"rope"}


@pytest.mark.parametrize("op", sorted(OPS))
def test_one_op_at_a_time(op):
    model, reference, ids = make("Qwen3"), make("Qwen3"), tokens()
    hf.patch(model, **{name: name == op for name in OPS})
    assert states(model, op) == {"flatout"}
    for other in OPS - {op}:
        assert "flatout" not in states(model, other)
    assert_same_step(model, reference, input_ids=ids, labels=ids)


@pytest.mark.parametrize("way", WAYS)
def test_other_models_stay_as_they_are(way):
    first = make("Qwen3")
    second = type(first)(first.config)  # shares the config object
    modules = [type(m) for m in second.modules()]
    before = logits(second, input_ids=tokens())
    way(first)
    assert [type(m) for m in second.modules()] == modules
    assert all("forward" not in m.__dict__ for m in second.modules())
    assert second.config._attn_implementation == "eager"
    assert torch.equal(logits(second, input_ids=tokens()), before)
    assert "flatout" not in {s for ops in hf.report(second).values() for s in ops.values()}


@pytest.mark.parametrize("way", [*WAYS, hf.kernelize])
def test_twice_and_back(way):
    if way is hf.kernelize:
        pytest.importorskip("kernels.layer")  # "kernels" alone may be a folder
    model, reference = make("Qwen3"), make("Qwen3")
    classes = [type(m) for m in way(model).modules()]
    assert [type(m) for m in way(model).modules()] == classes
    assert classes != [type(m) for m in reference.modules()]
    hf.unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits(model, input_ids=tokens()), logits(reference, input_ids=tokens()))


def test_random_state_is_untouched():
    model = make("Qwen3")
    before = torch.get_rng_state()
    hf.fuse(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == make("Qwen3").training


@pytest.mark.parametrize("way", WAYS)
def test_state_dict_files_and_copies(way, tmp_path):
    model, reference, ids = way(make("Qwen3")), make("Qwen3", seed=1), tokens()
    expected = logits(model, input_ids=ids)
    assert reference.load_state_dict(model.state_dict()) is not None
    assert difference(logits(reference, input_ids=ids), expected) <= 1e-5
    model.save_pretrained(tmp_path)
    loaded = type(reference).from_pretrained(tmp_path, attn_implementation="eager")
    assert difference(logits(loaded, input_ids=ids), expected) <= 1e-5
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, input_ids=ids), expected)
    assert states(other, "swiglu") == {"flatout"}
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 64)
    loaded = pickle.loads(pickle.dumps(mlp))
    assert type(loaded) is type(mlp) and torch.equal(loaded(x), mlp(x))


# ---- precision ---------------------------------------------------------------------------------
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_bfloat16_is_as_good_as_eager(kind, autocast, way):
    dtype = torch.float32 if autocast else torch.bfloat16
    exact, eager = make(kind), make(kind, dtype=dtype)
    model, ids = way(make(kind, dtype=dtype)), tokens(4, 32)
    assert states(model, "rms_norm") == states(model, "attention") == {"flatout"}
    loss, grads = step(exact, input_ids=ids, labels=ids)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        eager_loss, eager_grads = step(eager, input_ids=ids, labels=ids)
        found_loss, found_grads = step(model, input_ids=ids, labels=ids)
    assert abs(found_loss - loss) <= max(2 * abs(eager_loss - loss), 1e-2 * loss)
    for name, grad in grads.items():
        error = (found_grads[name].double() - grad).norm()
        assert error <= 1.5 * (eager_grads[name].double() - grad).norm(), name


def test_norm_keeps_the_wider_dtype():
    model, reference = hf.patch(make("Qwen3")), make("Qwen3")
    x = torch.randn(3, 64).bfloat16()
    found, expected = model.model.norm(x), reference.model.norm(x)
    assert found.dtype == expected.dtype == torch.float32
    assert difference(found, expected) <= 1e-2


# ---- gradient checkpointing, Trainer -----------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_checkpointing_runs_each_layer_twice(way, reentrant):
    model, reference, ids, runs = way(make("Qwen3")), make("Qwen3"), tokens(), []
    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda m, args, out: runs.append(m))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(model, reference, input_ids=ids, labels=ids)
    assert len(runs) == 2 * len(model.model.layers)


@pytest.mark.parametrize("way", WAYS)
def test_trainer(way, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    ids = tokens(24, 12)
    data = [{"input_ids": row, "labels": row} for row in ids]

    def losses(model):
        arguments = TrainingArguments(
            tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3,
            logging_steps=1, report_to=[], save_strategy="no", learning_rate=1e-2, use_cpu=True,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:4])
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], evaluated

    found, expected = losses(way(make("Qwen3"))), losses(make("Qwen3"))
    assert len(found[0]) == 3 and found[0] == pytest.approx(expected[0], rel=2e-4)
    assert found[1] == pytest.approx(expected[1], rel=2e-4)
    assert found[0][-1] < found[0][0]


def test_output_hidden_states():
    model, reference, ids = hf.fuse(make("Qwen3")), make("Qwen3"), tokens()
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = reference(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 3
    assert max(map(difference, found, expected)) <= 1e-5


# ---- the loss ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": 5},
        {"num_items_in_batch": torch.tensor(5)},
        {"num_items_in_batch": torch.tensor(7.0)},
        {"shift_labels": tokens().roll(-1, 1)},
        {"ignore_index": 7},
        {"logits_to_keep": 0},
        {"position_ids": torch.arange(12)[None]},
    ],
    ids=lambda o: next(iter(o)),
)
def test_loss_options(options):
    model, reference, ids = hf.patch(make("Qwen3")), make("Qwen3"), tokens()
    labels = ids if "ignore_index" in options else labels_of(ids)
    assert_same_step(model, reference, input_ids=ids, labels=labels, **options)
    assert model(input_ids=ids, labels=labels, **options).logits is None


@pytest.mark.parametrize(
    "kind, options",
    [
        ("Gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 3.0}),
        ("Granite", {"logits_scaling": 3.0, "residual_multiplier": 0.3}),
        ("Cohere", {"logit_scale": 0.3}),
        ("Qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_scaled_capped_and_tied_logits(kind, options):
    model, reference, ids = hf.patch(make(kind, **options)), make(kind, **options), tokens()
    assert states(model, "linear_cross_entropy") == {"flatout"}
    assert states(model, "attention") == {"flatout"}
    assert_same_step(model, reference, input_ids=ids, labels=ids)


class Wrapped(torch.nn.Module):
    """As PEFT's layers: another module around lm_head, with more in it."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, torch.nn.Parameter(torch.tensor(0.5))

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        return self.inner(x) * self.gain


def own_loss(logits, labels, vocab_size, **kwargs):
    return logits.float().square().mean()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["wrapped lm_head", "own loss"])
def test_loss_falls_back(what, when):
    def change(model):
        if what == "own loss":
            model.loss_function = own_loss
        else:
            model.lm_head = Wrapped(model.lm_head)

    model, reference, ids = make("Qwen3"), make("Qwen3"), tokens()
    change(reference)
    if when == "before":
        change(model)
    hf.patch(model)
    if when == "after":
        change(model)
    else:
        assert "flatout" not in states(model, "linear_cross_entropy")
    assert_same_step(model, reference, input_ids=ids, labels=ids)
    assert model(input_ids=ids, labels=ids).logits is not None


class Wrapper(torch.nn.Module):
    """As PEFT's models and FSDP's: what is not its own is the inner model's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, **kwargs):
        return self.inner(**kwargs)


def own_base_model(model):
    """A class whose forward is deaf to what stands for its base model."""

    class Own(type(model)):
        def forward(self, **kwargs):
            kwargs["return_dict"] = model.config.return_dict
            return super(Own, model).forward(**kwargs)

    model.__class__ = Own
    return model


@pytest.mark.parametrize("wrap", [Wrapper, own_base_model])
def test_probes_look_up_no_invalid_token(wrap):
    """An index out of range ends the process' use of its GPU; on a CPU a probe swallows it."""
    model, seen = make("Qwen3"), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    model = hf.patch(wrap(model))
    found = {n: ops for n, ops in hf.report(model).items() if "linear_cross_entropy" in ops}
    if wrap is Wrapper:
        assert not seen and found == {"inner": {"linear_cross_entropy": "flatout"}}
    else:
        assert seen and list(found) == [""] and all(0 <= i < 97 for x in seen for i in x.flatten())


def test_tuple_and_positional_arguments():
    model, reference, ids = hf.patch(make("Qwen3")), make("Qwen3"), tokens()
    mask = torch.ones_like(ids)
    found = model.train()(ids, mask, labels=ids, return_dict=False)
    expected = reference.train()(ids, mask, labels=ids, return_dict=False)
    assert difference(found[0], expected[0]) <= 1e-5 and len(found) == len(expected)
    assert model(ids, mask, labels=ids).logits is None


# ---- what must be left alone -------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, op, state",
    [
        ("Gemma", "rms_norm", "flatout"),  # 1 + w
        ("Gemma", "swiglu", "the input of its down_proj differs from SwiGLU's"),  # gelu
        ("Olmo2", "rms_norm", "its result differs from RMSNorm's"),  # rounds after the weight
        ("Cohere", "rms_norm", "its result differs from RMSNorm's"),  # LayerNorm
        ("Cohere", "rope", "its apply_rotary_pos_emb is not the rotate-half rotation"),
        ("Gemma2", "fused layer", NOT_FUSED),  # four norms
    ],
)
def test_report_says_why_not(kind, op, state):
    model, reference, ids = hf.fuse(make(kind)), make(kind), tokens()
    assert states(model, op) == {state}
    assert state in str(hf.report(model))
    assert_same_step(model, reference, input_ids=ids, labels=ids)


def test_multiplied_residual_is_not_fused():
    options = {"residual_multiplier": 0.3}
    model, reference, ids = (
        hf.fuse(make("Granite", **options)),
        make("Granite", **options),
        tokens(),
    )
    assert states(model, "fused layer") == {NOT_FUSED}
    assert states(model, "swiglu") == {"flatout"}
    assert_same_step(model, reference, input_ids=ids, labels=ids)


def test_dropout_keeps_eager_attention():
    model = hf.patch(make("Qwen3", attention_dropout=0.1))
    assert model.config._attn_implementation == "eager"
    assert "attention_dropout=0.1" in states(model, "attention").pop()


def test_attention_with_a_config_of_its_own_stays_eager():
    """As in PEFT's copies (modules_to_save): nothing tells it of the model's setting."""
    model, reference, ids = make("Qwen3"), make("Qwen3"), tokens()
    attention = model.model.layers[1].self_attn
    attention.config = copy.deepcopy(attention.config)
    hf.patch(model)
    assert all("a config of its own" in state for state in states(model, "attention"))
    assert_same_step(model, reference, input_ids=ids, labels=ids)


def test_replaced_forward_is_reported():
    model = make("Qwen3")
    model.model.norm.forward = lambda x: x
    hf.patch(model)
    assert hf.report(model)["model.norm"]["rms_norm"] == "its forward is replaced on the instance"


def test_padding_index_keeps_torch_embedding():
    model, reference, ids = (
        hf.fuse(make("Qwen3", pad_token_id=5)),
        make("Qwen3", pad_token_id=5),
        tokens(),
    )
    assert "flatout" not in states(model, "embedding")
    ids[0, :2] = 5
    assert_same_step(model, reference, input_ids=ids, labels=ids)


def test_no_transformers_model():
    with pytest.raises(TypeError, match="transformers model, got Linear"):
        hf.patch(torch.nn.Linear(2, 2))


# ---- kernelize ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["Qwen3", "Llama", "Gemma", "Phi3"])
def test_kernelize(kind):
    pytest.importorskip("kernels.layer")  # "kernels" alone may be a folder
    model, reference, ids = hf.kernelize(make(kind)), make(kind), tokens()
    assert states(model, "rms_norm") == {"flatout"}
    assert ("flatout" in states(model, "swiglu")) == (kind != "Gemma")
    assert "flatout" not in states(model, "rope") | states(model, "attention")
    assert_same_step(model, reference, input_ids=ids, labels=ids)
    assert all("forward" not in m.__dict__ for m in reference.modules())
    hf.patch(model)
    assert states(model, "rope") == states(model, "rms_norm") == {"flatout"}
    assert_same_step(model, reference, input_ids=ids, labels=ids)


def test_kernelize_needs_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match="pip install kernels"):
        hf.kernelize(make("Qwen3"))


# ---- What a class does besides -------------------------------------------------------------------
def reclass(model, name, make_class):
    """Every module of this name gets a subclass of its class."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == name:
            module.__class__ = make_class(type(module))
    return model


def dropping(base):
    class Dropping(base):
        def forward(self, x, **options):
            return torch.nn.functional.dropout(super().forward(x, **options), 0.5, self.training)

    return Dropping


def scaling_in_training(base):
    class Scaling(base):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * (2 if self.training else 1)

    return Scaling


def decorated(base):
    def times(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            out = function(*args, **kwargs)
            return (out[0] * 1.7, *out[1:])

        return wrapper

    return type("Decorated", (base,), {"forward": times(base.forward)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name, make_class, op",
    [
        ("mlp", dropping, "swiglu"),
        ("input_layernorm", scaling_in_training, "rms_norm"),
        ("self_attn", decorated, "rope"),
    ],
)
def test_what_a_class_adds_stays(name, make_class, op, way):
    """In training alone, or around its forward."""
    model, reference = (reclass(make("Qwen3"), name, make_class) for _ in range(2))
    way(model)
    report = hf.report(model)
    assert all(report[p][op] != "flatout" for p in report if p.endswith(name))
    results = []
    for m in (model, reference):
        torch.manual_seed(0)
        results.append(step(m, input_ids=tokens(), labels=tokens())[0])
    assert difference(*results) <= 1e-5


@pytest.mark.skipif(transformers.__version__ < "5", reason="its layers return tuples")
def test_layer_dropout_is_not_fused():
    report = hf.report(hf.fuse(reclass(make("Qwen3"), "0", dropping)))
    assert report["model.layers.0"]["fused layer"] == NOT_FUSED
    assert report["model.layers.1"]["fused layer"] == "flatout"


@pytest.mark.parametrize("name", ["post_attention_layernorm", "q_norm"])
def test_hooks_and_other_norms_after_fuse(name):
    model, reference = hf.fuse(make("Qwen3")), make("Qwen3")
    for m in (model, reference):
        for path, module in m.named_modules():
            if path.endswith(name):
                module.register_forward_hook(lambda module, args, out: out * 1.5)
    assert_same_step(model, reference, input_ids=tokens(), labels=tokens())
    model, reference = hf.fuse(make("Qwen3")), make("Qwen3")
    for m in (model, reference):
        owner = m.model.layers[0] if name[0] == "p" else m.model.layers[0].self_attn
        setattr(owner, name, torch.nn.LayerNorm(64 if name[0] == "p" else 16))
    assert_same_step(model, reference, input_ids=tokens(), labels=tokens())


def test_eager_after_fuse():
    model, reference = hf.fuse(make("Qwen3")), make("Qwen3")
    model.set_attn_implementation("eager")
    out = model.eval()(input_ids=tokens(), output_attentions=True)
    assert out.attentions[0] is not None
    assert difference(out.logits, logits(reference, input_ids=tokens())) <= 1e-5


def test_attention_weights_in_the_config_keep_eager():
    model = make("Qwen3")
    model.config.output_attentions = True
    states = {ops["attention"] for ops in hf.report(hf.patch(model)).values() if "attention" in ops}
    assert all("output_attentions" in state for state in states)
    assert model(input_ids=tokens()).attentions[0] is not None
