import ml_dtypes
import numpy as np
import pytest
import ref
import torch
from conftest import DEVICES, DTYPES, alike, assert_grad, check, f64, layouts, numeric_grad

import flatout
import flatout.torch as ft

# B, S, Hq, Hk, D; the last crosses the CPU's strips
SHAPES = [
    (1, 1, 1, 1, 2),
    (2, 5, 4, 2, 64),
    (1, 33, 3, 1, 10),
    (3, 2, 2, 2, 130),
    (1, 2, 2, 1, 1100),
]
EPS = 1e-5


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def plain_rope(x, cos, sin):
    """HF's apply_rotary_pos_emb on (B, S, H, D), with tables in x's dtype as HF has them."""
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    return x * cos + rotate_half(x) * sin


def plain_norm(x, w):
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def make(shape, dtype, device="cpu"):
    """q, k, dq_out, dk_out of this dtype, and two weights."""
    B, S, Hq, Hk, D = shape
    sizes = [(B, S, Hq, D), (B, S, Hk, D)] * 2 + [(D,)] * 2
    return [torch.randn(size, device=device).to(dtype) for size in sizes]


def tables(*size, dtype=torch.float32, device="cpu"):
    """cos and sin of any angles: the halves of a head need not be equal."""
    angle = torch.randn(size, device=device, dtype=torch.float64)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def grads(f, inputs, *upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves, upstream)


def rope_grads(q, k, dq_out, dk_out, cos, sin):
    return grads(lambda q, k: ft.rope(q, k, cos, sin), (q, k), dq_out, dk_out)


def norm_grads(q, k, dq_out, dk_out, qw, kw, cos, sin):
    f = lambda *x: ft.qk_norm_rope(*x, cos, sin, EPS)  # noqa: E731
    return grads(f, (q, k, qw, kw), dq_out, dk_out)


# ---- Against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rope_against_float64(shape, dtype, device):
    q, k, dq_out, dk_out, _, _ = make(shape, dtype, device)
    cos, sin = tables(shape[1], shape[4], dtype=dtype, device=device)
    out = ft.rope(q, k, cos, sin)
    gradients = rope_grads(q, k, dq_out, dk_out, cos, sin)
    for x, dx_out, y, dx in zip((q, k), (dq_out, dk_out), out, gradients, strict=True):
        assert y.dtype == dx.dtype == dtype
        base = plain_rope(x, cos, sin)
        base_dx = grads(lambda x: plain_rope(x, cos, sin), (x,), dx_out)[0]
        check("out", y, ref.rope(f64(x), f64(cos), f64(sin)), base)
        check("dx", dx, ref.rope_bwd(f64(dx_out), f64(cos), f64(sin)), base_dx)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_rope_against_float64(shape, dtype, device):
    q, k, dq_out, dk_out, qw, kw = make(shape, dtype, device)
    cos, sin = tables(shape[1], shape[4], dtype=dtype, device=device)
    out = ft.qk_norm_rope(q, k, qw, kw, cos, sin, EPS)
    dq, dk, dqw, dkw = norm_grads(q, k, dq_out, dk_out, qw, kw, cos, sin)
    c, s = f64(cos), f64(sin)
    for x, w, dx_out, y, dx, dw in (
        (q, qw, dq_out, out[0], dq, dqw),
        (k, kw, dk_out, out[1], dk, dkw),
    ):
        base = plain_rope(plain_norm(x, w), cos, sin)
        f = lambda x, w: plain_rope(plain_norm(x, w), cos, sin)  # noqa: E731
        base_dx, base_dw = grads(f, (x, w), dx_out)
        want_dx, want_dw = ref.rms_norm_bwd(ref.rope_bwd(f64(dx_out), c, s), f64(x), f64(w), EPS)
        check("out", y, ref.rope(ref.rms_norm(f64(x), f64(w), EPS), c, s), base)
        check("dx", dx, want_dx, base_dx, floor=2.0**-20)
        check("dw", dw, want_dw, base_dw)


