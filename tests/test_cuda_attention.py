"""Attention on Hopper, in poisoned memory: against float64 over lengths, heads, masks, layouts and
dtypes; packed sequences; what must not leak; repeats; graphs; what it refuses."""

import numpy as np
import pytest
import torch
from cases import noise
from conftest import check, close, f64
from test_attention import NAMES, compare, cu_seqlens, split
from test_cuda_streams import captured, no_waiting

import flatout.torch as ft
from flatout import _C
from flatout.compat import flash_attn, flash_attn_interface

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HOPPER, reason="needs compute capability 9.0"),
]
NAN, INF = float("nan"), float("inf")
BF16, FP16 = torch.bfloat16, torch.float16
DENSE = [(1, 1), (64, 128), (128, 192), (256, 256), (239, 1), (799, 3), (113, 203), (113, 128)]
DENSE += [(128, 217), (113, 211), (108, 256), (256, 512), (384, 256), (640, 128), (512, 256)]
DENSE += [(1024, 1024), (1023, 1024), (1024, 1023), (3, 799)]
PACKED = [(1, 1), (1, 3), (2, 1), (511, 1), (3, 513), (64, 128), (128, 128), (256, 256), (113, 203)]
PACKED += [(128, 217), (113, 211), (108, 256), (256, 512), (307, 256), (640, 128), (512, 256)]
PACKED += [(1024, 1024), (1023, 1024), (1024, 1023)]
HEADS = [(6, 6), (6, 2), (6, 1)]
# left, right, softcap, scale (None: D ** -0.5)
MASKS = [(-1, -1, 0.0, None), (-1, 0, 0.0, None), (30, 0, 0.0, None), (170, 40, 0.0, None)]
MASKS += [(-1, 0, 15.0, None), (0, -1, 0.0, None), (64, 128, 5.0, -0.2), (200, -1, 0.0, 0.0)]


def visible(sq, sk, left, right):
    """Which key each query sees, (Sq, Sk)."""
    aligned = torch.arange(sq, device="cuda")[:, None] + sk - sq
    key = torch.arange(sk, device="cuda")
    mask = torch.ones(sq, sk, dtype=torch.bool, device="cuda")
    if left >= 0:
        mask &= key >= aligned - left
    if right >= 0:
        mask &= key <= aligned + right
    return mask


