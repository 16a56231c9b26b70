import pytest
import torch
from conftest import DEVICES
from test_rope import grads, make, rope_grads, tables

import flatout
import flatout.torch as ft


@pytest.mark.parametrize("device", DEVICES)
def test_rope_in_place(device):
    """q and k are views of one projection, as with a fused qkv; what comes after is torch's."""
    x, (cos, sin) = torch.randn(2, 5, 6 * 16, device=device), tables(5, 16, device=device)

    def f(x, inplace):
        heads = (x * 1.5).view(2, 5, 6, 16)
        q, k = heads[:, :, :4], heads[:, :, 4:]
        got = ft.rope(q, k, cos, sin, inplace=inplace)
        assert not inplace or (got[0].data_ptr() == q.data_ptr() and torch.equal(got[1], k))
        return torch.cat(got, 2) ** 2

    dy = torch.randn(2, 5, 6, 16, device=device)
    assert torch.equal(f(x, True), f(x, False))
    (got,) = grads(lambda x: f(x, True), (x,), dy)
    (want,) = grads(lambda x: f(x, False), (x,), dy)
    assert torch.equal(got, want)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_rope_in_place_with_one_gradient(which, device):
    q, k, dq_out, dk_out, _, _ = make((2, 5, 4, 4, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    want, d = rope_grads(q, k, dq_out, dk_out, cos, sin)[which], (dq_out, dk_out)[which]
    leaf = (q, k)[which].clone().requires_grad_()
    inputs = [q.clone(), k.clone()]
    inputs[which] = leaf * 1
    out = ft.rope(*inputs, cos, sin, inplace=True)
    assert all(map(torch.equal, out, ft.rope(q, k, cos, sin)))
    assert torch.equal(torch.autograd.grad(out[which], leaf, d)[0], want)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place_without_gradients(device):
    q, k, _, _, qw, kw = make((2, 5, 4, 2, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    rotated, normed = ft.rope(q, k, cos, sin), ft.qk_norm_rope(q, k, qw, kw, cos, sin)
    calls = [
        (lambda q, k, **o: ft.rope(q, k, cos, sin, **o), rotated),
        (lambda q, k, **o: ft.qk_norm_rope(q, k, qw, kw, cos, sin, **o), normed),
        (lambda q, k, **o: flatout.rope(q, k, cos, sin, **o), rotated),
        (lambda q, k, **o: flatout.qk_norm_rope(q, k, qw, kw, cos, sin, **o), normed),
    ]
    for call, want in calls:
        q2, k2 = q.clone(), k.clone()
        got = call(q2, k2, inplace=True)
        assert got[0] is q2 and got[1] is k2
        assert torch.equal(q2, want[0]) and torch.equal(k2, want[1])
    with torch.inference_mode():
        q2 = q.clone()
        ft.rope(q2, None, cos, sin, inplace=True)
    assert torch.equal(q2, rotated[0])


def test_in_place_is_seen_by_autograd():
    """A tensor that torch has saved must not change unnoticed."""
    cos, sin = tables(5, 16)
    w = torch.ones(16)
    for call in (
        lambda h: ft.rope(h, None, cos, sin, inplace=True),
        lambda h: ft.qk_norm_rope(h, h.clone(), w, w, cos, sin, inplace=True),
    ):
        x = torch.randn(2, 5, 3, 16)
        factor = torch.ones(2, 5, 3, 16, requires_grad=True)
        y = factor * x  # saves x
        call(x)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    h = torch.randn(2, 5, 3, 16, requires_grad=True) * 1
    y = h * h
    ft.rope(h, None, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_place_refusals_change_nothing():
    q, k, _, _, qw, kw = make((2, 5, 4, 2, 16), torch.float32)
    cos, sin = tables(5, 16)
    old = q.clone(), k.clone()
    q.requires_grad_()
    for leaf in (q, q[:, 1:4], q.transpose(0, 0)):
        with pytest.raises(RuntimeError, match="rope: q: a leaf that requires grad"):
            ft.rope(leaf, None, cos[: leaf.shape[1]], sin[: leaf.shape[1]], inplace=True)
    with pytest.raises(RuntimeError, match="rope: k: a leaf that requires grad"):
        ft.rope(k, q, cos, sin, inplace=True)
    h = torch.cat([q, k], 2) + 0
    before = h.detach().clone()
    for several in (h.split(4, 2), h.chunk(2, 2), [x.view(*x.shape) for x in h.split(4, 2)]):
        with pytest.raises(RuntimeError, match="rope: q: one of the several views"):
            ft.rope(*several[:2], cos, sin, inplace=True)
        assert torch.equal(h, before)
    with pytest.raises(RuntimeError, match="qk_norm_rope: inplace=True overwrites q and k"):
        ft.qk_norm_rope(q, k, qw, kw, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="qk_norm_rope: inplace=True overwrites q and k"):
        ft.qk_norm_rope(k, k.clone(), qw.requires_grad_(), kw, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="q_out: output repeats its own memory"):
        ft.rope(k[:, :, :1].expand(2, 5, 3, 16), None, cos, sin, inplace=True)
    leaf = torch.zeros_like(q, requires_grad=True)
    for wrong, message in ((k[:1], "k: expected shape"), (k.half(), "k: expected float32 as q")):
        h = leaf + old[0]
        with pytest.raises(RuntimeError, match=message):
            ft.rope(h, wrong, cos, sin, inplace=True)
        assert torch.equal(h, old[0])
    with pytest.raises(ValueError, match="output overlaps"):
        ft.rope(h, h, cos, sin, inplace=True)
    assert torch.equal(h, old[0])
    with pytest.raises(ValueError, match="out: expected None with inplace=True"):
        flatout.rope(k, k, cos, sin, inplace=True, out=(k, k))
    assert torch.equal(q, old[0]) and torch.equal(k, old[1])
    with torch.no_grad():
        ft.rope(q, k, cos, sin, inplace=True)
    assert not torch.equal(q, old[0])
