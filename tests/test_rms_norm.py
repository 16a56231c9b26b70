import ml_dtypes
import numpy as np
import pytest
import ref
import torch
from conftest import DEVICES, DTYPES, alike, assert_grad, check, f64, layouts, numeric_grad

import flatout
import flatout.torch as ft
from flatout import _C

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (33, 129), (7, 4096), (1, 4097), (300, 256)]
OFFSETS = [0.0, 1.0]


def plain(x, w, eps, offset):
    """Llama's and Gemma's RMSNorm in plain torch, rounding where those models do."""
    norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (norm * (offset + w.float())).to(x.dtype)
    return (w * norm.to(x.dtype)).to(x.dtype)


def make(shape, dtype, device="cpu"):
    x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    w = (1 + 0.3 * torch.randn(shape[-1], device=device)).to(dtype).requires_grad_()
    dy = torch.randn(shape, device=device).to(dtype)
    return x, w, dy


def grads(x, w, dy):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return torch.autograd.grad(ft.rms_norm(x, w), (x, w), dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, offset, device):
    x, w, dy = make(shape, dtype, device)
    y = ft.rms_norm(x, w, 1e-5, offset=offset)
    assert y.dtype == dtype and y.shape == x.shape
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    base = plain(x, w, 1e-5, offset)
    base_dx, base_dw = torch.autograd.grad(base, (x, w), dy)
    want_dx, want_dw = ref.rms_norm_bwd(f64(dy), f64(x), f64(w), 1e-5, offset)
    check("y", y, ref.rms_norm(f64(x), f64(w), 1e-5, offset), base)
    if shape[-1] > 1:  # one feature: dx is a difference of equal numbers
        check("dx", dx, want_dx, base_dx, floor=2.0**-20)
    check("dw", dw, want_dw, base_dw)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_against_float64(dtype, device):
    x, w, dy = make((5, 3, 192), dtype, device)
    residual, ds = torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    y, s = ft.add_rms_norm(x, residual, w, 1e-6)
    dx, dr, dw = torch.autograd.grad((y, s), (x, residual, w), (dy, ds))
    assert torch.equal(s, x + residual) and torch.equal(dx, dr)
    base_s = (x + residual).detach().requires_grad_()
    base = plain(base_s, w, 1e-6, 0.0)
    base_dx, base_dw = torch.autograd.grad(base, (base_s, w), dy)
    want_dx, want_dw = ref.rms_norm_bwd(f64(dy), f64(s), f64(w), 1e-6)
    check("y", y, ref.rms_norm(f64(s), f64(w), 1e-6), base)
    check("dx", dx, want_dx + f64(ds), base_dx + ds)
    check("dw", dw, want_dw, base_dw)


@pytest.mark.parametrize("use", ["y", "s"])
@pytest.mark.parametrize("device", DEVICES)
def test_add_with_one_output_used(use, device):
    x, w, dy = make((4, 16), torch.float32, device)
    residual = torch.randn_like(x).requires_grad_()
    y, s = ft.add_rms_norm(x, residual, w)
    dx, dr = torch.autograd.grad(y if use == "y" else s, (x, residual), dy)
    want = ref.rms_norm_bwd(f64(dy), f64(s), f64(w))[0] if use == "y" else f64(dy)
    np.testing.assert_allclose(f64(dx), want, atol=1e-5)
    np.testing.assert_allclose(f64(dr), want, atol=1e-5)


@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_by_differences(offset):
    x, w, dy = np.random.randn(3, 5), np.random.randn(5), np.random.randn(3, 5)
    dx, dw = flatout.rms_norm_bwd(dy, x, w, 1e-3, offset=offset)

    def f():
        return flatout.rms_norm(x, w, 1e-3, offset=offset)

    assert_grad(dx, numeric_grad(f, x, dy))
    assert_grad(dw, numeric_grad(f, w, dy))