def plain(q, k, v, left, right, softcap, scale):
    """(out, lse) of one batch entry (S, H, D), in the dtype of q but for the softmax; float64 is
    float64 throughout."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    s = torch.matmul(q.transpose(0, 1), k.transpose(1, 2)) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    mask = visible(*s.shape[1:], left, right)
    seen = mask.any(1)
    s = s.masked_fill(~mask & seen[:, None], -INF)
    s = s if s.dtype == torch.float64 else s.float()
    p = torch.softmax(s, -1).to(q.dtype).masked_fill(~seen[:, None], 0)
    lse = torch.logsumexp(s, -1) if s.shape[2] else s.sum(-1)
    return torch.matmul(p, v).transpose(0, 1), lse.masked_fill(~seen, -INF)


def want(tensors, *mask):
    """[out, lse, dq, dk, dv] of one batch entry by plain()."""
    q, k, v, dout, dlse = tensors
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = plain(q, k, v, *mask)
    loss = (out * dout).sum() + (lse.masked_fill(lse == -INF, 0) * dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))]


def make(sq, sk, heads, D, dtype, batch=(), size=1.0):
    """q, k, v, dout, dlse of normal values."""
    Hq, Hk = heads
    shapes = [(*batch, sq, Hq, D), *[(*batch, sk, Hk, D)] * 2, (*batch, sq, Hq, D)]
    q, k, v, dout = ((size * torch.randn(s, device="cuda")).to(dtype) for s in shapes)
    return q, k, v, dout, torch.randn(*batch, Hq, sq, device="cuda")


def run(q, k, v, dout, dlse=None, **options):
    """[out, lse, dq, dk, dv], with NaN in all memory that is taken for them and for workspaces."""
    del_me = [torch.full((n,), NAN, device="cuda") for n in (1 << 26, 1 << 22, 1 << 18, 1 << 12)]
    del del_me
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    with no_waiting("cuda"):
        out, lse = ft.attention(q, k, v, return_lse=True, **options)
        results, upstream = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
        grads = torch.autograd.grad(results, (q, k, v), upstream)
    return [out.detach(), lse.detach(), *grads]


def run_both(*tensors, **options):
    """run(), and dq of the sums in a fixed order, which no other result depends on."""
    free, ordered = (run(*tensors, deterministic=d, **options) for d in (False, True))
    assert all(torch.equal(free[i], ordered[i]) for i in (0, 1, 3, 4))
    return [*free, ordered[2]]


def options_of(mask):
    left, right, softcap, scale = mask
    return dict(window=(left, right), softcap=softcap, scale=scale)


FEW = 32


def assert_right(got, tensors, *mask):
    """One batch entry of run() or run_both() against float64."""
    out, lse, dq, dk, dv, *ordered = (x.cpu() for x in got)
    exact = [x.cpu().numpy() for x in want([t.double() for t in tensors], *mask)]
    base = [x.cpu() for x in want(tensors, *mask)]
    eps, kept = torch.finfo(out.dtype).eps, [0, 1, 4]
    floor = eps / 2 if len(tensors[1]) < FEW else 2.0**-20
    parts = ([x[i] for i in kept] for x in (exact, base))
    compare([out, lse, dv], *parts, floor=floor, luck=eps / 8, names=[NAMES[i] for i in kept])
    pairs = visible(len(tensors[0]), len(tensors[1]), *mask[:2]).cpu()
    few = pairs.sum(1) < FEW  # queries
    touched = pairs[few].any(0)  # keys
    for i, x, loose in ((2, dq, few), (3, dk, touched), *((2, x, few) for x in ordered)):
        of_few, others = ([t[rows] for t in (x, torch.from_numpy(exact[i]), base[i])]
                          for rows in (loose, ~loose))  # fmt: skip
        if loose.any():
            assert_near(NAMES[i], *of_few, floor=4 * eps)
        if not loose.all():
            check(NAMES[i], *others, floor=2.0**-20, luck=eps / 8)


def assert_near(name, out, exact, base, floor):
    """dq of queries that see few keys, and dk of those. Delta of the rounded out, as every fused
    backward has it, errs by a rounding where torch's own dscores cancel exactly: too much for the
    rule of check()."""
    out, exact, base = f64(out), f64(exact), f64(base)
    if np.abs(exact).max() < 1e-9:
        assert np.abs(out).max() < 1e-5, name
        return
    assert close(out, exact, base, floor=floor), f"{name}: error {np.abs(out - exact).max()}"
    for factor in (1.25, 0.0, -1.0):
        assert not close(factor * out, exact, base, floor=floor), f"{name}: accepts x{factor}"


# ---- Against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("D", [128, 64])
def test_smoke(D):
    """First of all: one tile, several tiles, all SMs."""
    for s, heads in ((128, (1, 1)), (640, (4, 2)), (1500, (16, 4))):
        tensors = make(s, s, heads, D, BF16, (1,))
        got = run(*tensors, causal=True)
        torch.cuda.synchronize()
        assert_right([x[0] for x in got], tuple(t[0] for t in tensors), -1, 0, 0.0, None)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pair", DENSE)
def test_dense(pair, mask):
    turn = DENSE.index(pair) + MASKS.index(mask)
    heads, dtype, D = HEADS[turn % 3], (BF16, FP16)[turn // 2 % 2], (128, 64)[turn % 2]
    tensors = make(*pair, heads, D, dtype, (2,))
    got = run_both(*tensors, **options_of(mask))
    for b in range(2):
        assert_right([x[b] for x in got], tuple(t[b] for t in tensors), *mask)


@pytest.mark.parametrize("D", [8, 24, 32, 72, 80, 96, 112])
def test_head_dimensions(D):
    for mask in (MASKS[1], MASKS[4]):
        tensors = make(200, 300, (4, 2), D, BF16, (2,))
        got = run_both(*tensors, **options_of(mask))
        for b in range(2):
            assert_right([x[b] for x in got], tuple(t[b] for t in tensors), *mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s, heads", [(4096, (8, 2)), (4224, (2, 2)), (2048, (32, 8))])
def test_long(s, heads, causal):
    """More tiles than SMs; the first and the last size sum dk and dv over a group."""
    tensors = make(s, s, heads, 128, BF16, (1,))
    got = run_both(*tensors, causal=causal)
    mask = (-1, 0 if causal else -1, 0.0, None)
    h = heads[0] // heads[1]  # one key head: the float64 scores of all would be many gigabytes
    q, k, v, dout, dlse = (t[0] for t in tensors)
    part = (q[:, :h], k[:, :1], v[:, :1], dout[:, :h], dlse[:h])
    out, lse, dq, dk, dv, ordered = (x[0] for x in got)
    ours = [out[:, :h], lse[:h], dq[:, :h], dk[:, :1], dv[:, :1], ordered[:, :h]]
    assert_right(ours, part, *mask)


@pytest.mark.parametrize("sq, sk, D, softcap, scale", [
    (4200, 4200, 128, 5.0, None), (4200, 4200, 64, 5.0, None), (4200, 4200, 64, 0.0, -0.2),
    (4200, 4200, 72, 0.0, None), (4200, 4200, 24, 0.0, None),
    (6000, 3000, 64, 0.0, None),  # half of the rows see no key
])  # fmt: skip
def test_long_of_other_kinds(sq, sk, D, softcap, scale):
    """Heads whose sums of dq take the place of others'."""
    tensors = make(sq, sk, (32, 8), D, BF16, (1,))
    got = run_both(*tensors, causal=True, softcap=softcap, scale=scale)
    q, k, v, dout, dlse = (t[0] for t in tensors)
    part = (q[:, -4:], k[:, -1:], v[:, -1:], dout[:, -4:], dlse[-4:])
    out, lse, dq, dk, dv, ordered = (x[0] for x in got)
    ours = [out[:, -4:], lse[-4:], dq[:, -4:], dk[:, -1:], dv[:, -1:], ordered[:, -4:]]
    assert_right(ours, part, -1, 0, softcap, scale)


