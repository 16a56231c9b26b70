"""The ways in which the peers' own documentation has them called, with flatout's import and nothing
else changed; every result beside that of plain torch, transformers or PEFT."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICES, HANG, HAVE_GPU
from peers import tiny_model, tokens

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

import flatout.hf  # noqa: E402
import flatout.torch as ft  # noqa: E402
from flatout.compat.liger import undo_liger_kernel  # noqa: E402

HOPPER = HAVE_GPU and torch.cuda.get_device_capability()[0] == 9
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
OFF = {"cpu": 1e-5, "cuda": 2e-2}  # of the largest value
LIGER_OPS = {"rms_norm", "swiglu", "rope"}
ALL_OPS = LIGER_OPS | {"attention", "linear_cross_entropy"}


def needs_attention(device):
    if device == "cuda" and not HOPPER:
        pytest.skip("attention on CUDA needs compute capability 9.0")


def near(got, want, device, times=1.0):
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape and got.isfinite().all()
    assert (got - want).abs().max() <= times * OFF[device] * want.abs().max()


def randn(*size, device):
    return torch.randn(size, device=device).to(DTYPE[device]).requires_grad_()


# ---- Models --------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    """A tiny Llama on the disk."""
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def undo():
    yield
    undo_liger_kernel("llama")


def ready(model, device):
    return model.to(device, DTYPE[device]).train()


def batch(device):
    ids, labels = tokens()
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def step(model, device):
    """The loss of one training step, and its gradients."""
    model.zero_grad()
    loss = model(**batch(device)).loss
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same_step(model, plain, device):
    """Of `model` and of the same model without flatout."""
    (loss, grads), (want, want_grads) = step(model, device), step(plain, device)
    near(loss, want, device)
    assert grads.keys() == want_grads.keys() and grads
    for name, grad in grads.items():
        near(grad, want_grads[name], device, times=4)


def active(model):
    report = flatout.hf.report(model)
    return {op for op in ALL_OPS if report.active(op)}


def plain_llama(path, device):
    return ready(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"), device)


# ---- Liger ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_liger_patch(path, undo, device):
    plain = plain_llama(path, device)
    from flatout.compat.liger.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    model = ready(AutoModelForCausalLM.from_pretrained(path), device)
    assert active(model) == LIGER_OPS | {"linear_cross_entropy"} and not active(plain)
    same_step(model, plain, device)


@pytest.mark.parametrize("device", DEVICES)
def test_liger_patch_of_some_ops(path, undo, device):
    plain = plain_llama(path, device)
    from flatout.compat.liger.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(
        rope=True,
        swiglu=True,
        cross_entropy=True,
        fused_linear_cross_entropy=False,
        rms_norm=False,
    )
    model = ready(AutoModelForCausalLM.from_pretrained(path), device)
    assert active(model) == {"rope", "swiglu"}
    assert model.loss_function is not plain.loss_function
    same_step(model, plain, device)


@pytest.mark.parametrize("device", DEVICES)
def test_liger_auto_model(path, device):
    from flatout.compat.liger.transformers import AutoLigerKernelForCausalLM

    model = ready(AutoLigerKernelForCausalLM.from_pretrained(path), device)
    assert active(model) == LIGER_OPS | {"linear_cross_entropy"}
    same_step(model, plain_llama(path, device), device)


@pytest.mark.parametrize("device", DEVICES)
def test_liger_loss_on_a_layer(device):
    from flatout.compat.liger.transformers import LigerFusedLinearCrossEntropyLoss

    model = torch.nn.Linear(128, 256).to(device, DTYPE[device])
    loss_fn = LigerFusedLinearCrossEntropyLoss()
    input, target = randn(4, 128, device=device), torch.randint(256, (4,), device=device)
    loss = loss_fn(model.weight, input, target)
    loss.backward()
    want = F.cross_entropy((input @ model.weight.T).float(), target)
    dw, dx = torch.autograd.grad(want, (model.weight, input))
    near(loss, want, device)
    near(model.weight.grad, dw, device)
    near(input.grad, dx, device)


@pytest.mark.slow
def test_liger_in_trainer(path, tmp_path):
    """use_liger_kernel=True, in a process of its own: other tests import the real package."""
    code = f"""
import flatout.compat
flatout.compat.shadow("liger_kernel")
import flatout.hf
from peers import tokens
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

ids, labels = tokens()
data = [{{"input_ids": i, "labels": j}} for i, j in zip(ids, labels)] * 2
arguments = TrainingArguments(
    {str(tmp_path)!r}, max_steps=2, report_to=[], save_strategy="no", use_cpu=True,
    use_liger_kernel=True, liger_kernel_config={{"swiglu": False}}, disable_tqdm=True)
