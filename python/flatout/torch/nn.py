"""nn modules over flatout's ops, with the parameter names of Hugging Face's models."""

import torch
from torch import nn

from .linear_cross_entropy import linear_cross_entropy
from .rms_norm import rms_norm
from .swiglu import swiglu


class RMSNorm(nn.Module):
    """weight (H,), as LlamaRMSNorm and Qwen3RMSNorm; offset=1 is Gemma's, whose weight starts at 0.
    forward: x (..., H) -> (..., H) of x's dtype; see flatout.torch.rms_norm."""

    def __init__(self, hidden_size, eps=1e-6, *, offset=0.0, device=None, dtype=None):
        super().__init__()
        self.variance_epsilon, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.weight, 0.0 if self.offset else 1.0)

    def forward(self, hidden_states):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon, offset=self.offset)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, offset={self.offset}"


class SwiGLUMLP(nn.Module):
    """gate_proj, up_proj (H -> I) and down_proj (I -> H), as LlamaMLP and Qwen3MLP.
    forward: x (..., H) -> down_proj(silu(gate_proj(x)) * up_proj(x)), (..., H)."""

    def __init__(self, hidden_size, intermediate_size, bias=False, *, device=None, dtype=None):
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LinearCrossEntropyLoss(nn.Linear):
    """An lm_head that gives the loss instead of logits: weight (V, H) and bias (V,) or None are
    nn.Linear's, so that a state_dict of one loads in the other, and `loss.weight = embed.weight`
    ties it. forward: x (..., H), target (...) -> loss; `options` are those of
    flatout.torch.linear_cross_entropy (reduction, ignore_index, shift, ...)."""

    def __init__(
        self, in_features, out_features, bias=False, *, device=None, dtype=None, **options
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        known = linear_cross_entropy.__kwdefaults__.keys() - {"bias"}
        if unknown := options.keys() - known:
            raise TypeError(f"unexpected options {sorted(unknown)}; known: {sorted(known)}")
        self.options = options

    def forward(self, x, target):
        return linear_cross_entropy(x, self.weight, target, bias=self.bias, **self.options)

    def extra_repr(self):
        return ", ".join([super().extra_repr(), *(f"{k}={v}" for k, v in self.options.items())])