@pytest.mark.parametrize("heads", [(16, 4), (12, 12)])
def test_many_tiles(heads):
    """Many tiles for each SM, of many batch entries."""
    tensors = make(512, 512, heads, 64, BF16, (40,))
    got = run_both(*tensors, causal=True)
    for b in (0, 17, 39):
        assert_right([x[b] for x in got], tuple(t[b] for t in tensors), -1, 0, 0.0, None)


@pytest.mark.parametrize("heads, D", [
    ((32, 8), 128), ((32, 32), 96), ((32, 8), 64),
    ((32, 1), 128), ((64, 1), 64), ((72, 1), 64),  # the largest groups summed at once; a larger
])  # fmt: skip
@pytest.mark.parametrize("sq, sk, window", [
    (4100, 4100, (-1, 0)), (2100, 2100, (-1, -1)), (4100, 6000, (1500, 1000)),
    (2100, 2100, (-1, 0)), (1500, 3000, (64, 0)),  # where each has a place of its own
])  # fmt: skip
def test_heads_take_each_others_places(heads, D, sq, sk, window):
    """More heads than have sums of dq at a time: each entry as if it were alone."""
    alone = make(sq, sk, heads, D, BF16, (1,))
    want = run_both(*alone, window=window)
    got = run_both(*(torch.cat([x] * 4) for x in alone), window=window)
    near = dict(rtol=2.0**-7, atol=2.0**-12 * float(want[5].abs().max()))
    for b in range(4):
        torch.testing.assert_close(got[2][b], want[5][0], **near)  # dq, in any order
        assert all(torch.equal(got[i][b], want[i][0]) for i in (0, 1, 3, 4, 5))


def test_who_finishes_the_gradients():
    """The other tests' sizes for the main kernel that finishes them itself, and for the kernel
    that does elsewhere: so they are tests of what they say."""
    for sizes, options, alone in (
        ((4100, 4100), dict(causal=True), True),
        ((2100, 250), dict(causal=True), True),
        ((1100, 150), dict(softcap=5.0), True),
        ((1000, 1000), dict(causal=True), False),
        ((4100, 4100), dict(causal=True, deterministic=True), False),
    ):
        tensors = make(*sizes, (4, 2), 64, BF16, (1,))
        cuda = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=cuda) as profile:
            run(*tensors, **options)
            torch.cuda.synchronize()
        names = {event.key for event in profile.key_averages()}
        assert any("attention_bwd_kernel" in name for name in names), names
        assert alone != any("attention_bwd_finish" in name for name in names), (sizes, options)