model = AutoModelForCausalLM.from_pretrained({str(path)!r})
trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
assert trainer.train().training_loss < 5 and trainer.evaluate()["eval_loss"] < 5
report = flatout.hf.report(model)
assert report.active("rms_norm") and report.active("rope") and not report.active("swiglu")
assert report.active("linear_cross_entropy")
"""
    tests = __file__.rpartition("/")[0]
    code = f"import sys\nsys.path[:0] = {[tests, *sys.path]!r}\n{code}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr


# ---- cut-cross-entropy ---------------------------------------------------------------------------


def embedded(device):
    """embeddings (B, S, H), classifier (V, H), labels (B, S), some of which are ignored."""
    embeddings, classifier = randn(2, 9, 24, device=device), randn(40, 24, device=device)
    labels = torch.randint(0, 40, (2, 9), device=device)
    labels[0, :3] = -100
    return embeddings, classifier, labels


def logits_of(embeddings, classifier):
    return (embeddings @ classifier.T).float()


@pytest.mark.parametrize("device", DEVICES)
def test_cce_shifts(device):
    from flatout.compat.cce import linear_cross_entropy

    embeddings, classifier, labels = embedded(device)
    shift_embeddings = embeddings[..., :-1, :].flatten(0, -2)
    shift_labels = labels[..., 1:].flatten()
    want = F.cross_entropy(logits_of(shift_embeddings, classifier), shift_labels)
    grads = torch.autograd.grad(want, (embeddings, classifier))
    near(linear_cross_entropy(shift_embeddings, classifier, shift_labels), want, device)
    for options in ({"shift": 1}, {"shift": True}, {"shift": 1, "impl": "torch_compile"}):
        loss = linear_cross_entropy(embeddings, classifier, labels, **options)
        near(loss, want, device)
        found = torch.autograd.grad(loss, (embeddings, classifier))
        for got, grad in zip(found, grads, strict=True):
            near(got, grad, device)


@pytest.mark.parametrize("device", DEVICES)
def test_cce_of_every_token(device):
    """The negative log likelihood of each token, and what is made of it; any classifier."""
    from flatout.compat.cce import linear_cross_entropy

    embeddings, classifier, labels = embedded(device)
    labels = labels.clamp(min=0)
    nll = linear_cross_entropy(embeddings, classifier, labels, reduction="none")
    want = -logits_of(embeddings, classifier).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    near(nll, want, device)
    near(torch.exp(nll.mean(-1)), torch.exp(want.mean(-1)), device, times=4)
    preferred = torch.tensor([True, False])
    dpo = [-F.logsigmoid(x[~preferred].sum(-1) - x[preferred].sum(-1)) for x in (nll, want)]
    near(*dpo, device, times=20)
    X, b = torch.randn_like(classifier[:6]).requires_grad_(), randn(40, device=device)
    loss = linear_cross_entropy(X, classifier, labels[0, :6], bias=b)
    want = F.cross_entropy(F.linear(X, classifier, b).float(), labels[0, :6])
    near(loss, want, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift", [0, 1])
def test_cce_z_loss(shift, device):
    from flatout.compat.cce import linear_cross_entropy
    from flatout.compat.cce.utils import compute_z_loss

    embeddings, classifier, labels = embedded(device)
    loss, lse = linear_cross_entropy(embeddings, classifier, labels, shift=shift, return_lse=True)
    z_loss = compute_z_loss(lse, labels, shift=shift)
    loss = loss + 0.1 * z_loss
    logits = logits_of(embeddings[:, : 9 - shift], classifier)
    valid = labels[:, shift:] != -100
    squares = logits.logsumexp(-1).square()
    want = F.cross_entropy(logits[valid], labels[:, shift:][valid]) + 0.1 * squares[valid].mean()
    near(loss, want, device)
    found = torch.autograd.grad(loss, (embeddings, classifier), retain_graph=True)
    for got, grad in zip(found, torch.autograd.grad(want, (embeddings, classifier)), strict=True):
        near(got, grad, device)
    terms = compute_z_loss(lse, labels, shift, reduction="none")
    near(terms, squares.where(valid, 0.0), device)
    assert torch.equal(compute_z_loss(lse, labels, shift, reduction="sum"), terms.sum())
    assert torch.equal(compute_z_loss(lse), lse.square().sum() / lse.numel())
    with pytest.raises(ValueError, match="reduction"):
        compute_z_loss(lse, reduction="max")


@pytest.mark.parametrize("device", DEVICES)
def test_cce_patch(path, monkeypatch, device):
    plain = plain_llama(path, device)
    from flatout.compat.cce.transformers import cce_patch

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", type(plain).forward)
    model = cce_patch(plain_llama(path, device))
    same_step(model, plain, device)
    assert model(**batch(device)).logits is None
    want, _ = step(plain, device)
    cce_patch("llama")
    later = plain_llama(path, device)
    loss, _ = step(later, device)
    near(loss, want, device)
    assert later(**batch(device)).logits is None


@pytest.mark.parametrize("device", DEVICES)
def test_cce_perplexity(path, device):
    plain = plain_llama(path, device)
    from flatout.compat.cce.transformers import cce_patch

    model = cce_patch(plain_llama(path, device), reduction="none")
    input_ids = batch(device)["input_ids"]
    attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    attention_mask[1, 8:] = False
    labels = input_ids.clone()
    labels[~attention_mask] = -100
    outputs = model(input_ids, attention_mask, labels=labels)
    loss = outputs[0]
    ppl = torch.exp(loss.sum(1) / (labels[:, 1:] != -100).count_nonzero(dim=1)).mean()
    logits = plain(input_ids, attention_mask).logits[:, :-1].float()
    want = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
    near(loss, want, device)
    want = torch.exp(want.sum(1) / (labels[:, 1:] != -100).count_nonzero(dim=1)).mean()
    near(ppl, want, device, times=4)


# ---- flash-attn ----------------------------------------------------------------------------------


def sdpa(q, k, v, mask=None, **options):
    """Heads third, as flash-attn has them; in fp32, and causal from the bottom right."""
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        mask = mask.tril(k.shape[2] - q.shape[2]) if options.pop("causal", False) else mask
        mask = mask.triu(k.shape[2] - q.shape[2] - options.pop("left", q.shape[2] + k.shape[2]))
    out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **options)
    return out.transpose(1, 2)


def same_attention(out, want, inputs, device):
    near(out, want, device)
    dout = torch.randn_like(want)
    found = torch.autograd.grad(out, inputs, dout.to(out.dtype))
    for got, grad in zip(found, torch.autograd.grad(want, inputs, dout), strict=True):
        near(got, grad, device, times=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface"])
def test_flash_attn_func(package, device):
    needs_attention(device)
    if package == "flash_attn":
        from flatout.compat.flash_attn import flash_attn_func
    else:
        from flatout.compat.flash_attn_interface import flash_attn_func

    batch_size, seqlen, nheads, nheads_k, headdim = 2, 37, 6, 2, 64
    q = randn(batch_size, seqlen, nheads, headdim, device=device)
    k, v = (randn(batch_size, seqlen, nheads_k, headdim, device=device) for _ in range(2))
    same_attention(flash_attn_func(q, k, v), sdpa(q, k, v), (q, k, v), device)
    out = flash_attn_func(q, k, v, causal=True, softmax_scale=0.2, window_size=(8, 0))
    same_attention(out, sdpa(q, k, v, causal=True, left=8, scale=0.2), (q, k, v), device)
    few = q[:, -5:]
    same_attention(flash_attn_func(few, k, v, causal=True), sdpa(few, k, v, causal=True),
                   (q, k, v), device)  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
def test_flash_attn_packed_func(device):
    needs_attention(device)
    from flatout.compat.flash_attn import flash_attn_kvpacked_func, flash_attn_qkvpacked_func

    qkv, kv = randn(2, 19, 3, 4, 64, device=device), randn(2, 19, 2, 2, 64, device=device)
    out = flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=True)
    same_attention(out, sdpa(*qkv.unbind(2), causal=True), (qkv,), device)
    q = qkv[:, :, 0]
    out = flash_attn_kvpacked_func(q, kv, causal=True)
    same_attention(out, sdpa(q, *kv.unbind(2), causal=True), (qkv, kv), device)


@pytest.mark.parametrize("device", DEVICES)
def test_flash_attn_varlen_func(device):
    """Padded rows unpadded, attended to as packed sequences, and padded again."""
    needs_attention(device)
    from flatout.compat.flash_attn import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
    from flatout.compat.flash_attn.bert_padding import pad_input, unpad_input

    qkv = randn(3, 11, 3, 4, 64, device=device)
    attention_mask = torch.arange(11, device=device) < torch.tensor([[11], [4], [7]], device=device)
    unpadded, indices, cu_seqlens, max_seqlen, _ = unpad_input(qkv, attention_mask)
    q, k, v = unpadded.unbind(1)
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True
    )
    out = pad_input(out, indices, 3, 11)
    seen = (attention_mask[:, None] & attention_mask[:, :, None]).tril()
    alone = torch.eye(11, dtype=torch.bool, device=device) & ~attention_mask[:, None]
    want = sdpa(*qkv.unbind(2), mask=(seen | alone)[:, None])
    same_attention(out, want * attention_mask[..., None, None], (qkv,), device)
    packed = flash_attn_varlen_qkvpacked_func(unpadded, cu_seqlens, max_seqlen, causal=True)
    assert torch.equal(pad_input(packed, indices, 3, 11), out)


# ---- transformers --------------------------------------------------------------------------------


def trained(model, folder, device, **options):
    """The losses of a few steps of transformers' Trainer."""
    ids, labels = tokens()
    data = [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)] * 4
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=device == "cpu", disable_tqdm=True, seed=0,
        lr_scheduler_type="constant", max_grad_norm=1.0,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=data, **options)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    return torch.tensor(losses)


