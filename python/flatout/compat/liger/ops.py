"""Liger's *Function classes: `.apply` with Liger's arguments, over differentiable flatout ops.

They are not autograd.Function subclasses. What calls what, here for one of them:
LigerCrossEntropyLoss -> functional.liger_cross_entropy -> LigerCrossEntropyFunction ->
flatout.torch.cross_entropy. in_place, row_mode, chunk_mem_const, ce_impl and ce_mode choose between
implementations of the same result and are accepted; unlike in Liger no input and no incoming
gradient is overwritten, so that what was passed in can still be used.
"""

import functools

import torch
import torch.nn.functional as F

import flatout.torch as ft
from flatout.compat import refuse
from flatout.torch._library import autocasts

_HALF = (torch.bfloat16, torch.float16)
_CASTING_MODES = {-1: "none", 0: "llama", 1: "gemma"}


class LigerRMSNormFunction:
    """RMSNorm with Liger's casting modes; X (..., H), W (H,) or None -> Y of X's dtype.

    "llama": fp32 statistics, X * rstd rounded to X's dtype, times offset + W, rounded.
    "gemma": all in fp32, one rounding. "none": all in X's dtype, the statistics too.
    Without W there is no offset either: Y is X * rstd. AssertionError for another mode. 16-bit
    "none" and 16-bit "gemma" with offset 0 take more than one pass.
    """

    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        mode = _casting_mode(casting_mode)
        if W is None:
            # Times 1 nothing is rounded again, so "gemma" is "llama", which takes one pass.
            W, offset, mode = X.new_ones(X.shape[-1]), 0.0, "none" if mode == "none" else "llama"
        native = _native_norm(X.dtype, W, offset, mode)
        if native is None:
            return _plain_norm(X, W, eps, offset, mode)
        return ft.rms_norm(X, native[0], eps, offset=native[1])


class LigerFusedAddRMSNormFunction:
    """S = X + R rounded to X's dtype, Y = RMSNorm of S -> (Y, S); modes as LigerRMSNormFunction."""

    @staticmethod
    def apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        mode = _casting_mode(casting_mode)
        native = _native_norm(X.dtype, W, offset, mode)
        if native is not None and R.dtype == X.dtype:
            return ft.add_rms_norm(X, R, native[0], eps, offset=native[1])
        S = (X + R).to(X.dtype)
        return LigerRMSNormFunction.apply(S, W, eps, offset, mode), S


def _casting_mode(mode):
    mode = _CASTING_MODES.get(mode, mode)
    assert mode in _CASTING_MODES.values(), f"Invalid casting mode: {mode}"
    return mode


def _native_norm(dtype, weight, offset, mode):
    """(weight, offset) with which flatout's op rounds where this casting mode does, or None."""
    if dtype in _HALF and (mode == "none" or (mode == "gemma" and offset == 0)):
        return None
    if mode == "gemma" or offset == 0:
        return weight, offset
    return (weight.float() if weight.dtype in _HALF else weight) + offset, 0.0


def _plain_norm(x, weight, eps, offset, mode):
    if mode == "gemma":
        return ft.rms_norm(x.float(), weight.float(), eps).to(x.dtype)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * rstd * (weight.to(x.dtype) + offset)).to(x.dtype)


class LigerSiLUMulFunction:
    """silu(a * gate_multiplier) in fp32, rounded to b's dtype, * b * down_multiplier."""

    @staticmethod
    def apply(a, b, gate_multiplier=1.0, down_multiplier=1.0):
        if gate_multiplier == 1.0:
            c = ft.swiglu(a, b)
        else:
            wide = a.float() if a.dtype in _HALF else a
            c = F.silu(wide * gate_multiplier).to(b.dtype) * b
        return c if down_multiplier == 1.0 else c * down_multiplier


class LigerFusedGateUpSiLUMulFunction:
    """silu(gate) * up of y (..., 2 * I) = [gate | up] -> (..., I)."""

    @staticmethod
    def apply(y, in_place=False):
        return ft.swiglu(y)


