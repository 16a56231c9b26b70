"""liger_kernel.transformers.auto_model: AutoLigerKernelForCausalLM. Needs transformers."""

import contextlib
import logging

from transformers import AutoConfig, AutoModelForCausalLM

from ._patch import patch_kept
from .monkey_patch import (
    MODEL_TYPE_TO_APPLY_LIGER_FN,
    _apply_liger_kernel,
    _pretrained_class,
    apply_kwargs,
)

logger = logging.getLogger(__name__)


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """AutoModelForCausalLM whose models come out patched (these alone: their class is not).

    Keyword arguments of apply_liger_kernel_to_* go there, the others to transformers; a model type
    without such a function is loaded as it is. So, with a warning, is from_config's model on the
    meta device: call apply_liger_kernel_to_*(model=model) once it has weights.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        with _patched(config, kwargs) as rest:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **rest)

    @classmethod
    def from_config(cls, config, **kwargs):
        with _patched(config, kwargs) as rest:
            model = super().from_config(config, **rest)
        applied = getattr(config, "model_type", None) in MODEL_TYPE_TO_APPLY_LIGER_FN
        if applied and any(parameter.is_meta for parameter in model.parameters()):
            logger.warning("%s on the meta device: nothing is patched", type(model).__name__)
        return model


@contextlib.contextmanager
def _patched(config, kwargs):
    """Within, models of the config's type are patched; gives the kwargs that say nothing of it."""
    model_type = getattr(config, "model_type", None)
    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    patch = {} if apply is None else apply_kwargs(apply, kwargs)
    with contextlib.nullcontext() if apply is None else patch_kept(_pretrained_class(model_type)):
        _apply_liger_kernel(model_type, **patch)
        yield {name: value for name, value in kwargs.items() if name not in patch}
