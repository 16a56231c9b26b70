"""fuse(model): whole decoder layers over flatout's ops."""

import functools
import inspect

import torch
from torch import nn
from torch.func import functional_call

from .. import torch as ft
from . import _probe
from ._attention import NAME
from ._attention import attention as flatout_attention
from ._patch import attempt, patch, pretrained
from ._swap import active, members, swap

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def is_decoder_layer(module):
    return all(isinstance(getattr(module, n, None), nn.Module) for n in PARTS)


def _eps(norm):
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _is_plain(norm, offset):
    """Whether nobody but flatout's op sees what this norm computes: it is patched, without hooks,
    and no other module has come in its place."""
    hooks = (
        norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks
    )  # fmt: skip
    return active(type(norm)).get("rms_norm") == offset and not any(hooks)


def _keeps_dtype(x, norm):
    """Whether norm(x) has x's dtype, as the fused ops give it (autocast with float32 weights:
    the norm gives float32)."""
    return torch.promote_types(x.dtype, norm.weight.dtype) == x.dtype


def _rotated(attn, q, k, cos, sin):
    """q and k (B, S, H, D), normalized per head where the model does that, and rotated."""
    q_norm, k_norm = getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)
    if q_norm is None:
        return ft.rope(q, k, cos, sin)
    plain = _is_plain(q_norm, 0) and _is_plain(k_norm, 0)
    if not plain or _eps(q_norm) != _eps(k_norm) or not _keeps_dtype(q, q_norm):
        return ft.rope(q_norm(q), k_norm(k), cos, sin)
    return ft.qk_norm_rope(q, k, q_norm.weight, k_norm.weight, cos, sin, _eps(q_norm))


@members("fused attention")
def _attention(base, variant):
    options = dict(variant)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None,
        **kwargs,
    ):  # fmt: skip
        if self.config._attn_implementation != NAME:  # set after fuse()
            return base.forward(
                self, hidden_states, position_embeddings=position_embeddings,
                attention_mask=attention_mask, past_key_values=past_key_values, **kwargs,
            )  # fmt: skip
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = self.q_proj(hidden_states).view(heads)
        k = self.k_proj(hidden_states).view(heads)
        v = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        cos, sin = position_embeddings
        q, k = (x.transpose(1, 2) for x in _rotated(self, q, k, cos, sin))
        if past_key_values is not None:
            cache = {"sin": sin, "cos": cos, "cache_position": kwargs.get("cache_position")}
            k, v = past_key_values.update(k, v, self.layer_idx, cache)
        out, _ = flatout_attention(self, q, k, v, attention_mask, **options, **kwargs)
        return self.o_proj(out.flatten(2)), None

    return {"forward": forward}


@members("fused layer")
def _layer(base, variant):
    names = list(inspect.signature(base.forward).parameters)[2:]

    def forward(self, hidden_states, *args, **kwargs):
        norm = self.post_attention_layernorm
        kwargs.update(zip(names, args, strict=False))
        x = self.input_layernorm(hidden_states)
        out, _ = self.self_attn(hidden_states=x, **kwargs)
        same = out.dtype == hidden_states.dtype
        if same and _is_plain(norm, variant) and _keeps_dtype(out, norm):
            y, residual = ft.add_rms_norm(
                out, hidden_states, norm.weight, _eps(norm), offset=variant
            )
        else:  # such as under autocast with float32 weights: the sum has the residual's wider dtype
            residual = hidden_states + out
            y = norm(residual)
        return residual + self.mlp(y)

    return {"forward": forward}


@members("embedding")
def _embedding(base, variant):
    def forward(self, input):
        return ft.embedding(input, self.weight)

    return {"forward": forward}


def _plain_embedding(module):
    options = module.padding_idx, module.max_norm, module.scale_grad_by_freq, module.sparse
    if type(module).forward is not torch.nn.Embedding.forward:
        return "its class has a forward of its own"
    return None if options == (None, None, False, False) else "it has options (padding_idx, ...)"


# ---- proof -------------------------------------------------------------------------------------
def _random_parameters(layer):
    found = {}
    for name, p in layer.named_parameters():
        scale = 0.1 if p.ndim == 1 else p.shape[-1] ** -0.5
        found[name] = _probe.random(tuple(p.shape), p, scale) + (p.ndim == 1)
    return found


def _compare(layer, cos_sin, known, found):
    """Swaps the fused forwards in and out again: does the layer's result change? Layers of one kind
    are compared once, with random parameters. Sets found["attention"], the attention's options."""
    attn, norm = layer.self_attn, layer.post_attention_layernorm
    if attn.config._attn_implementation != NAME:
        return "its attention is not flatout's"
    if "rms_norm" not in active(type(norm)) or "rope" not in active(type(attn)):
        return "its norms or its rotary embedding are not flatout's"
    before = type(attn), type(layer)
    if not all(hasattr(attn, n) for n in ("q_proj", "k_proj", "v_proj", "o_proj")):
        return "its projections are packed"
    swaps = (attn, "fused attention", _probe.attention_options(attn, cos_sin)[1]), (
        layer, "fused layer", active(type(norm))["rms_norm"],
    )  # fmt: skip
    kind = *before, type(norm), type(layer.mlp), layer.training, swaps[0][2]
    if kind not in known:
        cos, sin = cos_sin()
        x = _probe.random((1, cos.shape[1], attn.config.hidden_size), cos)
        parameters = _random_parameters(layer)

        def call():
            inputs = {"position_embeddings": (cos, sin)}
            with _probe.same_random(layer):
                return functional_call(layer, parameters, (x,), inputs)

        expected = call()
        if not isinstance(expected, torch.Tensor):
            return f"its forward returns a {type(expected).__name__}"
        for one in swaps:
            swap(*one)
        try:
            same = _probe.close(call(), expected, _probe.rounding(x.dtype))
        finally:
            attn.__class__, layer.__class__ = before
        known[kind] = None if same else "its result differs from the fused layer's"
    found["attention"] = swaps[0][2]
    return known[kind]


def fuse(model: nn.Module) -> nn.Module:
    """patch(model), then whole decoder layers of the Llama form: the residual sum and the second
    norm in one pass, q/k norms and rotation in one pass, attention and loss over flatout's ops,
    plain embeddings too. Parameters, names, state_dict, cache and gradient checkpointing stay.
    A layer whose result on random parameters is not the original's keeps its forward; report(model)
    says why. unpatch(model) takes it all back. Returns the model."""
    patch(model)
    top = pretrained(model)
    cos_sin = functools.cache(lambda: _probe.tables(top))
    known = {}
    for module in model.modules():
        if is_decoder_layer(module):
            found = {}
            norm = active(type(module.post_attention_layernorm)).get("rms_norm")
            attempt(module, "fused layer", _compare, cos_sin, known, found, variant=norm)
            if "fused layer" in active(type(module)) and found:
                swap(module.self_attn, "fused attention", found["attention"])
        if isinstance(module, torch.nn.Embedding):
            attempt(module, "embedding", _plain_embedding, modes=(False,))
    return model
