"""liger_kernel.transformers.model.loss_utils: LigerForCausalLMLoss."""

import inspect

import torch.nn.functional as F

from ..functional import CrossEntropyOutput, liger_fused_linear_cross_entropy

_OPTIONS = frozenset(inspect.signature(liger_fused_linear_cross_entropy).parameters)


def LigerForCausalLMLoss(
    hidden_states,
    lm_head_weight,
    labels,
    hidden_size,
    num_items_in_batch=None,
    ignore_index=-100,
    shift_labels=None,
    final_logit_softcapping=None,
    return_token_accuracy=False,
    return_predicted_tokens=False,
    **kwargs,
):
    """Next-token loss of hidden_states (..., S, hidden_size) for labels (..., S) -> fp32 ().

    Position s is scored against labels s + 1, or against shift_labels s if given. The mean over
    labels that are not ignored, or with num_items_in_batch (a number or a tensor) the sum divided
    by it. kwargs that are options of liger_fused_linear_cross_entropy go there, others are dropped.
    A return flag gives a CrossEntropyOutput.
    """
    options = {name: value for name, value in kwargs.items() if name in _OPTIONS}
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    result = liger_fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_size),
        lm_head_weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        **{
            "reduction": "mean" if num_items_in_batch is None else "sum",
            "ignore_index": ignore_index,
            "softcap": final_logit_softcapping,
            "return_token_accuracy": return_token_accuracy,
            "return_predicted_tokens": return_predicted_tokens,
            **options,
        },
    )
    output = result if isinstance(result, CrossEntropyOutput) else CrossEntropyOutput(result)
    if num_items_in_batch is not None:
        output.loss = output.loss / num_items_in_batch
    return output if return_token_accuracy or return_predicted_tokens else output.loss
