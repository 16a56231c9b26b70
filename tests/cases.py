"""One call of every op, for the tests of what holds for all of them."""

import torch

import flatout.torch as ft

OPS = [
    "rms_norm",
    "add_rms_norm",
    "swiglu",
    "packed swiglu",
    "rope",
    "qk_norm_rope",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_cross_entropy, mean",
    "embedding",
]


def entries(name, dtype=torch.bfloat16):
    """The entry points of flatout._C that a case reaches, forward and backward."""
    if name == "linear_cross_entropy, mean":  # the forward computes the gradients, but for float16
        half = dtype == torch.float16
        return {"linear_cross_entropy_fwd", "linear_cross_entropy_bwd" if half else "scale"}
    stem = name.removeprefix("packed ")
    return {f"{stem}_fwd", f"{stem}_bwd"}


def case(name, device, dtype=torch.bfloat16, tokens=64, H=1024, D=128, heads=(8, 2)):
    """(leaves that require grad, a function of them): the function returns one or more tensors."""

    def leaf(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    if name in ("rope", "qk_norm_rope"):
        q, k = (leaf(1, tokens, h, D) for h in heads)
        cos, sin = torch.randn(2, tokens, D, device=device).to(dtype)
        if name == "rope":
            return (q, k), lambda q, k: ft.rope(q, k, cos, sin)
        return (q, k, leaf(D), leaf(D)), lambda *x: ft.qk_norm_rope(*x, cos, sin)
    x, other, w = leaf(tokens, H), leaf(tokens, H), leaf(H)
    target = torch.randint(0, H, (tokens,), device=device)
    ids = torch.randint(0, tokens, (3 * tokens,), device=device)
    labels, chunk = ids[:tokens], max(1, tokens - 5)  # two chunks
    return {
        "rms_norm": ((x, w), ft.rms_norm),
        "add_rms_norm": ((x, other, w), ft.add_rms_norm),
        "swiglu": ((x, other), ft.swiglu),
        "packed swiglu": ((leaf(tokens, 2 * H),), ft.swiglu),
        "cross_entropy": ((x,), lambda x: ft.cross_entropy(x, target)),
        "linear_cross_entropy": (
            (x, other),
            lambda x, w: ft.linear_cross_entropy(x, w, labels, reduction="none", chunk_size=chunk),
        ),
        "linear_cross_entropy, mean": (
            (x, other),
            lambda x, w: ft.linear_cross_entropy(x, w, labels, chunk_size=chunk),
        ),
        "embedding": ((x,), lambda x: ft.embedding(ids, x)),
    }[name]


def as_tuple(out):
    return out if isinstance(out, tuple) else (out,)


def upstream_of(out):
    """Gradients of `out`, always the same ones."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in out]


def forward_backward(inputs, f, upstream=None):
    """Outputs, then gradients of all inputs."""
    out = as_tuple(f(*inputs))
    grads = torch.autograd.grad(out, inputs, upstream or upstream_of(out))
    return [*(o.detach() for o in out), *grads]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def noise(device):
    """Start work on another stream that keeps the GPU busy beside what follows."""
    if device == "cpu":
        return
    side, x = torch.cuda.Stream(), torch.randn(2048, 2048, device=device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            x = x @ x
    x.record_stream(side)
