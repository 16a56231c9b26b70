"""The ops that run_ops.py times, and their peers. One entry of OPS is all that an op needs."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

TOKENS = 2048  # of the check against float64, at most


class Skip(Exception):
    """This provider cannot run here."""


@dataclass(frozen=True)
class Op:
    """One op, with its peers.

    dims:     the names of the sizes of a shape; the first is tokens (or elements)
    cpu, cuda: the default shapes
    inputs:   sizes -> tensors; those made by grad() are differentiated
    torch:    the op as a user of torch would write it: base of the check and first provider
    flatout:  a function of (flatout.torch, *inputs)
    peers:    name -> function of the inputs, or (package, function of (package, *inputs)), which
              needs CUDA
    moved:    sizes -> elements read and written (forward, backward), for ops bound by memory
    flops:    sizes -> (forward, backward), for ops bound by arithmetic
    updates:  the op changes its inputs and has no gradient: providers return a function that
              does one step
    """

    dims: str
    cpu: list
    cuda: list
    inputs: Callable
    torch: Callable
    flatout: Callable
    peers: dict = field(default_factory=dict)
    moved: Callable = None
    flops: Callable = None
    updates: bool = False


def grad(*size):
    return torch.randn(*size).requires_grad_()


def weight(*size):
    """Around one, as a norm's weight is."""
    return (1 + 0.1 * torch.randn(*size)).requires_grad_()


def head(*size):
    """As a linear layer's weight is: its outputs have a variance of about one."""
    return (torch.randn(*size) / math.sqrt(size[-1])).requires_grad_()


def rotary(seq, dim):
    """cos and sin (S, D), both halves."""
    inverse = 1e6 ** -(torch.arange(0, dim, 2).double() / dim)
    angle = torch.outer(torch.arange(seq).double(), inverse).repeat(1, 2)
    return [angle.cos().float(), angle.sin().float()]


def norm(x, w, eps=1e-6):
    """Hugging Face's Qwen3RMSNorm."""
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return w * wide.to(x.dtype)


