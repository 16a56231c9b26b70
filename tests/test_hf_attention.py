"""attn_implementation="flatout": masks, packed documents, windows, caches, torch.compile."""

import pytest
import torch
from conftest import DEVICES
from test_cuda_streams import no_waiting

transformers = pytest.importorskip("transformers")
from tiny_models import (  # noqa: E402
    assert_same_step,
    difference,
    logits,
    make,
    step,
    tokens,
    windowed,
)

from flatout import hf  # noqa: E402
from flatout.hf._attention import attention  # noqa: E402

LENGTH = 12
WINDOW = 4
DOCUMENTS = [5, 1, 4, 2]
RESTARTS = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]


CASES = [
    pytest.param("Qwen3", {}, id="Qwen3"),
    pytest.param("Llama", {}, id="Llama"),
    pytest.param("Qwen3", windowed("Qwen3", WINDOW), id="Qwen3-window"),
    pytest.param("Mistral", windowed("Mistral", WINDOW), id="Mistral-window"),
]


def three(kind, options):
    """(how, model, reference): the attention implementation alone, patched, fused."""
    yield "alone", make(kind, "flatout", **options), make(kind, **options)
    yield "patch", hf.patch(make(kind, **options)), make(kind, **options)
    yield "fuse", hf.fuse(make(kind, **options)), make(kind, **options)


@pytest.fixture
def dense_calls(monkeypatch):
    """Counts calls of attention with all scores, flatout's own fallback."""
    from flatout.hf import _attention

    calls, exact = [], _attention._exact
    monkeypatch.setattr(_attention, "_exact", lambda *a: (calls.append(1), exact(*a))[1])
    return calls


# ---- padding -----------------------------------------------------------------------------------
def padded(side):
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    if side == "left":
        mask[0, :5], mask[1, :1] = 0, 0
    elif side == "right":
        mask[0, -5:], mask[1, -1:] = 0, 0
    elif side == "holes":
        mask[0, 3:5], mask[1, 7] = 0, 0
    elif side == "both":
        mask[0, :2], mask[0, -3:] = 0, 0
    return mask


@pytest.mark.parametrize("side", ["none", "left", "right", "both", "holes"])
@pytest.mark.parametrize("kind, options", CASES)
def test_padding(kind, options, side, dense_calls):
    mask, ids = padded(side), tokens(3, LENGTH)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:][mask[:, :-1] == 0] = -100  # predicted from a padding token: not defined
    real = mask.bool()
    for how, model, reference in three(kind, options):
        inputs = {"input_ids": ids, "attention_mask": mask}
        found, expected = logits(model, **inputs), logits(reference, **inputs)
        assert difference(found[real], expected[real]) <= 1e-5, how
        assert_same_step(model, reference, labels=labels, **inputs)
        if side not in ("none", "right"):
            plain = logits(model, input_ids=ids)
            assert difference(plain[real], expected[real]) > 1e-3, "padding made no difference"
        assert bool(dense_calls) == (side == "holes"), how


def test_padding_positions_of_generate():
    """position_ids from a padding mask, as generate() makes them, restart at the padding."""
    mask, ids = padded("left"), tokens(3, LENGTH)
    position_ids = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    for how, model, reference in three("Qwen3", {}):
        found, expected = logits(model, **inputs), logits(reference, **inputs)
        assert difference(found[mask.bool()], expected[mask.bool()]) <= 1e-5, how


def test_own_4d_mask():
    ids, generator = tokens(2, LENGTH), torch.Generator().manual_seed(0)
    seen = torch.rand(2, 1, LENGTH, LENGTH, generator=generator) < 0.5
    seen = seen.tril() | torch.eye(LENGTH, dtype=torch.bool)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for how, model, reference in three("Llama", {}):
        inputs = {"input_ids": ids, "attention_mask": mask}
        assert difference(logits(model, **inputs), logits(reference, **inputs)) <= 1e-5, how


# ---- packed documents --------------------------------------------------------------------------
def one_by_one(reference, ids):
    """Logits of each document run alone."""
    parts = ids.split(DOCUMENTS, 1)
    return torch.cat([logits(reference, input_ids=part) for part in parts], 1)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind, options", CASES)
