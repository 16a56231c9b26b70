"""patch(model) and unpatch(model): flatout's ops in the modules that pass their probe."""

import copy
import functools
import inspect
import types
import weakref

from torch import nn
from transformers import PreTrainedModel

from .. import torch as ft
from . import _loss, _probe
from ._attention import NAME, UNPACKED
from ._swap import active, members, restore, swap

REASONS = weakref.WeakKeyDictionary()  # module -> {op: why flatout is not active in it}


@members("rms_norm")
def _rms_norm(base, offset):
    def forward(self, hidden_states):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return _probe.norm_forward(self.weight, eps, offset, hidden_states)

    return {"forward": forward}


@members("swiglu")
def _swiglu(base, parts):
    def split(self, x):
        return self.down_proj(ft.swiglu(self.gate_proj(x), self.up_proj(x)))

    def packed(self, x):
        return self.down_proj(ft.swiglu(self.gate_up_proj(x)))

    return {"forward": split if len(parts) == 2 else packed}


@members("rope")
def _rope(base, variant):
    """The same code with a globals dict of its own, in which one name means something else.
    Without __name__, or torch.compile would guard the names of the module that has it."""
    old = _probe.undecorated(base.forward)
    scope = {**old.__globals__, "apply_rotary_pos_emb": _probe.apply_rope}
    del scope["__name__"]
    new = types.FunctionType(
        old.__code__,
        scope,
        old.__name__,
        old.__defaults__,
        old.__closure__,
    )
    new.__kwdefaults__ = old.__kwdefaults__
    return {"forward": new}


@members("unpacked")
def _unpacked(base, variant):
    """Tells the attention layers when the caller gave no position_ids, so that there is nothing to
    look for in the ones that the model makes."""
    position = list(inspect.signature(base.forward).parameters).index("position_ids") - 1

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        if len(args) <= position and kwargs.get("position_ids") is None:
            kwargs[UNPACKED] = True
        return base.forward(self, *args, **kwargs)

    return {"forward": forward}


def pretrained(model):
    """The outermost transformers model in `model` (PEFT and DDP wrap it)."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"expected a transformers model, got {type(model).__name__}")


def attempt(module, op, probe, *args, variant=None, kind=None, modes=(False, True)):
    """Swaps op into module if the probe agrees; else keeps the reason for report(). variant may be
    a function that knows after the probe; kind is the name of the swap where it is not op. modes:
    in training, too, where the swap takes the place of code that may then do more (dropout)."""
    kind = kind or op
    if {op, kind, "kernel layer"} & active(type(module)).keys():
        return
    reason = _probe.unusable(module)
    for training in modes:
        with _probe.quiet(module, training):
            reason = reason or _probe.run(probe, module, *args)
    REASONS.setdefault(module, {}).pop(op, None)
    if reason:
        REASONS[module][op] = reason
    else:
        swap(module, kind, variant() if callable(variant) else variant)


def _no_shared_setting(model, modules):
    """Why these attention modules do not all follow model.set_attn_implementation(), or None."""
    if getattr(model.config, "output_attentions", False):
        return "config.output_attentions asks for weights that flatout does not have"
    if getattr(model.config, "sub_configs", None):
        return "a model of several parts: set attn_implementation for its text part"
    if not getattr(model, "_supports_attention_backend", True):
        return "its class does not use transformers' attention interface"
    if not modules:
        return "no attention module of a known form"
    followed = {id(m.config) for m in model.modules() if isinstance(m, PreTrainedModel)}
    if any(id(m.config) not in followed for m in modules):
        return "an attention module has a config of its own (PEFT's modules_to_save copies it)"
    return None


def _patch_attention(model, cos_sin):
    """Every kind of attention module of the model must pass: they share one setting."""
    if model.config._attn_implementation == NAME:
        return
    modules = [m for m in model.modules() if _probe.is_attention(m)]
    kinds = {(type(m), getattr(m, "sliding_window", None)): m for m in modules}
    reason = _no_shared_setting(model, modules)
    for module in kinds.values():
        with _probe.quiet(module):
            reason = reason or _attention_reason(module, cos_sin)
    for module in modules:
        REASONS.setdefault(module, {}).pop("attention", None)
        if reason:
            REASONS[module]["attention"] = reason
    if reason:
        return
    memo = {}  # a config of its own: another model may share this one
    for module in model.modules():
        if module.__dict__.get("config") is not None:
            module.config = copy.deepcopy(module.config, memo)
    model._flatout_attention_before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    base = getattr(model, model.base_model_prefix, model)
    parameters = inspect.signature(type(base).forward).parameters
    if "position_ids" in parameters and "kwargs" in parameters and hasattr(base, "layers"):
        swap(base, "unpacked")


def _attention_reason(module, cos_sin):
    if getattr(module, "attention_dropout", 0.0):
        return f"attention_dropout={module.attention_dropout}: flatout has no dropout"
    return _probe.unusable(module) or _probe.run(_probe.attention, module, cos_sin)


def patch(
    model: nn.Module,
    *,
    rms_norm: bool = True,
    swiglu: bool = True,
    rope: bool = True,
    attention: bool = True,
    linear_cross_entropy: bool = True,
) -> nn.Module:
    """Puts flatout's ops into this transformers model, and into no other, and returns it.

    Each module is compared with flatout's op on a small random input of its own dtype and device
    first, in evaluation and in training (dropout); one that differs keeps its forward, and
    report(model) says why. Parameters, names and
    state_dict stay the same. Calling it again changes nothing; unpatch(model) takes it all back.

    rms_norm, swiglu, rope: modules of that form. attention: attn_implementation="flatout".
    linear_cross_entropy: in training, forward with labels gives a loss and logits=None; in
    evaluation, and wherever logits are needed, it gives what it gave before.
    """
    top = pretrained(model)
    cos_sin = functools.cache(lambda: _probe.tables(top))
    if attention:
        _patch_attention(top, cos_sin)
    for module in model.modules():
        if rms_norm and _probe.norm_eps(module) is not None:
            found = {}
            attempt(module, "rms_norm", _probe.rms_norm, found, variant=lambda f=found: f["offset"])
        if swiglu and (parts := _probe.mlp_parts(module)):
            attempt(module, "swiglu", _probe.swiglu, variant=parts)
        if rope and _probe.is_attention(module):
            attempt(module, "rope", _probe.rope, cos_sin, modes=(False,))
        if linear_cross_entropy and _loss.is_causal_lm(module):
            attempt(module, "linear_cross_entropy", _loss.probe)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Takes back patch(model) and fuse(model), and returns the model."""
    top = pretrained(model)
    for module in model.modules():
        restore(module)
        REASONS.pop(module, None)
    before = top.__dict__.pop("_flatout_attention_before", None)
    if before is not None:
        top.set_attn_implementation(before)
    return model
