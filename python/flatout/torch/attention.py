"""Attention with an online softmax (Dao et al., "FlashAttention", 2022; formulas: csrc/ops.h)."""

import torch

from .. import _C
from .._numpy import attention_options, lse_shape
from ._library import (
    Op,
    apply,
    autocasts,
    empty_like,
    expect_tensors,
    needs_grad,
    once_differentiable,
    stat_dtype,
    stream,
)


def _heads(x):
    """x as the ops can read it, or a copy: with a contiguous last dimension and, on CUDA, rows that
    begin at multiples of 16 bytes and do not repeat."""
    if x.is_neg():
        x = x.resolve_neg()
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return x.contiguous()
    if x.is_cuda and not _aligned(x):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _aligned(x):
    size = x.element_size()
    if x.data_ptr() % 16:
        return False
    for n, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if n > 1 and (stride <= 0 or stride * size % 16):
            return False
    return True


def _workspace(backward, q, k, cu_q, scale, left, right, softcap, deterministic=False):
    """Scratch of the CUDA kernels: a size that no value of a tensor changes. (Wrong shapes C
    refuses.)"""
    if not q.is_cuda or q.dim() != k.dim():
        return None
    B, sequences = (q.shape[0], -1) if cu_q is None else (1, cu_q.numel() - 1)
    shape = (B, q.shape[-3], k.shape[-3], q.shape[-2], k.shape[-2], q.shape[-1], sequences)
    options = (left, right, softcap != 0 or scale <= 0, deterministic)
    size = _C.attention_workspace(backward, *shape, *options)
    return torch.empty(size, dtype=torch.uint8, device=q.device)


def _fwd_outputs(q, *_):
    return empty_like(q), torch.empty(lse_shape(q), dtype=stat_dtype(q), device=q.device)


def _lengths(cu_q, cu_k):
    """cu_seqlens_k is cu_seqlens_q unless given (twice the same tensor Dynamo does not trace)."""
    return cu_q, cu_q if cu_k is None else cu_k


def _fwd(outputs, q, k, v, cu_q, cu_k, deterministic, *numbers):
    workspace = _workspace(False, q, k, cu_q, *numbers[2:])
    tensors = (_heads(t) for t in (q, k, v))
    _C.attention_fwd(*outputs, workspace, *tensors, *_lengths(cu_q, cu_k), *numbers, stream(q))


def _bwd_outputs(dout, dlse, q, k, v, *_):
    return empty_like(q), empty_like(k), empty_like(v)


def _bwd(grads, dout, dlse, q, k, v, out, lse, cu_q, cu_k, *numbers):
    *numbers, deterministic = numbers
    workspace = _workspace(True, q, k, cu_q, *numbers[2:], deterministic)
    dlse = None if dlse is None else dlse.contiguous()
    tensors = (_heads(t) for t in (q, k, v, out))
    options = (*_lengths(cu_q, cu_k), *numbers, deterministic, stream(q))
    _C.attention_bwd(*grads, workspace, _heads(dout), dlse, *tensors, lse.contiguous(), *options)


_LENGTHS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int left, int right, float softcap"
)
attention_fwd = Op(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_LENGTHS}, bool deterministic, {_OPTIONS})"
    " -> (Tensor, Tensor)",
    _fwd_outputs,
    _fwd,
)
attention_bwd = Op(
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_LENGTHS}, {_OPTIONS}, bool deterministic) -> (Tensor, Tensor, Tensor)",
    _bwd_outputs,
    _bwd,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, deterministic, *options):
        out, lse = attention_fwd(q, k, v, cu_q, cu_k, deterministic, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        ctx.options = (*options, deterministic)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse, cu_q, cu_k = ctx.saved_tensors
        if dout is None:  # only the lse was used
            dout = torch.zeros_like(out)
        grads = attention_bwd(dout, dlse, q, k, v, out, lse, cu_q, cu_k, *ctx.options)
        return (*grads, *[None] * (2 + len(ctx.options)))


def _setup(ctx, inputs, outputs):
    q, k, v, cu_q, cu_k, deterministic, *options = inputs
    ctx.save_for_backward(q, k, v, *outputs, cu_q, cu_k)
    ctx.options = (*options, deterministic or torch.are_deterministic_algorithms_enabled())
    ctx.set_materialize_grads(False)
    return 0, 1


attention_fwd.differentiable((0, 1, 2), _Attention, _setup)


def _bound(longest):
    """max_seqlen as C takes it, 0: unknown. CUDA can do without, so that a tensor on the device,
    such as transformers makes for packed sequences, is not waited for."""
    if longest is None or (isinstance(longest, torch.Tensor) and longest.is_cuda):
        return 0
    return longest


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | torch.Tensor | None = None,
    max_seqlen_k: int | torch.Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """softmax(scale * q k^T + mask) v, heads apart; out, or (out, lse) with return_lse.

    q (B, Sq, Hq, D), k, v (B, Sk, Hk, D) of one dtype, any strides; Hq a multiple of Hk: query
    head h reads key head h // (Hq / Hk). out like q; lse = log sum exp (B, Hq, Sq), float32
    (float64 for float64), differentiable too.
    Packed: q (Tq, Hq, D), k, v (Tk, Hk, D), lse (Hq, Tq); sequence b is rows cu_seqlens_q[b] to
    cu_seqlens_q[b + 1] of q, cu_seqlens_k alike (default: cu_seqlens_q), int32 (sequences + 1,).
    max_seqlen_q, max_seqlen_k: bounds of the lengths, ints or tensors: the CPU refuses a longer
    sequence, CUDA has no use for them.

    scale: None is D ** -0.5. window (left, right): query i sees keys i + Sk - Sq - left to
    i + Sk - Sq + right, -1 is open; causal sets right to 0. softcap c: scores become
    c * tanh(scores / c). A query that sees no key has out 0, lse -inf and no gradient.
    Results are bitwise the same from run to run, but for the gradient of q on CUDA: there its sums
    are made as their terms come, and its last bits vary. deterministic=True, or
    torch.use_deterministic_algorithms(True) at the time of the call, fixes their order: on an H100
    the backward of dense q, k and v then takes 1.03 to 1.10 times the GPU time
    (benchmarks/results/h100).
    On CUDA: Hopper, bfloat16 and float16, D a multiple of 8 up to 128; cu_seqlens are read on the
    device, where entries out of order or range are clamped. No call synchronizes.
    Under autocast q, k and v are cast to its dtype. Differentiable once.
    """
    expect_tensors("attention", q=q, k=k, v=v)
    if autocasts(q):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    max_q, max_k = _bound(max_seqlen_q), _bound(max_seqlen_k)
    if cu_seqlens_k is None or cu_seqlens_k is cu_seqlens_q:
        cu_seqlens_k = None  # torch.compile traces no Function that gets one tensor twice
        max_k = max_k or max_q
    numbers = (max_q, max_k, *attention_options(q, causal, scale, window, softcap))
    if needs_grad(q, k, v):
        out, lse = apply(_Attention, q, k, v, cu_seqlens_q, cu_seqlens_k, deterministic, *numbers)
    else:
        out, lse = attention_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, deterministic, *numbers)
    return (out, lse) if return_lse else out
