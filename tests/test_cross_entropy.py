import math
import re

import ml_dtypes
import numpy as np
import pytest
import ref
import torch
import torch.nn.functional as F
from conftest import DEVICES, DTYPES, alike, assert_grad, check, f64, layouts, numeric_grad
from test_cross_entropy_input import arguments, backward_arguments

import flatout
import flatout.torch as ft
from flatout import _C

SHAPES = [((5,), 2), ((2, 17), 130), ((3, 65), 1100), ((257,), 513)]
WEIGHTED = dict(class_weight=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0)
OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "shift": dict(shift=1),
    "class weights": dict(class_weight=True),
    "smoothing": dict(label_smoothing=0.1),
    "z": dict(z_loss=0.05),
    "softcap": dict(softcap=3.0),
    "num_items": dict(num_items=7.5),
    "all, mean": dict(**WEIGHTED, shift=2),
    "all, none": dict(**WEIGHTED, shift=1, reduction="none"),
    "all, num_items": dict(**WEIGHTED, num_items=3, reduction="sum"),
}


def make(lead, V, dtype=torch.float32, ignored=0.2, device="cpu"):
    """Half of the rows are confident of their label."""
    target = torch.randint(0, V, lead)
    z = 2 * torch.randn(*lead, V) + 9 * F.one_hot(target, V) * (torch.rand(*lead, 1) < 0.5)
    target = torch.where(torch.rand(lead) < ignored, -100, target)
    target.view(-1)[-1] = V - 1
    return z.to(device, dtype).requires_grad_(), target.to(device)


def given(options, V):
    """The options with real class weights in them: (for torch, for the reference)."""
    options = dict(options)
    if "class_weight" in options:
        options["class_weight"] = torch.rand(V) + 0.5
    return options, {k: f64(v) if k == "class_weight" else v for k, v in options.items()}


def in_torch(z, target, reduction="mean", shift=0, class_weight=None, label_smoothing=0.0,
             z_loss=0.0, softcap=0.0, num_items=None):  # fmt: skip
    z = z.float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    if shift:
        z, target = z[..., :-shift, :], target[..., shift:]
    z, flat = z.reshape(-1, z.shape[-1]), target.reshape(-1)
    loss = F.cross_entropy(z, flat, class_weight, reduction="none", label_smoothing=label_smoothing)
    valid = flat != -100
    zs = z_loss * z.logsumexp(-1) ** 2 * valid
    if reduction == "none":
        return (loss + zs).view(target.shape)
    if num_items is not None or reduction == "sum":
        return (loss + zs).sum() / (num_items or 1)
    weights = valid if class_weight is None else class_weight[flat.clamp(min=0)] * valid
    return loss.sum() / weights.sum() + zs.sum() / valid.sum()


def grad(out, z, dloss=None, **keep):
    return torch.autograd.grad(out, z, dloss, **keep)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name, shape, dtype):
    (lead, V), shift = shape, OPTIONS[name].get("shift", 0)
    z, target = make(lead, V, dtype)
    options, plain = given(OPTIONS[name], V)
    loss, base = ft.cross_entropy(z, target, **options), in_torch(z, target, **options)
    assert loss.dtype == torch.float32 and loss.shape == base.shape
    want = ref.cross_entropy(f64(z), target.numpy(), **plain)["loss"]
    each = options.get("reduction") == "none"
    if each and shift:
        want = want[..., :-shift]
    check("loss", loss, want, base, floor=2.0**-20)
    dloss = torch.randn(loss.shape)
    got, base = grad(loss, z, dloss), grad(base, z, dloss)
    upstream = f64(dloss)
    if each and shift:
        upstream = np.pad(upstream, [(0, 0)] * (len(lead) - 1) + [(0, shift)])
    want = ref.cross_entropy_bwd(upstream, f64(z), target.numpy(), **plain)
    assert got.dtype == dtype
    check("dlogits", got, want, base, floor=2.0**-21)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_by_differences(name):
    z, target = 2 * np.random.randn(2, 4, 5), np.random.randint(0, 5, (2, 4))
    target[0, 3] = -100
    options = given(OPTIONS[name], 5)[1]
    kept = (2, 4 - options.get("shift", 0))
    dloss = np.random.randn(*(kept if options.get("reduction") == "none" else ()))
    dlse = np.random.randn(*kept)

    def f():
        return np.append(*flatout.cross_entropy(z, target, return_lse=True, **options))

    for of_lse in (None, dlse):
        got = flatout.cross_entropy_bwd(dloss, z, target, dlse=of_lse, **options)
        upstream = np.append(dloss, np.zeros(kept) if of_lse is None else of_lse)
        assert_grad(got, numeric_grad(f, z, upstream))