def test_packed_position_ids(kind, options, use_cache):
    ids = tokens(1, LENGTH)
    for how, model, reference in three(kind, options):
        expected = one_by_one(reference, ids)
        inputs = {"input_ids": ids, "position_ids": RESTARTS, "use_cache": use_cache}
        assert difference(logits(model, **inputs), expected) <= 1e-5, how
        assert difference(logits(model, input_ids=ids), expected) > 1e-3
        ones = torch.ones_like(ids)
        assert difference(logits(model, attention_mask=ones, **inputs), expected) <= 1e-5, how
        reference_inputs = {**inputs, "use_cache": False}
        loss, grads = step(model, labels=ids, **inputs)
        assert_same_loss(loss, grads, *step(reference, labels=ids, **reference_inputs))


def assert_same_loss(loss, grads, expected, expected_grads):
    assert difference(loss, expected) <= 1e-5
    for name, grad in grads.items():
        assert difference(grad, expected_grads[name.removeprefix("_orig_mod.")]) <= 1e-5, name


@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_rows_of_a_batch(use_cache):
    ids = tokens(2, LENGTH)
    positions = torch.cat([RESTARTS, torch.arange(LENGTH)[None]])
    for how, model, reference in three("Qwen3", windowed("Qwen3", WINDOW)):
        found = logits(model, input_ids=ids, position_ids=positions, use_cache=use_cache)
        assert difference(found[:1], one_by_one(reference, ids[:1])) <= 1e-5, how
        assert difference(found[1:], logits(reference, input_ids=ids[1:])) <= 1e-5, how


def test_changed_position_ids_are_looked_at_again():
    model, ids = make("Qwen3", "flatout"), tokens(1, LENGTH)
    positions = torch.arange(LENGTH)[None].clone()
    before = logits(model, input_ids=ids, position_ids=positions)
    positions.copy_(RESTARTS)
    packed = logits(model, input_ids=ids, position_ids=positions)
    assert difference(packed, one_by_one(make("Qwen3"), ids)) <= 1e-5
    assert difference(packed, before) > 1e-3


@pytest.mark.parametrize("with_positions", [True, False])
@pytest.mark.parametrize("kind, options", CASES)
def test_flattening_collator(kind, options, with_positions):
    from transformers import DataCollatorWithFlattening

    parts = tokens(1, LENGTH)[0].split(DOCUMENTS)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = dict(collate([{"input_ids": part.tolist()} for part in parts]))
    labels = batch.pop("labels")
    if not with_positions:
        del batch["position_ids"]
    for how, model, reference in three(kind, options):
        found = logits(model, **batch)
        if with_positions:
            assert difference(found, one_by_one(reference, batch["input_ids"])) <= 1e-5, how
        else:  # rotary angles go on, documents do not; the second document starts at row 5
            assert difference(found[:, :5], logits(reference, input_ids=parts[0][None])) <= 1e-5
            ids = batch["input_ids"].clone()
            ids[:, :5] = 50
            assert torch.equal(logits(model, **{**batch, "input_ids": ids})[:, 5:], found[:, 5:])
    positions = {"input_ids": batch["input_ids"], "position_ids": RESTARTS, "use_cache": False}
    if with_positions:
        found = step(model, labels=labels, **batch)
        assert_same_loss(*found, *step(reference, labels=labels, **positions))


