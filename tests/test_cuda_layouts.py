"""No hidden copies: what an op allocates on CUDA is its outputs and what it saves, however its
inputs lie in memory. (That the results are right in all layouts is tested with each op.)"""

from functools import partial

import pytest
import torch
from cases import as_tuple, same
from conftest import DEVICES, alike, layouts

import flatout.torch as ft
from flatout import _C
from flatout.torch._library import partial_rows

# Of conftest.layouts for three dimensions: the first two merge into rows of one stride.
ROWS = {
    "contiguous", "sliced last dimension", "offset by 1", "offset by 8", "expanded",
    "packed view", "size-1 stride", "5-D flattened", "one of three",
}  # fmt: skip
HEADS = ROWS | {"sliced rows", "swapped leading"}  # any strides, but a contiguous last dimension


def cost(f, device):
    """(results of f, allocations it made, bytes it asked for); none are counted on the CPU."""
    names = ("allocation.all.allocated", "requested_bytes.all.allocated")
    before = torch.cuda.memory_stats() if device == "cuda" else {}
    out = as_tuple(f())
    after = torch.cuda.memory_stats() if device == "cuda" else {}
    return [out, *(after.get(n, 0) - before.get(n, 0) for n in names)]


def size(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def expect(device, f, *allocated):
    """f() allocates this much and no more; its results."""
    out, _, asked = cost(f, device)
    assert device == "cpu" or asked == sum(allocated), (asked, allocated)
    return out


def forward_and_gradients(op, x, others, dy):
    """Without gradients, then with them, dy being every output's: all results, and all costs."""
    device = x.device.type
    results = [cost(lambda: op(x, *others), device)]
    leaf = x.detach().requires_grad_()
    results.append(cost(lambda: op(leaf, *others), device))
    out = results[1][0]
    results.append(cost(lambda: torch.autograd.grad(out, leaf, [dy] * len(out)), device))
    return [t for r in results for t in r[0]], [r[1:] for r in results]


def in_any_layout(op, shape, direct, device):
    """The same results in every layout of x and of the gradient, and in those that the op reads
    itself the same allocations too."""
    seen = set()
    for name, x in layouts(shape, torch.bfloat16, device):
        dense = x.contiguous()
        others = [torch.randn_like(dense) for _ in range(2)]
        want, dense_cost = forward_and_gradients(op, dense, others, dense)
        got, its_cost = forward_and_gradients(op, x, others, x)
        assert alike(got, want, name), name
        if name in direct:
            assert its_cost == dense_cost, name
            seen.add(name)
    assert seen == direct


OPS = {
    "rms_norm": lambda x, a, b: ft.rms_norm(x, b[(0,) * (b.ndim - 1)]),
    "add_rms_norm": lambda x, a, b: ft.add_rms_norm(x, a, b[(0,) * (b.ndim - 1)]),
    "residual": lambda x, a, b: ft.add_rms_norm(a, x, b[(0,) * (b.ndim - 1)]),
    "gate": lambda x, a, b: ft.swiglu(x, a),
    "up": lambda x, a, b: ft.swiglu(a, x),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_rows(name, device):
    in_any_layout(OPS[name], (4, 6, 64), ROWS, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["q", "k", "normed q", "normed k"])
def test_heads(name, device):
    cos, sin = torch.randn(2, 4, 64, device=device)
    w = torch.randn(64, device=device)

    def op(x, a, b):
        q, k = (x, a) if "q" in name else (a, x)
        if "normed" in name:
            return ft.qk_norm_rope(q, k, w, w, cos, sin)
        return ft.rope(q, k, cos, sin)["k" in name]

    in_any_layout(op, (4, 6, 64), HEADS, device)


@pytest.mark.parametrize("device", DEVICES)
def test_packed_swiglu(device):
    for name, x in layouts((4, 6, 64), torch.bfloat16, device):
        dense = x.contiguous()
        dy = torch.randn_like(dense[..., :32]).contiguous()
        want, dense_cost = forward_and_gradients(ft.swiglu, dense, (), dy)
        got, its_cost = forward_and_gradients(ft.swiglu, x, (), dy)
        assert same(got, want) and (name not in ROWS or its_cost == dense_cost), name


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(device):
    for name, z in layouts((4, 6, 64), torch.bfloat16, device):
        target = torch.randint(0, 64, z.shape[:-1], device=device)
        one = torch.ones((), device=device)

        def op(z, target=target):
            return ft.cross_entropy(z, target)

        want, dense_cost = forward_and_gradients(op, z.contiguous(), (), one)
        got, its_cost = forward_and_gradients(op, z, (), one)
        assert alike(got, want, name), name
        assert name not in ROWS or its_cost == dense_cost, name


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_allocated(device):
    """Outputs alone without gradients; with them the statistics, and in the backward the partial
    sums of the weights' gradients."""
    x, r, dy = torch.randn(3, 40, 64, device=device).bfloat16()
    w = torch.randn(64, device=device).bfloat16()
    expect(device, lambda: ft.rms_norm(x, w), size(x))
    expect(device, lambda: ft.add_rms_norm(x, r, w), 2 * size(x))
    expect(device, lambda: ft.swiglu(x, r), size(x))
    expect(device, lambda: ft.swiglu(x), size(x) // 2)
    leaves = [t.requires_grad_() for t in (x, r, w)]
    x, r, w = leaves
    (y,) = expect(device, lambda: ft.rms_norm(x, w), size(x), 40 * 4)
    partials = 64 * 4 * partial_rows(x)
    expect(device, lambda: torch.autograd.grad(y, (x, w), dy), size(x, w), partials)
    (y,) = expect(device, lambda: ft.swiglu(x, r), size(x))
    expect(device, lambda: torch.autograd.grad(y, (x, r), dy), 2 * size(x))
    (y,) = expect(device, lambda: ft.swiglu(x), size(x) // 2)
    expect(device, lambda: torch.autograd.grad(y, x, dy[:, :32]), size(x))


@pytest.mark.parametrize("device", DEVICES)
def test_heads_out_of_one_projection(device):
    """q and k are read, and in place rewritten, where a fused (T, (Hq + 2 Hk) D) projection left
    them; in (B, S, ...) and with HF's heads before the sequence too."""
    T, Hq, Hk, D = 24, 8, 2, 64
    qkv = torch.randn(T, (Hq + 2 * Hk) * D, device=device).bfloat16()
    cos, sin = torch.randn(2, T, D, device=device).bfloat16()
    w = torch.randn(D, device=device).bfloat16()
    heads = qkv.view(T, -1, D)
    q, k = heads[:, :Hq], heads[:, Hq : Hq + Hk]
    batched = [t.unsqueeze(0).transpose(1, 2).transpose(1, 2) for t in (q, k)]  # as HF and back
    dense = [t.contiguous() for t in (q, k)]
    for op in (
        lambda q, k, **o: ft.rope(q, k, cos, sin, **o),
        lambda q, k, **o: ft.qk_norm_rope(q, k, w, w, cos, sin, **o),
    ):
        want = op(*dense)
        for views in ((q, k), batched):
            out = expect(device, partial(op, *views), size(*dense))
            assert all(torch.equal(a.view(b.shape), b) for a, b in zip(out, want, strict=True))
        copy = qkv.clone().view(T, -1, D)
        expect(device, partial(op, copy[:, :Hq], copy[:, Hq : Hq + Hk], inplace=True), 0)
        assert torch.equal(copy[:, :Hq], want[0]) and torch.equal(copy[:, Hq : Hq + Hk], want[1])
        assert torch.equal(copy[:, Hq + Hk :], heads[:, Hq + Hk :])


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_copies_nothing(device):
    params = [torch.nn.Parameter(torch.randn(300, 400, device=device)) for _ in range(3)]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = ft.AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    for f in (optimizer.step, lambda: ft.clip_grad_norm_(params, 1.0)):
        _, _, asked = cost(lambda f=f: f() or (), device)
        assert asked <= 16384


@pytest.mark.gpu
def test_the_c_entry_points_refuse_what_they_would_have_to_copy():
    x = torch.randn(8, 6, 64, device="cuda")[::2]
    y, w = torch.empty(4, 6, 64, device="cuda"), torch.ones(64, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    with pytest.raises(ValueError, match="merge into rows of one stride"):
        _C.rms_norm_fwd(y, None, x, w, 1e-6, 0.0, stream)
    with pytest.raises(ValueError, match="contiguous last dimension"):
        _C.swiglu_fwd(y, x.transpose(1, 2).contiguous().transpose(1, 2), x, stream)
