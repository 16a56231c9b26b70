"""The ops that run_ops.py times, and their peers. One entry of OPS is all that an op needs."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

TOKENS = 2048  # of the check against float64, at most
SWEEP = (512, 2048, 8192, 32768)  # tokens on CUDA
MOST = 1 << 31  # elements that a forward moves there


class Skip(Exception):
    """This provider cannot run here."""


@dataclass(frozen=True)
class Op:
    """One op, with its peers.

    dims:     the names of the sizes of a shape; the first is tokens (or elements)
    cpu, cuda: the default shapes
    inputs:   sizes -> tensors in the default dtype; those made by grad() are differentiated
    torch:    the op as a user of torch would write it: base of the check and first provider
    flatout:  a function of (flatout.torch, *inputs)
    peers:    name -> function of the inputs, or (package, function of (package, *inputs)), which
              needs CUDA
    moved:    sizes -> elements read and written (forward, backward), for ops bound by memory: what
              any implementation must move; rows of statistics, weights and tables not counted
    flops:    sizes -> (forward, backward), for ops bound by arithmetic
    modes:    what is timed; "full" is a forward and a backward together
    random:   providers whose results depend on chance: their error is not compared
    early:    how the names of those begin that make the gradients in the forward
    same_forward: variants of flatout that differ in the backward alone
    note:     what the tables say of the op
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
    modes: tuple = ("forward", "backward")
    random: tuple = ()
    early: tuple = ()
    same_forward: tuple = ()
    note: str = ""

    # An optimizer's op changes its inputs and has no gradient: providers return a function that
    # does one step, and that returns the tensors to be compared.
    updates = property(lambda self: self.modes == ("step",))

    def has_rate(self, provider, mode):
        """Whether the provider does in this mode the work that the mode stands for."""
        return mode == "full" or not provider.startswith(self.early)

    def is_timed(self, provider, mode):
        return mode != "forward" or provider not in self.same_forward

    def sweep(self, device):
        """Shapes of many sizes, the first one growing by fours; those left out of which every
        provider's inputs would not fit together."""
        if self.updates:
            return [(4**n, 1) for n in (range(10, 16) if device == "cuda" else range(6, 9))]
        tokens, *rest = (self.cuda if device == "cuda" else self.cpu)[0]
        many = SWEEP if device == "cuda" else (tokens // 16, tokens // 4, tokens)
        return [(n, *rest) for n in many if not self.moved or self.moved(n, *rest)[0] < MOST]

    def work(self, shape, mode, itemsize):
        """(amount, unit): bytes moved or floating-point operations of one call in this mode."""
        forward, backward = (self.flops or self.moved)(*shape)
        amount = {"backward": backward, "full": forward + backward}.get(mode, forward)
        return (amount, "TFLOPS") if self.flops else (amount * itemsize, "TB/s")


def grad(*size):
    return torch.randn(*size).requires_grad_()


def weight(*size):
    """Around one, as a norm's weight is."""
    return (1 + 0.1 * torch.randn(*size)).requires_grad_()


def rotary(seq, dim):
    """cos and sin (S, D), both halves, in the inputs' dtype, as Hugging Face's models pass them."""
    inverse = 1e6 ** -(torch.arange(0, dim, 2).double() / dim)
    angle = torch.outer(torch.arange(seq).double(), inverse).repeat(1, 2)
    return [angle.cos().to(torch.get_default_dtype()), angle.sin().to(torch.get_default_dtype())]


def packed_heads(seq, batch, q_heads, k_heads, dim):
    """q and k as views of one buffer [q | k | v] (B, S, (Hq + 2 Hk) * D)."""
    qkv = torch.randn(batch, seq, q_heads + 2 * k_heads, dim)
    q, k = qkv[:, :, :q_heads], qkv[:, :, q_heads : q_heads + k_heads]
    return [q.requires_grad_(), k.requires_grad_()]


def norm(x, w, eps=1e-6):
    """Hugging Face's Qwen3RMSNorm."""
    wide = x.float() if x.dtype != torch.float64 else x
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return w * wide.to(x.dtype)


def add_norm(x, r, w):
    s = x + r
    return norm(s, w), s


def fused_add_norm(x, r, w):
    s = x + r
    return F.rms_norm(s, w.shape, w, 1e-6), s


def packed_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x):
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def rope(q, k, cos, sin):
    """Hugging Face's apply_rotary_pos_emb, heads third."""
    cos, sin = cos.to(q.dtype)[:, None], sin.to(q.dtype)[:, None]
    return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin


