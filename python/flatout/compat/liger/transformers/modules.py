"""liger_kernel.transformers' nn modules, with Hugging Face's parameter names."""

import torch
from torch import nn

from ..ops import (
    LigerFusedAddRMSNormFunction,
    LigerFusedGateUpSiLUMulFunction,
    LigerRMSNormFunction,
    LigerSiLUMulFunction,
)
from .functional import liger_cross_entropy, liger_fused_linear_cross_entropy, liger_rope


class LigerRMSNorm(nn.Module):
    """RMSNorm over the last dimension: ops.LigerRMSNormFunction with a weight (hidden_size,)."""

    def __init__(
        self,
        hidden_size,
        eps=1e-06,
        offset=0.0,
        casting_mode="llama",
        init_fn="ones",
        in_place=True,
        row_mode=None,
        elementwise_affine=True,
    ):
        super().__init__()
        self.elementwise_affine = elementwise_affine
        weight = _initial(init_fn, hidden_size)
        self.register_parameter("weight", weight if elementwise_affine else None)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place
        self.row_mode = row_mode

    def forward(self, hidden_states):
        return LigerRMSNormFunction.apply(
            hidden_states,
            self.weight,
            self.variance_epsilon,
            self.offset,
            self.casting_mode,
            self.in_place,
            self.row_mode,
        )

    def extra_repr(self):
        shape = None if self.weight is None else tuple(self.weight.shape)
        return (
            f"weight_shape={shape}, eps={self.variance_epsilon}, offset={self.offset}, "
            f"in_place={self.in_place}, row_mode={self.row_mode}"
        )


class LigerFusedAddRMSNorm(nn.Module):
    """forward(hidden_states, residual) -> (norm of the sum, the sum)."""

    def __init__(
        self,
        hidden_size,
        eps=1e-06,
        offset=0.0,
        casting_mode="llama",
        init_fn="ones",
        in_place=False,
    ):
        super().__init__()
        self.weight = _initial(init_fn, hidden_size)
        self.variance_epsilon = eps
        self.offset = offset
        self.casting_mode = casting_mode
        self.in_place = in_place

    def forward(self, hidden_states, residual):
        return LigerFusedAddRMSNormFunction.apply(
            hidden_states,
            residual,
            self.weight,
            self.variance_epsilon,
            self.offset,
            self.casting_mode,
            self.in_place,
        )

    def extra_repr(self):
        return (
            f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}, offset={self.offset}, "
            f"in_place={self.in_place}"
        )


def _initial(init_fn, hidden_size):
    assert init_fn in ("ones", "zeros"), f"init_fn must be either 'ones' or 'zeros', got {init_fn}"
    return nn.Parameter(getattr(torch, init_fn)(hidden_size))


class LigerSwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), sizes from config.

    ValueError unless config.hidden_act is "silu" or "swish".
    """

    def __init__(self, config, intermediate_size=None):
        super().__init__()
        _gate_up_down(self, config, intermediate_size)

    def forward(self, x):
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _gate_up_down(mlp, config, intermediate_size=None, bias=False):
    _check_silu(config)
    mlp.config = config
    mlp.hidden_size = config.hidden_size
    mlp.intermediate_size = (
        config.intermediate_size if intermediate_size is None else intermediate_size
    )
    mlp.gate_proj = nn.Linear(mlp.hidden_size, mlp.intermediate_size, bias=bias)
    mlp.up_proj = nn.Linear(mlp.hidden_size, mlp.intermediate_size, bias=bias)
    mlp.down_proj = nn.Linear(mlp.intermediate_size, mlp.hidden_size, bias=bias)


class LigerPhi3SwiGLUMLP(nn.Module):
    """LigerSwiGLUMLP with gate and up in one weight, gate first."""

    def __init__(self, config):
        super().__init__()
        _check_silu(config)
        self.config = config
        self.hidden_size = config.hidden_size
        self.intermediate_size = config.intermediate_size
        self.gate_up_proj = nn.Linear(self.hidden_size, 2 * self.intermediate_size, bias=False)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(LigerSiLUMulFunction.apply(gate, up))


class LigerQwen3MoeSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP under the name that Liger gives it in Qwen3-MoE."""


class LigerBlockSparseTop2MLP(nn.Module):
    """w2(silu(w1(x)) * w3(x)): an expert of Mixtral's."""

    def __init__(self, config):
        super().__init__()
        _check_silu(config)
        self.ffn_dim = config.intermediate_size
        self.hidden_dim = config.hidden_size
        self.w1 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)
        self.w2 = nn.Linear(self.ffn_dim, self.hidden_dim, bias=False)
        self.w3 = nn.Linear(self.hidden_dim, self.ffn_dim, bias=False)

    def forward(self, x):
        return self.w2(LigerSiLUMulFunction.apply(self.w1(x), self.w3(x)))


