import math
import sys

import ml_dtypes
import numpy as np
import pytest
import ref
import torch
import torch.nn.functional as F
from conftest import DEVICES, DTYPES, assert_grad, check, close, f64, layouts, numeric_grad

import flatout
import flatout.torch as ft
from flatout import _C

SHAPES = [((1,), 1, 2), ((3,), 7, 5), ((2, 17), 48, 130), ((4, 65), 96, 1100), ((257,), 33, 513)]
OPTIONS = {
    "plain": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "shift": dict(shift=1),
    "shift 2, none": dict(shift=2, reduction="none"),
    "class weights": dict(class_weight=True),
    "smoothing": dict(label_smoothing=0.1),
    "z": dict(z_loss=0.05),
    "softcap": dict(softcap=3.0),
    "num_items": dict(num_items=7.5),
    "all, mean": dict(class_weight=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0, shift=1),
    "all, none": dict(class_weight=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0, shift=1,
                      reduction="none"),
    "all, num_items": dict(class_weight=True, label_smoothing=0.2, z_loss=0.1, softcap=2.0,
                           num_items=3, reduction="sum"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def on_device(request):
    """New tensors of a test with a `device` are there."""
    params = getattr(request.node, "callspec", None)
    with torch.device(params.params.get("device", "cpu") if params else "cpu"):
        yield


def make(lead, H, V, dtype=torch.float32, bias=True, ignored=0.2):
    """Half of x's rows point at their label's weight: some predictions are confident."""
    w = torch.randn(V, H).to(dtype)
    target = torch.randint(0, V, lead)
    x = torch.randn(*lead, H) / H**0.5
    x = torch.where(torch.rand(*lead, 1) < 0.5, x, 3 * w[target].float() / H**0.5).to(dtype)
    target = torch.where(torch.rand(lead) < ignored, -100, target)
    target.view(-1)[-1] = V - 1
    b = (0.3 * torch.randn(V)).to(dtype) if bias else None
    return x.requires_grad_(), w.requires_grad_(), target, b if b is None else b.requires_grad_()


def given(options, V):
    """The options with real class weights in them: (for torch, for the reference)."""
    options = dict(options)
    if options.get("class_weight"):
        options["class_weight"] = torch.rand(V) + 0.5
    plain = dict(options)
    if "class_weight" in plain:
        plain["class_weight"] = f64(plain["class_weight"])
    return options, plain


def in_torch(x, w, target, bias=None, reduction="mean", shift=0, class_weight=None,
             label_smoothing=0.0, z_loss=0.0, softcap=0.0, num_items=None):  # fmt: skip
    """The same in plain torch: logits in x's dtype, everything after them in float32."""
    z = (x @ w.T if bias is None else F.linear(x, w, bias)).float()
    z = softcap * torch.tanh(z / softcap) if softcap else z
    if shift:
        z, target = z[..., :-shift, :], target[..., shift:]
    flat = target.reshape(-1)
    loss = F.cross_entropy(z.reshape(-1, z.shape[-1]), flat, class_weight, reduction="none",
                           label_smoothing=label_smoothing)  # fmt: skip
    valid = flat != -100
    zs = z_loss * z.reshape(-1, z.shape[-1]).logsumexp(-1) ** 2 * valid
    if reduction == "none":
        return (loss + zs).view(target.shape)
    if num_items is not None:
        return (loss + zs).sum() / num_items
    if reduction == "sum":
        return (loss + zs).sum()
    weights = valid if class_weight is None else class_weight[flat.clamp(min=0)] * valid
    return loss.sum() / weights.sum() + zs.sum() / valid.sum()


def cut(a, shift):
    return a[..., : a.shape[-1] - shift] if shift else a


def padded(a, shift):
    return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, shift)]) if shift else a