@pytest.mark.parametrize("offset", [1000.0, -1000.0, 1e4])
@pytest.mark.parametrize("device", DEVICES)
def test_large_logits(offset, device):
    """Adding one number to all logits changes neither loss nor gradient."""
    z, target = make((40,), 64, device=device)
    z = (z.detach() * 16).round() / 16  # exact beside the offset, too
    z, moved = z.requires_grad_(), (z + offset).requires_grad_()
    loss, other = ft.cross_entropy(z, target), ft.cross_entropy(moved, target)
    torch.testing.assert_close(loss, other, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad(loss, z), grad(other, moved), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_confident_rows(device):
    """dlogits of the label is p - 1 from the unrounded p: not 0, and not a rounding error."""
    z = torch.tensor([[30.0, 14.0, 0.0], [300.0, 284.0, 0.0]], device=device, requires_grad=True)
    dz = grad(ft.cross_entropy(z, torch.tensor([0, 0], device=device), reduction="sum"), z)
    p = np.exp(-16.0)
    np.testing.assert_allclose(f64(dz)[:, 1], p, rtol=1e-5)
    np.testing.assert_allclose(f64(dz)[:, 0], -p, rtol=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e4])
@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_with_label_smoothing(offset, device):
    """sum_v cw_v lse and sum_v cw_v z_v grow with the offset, their difference does not."""
    z, target = make((40,), 64, ignored=0, device=device)
    z = (z.detach() * 16).round() / 16 + offset
    weight = torch.rand(64, device=device) + 0.5
    options = dict(reduction="none", label_smoothing=0.3)
    loss = ft.cross_entropy(z, target, class_weight=weight, **options)
    want = ref.cross_entropy(f64(z), target.cpu().numpy(), class_weight=f64(weight), **options)
    np.testing.assert_allclose(f64(loss), want["loss"], rtol=2e-6)


def forward_op(z, target):
    """loss, losses, lse, accuracy, predicted, lse_low of the sum."""
    scalars = (-100, 2, 0, 0.0, 0.0, 0.0)
    return ft.ops.cross_entropy_fwd(z, target, None, None, *scalars, True, True, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [2, 3, 64, 1001, 40000])
@pytest.mark.parametrize("device", DEVICES)
def test_two_floats_of_lse(V, dtype, device):
    """lse + lse_low is lse beyond float32's precision, lse the nearest float32."""
    z, target = make((9,), V, dtype, device=device)
    z = z.detach() + torch.linspace(-1e4, 1e4, 9, device=device)[:, None].to(dtype)
    z[0], z[1, 1:] = -torch.inf, -torch.inf
    lse, low = (f64(forward_op(z, target)[i]) for i in (2, 5))
    assert lse[0] == -np.inf and low[0] == 0 and low[1] == 0
    want = ref.cross_entropy(f64(z[1:]), target[1:].cpu().numpy())["lse"]
    np.testing.assert_allclose(lse[1:] + low[1:], want, rtol=0, atol=1e-6)
    assert (lse[1:] == (lse + low)[1:].astype(np.float32)).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_one_value(device):
    """Every logit the largest, -inf included: the first of them is predicted."""
    z = torch.tensor([-torch.inf, -3.0, 0.0, 1e4], device=device)[:, None].repeat(1, 5000)
    target = torch.zeros(4, dtype=torch.int64, device=device)
    _, losses, lse, accuracy, predicted, _ = forward_op(z, target)
    assert losses[0].isnan() and lse[0] == -torch.inf
    np.testing.assert_allclose(f64(losses)[1:], np.log(5000), rtol=1e-6)
    assert not predicted.any() and accuracy == 1