class LigerRopeFunction:
    """Rotary embedding of q (B, H, S, D) and k (B, Hk, S, D) -> (q, k), new tensors.

    cos and sin (S, R), (1, S, R), (B, S, R), or with one dimension of 1 more, [c | c] and [s | s];
    where R < D the first R features of a head are rotated. With rotary_dim the tables are
    (..., rotary_dim / 2 or more) and only their first half is read. Computed in fp32, one rounding
    (Liger: in cos's dtype). position_ids is not needed: cos and sin are already gathered.
    unsqueeze_dim other than 1 is NotImplementedError, since q and k are always (B, H, S, D).
    """

    @staticmethod
    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        if unsqueeze_dim != 1:
            raise NotImplementedError("liger_rope: flatout does not support unsqueeze_dim != 1")
        rotated = _rotary_dim(cos, q.shape[-1], rotary_dim)
        cos, sin = (_table(t, rotated) for t in (cos, sin))
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if rotated == q.shape[-1]:
            q, k = ft.rope(q, k, cos, sin)
        else:
            heads = ft.rope(q[..., :rotated], k[..., :rotated], cos, sin)
            q, k = (
                torch.cat((head, t[..., rotated:]), -1)
                for head, t in zip(heads, (q, k), strict=True)
            )
        return q.transpose(1, 2), k.transpose(1, 2)


def _rotary_dim(cos, head_dim, rotary_dim):
    if rotary_dim is None:
        return min(cos.shape[-1], head_dim)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(f"rotary_dim must be even and at most {head_dim}, got {rotary_dim}")
    if 2 * cos.shape[-1] < rotary_dim:
        raise ValueError(
            f"cos and sin need rotary_dim / 2 = {rotary_dim // 2} columns, got {cos.shape[-1]}"
        )
    return rotary_dim