@pytest.mark.parametrize("device", DEVICES)
def test_trainer_with_flatout_attention(path, tmp_path, device):
    pytest.importorskip("accelerate")
    needs_attention(device)
    import flatout.hf  # noqa: F401  registers the name

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="flatout")
    assert active(model) == {"attention"}
    losses = trained(ready(model, device), tmp_path, device)
    near(losses, trained(plain_llama(path, device), tmp_path, device), device, times=10)


@pytest.mark.parametrize("device", DEVICES)
def test_trainer_with_patch_and_optimizer(path, tmp_path, device):
    """flatout.torch.AdamW where torch's would stand."""
    pytest.importorskip("accelerate")
    model = flatout.hf.patch(plain_llama(path, device))
    options = {"optimizer_cls_and_kwargs": (ft.AdamW, {"lr": 1e-2, "weight_decay": 0.1})}
    losses = trained(model, tmp_path, device, **options)
    options["optimizer_cls_and_kwargs"] = torch.optim.AdamW, options["optimizer_cls_and_kwargs"][1]
    want = trained(plain_llama(path, device), tmp_path, device, **options)
    near(losses, want, device, times=10)


# ---- PEFT ----------------------------------------------------------------------------------------

TARGETS = {"attention": ["q_proj", "v_proj"], "every layer": "all-linear",
           "head": ["q_proj", "lm_head"]}  # fmt: skip