@pytest.mark.parametrize("device", DEVICES)
def test_minus_infinity(device):
    """Masked classes have probability 0; where the label is masked the loss is infinite."""
    z, target = make((6,), 600, ignored=0, device=device)
    masked = z.detach().clone()
    masked[:, 100:] = -torch.inf
    target[:] = torch.tensor([0, 5, 99, 3, 3, 599])
    masked.requires_grad_()
    loss = ft.cross_entropy(masked, target, reduction="none")
    base = F.cross_entropy(masked, target, reduction="none")
    torch.testing.assert_close(loss, base)
    assert loss[5].isinf() and loss[:5].isfinite().all()
    dz = grad(loss, masked, torch.ones(6, device=device))
    assert not dz[:5, 100:].any()
    torch.testing.assert_close(dz[:5], grad(base, masked, torch.ones(6, device=device))[:5])


@pytest.mark.parametrize("device", DEVICES)
def test_repeated_backward(device):
    z, target = make((40,), 64, device=device)
    loss, base = ft.cross_entropy(z, target), F.cross_entropy(z, target)
    for _ in range(3):
        dloss = torch.randn((), device=device)
        got, want = (grad(out, z, dloss, retain_graph=True) for out in (loss, base))
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_upstream(device):
    z, target = make((40,), 64, device=device)
    loss = ft.cross_entropy(z, target, reduction="none")
    spread = grad(loss, z, torch.tensor(0.3, device=device).expand(40), retain_graph=True)
    assert torch.equal(spread, grad(loss, z, torch.full((40,), 0.3, device=device)))


@pytest.mark.parametrize("device", DEVICES)
def test_no_grad(device):
    z, target = make((40,), 64, device=device)
    want = ft.cross_entropy(z, target)
    with torch.no_grad():
        assert torch.equal(ft.cross_entropy(z, target), want)
    assert torch.equal(ft.cross_entropy(z.detach(), target), want)


@pytest.mark.parametrize("ignore_index", [0, 63, -1, 2**40])
@pytest.mark.parametrize("device", DEVICES)
def test_ignore_index(ignore_index, device):
    z, target = make((40,), 64, ignored=0, device=device)
    target = torch.where(torch.rand(40, device=device) < 0.3, ignore_index, target)
    loss = ft.cross_entropy(z, target, ignore_index=ignore_index)
    base = F.cross_entropy(z.cpu(), target.cpu(), ignore_index=ignore_index).to(device)
    torch.testing.assert_close(loss, base)
    dz = grad(loss, z)
    torch.testing.assert_close(dz, grad(base, z))
    assert not dz[target == ignore_index].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lead", [(0,), (3, 0), (6,)])
@pytest.mark.parametrize("device", DEVICES)
def test_no_valid_target(reduction, lead, device):
    z = torch.randn(*lead, 64, device=device, requires_grad=True)
    target = torch.full(lead, -100, device=device)
    loss = ft.cross_entropy(z, target, reduction=reduction, z_loss=0.1, label_smoothing=0.1)
    assert loss.isnan() if reduction == "mean" else not loss.any()
    dz = grad(loss, z, torch.ones_like(loss))
    assert dz.shape == z.shape and not dz.any()


