"""FA3's names over flatout: `from flatout.compat.flash_attn_interface import flash_attn_func`.

Shapes as in flash-attn 2, but v's D may differ from q's and k's. With return_attn_probs the result
is (out, softmax_lse): lse fp32 (B, H, S) or (H, T), **-inf** for a query that sees no key,
differentiable. num_splits, pack_gqa and sm_margin choose between implementations and are accepted.

Not served, NotImplementedError: qv, q_descale, k_descale, v_descale and FP8 inputs,
attention_chunk, the KV cache.
"""

import math

import torch

from flatout.compat import refuse
from flatout.compat._attention import attend

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def _attention(name, q, k, v, return_attn_probs, **options):
    out, lse = attend(name, q, k, v, **options)
    return (out, lse) if return_attn_probs else out


def _refuse(name, qv, q_descale, k_descale, v_descale, attention_chunk):
    refuse(
        name,
        qv=qv is not None,
        q_descale=q_descale is not None,
        k_descale=k_descale is not None,
        v_descale=v_descale is not None,
        attention_chunk=attention_chunk != 0,
    )


def _ends(cu, used, name):
    """Where the used rows of each sequence end."""
    if used is None:
        return cu[1:]
    if used.shape != cu[1:].shape:
        expected = tuple(cu[1:].shape)
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(used.shape)}")
    return (cu[:-1] + used).to(cu.dtype)


def _without_unused(cu_q, cu_k, used_q, used_k):
    """(cu_q, cu_k) in which each sequence has become three: the used rows of q and k, the unused
    rows of q without keys, the unused rows of k without queries."""
    end_q = _ends(cu_q, used_q, "seqused_q")
    end_k = _ends(cu_k, used_k, "seqused_k")
    starts_q = torch.stack((cu_q[:-1], end_q, cu_q[1:]), 1).flatten()
    starts_k = torch.stack((cu_k[:-1], end_k, end_k), 1).flatten()
    return torch.cat((starts_q, cu_q[-1:])), torch.cat((starts_k, cu_k[-1:]))


def flash_attn_func(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention of q (B, S, H, D) to k and v (B, Sk, Hk, D) -> out, or (out, lse)."""
    _refuse("flash_attn_func", qv, q_descale, k_descale, v_descale, attention_chunk)
    return _attention(
        "flash_attn_func",
        q,
        k,
        v,
        return_attn_probs,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        deterministic=deterministic,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_q=None,
    seqused_k=None,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    num_splits=1,
    pack_gqa=None,
    deterministic=False,
    sm_margin=0,
    return_attn_probs=False,
):
    """Attention within packed sequences: q (T, H, D), k and v (Tk, Hk, D) -> out, or (out, lse).

    seqused_q, seqused_k (B,) int32: how many rows of each sequence there are, from its first on;
    causal and window_size are aligned to the last of them. Of the other rows out is 0, lse -inf,
    and they have no gradient. A number beyond its sequence is a ValueError on the CPU; on CUDA it
    is not refused, and the results are undefined.
    """
    partly = seqused_q is not None or seqused_k is not None
    dense = cu_seqlens_q is None or cu_seqlens_k is None
    _refuse("flash_attn_varlen_func", qv, q_descale, k_descale, v_descale, attention_chunk)
    refuse(
        "flash_attn_varlen_func",
        **{"seqused_q or seqused_k without cu_seqlens": partly and dense},
    )
    if partly:
        max_seqlen_q = max_seqlen_k = None  # they bound the used rows
        cu_seqlens_q, cu_seqlens_k = _without_unused(
            cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k
        )
    return _attention(
        "flash_attn_varlen_func",
        q,
        k,
        v,
        return_attn_probs,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        deterministic=deterministic,
    )


def flash_attn_qkvpacked_func(
    qkv,
    softmax_scale=None,
    causal=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    attention_chunk=0,
    softcap=0.0,
    deterministic=False,
    num_heads_q=None,
    sm_margin=0,
    return_attn_probs=False,
):
    """flash_attn_func with qkv (B, S, 3, H, D), or (B, S, Hq + 2 Hk, D) and num_heads_q = Hq."""
    if qkv.ndim == 5:
        q, k, v = qkv.unbind(2)
    elif num_heads_q is None:
        raise ValueError("flash_attn_qkvpacked_func: qkv of 4 dimensions needs num_heads_q")
    else:
        heads_k = (qkv.shape[2] - num_heads_q) // 2
        q, k, v = qkv.split((num_heads_q, heads_k, heads_k), 2)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
    )


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Attention to all keys from its results for parts of them.

    out_partial (N, ..., H, D) and lse_partial (N, ..., H), those of N parts -> (out (..., H, D) of
    out_dtype or out_partial's dtype, also written to `out` where given; lse (..., H)). Computed in
    lse_partial's dtype; differentiable.
    """
    empty = (lse_partial == -math.inf).all(0)
    parts = lse_partial.masked_fill(empty, 0.0)
    weights = parts.softmax(0).masked_fill(empty, 0.0)
    total = (weights.unsqueeze(-1) * out_partial).sum(0)
    lse = parts.logsumexp(0).masked_fill(empty, -math.inf)
    if out is not None:
        return out.copy_(total), lse
    return total.to(out_dtype or out_partial.dtype), lse


def flash_attn_with_kvcache(q, k_cache, v_cache, *args, **kwargs):
    """NotImplementedError: flatout is for training. transformers imports the name."""
    refuse("flash_attn_with_kvcache", k_cache=True)


def get_scheduler_metadata(*args, **kwargs):
    """NotImplementedError: it prepares a call of flash_attn_with_kvcache."""
    refuse("get_scheduler_metadata", k_cache=True)
