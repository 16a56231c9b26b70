"""A causal language model's loss without logits: forward hands the hidden states and lm_head's
weight to linear_cross_entropy when it trains with labels."""

import functools
import inspect

import torch
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .. import torch as ft
from ._probe import random, undecorated
from ._swap import members

OF_HIDDEN = "loss of hidden states"  # the swap by which flatout.compat computes this loss


def is_causal_lm(module):
    """lm_head is a child of its own: PEFT's and FSDP's wrappers answer for those of what they hold,
    and their forward is another."""
    head = module._modules.get("lm_head")
    return isinstance(head, torch.nn.Module) and hasattr(module, "loss_function")


def not_plain(head):
    """Why lm_head's weight cannot be taken out of it, or None."""
    weight = getattr(head, "weight", None)
    if type(head) is not torch.nn.Linear:
        return f"lm_head is a {type(head).__name__}, not a plain nn.Linear"
    if head._forward_hooks or head._forward_pre_hooks:
        return "lm_head has hooks"
    if type(weight.data) is not torch.Tensor or weight.shape[0] != head.out_features:
        return "lm_head's weight is sharded or wrapped"
    return None


def unfit(model):
    """Why the loss cannot come from the hidden states and lm_head's weight alone, or None."""
    own = model.loss_function is not ForCausalLMLoss
    return not_plain(model.lm_head) or ("its loss_function is not ForCausalLMLoss" if own else None)


def loss(model, hidden, labels, num_items_in_batch=None, shift_labels=None, ignore_index=-100):
    """ForCausalLMLoss of hidden (B, S, H) and labels (B, S), with the model's own logit scaling
    (Granite's logits_scaling, Cohere's logit_scale) and softcap (Gemma's)."""
    head, config = model.lm_head, model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    target = labels if shift_labels is None else shift_labels
    return ft.linear_cross_entropy(
        hidden if scale == 1 else hidden * scale,
        head.weight,
        target.to(hidden.device).view(hidden.shape[:-1]),
        bias=head.bias if head.bias is None or scale == 1 else head.bias * scale,
        ignore_index=ignore_index,
        shift=1 if shift_labels is None else 0,
        softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        num_items=num_items_in_batch,
    )


OWN = ("labels", "logits_to_keep", "num_logits_to_keep", "return_dict")
LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")


def _needs_logits(model, kwargs):
    keep = kwargs.get("logits_to_keep", 0)
    return (
        not model.training
        or kwargs.get("labels") is None
        or isinstance(keep, torch.Tensor)
        or keep != 0
        or kwargs.get("output_router_logits")
        or not kwargs.get("return_dict", getattr(model.config, "return_dict", True))
        or unfit(model) is not None
    )


@members("linear_cross_entropy")
def _members(base, variant):
    names = list(inspect.signature(base.forward).parameters)[1:]

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        kwargs.update(zip(names, args, strict=False))
        if _needs_logits(self, kwargs):
            return base.forward(self, **kwargs)
        inner = {k: v for k, v in kwargs.items() if k not in OWN and v is not None}
        out = getattr(self, self.base_model_prefix)(**inner)
        options = {k: kwargs[k] for k in LOSS if k in kwargs}
        return CausalLMOutputWithPast(
            loss=loss(self, out.last_hidden_state, kwargs["labels"], **options),
            logits=None,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    return {"forward": forward}


class _Stub:
    """The model with a base model that answers with given hidden states."""

    def __init__(self, model, hidden):
        self._model = model
        out = BaseModelOutputWithPast(last_hidden_state=hidden)
        setattr(self, model.base_model_prefix, lambda *args, **kwargs: out)

    def __getattr__(self, name):
        return getattr(self._model, name)


def probe(model):
    """forward's own loss on random hidden states against loss()."""
    reason = unfit(model)
    if reason:
        return reason
    weight = model.lm_head.weight
    size = weight[:1024].float().std() * weight.shape[1] ** 0.5
    hidden = random((2, 6, weight.shape[1]), weight, float(4 / size.clamp(min=1e-6)))
    labels = torch.arange(12, device=weight.device).view(2, 6) % weight.shape[0]
    labels[0, 2] = -100
    ids = labels.clamp(min=0)  # a forward that does look them up must not bring the GPU down
    forward = undecorated(type(model).forward)
    for options in ({}, {"num_items_in_batch": 7}):
        out = forward(_Stub(model, hidden), input_ids=ids, labels=labels, **options)
        if type(out) is not CausalLMOutputWithPast:
            return f"its forward returns {type(out).__name__}"
        difference = (out.loss.float() - loss(model, hidden, labels, **options)).abs()
        if not difference <= (1e-4 if weight.dtype == torch.float32 else 2e-2) * out.loss.abs():
            return "its loss differs from linear_cross_entropy's"
    return None