def _table(table, rotated):
    """cos or sin as flatout's rope takes it: (S, rotated) or (1 or B, S, rotated), both halves."""
    if table.ndim == 4:
        table = table.squeeze(1)
    if table.shape[-1] == rotated:
        return table
    half = table[..., : rotated // 2]
    return torch.cat((half, half), -1)


class LigerCrossEntropyFunction:
    """Cross-entropy of _input (N, V) with target (N,) -> (loss, z_loss, accuracy, predictions).

    loss: () or, for reduction "none", (N,), in _input's dtype, the z term lse_square_scale * lse^2
    included; 0 where every target is ignored. The other three are None unless asked for: z_loss
    like loss, without a gradient; accuracy fp32, the share of rows not ignored (for "none" 1 or 0 a
    row); predictions int64 (N,), -1 for ignored rows. A target out of range is an AssertionError.
    On CUDA it takes a wait for the device, as in Liger; not where that cannot be waited for, in
    torch.compile and in the capture of a CUDA graph: there its row's loss is NaN.
    """

    @staticmethod
    def apply(
        _input,
        target,
        weight,
        ignore_index=-100,
        lse_square_scale=0.0,
        label_smoothing=0.0,
        reduction="mean",
        softcap=None,
        return_z_loss=False,
        return_token_accuracy=False,
        return_predicted_tokens=False,
    ):
        if target.is_cuda and not _captured():
            wrong = (target < 0) | (target >= _input.shape[-1])
            if (wrong & (target != ignore_index)).any():  # no assert: python -O would skip it
                raise AssertionError(
                    f"a target is out of bounds: it must be in 0 .. {_input.shape[-1] - 1}"
                )
        loss, z_loss, accuracy, predicted = _loss(
            functools.partial(ft.cross_entropy, _input, target),
            target,
            (return_z_loss, return_token_accuracy, return_predicted_tokens),
            ignore_index=ignore_index,
            reduction=reduction,
            z_loss=lse_square_scale,
            class_weight=weight,
            label_smoothing=label_smoothing,
            softcap=softcap or 0.0,
        )
        z_loss = None if z_loss is None else z_loss.to(_input.dtype)
        return loss.to(_input.dtype), z_loss, accuracy, predicted


def _captured():
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


class _TritonKernel:
    """Stands for a Triton kernel of Liger's: NotImplementedError when it is launched."""

    def __init__(self, name):
        self.name = name

    def __getitem__(self, grid):
        refuse(self.name, **{"launches of Triton kernels": True})


liger_cross_entropy_kernel = _TritonKernel("liger_cross_entropy_kernel")


class LigerFusedLinearCrossEntropyFunction:
    """Cross-entropy of the logits _input weight^T + bias, without ever holding them all.

    _input (N, H), weight (V, H), target (N,), bias (V,) or None, ce_weight (V,) or None -> (loss,
    z_loss, accuracy, predictions) as LigerCrossEntropyFunction, but loss in fp32, and NaN for a
    target out of range on CUDA, where nothing is waited for. dW accumulates over the chunks in the
    logits' dtype unless accum_dtype is torch.float32; a third dtype is NotImplementedError.
    chunk_mem_const changes nothing, but is ValueError unless it is a positive integer.
    use_token_scaling multiplies every row's loss by the probability of its target, without a
    gradient through that. Unlike in Liger a frozen _input leaves weight its gradient. Under
    autocast _input, weight and bias are cast first, as by a linear layer.
    """

    supports_inner_impl_dispatch = True

    @staticmethod
    def apply(
        _input,
        weight,
        target,
        bias=None,
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
        ce_impl=None,
        ce_mode=None,
        chunk_mem_const=1,
    ):
        if type(chunk_mem_const) is not int or chunk_mem_const < 1:
            raise ValueError(f"chunk_mem_const must be a positive integer, got {chunk_mem_const!r}")
        if accum_dtype not in (None, torch.float32):
            refuse(
                "LigerFusedLinearCrossEntropyFunction",
                **{f"accum_dtype={accum_dtype}": accum_dtype != _logits_dtype(_input)},
            )
            accum_dtype = None
        op = functools.partial(
            ft.linear_cross_entropy, _input, weight, target, bias=bias, accum_dtype=accum_dtype
        )
        loss, z_loss, accuracy, predicted = (_token_scaled_loss if use_token_scaling else _loss)(
            op,
            target,
            (return_z_loss, return_token_accuracy, return_predicted_tokens),
            ignore_index=ignore_index,
            reduction=reduction,
            z_loss=lse_square_scale,
            class_weight=ce_weight,
            label_smoothing=label_smoothing,
            softcap=softcap or 0.0,
        )
        return loss, None if z_loss is None else z_loss.to(_input.dtype), accuracy, predicted


def _logits_dtype(x):
    """What linear_cross_entropy multiplies x in."""
    if autocasts(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _loss(op, target, want, *, ignore_index, reduction, z_loss, **options):
    """(loss, z_loss, accuracy, predictions) of op, one of flatout's two cross-entropies with its
    tensors bound; want: which of the last three."""
    want_z, *want_more = want
    loss, *more = _target_checked(
        op,
        ignore_index=ignore_index,
        reduction=reduction,
        z_loss=z_loss,
        return_lse=want_z,
        return_predicted=any(want_more),
        **options,
    )
    more = list(more)  # torch.compile up to 2.11 takes it for a tuple
    valid = target != ignore_index
    if reduction == "mean":
        loss = torch.where(valid.any(), loss, torch.zeros_like(loss))
    z_value = None
    if want_z:
        z_value = _reduce(_z_terms(more.pop(0).detach(), z_loss, valid), valid, reduction)
    return loss, z_value, *_metrics(more, target, valid, reduction, *want_more)


def _token_scaled_loss(
    op, target, want, *, ignore_index, reduction, z_loss, class_weight, label_smoothing, softcap
):
    """_loss with row n's terms times p_n = softmax(logits)[target], p_n held constant."""
    want_z, *want_more = want
    shared = {"ignore_index": ignore_index, "reduction": "none", "softcap": softcap}
    valid = target != ignore_index
    rows, lse, *predicted = _target_checked(
        op,
        class_weight=class_weight,
        label_smoothing=label_smoothing,
        return_lse=True,
        return_predicted=any(want_more),
        **shared,
    )
    with torch.no_grad():
        scale = torch.exp(-op(**shared))
    loss = rows * scale
    z_value = _reduce(_z_terms(lse, z_loss, valid) * scale, valid, reduction)
    if reduction == "mean" and class_weight is not None:
        label = target.masked_fill(~valid, 0)
        loss = loss.sum() / class_weight[label].masked_fill(~valid, 0.0).sum()
        loss = torch.where(valid.any(), loss, torch.zeros_like(loss))
    else:
        loss = _reduce(loss, valid, reduction)
    metrics = _metrics(predicted, target, valid, reduction, *want_more)
    return loss + z_value, z_value.detach() if want_z else None, *metrics


def _z_terms(lse, z_scale, valid):
    return (z_scale * lse.square()).masked_fill(~valid, 0.0)


def _reduce(rows, valid, reduction):
    if reduction == "none":
        return rows
    return rows.sum() / valid.sum().clamp(min=1) if reduction == "mean" else rows.sum()


def _metrics(predicted, target, valid, reduction, want_accuracy, want_predicted):
    """(accuracy, predictions), each None unless wanted; predicted: [] or [(N,)]."""
    accuracy = None
    if want_accuracy:
        accuracy = ((predicted[0] == target) & valid).float()
        accuracy = accuracy if reduction == "none" else accuracy.sum() / valid.sum()
    return accuracy, predicted[0] if want_predicted else None


def _target_checked(op, **options):
    """op(**options) as a tuple, its IndexError for a target out of range Liger's AssertionError."""
    try:
        result = op(**options)
    except IndexError as error:
        raise AssertionError(f"target is out of bounds: {error}") from error
    return result if isinstance(result, tuple) else (result,)
