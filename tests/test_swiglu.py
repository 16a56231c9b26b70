import ml_dtypes
import numpy as np
import pytest
import ref
import torch
import torch.nn.functional as F
from conftest import DEVICES, DTYPES, assert_grad, check, f64, layouts, numeric_grad

import flatout
import flatout.torch as ft
from flatout import _C

SHAPES = [(1, 1), (3, 7), (2, 5, 64), (33, 129), (7, 4096), (1, 4097), (300, 256)]


def make(shape, dtype, device="cpu"):
    return [torch.randn(shape, device=device).mul(2).to(dtype) for _ in range(3)]


def grads(gate, up, dy):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    return torch.autograd.grad(ft.swiglu(gate, up), (gate, up), dy)


def packed_grad(x, dy):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(ft.swiglu(x), x, dy)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, dtype, device):
    gate, up, dy = make(shape, dtype, device)
    gate.requires_grad_(), up.requires_grad_()
    y = ft.swiglu(gate, up)
    assert y.dtype == dtype and y.shape == gate.shape
    dgate, dup = torch.autograd.grad(y, (gate, up), dy)
    base = F.silu(gate) * up
    base_dgate, base_dup = torch.autograd.grad(base, (gate, up), dy)
    want_dgate, want_dup = ref.swiglu_bwd(f64(dy), f64(gate), f64(up))
    check("y", y, ref.swiglu(f64(gate), f64(up)), base)
    check("dgate", dgate, want_dgate, base_dgate)
    check("dup", dup, want_dup, base_dup)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_is_the_same(dtype, device):
    gate, up, dy = make((2, 9, 72), dtype, device)
    x = torch.cat([gate, up], -1).requires_grad_()
    y = ft.swiglu(x)
    assert torch.equal(y, ft.swiglu(gate, up))
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.is_contiguous() and torch.equal(dx, torch.cat(grads(gate, up, dy), -1))


def test_float64():
    gate, up, dy = make((5, 33), torch.float64)
    np.testing.assert_allclose(ft.swiglu(gate, up), ref.swiglu(f64(gate), f64(up)), rtol=1e-14)
    want = ref.swiglu_bwd(f64(dy), f64(gate), f64(up))
    for got, expected in zip(grads(gate, up, dy), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-13, atol=1e-15)


def test_gradients_by_differences():
    gate, up, dy = (np.random.randn(3, 4) for _ in range(3))
    dgate, dup = flatout.swiglu_bwd(dy, gate, up)
    assert_grad(dgate, numeric_grad(lambda: flatout.swiglu(gate, up), gate, dy))
    assert_grad(dup, numeric_grad(lambda: flatout.swiglu(gate, up), up, dy))
    packed = np.random.randn(3, 8)
    dx = flatout.swiglu_bwd(dy, packed)
    assert_grad(dx, numeric_grad(lambda: flatout.swiglu(packed), packed, dy))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extremes(dtype, device):
    """Far from 0 silu is 0 or the identity, and its slope 0 or 1; nothing overflows on the way."""
    if dtype is torch.float64 and device != "cpu":
        pytest.skip("float64 runs on the CPU")
    gate = torch.tensor([-1e30, -1000.0, -0.0, 0.0, 90.0, 1000.0, 1e30], dtype=dtype).to(device)
    one = torch.ones_like(gate)
    assert torch.equal(ft.swiglu(gate, one), gate.clamp(min=0))
    dgate, dup = grads(gate, one, one)
    assert dgate.tolist() == [0, 0, 0.5, 0.5, 1, 1, 1]
    assert torch.equal(dup, gate.clamp(min=0))
    nan = ft.swiglu(torch.tensor([1.0, float("nan"), 2.0]).to(gate), one[:3]).isnan()
    assert nan.tolist() == [False, True, False]


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    for name, x in layouts((4, 6, 64), device=device):
        dense = x.contiguous()
        assert torch.equal(ft.swiglu(x, dense), ft.swiglu(dense, dense)), name
        assert torch.equal(ft.swiglu(x), ft.swiglu(dense)), name
        want = grads(dense, dense, dense)
        assert all(map(torch.equal, grads(x, dense, dense), want)), name
        assert all(map(torch.equal, grads(dense, x, x), want)), name
        dy = dense[..., :32]
        assert torch.equal(packed_grad(x, dy), packed_grad(dense, dy.contiguous())), name


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
@pytest.mark.parametrize("device", DEVICES)
def test_empty(shape, device):
    gate, up, dy = make(shape, torch.float32, device)
    assert ft.swiglu(gate, up).shape == shape
    assert [g.shape for g in grads(gate, up, dy)] == [shape, shape]
    packed = torch.cat([gate, up], -1)
    assert packed_grad(packed, dy).shape == packed.shape


