"""cut_cross_entropy.transformers: cce_patch."""

import importlib

from torch import nn
from transformers import PretrainedConfig

from ...hf._patch import pretrained
from .._causal_lm import causal_lm_forward, patch_loss
from . import IGNORE_INDEX, LinearCrossEntropyImpl, impl_of, linear_cross_entropy

MODEL_TYPES = ("llama", "mistral", "phi3", "qwen2", "qwen3")


def cce_patch(
    model_type_or_model,
    impl=LinearCrossEntropyImpl.CCE,
    reduction="mean",
    filter_eps="auto",
    accum_e_fp32=False,
    accum_c_fp32=False,
    filter_e_grad=True,
    filter_c_grad=True,
    train_only=False,
):
    """Let a ForCausalLM with labels compute its loss by linear_cross_entropy, logits None.

    A model, or what wraps one (PEFT's): that model, returned. A model type ("llama", "mistral",
    "phi3", "qwen2", "qwen3") or a config of one: its class, so every model of the type; returns
    None. train_only leaves eval() with labels as it is. reduction "none" gives (B, S - 1) losses;
    with num_items_in_batch "mean" is the sum divided by it. forward takes skip_logits=False for the
    original. RuntimeError for an unknown model type, ValueError for an unknown impl. Patching twice
    replaces the first patch.
    """
    try:
        impl = impl_of(impl)
    except NotImplementedError:
        raise ValueError(f"Unknown {impl=}") from None
    options = {
        "reduction": reduction,
        "filter_eps": filter_eps,
        "accum_e_fp32": accum_e_fp32,
        "accum_c_fp32": accum_c_fp32,
        "filter_e_grad": filter_e_grad,
        "filter_c_grad": filter_c_grad,
        "impl": impl,
        "train_only": train_only,
    }
    is_model = isinstance(model_type_or_model, nn.Module)
    config = pretrained(model_type_or_model).config if is_model else model_type_or_model
    model_type = config.model_type if isinstance(config, PretrainedConfig) else config
    if model_type not in MODEL_TYPES:
        raise RuntimeError(f"Unknown model type {model_type}")
    if is_model:
        patch_loss(pretrained(model_type_or_model), _loss, _skips_logits, **options)
        return model_type_or_model
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    cls = getattr(module, f"{model_type.capitalize()}ForCausalLM")
    original = getattr(cls.forward, "_flatout_original", cls.forward)
    cls.forward = causal_lm_forward(original, _loss, _skips_logits, tuple(options.items()))
    cls.forward._flatout_original = original
    return None


def _skips_logits(model, options):
    return model.training or not dict(options)["train_only"]


def _loss(
    hidden,
    lm_head,
    labels,
    options,
    shift_labels=None,
    num_items_in_batch=None,
    ignore_index=IGNORE_INDEX,
    **kwargs,
):
    options = {name: value for name, value in options.items() if name != "train_only"}
    divide = options["reduction"] == "mean" and num_items_in_batch is not None
    if divide:
        options["reduction"] = "sum"
    loss = linear_cross_entropy(
        hidden,
        lm_head.weight,
        (labels if shift_labels is None else shift_labels).to(hidden.device),
        lm_head.bias,
        ignore_index,
        shift=1 if shift_labels is None else 0,
        **options,
    )
    return {"loss": loss / num_items_in_batch if divide else loss}