@pytest.mark.parametrize("device", DEVICES)
def test_ignored_rows_may_hold_anything(device):
    z, target = make((40,), 64, ignored=0, device=device)
    bad = z.detach().clone()
    bad[7, 3], bad[9] = float("nan"), float("inf")
    assert ft.cross_entropy(bad, target, reduction="none")[[7, 9]].isnan().all()
    target[[7, 9]] = -100
    loss = ft.cross_entropy(bad.requires_grad_(), target)
    dz = grad(loss, bad)
    assert loss.isfinite() and dz.isfinite().all() and not dz[[7, 9]].any()


@pytest.mark.parametrize("label", [64, -1, 2**31 + 3, -(2**63)])
def test_label_out_of_range(label):
    z, target = make((10,), 64)
    target[4] = label
    with pytest.raises(IndexError, match="out of bounds"):
        ft.cross_entropy(z, target)
    with pytest.raises(IndexError, match="out of bounds"):
        flatout.cross_entropy(z.detach().numpy(), target.numpy())
    good = arguments(N=10, V=64, target=target)
    with pytest.raises(IndexError, match="out of bounds"):
        _C.cross_entropy_fwd(*good.values())
    assert all((good[name] == 7).all() for name in list(good)[:6]), "written before the checks"
    good = backward_arguments(N=10, V=64, target=target)
    with pytest.raises(IndexError, match="out of bounds"):
        _C.cross_entropy_bwd(*good.values())
    assert (good["dlogits"] == 7).all()


@pytest.mark.parametrize("label", [64, 2**31 - 1, -(2**31)])
def test_short_label_out_of_range(label):
    z, target = make((10,), 64)
    target = target.int()
    target[4] = label
    with pytest.raises(IndexError, match="out of bounds"):
        ft.cross_entropy(z, target)
    assert ft.cross_entropy(z, target.clamp(0, 63)).isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_int32_labels(device):
    z, target = make((3, 20), 64, device=device)
    assert torch.equal(ft.cross_entropy(z, target), ft.cross_entropy(z, target.int()))


@pytest.mark.parametrize("device", DEVICES)
def test_results(device):
    z, target = make((3, 20), 64, device=device)
    loss, lse, accuracy, predicted = ft.cross_entropy(
        z, target, shift=2, return_lse=True, return_accuracy=True, return_predicted=True
    )
    want = ref.cross_entropy(f64(z), target.cpu().numpy(), shift=2)
    assert lse.shape == predicted.shape == (3, 18) and lse.requires_grad
    np.testing.assert_allclose(f64(loss), want["loss"], rtol=1e-6)
    np.testing.assert_allclose(f64(lse), want["lse"][:, :-2], rtol=1e-6)
    np.testing.assert_allclose(f64(accuracy), want["accuracy"], rtol=1e-6)
    np.testing.assert_array_equal(predicted.cpu().numpy(), want["predicted"][:, :-2])
    assert 0.2 < ft.cross_entropy(z, target, return_accuracy=True)[1] < 0.9


