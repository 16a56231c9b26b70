"""A Hugging Face ForCausalLM whose loss comes from its hidden states: what Liger's and
cut-cross-entropy's patched forwards do, for one model. Needs transformers."""

import functools
import inspect

from transformers.modeling_outputs import CausalLMOutputWithPast

from ..hf import _loss
from ..hf._swap import active, members, original, swap


def patch_loss(model, loss, skips_logits, **options):
    """Give this model alone the forward of causal_lm_forward, in place of an earlier one.

    loss and skips_logits are module-level functions and options are hashable, so that the model
    can be copied and pickled. flatout.hf.unpatch takes it back.
    """
    chain = {**active(type(model)), _loss.OF_HIDDEN: (loss, skips_logits, tuple(options.items()))}
    model.__class__ = original(type(model))
    for kind, variant in chain.items():
        swap(model, kind, variant)


@members(_loss.OF_HIDDEN)
def _members(base, variant):
    return {"forward": causal_lm_forward(base.forward, *variant)}


def causal_lm_forward(forward, loss, skips_logits, options):
    """`forward`, but the output's fields are loss(hidden, lm_head, labels, options, **kwargs), and
    logits None.

    That holds if labels or shift_labels are given and skips_logits(model, options), or with
    skip_logits=True; with skip_logits=False, and everywhere else, it is the original forward. So
    it is where lm_head is more than a plain linear layer (LoRA, quantized, sharded).
    """
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def wrapped(self, *args, skip_logits=None, **kwargs):
        kwargs.update(zip(names, args, strict=False))
        labels, shift_labels = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None and shift_labels is None:
            if skip_logits:
                raise ValueError("skip_logits is True, but labels and shift_labels are None")
            return forward(self, **kwargs)
        skip = skips_logits(self, options) if skip_logits is None else skip_logits
        if not skip or _loss.not_plain(self.lm_head):
            # transformers computes a loss only if there are labels, and reads shift_labels first.
            return forward(self, **{**kwargs, "labels": shift_labels if labels is None else labels})
        return _forward_hidden(self, loss, options, **kwargs)

    return wrapped


def _forward_hidden(self, loss, options, labels=None, logits_to_keep=0, return_dict=None, **kwargs):
    base = getattr(self, self.base_model_prefix)
    outputs = base(**{k: v for k, v in kwargs.items() if k != "shift_labels" and v is not None})
    hidden = outputs.last_hidden_state
    if not isinstance(logits_to_keep, int):
        hidden = hidden[:, logits_to_keep]
    elif logits_to_keep:
        hidden = hidden[:, -logits_to_keep:]
    fields = loss(hidden, self.lm_head, labels, dict(options), **kwargs)
    output = CausalLMOutputWithPast(
        loss=fields.pop("loss"),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
    for name, value in fields.items():
        if value is None:
            setattr(output, name, None)  # an attribute, but no entry of to_tuple()
        else:
            output[name] = value
    if return_dict is None:
        return_dict = getattr(self.config, "return_dict", True)
    return output if return_dict else output.to_tuple()