def rope_inplace(q, k, cos, sin):
    for x, out in zip((q, k), rope(q, k, cos, sin), strict=True):
        x.copy_(out)
    return q, k


def liger_rope(m, q, k, cos, sin):
    """Liger's heads come second. It writes into q and k, out of place or not."""
    out = m.LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return tuple(x.transpose(1, 2) for x in out)


def qk_norm_rope(q, k, qw, kw, cos, sin):
    return rope(norm(q, qw), norm(k, kw), cos, sin)


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


LIGER = "liger_kernel.ops."
LIGER_ROPE = {"liger": (LIGER + "rope", liger_rope)}
ROWS = [(2048, 4096), (16384, 4096)]
GATES = [(2048, 12288), (16384, 12288)]
HEADS = dict(dims="S B Hq Hk D", cpu=[(256, 4, 8, 4, 32)],
             cuda=[(2048, 1, 32, 8, 128), (16384, 1, 32, 8, 128)])  # fmt: skip


def heads_moved(forward, backward):
    return lambda S, B, Hq, Hk, D: tuple(n * B * S * (Hq + Hk) * D for n in (forward, backward))


EMBEDDING = Op(
    "T V H", [(1024, 512, 256)], [(2048, 151936, 4096), (16384, 151936, 4096)],
    lambda T, V, H: [torch.randint(V, (T,)), grad(V, H)],
    lambda ids, w: F.embedding(ids, w),
    lambda ft, ids, w: ft.embedding(ids, w),
    {"liger": (LIGER + "experimental.embedding",
               lambda m, ids, w: m.LigerEmbeddingFunction.apply(w, ids))},
    moved=lambda T, V, H: (2 * T * H, (T + V) * H),
)  # fmt: skip

