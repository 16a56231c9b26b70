"""FA3's names over flatout: `from flatout.compat.flash_attn_interface import flash_attn_func`.

Shapes as in flash-attn 2. With return_attn_probs the result is (out, softmax_lse): lse fp32
(B, H, S) or (H, T), **-inf** for a query that sees no key, differentiable. num_splits, pack_gqa and
sm_margin choose between implementations and are accepted.

Not served, NotImplementedError: qv, q_descale, k_descale, v_descale (FP8), attention_chunk,
seqused_q, seqused_k, the KV cache.
"""

import flatout.torch as ft
from flatout.compat import refuse

__all__ = [
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
]


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
    refuse(
        "flash_attn_func",
        qv=qv is not None,
        q_descale=q_descale is not None,
        k_descale=k_descale is not None,
        v_descale=v_descale is not None,
        attention_chunk=attention_chunk != 0,
    )
    return ft.attention(
        q,
        k,
        v,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=return_attn_probs,
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
    """Attention within packed sequences: q (T, H, D), k and v (Tk, Hk, D) -> out, or (out, lse)."""
    refuse(
        "flash_attn_varlen_func",
        seqused_q=seqused_q is not None,
        seqused_k=seqused_k is not None,
        qv=qv is not None,
        q_descale=q_descale is not None,
        k_descale=k_descale is not None,
        v_descale=v_descale is not None,
        attention_chunk=attention_chunk != 0,
    )
    return ft.attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_lse=return_attn_probs,
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


def flash_attn_with_kvcache(q, k_cache, v_cache, *args, **kwargs):
    """NotImplementedError: flatout is for training. transformers imports the name."""
    refuse("flash_attn_with_kvcache", k_cache=True)