def test_packed_on_top_of_a_cache():
    from transformers import DynamicCache

    model, ids = make("Qwen3", "flatout"), tokens(1, LENGTH)
    cache = DynamicCache()
    logits(model, input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
    with pytest.raises(NotImplementedError, match="packed documents"):
        logits(
            model, input_ids=ids[:, 4:], past_key_values=cache, use_cache=True,
            position_ids=torch.cat([torch.arange(4, 8), torch.arange(4)])[None],
        )  # fmt: skip


# ---- caches ------------------------------------------------------------------------------------
@pytest.mark.parametrize("left_padded", [False, True])
@pytest.mark.parametrize("kind, options", CASES)
def test_generate(kind, options, left_padded):
    ids = tokens(3, LENGTH)
    mask = padded("left") if left_padded else torch.ones_like(ids)
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for how, model, reference in three(kind, options):
        found = model.eval().generate(ids, attention_mask=mask, **wanted)
        expected = reference.eval().generate(ids, attention_mask=mask, **wanted)
        assert torch.equal(found, expected), how


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("kind", ["Qwen3", "Gemma3Text"])
def test_generate_with_a_static_cache(kind, new):
    """generate() makes the masks itself; with one new token the prompt fills the cache."""
    ids = tokens(2, LENGTH)
    wanted = {
        "max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0,
        "cache_implementation": "static", "disable_compile": True,
        "attention_mask": torch.ones_like(ids), "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    found, expected = (
        torch.stack(make(kind, implementation).eval().generate(ids, **wanted).logits)
        for implementation in ("flatout", "eager")
    )
    assert found.shape[0] == new and difference(found, expected) <= 1e-5


@pytest.mark.parametrize("cache_class", ["DynamicCache", "StaticCache"])
def test_pieces_with_a_cache(cache_class):
    import transformers

    ids, kind = tokens(2, LENGTH), "Llama"
    for how, model, reference in three(kind, {}):
        expected = logits(reference, input_ids=ids)
        cache = getattr(transformers, cache_class)
        if cache_class == "StaticCache":
            cache = cache(config=model.config, max_cache_len=20)
        else:
            cache = cache()
        found, start = [], 0
        for piece in ids.split([5, 1, 1, 5], 1):
            cache_position = torch.arange(start, start + piece.shape[1])
            start += piece.shape[1]
            options = {"past_key_values": cache, "use_cache": True}
            if transformers.__version__ < "5":
                options["cache_position"] = cache_position
            found.append(logits(model, input_ids=piece, **options))
        assert difference(torch.cat(found, 1), expected) <= 1e-5, how


# ---- refusals, dtypes --------------------------------------------------------------------------
class Module(torch.nn.Module):
    is_causal = True


def qkv(dtype=torch.float32, heads=4):
    torch.manual_seed(0)
    return (torch.randn(2, h, 6, 16, dtype=dtype) for h in (heads, 2, 2))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1, 4, 6, 6)}, "position_bias"),
        ({"indices": torch.zeros(2, 6, 3, dtype=torch.int64)}, "indices"),
        ({"head_mask": torch.ones(4)}, "head_mask"),
        ({"sliding_window": 4, "is_causal": False}, "sliding_window"),
    ],
)
def test_refused(options, word):
    with pytest.raises(NotImplementedError, match=word):
        attention(Module(), *qkv(), None, **options)


def test_2d_mask_is_refused():
    with pytest.raises(TypeError, match="attention_mask"):
        attention(Module(), *qkv(), torch.ones(2, 6))


def test_padding_beside_cu_seq_lens_is_refused():
    from flatout.hf._attention import Boundaries

    cu = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match="pass one"):
        attention(
            Module(), *qkv(), Boundaries(cu, False), cu_seq_lens_q=cu, cu_seq_lens_k=cu,
            max_length_q=12, max_length_k=12,
        )  # fmt: skip