def grads(out, inputs, dloss, **keep):
    return torch.autograd.grad(out, [i for i in inputs if i is not None], dloss, **keep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_against_float64(name, shape, dtype, device):
    lead, H, V = shape
    shift = OPTIONS[name].get("shift", 0)
    if shift and lead[-1] < shift + 2:
        return
    x, w, target, b = make(lead, H, V, dtype)
    options, plain = given(OPTIONS[name], V)
    loss = ft.linear_cross_entropy(
        x, w, target, bias=b, chunk_size=100, accum_dtype=torch.float32, **options
    )
    base = in_torch(x, w, target, b, **options)
    assert loss.dtype == torch.float32 and loss.shape == base.shape
    each, eps = options.get("reduction") == "none", torch.finfo(dtype).eps
    # A sum of all rows, and one of a few rows: torch's error can be near zero by luck.
    few = dict(floor=max(2.0**-18, 2 * eps)) if len(target.view(-1)) < 9 else {}
    z = f64(x) @ f64(w).T + f64(b)
    want = ref.cross_entropy(z, target.cpu().numpy(), **plain)["loss"]
    rule = few or dict(floor=2.0**-20 if each else max(2.0**-20, eps / 8))
    check("loss", loss, cut(want, shift) if each else want, base, **rule)
    # A power of two: what the forward computed for 1 is scaled without another rounding.
    dloss = torch.randn(loss.shape) if each else torch.tensor(-0.5)
    got, base = grads(loss, (x, w, b), dloss), grads(base, (x, w, b), dloss)
    upstream = padded(f64(dloss), shift) if each else f64(dloss)
    labels = target.cpu().numpy()
    wanted = ref.linear_cross_entropy_bwd(upstream, f64(x), f64(w), labels, f64(b), **plain)
    for what, a, want, torchs in zip(("dx", "dw", "db"), got, wanted, base, strict=True):
        assert a.dtype == dtype
        check(what, a, want, torchs, **(few or dict(floor=2.0**-20)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_upstream_gradient(dtype, device):
    """Any upstream gradient of a reduced loss: one more rounding in 16 bits."""
    x, w, target, b = make((257,), 33, 513, dtype)
    dloss = torch.tensor(-1.2345)
    got = grads(ft.linear_cross_entropy(x, w, target, bias=b), (x, w, b), dloss)
    base = grads(in_torch(x, w, target, b), (x, w, b), dloss)
    want = ref.linear_cross_entropy_bwd(f64(dloss), f64(x), f64(w), target.cpu().numpy(), f64(b))
    for what, a, c, torchs in zip(("dx", "dw", "db"), got, want, base, strict=True):
        check(what, a, c, torchs, kmax=3, krms=2, floor=2.0**-20)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_by_differences(name):
    H, V = 3, 5
    x, w, b = np.random.randn(2, 4, H), np.random.randn(V, H), np.random.randn(V)
    target = np.random.randint(0, V, (2, 4))
    target[0, 2] = -100
    options = given(OPTIONS[name], V)[1]
    shift = options.get("shift", 0)
    kept = (2, 4 - shift)
    dloss = np.random.randn(*(kept if options.get("reduction") == "none" else ()))
    dlse = np.random.randn(*kept)

    def f():
        loss, lse = flatout.linear_cross_entropy(x, w, target, bias=b, return_lse=True, **options)
        return np.append(loss, lse)

    for of_lse in (None, dlse):
        got = flatout.linear_cross_entropy_bwd(
            dloss, x, w, target, bias=b, dlse=of_lse, chunk_size=3, **options
        )
        upstream = np.append(dloss, np.zeros(kept) if of_lse is None else of_lse)
        for a, g in zip((x, w, b), got, strict=True):
            assert_grad(g, numeric_grad(f, a, upstream))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunk_sizes(reduction, device):
    x, w, target, b = make((2, 50), 40, 300)
    results = []
    for chunk in (1, 7, 99, 100, 1000, None):
        loss, lse = ft.linear_cross_entropy(
            x, w, target, bias=b, reduction=reduction, chunk_size=chunk, return_lse=True
        )
        dloss = torch.linspace(-1, 2, loss.numel()).view(loss.shape)
        results.append((loss, lse, *grads(loss, (x, w, b), dloss)))
    alike = 3 if device == "cpu" else 0  # loss, lse, dx; cuBLASLt sums by the product's shape
    for result in results[1:]:
        assert all(map(torch.equal, result[:alike], results[0][:alike]))
        for got, want in zip(result[alike:], results[0][alike:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_accum_dtype(device):
    """dw over 64 chunks: rounded 64 times, or once."""
    x, w, target, _ = make((512,), 32, 64, torch.bfloat16)
    want = ref.linear_cross_entropy_bwd(1.0, f64(x), f64(w), target.cpu().numpy())[1]
    (base,) = grads(in_torch(x, w, target), (w,), None)
    loss = ft.linear_cross_entropy(x, w, target, chunk_size=8, accum_dtype=torch.float32)
    (once,) = grads(loss, (w,), None)
    check("dw", once, want, base)
    (often,) = grads(ft.linear_cross_entropy(x, w, target, chunk_size=8), (w,), None)
    assert not close(f64(often), want, f64(base)) and close(f64(often), want, f64(base), 10, 10)
    if device == "cuda":
        return
    in_numpy = flatout.linear_cross_entropy_bwd(
        1.0, *(a.detach().cpu().float().numpy().astype(ml_dtypes.bfloat16) for a in (x, w)),
        target.cpu().numpy(), chunk_size=8, accum_dtype=np.float32,
    )[1]  # fmt: skip
    np.testing.assert_array_equal(f64(in_numpy), f64(once))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward(reduction, device):
    """The first backward scales in place what the forward computed; nothing is scaled twice."""
    x, w, target, b = make((40,), 16, 64)
    loss = ft.linear_cross_entropy(x, w, target, bias=b, reduction=reduction, chunk_size=9)
    base = in_torch(x, w, target, b, reduction=reduction)
    for _ in range(3):
        dloss = torch.randn(loss.shape)
        got = grads(loss, (x, w, b), dloss, retain_graph=True)
        want = grads(base, (x, w, b), dloss, retain_graph=True)
        for a, c in zip(got, want, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_scaled_loss_in_float16(compiled, device):
    """As under GradScaler: without the scale most gradients of the logits are 0 in float16."""
    x, w, target, _ = make((2048,), 64, 1024, torch.float16, bias=False)
    function, scale = ft.linear_cross_entropy, torch.tensor(65536.0)
    if compiled:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    got = grads(function(x, w, target), (x, w), scale)
    base = grads(in_torch(x, w, target), (x, w), scale)
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    want = grads(F.cross_entropy(wide[0] @ wide[1].T, target), wide, None)
    for name, a, c, e in zip(("dx", "dw"), got, base, want, strict=True):
        a, c = (((t.double() / scale - e).norm() / e.norm()).item() for t in (a, c))
        assert a <= 2 * c, (name, a, c)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_lse_beside_no_other(device):
    """What the forward computed for the loss alone is of no use then, and not kept beside it."""
    x, w, target, _ = make((40,), 16, 64)
    loss, lse = ft.linear_cross_entropy(x, w, target, return_lse=True)
    node = loss.grad_fn
    assert node.grads is not None
    grads(loss + lse.mean(), (x, w), None, retain_graph=True)
    assert node.grads is None
    want = grads(ft.linear_cross_entropy(x, w, target), (x, w), None)
    for a, c in zip(grads(loss, (x, w), None), want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_backward_twice_is_refused_without_retain_graph(device):
    x, w, target, _ = make((4,), 8, 8)
    loss = ft.linear_cross_entropy(x, w, target)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_upstream_of_one_and_expanded(device):
    x, w, target, b = make((40,), 16, 64)
    loss = ft.linear_cross_entropy(x, w, target, bias=b)
    one = grads(loss, (x, w, b), torch.ones(()), retain_graph=True)
    again = grads(loss, (x, w, b), torch.ones(()))
    for a, c in zip(one, again, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-7)
    loss = ft.linear_cross_entropy(x, w, target, bias=b, reduction="none")
    spread = grads(loss, (x, w, b), torch.tensor(0.3).expand(40), retain_graph=True)
    dense = grads(loss, (x, w, b), torch.full((40,), 0.3))
    assert all(torch.equal(a, c) for a, c in zip(spread, dense, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", ["x", "w", "b", "xw", "wb", "xb"])
def test_frozen(reduction, frozen, device):
    x, w, target, b = make((40,), 16, 64)
    dloss = torch.randn(40 if reduction == "none" else ())
    loss = ft.linear_cross_entropy(x, w, target, bias=b, reduction=reduction)
    want = dict(zip("xwb", grads(loss, (x, w, b), dloss), strict=True))
    inputs = {
        k: v.detach().requires_grad_(k not in frozen) for k, v in zip("xwb", (x, w, b), strict=True)
    }
    loss = ft.linear_cross_entropy(
        inputs["x"], inputs["w"], target, bias=inputs["b"], reduction=reduction
    )
    loss.backward(dloss)
    for k, v in inputs.items():
        assert v.grad is None if k in frozen else torch.equal(v.grad, want[k])


@pytest.mark.parametrize("device", DEVICES)
def test_no_grad(device):
    x, w, target, b = make((40,), 16, 64)
    want = ft.linear_cross_entropy(x, w, target, bias=b)
    with torch.no_grad():
        got = ft.linear_cross_entropy(x, w, target, bias=b)
    assert torch.equal(got, want) and not got.requires_grad and want.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ignore_index", [0, 63, 5, -1, -(2**62)])
def test_ignore_index(ignore_index, device):
    x, w, target, b = make((40,), 16, 64, ignored=0)
    target = torch.where(torch.rand(40) < 0.3, ignore_index, target)
    loss = ft.linear_cross_entropy(x, w, target, bias=b, ignore_index=ignore_index)
    base = F.cross_entropy(F.linear(x, w, b), target, ignore_index=ignore_index)
    got, want = grads(loss, (x, w, b), None), grads(base, (x, w, b), None)
    torch.testing.assert_close(loss, base)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c)
    assert not got[0][target == ignore_index].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("lead", [(0,), (3, 0), (6,), (1, 3)])
def test_no_valid_target(reduction, lead, device):
    """All ignored, an empty batch, or all labels shifted away."""
    x, w, target, b = make(lead, 16, 64) if 0 not in lead else (
        torch.randn(*lead, 16, requires_grad=True), torch.randn(64, 16, requires_grad=True),
        torch.zeros(lead, dtype=torch.int64), torch.randn(64, requires_grad=True),
    )  # fmt: skip
    target, shift = (target, 5) if lead == (1, 3) else (torch.full_like(target, -100), 0)
    loss, accuracy = ft.linear_cross_entropy(
        x, w, target, bias=b, reduction=reduction, shift=shift, label_smoothing=0.1, z_loss=0.1,
        return_accuracy=True,
    )  # fmt: skip
    assert accuracy.isnan() and loss.isnan() if reduction == "mean" else not loss.any()
    for got, like in zip(grads(loss, (x, w, b), torch.ones_like(loss)), (x, w, b), strict=True):
        assert got.shape == like.shape and not got.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_items", [7, 3.5, torch.tensor(7), torch.tensor([3.5])])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_num_items(reduction, num_items, device):
    x, w, target, _ = make((40,), 16, 64)
    loss = ft.linear_cross_entropy(x, w, target, reduction=reduction, num_items=num_items)
    base = in_torch(x, w, target, reduction="sum") / float(num_items)
    got, want = grads(loss, (x, w), None), grads(base, (x, w), None)
    torch.testing.assert_close(loss, base)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_int32_labels(device):
    x, w, target, b = make((3, 20), 16, 64)
    loss = ft.linear_cross_entropy(x, w, target, bias=b, shift=1)
    short = ft.linear_cross_entropy(x, w, target.int(), bias=b, shift=1)
    assert torch.equal(loss, short)
    strided = torch.stack([target, target], -1)[..., 0]
    assert torch.equal(loss, ft.linear_cross_entropy(x, w, strided, bias=b, shift=1))


@pytest.mark.parametrize("label", [64, -1, 2**31 + 3, -(2**63)])
def test_label_out_of_range(label):
    x, w, target, _ = make((10,), 16, 64)
    target[4] = label
    with pytest.raises(IndexError, match="out of bounds"):
        ft.linear_cross_entropy(x, w, target)
    with pytest.raises(IndexError, match="out of bounds"):
        flatout.linear_cross_entropy(x.detach().numpy(), w.detach().numpy(), target.cpu().numpy())
    out = arguments(N=10, H=16, V=64, target=target)
    with pytest.raises(IndexError, match="out of bounds"):
        _C.linear_cross_entropy_fwd(*out.values())
    for name in ("loss", "losses", "lse", "accuracy", "predicted", "dx", "dw", "db"):
        assert (out[name] == 7).all(), f"{name} is written before the labels are checked"
    with pytest.raises(IndexError, match="out of bounds"):
        _C.linear_cross_entropy_bwd(*backward_arguments(N=10, H=16, V=64, target=target).values())
    target[4], target[0] = 3, label  # shifted away: nobody reads it
    assert ft.linear_cross_entropy(x, w, target, shift=1).isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_results(device):
    x, w, target, b = make((3, 20), 16, 64)
    loss, lse, accuracy, predicted = ft.linear_cross_entropy(
        x, w, target, bias=b, shift=2, return_lse=True, return_accuracy=True, return_predicted=True
    )
    want = ref.cross_entropy(f64(x) @ f64(w).T + f64(b), target.cpu().numpy(), shift=2)
    assert lse.shape == predicted.shape == (3, 18) and lse.requires_grad
    assert not accuracy.requires_grad and not predicted.requires_grad
    np.testing.assert_allclose(f64(lse), want["lse"][:, :-2], rtol=1e-6)
    np.testing.assert_allclose(f64(accuracy), want["accuracy"], rtol=1e-6)
    np.testing.assert_array_equal(predicted.cpu().numpy(), want["predicted"][:, :-2])
    assert 0.2 < ft.linear_cross_entropy(x, w, target, return_accuracy=True)[1] < 0.9
    some = ft.linear_cross_entropy(x, w, target, bias=b, shift=2, return_predicted=True)
    assert torch.equal(some[1], predicted)


@pytest.mark.parametrize("device", DEVICES)
def test_the_first_of_equal_logits_is_predicted(device):
    x, w = torch.ones(2, 4), torch.ones(600, 4)
    target = torch.tensor([0, 520])
    _, accuracy, predicted = ft.linear_cross_entropy(
        x, w, target, return_accuracy=True, return_predicted=True
    )
    assert predicted.tolist() == [0, 0] and accuracy == 0.5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("use", ["lse", "both"])
def test_gradient_of_lse(reduction, use, device):
    """Through ignored rows, too: lse does not depend on the label."""
    x, w, target, b = make((3, 20), 16, 64)

    def total(loss, lse):
        part = (lse * torch.linspace(-1, 1, lse.numel()).view(lse.shape)).sum()
        return part if use == "lse" else part + 0.7 * loss.sum()

    got = ft.linear_cross_entropy(
        x, w, target, bias=b, shift=1, reduction=reduction, return_lse=True
    )
    z = F.linear(x, w, b)[:, :-1]
    want = in_torch(x, w, target, b, reduction, 1), z.logsumexp(-1)
    got, want = (grads(total(*pair), (x, w, b), None) for pair in (got, want))
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numpy(dtype):
    x, w, b = (np.random.randn(*s).astype(dtype) for s in ((3, 9, 16), (50, 16), (50,)))
    target = np.random.randint(0, 50, (3, 9)).astype(np.int32)
    loss, lse, accuracy, predicted = flatout.linear_cross_entropy(
        x, w, target, bias=b, shift=1, return_lse=True, return_accuracy=True, return_predicted=True
    )
    want = ref.cross_entropy(f64(x) @ f64(w).T + f64(b), target, shift=1)
    eps = float(ml_dtypes.finfo(dtype).eps)
    atol = max(20 * eps, 1e-6) if dtype != np.float64 else 1e-13
    assert loss.dtype == lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(loss, want["loss"], atol=atol)
    np.testing.assert_allclose(lse, want["lse"][:, :-1], atol=atol)
    assert predicted.shape == (3, 8) and predicted.dtype == np.int64
    got = flatout.linear_cross_entropy_bwd(1.5, x, w, target, bias=b, shift=1)
    wanted = ref.linear_cross_entropy_bwd(1.5, x, w, target, f64(b), shift=1)
    for a, c in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(f64(a), c, atol=atol * max(1, np.abs(c).max()))
    turned = flatout.linear_cross_entropy(x[..., ::-1], w[..., ::-1], target, bias=b, shift=1)
    np.testing.assert_allclose(turned, loss, rtol=1e-5 if eps < 1e-6 else 1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    w, target = torch.randn(30, 16, requires_grad=True), torch.randint(0, 30, (4, 6))
    # On CUDA the alignment decides which of cuBLASLt's kernels runs.
    atol = 0.0 if device == "cpu" else 1e-6

    def same(a, b):
        return torch.allclose(a, b, rtol=10 * atol, atol=atol)

    for name, x in layouts((4, 6, 16), device=device):
        labels = target.view(x.shape[:-1])
        x = x.detach().requires_grad_()
        dense = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        got = ft.linear_cross_entropy(x, w, labels), ft.linear_cross_entropy(dense, w, labels)
        assert same(*got), name
        got = [grads(loss, (a, w), None) for loss, a in zip(got, (x, dense), strict=True)]
        assert all(same(a, c) for a, c in zip(*got, strict=True)), name
    turned = w.detach().t().contiguous().t()
    assert torch.equal(
        ft.linear_cross_entropy(x, turned, labels), ft.linear_cross_entropy(x, w, labels)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_one_token(device):
    x, w = torch.randn(8), torch.randn(5, 8)
    got = ft.linear_cross_entropy(x, w, torch.tensor(3))
    torch.testing.assert_close(got, F.cross_entropy(w @ x, torch.tensor(3)))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_and_mixed_dtypes(device):
    x, w, target, b = make((40,), 16, 64)
    short = [a.detach().bfloat16().requires_grad_() for a in (x, w, b)]
    want = ft.linear_cross_entropy(short[0], short[1], target, bias=short[2])
    wanted = grads(want, short, None)
    with torch.autocast(device, torch.bfloat16):
        loss = ft.linear_cross_entropy(x, w, target, bias=b)
    assert torch.equal(loss, want)
    for a, c in zip(grads(loss, (x, w, b), None), wanted, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, c.float())
    loss = ft.linear_cross_entropy(short[0], w, target, bias=b)  # x decides
    assert torch.equal(loss, want)
    if device == "cuda":
        with pytest.raises(NotImplementedError, match="float64"):
            ft.linear_cross_entropy(x.double(), w, target)
        return
    with torch.autocast(device, torch.bfloat16):
        double = ft.linear_cross_entropy(x.double(), w, target)
    assert double.dtype == torch.float64


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row(device):
    x, w, target, b = make((40,), 16, 64, ignored=0)
    bad = x.detach().clone()
    bad[7, 3] = float("nan")
    got = ft.linear_cross_entropy(bad, w, target, bias=b, reduction="none")
    want = ft.linear_cross_entropy(x, w, target, bias=b, reduction="none")
    assert got[7].isnan()
    others = torch.arange(40) != 7
    assert torch.equal(got[others], want[others])
    target[7] = -100
    assert torch.isfinite(ft.linear_cross_entropy(bad, w, target, bias=b))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_do_not_change_a_bit(reduction, threads):
    x, w, target, b = make((3, 101), 96, 700)
    results = []
    for count in (1, 2, 3):
        threads(count)
        loss = ft.linear_cross_entropy(
            x, w, target, bias=b, reduction=reduction, chunk_size=90, z_loss=0.1
        )
        results.append((loss, *grads(loss, (x, w, b), torch.full_like(loss, 0.7))))
    for result in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(result, results[0], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_torch_registration(device):
    x, w, target, b = (a.detach() for a in make((3, 5), 8, 12))
    weight, items = torch.rand(12), torch.ones(1)
    scalars = (-100, 1, 1, 0.1, 0.1, 2.0, 4, True)
    for extras in ((True,) * 6, (False,) * 6):
        for a, c in ((weight, items), (None, None)):
            args = (x, w, target, b, a, c, *scalars, *extras)
            torch.library.opcheck(ft.ops.linear_cross_entropy_fwd.default, args)
    lse = ft.ops.linear_cross_entropy_fwd(*args)[2]
    for needs in ((True, True, True), (False, True, False)):
        args = (torch.ones(()), lse, x, w, target, b, weight, None, lse, *scalars, *needs)
        torch.library.opcheck(ft.ops.linear_cross_entropy_bwd.default, args)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compile(reduction, device):
    def f(x, w, b, target):
        loss, lse, accuracy = ft.linear_cross_entropy(
            x * 1.5, w, target, bias=b, shift=1, reduction=reduction, return_lse=True,
            return_accuracy=True,
        )  # fmt: skip
        return (loss * 0.3).sum() + lse.mean() * 0.1 + accuracy

    def g(x, w, b, target):
        return ft.linear_cross_entropy(x, w, target, bias=b, num_items=7, reduction="sum") * 0.7

    for function in (f, g):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for n in (3, 5):
            x, w, target, b = make((n, 6), 16, 64)
            want, got = function(x, w, b, target), compiled(x, w, b, target)
            torch.testing.assert_close(got, want)
            got, want = grads(got, (x, w, b), None), grads(want, (x, w, b), None)
            for a, c in zip(got, want, strict=True):
                torch.testing.assert_close(a, c)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_gradients_are_computed_once(return_lse, device, monkeypatch):
    """In the forward; in the backward alone where it may get a gradient of lse."""
    module, computed = sys.modules["flatout.torch.linear_cross_entropy"], []
    for name in ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd"):
        op = getattr(module, name)

        def fill(outputs, *args, name=name, fill=op.fill):
            computed.extend([name] * any(args[-3:]))
            fill(outputs, *args)

        monkeypatch.setattr(op, "fill", fill)
    x, w, target, b = make((20,), 16, 64)

    def f(x, w, b, target):
        out = ft.linear_cross_entropy(x, w, target, bias=b, return_lse=return_lse)
        return out[0] + out[1].mean() if return_lse else out

    torch.compile(f, fullgraph=True, backend="aot_eager")(x, w, b, target).backward()
    assert computed == ["linear_cross_entropy_" + ("bwd" if return_lse else "fwd")]


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_inductor(device):
    x, w, target, b = make((20,), 16, 64)
    compiled = torch.compile(ft.linear_cross_entropy, fullgraph=True)
    got, want = compiled(x, w, target, bias=b), ft.linear_cross_entropy(x, w, target, bias=b)
    torch.testing.assert_close(got, want)
    got, want = grads(got * 2, (x, w, b), None), grads(want * 2, (x, w, b), None)
    for a, c in zip(got, want, strict=True):
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("device", DEVICES)
def test_double_backward_is_refused(device):
    x, w, target, _ = make((4,), 8, 8)
    loss = ft.linear_cross_entropy(x, w, target)
    (dx,) = torch.autograd.grad(loss, (x,), torch.ones((), requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        dx.sum().backward()


# ---- Bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(reduction="avg"), ValueError, "reduction: expected none, mean or sum, got 'avg'"),
        (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, r"target: expected shape"),
        (dict(target=torch.zeros(4)), TypeError, "target: expected int32 or int64"),
        (dict(target=None), TypeError, "target: expected a torch tensor"),
        (dict(weight=torch.ones(6, 7)), ValueError, r"w: expected shape \(6, 8\), got \(6, 7\)"),
        (dict(bias=torch.ones(5)), ValueError, r"bias: expected shape \(6,\), got \(5,\)"),
        (dict(class_weight=torch.ones(5)), ValueError, "class_weight: expected shape"),
        (dict(num_items=torch.ones(2)), (ValueError, RuntimeError), "num_items|shape"),
        (dict(num_items=3, reduction="none"), ValueError, "num_items: expected None"),
        (dict(shift=-1), ValueError, "shift: expected"),
        (dict(label_smoothing=1.5), ValueError, "label_smoothing: expected a number in 0 .. 1"),
        (dict(z_loss=float("inf")), ValueError, "z_loss: expected a finite number"),
        (dict(softcap=-1.0), ValueError, "softcap: expected a finite number"),
        (dict(chunk_size=0), ValueError, "chunk_size: expected at least 1, got 0"),
        (dict(accum_dtype=torch.float16), ValueError, "accum_dtype: expected None"),
    ],
)
def test_bad_input(wrong, error, message):
    good = dict(x=torch.ones(4, 8), weight=torch.ones(6, 8), target=torch.zeros(4).long())
    with pytest.raises(error, match=message):
        ft.linear_cross_entropy(**good | wrong)


def arguments(N=4, H=8, V=6, **change):
    """Valid arguments of _C.linear_cross_entropy_fwd, the outputs full of sevens."""
    full = {
        "loss": (), "losses": (N,), "lse": (N,), "accuracy": (), "predicted": (N,), "dx": (N, H),
        "dw": (V, H), "db": (V,), "dw_accum": (V, H), "db_accum": (V,), "logits_chunk": (2, V),
        "stats": (4,),
    }  # fmt: skip
    args = {name: torch.full(shape, 7.0) for name, shape in full.items()}
    args["predicted"] = args["predicted"].long()
    args |= dict(workspace=None, x=torch.ones(N, H), w=torch.ones(V, H))
    args |= dict(target=torch.zeros(N).long(), bias=torch.ones(V), class_weight=torch.ones(V))
    args |= dict(num_items=torch.ones(1), ignore_index=-100, reduction=1, seq=2, shift=0)
    return args | dict(label_smoothing=0.0, z_loss=0.0, softcap=0.0) | change


def backward_arguments(N=4, H=8, V=6, **change):
    args = arguments(N, H, V)
    names = ["dx", "dw", "db", "dw_accum", "db_accum", "logits_chunk", "stats", "workspace"]
    out = {name: args.pop(name) for name in names} | dict(dloss=torch.ones(()), dlse=None)
    names = ["x", "w", "target", "bias", "class_weight", "num_items", "lse"]
    out |= {name: args.pop(name) for name in names}
    names = ["ignore_index", "reduction", "seq", "shift", "label_smoothing", "z_loss", "softcap"]
    return out | {name: args[name] for name in names} | change


ONES, INTS = torch.ones, torch.zeros(4).int
BOTH = [
    (dict(x=ONES(4, 8).int()), TypeError, "x: expected a floating dtype"),
    (dict(x=ONES(2, 2, 8)), ValueError, "x: expected 2 dimensions"),
    (dict(x=ONES(4, 16)[:, ::2]), ValueError, "x: expected a contiguous last dimension"),
    (dict(w=ONES(6, 8).half()), TypeError, "w: expected float32 as x has"),
    (dict(w=ONES(6, 7)), ValueError, r"w: expected shape \(6, 8\)"),
    (dict(w=ONES(6)), ValueError, "w: expected 2 dimensions"),
    (dict(bias=ONES(5)), ValueError, r"bias: expected shape \(6,\)"),
    (
        dict(bias=ONES(6).double()),
        TypeError,
        "bias: expected float32, bfloat16 or float16 beside x",
    ),
    (dict(bias=None), ValueError, "bias: expected an array, for db is one"),
    (dict(bias=ONES(6).half()), TypeError, "db: expected float16 as bias has"),
    (dict(dx=ONES(4, 7)), ValueError, r"dx: expected shape \(4, 8\)"),
    (dict(dw=ONES(6, 8).half()), TypeError, "dw: expected float32 as w has"),
    (dict(db=ONES(5)), ValueError, r"db: expected shape \(6,\)"),
    (dict(dw_accum=ONES(6, 8).half()), TypeError, "dw_accum: expected float32"),
    (dict(dw_accum=ONES(6, 7)), ValueError, r"dw_accum: expected shape \(6, 8\)"),
    (dict(db_accum=None), ValueError, "db_accum: expected an array exactly where db is one"),
    (dict(db_accum=ONES(6).double()), TypeError, "db_accum: expected float32"),
    (dict(db_accum=ONES(5)), ValueError, r"db_accum: expected shape \(6,\)"),
    (dict(logits_chunk=ONES(2, 6).half()), TypeError, "logits_chunk: expected float32"),
    (dict(logits_chunk=ONES(2, 5)), ValueError, r"logits_chunk: expected shape \(2, 6\)"),
    (dict(logits_chunk=ONES(6, 2).t()), ValueError, "logits_chunk: expected a contiguous last"),
    (dict(logits_chunk=ONES(0, 6)), ValueError, "logits_chunk: expected at least 1 row, got 0"),
    (dict(target=ONES(4)), TypeError, "target: expected int32 or int64, got float32"),
    (dict(target=INTS()[:3]), ValueError, r"target: expected shape \(4,\)"),
    (dict(target=torch.zeros(8).long()[::2]), ValueError, "target: expected a contiguous"),
    (dict(class_weight=ONES(6).half()), TypeError, "class_weight: expected float32"),
    (dict(class_weight=ONES(5)), ValueError, r"class_weight: expected shape \(6,\)"),
    (dict(class_weight=ONES(12)[::2]), ValueError, "class_weight: expected a contiguous"),
    (dict(num_items=ONES(2)), ValueError, "num_items: expected one element, got 2"),
    (dict(num_items=ONES(1).double()), TypeError, "num_items: expected float32"),
    (dict(stats=ONES(3)), ValueError, r"stats: expected shape \(4,\)"),
    (dict(stats=ONES(4).double()), TypeError, "stats: expected float32"),
    (dict(reduction=3), ValueError, r"reduction: expected 0 \(none\), 1 \(mean\) or 2 \(sum\)"),
    (dict(reduction=-1), ValueError, r"reduction: expected 0 \(none\), 1 \(mean\) or 2 \(sum\)"),
    (dict(seq=0), ValueError, "seq: expected the last dimension of target"),
    (dict(seq=3), ValueError, "seq: expected the last dimension of target"),
    (dict(label_smoothing=-0.1), ValueError, "label_smoothing: expected a number in 0 .. 1"),
    (dict(label_smoothing=float("nan")), ValueError, "label_smoothing: expected a number"),
    (dict(z_loss=float("nan")), ValueError, "z_loss: expected a finite number"),
    (dict(softcap=float("inf")), ValueError, "softcap: expected a finite number"),
    (dict(softcap="1"), TypeError, "softcap: expected a real number"),
    (dict(shift=0.5), TypeError, "shift: expected a 64-bit integer"),
    (dict(lse=ONES(3)), ValueError, r"lse: expected shape \(4,\)"),
    (dict(lse=ONES(4).half()), TypeError, "lse: expected float32"),
]
FORWARD = [
    (dict(losses=ONES(4).double()), TypeError, "losses: expected float32"),
    (dict(losses=ONES(3)), ValueError, r"losses: expected shape \(4,\)"),
    (dict(losses=ONES(8)[::2]), ValueError, "losses: expected a contiguous"),
    (dict(loss=ONES(2)), ValueError, "loss: expected one element, got 2"),
    (dict(loss=ONES(()).double()), TypeError, "loss: expected float32"),
    (dict(loss=None), ValueError, "loss: expected None exactly for reduction none"),
    (dict(reduction=0), ValueError, "loss: expected None exactly for reduction none"),
    (dict(accuracy=ONES(2)), ValueError, "accuracy: expected one element, got 2"),
    (dict(accuracy=ONES(()).half()), TypeError, "accuracy: expected float32"),
    (dict(predicted=ONES(4)), TypeError, "predicted: expected int64"),
    (dict(predicted=torch.zeros(3).long()), ValueError, r"predicted: expected shape \(4,\)"),
    (dict(predicted=torch.zeros(8).long()[::2]), ValueError, "predicted: expected a contiguous"),
]
BACKWARD = [
    (dict(dloss=ONES(4)), ValueError, "dloss: expected one element, got 4"),
    (dict(dloss=ONES(()), reduction=0), ValueError, r"dloss: expected shape \(4,\)"),
    (dict(dloss=ONES(()).double()), TypeError, "dloss: expected float32"),
    (dict(dloss=None), TypeError, "dloss: expected an array"),
    (dict(dlse=ONES(3)), ValueError, r"dlse: expected shape \(4,\)"),
    (dict(dlse=ONES(4).half()), TypeError, "dlse: expected float32"),
]


@pytest.mark.parametrize("wrong, error, message", BOTH + FORWARD)
def test_bad_forward_arguments(wrong, error, message):
    good = arguments()
    with pytest.raises(error, match=message):
        _C.linear_cross_entropy_fwd(*(good | wrong).values())
    outputs = list(good)[: list(good).index("workspace")]
    assert all((good[name] == 7).all() for name in outputs), "written before the checks"
    _C.linear_cross_entropy_fwd(*good.values())


@pytest.mark.parametrize("wrong, error, message", BOTH + BACKWARD)
def test_bad_backward_arguments(wrong, error, message):
    good = backward_arguments()
    with pytest.raises(error, match=message):
        _C.linear_cross_entropy_bwd(*(good | wrong).values())
    assert all((good[name] == 7).all() for name in list(good)[:7]), "written before the checks"
    _C.linear_cross_entropy_bwd(*good.values())


def test_outputs_may_not_overlap():
    args = arguments()
    with pytest.raises(ValueError, match="overlap"):
        _C.linear_cross_entropy_fwd(*(args | dict(dx=args["x"])).values())


def beside_a_chunk_of_its_own(N, H, V, dtype, device, **shared):
    """Forward and backward with dw as logits_chunk, and with a chunk of N rows: the same."""
    x, w, bias = (torch.randn(s, device=device).to(dtype) for s in ((N, H), (V, H), (V,)))
    target = torch.randint(0, V, (N,), device=device)
    inputs = dict(x=x, w=w, target=target, bias=bias, class_weight=None)
    for make, call in (
        (arguments, _C.linear_cross_entropy_fwd),
        (backward_arguments, _C.linear_cross_entropy_bwd),
    ):
        results = []
        for options in (dict(logits_chunk=x.new_empty(N, V)), shared):
            dw, db = torch.empty_like(w), torch.empty_like(bias)
            outputs = dict(dx=torch.empty_like(x), dw=dw, db=db, seq=max(1, N), logits_chunk=dw)
            args = make(N, H, V) | inputs | outputs | dict(num_items=None) | options
            args = (a.to(device) if isinstance(a, torch.Tensor) else a for a in args.values())
            call(*args, *([torch.cuda.current_stream().cuda_stream] if device == "cuda" else []))
            results.append([outputs["dx"], dw, db])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)
        assert results[0][1].any() or N == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [6, 40])
def test_dw_is_the_chunk_of_logits(N, dtype, device):
    """Beside sums in float32, in one chunk and in several."""
    beside_a_chunk_of_its_own(N, 16, 32, dtype, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "N, H, V",
    [(64, 128, 512), (24, 128, 1003), (64, 64, 512), (100, 128, 300), (1, 8, 16), (0, 8, 16)],
    ids=str,
)
def test_dw_is_the_only_chunk_of_logits(N, H, V, dtype, device):
    """Without other sums: half, a part, all and hardly any of dw's rows lie on logits, whose
    columns go through the workspace, no byte larger than it must be."""
    module = sys.modules[ft.linear_cross_entropy.__module__]
    room = module._spare_bytes(torch.empty(V, H, dtype=dtype), N)
    space = torch.full((room + 64,), 7, dtype=torch.uint8, device=device)
    fits = dict(dw_accum=None, workspace=space[:room])
    beside_a_chunk_of_its_own(N, H, V, dtype, device, **fits)
    assert (space[room:] == 7).all()
    wrong = [None, torch.empty(room + 1, device=device)] + ([space[: room - 1]] if N else [])
    for workspace in wrong:
        with pytest.raises(ValueError, match="workspace: expected uint8 with room for"):
            beside_a_chunk_of_its_own(N, H, V, dtype, device, dw_accum=None, workspace=workspace)
    if N:
        with pytest.raises(
            ValueError, match="workspace: expected 0 bytes past a 16-byte boundary, got"
        ):
            beside_a_chunk_of_its_own(N, H, V, dtype, device, dw_accum=None, workspace=space[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N, V, H", [(0, 0, 4), (0, 4, 0), (0, 0, 0), (3, 4, 0), (0, 4, 4)])
def test_empty_operands(N, V, H, device):
    """Empty tensors all begin at the same address, 0: none of them is another's memory."""
    x, w = (torch.randn(n, H, device=device, requires_grad=True) for n in (N, V))
    target = torch.zeros(N, dtype=torch.int64, device=device)
    for reduction in ("sum", "none"):
        loss = ft.linear_cross_entropy(x, w, target, reduction=reduction)
        torch.testing.assert_close(loss.sum().item(), N * math.log(max(V, 1)), rtol=1e-6, atol=0)
        dx, dw = torch.autograd.grad(loss.sum(), (x, w))
        assert dx.shape == x.shape and not dw.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk", [None, 7])
def test_every_backward_gives_the_same_bits(chunk, dtype, device):
    x, w = (torch.randn(n, 32, device=device).to(dtype).requires_grad_() for n in (64, 50))
    target = torch.randint(50, (64,), device=device)
    loss = ft.linear_cross_entropy(x, w, target, chunk_size=chunk)
    dloss = torch.tensor(0.3, device=device)
    first, second, third = (
        torch.autograd.grad(loss, (x, w), dloss, retain_graph=True) for _ in range(3)
    )
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, first, third))


def test_no_upstream_gradient():
    """A caller's function may hand none on."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.set_materialize_grads(False)
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    for dtype in (torch.float32, torch.float16):  # computed in the forward, and not
        x, w = (torch.randn(n, 8, dtype=dtype, requires_grad=True) for n in (3, 5))
        loss = ft.linear_cross_entropy(x, w, torch.tensor([0, 1, 2]))
        assert torch.autograd.grad(Stop.apply(loss), (x, w), allow_unused=True) == (None, None)