def test_float64():
    q, k, dq_out, dk_out, qw, kw = make((2, 5, 4, 2, 6), torch.float64)
    cos, sin = tables(5, 6, dtype=torch.float64)
    c, s = f64(cos), f64(sin)
    got = [*ft.rope(q, k, cos, sin), *rope_grads(q, k, dq_out, dk_out, cos, sin)]
    want = [ref.rope(f64(x), c, s) for x in (q, k)]
    want += [ref.rope_bwd(f64(x), c, s) for x in (dq_out, dk_out)]
    normed = [ref.rms_norm(f64(x), f64(w), EPS) for x, w in ((q, qw), (k, kw))]
    got += ft.qk_norm_rope(q, k, qw, kw, cos, sin, EPS)
    want += [ref.rope(x, c, s) for x in normed]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14)


# ---- Gradients by differences --------------------------------------------------------------------


def small():
    q, k = np.random.randn(2, 3, 2, 4), np.random.randn(2, 3, 1, 4)
    angle = np.random.randn(3, 4)
    return q, k, np.random.randn(*q.shape), np.random.randn(*k.shape), np.cos(angle), np.sin(angle)


def test_rope_by_differences():
    q, k, dq_out, dk_out, cos, sin = small()
    dq, dk = flatout.rope_bwd(dq_out, dk_out, q, k, cos, sin)
    assert_grad(dq, numeric_grad(lambda: flatout.rope(q, k, cos, sin)[0], q, dq_out))
    assert_grad(dk, numeric_grad(lambda: flatout.rope(q, k, cos, sin)[1], k, dk_out))
    alone, none = flatout.rope_bwd(dq_out, None, q, None, cos, sin)
    assert none is None and np.array_equal(alone, dq)


def test_norm_rope_by_differences():
    q, k, dq_out, dk_out, cos, sin = small()
    qw, kw = np.random.randn(4), np.random.randn(4)
    got = flatout.qk_norm_rope_bwd(dq_out, dk_out, q, k, qw, kw, cos, sin, 1e-3)

    def f(i):
        return lambda: flatout.qk_norm_rope(q, k, qw, kw, cos, sin, 1e-3)[i]

    assert_grad(got[0], numeric_grad(f(0), q, dq_out))
    assert_grad(got[1], numeric_grad(f(1), k, dk_out))
    assert_grad(got[2], numeric_grad(f(0), qw, dq_out))
    assert_grad(got[3], numeric_grad(f(1), kw, dk_out))


# ---- Shapes, layouts, dtypes ---------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_tables_of_every_shape(device):
    B, S, D = 2, 5, 8
    q, k, _, _, qw, kw = make((B, S, 3, 1, D), torch.float32, device)
    cos, sin = tables(S, D, device=device)
    want = ft.rope(q, k, cos, sin), ft.qk_norm_rope(q, k, qw, kw, cos, sin)
    for size in ((1, S, D), (B, S, D)):
        c, s = cos.expand(size), sin.expand(size).contiguous()
        got = ft.rope(q, k, c, s), ft.qk_norm_rope(q, k, qw, kw, c, s)
        assert all(map(torch.equal, sum(got, ()), sum(want, ()))), size
    cos, sin = tables(B, S, D, device=device)
    want, normed = ft.rope(q, k, cos, sin), ft.qk_norm_rope(q, k, qw, kw, cos, sin)
    packed = [x.flatten(0, 1) for x in (q, k, cos, sin)]
    got = ft.rope(*packed)
    assert all(torch.equal(a, b.flatten(0, 1)) for a, b in zip(got, want, strict=True))
    got = ft.qk_norm_rope(*packed[:2], qw, kw, *packed[2:])
    assert all(torch.equal(a, b.flatten(0, 1)) for a, b in zip(got, normed, strict=True))
    for b in range(B):  # each batch has read its own table
        assert torch.equal(want[0][b], ft.rope(q[b], k[b], cos[b], sin[b])[0])


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    cos, sin = tables(4, 64, device=device)
    w = torch.randn(64, device=device)
    for name, x in layouts((4, 6, 64), device=device):
        d = x.contiguous()
        assert all(map(torch.equal, ft.rope(x, d, cos, sin), ft.rope(d, d, cos, sin))), name
        assert all(map(torch.equal, ft.rope(d, x, cos, sin), ft.rope(d, d, cos, sin))), name
        want = rope_grads(d, d, d, d, cos, sin)
        assert all(map(torch.equal, rope_grads(d, d, x, x, cos, sin), want)), name
        want = ft.qk_norm_rope(d, d, w, w, cos, sin)
        assert alike(ft.qk_norm_rope(x, x, w, w, cos, sin), want, name), name
        want = norm_grads(d, d, d, d, w, w, cos, sin)
        assert alike(norm_grads(x, x, x, x, w, w, cos, sin), want, name), name
    q = torch.randn(4, 6, 64, device=device)
    for name, c in layouts((4, 64), device=device):
        if c.ndim == 2:
            want = ft.rope(q, q, c.contiguous(), c.contiguous())
            assert all(map(torch.equal, ft.rope(q, q, c, c), want)), name