@pytest.mark.parametrize("use", ["lse", "both"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_lse(use, device):
    z, target = make((40,), 64, device=device)
    loss, lse = ft.cross_entropy(z, target, return_lse=True)
    want_lse, want_loss = z.logsumexp(-1), F.cross_entropy(z, target)
    slope = torch.linspace(-1, 1, 40, device=device)
    pairs = [(loss, lse), (want_loss, want_lse)]
    got, want = ((a if use == "both" else 0) + (b * slope).sum() for a, b in pairs)
    torch.testing.assert_close(grad(got, z), grad(want, z))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numpy(dtype):
    z, target = np.random.randn(3, 9, 50).astype(dtype), np.random.randint(0, 50, (3, 9))
    loss, lse = flatout.cross_entropy(z, target, shift=1, return_lse=True)
    stat = np.float64 if dtype == np.float64 else np.float32
    rtol = 1e-6 if stat == np.float32 else 1e-14
    want = ref.cross_entropy(z, target, shift=1)
    assert loss.dtype == lse.dtype == stat and lse.shape == (3, 8)
    np.testing.assert_allclose(loss, want["loss"], rtol=rtol)
    np.testing.assert_allclose(lse, want["lse"][:, :-1], rtol=rtol)
    got = flatout.cross_entropy_bwd(1.5, z, target, shift=1)
    want = ref.cross_entropy_bwd(1.5, z, target, shift=1)
    assert got.dtype == dtype and not got[:, -1].any()
    eps = float(ml_dtypes.finfo(dtype).eps)
    atol = 6e-8 if dtype == np.float16 else 0  # its smallest subnormal number
    np.testing.assert_allclose(f64(got), want, rtol=max(eps, 4 * rtol), atol=max(atol, rtol / 9))
    backwards = flatout.cross_entropy(z[..., ::-1], 49 - target, shift=1)
    np.testing.assert_allclose(backwards, loss, rtol=rtol)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    target = torch.randint(0, 16, (4, 6), device=device)
    for name, z in layouts((4, 6, 16), device=device):
        labels = target.view(z.shape[:-1])
        z = z.detach().requires_grad_()
        dense = z.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        got, want = ft.cross_entropy(z, labels), ft.cross_entropy(dense, labels)
        assert alike((got, grad(got, z)), (want, grad(want, dense)), name), name


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_change_a_bit(count, threads):
    z, target = make((3, 101), 1300)
    results = []
    for n in (count, 4):
        threads(n)
        loss = ft.cross_entropy(z, target, label_smoothing=0.1, z_loss=0.1)
        results.append((loss, grad(loss, z)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("V", [64, 67, 5003])
@pytest.mark.parametrize("device", DEVICES)
def test_gradient_in_place(V, device):
    z, target = make((40,), V, device=device)
    _, _, lse, *_, low = forward_op(z.detach(), target)
    args = backward_arguments(N=40, V=V, target=target, logits=z.detach().clone(), lse=lse)
    args |= dict(lse_low=low, class_weight=None, num_items=None, reduction=2, seq=40)
    args |= dict(stats=args["stats"].to(device), dloss=args["dloss"].to(device))
    args["dlogits"] = args["logits"]
    _C.cross_entropy_bwd(*args.values())
    assert torch.equal(args["dlogits"], grad(ft.cross_entropy(z, target, reduction="sum"), z))


def test_torch_registration():
    z, target = (a.detach() for a in make((3, 5), 12))
    weight, items, scalars = torch.rand(12), torch.ones(1), (-100, 1, 1, 0.1, 0.1, 2.0)
    for extras in ((True, True, True), (False, False, False)):
        args = (z, target, weight, items, *scalars, *extras)
        torch.library.opcheck(ft.ops.cross_entropy_fwd.default, args)
    lse = ft.ops.cross_entropy_fwd(*args)[2]
    for low in (None, torch.zeros_like(lse)):
        args = (torch.ones(()), lse, z, target, weight, items, lse, low, *scalars)
        torch.library.opcheck(ft.ops.cross_entropy_bwd.default, args)


def test_compile():
    def f(z, target):
        loss, lse = ft.cross_entropy(z * 1.5, target, shift=1, return_lse=True)
        return loss * 0.3 + lse.mean()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        z, target = make((n, 6), 64)
        torch.testing.assert_close(compiled(z, target), f(z, target))
        torch.testing.assert_close(grad(compiled(z, target), z), grad(f(z, target), z))


def test_double_backward_is_refused():
    z, target = make((4,), 8)
    dloss = torch.ones((), requires_grad=True)
    dz = grad(ft.cross_entropy(z, target), z, dloss, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        dz.sum().backward()


# ---- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(reduction="avg"), ValueError, "reduction: expected none, mean or sum, got 'avg'"),
        (dict(target=torch.zeros(3).long()), ValueError, "target: expected shape"),
        (dict(target=torch.zeros(4)), TypeError, "target: expected int32 or int64"),
        (dict(target=None), TypeError, "target: expected a"),
        (dict(class_weight=torch.ones(5)), ValueError, "class_weight: expected shape"),
        (dict(num_items=3, reduction="none"), ValueError, "num_items: expected None"),
        (dict(shift=-1), ValueError, "shift: expected"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected a number in 0 .. 1"),
        (dict(z_loss=float("inf")), ValueError, "z_loss: expected a finite number"),
        (dict(softcap=-1.0), ValueError, "softcap: expected a finite number"),
    ],
)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_bad_input(kind, wrong, error, message):
    args = dict(logits=torch.ones(4, 6), target=torch.zeros(4).long()) | wrong
    if kind == "numpy":
        args = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    with pytest.raises(error, match=message):
        (ft if kind == "torch" else flatout).cross_entropy(**args)


def test_numpy_functions_refuse_other_arrays():
    z, target = torch.ones(4, 6), torch.zeros(4).long()
    for call in (
        lambda: flatout.cross_entropy(z, target),
        lambda: flatout.cross_entropy(z.numpy(), target),
        lambda: flatout.linear_cross_entropy(z, z, target),
        lambda: flatout.linear_cross_entropy(z.numpy(), z, target.numpy()),
    ):
        with pytest.raises(TypeError, match="expected a NumPy array"):
            call()


@pytest.mark.parametrize(
    "name, upstream, shift, want",
    [
        ("dloss", dict(dloss=np.ones(3)), 0, "(), got (3,)"),
        ("dlse", dict(dloss=1.0, dlse=np.ones(8)), 0, "(2, 4), got (8,)"),
        ("dlse", dict(dloss=1.0, dlse=np.ones((2, 4))), 1, "(2, 3), got (2, 4)"),
        ("dloss", dict(dloss=1.0, reduction="none"), 0, "(2, 4), got ()"),
        ("dloss", dict(dloss=np.ones((2, 4)), reduction="none"), 5, "(2, 0), got (2, 4)"),
    ],
)
def test_numpy_refuses_upstream_gradients_of_another_shape(name, upstream, shift, want):
    x, w, target = np.ones((2, 4, 5)), np.ones((7, 5)), np.zeros((2, 4), int)
    message = re.escape(f"{name}: expected shape {want}")
    with pytest.raises(ValueError, match=f"^cross_entropy_bwd: {message}"):
        flatout.cross_entropy_bwd(logits=x, target=target, shift=shift, **upstream)
    with pytest.raises(ValueError, match=f"linear_cross_entropy_bwd: {message}"):
        flatout.linear_cross_entropy_bwd(x=x, weight=w, target=target, shift=shift, **upstream)


def test_numpy_gradient_of_one_token():
    """A target without dimensions: its loss is one number with or without a reduction."""
    z, target = np.random.randn(7), np.array(3)
    one = flatout.cross_entropy_bwd(2.0, z, target, dlse=0.5)
    for reduction in ("none", "sum"):
        got = flatout.cross_entropy_bwd(2.0, z, target, dlse=0.5, reduction=reduction)
        assert np.array_equal(got, one)
    np.testing.assert_allclose(one.sum(), 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("level", [1e15, -1e17, torch.finfo(torch.bfloat16).min])
def test_equal_logits_of_any_size(level, smoothing, dtype, device):
    """The loss is log V: beside such logits log sum exp itself cannot hold it."""
    z = torch.full((2, 8), level, dtype=dtype, device=device, requires_grad=True)
    target = torch.tensor([3, 7], device=device)
    loss = ft.cross_entropy(z, target, reduction="sum", label_smoothing=smoothing)
    want = F.cross_entropy(z, target, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(loss.item(), 2 * math.log(8), rtol=1e-5, atol=0)
    (dz,), (dwant,) = (torch.autograd.grad(x, z) for x in (loss, want))
    torch.testing.assert_close(dz, dwant)