def test_add_gradients_by_differences():
    x, r, w = np.random.randn(3, 5), np.random.randn(3, 5), np.random.randn(5)
    dy, ds = np.random.randn(3, 5), np.random.randn(3, 5)
    dx, dw = flatout.add_rms_norm_bwd(dy, ds, x, r, w, 1e-3)

    def f():
        return np.stack(flatout.add_rms_norm(x, r, w, 1e-3))

    both = np.stack([dy, ds])
    assert_grad(dx, numeric_grad(f, x, both))
    assert_grad(dx, numeric_grad(f, r, both))
    assert_grad(dw, numeric_grad(f, w, both))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    w = torch.randn(64, device=device)
    for name, x in layouts((4, 6, 64), device=device):
        dense = x.contiguous()
        got = ft.rms_norm(x, w), *grads(x, w, x)
        assert alike(got, (ft.rms_norm(dense, w), *grads(dense, w, dense)), name), name


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_upstream(device):
    x, w, _ = make((4, 16), torch.float32, device)
    dy = torch.randn(1, 1, device=device).expand(4, 16)
    got, want = grads(x, w, dy), grads(x, w, dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
@pytest.mark.parametrize("device", DEVICES)
def test_empty(shape, device):
    x, w, dy = make(shape, torch.float32, device)
    dx, dw = torch.autograd.grad(ft.rms_norm(x, w), (x, w), dy)
    assert dx.shape == x.shape and not dw.any()
    empty = np.ones(shape, np.float32)  # NumPy gives it strides of 0
    assert flatout.rms_norm(empty, np.ones(8, np.float32)).shape == shape


def test_mixed_dtypes():
    x = torch.randn(4, 32).bfloat16().requires_grad_()
    w = torch.randn(32).requires_grad_()
    y = ft.rms_norm(x, w)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    check("y", y, ref.rms_norm(f64(x), f64(w)), plain(x, w, 1e-6, 0.0))


@pytest.mark.parametrize("device", DEVICES)
def test_frozen(device):
    x, w, dy = make((4, 16), torch.float32, device)
    want_dx, want_dw = grads(x, w, dy)
    (dx,) = torch.autograd.grad(ft.rms_norm(x, w.detach()), (x,), dy)
    (dw,) = torch.autograd.grad(ft.rms_norm(x.detach(), w), (w,), dy)
    assert torch.equal(dx, want_dx) and torch.equal(dw, want_dw)


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device):
    x, w, _ = make((4, 16), torch.float32, device)
    want = ft.rms_norm(x, w)
    bad = x.detach().clone()
    bad[1, 3] = float("nan")
    got = ft.rms_norm(bad, w)
    assert got[1].isnan().all() and torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numpy(dtype):
    x, w = np.random.randn(5, 48).astype(dtype), np.random.randn(48).astype(dtype)
    y = flatout.rms_norm(x, w)
    assert y.dtype == x.dtype
    want = ref.rms_norm(x, w)
    atol = float(ml_dtypes.finfo(dtype).eps) * 4 * np.abs(want).max()
    np.testing.assert_allclose(y.astype(np.float64), want, atol=atol)
    backwards = flatout.rms_norm(x[:, ::-1], w[::-1])  # negative strides
    np.testing.assert_allclose(backwards[:, ::-1].astype(np.float64), want, atol=atol)


