"""apply_liger_kernel_to_*: Liger's patching, on models and not on module globals.

With `model` that one model is patched, through `flatout.hf.patch`; `flatout.hf.unpatch(model)`
takes it back. Without, every model of the type that is made or loaded later is patched: the type's
PreTrainedModel class gets a post_init and a from_pretrained that do it, and nothing else in
transformers changes; `undo_liger_kernel(model_type)` removes them. Models made before stay as they
are (Liger's rotary embedding would reach them), and so do models that are built on the meta device
and filled by hand: patch those with `model=`.
"""

import importlib
import inspect
import logging

logger = logging.getLogger(__name__)


def apply_liger_kernel_to_qwen3(
    rope=True,
    cross_entropy=False,
    fused_linear_cross_entropy=True,
    rms_norm=True,
    swiglu=True,
    model=None,
):
    """Patch Qwen3 models: rotary embedding, loss, RMSNorm and SwiGLU by flatout's ops.

    fused_linear_cross_entropy: forward with labels in training gives logits None and the loss from
    the hidden states (`skip_logits=` decides otherwise). cross_entropy: flatout's loss on the
    logits, through the model's `loss_function` and not, as in Liger, by replacing
    torch.nn.functional.cross_entropy. Both together are an AssertionError.
    """
    _apply(
        "qwen3",
        model,
        cross_entropy,
        fused_linear_cross_entropy,
        rope=rope,
        rms_norm=rms_norm,
        swiglu=swiglu,
    )


def apply_liger_kernel_to_qwen2(
    rope=True,
    cross_entropy=False,
    fused_linear_cross_entropy=True,
    rms_norm=True,
    swiglu=True,
    model=None,
):
    """Patch Qwen2 models: see apply_liger_kernel_to_qwen3."""
    _apply(
        "qwen2",
        model,
        cross_entropy,
        fused_linear_cross_entropy,
        rope=rope,
        rms_norm=rms_norm,
        swiglu=swiglu,
    )


def apply_liger_kernel_to_llama(
    rope=True,
    cross_entropy=False,
    fused_linear_cross_entropy=True,
    rms_norm=True,
    swiglu=True,
    model=None,
):
    """Patch Llama models: see apply_liger_kernel_to_qwen3."""
    _apply(
        "llama",
        model,
        cross_entropy,
        fused_linear_cross_entropy,
        rope=rope,
        rms_norm=rms_norm,
        swiglu=swiglu,
    )


def apply_liger_kernel_to_mistral(
    rope=True,
    cross_entropy=False,
    fused_linear_cross_entropy=True,
    rms_norm=True,
    swiglu=True,
    model=None,
):
    """Patch Mistral models: see apply_liger_kernel_to_qwen3."""
    _apply(
        "mistral",
        model,
        cross_entropy,
        fused_linear_cross_entropy,
        rope=rope,
        rms_norm=rms_norm,
        swiglu=swiglu,
    )


MODEL_TYPE_TO_APPLY_LIGER_FN = {
    "llama": apply_liger_kernel_to_llama,
    "mistral": apply_liger_kernel_to_mistral,
    "qwen2": apply_liger_kernel_to_qwen2,
    "qwen3": apply_liger_kernel_to_qwen3,
}


def undo_liger_kernel(model_type):
    """Undo apply_liger_kernel_to_MODEL_TYPE() for models made from now on."""
    from ._patch import unpatch_class

    unpatch_class(_pretrained_class(model_type))


def _apply_liger_kernel(model_type, **kwargs):
    """apply_liger_kernel_to_MODEL_TYPE(**kwargs) without the kwargs that it does not know."""
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if apply is None:
        logger.warning("flatout has no Liger patch for model type %r: nothing done", model_type)
        return
    apply(**apply_kwargs(apply, kwargs))


def _apply_liger_kernel_to_instance(model, **kwargs):
    """apply_liger_kernel_to_* of this model's type, on it alone."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    _apply_liger_kernel(model_type, **{**kwargs, "model": model})


def apply_kwargs(apply, kwargs):
    """The kwargs that are parameters of `apply`."""
    names = inspect.signature(apply).parameters
    return {name: value for name, value in kwargs.items() if name in names}


def _apply(model_type, model, cross_entropy, fused_linear_cross_entropy, **ops):
    assert not (cross_entropy and fused_linear_cross_entropy), (
        "cross_entropy and fused_linear_cross_entropy cannot both be True."
    )
    from ._patch import patch_class, patch_model

    patch = ops, cross_entropy, fused_linear_cross_entropy
    if model is None:
        patch_class(_pretrained_class(model_type), *patch)
    else:
        patch_model(model, *patch)


def _pretrained_class(model_type):
    path = f"transformers.models.{model_type}.modeling_{model_type}"
    return getattr(importlib.import_module(path), f"{model_type.capitalize()}PreTrainedModel")
