"""The edges of the interface: tracers, transforms, tensors without memory, and wrong arguments."""

import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.autograd import forward_ad  # noqa: E402

import flatout  # noqa: E402
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


# ---- Wrong arguments -------------------------------------------------------------------------

X, Q = np.ones((4, 8), np.float32), np.ones((1, 4, 2, 8), np.float32)
W, V, IDS = X[0], np.ones((5, 8), np.float32), np.arange(4)
ONE = np.float32(1)
TX, TQ, TV, TIDS = (torch.from_numpy(a) for a in (X, Q, V, IDS))
WRONG = [
    ("rms_norm: x:", lambda: flatout.rms_norm([1.0], W)),
    ("rms_norm_bwd: x:", lambda: flatout.rms_norm_bwd(X, np.array(1.0), W)),
    ("add_rms_norm: out:", lambda: flatout.add_rms_norm(X, X, W, out=X)),
    ("swiglu: gate:", lambda: flatout.swiglu([1.0], X)),
    ("rope: out:", lambda: flatout.rope(Q, Q, X, X, out=(Q,))),
    ("rope: q:", lambda: flatout.rope([1], Q, X, X)),
    ("embedding: weight:", lambda: flatout.embedding(IDS, [[1.0]])),
    ("embedding_bwd: dy:", lambda: flatout.embedding_bwd([1.0], IDS, V)),
    ("embedding_bwd: dy:", lambda: flatout.embedding_bwd(X[:3], IDS, V)),
    ("attention: q:", lambda: flatout.attention([1], Q, Q)),
    ("attention: out:", lambda: flatout.attention(Q, Q, Q, out=Q)),
    ("attention: window:", lambda: flatout.attention(Q, Q, Q, window=4)),
    ("cross_entropy: foo:", lambda: flatout.cross_entropy(X, IDS, foo=1)),
    ("cross_entropy: x:", lambda: flatout.cross_entropy(ONE, IDS)),
    ("cross_entropy: shift:", lambda: flatout.cross_entropy(X, IDS, shift=1.7)),
    ("linear_cross_entropy_bwd: x:", lambda: flatout.linear_cross_entropy_bwd(1.0, [1.0], V, IDS)),
    (
        "linear_cross_entropy_bwd: accum_dtype:",
        lambda: flatout.linear_cross_entropy_bwd(ONE, X, V, IDS, accum_dtype="nonsense"),
    ),
    ("clip_grad_norm_: grads:", lambda: flatout.clip_grad_norm_([[1.0]], 1)),
    ("global_norm: arrays:", lambda: flatout.global_norm(3)),
    ("adamw_step: betas:", lambda: flatout.adamw_step([X], [X], [X], [X], 1, betas=(0.9,))),
    ("adamw_step: exp_avgs:", lambda: flatout.adamw_step([X], [X], [], [X], 1)),
    ("rms_norm: x:", lambda: ft.rms_norm(X, TV[0])),
    ("add_rms_norm: residual:", lambda: ft.add_rms_norm(TX, X, TV[0])),
    ("swiglu: up:", lambda: ft.swiglu(TX, X)),
    ("rope: cos:", lambda: ft.rope(TQ, None, X, TX)),
    ("embedding: ids:", lambda: ft.embedding(IDS, TV)),
    ("attention: v:", lambda: ft.attention(TQ, TQ, None)),
    ("attention: window:", lambda: ft.attention(TQ, TQ, TQ, window=4)),
    ("linear_cross_entropy: x:", lambda: ft.linear_cross_entropy(X, TV, TIDS)),
    ("linear_cross_entropy: weight:", lambda: ft.linear_cross_entropy(TX, TV[0], TIDS)),
    ("cross_entropy: x:", lambda: ft.cross_entropy(TX[0, 0], TIDS[0])),
    ("cross_entropy: shift:", lambda: ft.cross_entropy(TX, TIDS, shift=1.7)),
    ("clip_grad_norm_: parameters:", lambda: ft.clip_grad_norm_(3, 1.0)),
    ("adamw_step: grads:", lambda: ft.adamw_step([TX], [X], [TX], [TX], 1)),
]


@pytest.mark.parametrize("start, call", WRONG, ids=[f"{n} {w[0]}" for n, w in enumerate(WRONG)])
def test_wrong_arguments_are_named(start, call):
    with pytest.raises((flatout.ArgumentTypeError, flatout.ArgumentValueError)) as caught:
        call()
    assert str(caught.value).startswith(start)


def test_the_options_are_in_the_signature():
    assert inspect.signature(flatout.cross_entropy_bwd).parameters["z_loss"].default == 0.0
    assert inspect.signature(flatout.linear_cross_entropy).parameters["accum_dtype"].default is None


def test_public_functions_are_annotated():
    import inspect
    import typing

    import flatout.hf as hf

    for module in (flatout, ft, hf):
        for name in module.__all__:
            function = getattr(module, name)
            if inspect.isfunction(function):
                assert "return" in typing.get_type_hints(function), f"{module.__name__}.{name}"