def test_out():
    x, w = torch.randn(3, 8), torch.randn(8)
    out = torch.empty(3, 8)
    assert flatout.rms_norm(x, w, out=out) is out
    assert torch.equal(out, ft.rms_norm(x, w))
    with pytest.raises(TypeError, match="out="):
        flatout.rms_norm(x, w)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_change_a_bit(count, threads):
    x, w, dy = make((257, 300), torch.float32)
    threads(4)
    want = grads(x, w, dy)
    threads(count)
    got = grads(x, w, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


BAD = [
    (dict(x=None), TypeError, "x: expected an array"),
    (dict(x=torch.ones(4, 8, dtype=torch.int64)), TypeError, "x: expected a floating dtype"),
    (dict(x=torch.ones(())), ValueError, "x: expected at least 1 dimension"),
    (dict(x=torch.ones(4, 0), w=torch.ones(0), y=torch.ones(4, 0)), ValueError, "at least 1, got"),
    (dict(w=torch.ones(7)), ValueError, r"w: expected shape \(8,\), got \(7,\)"),
    (dict(w=torch.ones(8).double()), TypeError, "w: expected"),
    (dict(w=torch.ones(16)[::2]), ValueError, "w: expected a contiguous last dimension"),
    (dict(y=torch.ones(4, 9)), ValueError, r"y: expected shape \(4, 8\)"),
    (dict(y=torch.ones(4, 8).half()), TypeError, "y: expected float32 as x has, got float16"),
    (dict(rstd=torch.ones(3)), ValueError, r"rstd: expected shape \(4,\)"),
    (dict(rstd=torch.ones(4).double()), TypeError, "rstd: expected float32"),
    (dict(eps=float("nan")), ValueError, "eps: expected a finite number"),
    (dict(eps=-1.0), ValueError, "eps: expected a finite number"),
    (dict(eps="1"), TypeError, "eps: expected a real number"),
]


@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input(wrong, error, message):
    good = dict(y=torch.full((4, 8), 7.0), rstd=torch.ones(4), x=torch.ones(4, 8), w=torch.ones(8))
    args = {**good, "eps": 1e-6, **wrong}
    with pytest.raises(error, match=message):
        _C.rms_norm_fwd(args["y"], args["rstd"], args["x"], args["w"], args["eps"], 0.0)
    assert (good["y"] == 7).all(), "written before the checks"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(dw=None), "dw_partial: expected an array exactly where dw is one, got an array"),
        (dict(partial=torch.ones(4, 7)), r"dw_partial: expected shape \(4, 8\), got \(4, 7\)"),
        (dict(partial=torch.ones(0, 8)), "dw_partial: expected at least 1 row, got 0"),
        (dict(dy=torch.ones(3, 8)), r"dy: expected shape \(4, 8\), got \(3, 8\)"),
        (dict(dx=torch.ones(4, 8)[:, :7]), r"dx: expected shape"),
    ],
)
def test_bad_backward_input(change, message):
    args = dict(dx=torch.ones(4, 8), dw=torch.ones(8), partial=torch.ones(2, 8))
    args |= dict(dy=torch.ones(4, 8), x=torch.ones(4, 8), w=torch.ones(8), rstd=torch.ones(4))
    with pytest.raises(ValueError, match=message):
        _C.rms_norm_bwd(*(args | change).values(), 0.0)


def test_torch_registration():
    x, w, dy = make((5, 12), torch.float32)
    x, w = x.detach(), w.detach()
    rstd = ft.ops.rms_norm_fwd(x, w, 1e-6, 0.0, True)[1]
    for a in (x, torch.randn(12, 5).t()):
        torch.library.opcheck(ft.ops.rms_norm_fwd.default, (a, w, 1e-6, 0.0, True))
        torch.library.opcheck(ft.ops.rms_norm_fwd.default, (a, w, 1e-6, 0.0, False))
        torch.library.opcheck(ft.ops.rms_norm_bwd.default, (dy, a, w, rstd, 0.0, True))
        torch.library.opcheck(ft.ops.add_rms_norm_fwd.default, (a, a, w, 1e-6, 0.0, True))
        torch.library.opcheck(ft.ops.add_rms_norm_bwd.default, (dy, None, a, w, rstd, 0.0, True))


def test_compile():
    def f(x, r, w):
        y, s = ft.add_rms_norm(ft.rms_norm(x, w), r, w)
        return (y * s).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        x, w, r = make((n, 16), torch.float32)
        want = torch.autograd.grad(f(x, r, w), (x, w))
        got = torch.autograd.grad(compiled(x, r, w), (x, w))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_double_backward_is_refused():
    x, w, dy = make((2, 4), torch.float32)
    (dx,) = torch.autograd.grad(ft.rms_norm(x, w), (x,), dy.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        dx.sum().backward()