@pytest.mark.parametrize("size", [3.0, 10.0])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_large_inputs(dtype, size):
    """Against torch's fused attention, which like ours keeps the scores in float32."""
    q, k, v, dout, _ = make(300, 300, (4, 2), 128, dtype, (1,), size)
    got = run(q, k, v, dout, causal=True)
    exact = want([*(x[0].double() for x in (q, k, v, dout)), torch.zeros(4, 300, device="cuda")],
                 -1, 0, 0.0, None)  # fmt: skip
    q, k, v = (x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    base = [out, *torch.autograd.grad(out, (q, k, v), dout.transpose(1, 2))]
    base = [x[0].transpose(0, 1).detach() for x in base]
    base.insert(1, exact[1].float())
    for i in (0, 2, 3, 4):
        check(str(i), got[i][0], exact[i].cpu().numpy(), base[i], floor=2.0**-20)
    torch.testing.assert_close(got[1][0].double(), exact[1], rtol=1e-5, atol=1e-4)


def test_lse():
    for mask in (MASKS[0], MASKS[1], MASKS[4]):
        q, k, v, _, _ = make(333, 500, (4, 2), 128, BF16)
        lse = ft.attention(q[None], k[None], v[None], return_lse=True, **options_of(mask))[1][0]
        exact = plain(q.double(), k.double(), v.double(), *mask)[1]
        torch.testing.assert_close(lse.double(), exact, rtol=1e-5, atol=1e-5)


# ---- Packed sequences ----------------------------------------------------------------------------


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("pair", PACKED)
def test_packed(pair, fixed_shape):
    """Lengths up to the pair's, some 0 on either side, unused rows behind, NaN in all of those."""
    turn = PACKED.index(pair)
    heads, dtype, D = HEADS[turn % 3], (BF16, FP16)[turn // 2 % 2], (128, 64)[turn % 2]
    mask, count = MASKS[turn % 6], 7
    lengths = [torch.randint(max(0, x - 20), x + 1, (count,)).tolist() for x in pair]
    lengths[0][2] = lengths[1][4] = lengths[0][6] = lengths[1][6] = 0
    totals = [sum(x) for x in lengths]
    tensors = make(totals[0] + 13, totals[1] + 13, heads, D, dtype)
    q, k, v, dout, dlse = tensors
    for x in (q[totals[0] :], k[totals[1] :], v[totals[1] :], dout[totals[0] :]):
        x.fill_(NAN)
    dlse[:, totals[0] :] = NAN
    rows = max(len(q), len(k)) if fixed_shape else None
    cu_q, cu_k = (cu_seqlens(x, rows).cuda() for x in lengths)
    got = run_both(*tensors, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options_of(mask))
    out, lse, dq, dk, dv, ordered = got
    for x in (out, dq, ordered):
        assert not x[totals[0] :].any()
    for x in (dk, dv):
        assert not x[totals[1] :].any()
    assert (lse[:, totals[0] :] == -INF).all()
    queries, keys = lengths
    of = [split(x, n) for x, n in ((q, queries), (k, keys), (v, keys), (dout, queries))]
    of.append(split(dlse, queries, 1))
    rows_of = ((out, queries), (dq, queries), (dk, keys), (dv, keys), (ordered, queries))
    parts = [split(x, n) for x, n in rows_of]
    parts.insert(1, split(lse, queries, 1))
    for s in range(count):
        ours, theirs = [p[s] for p in parts], tuple(p[s] for p in of)
        if lengths[0][s] and lengths[1][s]:
            assert_right(ours, theirs, *mask)
        else:
            assert not any(ours[i].any() for i in (0, 2, 3, 4, 5)) and (ours[1] == -INF).all()


def test_packed_is_dense():
    """The same bits, however the sequences are given."""
    tensors = make(384, 384, (4, 2), 128, BF16, (3,))
    dense = run(*tensors, causal=True, deterministic=True)
    packed = [t.flatten(0, 1) for t in tensors[:4]] + [tensors[4].transpose(0, 1).flatten(1)]
    for fixed in (None, 3 * 384):
        cu = cu_seqlens([384] * 3, fixed).cuda()
        got = run(*packed, causal=True, cu_seqlens_q=cu, max_seqlen_q=384, deterministic=True)
        for i, (a, b) in enumerate(zip(got, dense, strict=True)):
            b = b.transpose(0, 1).flatten(1) if i == 1 else b.flatten(0, 1)
            assert torch.equal(a, b), i


def test_bad_lengths_stay_in_memory():
    """Entries out of order and of range: no fault, no hang; the results mean nothing."""
    tensors = make(300, 300, (4, 2), 128, BF16)
    for entries in ([0, 400, -7, 100], [0, 200, 0, 200], [50, 40, 30, 20], [2**31 - 1] * 4):
        cu = torch.tensor(entries, dtype=torch.int32).cuda()
        for deterministic in (False, True):
            run(*tensors, causal=True, cu_seqlens_q=cu, deterministic=deterministic)
    torch.cuda.synchronize()


# ---- What must not leak --------------------------------------------------------------------------


@pytest.mark.parametrize("D", [128, 64])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_stays_behind_the_mask(value, D):
    S, W = 400, 70
    tensors = make(S, S, (2, 1), D, BF16, (1,))
    clean = run(*tensors, causal=True, window=(W, 0))
    for bad in tensors[:4]:
        for at in (70, 131, S - 1):
            kept = bad[:, at].clone()
            bad[:, at] = value
            out, lse, dq, dk, dv = run(*tensors, causal=True, window=(W, 0))
            bad[:, at] = kept
            is_key = bad is tensors[1] or bad is tensors[2]
            row = slice(at, at + W + 1) if is_key else slice(at, at + 1)
            apart, far = torch.ones(2, S, dtype=torch.bool)
            apart[row] = False
            far[max(0, row.start - W) : row.stop] = False
            for a, b, rows in ((out, clean[0], apart), (dq, clean[2], apart),
                               (dk, clean[3], far), (dv, clean[4], far)):  # fmt: skip
                torch.testing.assert_close(a[:, rows], b[:, rows], rtol=0.02, atol=0.02)
            assert torch.equal(lse[..., apart.cuda()], clean[1][..., apart.cuda()])
            reached = out if bad is not tensors[3] else dq
            assert not reached[:, at].isfinite().all()


def test_nan_stays_in_its_sequence():
    lengths = [70, 0, 50, 31, 300]
    tensors = make(451, 451, (2, 1), 128, BF16)
    cu = cu_seqlens(lengths).cuda()
    clean = run(*tensors, cu_seqlens_q=cu)
    for x in tensors[:4]:
        x[70:120] = NAN
    dirty = run(*tensors, cu_seqlens_q=cu)
    for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
        a, b = (a.T, b.T) if i == 1 else (a, b)
        torch.testing.assert_close(b[:70], a[:70], rtol=0.02, atol=0.02)
        torch.testing.assert_close(b[120:], a[120:], rtol=0.02, atol=0.02)
        assert b[70:120].isnan().all()


def test_rows_without_keys():
    tensors = make(300, 90, (2, 1), 128, BF16, (1,))
    clean = run(*tensors, causal=True)
    for x in (tensors[0], tensors[3]):
        x[:, :210] = NAN
    tensors[4][..., :210] = NAN
    got = run(*tensors, causal=True)
    out, lse, dq, _, _ = got
    assert not out[:, :210].any() and (lse[..., :210] == -INF).all() and not dq[:, :210].any()
    for a, b in zip(got, clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)


def test_nan_leaves_the_place():
    """What a head leaves behind where another's sums of dq come later."""
    tensors = make(4200, 4200, (32, 8), 128, BF16, (1,))
    clean = run(*tensors, causal=True)
    tensors[3][:, :, 0] = NAN
    dirty = run(*tensors, causal=True)
    near = dict(rtol=2.0**-7, atol=2.0**-12 * float(clean[2].abs().max()))
    torch.testing.assert_close(dirty[2][:, :, 1:], clean[2][:, :, 1:], **near)
    assert all(torch.equal(dirty[i][:, :, 1:], clean[i][:, :, 1:]) for i in (3, 4))
    assert dirty[2][:, :, 0].isnan().all() and dirty[4][:, :, 0].isnan().all()


EMPTY = [(B, sq, sk, heads) for B, sq, sk in ((0, 4, 4), (2, 0, 5), (2, 5, 0), (1, 0, 0))
         for heads in ((2, 1), (0, 2), (0, 0))]  # fmt: skip
EMPTY += [(1, 5, 5, (0, 2)), (1, 5, 5, (0, 0))]


@pytest.mark.parametrize("B, sq, sk, heads", EMPTY)
def test_empty(B, sq, sk, heads):
    tensors = make(sq, sk, heads, 64, BF16, (B,))
    out, lse, *grads = run(*tensors)
    assert out.shape == tensors[0].shape and not out.any() and (lse == -INF).all()
    assert not any(g.any() for g in grads)


# ---- Memory layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_layouts(deterministic):
    """Two blocks of keys, whose sum has the same bits in any order; queries enough for units."""
    B, S, Sk, Hq, Hk, D = 2, 2100, 250, 4, 2, 64
    qkv = torch.randn(B, S, Hq + 2 * Hk, D, device="cuda", dtype=BF16)
    packed = qkv[:, :, :Hq], qkv[:, :Sk, Hq : Hq + Hk], qkv[:, :Sk, Hq + Hk :]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed]
    last = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in packed]
    odd = [torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in packed]
    one = [x[:1].as_strided((1, *x.shape[1:]), (12345, *x.stride()[1:])) for x in packed]
    dout = torch.randn(B, S, Hq, D, device="cuda", dtype=BF16)
    wide = torch.randn(B, S, Hq + 2, D, device="cuda", dtype=BF16)[:, :, 1:-1]
    wide.copy_(dout)
    same = dict(causal=True, deterministic=deterministic)
    exact = run(*(x.contiguous() for x in packed), dout, **same)
    for views in (packed, swapped, last, odd):
        for g in (dout, wide, dout.transpose(1, 2).contiguous().transpose(1, 2)):
            got = run(*views, g, **same)
            assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    got = run(*one, dout[:1], **same)
    assert all(torch.equal(a, b[:1]) for a, b in zip(got, exact, strict=True))
    k = packed[1][:1].expand(B, -1, -1, -1)
    ones = torch.ones((), device="cuda", dtype=BF16).expand(B, S, Hq, D)
    same["causal"] = False
    got = run(packed[0], k, packed[2], ones, **same)
    want = run(packed[0], k.contiguous(), packed[2], ones.contiguous(), **same)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.slow
