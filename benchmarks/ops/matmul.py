"""The ops of run_ops.py that are bound by arithmetic: attention and linear cross-entropy."""

import inspect
import math
import random

import torch
import torch.nn.functional as F

from ops.table import Op, Skip, grad, wide

LIGER = "liger_kernel.transformers.functional"
QUACK = "quack.linear_cross_entropy"


# ---- Attention ----------------------------------------------------------------------------------


def sdpa(q, k, v, causal=True):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(
        1, 2
    )


def attention_flops(B, S, Hq, Hk, D, causal=True):
    forward = (2 if causal else 4) * B * Hq * S * S * D  # two products of the pairs that are seen
    return forward, 2.5 * forward


def attention(shapes, causal):
    """The op over shapes, where every token sees those before it and itself, or all."""

    def sdpa_by(backend):
        def run(q, k, v):
            if not q.is_cuda:
                raise Skip("needs CUDA")
            with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
                return sdpa(q, k, v, causal)

        return run

    def flash(m, q, k, v):
        return m.flash_attn_func(q, k, v, causal=causal)

    def in_order(ft, q, k, v):
        return ft.attention(q, k, v, causal=causal, deterministic=True)

    return Op(
        "S B Hq Hk D", [(256, 4, 8, 4, 32)], shapes,
        lambda S, B, Hq, Hk, D: [grad(B, S, Hq, D), grad(B, S, Hk, D), grad(B, S, Hk, D)],
        lambda q, k, v: sdpa(q, k, v, causal),
        lambda ft, q, k, v: ft.attention(q, k, v, causal=causal),
        {
            "flatout, deterministic": ("flatout.torch", in_order),
            "cuDNN in torch": sdpa_by("CUDNN_ATTENTION"),
            "flash-attn 2 in torch": sdpa_by("FLASH_ATTENTION"),
            "flash-attn": ("flash_attn", flash),
            "flash-attn 3": ("flash_attn_interface", flash),
            "flash-attn 4": ("flash_attn.cute", lambda m, *qkv: flash(m, *qkv)[0]),
        },
        flops=lambda S, B, Hq, Hk, D: attention_flops(B, S, Hq, Hk, D, causal),
        modes=ALL,
        same_forward=("flatout, deterministic",),
        note="\"deterministic\" concerns the backward alone, so it has no forward of its own. "
             "cuDNN and flash-attn 2 in torch: backends of torch's scaled_dot_product_attention.",
    )  # fmt: skip


DOCUMENTS = 16


def documents(T):
    """Where T packed tokens begin and end that are documents of random lengths."""
    between = random.Random(T).choices(range(T + 1), k=DOCUMENTS - 1)
    return [0, *sorted(between), T]


def lengths(T):
    ends = documents(T)
    return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def packed_inputs(T, Hq, Hk, D):
    """q, k, v, where the documents begin, and the same in T + 1 entries, the last of them equal: a
    shape that every batch has, as a compiled step wants it."""
    starts = torch.tensor(documents(T), dtype=torch.int32)
    fixed = F.pad(starts, (0, max(0, T - DOCUMENTS)), value=T)
    return [grad(T, Hq, D), grad(T, Hk, D), grad(T, Hk, D), starts, fixed]


def packed_flops(T, Hq, Hk, D):
    each = [attention_flops(1, n, Hq, Hk, D) for n in lengths(T)]
    return tuple(sum(n) for n in zip(*each, strict=True))


def sdpa_by_document(q, k, v, starts, fixed):
    ends = documents(q.shape[0])  # known without asking the device
    spans = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]
    return torch.cat([sdpa(q[None, s], k[None, s], v[None, s])[0] for s in spans])


def torch_varlen(q, k, v, starts, fixed):
    if not q.is_cuda:
        raise Skip("needs CUDA")
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters  # torch 2.12 and newer have the first two
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "enable_gqa" in known:
        causal["enable_gqa"] = True
    else:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    most = max(lengths(q.shape[0]))
    return varlen_attn(q, k, v, starts, starts, most, most, **causal)


def flash_varlen(m, q, k, v, starts, fixed):
    most = max(lengths(q.shape[0]))
    return m.flash_attn_varlen_func(q, k, v, starts, starts, most, most, causal=True)