@pytest.mark.parametrize("kind", ["Doge", "Bloom", "Mpt"])
@pytest.mark.parametrize("padding", [False, True])
def test_models_that_compute_with_their_mask(kind, padding):
    """The same logits as eager's or an error, never a view of the future."""
    import transformers

    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    tiny = {
        "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    models = []
    for implementation in ("eager", "flatout"):
        config = getattr(transformers, f"{kind}Config")(**tiny)
        from_config = transformers.AutoModelForCausalLM.from_config
        models.append(from_config(config, attn_implementation=implementation))
    reference, model = models
    model.load_state_dict(reference.state_dict())
    inputs = {"input_ids": tokens(3, LENGTH)}
    if padding:
        inputs["attention_mask"] = padded("left")
    try:
        found = logits(model, **inputs)
    except (NotImplementedError, TypeError) as error:
        assert "attn_implementation" in str(error) or "indices must be" in str(error)
        return
    real = padded("left").bool()
    assert difference(found[real], logits(reference, **inputs)[real]) <= 1e-5


def test_sinks_keep_eager():
    model = hf.patch(make("GptOss"))
    assert model.config._attn_implementation == "eager"
    assert "s_aux" in str(hf.report(model))


def test_mixed_dtypes():
    q, k, v = qkv()
    out = attention(Module(), q, k, v.bfloat16(), None)[0]
    assert out.dtype == torch.bfloat16 and out.shape == (2, 6, 4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(Module(), q, k, v, None)[0], out)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("mask", ["causal", "not causal", "window", "4D", "4D bool"])
def test_function(mask, softcap):
    q, k, v = (x.double() for x in qkv())
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    options = {"is_causal": mask != "not causal", "softcap": softcap, "scaling": 0.3}
    given = None
    if mask == "not causal":
        seen = torch.ones(6, 6, dtype=torch.bool)
    elif mask == "window":
        seen, options["sliding_window"] = seen.triu(-2), 3
    elif mask.startswith("4D"):
        seen = seen & (torch.arange(6) != 2) | torch.eye(6, dtype=torch.bool)
        given = seen[None, None]
        given = given if mask == "4D bool" else torch.where(given, 0.0, -1e9)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(2, 1)) * 0.3
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("bhqk,bhkd->bqhd", p, v.repeat_interleave(2, 1))
    assert difference(attention(Module(), q, k, v, given, **options)[0], expected) <= 1e-6


def test_output_attentions():
    model = make("Qwen3", "flatout")
    with pytest.raises((NotImplementedError, ValueError), match="attentions|eager"):
        out = model(input_ids=tokens(), output_attentions=True)
        raise AssertionError(f"returned {out.attentions}")


# ---- torch.compile -----------------------------------------------------------------------------
INPUTS = {
    "plain": {},
    "packed": {"position_ids": RESTARTS},
    "packed, no cache": {"position_ids": RESTARTS, "use_cache": False},
    "padded": {"attention_mask": (torch.arange(LENGTH) < 9)[None].long()},
}


def labels_for(ids, inputs):
    return ids.masked_fill(inputs.get("attention_mask", torch.ones_like(ids)) == 0, -100)


def compile_layers(model, backend):
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    return model