ELEMENTWISE = {
    "rms_norm": Op(
        "T H", [(1024, 256)], ROWS,
        lambda T, H: [grad(T, H), weight(H)],
        norm,
        lambda ft, x, w: ft.rms_norm(x, w),
        {
            "torch F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
            "liger": (LIGER + "rms_norm", lambda m, x, w: m.LigerRMSNormFunction.apply(x, w, 1e-6)),
            "quack": ("quack", lambda m, x, w: m.rmsnorm(x, w, eps=1e-6)),
        },
        moved=lambda T, H: (2 * T * H, 3 * T * H),
    ),
    "add_rms_norm": Op(
        "T H", [(1024, 256)], ROWS,
        lambda T, H: [grad(T, H), grad(T, H), weight(H)],
        add_norm,
        lambda ft, x, r, w: ft.add_rms_norm(x, r, w),
        {
            "torch F.rms_norm": fused_add_norm,
            "liger": (LIGER + "fused_add_rms_norm",
                      lambda m, x, r, w: m.LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6)),
            "quack": ("quack",
                      lambda m, x, r, w: m.rmsnorm(x, w, residual=r, eps=1e-6, prenorm=True)),
        },
        moved=lambda T, H: (4 * T * H, 4 * T * H),
    ),
    "swiglu": Op(
        "T H", [(1024, 768)], GATES,
        lambda T, H: [grad(T, H), grad(T, H)],
        lambda gate, up: F.silu(gate) * up,
        lambda ft, gate, up: ft.swiglu(gate, up),
        {"liger": (LIGER + "swiglu", lambda m, *xs: m.LigerSiLUMulFunction.apply(*xs))},
        moved=lambda T, H: (3 * T * H, 5 * T * H),
    ),
    "swiglu_packed": Op(
        "T H", [(1024, 768)], GATES,
        lambda T, H: [grad(T, 2 * H)],
        packed_swiglu,
        lambda ft, gate_up: ft.swiglu(gate_up),
        {"liger": (LIGER + "swiglu", lambda m, x: m.LigerFusedGateUpSiLUMulFunction.apply(x))},
        moved=lambda T, H: (3 * T * H, 5 * T * H),
    ),
    "rope": Op(
        **HEADS,
        inputs=lambda S, B, Hq, Hk, D: [grad(B, S, Hq, D), grad(B, S, Hk, D), *rotary(S, D)],
        torch=rope,
        flatout=lambda ft, *inputs: ft.rope(*inputs),
        peers=LIGER_ROPE,
        moved=heads_moved(2, 2),
    ),
    "rope_packed": Op(
        **HEADS,
        inputs=lambda *sizes: [*packed_heads(*sizes), *rotary(sizes[0], sizes[-1])],
        torch=rope,
        flatout=lambda ft, *inputs: ft.rope(*inputs),
        peers=LIGER_ROPE,
        moved=heads_moved(2, 2),
    ),
    "rope_inplace": Op(
        **HEADS,
        inputs=lambda S, B, Hq, Hk, D: [
            torch.randn(B, S, Hq, D), torch.randn(B, S, Hk, D), *rotary(S, D)],
        torch=rope_inplace,
        flatout=lambda ft, *inputs: ft.rope(*inputs, inplace=True),
        peers=LIGER_ROPE,
        moved=heads_moved(2, 2),
        modes=("forward",),
    ),
    "qk_norm_rope": Op(
        **HEADS,
        inputs=lambda S, B, Hq, Hk, D: [
            grad(B, S, Hq, D), grad(B, S, Hk, D), weight(D), weight(D), *rotary(S, D)],
        torch=qk_norm_rope,
        flatout=lambda ft, *inputs: ft.qk_norm_rope(*inputs),
        moved=heads_moved(2, 3),
    ),
    "qk_norm_rope_packed": Op(
        **HEADS,
        inputs=lambda *sizes: [
            *packed_heads(*sizes), weight(sizes[-1]), weight(sizes[-1]),
            *rotary(sizes[0], sizes[-1])],
        torch=qk_norm_rope,
        flatout=lambda ft, *inputs: ft.qk_norm_rope(*inputs),
        moved=heads_moved(2, 3),
    ),
    "cross_entropy": Op(
        "T V", [(1024, 512)], [(2048, 151936)],
        lambda T, V: [grad(T, V), torch.randint(V, (T,))],
        lambda logits, target: F.cross_entropy(wide(logits), target),
        lambda ft, logits, target: ft.cross_entropy(logits, target),
        {
            "torch, not in fp32": F.cross_entropy,
            "liger": (LIGER + "cross_entropy",
                      lambda m, *xs: m.LigerCrossEntropyFunction.apply(*xs, None)[0]),
            "quack": ("quack", lambda m, *xs: m.cross_entropy(*xs)),
        },
        moved=lambda T, V: (T * V, 2 * T * V),
        modes=("forward", "backward", "full"),
        early=("liger",),
        note="Liger makes the gradient in the forward pass, so compare \"full\" alone with it.",
    ),
    "embedding": EMBEDDING,
    "embedding_padded": replace(
        EMBEDDING, cuda=[(16384, 151936, 4096)],
        inputs=lambda T, V, H: [torch.randint(V, (T,)).index_fill(0, torch.arange(T // 2), 0),
                                grad(V, H)],
        note="Half of the ids are one, as a batch's padding.",
    ),
}  # fmt: skip


def call(entry, inputs):
    """A peer's result: a function, or (package, function), which needs CUDA and the package."""
    if callable(entry):
        return entry(*inputs)
    package, function = entry
    if not inputs[0].is_cuda:
        raise Skip("needs CUDA")
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise Skip(f"{error.name} not installed") from error
    return function(module, *inputs)


def flatout(entry, inputs):
    import flatout.torch as ft

    return entry(ft, *inputs)


def compiled(function):
    """torch.compile of the function, when it is called first."""
    made = []

    def run(*inputs):
        if not made:
            torch._dynamo.reset()  # or earlier ops' shapes count against its recompile limit
            made.append(torch.compile(function, dynamic=False))
        return made[0](*inputs)

    return run


def providers(op):
    """name -> function of the list of inputs."""
    every = {"torch": op.torch}
    if not op.updates:
        every["torch.compile"] = compiled(op.torch)
    every |= op.peers
    out = {n: lambda inputs, entry=entry: call(entry, inputs) for n, entry in every.items()}
    out["flatout"] = lambda inputs: flatout(op.flatout, inputs)
    return out
