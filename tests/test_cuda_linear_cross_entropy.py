"""Linear cross-entropy on CUDA: large vocabularies, memory, indices beyond 2^31, labels out of
range, and cuBLASLt's choice of algorithms. The same small tests as on the CPU, and those of every
op (graphs, streams, guard bands), run in the other files."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from cases import noise, same
from conftest import check, f64

import flatout.torch as ft

pytestmark = pytest.mark.gpu
GIB = 1 << 30


def make(T, H, V, dtype=torch.bfloat16, peaked=True, bias=False):
    """x half of whose rows point at their label's weight, so that half the softmaxes are peaked."""
    w = (torch.randn(V, H, device="cuda") / H**0.5).to(dtype)
    target = torch.randint(0, V, (T,), device="cuda")
    x = torch.randn(T, H, device="cuda")
    if peaked:
        x[::2] = 12 * w[target[::2]].float() + 0.1 * x[::2]
    target[3::7] = -100
    b = torch.randn(V, device="cuda").to(dtype).requires_grad_() if bias else None
    return x.to(dtype).requires_grad_(), w.requires_grad_(), target, b


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, [i for i in inputs if i is not None])


def exact(x, w, target, bias=None, **options):
    """loss, dx, dw in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    z = leaves[0] @ leaves[1].T + (0 if bias is None else bias.detach().double())
    loss = F.cross_entropy(z, target, **options)
    return loss.detach(), *gradients(loss, *leaves)


def full_logits(x, w, target, **options):
    """As transformers computes it."""
    loss = F.cross_entropy((x @ w.T).float(), target, **options)
    return loss.detach(), *gradients(loss, x, w)


# ---- Every size of row ---------------------------------------------------------------------------

# 24569 values fill a block's share of bf16; then clusters of 2, 4 and 8; beyond, rows that are
# kept at the edge of shared memory, and rows that are read twice.
VOCABULARIES = [1, 7, 511, 4099, 24569, 24577, 50257, 128256, 151936, 262144]
READ_TWICE = [(931000, torch.bfloat16), (465500, torch.float32)]


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize(
    "V, dtype",
    [(V, d) for V in VOCABULARIES for d in (torch.bfloat16, torch.float16, torch.float32)]
    + READ_TWICE,
    ids=str,
)
def test_vocabularies(V, dtype, softcap):
    """Against float64 of the same logits: the row kernel by itself (a bias-free product of one
    hidden element is exact)."""
    z = (4 * torch.randn(1, V, device="cuda")).to(dtype)
    x = torch.tensor([[1.0], [-2.0], [0.5], [0.0]], device="cuda").to(dtype).requires_grad_()
    target = torch.tensor([V - 1, 0, -100, V // 2], device="cuda")
    w = z.t().contiguous().requires_grad_()
    options = dict(softcap=softcap, label_smoothing=0.1 if softcap else 0.0, z_loss=1e-3)
    loss, lse, predicted = ft.linear_cross_entropy(
        x, w, target, reduction="none", return_lse=True, return_predicted=True, **options
    )
    z = torch.from_numpy(f64(x) @ f64(w).T)
    first = (z == z.amax(-1, keepdim=True)).int().argmax(-1)
    z = softcap * (z / softcap).tanh() if softcap else z
    labels, e, want_lse = target.cpu().clamp(min=0), options["label_smoothing"], z.logsumexp(-1)
    nll = want_lse - z.gather(1, labels[:, None])[:, 0]
    want = (1 - e) * nll + e * (want_lse - z.mean(-1)) + 1e-3 * want_lse**2
    want[2] = 0
    torch.testing.assert_close(lse.cpu().double(), want_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.cpu().double(), want, rtol=1e-5, atol=1e-5)
    assert predicted[2] == -1
    if softcap:  # float32's tanh makes equals of the largest logits
        chosen = z[:2].gather(1, predicted.cpu()[:2, None])[:, 0]
        assert (chosen >= z[:2].amax(-1) - 1e-6 * softcap).all()
    else:
        assert predicted.tolist()[:2] == first.tolist()[:2]

    upstream = torch.tensor([1.0, -0.5, 0.0, 0.25])  # of the ignored row any
    _, dw = torch.autograd.grad(loss, (x, w), upstream.cuda() + (target == -100))
    p = (z - want_lse[:, None]).exp()
    dz = p - (1 - e) * F.one_hot(labels, V) - e / V + 2e-3 * want_lse[:, None] * p
    dz *= upstream[:, None] * (1 - (z / softcap) ** 2 if softcap else 1)
    want = dz.T @ torch.from_numpy(f64(x))
    error = (dw.cpu().double() - want).abs().max()
    eps = torch.finfo(dtype).eps * (16 if dtype == torch.float32 else 2)
    assert error <= eps * want.abs().max() + 1e-7, error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("peaked", [True, False])
@pytest.mark.parametrize("chunks", [1, 2, 16])
@pytest.mark.parametrize("accum", [None, torch.float32])
def test_large_products(accum, chunks, peaked, dtype):
    """dw over every number of chunks, in the weight's dtype and in fp32, beside torch's."""
    T, H, V = 2048, 512, 8192
    x, w, target, _ = make(T, H, V, dtype, peaked)
    want, base = exact(x, w, target), full_logits(x, w, target)
    loss = ft.linear_cross_entropy(x, w, target, chunk_size=T // chunks, accum_dtype=accum)
    got = loss, *gradients(loss, x, w)
    check("loss", got[0], want[0], base[0], floor=2.0**-20)
    check("dx", got[1], want[1], base[1])
    rms = 1.5 if accum or chunks == 1 else 2.5
    check("dw", got[2], want[2], base[2], kmax=2.0 if accum or chunks == 1 else 4.0, krms=rms)


def test_logits_in_the_memory_of_dw():
    """accum_dtype=float32 without a chunk size: dw's memory holds the chunks meanwhile."""
    x, w, target, b = make(1200, 512, 300001, peaked=True, bias=True)
    results = []
    for chunk in (None, 512):
        loss = ft.linear_cross_entropy(
            x, w, target, bias=b, chunk_size=chunk, accum_dtype=torch.float32
        )
        results.append((loss.detach(), *gradients(loss, x, w, b)))
    for got, want in zip(*results, strict=True):
        rounding = torch.finfo(got.dtype).eps
        scale = want.double().abs().max().item()
        assert (got.double() - want.double()).abs().max() <= rounding * scale