def lora(model, targets="attention"):
    """PEFT's quicktour, but for weights of B that are not zero: gradients of A would be."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, inference_mode=False, r=8, lora_alpha=32,
        lora_dropout=0.0, target_modules=TARGETS[targets], init_lora_weights=False,
    )  # fmt: skip
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("when", ["patch, then peft", "peft, then patch"])
@pytest.mark.parametrize("way", [flatout.hf.patch, flatout.hf.fuse])
def test_lora(way, when, targets, device):
    def make():
        return ready(tiny_model(attn_implementation="eager"), device)

    plain = ready(lora(make(), targets), device)
    model = lora(way(make()), targets) if when.startswith("patch") else way(lora(make(), targets))
    model = ready(model, device)
    without = {"linear_cross_entropy"} if targets == "head" else set()
    if device == "cpu" or HOPPER:
        assert active(model) == ALL_OPS - without
    rows = flatout.hf.report(model).items()
    assert [n for n, ops in rows if "linear_cross_entropy" in ops] == ["base_model.model"]
    same_step(model, plain, device)
    assert all("lora_" in name for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("device", DEVICES)
def test_lora_with_the_peers_patches(device):
    from flatout.compat.cce.transformers import cce_patch
    from flatout.compat.liger.transformers import apply_liger_kernel_to_llama

    plain = ready(lora(tiny_model()), device)
    model = ready(lora(tiny_model()), device)
    apply_liger_kernel_to_llama(model=model)
    assert active(model) == LIGER_OPS | {"linear_cross_entropy"}
    same_step(model, plain, device)
    model = ready(lora(tiny_model()), device)
    assert cce_patch(model) is model and active(model) == {"linear_cross_entropy"}
    same_step(model, plain, device)


def test_lora_saved_merged_and_checkpointed(tmp_path):
    peft = pytest.importorskip("peft")
    ids = tokens()[0]
    model = flatout.hf.patch(lora(tiny_model(), "every layer"))
    plain = lora(tiny_model(), "every layer")
    for m in (model, plain):
        m.gradient_checkpointing_enable()
        m.enable_input_require_grads()
    same_step(model, plain, "cpu")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    want = loaded(ids).logits
    near(model.eval()(ids).logits, want, "cpu")
    merged = copy.deepcopy(model).merge_and_unload()
    near(merged(ids).logits, want, "cpu", times=4)
    assert active(merged) == ALL_OPS


@pytest.mark.parametrize("device", DEVICES)
def test_lora_in_trainer(tmp_path, device):
    pytest.importorskip("accelerate")
    losses = trained(flatout.hf.patch(ready(lora(tiny_model()), device)), tmp_path, device)
    want = trained(ready(lora(tiny_model()), device), tmp_path, device)
    near(losses, want, device, times=10)
