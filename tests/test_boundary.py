"""The edges of the interface: tracers, transforms, tensors without memory, and wrong arguments."""

import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

import flatout.torch as ft  # noqa: E402

# ---- Who else looks at torch's calls ---------------------------------------------------------


@pytest.fixture
def xw():
    return torch.randn(4, 8), torch.rand(8)


def test_jit_trace_records_the_op(xw):
    module = ft.RMSNorm(8).requires_grad_(False)
    traced = torch.jit.trace(module, xw[0])
    other = 2 * xw[0] + 1
    assert torch.equal(traced(other), module(other))


def test_forward_mode_is_refused(xw):
    x, w = xw
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="rms_norm.*forward-mode"):
            ft.rms_norm(forward_ad.make_dual(x, x), w)
        assert torch.equal(ft.rms_norm(x, w), ft.rms_norm(x.clone(), w))
    with pytest.raises(NotImplementedError, match="rms_norm.*forward-mode"):
        torch.func.jvp(lambda x: ft.rms_norm(x, w), (x,), (x,))


@pytest.mark.filterwarnings("ignore")
def test_vmap_and_batched_gradients(xw):
    x, w = xw
    assert torch.equal(torch.vmap(lambda x: ft.rms_norm(x, w))(x), ft.rms_norm(x, w))
    x.requires_grad_()
    y, v = ft.rms_norm(x, w), torch.randn(3, 4, 8)
    (got,) = torch.autograd.grad(y, x, v, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in v]
    assert torch.equal(got, torch.stack(want))


def test_batched_gradient_of_a_loss(xw):
    x, w = xw[0].requires_grad_(), torch.randn(5, 8, requires_grad=True)
    loss = ft.linear_cross_entropy(x, w, torch.arange(4))
    scales = torch.tensor([1.0, 2.0])
    batched = torch.autograd.grad(loss, (x, w), scales, is_grads_batched=True, retain_graph=True)
    for got, want in zip(batched, torch.autograd.grad(loss, (x, w)), strict=True):
        torch.testing.assert_close(got, torch.stack([want, 2 * want]))


def test_meta_tensors():
    x, ids = torch.empty(2, 4, 8, device="meta"), torch.zeros(2, 4, dtype=torch.int64).to("meta")
    weight = torch.empty(5, 8, device="meta", requires_grad=True)
    assert ft.rms_norm(x, weight[0]).shape == x.shape
    assert ft.embedding(ids, weight).shape == x.shape
    q = torch.empty(2, 4, 3, 8, device="meta")
    assert ft.attention(q, q, q).shape == q.shape
    ft.linear_cross_entropy(x, weight, ids).backward()
    assert weight.grad.is_meta and weight.grad.shape == weight.shape


def test_adamw_takes_options_that_change_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = ft.AdamW(
        [p], 1e-3, (0.9, 0.99), 1e-8, 0.1, False,
        fused=False, foreach=True, capturable=True, differentiable=False,
    )  # fmt: skip
    optimizer.step()
    assert (p < 1).all()
    torch.optim.AdamW([p], fused=True).load_state_dict(optimizer.state_dict())