def test_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free memory")
    B, S, H, D = 270, 1024, 64, 128
    q, k, v = torch.randn(3, B, 1, 1, D, device="cuda", dtype=BF16).expand(3, B, S, H, D).unbind()
    q = q.contiguous()
    last = [x[-1:].contiguous() for x in (q, k, v)]
    out = ft.attention(q, k[:, :, :8].contiguous(), v[:, :, :8].contiguous(), causal=True)
    want = ft.attention(last[0], last[1][:, :, :8], last[2][:, :, :8], causal=True)
    assert torch.equal(out[-1:], want)


# ---- Repeats, graphs, compilers ------------------------------------------------------------------


def assert_repeats(count, tensors, deterministic, **options):
    """Bit for bit, all results or all but dq, whose sums are added in any order."""
    kept = [0, 1, 2, 3, 4] if deterministic else [0, 1, 3, 4]
    options = dict(causal=True, deterministic=deterministic) | options
    first = run(*tensors, **options)
    near = dict(rtol=2.0**-7, atol=2.0**-12 * float(first[2].abs().max()))
    for _ in range(count):
        noise("cuda")
        again = run(*tensors, **options)
        for i in kept:
            assert torch.equal(first[i], again[i]), NAMES[i]
        torch.testing.assert_close(first[2], again[2], **near)