class LigerFalconH1SwiGLUMLP(nn.Module):
    """down_proj(silu(gate_proj(x) * g) * up_proj(x) * d), g and d config.mlp_multipliers."""

    def __init__(self, config):
        super().__init__()
        _gate_up_down(self, config, bias=getattr(config, "mlp_bias", False))
        self.gate_multiplier, self.down_multiplier = map(float, config.mlp_multipliers)

    def forward(self, x):
        return self.down_proj(
            LigerSiLUMulFunction.apply(
                self.gate_proj(x), self.up_proj(x), self.gate_multiplier, self.down_multiplier
            )
        )


class LigerExperts(nn.Module):
    """The experts of a mixture, transformers 5's layout: a loop over them around the fused SwiGLU.

    gate_up_proj (E, 2 * I, H), gate first; down_proj (E, H, I). forward(hidden_states (..., H),
    top_k_index (..., K), top_k_weights (..., K)) -> (..., H), the sum over k of weight k times what
    expert k makes of the token. As in transformers' loop index E stands for an expert of another
    process and adds nothing, and the device is waited for. IndexError for one not in 0 .. E.
    """

    def __init__(self, config):
        super().__init__()
        _check_silu(config)
        self.num_experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts")
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = _first(config, "moe_intermediate_size", "intermediate_size")
        experts, hidden, inner = self.num_experts, self.hidden_dim, self.intermediate_dim
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        x = hidden_states.reshape(-1, self.hidden_dim)
        index, weights = (t.reshape(len(x), t.shape[-1]) for t in (top_k_index, top_k_weights))
        out = torch.zeros_like(x)
        for expert in index.unique().tolist():
            if expert == self.num_experts:
                continue
            if not 0 <= expert < self.num_experts:
                raise IndexError(f"top_k_index: expected 0 .. {self.num_experts}, got {expert}")
            token, k = (index == expert).nonzero(as_tuple=True)
            inner = LigerFusedGateUpSiLUMulFunction.apply(
                nn.functional.linear(x[token], self.gate_up_proj[expert])
            )
            rows = nn.functional.linear(inner, self.down_proj[expert]) * weights[token, k, None]
            out.index_add_(0, token, rows.to(out.dtype))
        return out.view(hidden_states.shape)


def _first(config, *names):
    for name in names:
        if hasattr(config, name):
            return getattr(config, name)
    raise AttributeError(f"config has none of {', '.join(names)}")


def _check_silu(config):
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(f"Activation function {config.hidden_act} not supported.")


def liger_rotary_pos_emb(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
    """Rotary embedding of q and k (B, H, S, D) -> (q, k): see ops.LigerRopeFunction."""
    return liger_rope(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)


def liger_rotary_pos_emb_gpt_oss(q, k, cos, sin):
    """liger_rotary_pos_emb of whole heads with GPT-OSS's tables (..., S, D / 2)."""
    return liger_rope(q, k, cos, sin, rotary_dim=q.shape[-1])


def liger_rotary_pos_emb_vision(q, k, cos, sin):
    """Rotary embedding of q and k (S, H, D) with cos and sin (S, D), for vision towers."""
    heads = (t.unsqueeze(0).transpose(1, 2) for t in (q, k))
    return tuple(t.transpose(1, 2).squeeze(0) for t in liger_rope(*heads, cos, sin))


class LigerCrossEntropyLoss(nn.Module):
    """forward(_input (N, V), target (N,)): functional.liger_cross_entropy with these options."""

    def __init__(
        self,
        weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        return_token_accuracy=False,
        return_predicted_tokens=False,
    ):
        super().__init__()
        _check_loss(label_smoothing, reduction, softcap)
        self.weight = weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input, target):
        return liger_cross_entropy(
            _input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
            return_token_accuracy=self.return_token_accuracy,
            return_predicted_tokens=self.return_predicted_tokens,
        )


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """forward(lin_weight (V, H), _input (N, H), target (N,), bias=None): the fused linear loss."""

    def __init__(
        self,
        ce_weight=None,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        accum_dtype=None,
        use_token_scaling=False,
        return_token_accuracy=False,
        return_predicted_tokens=False,
    ):
        super().__init__()
        _check_loss(label_smoothing, reduction, softcap)
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, lin_weight, _input, target, bias=None):
        return liger_fused_linear_cross_entropy(
            _input,
            lin_weight,
            target,
            bias,
            self.ce_weight,
            self.ignore_index,
            self.lse_square_scale,
            self.label_smoothing,
            self.reduction,
            self.softcap,
            self.return_z_loss,
            self.accum_dtype,
            self.use_token_scaling,
            self.return_token_accuracy,
            self.return_predicted_tokens,
        )


def _check_loss(label_smoothing, reduction, softcap):
    assert 0 <= label_smoothing <= 1, (
        f"label_smoothing must be between 0.0 and 1.0. Got: {label_smoothing}"
    )
    assert reduction in ("mean", "sum", "none"), (
        f"reduction must be one of 'mean', 'sum', or 'none'. Got: {reduction}"
    )
    assert softcap is None or softcap > 0, (
        f"softcap must be greater than 0.0 or None, got {softcap}"
    )
