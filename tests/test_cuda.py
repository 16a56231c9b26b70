"""CUDA ops against the CPU backend, over the options that the ops' own files try on the CPU."""

import pytest
import torch
from conftest import DTYPES

import flatout.torch as ft

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def both(f, *tensors):
    """(outputs and gradients) of f on the CPU and on CUDA, from the same tensors."""
    results = []
    for device in ("cpu", "cuda"):
        moved = [t.detach().to(device).requires_grad_(t.requires_grad) for t in tensors]
        out = f(*moved)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        upstream = [torch.randn(o.shape).to(o.dtype).to(device) for o in out]
        inputs = [t for t in moved if t.requires_grad]
        used = [(o, d) for o, d in zip(out, upstream, strict=True) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in used], inputs, [d for _, d in used])
        results.append([*out, *grads])
    return results


def agree(f, *tensors, dtype):
    for cpu, cuda in zip(*both(f, *tensors), strict=True):
        a, b = cpu.detach().double(), cuda.detach().cpu().double()
        assert torch.equal(a.isnan(), b.isnan())
        a, b = a.nan_to_num(), b.nan_to_num()
        assert (a - b).abs().max() <= TOLERANCE[dtype] * max(1.0, float(a.abs().max()))


def data(*shape, dtype):
    return torch.randn(shape).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [7, 2048, 8192, 12288, 20000])
def test_widths(H, dtype):
    x, r, w = data(5, H, dtype=dtype), data(5, H, dtype=dtype), data(H, dtype=dtype)
    agree(lambda x, w: ft.rms_norm(x, w, 1e-5), x, w, dtype=dtype)
    agree(lambda x, r, w: ft.add_rms_norm(x, r, w, 1e-5, offset=1.0), x, r, w, dtype=dtype)
    agree(ft.swiglu, x, r, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tables", [torch.float32, None])
@pytest.mark.parametrize("D", [6, 32, 64, 96, 128, 256])
def test_heads(D, tables, dtype):
    q, k = data(2, 9, 5, D, dtype=dtype), data(2, 9, 1, D, dtype=dtype)
    cos, sin = torch.randn(2, 9, D).to(tables or dtype)
    weights = data(D, dtype=dtype), data(D, dtype=dtype)
    agree(lambda q, k: ft.rope(q, k, cos.to(q.device), sin.to(q.device)), q, k, dtype=dtype)

    def norm_rope(q, k, qw, kw):
        return ft.qk_norm_rope(q, k, qw, kw, cos.to(q.device), sin.to(q.device))

    agree(norm_rope, q, k, *weights, dtype=dtype)


OPTIONS = [
    {},
    dict(reduction="sum"),
    dict(reduction="none", shift=1),
    dict(label_smoothing=0.1, z_loss=1e-3),
    dict(softcap=5.0),
    dict(num_items=7),
    dict(return_lse=True, reduction="sum"),
    dict(class_weight=True, label_smoothing=0.1, z_loss=1e-3),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [7, 1000, 4099])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_cross_entropy(options, V, dtype):
    logits, target = data(4, 6, V, dtype=dtype), torch.randint(0, V, (4, 6))
    target[1, 3] = -100
    weight = torch.rand(V)

    def f(z):
        given = options
        if "class_weight" in options:
            given = {**options, "class_weight": weight.to(z.device)}
        return ft.cross_entropy(z, target.to(z.device), **given)

    agree(f, logits, dtype=dtype)


def test_cross_entropy_accuracy():
    logits, target = torch.randn(50, 11), torch.randint(0, 11, (50,))
    want = ft.cross_entropy(logits, target, return_accuracy=True)
    got = ft.cross_entropy(logits.cuda(), target.cuda(), return_accuracy=True)
    assert torch.equal(got[1].cpu(), want[1])


def test_label_out_of_range_is_nan_in_its_row():
    logits = torch.randn(4, 9, device="cuda", requires_grad=True)
    target = torch.tensor([1, 9, 3, -5], device="cuda")
    loss = ft.cross_entropy(logits, target, reduction="none")
    (grad,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    bad = torch.tensor([False, True, False, True], device="cuda")
    assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan().all(1), bad)
    assert torch.equal(grad.isnan().any(1), bad)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_id_out_of_range_is_nan_in_its_row(index):
    """And no gradient comes of it; ids that a cast to fewer bits would make valid included."""
    weight = torch.randn(5, 72, device="cuda", requires_grad=True)
    wrong = [5, -1, -(2**31), 2**31 - 1] + ([2**32, 2**40 + 1] if index is torch.int64 else [])
    ids = torch.tensor([4, *wrong, 0], device="cuda", dtype=index)
    y = ft.embedding(ids, weight)
    bad = torch.ones(len(ids), dtype=torch.bool, device="cuda")
    bad[[0, -1]] = False
    assert torch.equal(y.isnan().all(1), bad) and torch.equal(y.isnan().any(1), bad)
    (dw,) = torch.autograd.grad(y, weight, torch.ones_like(y))
    assert dw.sum(1).tolist() == [72, 0, 0, 0, 72]


def test_float64_is_refused():
    x = torch.ones(4, 8, dtype=torch.float64, device="cuda")
    for call in (
        lambda: ft.rms_norm(x, x[0]),
        lambda: ft.swiglu(x, x),
        lambda: ft.global_norm([x]),
    ):
        with pytest.raises(NotImplementedError, match="float64 runs on the CPU only"):
            call()