def rotate(x):
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def rope(q, k, cos, sin):
    """Hugging Face's apply_rotary_pos_emb, heads third."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def sdpa(q, k, v):
    heads_second = [x.transpose(1, 2) for x in (q, k, v)]
    return F.scaled_dot_product_attention(*heads_second, is_causal=True, enable_gqa=True).transpose(
        1, 2
    )


def sdpa_by(backend):
    def run(q, k, v):
        if not q.is_cuda:
            raise Skip("needs CUDA")
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            return sdpa(q, k, v)

    return run


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


def linear_loss(x, w, target):
    return F.cross_entropy(wide(x @ w.T), target)


def adamw(make):
    """A provider of AdamW with clipping: make(parameters) -> a function that does one step."""

    def run(p, g):
        p.grad = g
        return make([p])

    return run


def torch_adamw(parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return step


def flatout_adamw(ft, p, g):
    p.grad = g
    return ft.AdamW([p], lr=1e-3, max_grad_norm=1.0).step


def attention_flops(B, S, Hq, Hk, D):
    forward = 2 * B * Hq * S * S * D  # two products, half of the pairs seen
    return forward, 2.5 * forward


def flash(m, q, k, v):
    return m.flash_attn_func(q, k, v, causal=True)


LIGER, LIGER_FUNCTIONAL = "liger_kernel.ops", "liger_kernel.transformers.functional"

OPS = {
    "rms_norm": Op(
        "T H", [(1024, 256)], [(2048, 4096), (16384, 4096)],
        lambda T, H: [grad(T, H), weight(H)],
        norm,
        lambda ft, x, w: ft.rms_norm(x, w),
        {
            "torch F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
            "liger": (LIGER, lambda m, x, w: m.LigerRMSNormFunction.apply(x, w, 1e-6)),
        },
        moved=lambda T, H: (2 * T * H, 3 * T * H),
    ),
    "add_rms_norm": Op(
        "T H", [(1024, 256)], [(2048, 4096), (16384, 4096)],
        lambda T, H: [grad(T, H), grad(T, H), weight(H)],
        lambda x, r, w: (norm(x + r, w), x + r),
        lambda ft, x, r, w: ft.add_rms_norm(x, r, w),
        {"liger": (LIGER, lambda m, x, r, w: m.LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6))},
        moved=lambda T, H: (4 * T * H, 4 * T * H),
    ),
    "swiglu": Op(
        "T H", [(1024, 768)], [(2048, 12288), (16384, 12288)],
        lambda T, H: [grad(T, H), grad(T, H)],
        lambda gate, up: F.silu(gate) * up,
        lambda ft, gate, up: ft.swiglu(gate, up),
        {"liger": (LIGER, lambda m, gate, up: m.LigerSiLUMulFunction.apply(gate, up))},
        moved=lambda T, H: (3 * T * H, 5 * T * H),
    ),
    "rope": Op(
        "S B Hq Hk D", [(256, 4, 8, 4, 32)], [(2048, 1, 32, 8, 128), (16384, 1, 32, 8, 128)],
        lambda S, B, Hq, Hk, D: [grad(B, S, Hq, D), grad(B, S, Hk, D), *rotary(S, D)],
        rope,
        lambda ft, q, k, cos, sin: ft.rope(q, k, cos, sin),
        moved=lambda S, B, Hq, Hk, D: (2 * B * S * (Hq + Hk) * D,) * 2,
    ),
    "qk_norm_rope": Op(
        "S B Hq Hk D", [(256, 4, 8, 4, 32)], [(2048, 1, 32, 8, 128), (16384, 1, 32, 8, 128)],
        lambda S, B, Hq, Hk, D: [
            grad(B, S, Hq, D), grad(B, S, Hk, D), weight(D), weight(D), *rotary(S, D),
        ],
        lambda q, k, qw, kw, cos, sin: rope(norm(q, qw), norm(k, kw), cos, sin),
        lambda ft, *inputs: ft.qk_norm_rope(*inputs),
        moved=lambda S, B, Hq, Hk, D: (2 * B * S * (Hq + Hk) * D, 3 * B * S * (Hq + Hk) * D),
    ),
    "attention": Op(
        "S B Hq Hk D", [(256, 4, 8, 4, 32)], [(2048, 1, 32, 8, 128), (8192, 1, 32, 8, 128)],
        lambda S, B, Hq, Hk, D: [grad(B, S, Hq, D), grad(B, S, Hk, D), grad(B, S, Hk, D)],
        sdpa,
        lambda ft, q, k, v: ft.attention(q, k, v, causal=True),
        {
            "cuDNN in torch": sdpa_by("CUDNN_ATTENTION"),
            "flash-attn 2 in torch": sdpa_by("FLASH_ATTENTION"),
            "flash-attn": ("flash_attn", flash),
            "flash-attn 3": ("flash_attn_interface", flash),
        },
        flops=lambda S, B, Hq, Hk, D: attention_flops(B, S, Hq, Hk, D),
    ),
    "cross_entropy": Op(
        "T V", [(1024, 512)], [(2048, 151936)],
        lambda T, V: [grad(T, V), torch.randint(V, (T,))],
        lambda logits, target: F.cross_entropy(wide(logits), target),
        lambda ft, logits, target: ft.cross_entropy(logits, target),
        {"liger": (LIGER_FUNCTIONAL, lambda m, *inputs: m.liger_cross_entropy(*inputs))},
        moved=lambda T, V: (T * V, 2 * T * V),
    ),
    "linear_cross_entropy": Op(
        "T H V", [(1024, 256, 512)], [(2048, 4096, 151936), (16384, 4096, 151936)],
        lambda T, H, V: [grad(T, H), head(V, H), torch.randint(V, (T,))],
        linear_loss,
        lambda ft, x, w, target: ft.linear_cross_entropy(x, w, target),
        {
            "liger": (LIGER_FUNCTIONAL, lambda m, *xs: m.liger_fused_linear_cross_entropy(*xs)),
            "cut-cross-entropy": ("cut_cross_entropy", lambda m, *xs: m.linear_cross_entropy(*xs)),
        },
        flops=lambda T, H, V: (2 * T * H * V, 4 * T * H * V),
    ),
    "embedding": Op(
        "T V H", [(1024, 512, 256)], [(2048, 151936, 4096), (16384, 151936, 4096)],
        lambda T, V, H: [torch.randint(V, (T,)), grad(V, H)],
        lambda ids, w: F.embedding(ids, w),
        lambda ft, ids, w: ft.embedding(ids, w),
        moved=lambda T, V, H: (2 * T * H, 2 * T * H + V * H),
    ),
    "adamw": Op(
        "P", [(1 << 22,)], [(1 << 28,)],
        lambda P: [grad(P), torch.randn(P)],
        adamw(torch_adamw),
        flatout_adamw,
        moved=lambda P: (8 * P, 0),  # the norm reads g; the step reads p, g, m, v, writes p, m, v
        updates=True,
    ),
}  # fmt: skip


def call(entry, inputs):
    """A peer's result: a function, or (package, function), which needs CUDA and the package."""
    if callable(entry):
        return entry(*inputs)
    package, function = entry
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise Skip(f"{error.name} not installed") from error
    if not inputs[0].is_cuda:
        raise Skip("needs CUDA")
    return function(module, *inputs)


def flatout(entry, inputs):
    import flatout.torch as ft

    return entry(ft, *inputs)


def providers(op, compiled=True):
    """name -> function of the list of inputs."""
    out = {"torch": lambda inputs: op.torch(*inputs)}
    if compiled and not op.updates:
        function = torch.compile(op.torch)
        out["torch.compile"] = lambda inputs: function(*inputs)
    for name, entry in op.peers.items():
        out[name] = lambda inputs, entry=entry: call(entry, inputs)
    out["flatout"] = lambda inputs: flatout(op.flatout, inputs)
    return out
