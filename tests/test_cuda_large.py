"""Tensors of more than 2^31 elements (and 2^32 bytes) on CUDA; the same tests on small ones here.

A large tensor repeats a small one, so every block of a result must be the small result, to the bit:
each element of it is looked at, and no large reference is needed."""

import numpy as np
import pytest
import ref
import torch
from cases import as_tuple, case, forward_backward, upstream_of
from conftest import DEVICES

import flatout.torch as ft

BEYOND = {"cpu": 1 << 20, "cuda": 1 << 31}  # elements
GIB = 1 << 30


@pytest.fixture(autouse=True)
def memory(request):
    """Skips where too little memory is free, and gives back what the test took."""
    if request.node.callspec.params["device"] == "cpu":
        yield
        return
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of free memory on the GPU")
    yield
    torch.cuda.empty_cache()


def blocks_of(t, dim, device):
    """How many repeats of t along a dimension pass the mark."""
    return BEYOND[device] // t.numel() + 1


def repeated(t, blocks, dim=0):
    return t.detach().repeat(*(blocks if d == dim else 1 for d in range(t.ndim)))


def all_blocks_equal(large, small, dim=0):
    """Every block of `large` along the dimension is `small`."""
    blocks = large.unflatten(dim, (-1, small.shape[dim]))
    small = small.unsqueeze(dim)
    equal = [(part == small).all() for part in blocks.split(32, dim)]
    return bool(torch.stack(equal).all())


def compare(inputs, f, large_inputs, large_f, dims, blocks):
    """dims: of the repeats of every output and gradient; None: a sum over all blocks."""
    upstream = upstream_of(as_tuple(f(*inputs)))
    small = forward_backward(inputs, f, upstream)
    large_upstream = [repeated(t, blocks, d) for t, d in zip(upstream, dims, strict=False)]
    large = forward_backward(large_inputs, large_f, large_upstream)
    for got, want, dim in zip(large, small, dims, strict=True):
        if dim is None:
            error = (got.double() - blocks * want.double()).abs().max()
            rounding = torch.finfo(got.dtype).eps
            assert error <= max(3e-4, rounding) * blocks * want.double().abs().max()
        else:
            assert got.numel() == blocks * want.numel() and all_blocks_equal(got, want, dim)


def grown(inputs, blocks, dims):
    """The inputs, those with a dimension repeated along it."""
    pairs = zip(inputs, dims, strict=True)
    large = [t.detach() if d is None else repeated(t, blocks, d) for t, d in pairs]
    return [t.requires_grad_() for t in large]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name, dims",
    [
        ("rms_norm", (0, 0, None)),
        ("add_rms_norm", (0, 0, 0, 0, None)),
        ("swiglu", (0, 0, 0)),
        ("packed swiglu", (0, 0)),
    ],
)
def test_rows(name, dims, device):
    tokens, H = (1024, 4096) if device == "cuda" else (8, 64)
    inputs, f = case(name, device, tokens=tokens, H=H)
    inputs = [t.detach().float() if t.ndim == 1 else t.detach() for t in inputs]
    inputs = [t.requires_grad_() for t in inputs]
    blocks = blocks_of(inputs[0], 0, device)
    compare(inputs, f, grown(inputs, blocks, dims[-len(inputs) :]), f, dims, blocks)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["rope", "qk_norm_rope"])