def test_fp32_sums_of_few_rows():
    """Up to 2 H rows are one chunk: its logits take no more memory than the sums would."""
    x, w, target, b = make(700, 384, 300001, bias=True)
    results = []
    for options in (dict(accum_dtype=torch.float32), dict(chunk_size=700)):
        loss = ft.linear_cross_entropy(x, w, target, bias=b, **options)
        results.append((loss.detach(), *gradients(loss, x, w, b)))
    assert same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("T, H, V", [(600, 1024, 300001), (530, 544, 300008), (1100, 4096, 151936)])
def test_all_logits_in_the_memory_of_dw(T, H, V, reduction, dtype):
    """Without a chunk size: as one chunk of its own, in the forward and in the backward."""
    x, w, target, b = make(T, H, V, dtype, bias=True)
    results = []
    for chunk in (None, T, None):
        loss = ft.linear_cross_entropy(
            x, w, target, bias=b, reduction=reduction, chunk_size=chunk, z_loss=1e-4
        )
        upstream = torch.linspace(-1, 1, T, device="cuda") if reduction == "none" else None
        grads = torch.autograd.grad(loss, (x, w, b), upstream)
        results.append((loss.detach(), *grads))
    one, separate, two = results
    assert same(one, two)
    # Products of other shapes, other algorithms: one rounding, and in float32 the order of a sum of
    # V terms, each rounded.
    eps = 1e-4 if dtype == torch.float32 else torch.finfo(dtype).eps
    for got, want in zip(one, separate, strict=True):
        scale = want.double().abs().max().item()
        assert (got.double() - want.double()).abs().max() <= eps * scale


# ---- Labels out of range -------------------------------------------------------------------------


@pytest.mark.parametrize("label", [5000, -1, 2**31 + 3, -(2**63)])
def test_label_out_of_range(label):
    """Its row's loss, and its row of dx, are NaN; nothing is read or written out of bounds."""
    x, w, target, _ = make(10, 64, 5000)
    target[4] = label
    loss = ft.linear_cross_entropy(x, w, target, reduction="none")
    good = torch.arange(10, device="cuda") != 4
    assert loss[4].isnan() and loss[good].isfinite().all()
    dx, dw = torch.autograd.grad(loss, (x, w), torch.ones_like(loss))
    assert dx[4].isnan().all() and dx[good].isfinite().all() and dw.isnan().any()
    mean = ft.linear_cross_entropy(x, w, target)
    dx, _ = gradients(mean, x, w)
    assert mean.isnan() and dx[4].isnan().all()


