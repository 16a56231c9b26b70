"""liger_kernel.transformers.auto_model: AutoLigerKernelForCausalLM. Needs transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from .monkey_patch import (
    MODEL_TYPE_TO_APPLY_LIGER_FN,
    _apply_liger_kernel_to_instance,
    apply_kwargs,
)


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """AutoModelForCausalLM whose models come out patched (these alone, and no class).

    Keyword arguments of apply_liger_kernel_to_* go there, the others to transformers; a model type
    without such a function is loaded as it is.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        patch, rest = _split(config, kwargs)
        model = super().from_pretrained(pretrained_model_name_or_path, *model_args, **rest)
        # output_loading_info=True gives (model, info).
        _apply_liger_kernel_to_instance(model[0] if isinstance(model, tuple) else model, **patch)
        return model

    @classmethod
    def from_config(cls, config, **kwargs):
        patch, rest = _split(config, kwargs)
        model = super().from_config(config, **rest)
        _apply_liger_kernel_to_instance(model, **patch)
        return model


def _split(config, kwargs):
    """(those for apply_liger_kernel_to_*, the others)."""
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(getattr(config, "model_type", None))
    patch = {} if apply is None else apply_kwargs(apply, kwargs)
    return patch, {name: value for name, value in kwargs.items() if name not in patch}