def test_heads(name, dim, device):
    """More batches, with one table for all, or more tokens."""
    tokens = 1024 if device == "cuda" else 8
    q, k = (torch.randn(1, tokens, h, 128, device=device).bfloat16() for h in (8, 2))
    weights = [torch.randn(128, device=device) for _ in range(2)] if name != "rope" else []
    inputs = [t.requires_grad_() for t in (q, k, *weights)]
    blocks = blocks_of(q, dim, device)
    cos, sin = torch.randn(2, tokens, 128, device=device).bfloat16()
    wide = [repeated(t, blocks) for t in (cos, sin)] if dim else (cos, sin)
    op = getattr(ft, name)
    dims = (dim, dim, dim, dim) + (None,) * len(weights)
    large = grown(inputs, blocks, dims[2:])
    compare(inputs, lambda *x: op(*x, cos, sin), large, lambda *x: op(*x, *wide), dims, blocks)


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy(device):
    tokens, V = (16, 131072) if device == "cuda" else (5, 130)
    z = torch.randn(tokens, V, device=device).bfloat16().requires_grad_()
    target = torch.randint(0, V, (tokens,), device=device)
    blocks = blocks_of(z, 0, device)

    def f(z):
        return ft.cross_entropy(z, repeated(target, len(z) // tokens), reduction="none")

    compare([z], f, grown([z], blocks, [0]), f, (0, 0), blocks)


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_of_many_ids(device):
    N, V, H = (3000, 1000, 4096) if device == "cuda" else (30, 10, 64)
    table = torch.randn(V, H, device=device).bfloat16().requires_grad_()
    ids = torch.randint(0, V, (N,), device=device)
    blocks = BEYOND[device] // (N * H) + 1
    wide = repeated(ids, blocks)
    f, large = (lambda t: ft.embedding(ids, t)), (lambda t: ft.embedding(wide, t))
    compare([table], f, [table], large, (0, None), blocks)


@pytest.mark.parametrize("device", DEVICES)
def test_embedding_of_a_large_table(device):
    H = 2048 if device == "cuda" else 64
    edge = BEYOND[device] // H
    table = torch.zeros(edge + 5, H, device=device, dtype=torch.bfloat16)
    rows = torch.tensor([0, 1, edge // 2, edge - 1, edge, edge + 1, edge + 4], device=device)
    table[rows] = torch.randn(7, H, device=device).bfloat16()
    order = torch.tensor([5, 6, 0, 4, 4, 1, 3, 2, 6], device=device)
    small, table = table[rows].requires_grad_(), table.requires_grad_()
    y, want = ft.embedding(rows[order], table), ft.embedding(order, small)
    dy = torch.randn_like(y)
    (dw,), (dw_small,) = (torch.autograd.grad(o, t, dy) for o, t in ((y, table), (want, small)))
    assert torch.equal(y, want) and torch.equal(dw[rows], dw_small)
    assert dw.count_nonzero() == dw_small.count_nonzero() > 0


@pytest.mark.parametrize("device", DEVICES)
def test_adamw(device):
    """Blocks of an odd length, so that their vectors begin at every place of a block."""
    n = 4_000_037 if device == "cuda" else 4001
    small = [torch.rand(n, device=device).bfloat16() for _ in range(4)]
    large = [repeated(t, BEYOND[device] // n + 1) for t in small]
    before = small[0].clone()
    coef = torch.full((), 0.7, device=device)
    for lists in (small, large):
        ft.adamw_step(*([t] for t in lists), 3, lr=1e-2, coef=coef)
    assert all(map(all_blocks_equal, large, small)) and not torch.equal(before, small[0])


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_beyond_2_32(device):
    """The flat index passes 2^32 inside the second tensor: the bits are those of csrc/random.h."""
    half = BEYOND[device]
    sizes = (half - 5, half + 1003)
    one = [torch.ones(n, device=device, dtype=torch.bfloat16) for n in sizes]
    m, v = ([torch.zeros_like(t) for t in one] for _ in range(2))
    zeros = torch.zeros_like(one[1])
    x = np.float32(1 - 3 * 2.0**-10)
    options = dict(lr=1.0, weight_decay=1.0 - float(x), eps=1.0, stochastic_rounding=True, seed=77)
    ft.adamw_step(one, [zeros[: sizes[0]], zeros], m, v, 5, **options)
    for tensor, first, at in (
        (0, 0, 0),
        (0, 0, half - 1005),
        (1, sizes[0], 0),
        (1, sizes[0], half - 495),  # flat 2 * half - 500 and on
        (1, sizes[0], half + 3),
    ):
        index = first + at + np.arange(1000)
        want = ref.stochastic_bfloat16(x, ref.stochastic_noise(77, 5, index)[0])
        got = one[tensor][at : at + 1000].float().cpu().numpy()
        np.testing.assert_array_equal(got, want)
        assert len(set(want)) == 2
    assert not any(t.any() for t in (*m, *v))
    # x is a quarter of the way from 1 - 2^-8 to 1
    ups = sum(int((t == 1).sum()) for t in one)
    assert abs(ups / sum(sizes) - 0.25) < 5 * (0.1875 / sum(sizes)) ** 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_global_norm_and_clipping(device):
    n = BEYOND[device] + 17
    p = torch.empty(n, device=device, dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    p.grad[-1] = 2.0**20
    want = (n - 1 + 2.0**40) ** 0.5
    norm = ft.clip_grad_norm_([p, p.new_empty(3)], want / 2)
    assert abs(norm.item() / want - 1) < 1e-6
    assert p.grad[-1] == 2.0**19 and p.grad[:-1].aminmax() == (0.5, 0.5)


@pytest.mark.parametrize("device", [DEVICES[1]])
def test_heads_far_apart(device):
    """Heads 2^31 elements from each other: a kernel with 32-bit distances would miss them."""
    storage = torch.zeros(2**31 + 64, dtype=torch.bfloat16, device=device)
    q = storage.as_strided((1, 1, 2, 64), (0, 0, 2**31, 1))
    q.copy_(torch.randn(1, 1, 2, 64))
    table = torch.randn(1, 64, device=device).bfloat16()
    weight = torch.randn(64, device=device).bfloat16()
    near = q.contiguous()
    want = ft.qk_norm_rope(near, near[:, :, :1], weight, weight, table, table)[0]
    got = ft.qk_norm_rope(q, q[:, :, :1], weight, weight, table, table)[0]
    assert torch.equal(got, want)
    assert torch.equal(ft.rope(q, None, table, table)[0], ft.rope(near, None, table, table)[0])