@pytest.mark.parametrize("how", ["alone", "kernelize", "patch", "fuse"])
def test_compiled_layers(how):
    """No graph break, and the same training step; eager's kernels after tracing and autograd."""
    torch._dynamo.reset()
    if how == "kernelize":
        pytest.importorskip("kernels.layer")  # "kernels" alone may be a folder
    ways = {"alone": lambda m: m, "kernelize": hf.kernelize, "patch": hf.patch, "fuse": hf.fuse}
    implementation = "flatout" if how in ("alone", "kernelize") else "eager"
    options = windowed("Qwen3", WINDOW)
    model = ways[how](make("Qwen3", implementation, **options))
    reference = ways[how](make("Qwen3", implementation, **options))
    compile_layers(model, "aot_eager")
    ids = tokens(1, LENGTH)
    for inputs in INPUTS.values():
        assert_same_step(model, reference, input_ids=ids, labels=ids, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_inductor_layers(checkpointing):
    torch._dynamo.reset()
    model, reference = hf.fuse(make("Qwen3")), make("Qwen3")
    compile_layers(model, "inductor")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens(1, LENGTH)
    for inputs in INPUTS.values():
        inputs = {"input_ids": ids, "labels": labels_for(ids, inputs), "use_cache": False, **inputs}
        assert_same_step(model, reference, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_max_autotune(device):
    """A layer on packed documents is one graph, forward and backward, that never waits for the GPU;
    the same results as document by document."""
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    model = make("Qwen3", "flatout", dtype=dtype, **sizes).to(device).model
    layer, lengths = model.layers[0], [40 * n for n in DOCUMENTS]
    leaves = list(layer.parameters())
    x, dout = torch.randn(2, 1, sum(lengths), 256, device=device).to(dtype)
    positions = torch.cat([torch.arange(n, device=device) for n in lengths])[None]

    def run(layer, x, positions, dout):
        x = x.detach().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        cos_sin = model.rotary_emb(x, positions)
        out = layer(x, None, position_ids=positions, position_embeddings=cos_sin)
        return [out.clone(), *torch.autograd.grad(out, [x, *leaves], dout)]

    compiled = torch.compile(layer, fullgraph=True, mode="max-autotune")
    for _ in range(4 if device == "cuda" else 1):  # compiles, warms up, records
        run(compiled, x, positions, dout)
    with no_waiting(device):
        got = [t.clone() for t in run(compiled, x, positions, dout)]
    split = [t.split(lengths, 1) for t in (x, positions, dout)]
    parts = [run(layer, *part) for part in zip(*split, strict=True)]
    want = [torch.cat(t, 1) if i < 2 else sum(t) for i, t in enumerate(zip(*parts, strict=True))]
    names = ["out", "dx", *(name for name, _ in layer.named_parameters())]
    for name, a, b in zip(names, got, want, strict=True):
        assert difference(a, b) <= (1e-5 if device == "cpu" else 0.03), name


@pytest.mark.slow
def test_whole_model():
    torch._dynamo.reset()
    model, reference = hf.patch(make("Qwen3")), make("Qwen3")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = tokens(1, LENGTH)
    for inputs in INPUTS.values():
        inputs = {"input_ids": ids, "labels": labels_for(ids, inputs), "use_cache": False, **inputs}
        assert_same_loss(*step(compiled, **inputs), *step(reference, **inputs))


# ---- What a model's mask says, whatever its layers hand on ---------------------------------------
def pair(cls, config, **options):
    """The model in eager's and flatout's attention, with the same weights of some size."""
    models = []
    for implementation in ("eager", hf.NAME):
        torch.manual_seed(0)
        config = type(config).from_dict(config.to_dict())
        model = cls._from_config(config, attn_implementation=implementation, **options).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4) if p.ndim > 1 else None
        models.append(model)
    return models


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", [5, LENGTH])
def test_cross_attention_with_a_padded_encoder(length, side):
    """As many queries as keys or fewer: all see the row's keys that are no padding."""
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
    )  # fmt: skip
    inputs = dict(input_ids=tokens(3), attention_mask=padded(side))
    inputs["decoder_input_ids"] = tokens(3)[:, :length]
    eager, model = pair(transformers.BartForConditionalGeneration, config)
    assert difference(logits(model, **inputs), logits(eager, **inputs)) <= 1e-5


@pytest.mark.skipif(transformers.__version__ < "5", reason="they choose their attention by class")
@pytest.mark.parametrize("kind", ["Phimoe", "Qwen2Moe"])
def test_window_of_the_mask_alone(kind):
    options = dict(num_experts=2, num_local_experts=2, num_experts_per_tok=1)
    options |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32)
    options |= dict(sliding_window=WINDOW, use_sliding_window=True)
    options |= dict(layer_types=["sliding_attention"] * 2) if kind == "Qwen2Moe" else {}
    for how, model, reference in three(kind, options):
        got, want = (logits(m, input_ids=tokens()) for m in (model, reference))
        assert difference(got, want) <= 1e-5, how


def test_causal_by_its_mask():
    """Its attention says that it is not causal, and leaves that to the mask."""
    config = transformers.BigBirdPegasusConfig(
        vocab_size=97, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32,
        decoder_ffn_dim=32, encoder_attention_heads=4, decoder_attention_heads=4, dropout=0.0,
        max_position_embeddings=64, attention_type="original_full", is_decoder=True,
    )  # fmt: skip
    eager, model = pair(transformers.BigBirdPegasusForCausalLM, config)
    inputs = dict(input_ids=tokens())
    assert difference(logits(model, **inputs), logits(eager, **inputs)) <= 1e-5


def test_positions_that_skip_are_one_document():
    positions = torch.cat([torch.arange(5), torch.arange(20, 27)])[None]
    for how, model, reference in three("Qwen3", {}):
        inputs = dict(input_ids=tokens(1), position_ids=positions, use_cache=False)
        inputs["attention_mask"] = torch.ones(1, LENGTH, dtype=torch.int64)
        assert difference(logits(model, **inputs), logits(reference, **inputs)) <= 1e-5, how
