"""Tiny transformers models of random weights, and the comparison of one with another."""

import torch
import transformers
from transformers import AutoModelForCausalLM

import flatout.hf  # noqa: F401  registers attn_implementation="flatout"

LLAMA_FORM = ["Qwen3", "Qwen2", "Llama", "Mistral"]


def make(kind, attn_implementation="eager", seed=0, dtype=torch.float32, **options):
    """A model with two layers, norm weights away from 1 and logits of a few units."""
    torch.manual_seed(seed)
    base = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
        "attention_dropout": 0.0, "max_position_embeddings": 128,
    }  # fmt: skip
    if kind == "Mistral":
        base["sliding_window"] = None
    config = getattr(transformers, f"{kind}Config")(**{**base, **options})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p)) if p.ndim == 1 else p.mul_(4)
    return model.to(dtype)


def windowed(kind, window):
    """Options that give a model of this kind sliding windows, Qwen's in its second layer alone."""
    if kind == "Mistral":
        return {"sliding_window": window}
    types = ["full_attention", "sliding_attention"]
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": types}


def tokens(batch=2, length=12, vocabulary=97):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def step(model, **inputs):
    """(loss, {name: gradient}) of one training step."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def logits(model, **inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


def difference(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def assert_same_step(model, reference, tolerance=1e-5, **inputs):
    loss, grads = step(model, **inputs)
    expected, expected_grads = step(reference, **inputs)
    assert difference(loss, expected) <= tolerance
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        assert difference(grad, expected_grads[name]) <= tolerance, name