def packed_tensors():
    lengths = torch.randint(1, 900, (16,)).tolist()
    tensors = make(sum(lengths), sum(lengths), (8, 2), 128, BF16)
    return tensors, dict(cu_seqlens_q=cu_seqlens(lengths).cuda())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pair", [(1, 239), (239, 1), (799, 3), (1024, 128), (97, 97), (257, 257),
                                  (2048, 2048)])  # fmt: skip
def test_repeats_do_not_change_a_bit(pair, deterministic):
    assert_repeats(50, make(*pair, (8, 2), 128, BF16, (4,)), deterministic)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("options", [dict(causal=False), dict(window=(170, 40), causal=False),
                                     dict(softcap=5.0)])  # fmt: skip
def test_repeats_in_order(options, D):
    assert_repeats(50, make(1000, 1500, (8, 2), D, FP16, (4,)), True, **options)


@pytest.mark.parametrize("deterministic", [False, True])
def test_packed_repeats(deterministic):
    tensors, options = packed_tensors()
    assert_repeats(50, tensors, deterministic, **options)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_thousand_repeats(packed, deterministic):
    tensors, options = make(1000, 1000, (8, 2), 128, BF16, (3,)), {}
    if packed:
        tensors, options = packed_tensors()
    assert_repeats(1000, tensors, deterministic, **options)


