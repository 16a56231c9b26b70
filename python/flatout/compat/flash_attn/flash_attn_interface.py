"""flash-attn 2's attention functions, each over `flatout.torch.attention`.

Shapes: q (B, S, H, D), k and v (B, S, Hk, D) with H a multiple of Hk; packed ("varlen") q (T, H, D)
with cu_seqlens int32 (B + 1,); D up to 128 on CUDA. `causal` and `window_size` (left, right; -1 =
open, both ends inclusive) are aligned to the bottom right. With `return_attn_probs` the result is
(out, softmax_lse, S_dmask): lse fp32 (B, H, S) or (H, T), **+inf** for a query that sees no key
(its out is 0), and S_dmask an empty tensor, as without dropout in flash-attn. Unlike there, the
lse is differentiable, and fp32 and fp64 are taken on the CPU.

Not served, NotImplementedError: dropout_p other than 0, alibi_slopes, block_table, the KV cache.
"""

import math

from flatout.compat import refuse
from flatout.compat._attention import attend


def _attention(name, q, k, v, return_attn_probs, **options):
    out, lse = attend(name, q, k, v, **options)
    if not return_attn_probs:
        return out
    return out, lse.masked_fill(lse == -math.inf, math.inf), q.new_empty(0)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Attention of q (B, S, H, D) to k and v (B, Sk, Hk, D) -> out like q."""
    refuse("flash_attn_func", dropout_p=dropout_p != 0, alibi_slopes=alibi_slopes is not None)
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


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func with kv (B, Sk, 2, Hk, D)."""
    refuse(
        "flash_attn_kvpacked_func", dropout_p=dropout_p != 0, alibi_slopes=alibi_slopes is not None
    )
    return _attention(
        "flash_attn_kvpacked_func",
        q,
        *kv.unbind(2),
        return_attn_probs,
        scale=softmax_scale,
        causal=causal,
        window=window_size,
        softcap=softcap,
        deterministic=deterministic,
    )


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_func with qkv (B, S, 3, H, D)."""
    refuse(
        "flash_attn_qkvpacked_func",
        dropout_p=dropout_p != 0,
        alibi_slopes=alibi_slopes is not None,
    )
    return _attention(
        "flash_attn_qkvpacked_func",
        *qkv.unbind(2),
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
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Attention within packed sequences: q (T, H, D), k and v (Tk, Hk, D) -> out like q."""
    refuse(
        "flash_attn_varlen_func",
        dropout_p=dropout_p != 0,
        alibi_slopes=alibi_slopes is not None,
        block_table=block_table is not None,
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


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func with kv (Tk, 2, Hk, D)."""
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """flash_attn_varlen_func with qkv (T, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
):
    """NotImplementedError: flatout is for training. The name is here because transformers imports
    it beside the functions above."""
    refuse("flash_attn_with_kvcache", k_cache=True)


def _get_block_size_n(device, head_dim, is_dropout, is_causal):
    """NotImplementedError: it describes the layout of S_dmask, which dropout alone fills. The name
    is here because flash-attn's own tests import it."""
    refuse("_get_block_size_n", dropout_p=True)