@pytest.mark.parametrize("device", DEVICES)
def test_one_gradient_only(device):
    gate, up, dy = make((4, 16), torch.float32, device)
    want = grads(gate, up, dy)
    for i, (a, b) in enumerate([(gate.clone().requires_grad_(), up), (gate, up.requires_grad_())]):
        y = ft.swiglu(a, b)
        assert torch.equal(torch.autograd.grad(y, (a, b)[i], dy)[0], want[i])


def test_gradient_over_its_input():
    gate, up, dy = make((6, 700), torch.float32)
    want = grads(gate, up, dy)
    _C.swiglu_bwd(gate, up, dy, gate, up)
    assert torch.equal(gate, want[0]) and torch.equal(up, want[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numpy(dtype):
    gate, up = (np.random.randn(5, 48).astype(dtype) for _ in range(2))
    want = ref.swiglu(gate.astype(np.float64), up.astype(np.float64))
    atol = float(ml_dtypes.finfo(dtype).eps) * np.abs(want).max()
    y = flatout.swiglu(gate, up)
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(np.float64), want, atol=atol)
    packed = np.concatenate([gate, up], -1)
    np.testing.assert_array_equal(flatout.swiglu(packed), y)
    np.testing.assert_array_equal(flatout.swiglu(packed[::-1]), y[::-1])
    np.testing.assert_array_equal(flatout.swiglu(gate[:, ::-1], up[:, ::-1]), y[:, ::-1])
    both = np.concatenate(flatout.swiglu_bwd(y, gate, up), -1)
    np.testing.assert_array_equal(flatout.swiglu_bwd(y, packed), both)


def test_out():
    gate, up, out = torch.randn(3, 8), torch.randn(3, 8), torch.empty(3, 8)
    assert flatout.swiglu(gate, up, out=out) is out
    assert torch.equal(out, ft.swiglu(gate, up))
    with pytest.raises(TypeError, match="out="):
        flatout.swiglu(gate, up)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_change_a_bit(count, threads):
    gate, up, dy = make((57, 700), torch.float32)
    threads(4)
    want = [ft.swiglu(gate, up), *grads(gate, up, dy)]
    threads(count)
    assert all(map(torch.equal, [ft.swiglu(gate, up), *grads(gate, up, dy)], want))


X = torch.ones(4, 8)
BAD = [
    (dict(gate=None), TypeError, "gate: expected an array"),
    (dict(gate=X.long()), TypeError, "gate: expected a floating dtype"),
    (dict(gate=torch.ones(())), ValueError, "gate: expected at least 1 dimension"),
    (dict(gate=torch.ones(8, 4).t()), ValueError, "gate: expected a contiguous last dimension"),
    (dict(up=torch.ones(4, 7)), ValueError, r"up: expected shape \(4, 8\), got \(4, 7\)"),
    (dict(up=X.half()), TypeError, "up: expected float32 as gate has, got float16"),
    (dict(up=torch.ones(8, 4).t()), ValueError, "up: expected a contiguous last dimension"),
    (dict(y=torch.ones(3, 8)), ValueError, r"y: expected shape \(4, 8\), got \(3, 8\)"),
    (dict(y=X.double()), TypeError, "y: expected float32 as gate has"),
    (dict(y=torch.ones(8, 4).t()), ValueError, "y: expected a contiguous last dimension"),
    (dict(y=torch.ones(1, 8).expand(4, 8)), ValueError, "y: output repeats its own memory"),
    (dict(y=X, gate=X), ValueError, "y: output overlaps gate"),
    (dict(up=None), ValueError, r"y: expected shape \(4, 4\), got \(4, 8\)"),
    (dict(gate=torch.ones(4, 9), up=None), ValueError, "gate: expected .* even last dimension"),
]


@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input(wrong, error, message):
    good = dict(y=torch.full((4, 8), 7.0), gate=torch.ones(4, 8), up=torch.ones(4, 8))
    with pytest.raises(error, match=message):
        _C.swiglu_fwd(*(good | wrong).values())
    assert (good["y"] == 7).all(), "written before the checks"


@pytest.mark.parametrize("name", ["dgate", "dup", "dy", "up"])
@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (torch.ones(4, 7), ValueError, r"expected shape \(4, 8\), got \(4, 7\)"),
        (X.half(), TypeError, "expected float32 as gate has, got float16"),
        (torch.ones(8, 4).t(), ValueError, "expected a contiguous last dimension"),
    ],
)
def test_bad_backward_input(name, wrong, error, message):
    good = {n: torch.full((4, 8), 7.0) for n in ("dgate", "dup", "dy", "gate", "up")}
    with pytest.raises(error, match=f"{name}: {message}"):
        _C.swiglu_bwd(*(good | {name: wrong}).values())
    assert all((good[n] == 7).all() for n in ("dgate", "dup"))


