"""What apply_liger_kernel_to_* do to one model. Needs transformers."""

import contextlib
import functools
import logging

import flatout.torch as ft
from flatout import hf
from flatout.hf._patch import pretrained
from flatout.hf._swap import active, members, swap

from ..._causal_lm import patch_loss
from .model.loss_utils import LigerForCausalLMLoss
from .modules import LigerRMSNorm

logger = logging.getLogger(__name__)


@members("liger norm")
def _norm_members(base, variant):
    """Liger's attributes and extra_repr on a patched norm: some code looks for them."""
    return {
        "extra_repr": LigerRMSNorm.extra_repr,
        "offset": 0.0,
        "casting_mode": "llama",
        "in_place": True,
        "row_mode": None,
    }


@members("liger cross-entropy")
def _loss_members(base, variant):
    return {"loss_function": staticmethod(causal_lm_loss)}


def patch_model(model, ops, cross_entropy, fused_linear_cross_entropy):
    """ops: {rope, rms_norm, swiglu: bool}, for flatout.hf.patch. In what wraps a transformers model
    (PEFT's) that one gets the loss."""
    hf.patch(model, **ops, attention=False, linear_cross_entropy=False)
    for module in model.modules():
        if ops["rms_norm"] and "rms_norm" in active(type(module)):
            swap(module, "liger norm")
    report = hf.report(model)
    for op, wanted in ops.items():
        if wanted and not report.active(op):
            logger.warning("%s: %s stays as it is:\n%s", type(model).__name__, op, report)
    inner = pretrained(model)
    if cross_entropy:
        swap(inner, "liger cross-entropy")
    if fused_linear_cross_entropy and hasattr(inner, "lm_head"):
        patch_loss(inner, _fused_loss, _trains)


def patch_class(base, *patch):
    """patch_model(model, *patch) for every model of a subclass of `base` that is made or loaded
    from now on, until unpatch_class(base)."""
    unpatch_class(base)
    post_init, from_pretrained = base.post_init, base.from_pretrained.__func__

    @functools.wraps(post_init)
    def patched_post_init(self):
        post_init(self)
        if not any(parameter.is_meta for parameter in self.parameters()):
            patch_model(self, *patch)

    @functools.wraps(from_pretrained)
    def patched_from_pretrained(cls, *args, **kwargs):
        loaded = from_pretrained(cls, *args, **kwargs)
        # output_loading_info=True gives (model, info).
        patch_model(loaded[0] if isinstance(loaded, tuple) else loaded, *patch)
        return loaded

    base.post_init = patched_post_init
    base.from_pretrained = classmethod(patched_from_pretrained)
    base._flatout_patched = True


def unpatch_class(base):
    if "_flatout_patched" in vars(base):
        del base.post_init, base.from_pretrained, base._flatout_patched


@contextlib.contextmanager
def patch_kept(base):
    """A patch_class(base, ...) within gives way, at the end, to what was there before."""
    names = ("post_init", "from_pretrained", "_flatout_patched")
    before = {name: vars(base)[name] for name in names if "_flatout_patched" in vars(base)}
    try:
        yield
    finally:
        unpatch_class(base)
        for name, value in before.items():
            setattr(base, name, value)


def _trains(model, options):
    return model.training


def _fused_loss(hidden, lm_head, labels, options, **kwargs):
    result = LigerForCausalLMLoss(
        hidden, lm_head.weight, labels, hidden.shape[-1], **{"bias": lm_head.bias, **kwargs}
    )
    names = ("token_accuracy", "predicted_tokens")
    return {
        "loss": getattr(result, "loss", result),
        **{name: getattr(result, name, None) for name in names},
    }


def causal_lm_loss(
    logits,
    labels,
    vocab_size,
    num_items_in_batch=None,
    ignore_index=-100,
    shift_labels=None,
    **kwargs,
):
    """transformers' ForCausalLMLoss by flatout's cross_entropy, the logits in their own dtype."""
    return ft.cross_entropy(
        logits,
        (labels if shift_labels is None else shift_labels).to(logits.device),
        ignore_index=ignore_index,
        shift=1 if shift_labels is None else 0,
        num_items=num_items_in_batch,
    )
