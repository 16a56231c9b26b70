"""CUDA ops against the CPU backend over the options that the ops' own files try on the CPU, and
what holds for every CUDA op: guard bands, repeats, CUDA graphs, side streams."""

import pytest
import torch
from conftest import DTYPES

import flatout.torch as ft
from flatout import _C

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


def calls(dtype=torch.bfloat16):
    """(name, a function of nothing that runs the op forward and backward)."""
    x, r, w = data(64, 1024, dtype=dtype), data(64, 1024, dtype=dtype), data(1024, dtype=dtype)
    q, k = data(1, 64, 8, 128, dtype=dtype), data(1, 64, 2, 128, dtype=dtype)
    qw, kw = data(128, dtype=dtype), data(128, dtype=dtype)
    tensors = [t.detach().cuda().requires_grad_() for t in (x, r, w, q, k, qw, kw)]
    x, r, w, q, k, qw, kw = tensors
    cos, sin = torch.randn(2, 64, 128, device="cuda", dtype=dtype)
    ids = torch.randint(0, 64, (300,), device="cuda")
    target = torch.randint(0, 1024, (64,), device="cuda")
    yield "rms_norm", (x, w), lambda: ft.rms_norm(x, w)
    yield "add_rms_norm", (x, r, w), lambda: torch.stack(ft.add_rms_norm(x, r, w))
    yield "swiglu", (x, r), lambda: ft.swiglu(x, r)
    yield "rope", (q, k), lambda: torch.cat(ft.rope(q, k, cos, sin), 2)
    yield (
        "qk_norm_rope",
        (q, k, qw, kw),
        lambda: torch.cat(ft.qk_norm_rope(q, k, qw, kw, cos, sin), 2),
    )
    yield "cross_entropy", (x,), lambda: ft.cross_entropy(x, target)
    yield "embedding", (x,), lambda: ft.embedding(ids, x)


NAMES = ["rms_norm", "add_rms_norm", "swiglu", "rope", "qk_norm_rope", "cross_entropy", "embedding"]


def run(inputs, f):
    out = f()
    torch.manual_seed(2)
    return [out.detach(), *torch.autograd.grad(out, inputs, torch.randn_like(out))]


@pytest.mark.parametrize("name", NAMES)
def test_repeats_do_not_change_a_bit(name):
    inputs, f = {n: (i, f) for n, i, f in calls()}[name]
    want = run(inputs, f)
    noise = torch.randn(2048, 2048, device="cuda")
    side = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):
            noise @ noise
        assert all(torch.equal(a, b) for a, b in zip(run(inputs, f), want, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_cuda_graph_replays_with_new_data(name):
    inputs, f = {n: (i, f) for n, i, f in calls()}[name]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        out = f()
    with torch.no_grad():
        for t in inputs:
            t.normal_()
    graph.replay()
    assert torch.equal(out, f().detach())


@pytest.mark.parametrize("name", NAMES)
def test_side_stream_is_honoured(name):
    inputs, f = {n: (i, f) for n, i, f in calls()}[name]
    want = f().detach().clone()
    saved = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        for t in inputs:
            t.fill_(float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(20_000_000)  # the values arrive late, on this stream alone
        for t, value in zip(inputs, saved, strict=True):
            t.copy_(value)
        got = f()
    side.synchronize()
    assert torch.equal(got, want)


def test_nothing_outside_the_outputs_is_written():
    stream = torch.cuda.current_stream().cuda_stream
    for H in (64, 4096, 4097):
        pool = torch.full((5, 40, H), float("nan"), device="cuda")
        gate, up, dy = torch.randn(3, 40, H, device="cuda")
        _C.swiglu_bwd(pool[1], pool[3], dy, gate, up, stream)
        torch.cuda.synchronize()
        assert pool[[1, 3]].isfinite().all() and pool[[0, 2, 4]].isnan().all()
        pool.fill_(float("nan"))
        target = torch.randint(0, H, (40,), device="cuda")
        stats, lse, one = torch.empty(4, device="cuda"), gate.logsumexp(1), up.new_ones(1)
        options = (-100, 1, 40, 0, 0.0, 0.0, 0.0, stream)
        _C.cross_entropy_bwd(pool[1], stats, one, None, gate, target, None, None, lse, *options)
        torch.cuda.synchronize()
        assert pool[1].isfinite().all() and pool[[0, 2, 3, 4]].isnan().all()