# ---- Memory, in a fresh process ------------------------------------------------------------------

MEASURE = """
import json, sys, torch
import flatout.torch as ft
T, H, V, chunk, fp32 = json.loads(sys.argv[1])
x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16, requires_grad=True)
w = torch.empty(V, H, device="cuda", dtype=torch.bfloat16).normal_(std=H**-0.5).requires_grad_()
target = torch.randint(0, V, (T,), device="cuda")
torch.cuda.synchronize()
before = torch.cuda.memory_allocated()
torch.cuda.reset_peak_memory_stats()
loss = ft.linear_cross_entropy(
    x, w, target, chunk_size=chunk, accum_dtype=torch.float32 if fp32 else None)
loss.backward()
torch.cuda.synchronize()
grads = (x.numel() + w.numel()) * 2
print(json.dumps((torch.cuda.max_memory_allocated() - before - grads) / 2**20))
assert loss.isfinite() and x.grad.isfinite().all() and w.grad.isfinite().all()
"""


def in_a_process(code, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code, *map(json.dumps, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "T, H, chunk, fp32, most",
    [
        (2048, 4096, 2048, False, 640),
        (2048, 4096, None, False, 335),
        (16384, 4096, None, False, 335),
        (16384, 4096, None, True, 2700),
        (2048, 4096, None, True, 335),  # fp32 sums of one chunk are no sums
        (4096, 4096, None, True, 1230),
        (8192, 4096, None, True, 2450),
        (131072, 2048, None, False, 335),
    ],
)
def test_memory(T, H, chunk, fp32, most):
    """MiB beyond inputs and gradients: one chunk of logits, cuBLASLt's workspace, a few rows."""
    used = in_a_process(MEASURE, [T, H, 151936, chunk, fp32])
    assert used <= most, f"{used:.0f} MiB"


# ---- Beyond 2^31 elements ------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 16384])
def test_more_than_2_31_logits(chunk):
    """T x V beyond 2^31, over the chunks and within one: the last rows are like the first."""
    if torch.cuda.mem_get_info()[0] < 16 * GIB:
        pytest.skip("needs 16 GiB of free memory on the GPU")
    T, H, V = 16384, 64, 151936
    x, w, target, _ = make(256, H, V)
    wide = x.detach().repeat(T // 256, 1).requires_grad_()
    many = target.repeat(T // 256)
    options = dict(reduction="sum", return_lse=True)
    small, lse = ft.linear_cross_entropy(x, w, target, **options)
    large, many_lse = ft.linear_cross_entropy(wide, w, many, chunk_size=chunk, **options)
    torch.testing.assert_close(many_lse, lse.repeat(T // 256), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(large, small * (T // 256), rtol=1e-4, atol=0)
    (dx, dw), (wide_dx, wide_dw) = gradients(small, x, w), gradients(large, wide, w)
    rounding = 2.0**-7
    scale = dx.abs().max().item()
    assert (wide_dx.view(-1, *dx.shape) - dx).abs().max() <= 2 * rounding * scale
    sums = dw.double() * (T // 256)
    assert (wide_dw.double() - sums).abs().max() <= 4 * rounding * sums.abs().max()


# ---- Determinism and cuBLASLt's choice -----------------------------------------------------------


@pytest.mark.parametrize("accum", [None, torch.float32])
def test_twenty_repeats_at_size(accum):
    """Large enough that algorithms are chosen by timing, in the first call."""
    x, w, target, _ = make(1536, 1024, 32000)

    def run():
        loss = ft.linear_cross_entropy(x, w, target, chunk_size=512, accum_dtype=accum)
        return loss.detach(), *gradients(loss, x, w)

    want = run()
    for _ in range(20):
        noise("cuda")
        assert same(run(), want)


CHECKSUMS = """
import json, time, torch
import flatout.torch as ft
torch.manual_seed(0)
x = torch.randn(3000, 1024, device="cuda").bfloat16().requires_grad_()
w = (torch.randn(32000, 1024, device="cuda") / 32).bfloat16().requires_grad_()
target = torch.randint(0, 32000, (3000,), device="cuda")
def run(chunk, accum):
    loss = ft.linear_cross_entropy(x, w, target, chunk_size=chunk, accum_dtype=accum)
    bits = [g.view(torch.int16).long() for g in torch.autograd.grad(loss, (x, w))]
    return [loss.view(torch.int32).item(), *((b * b % 997).sum().item() for b in bits)]
torch.cuda.synchronize()
began = time.perf_counter()
out = [run(3000, None), run(1024, None), run(1024, torch.float32)]
torch.cuda.synchronize()
print(json.dumps([out, time.perf_counter() - began]))
"""


def test_timing_changes_no_bit(tmp_path):
    """The heuristic's first algorithm, two processes that time, one that reads the other's file."""
    cache = tmp_path / "gemm"
    first, _ = in_a_process(CHECKSUMS, FLATOUT_GEMM_TUNE="off")
    timed, seconds = in_a_process(CHECKSUMS, FLATOUT_GEMM_CACHE=str(cache))
    lines = cache.read_text().splitlines()
    again, read_seconds = in_a_process(CHECKSUMS, FLATOUT_GEMM_CACHE=str(cache))
    assert first == timed == again
    assert lines and all("cuBLASLt" in line and line.count("\t") == 1 for line in lines)
    assert sorted(cache.read_text().splitlines()) == sorted(lines)
    assert read_seconds < seconds
    cache.write_text("not a choice\n")
    assert in_a_process(CHECKSUMS, FLATOUT_GEMM_CACHE=str(cache))[0] == first


def test_first_call_in_a_graph():
    """Captured before any algorithm was chosen: nothing is timed, and replays take new data."""
    x, w, target, _ = make(700, 768, 20000)

    def run():
        loss = ft.linear_cross_entropy(x, w, target, chunk_size=300)
        return loss.detach(), *gradients(loss, x, w)

    ft.linear_cross_entropy(x[:8], w, target[:8]).backward()  # loads the libraries
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert same(out, run())


# ---- The peers' names ---------------------------------------------------------------------------


def test_compat():
    """cut-cross-entropy's and Liger's functions, modules and losses: the same bits as ours."""
    from flatout.compat.cce import LinearCrossEntropy
    from flatout.compat.cce import linear_cross_entropy as cce
    from flatout.compat.liger.transformers import LigerFusedLinearCrossEntropyLoss
    from flatout.compat.liger.transformers.functional import liger_fused_linear_cross_entropy

    x, w, target, _ = make(300, 256, 5000)
    x, target = x.detach().view(3, 100, 256).requires_grad_(), target.view(3, 100)
    flat = x.flatten(0, 1), target.flatten()
    pairs = [
        (cce(x, w, target, shift=1, softcap=20.0), dict(shift=1, softcap=20.0)),
        (LinearCrossEntropy(shift=1)(x, w, target), dict(shift=1)),
        (cce(x, w, target, reduction="sum", accum_c_fp32=True), dict(reduction="sum")),
        (liger_fused_linear_cross_entropy(flat[0], w, flat[1], lse_square_scale=1e-4),
         dict(z_loss=1e-4)),
        (LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1)(w, flat[0], flat[1]),
         dict(label_smoothing=0.1)),
    ]  # fmt: skip
    for got, options in pairs:
        want = ft.linear_cross_entropy(x, w, target, **options)
        assert torch.equal(got, want), options
        assert same(gradients(got, x, w), gradients(want, x, w)), options


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_beside_the_peers(reduction):
    """cut-cross-entropy without its filter, and Liger, where they are installed."""
    x, w, target, _ = make(512, 256, 8192, torch.bfloat16, peaked=False)
    peers = []
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        peers.append(cce(x, w, target, reduction=reduction, filter_eps=None))
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        peers.append(liger(x, w, target, reduction=reduction))
    except ImportError:
        pass
    if not peers:
        pytest.skip("neither peer is installed")
    ours = ft.linear_cross_entropy(x, w, target, reduction=reduction)
    for theirs in peers:
        torch.testing.assert_close(ours, theirs.float(), rtol=2e-2, atol=2e-2)