@pytest.mark.slow
def test_repeats_where_heads_take_places():
    """The main kernel finishes the gradients, of a few heads at a time."""
    assert_repeats(200, make(4200, 4200, (32, 8), 128, BF16, (1,)), False)


def test_deterministic_algorithms():
    """torch's switch fixes the order of dq's sums too: the same bits as deterministic=True."""
    tensors = make(2048, 2048, (8, 2), 128, BF16, (2,))
    want = run(*tensors, causal=True, deterministic=True)
    for _ in range(20):
        noise("cuda")  # a matmul, which the switch could refuse
        torch.use_deterministic_algorithms(True)
        try:
            got = run(*tensors, causal=True)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("packed, deterministic", [(False, False), (False, True), (True, True)])
def test_graph(packed, deterministic):
    """Dense: two blocks of keys, whose sum has the same bits in any order, queries enough for
    units."""
    sizes = (500, 500) if packed else (2100, 250)
    tensors = make(*sizes, (4, 2), 128, BF16, () if packed else (2,))
    options = dict(causal=True, deterministic=deterministic)
    if packed:
        options["cu_seqlens_q"] = cu_seqlens([100, 250, 150]).cuda()
    q, k, v = (x.requires_grad_() for x in tensors[:3])

    def both():
        out, lse = ft.attention(q, k, v, return_lse=True, **options)
        return [out, lse, *torch.autograd.grad((out, lse), (q, k, v), tensors[3:])]

    graph, got = captured(both)
    with torch.no_grad():
        for t in tensors:
            t.normal_()
        if packed:  # other lengths, the same graph
            options["cu_seqlens_q"].copy_(cu_seqlens([17, 0, 483]))
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, both(), strict=True))


def test_compile():
    def f(q, k, v, cu=None):
        out, lse = ft.attention(q * 1, k, v, causal=True, cu_seqlens_q=cu, return_lse=True)
        return (out.float() ** 2).sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True)
    for batch, cu in (((2,), None), ((), cu_seqlens([100, 200]).cuda())):
        inputs = [x.requires_grad_() for x in make(300, 300, (4, 2), 64, BF16, batch)[:3]]
        exact = torch.autograd.grad(f(*inputs, cu), inputs)
        got = torch.autograd.grad(compiled(*inputs, cu), inputs)
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b)


# ---- flash_attn's names; what is refused ---------------------------------------------------------


def test_flash_attn():
    q, k, v, dout, _ = make(200, 200, (4, 2), 64, BF16, (2,))
    exact = ft.attention(q, k, v, causal=True)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, causal=True), exact)
    assert torch.equal(flash_attn_interface.flash_attn_func(q, k, v, causal=True), exact)
    qkv = torch.stack([q, q, q], 2).requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    assert torch.equal(out, ft.attention(q, q, q, causal=True))
    out.backward(dout)
    assert qkv.grad.isfinite().all()
    cu = cu_seqlens([200, 200]).cuda()
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    got = flash_attn.flash_attn_varlen_func(*flat, cu, cu, 200, 200, causal=True)
    assert torch.equal(got, exact.flatten(0, 1))


def test_refused():
    q, k, v, _, _ = make(16, 16, (2, 1), 64, BF16, (1,))
    for D, dtype in ((136, BF16), (12, BF16), (64, torch.float32)):
        bad = make(16, 16, (2, 1), D, dtype, (1,))[:3]
        with pytest.raises(NotImplementedError):
            ft.attention(*bad)
    lse = torch.empty(1, 2, 16, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    call = (None, None, 0, 0, 0.1, -1, -1, 0.0, stream)
    with pytest.raises(ValueError, match="workspace"):
        _C.attention_fwd(torch.empty_like(q), lse, None, q, k, v, *call)
    workspace = torch.empty(4096, dtype=torch.uint8, device="cuda")
    odd = torch.nn.functional.pad(q, (1, 0))[..., 1:]
    with pytest.raises(ValueError, match="16 bytes"):
        _C.attention_fwd(torch.empty_like(q), lse, workspace, odd, k, v, *call)