def flash_4_varlen(m, q, k, v, starts, fixed):
    most, ends = max(lengths(q.shape[0])), {"cu_seqlens_q": starts, "cu_seqlens_k": starts}
    return m.flash_attn_varlen_func(
        q, k, v, **ends, max_seqlen_q=most, max_seqlen_k=most, causal=True
    )[0]


def flatout_varlen(ft, q, k, v, starts, fixed):
    ends, most = {"cu_seqlens_q": starts, "cu_seqlens_k": starts}, max(lengths(q.shape[0]))
    return ft.attention(q, k, v, **ends, max_seqlen_q=most, max_seqlen_k=most, causal=True)


def flatout_fixed(ft, q, k, v, starts, fixed):
    ends, most = {"cu_seqlens_q": fixed, "cu_seqlens_k": fixed}, len(q)
    return ft.attention(q, k, v, **ends, max_seqlen_q=most, max_seqlen_k=most, causal=True)


# ---- Linear cross-entropy -----------------------------------------------------------------------


def head(*size):
    """As a linear layer's weight is: its outputs have a variance of about one."""
    return (torch.randn(*size) / math.sqrt(size[-1])).requires_grad_()


def linear_loss(x, w, target):
    return F.cross_entropy(wide(x @ w.T), target)


def torch_chunked(x, w, target):
    if not hasattr(F, "linear_cross_entropy"):
        raise Skip("needs torch 2.13")
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, w, target, options=options)


def liger_fp32_sums(m, *inputs):
    return m.liger_fused_linear_cross_entropy(*inputs, accum_dtype=torch.float32)


ALL = ("forward", "backward", "full")
MATMUL = {
    "attention": attention(
        [(2048, 1, 32, 8, 128), (4096, 2, 32, 8, 128), (8192, 1, 32, 8, 128),
         (16384, 1, 32, 8, 128), (4096, 2, 16, 16, 128), (4096, 2, 32, 8, 64)], True),
    "attention_full": attention([(4096, 1, 32, 8, 128)], False),
    "attention_packed": Op(
        "T Hq Hk D", [(512, 8, 4, 32)], [(8192, 32, 8, 128)],
        packed_inputs,
        sdpa_by_document,
        flatout_varlen,
        {
            "flatout, T + 1 entries": ("flatout.torch", flatout_fixed),
            "flash-attn 2 in torch": torch_varlen,
            "flash-attn": ("flash_attn", flash_varlen),
            "flash-attn 3": ("flash_attn_interface", flash_varlen),
            "flash-attn 4": ("flash_attn.cute", flash_4_varlen),
        },
        flops=packed_flops,
        modes=ALL,
        note="flash-attn 2 in torch is its varlen_attn; that of torch 2.11 and older knows no "
             "grouped heads, and k and v are repeated within the timed call.",
    ),
    "linear_cross_entropy": Op(
        "T H V", [(1024, 256, 512)], [(2048, 4096, 151936), (16384, 4096, 151936)],
        lambda T, H, V: [grad(T, H), head(V, H), torch.randint(V, (T,))],
        linear_loss,
        lambda ft, x, w, target: ft.linear_cross_entropy(x, w, target),
        {
            "torch, chunked": torch_chunked,
            "liger": (LIGER, lambda m, *xs: m.liger_fused_linear_cross_entropy(*xs)),
            "liger, fp32 sums": (LIGER, liger_fp32_sums),
            "cut-cross-entropy": ("cut_cross_entropy", lambda m, *xs: m.linear_cross_entropy(*xs)),
            "quack": (QUACK, lambda m, *xs: m.chunked_linear_cross_entropy(*xs)),
            "flatout, one chunk": (
                "flatout.torch", lambda ft, x, *rest: ft.linear_cross_entropy(
                    x, *rest, chunk_size=len(x))),
            "flatout, fp32 sums": (
                "flatout.torch", lambda ft, *xs: ft.linear_cross_entropy(
                    *xs, accum_dtype=torch.float32)),
        },
        flops=lambda T, H, V: (2 * T * H * V, 4 * T * H * V),
        modes=ALL,
        early=("flatout", "liger", "quack", "torch, chunked"),
        note="flatout, Liger, QuACK and torch's chunked loss make the gradients in the forward "
             "pass, and their backward at most scales them: compare \"full\" alone; flatout's "
             "forward and backward have no rate.",
    ),
}  # fmt: skip