@pytest.mark.parametrize("device", DEVICES)
def test_heads_before_sequence(device):
    """HF's (B, H, S, D) is a transposed view."""
    q, k, dq_out, dk_out, qw, kw = make((2, 5, 4, 2, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    q2, k2 = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    assert all(map(torch.equal, ft.rope(q2, k2, cos, sin), ft.rope(q, k, cos, sin)))
    want = norm_grads(q, k, dq_out, dk_out, qw, kw, cos, sin)
    assert all(map(torch.equal, norm_grads(q2, k2, dq_out, dk_out, qw, kw, cos, sin), want))


@pytest.mark.parametrize(
    "shape", [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8), (2, 5, 0, 0, 8), (2, 5, 2, 0, 8)]
)
@pytest.mark.parametrize("device", DEVICES)
def test_empty(shape, device):
    q, k, dq_out, dk_out, qw, kw = make(shape, torch.float32, device)
    cos, sin = tables(shape[1], 8, device=device)
    assert [x.shape for x in ft.rope(q, k, cos, sin)] == [q.shape, k.shape]
    assert [x.shape for x in rope_grads(q, k, dq_out, dk_out, cos, sin)] == [q.shape, k.shape]
    dq, dk, dqw, dkw = norm_grads(q, k, dq_out, dk_out, qw, kw, cos, sin)
    assert dq.shape == q.shape and dk.shape == k.shape and not dkw.any()
    assert not dqw.any() or q.numel()
    assert (
        ft.rope(torch.ones(2, 3, 1, 0, device=device), None, *torch.ones(2, 3, 0, device=device))[
            0
        ].numel()
        == 0
    )


@pytest.mark.parametrize("table", DTYPES)
def test_tables_of_another_dtype(table):
    q, k, _, _, qw, _ = make((2, 5, 4, 2, 64), torch.bfloat16)
    cos, sin = tables(5, 64, dtype=table)
    got = ft.rope(q, k, cos, sin)[0]
    want = ref.rope(f64(q), f64(cos), f64(sin))
    assert got.dtype == torch.bfloat16
    check("q", got, want, plain_rope(q, cos, sin))
    w = qw.to(table)  # weights too
    want = ref.rope(ref.rms_norm(f64(q), f64(w), EPS), f64(cos), f64(sin))
    base = plain_rope(plain_norm(q, w).to(q.dtype), cos, sin)
    check("norm", ft.qk_norm_rope(q, k, w, w, cos, sin, EPS)[0], want, base)


def test_norm_rope_is_rms_norm_then_rope():
    for dtype in DTYPES:
        q, k, _, _, qw, kw = make((2, 5, 4, 2, 64), dtype)
        cos, sin = tables(5, 64)
        want = ft.rope(ft.rms_norm(q, qw, EPS), ft.rms_norm(k, kw, EPS), cos, sin)
        assert all(map(torch.equal, ft.qk_norm_rope(q, k, qw, kw, cos, sin, EPS), want))


@pytest.mark.parametrize("device", DEVICES)
def test_backward_undoes_a_rotation(device):
    angle = torch.randn(7, 16, device=device)
    angle = torch.cat([angle, angle], -1)
    q, k, *_ = make((2, 7, 3, 1, 32), torch.float32, device)
    back = rope_grads(q, k, *ft.rope(q, k, angle.cos(), angle.sin()), angle.cos(), angle.sin())
    torch.testing.assert_close(back, (q, k))


# ---- Which gradients are asked for ---------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_without_k(device):
    q, k, dq_out, dk_out, _, _ = make((2, 5, 4, 2, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    leaf = q.clone().requires_grad_()
    got, none = ft.rope(leaf, None, cos, sin)
    assert none is None and torch.equal(got, ft.rope(q, k, cos, sin)[0])
    want = rope_grads(q, k, dq_out, dk_out, cos, sin)[0]
    assert torch.equal(torch.autograd.grad(got, leaf, dq_out)[0], want)
    assert (
        flatout.rope(*(t.cpu().numpy() if t is not None else t for t in (q, None, cos, sin)))[1]
        is None
    )


@pytest.mark.parametrize("use", [0, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_one_output_used(use, device):
    q, k, *d, qw, kw = make((2, 5, 4, 2, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    leaves = [x.clone().requires_grad_() for x in (q, k)]
    want = rope_grads(q, k, *d, cos, sin)
    out = ft.rope(*leaves, cos, sin)[use]
    got = torch.autograd.grad(out, leaves, d[use], allow_unused=True)
    assert torch.equal(got[use], want[use]) and got[1 - use] is None
    want = norm_grads(q, k, *d, qw, kw, cos, sin)
    out = ft.qk_norm_rope(*leaves, qw, kw, cos, sin, EPS)[use]
    got = torch.autograd.grad(out, leaves, d[use])
    assert torch.equal(got[use], want[use]) and not got[1 - use].any()


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_weights(device):
    q, k, dq_out, dk_out, qw, kw = make((2, 5, 4, 2, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    want = norm_grads(q, k, dq_out, dk_out, qw, kw, cos, sin)
    for frozen in ((), (2,), (3,), (2, 3)):
        args = [x.clone().requires_grad_(i not in frozen) for i, x in enumerate((q, k, qw, kw))]
        out = ft.qk_norm_rope(*args, cos, sin, EPS)
        leaves = [x for x in args if x.requires_grad]
        got = torch.autograd.grad(out, leaves, (dq_out, dk_out))
        assert all(map(torch.equal, got, [w for i, w in enumerate(want) if i not in frozen]))


# ---- NumPy, threads ------------------------------------------------------------------------------


def test_out():
    q, k, _, _, qw, kw = make((2, 5, 4, 2, 16), torch.float32)
    cos, sin = tables(5, 16)
    out = torch.empty_like(q), torch.empty_like(k)
    assert flatout.rope(q, k, cos, sin, out=out) == out
    assert all(map(torch.equal, out, ft.rope(q, k, cos, sin)))
    flatout.qk_norm_rope(q, k, qw, kw, cos, sin, out=out)
    assert all(map(torch.equal, out, ft.qk_norm_rope(q, k, qw, kw, cos, sin)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numpy(dtype):
    sizes = (2, 5, 3, 8), (2, 5, 1, 8), (8,), (8,)
    q, k, qw, kw = (np.random.randn(*size).astype(dtype) for size in sizes)
    angle = np.random.randn(5, 8)
    cos, sin = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    wide = [x.astype(np.float64) for x in (q, k, qw, kw, cos, sin)]
    want = ref.rope(wide[0], *wide[4:]), ref.rope(wide[1], *wide[4:])
    eps = float(ml_dtypes.finfo(dtype).eps)
    got = flatout.rope(q, k, cos, sin)
    assert got[0].dtype == got[1].dtype == dtype
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.astype(np.float64), b, atol=eps * np.abs(b).max())
    got = flatout.qk_norm_rope(q, k, qw, kw, cos, sin)
    for a, x, w in zip(got, wide[:2], wide[2:4], strict=True):
        b = ref.rope(ref.rms_norm(x, w), *wide[4:])
        np.testing.assert_allclose(a.astype(np.float64), b, atol=4 * eps * np.abs(b).max())
    inplace = q.copy(), k.copy()
    flatout.qk_norm_rope(*inplace, qw, kw, cos, sin, inplace=True)
    assert all(map(np.array_equal, inplace, got))
    again = flatout.rope(q[..., ::-1][..., ::-1], np.asfortranarray(k), cos, sin)
    assert all(map(np.array_equal, again, flatout.rope(q, k, cos, sin)))
    with pytest.raises(TypeError, match="out="):
        flatout.rope(None, None, cos, sin)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_change_a_bit(count, threads):
    q, k, dq_out, dk_out, qw, kw = make((3, 67, 4, 2, 32), torch.float32)
    cos, sin = tables(67, 32)

    def everything():
        return (
            *ft.rope(q, k, cos, sin),
            *rope_grads(q, k, dq_out, dk_out, cos, sin),
            *ft.qk_norm_rope(q, k, qw, kw, cos, sin),
            *norm_grads(q, k, dq_out, dk_out, qw, kw, cos, sin),
        )

    threads(4)
    want = everything()
    threads(count)
    assert all(map(torch.equal, everything(), want))


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_head(device):
    q, k, _, _, qw, kw = make((2, 5, 4, 2, 16), torch.float32, device)
    cos, sin = tables(5, 16, device=device)
    bad = q.clone()
    bad[1, 2, 3, 4] = float("nan")
    got, want = (ft.qk_norm_rope(x, k, qw, kw, cos, sin)[0] for x in (bad, q))
    assert got[1, 2, 3].isnan().all()
    got[1, 2, 3] = want[1, 2, 3]
    assert torch.equal(got, want)


# ---- torch ---------------------------------------------------------------------------------------


def test_torch_registration():
    q, k, dq_out, dk_out, qw, kw = make((2, 3, 2, 1, 8), torch.float32)
    cos, sin = tables(3, 8)
    ops, check_op = ft.ops, torch.library.opcheck
    check_op(ops.rope_fwd.default, (q, k, cos, sin))
    check_op(ops.rope_fwd.default, (q.transpose(0, 1).contiguous().transpose(0, 1), None, cos, sin))
    check_op(ops.rope_bwd.default, (dq_out, dk_out, cos, sin))
    check_op(ops.qk_norm_rope_fwd.default, (q, k, qw, kw, cos, sin, EPS, True))
    check_op(ops.qk_norm_rope_fwd.default, (q, k, qw, kw, cos, sin, EPS, False))
    rstd = ops.qk_norm_rope_fwd(q, k, qw, kw, cos, sin, EPS, True)[2:]
    args = (dq_out, dk_out, q, k, qw, kw, *rstd, cos, sin)
    check_op(ops.qk_norm_rope_bwd.default, (*args, True, True))
    check_op(ops.qk_norm_rope_bwd.default, (*args, False, True))


def test_compile():
    def f(q, k, qw, kw, cos, sin):
        q, k = ft.qk_norm_rope(q, k, qw, kw, cos, sin)
        q, _ = ft.rope(q, None, cos, sin)
        q, k = ft.rope(q * 2, k * 2, cos, sin, inplace=True)
        return q.sum() + (k * k).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        q, k, _, _, qw, kw = make((2, n, 4, 2, 8), torch.float32)
        cos, sin = tables(n, 8)
        leaves = [x.requires_grad_() for x in (q, k, qw, kw)]
        want = torch.autograd.grad(f(*leaves, cos, sin), leaves)
        got = torch.autograd.grad(compiled(*leaves, cos, sin), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_double_backward_is_refused():
    q, k, dq_out, dk_out, qw, kw = make((1, 3, 2, 1, 8), torch.float32)
    cos, sin = tables(3, 8)
    q.requires_grad_(), dq_out.requires_grad_()
    for out in (ft.rope(q, k, cos, sin), ft.qk_norm_rope(q, k, qw, kw, cos, sin)):
        (dq,) = torch.autograd.grad(out[0], q, dq_out, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiat"):
            dq.sum().backward()