def test_bad_packed_backward_input():
    packed, dy = torch.full((4, 8), 7.0), torch.ones(4, 4)
    for wrong in ((torch.ones(4, 8), torch.ones(4, 4), dy, packed, None),
                  (packed, None, dy, torch.ones(4, 4), torch.ones(4, 4))):  # fmt: skip
        with pytest.raises(ValueError, match="dup: expected an array exactly where up is one"):
            _C.swiglu_bwd(*wrong)
    with pytest.raises(ValueError, match=r"dgate: expected shape \(4, 8\), got \(4, 4\)"):
        _C.swiglu_bwd(torch.ones(4, 4), None, dy, packed, None)
    with pytest.raises(ValueError, match=r"dy: expected shape \(4, 4\), got \(4, 8\)"):
        _C.swiglu_bwd(torch.ones(4, 8), None, packed.clone(), packed, None)
    assert (packed == 7).all()


def test_packed_gradient_in_place():
    x, dy = torch.randn(4, 8), torch.randn(4, 4)
    want = torch.empty_like(x)
    _C.swiglu_bwd(want, None, dy, x, None)
    _C.swiglu_bwd(x, None, dy, x, None)
    assert torch.equal(x, want)


def test_bad_gradient_memory():
    a, b, dy = torch.ones(4, 8), torch.ones(4, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="dgate: output overlaps dup"):
        _C.swiglu_bwd(a, a, dy, b, b)
    pool = torch.ones(40)
    shifted = pool[1:33].view(4, 8)
    with pytest.raises(ValueError, match="dgate: output overlaps gate"):
        _C.swiglu_bwd(pool[:32].view(4, 8), a, dy, shifted, b)


def test_bad_packed():
    for call in (ft.swiglu, lambda x: flatout.swiglu(x.numpy())):
        with pytest.raises(ValueError, match=r"swiglu: gate: expected \[gate | up\] in an even"):
            call(torch.ones(3, 7))
        with pytest.raises(ValueError, match="in an even last dimension"):
            call(torch.ones(()))
    with pytest.raises(TypeError, match="gate: expected an array"):
        flatout.swiglu(None)


def test_torch_registration():
    gate, up, dy = make((5, 12), torch.float32)
    ops, check_op = ft.ops, torch.library.opcheck
    for a in (gate, torch.randn(12, 5).t()):
        check_op(ops.swiglu_fwd.default, (a, up))
        check_op(ops.swiglu_bwd.default, (dy, a, up))
        check_op(ops.swiglu_fwd.default, (a, None))
        check_op(ops.swiglu_bwd.default, (dy[:, :6], a, None))


def test_compile():
    def f(gate, up, x):
        return (ft.swiglu(gate, up) * ft.swiglu(x)).sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        args = [torch.randn(n, w, requires_grad=True) for w in (16, 16, 32)]
        want = torch.autograd.grad(f(*args), args)
        for a, b in zip(torch.autograd.grad(compiled(*args), args), want, strict=True):
            torch.testing.assert_close(a, b)


def test_double_backward_is_refused():
    gate, up, dy = make((2, 4), torch.float32)
    gate.requires_grad_(), dy.requires_grad_()
    for y in (ft.swiglu(gate, up), ft.swiglu(torch.cat([gate, up], -1))):
        (dx,) = torch.autograd.grad(y, gate, dy, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiat"):
            dx.sum().backward()
