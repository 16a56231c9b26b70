import ml_dtypes
import numpy as np
import pytest
import ref
import torch
from conftest import DTYPES, assert_grad, check, f64, numeric_grad

import flatout
import flatout.torch as ft
from flatout import _C
from flatout.torch.attention import attention_bwd

NAN, INF = float("nan"), float("inf")
NAMES = ["out", "lse", "dq", "dk", "dv"]
# (Sq, Sk): one of each, tails on either side of a tile, more queries than keys and the reverse
PAIRS = [(1, 1), (64, 128), (239, 1), (3, 799), (113, 203), (128, 217), (108, 256), (256, 113)]
PAIRS += [(65, 33), (500, 256)]
LONG_PAIRS = [(799, 3), (640, 128), (512, 256), (1023, 1024), (1024, 1023), (2048, 2048)]
# left, right, softcap
MASKS = [(-1, -1, 0.0), (-1, 0, 0.0), (30, 0, 0.0), (17, 40, 0.0), (-1, 0, 15.0), (0, -1, 0.0)]


def plain(q, k, v, scale, left, right, softcap):
    """One sequence in plain torch as models write it (repeat_kv, matmul, mask, softmax in float32,
    matmul), rows without a key zeroed; (out, lse)."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (
        x.transpose(0, 1) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))
    )
    s = torch.matmul(q, k.transpose(1, 2)) * scale
    if softcap:
        s = torch.tanh(s / softcap) * softcap
    mask = torch.from_numpy(ref.attention_mask(q.shape[1], k.shape[1], left, right))
    seen = mask.any(1)
    s = s.masked_fill(~mask & seen[:, None], -INF).float()
    p = torch.softmax(s, -1).to(q.dtype).masked_fill(~seen[:, None], 0)
    lse = torch.logsumexp(s, -1) if k.shape[1] else s.sum(-1)
    return torch.matmul(p, v).transpose(0, 1), lse.masked_fill(~seen, -INF)


def make(sq, sk, heads=(2, 2), D=32, dtype=torch.float32, size=1.0, batch=()):
    """q, k, v, dout, dlse of normal values."""
    Hq, Hk = heads
    shapes = [(*batch, sq, Hq, D), *[(*batch, sk, Hk, D)] * 2, (*batch, sq, Hq, D)]
    q, k, v, dout = ((size * torch.randn(s)).to(dtype) for s in shapes)
    return q, k, v, dout, torch.randn(*batch, Hq, sq)


def run(q, k, v, dout, dlse=None, **options):
    """[out, lse, dq, dk, dv]"""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = ft.attention(q, k, v, return_lse=True, **options)
    results, upstream = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    return [out.detach(), lse.detach(), *torch.autograd.grad(results, (q, k, v), upstream)]


def want(q, k, v, dout, dlse, *mask):
    """The same in float64, and by plain torch in q's dtype."""
    out, lse, _ = ref.attention(f64(q), f64(k), f64(v), *mask)
    exact = [
        out,
        lse,
        *ref.attention_bwd(
            f64(dout), None if dlse is None else f64(dlse), f64(q), f64(k), f64(v), *mask
        ),
    ]
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = plain(q, k, v, *mask)
    loss = (out * dout).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == -INF, 0) * dlse).sum()
    return exact, [out, lse, *torch.autograd.grad(loss, (q, k, v))]


def compare(got, exact, base, floor=2.0**-20, luck=0.0, names=NAMES):
    for name, a, b, c in zip(names, got, exact, base, strict=True):
        assert a.dtype == c.dtype and a.shape == c.shape
        if name == "lse":  # one long vector of the rows that see a key
            seen = torch.from_numpy(np.isfinite(b))
            assert (a[~seen] == -INF).all()
            a, b, c = a[seen][None], b[seen.numpy()][None], c[seen][None]
        if b.size and np.abs(b).max() < 1e-9:  # zero but for rounding: a softmax over one key
            assert a.abs().max() < 1e-5, name
        else:
            # with few keys dscores is what is left of dout v^T and sum_d dout * out: as in any
            # fused backward the second is not made of the first, so their last bits differ
            check(name, a, b, c, **(dict(floor=floor, luck=luck) if name in NAMES[2:] else {}))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("pair", PAIRS)
def test_against_float64(pair, mask):
    turn = PAIRS.index(pair) + MASKS.index(mask)
    heads, dtype = [(2, 2), (6, 2), (3, 1)][turn % 3], DTYPES[turn // 2 % 3]
    left, right, softcap = mask
    q, k, v, dout, dlse = make(*pair, heads, dtype=dtype)
    got = run(*(x[None] for x in (q, k, v, dout, dlse)), window=(left, right), softcap=softcap)
    exact, base = want(q, k, v, dout, dlse, q.shape[-1] ** -0.5, *mask)
    compare([x[0] for x in got], exact, base)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", LONG_PAIRS)
def test_long(pair, dtype, causal):
    q, k, v, dout, dlse = make(*pair, (4, 2), 64, dtype)
    got = run(*(x[None] for x in (q, k, v, dout, dlse)), causal=causal)
    exact, base = want(q, k, v, dout, dlse, 0.125, -1, 0 if causal else -1, 0.0)
    compare([x[0] for x in got], exact, base)


@pytest.mark.parametrize("D", [1, 3, 16, 33, 64, 80, 96, 128, 256])
def test_head_dimensions(D):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, dout, dlse = make(70, 90, (2, 1), D, dtype)
        got = run(*(x[None] for x in (q, k, v, dout, dlse)), causal=True)
        exact, base = want(q, k, v, dout, dlse, D**-0.5, -1, 0, 0.0)
        compare([x[0] for x in got], exact, base)


@pytest.mark.parametrize("size", [3.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs(dtype, size):
    """Against torch's fused attention, which like ours keeps the scores in float32: rounded to
    bfloat16, scores of 100 are wrong by a quarter. It too recomputes p from a float32 lse."""
    q, k, v, dout, _ = make(150, 150, (4, 2), 64, dtype, size)
    got = run(*(x[None] for x in (q, k, v, dout)), causal=True)
    exact, (_, lse, *_) = want(
        q.float(), k.float(), v.float(), dout.float(), None, 0.125, -1, 0, 0.0
    )
    q, k, v = (x.transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    base = [out, *torch.autograd.grad(out, (q, k, v), dout.transpose(0, 1)[None])]
    out, *grads = (x[0].transpose(0, 1) for x in base)
    compare([x[0] for x in got], exact, [out, lse, *grads])


def test_scores_beyond_exp():
    """Scores of 1e4, far beyond what exp holds without the maximum."""
    q, k, v, dout, _ = make(40, 40, D=16)
    got = run(*(x[None] for x in (q * 50, k * 50, v, dout)), scale=1.0)
    exact, base = want(q * 50, k * 50, v, dout, None, 1.0, -1, -1, 0.0)
    check("out", got[0][0], exact[0], base[0])
    check("lse", got[1][0], exact[1], base[1])
    assert all(x.isfinite().all() for x in got)


def test_defaults():
    q, k, v, _, _ = make(9, 9, batch=(2,))
    want = ft.attention(q, k, v, causal=False, scale=32**-0.5, window=(-1, -1), softcap=0.0)
    assert torch.equal(ft.attention(q, k, v), want)
    causal = ft.attention(q, k, v, window=(-1, 0))
    assert torch.equal(ft.attention(q, k, v, causal=True), causal)
    assert torch.equal(ft.attention(q, k, v, causal=True, window=(-1, 5)), causal)
    assert not torch.equal(causal, want)


def test_batches_are_apart():
    q, k, v, dout, dlse = make(37, 70, (4, 2), batch=(3,))
    together = run(q, k, v, dout, dlse, causal=True)
    for b in range(3):
        one = run(*(x[b : b + 1] for x in (q, k, v, dout, dlse)), causal=True)
        assert all(torch.equal(x[b : b + 1], y) for x, y in zip(together, one, strict=True))


# ---- Packed sequences ----------------------------------------------------------------------------

LENGTHS = [  # of queries, of keys
    ([5], [5]),
    ([64, 128, 1], [64, 128, 1]),
    ([113, 1, 108, 65], [203, 3, 256, 2]),
    ([0, 30, 0, 0, 20], [7, 0, 0, 40, 20]),
    ([0, 0], [0, 0]),
]


def cu_seqlens(lengths, fixed_shape=None):
    """(sequences + 1,) int32; with fixed_shape T + 1 entries, padded with the total."""
    ends = np.cumsum([0, *lengths])
    entries = [*ends, *[ends[-1]] * (fixed_shape + 1 - len(ends) if fixed_shape else 0)]
    return torch.tensor(entries, dtype=torch.int32)


def split(x, lengths, dim=0):
    return torch.split(x[: sum(lengths)] if dim == 0 else x[:, : sum(lengths)], lengths, dim)


@pytest.mark.parametrize("unused", [0, 13])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_packed(lengths, dtype, unused):
    """Each sequence as if alone; rows beyond the last, NaN here, as empty ones."""
    queries, keys = lengths
    Tq, Tk = sum(queries), sum(keys)
    q, k, v, dout, dlse = make(Tq + unused, Tk + unused, (4, 2), dtype=dtype)
    for x in (q[Tq:], k[Tk:], v[Tk:], dout[Tq:], dlse[:, Tq:]):
        x.fill_(NAN)
    options = dict(causal=True, cu_seqlens_q=cu_seqlens(queries), cu_seqlens_k=cu_seqlens(keys))
    got = run(q, k, v, dout, dlse, **options)
    for x, used in zip(got, (Tq, None, Tq, Tk, Tk), strict=True):
        assert used is None or not x[used:].any()
    assert (got[1][:, Tq:] == -INF).all()
    parts = [
        split(x, n) for x, n in zip((q, k, v, dout), (queries, keys, keys, queries), strict=True)
    ]
    pieces = [
        split(x, n, d)
        for x, n, d in zip(
            got, (queries, queries, queries, keys, keys), (0, 1, 0, 0, 0), strict=True
        )
    ]
    for s, dlse_s in enumerate(split(dlse, queries, 1)):
        q_s, k_s, v_s, dout_s = (part[s] for part in parts)
        if not (len(q_s) and len(k_s)):
            assert (
                not any(pieces[i][s].any() for i in (0, 2, 3, 4)) and (pieces[1][s] == -INF).all()
            )
            continue
        exact, base = want(q_s, k_s, v_s, dout_s, dlse_s, 32**-0.5, -1, 0, 0.0)
        compare([piece[s] for piece in pieces], exact, base)


def test_packed_with_fixed_shape():
    """T + 1 entries, padded with T: the same as without the empty sequences."""
    lengths = [20, 33, 11]
    q, k, v, dout, dlse = make(64, 64, (4, 2))
    short = run(q, k, v, dout, dlse, causal=True, cu_seqlens_q=cu_seqlens(lengths))
    bounds = dict(max_seqlen_q=64, max_seqlen_k=64)
    padded = run(q, k, v, dout, dlse, causal=True, cu_seqlens_q=cu_seqlens(lengths, 64), **bounds)
    assert all(torch.equal(a, b) for a, b in zip(short, padded, strict=True))


# ---- What must not leak --------------------------------------------------------------------------


def same(got, want, rows=slice(None)):
    """Equal but for rounding: where a tile holds NaN behind its mask, its sums run pair by pair."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a[:, rows], b[:, rows], rtol=1e-5, atol=1e-5)


def test_nan_stays_behind_the_mask():
    """Keys, values, queries and upstream gradients that are NaN reach their own pairs alone."""
    q, k, v, dout, dlse = make(150, 150, (2, 1), batch=(1,))
    clean = run(q, k, v, dout, dlse, causal=True, window=(40, 0))
    for bad in (q, k, v, dout):
        for at in (70, 149):
            kept = bad[:, at].clone()
            bad[:, at] = NAN
            out, lse, dq, dk, dv = run(q, k, v, dout, dlse, causal=True, window=(40, 0))
            bad[:, at] = kept
            row = slice(at, at + 41) if bad is k or bad is v else slice(at, at + 1)
            apart = torch.ones(150, dtype=torch.bool)  # queries that do not see it
            apart[row] = False
            far = torch.ones(150, dtype=torch.bool)  # keys that no query it touches sees
            far[max(0, row.start - 40) : row.stop] = False
            same((out, dq), (clean[0], clean[2]), apart)
            same((dk, dv), clean[3:], far)
            assert torch.equal(lse[..., apart], clean[1][..., apart])
            reached = out if bad is not dout else dq
            assert reached[:, at].isnan().all()


def test_nan_stays_in_its_sequence():
    lengths = [70, 0, 50, 31]
    q, k, v, dout, dlse = make(151, 151, (2, 1))
    cu = cu_seqlens(lengths)
    clean = run(q, k, v, dout, dlse, cu_seqlens_q=cu)
    for x in (q, k, v, dout):
        x[70:120] = NAN
    dirty = run(q, k, v, dout, dlse, cu_seqlens_q=cu)
    for i, (a, b) in enumerate(zip(clean, dirty, strict=True)):
        a, b = (a.T, b.T) if i == 1 else (a, b)
        assert torch.equal(a[:70], b[:70]) and torch.equal(a[120:], b[120:])
        assert b[70:120].isnan().all()


def test_rows_without_keys():
    """More queries than keys, causal: the first see nothing; NaN there changes nothing."""
    q, k, v, dout, dlse = make(100, 30, (2, 1), batch=(1,))
    clean = run(q, k, v, dout, dlse, causal=True)
    for x in (q, dout):
        x[:, :70] = NAN
    dlse[..., :70] = NAN
    out, lse, dq, dk, dv = run(q, k, v, dout, dlse, causal=True)
    assert not out[:, :70].any() and (lse[..., :70] == -INF).all() and not dq[:, :70].any()
    same((out, lse, dq, dk, dv), clean)


def test_keys_that_no_query_sees():
    q, k, v, dout, _ = make(20, 100, (2, 1), batch=(1,))
    k[:, :75], v[:, :75] = NAN, NAN
    out, lse, dq, dk, dv = run(q, k, v, dout, causal=True, window=(5, 0))
    assert not dk[:, :75].any() and not dv[:, :75].any()
    assert all(x.isfinite().all() for x in (out, lse, dq, dk[:, 75:], dv[:, 75:]))


@pytest.mark.parametrize("B, sq, sk", [(0, 4, 4), (2, 0, 5), (2, 5, 0), (1, 0, 0)])
def test_empty(B, sq, sk):
    q, k, v, dout, dlse = make(sq, sk, (2, 1), batch=(B,))
    out, lse, *grads = run(q, k, v, dout, dlse)
    assert out.shape == q.shape and not out.any() and (lse == -INF).all()
    assert not any(g.any() for g in grads)


# ---- Gradients -----------------------------------------------------------------------------------

OPTIONS = [
    dict(),
    dict(causal=True),
    dict(window=(2, 1)),
    dict(softcap=0.7),
    dict(causal=True, window=(3, -1), softcap=2.0, scale=-0.8),
    dict(causal=True, cu=([3, 0, 4], [4, 2, 3])),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_by_differences(options):
    """float64, through NumPy; out and lse both with upstream gradients."""
    options = dict(options)
    lengths = options.pop("cu", None)
    batch = () if lengths else (2,)
    shape_q, shape_k = (7, 4, 3), (9, 2, 3)
    q, k, v = (np.random.randn(*batch, *s) for s in (shape_q, shape_k, shape_k))
    if lengths:
        for name, n in zip(("cu_seqlens_q", "cu_seqlens_k"), lengths, strict=True):
            options[name] = cu_seqlens(n).numpy()
    out, lse = flatout.attention(q, k, v, return_lse=True, **options)
    dout, dlse = np.random.randn(*out.shape), np.random.randn(*lse.shape)
    dlse[lse == -INF] = 0
    upstream = np.concatenate([dout.ravel(), dlse.ravel()])

    def f():
        out, lse = flatout.attention(q, k, v, return_lse=True, **options)
        return np.concatenate([out.ravel(), np.where(lse == -INF, 0, lse).ravel()])

    grads = flatout.attention_bwd(dout, q, k, v, out, lse, dlse=dlse, **options)
    for x, grad in zip((q, k, v), grads, strict=True):
        assert_grad(grad, numeric_grad(f, x, upstream))


def test_lse_alone():
    q, k, v, _, dlse = make(20, 30, batch=(1,))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    lse = ft.attention(q, k, v, return_lse=True)[1]
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), dlse)
    zero = torch.zeros_like(q)
    exact = ref.attention_bwd(*(f64(x[0]) for x in (zero, dlse, q, k, v)), 32**-0.5)
    np.testing.assert_allclose(f64(dq[0]), exact[0], atol=1e-5)
    np.testing.assert_allclose(f64(dk[0]), exact[1], atol=1e-5)
    assert not dv.any()


def test_without_gradients():
    q, k, v, dout, _ = make(20, 30, batch=(1,))
    full = run(q, k, v, dout)
    assert torch.equal(ft.attention(q, k, v), full[0])
    (dv,) = torch.autograd.grad(ft.attention(q, k, v.requires_grad_()), (v,), dout)
    assert torch.equal(dv, full[4])


def test_double_backward_is_refused():
    q, k, v, dout, _ = make(3, 3, batch=(1,))
    q.requires_grad_()
    (dq,) = torch.autograd.grad(
        ft.attention(q, k, v), (q,), dout.requires_grad_(), create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiat"):
        dq.sum().backward()


# ---- Memory layouts ------------------------------------------------------------------------------


def strange(x):
    """x with a first dimension of size 1 whose stride means nothing."""
    return x.as_strided(x.shape, (12345, *x.stride()[1:]))


def test_layouts():
    B, S, Hq, Hk, D = 2, 70, 4, 2, 24
    qkv = torch.randn(B, S, Hq + 2 * Hk, D)
    packed = qkv[:, :, :Hq], qkv[:, :, Hq : Hq + Hk], qkv[:, :, Hq + Hk :]
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in packed]
    last = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in packed]
    wide = [torch.nn.functional.pad(x, (3, 2))[..., 3:-2] for x in packed]
    dout = torch.randn(B, S, Hq, D)
    exact = run(*(x.contiguous() for x in packed), dout, causal=True)
    for views in (packed, swapped, last, wide):
        for g in (dout, dout.transpose(1, 2).contiguous().transpose(1, 2)):
            got = run(*views, g, causal=True)
            assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


def test_expanded():
    q, k, v, _, _ = make(33, 33, batch=(2,))
    k, v = k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 33, -1, -1)
    for dout in (torch.randn(()).expand(q.shape), torch.randn(1, 33, 1, 32).expand(q.shape)):
        got = run(q, k, v, dout)
        exact = run(q, k.contiguous(), v.contiguous(), dout.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


def test_size_1_strides():
    q, k, v, dout, _ = make(33, 40, batch=(1,))
    exact = run(q, k, v, dout)
    got = run(*(strange(x) for x in (q, k, v, dout)))
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


def test_neighbours_survive():
    """Outputs inside a larger array: nothing beside them is written."""
    q, k, v, dout, _ = make(45, 50, (2, 1), 20)
    pools = [torch.full((3, *x.shape), 7.0) for x in (q, q, k, k)]
    out, dq, dk, dv = (pool[1:2] for pool in pools)
    lse, options = torch.empty(1, 2, 45), (None, None, 0, 0, 0.2, -1, 0, 0.0)
    inputs = [x[None] for x in (q, k, v)]
    _C.attention_fwd(out, lse, None, *inputs, *options)
    _C.attention_bwd(dq, dk, dv, None, dout[None], None, *inputs, out, lse, *options, 0)
    for pool in pools:
        assert (pool[0] == 7).all() and (pool[2] == 7).all() and not (pool[1] == 7).any()


# ---- Repeatability -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype, threads):
    inputs = make(300, 300, (4, 2), dtype=dtype, batch=(2,))
    threads(4)
    first = run(*inputs, causal=True)
    for count in (1, 2, 3, 3):
        threads(count)
        again = run(*inputs, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ---- NumPy, autocast, registration ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_numpy(dtype):
    q, k, v, dout, dlse = (f64(x) for x in make(40, 50, (4, 2), batch=(2,)))
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    out, lse = flatout.attention(q, k, v, causal=True, return_lse=True)
    assert out.dtype == dtype and lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    dlse = dlse.astype(lse.dtype)
    grads = flatout.attention_bwd(dout, q, k, v, out, lse, dlse=dlse, causal=True)
    eps = float(ml_dtypes.finfo(dtype).eps)
    for b in range(2):
        one = [x[b].astype(np.float64) for x in (q, k, v)]
        exact = [ref.attention(*one, 32**-0.5, -1, 0)[0]]
        exact += ref.attention_bwd(dout[b].astype(np.float64), dlse[b], *one, 32**-0.5, -1, 0)
        for a, want in zip((out, *grads), exact, strict=True):
            np.testing.assert_allclose(f64(a[b]), want, atol=8 * eps * np.abs(want).max())
    flipped = [np.ascontiguousarray(x[..., ::-1])[..., ::-1] for x in (q, k, v)]
    assert np.array_equal(flatout.attention(*flipped, causal=True), out)
    pair = np.empty_like(out), np.empty_like(lse)
    assert flatout.attention(q, k, v, causal=True, out=pair) is pair[0]
    assert np.array_equal(pair[0], out) and np.array_equal(pair[1], lse)


def test_numpy_is_torch():
    q, k, v, dout, dlse = make(40, 50, (4, 2), batch=(2,))
    want = run(q, k, v, dout, dlse, window=(20, 3), softcap=5.0)
    options = dict(window=(20, 3), softcap=5.0)
    q, k, v, dout, dlse = (x.numpy() for x in (q, k, v, dout, dlse))
    got = flatout.attention(q, k, v, return_lse=True, **options)
    got += flatout.attention_bwd(dout, q, k, v, *got, dlse=dlse, **options)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_autocast():
    """Under autocast q and k may come in float32 (from float32 norms), v in bfloat16."""
    q, k, v, dout, _ = make(20, 20, batch=(1,))
    v = v.bfloat16()
    with pytest.raises(TypeError, match="v: expected float32"):
        ft.attention(q, k, v)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ft.attention(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), dout.bfloat16())
    assert out.dtype == torch.bfloat16 and [g.dtype for g in grads] == [x.dtype for x in (q, k, v)]
    assert torch.equal(out, ft.attention(q.bfloat16(), k.bfloat16(), v))


def test_torch_registration():
    q, k, v, dout, dlse = make(12, 12, (2, 1), 8)
    lse = torch.zeros(2, 12)
    dense, packed = (None, None), (cu_seqlens([5, 7]), cu_seqlens([5, 7]))
    options, most = (0, 0, 0.3, -1, 0, 0.0), (7, 7, 0.3, -1, 0, 0.0)
    opcheck, ops = torch.library.opcheck, ft.ops
    opcheck(ops.attention_fwd.default, (q, k, v, *packed, False, *most))
    saved = (dout, dlse, q, k, v, dout, lse)
    opcheck(ops.attention_bwd.default, (*saved, *packed, *most, True))
    q, k, v, dout, lse = (x[None] for x in (q, k, v, dout, lse))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    opcheck(ops.attention_fwd.default, (q, k, v, *dense, True, *options))
    k = k.clone().requires_grad_()
    opcheck(ops.attention_fwd.default, (q, k, v, *dense, False, *options))
    saved = (dout, None, q, k.detach(), v, dout, lse)
    opcheck(ops.attention_bwd.default, (*saved, *dense, *options, False))


def test_compile():
    def f(q, k, v, cu=None):
        out, lse = ft.attention(q * 1, k, v, causal=True, cu_seqlens_q=cu, return_lse=True)
        return (out * out).sum() + lse.sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 13):
        for batch, cu in (((2,), None), ((), cu_seqlens([3, n - 3]))):
            inputs = [x.requires_grad_() for x in make(n, n, (2, 1), batch=batch)[:3]]
            exact = torch.autograd.grad(f(*inputs, cu), inputs)
            got = torch.autograd.grad(compiled(*inputs, cu), inputs)
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a, b)


def exported(*inputs, deterministic):
    class Model(torch.nn.Module):
        def forward(self, *inputs):
            return ft.attention(*inputs, deterministic=deterministic)

    return torch.export.export(Model(), inputs).module()(*inputs)


@pytest.mark.parametrize("how", ["eager", "compiled", "exported"])
def test_a_fixed_order_is_asked_for(how, monkeypatch):
    """By the option, or by torch's switch as it stands at the time of the call."""
    asked, fill = [], attention_bwd.fill
    watched = lambda grads, *args: (asked.append(args[-1]), fill(grads, *args))  # noqa: E731
    monkeypatch.setattr(attention_bwd, "fill", watched)
    f = exported if how == "exported" else ft.attention
    if how == "compiled":
        f = torch.compile(f, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in make(8, 8, batch=(1,))[:3]]
    try:
        for switch in (False, True, False):
            for option in (False, True):
                torch.use_deterministic_algorithms(switch)
                out = f(*inputs, deterministic=option)
                if how != "compiled":  # there torch itself refuses that it changes
                    torch.use_deterministic_algorithms(not switch)
                out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True, True, True, False, True]


# ---- Bad input -----------------------------------------------------------------------------------

ARGUMENTS = dict(out=(2, 6, 4, 8), lse=(2, 4, 6), q=(2, 6, 4, 8), k=(2, 5, 2, 8), v=(2, 5, 2, 8))


def good(**change):
    args = {name: torch.full(shape, 7.0) for name, shape in ARGUMENTS.items()}
    args |= dict(cu_q=None, cu_k=None, max_q=0, max_k=0, scale=0.5, left=-1, right=-1, softcap=0.0)
    return args | change


def packed(cu_q, cu_k, **change):
    lengths = {"cu_q": cu_q, "cu_k": cu_k}
    lengths = {
        n: torch.tensor(x, dtype=torch.int32) if isinstance(x, list) else x
        for n, x in lengths.items()
    }
    t = torch.full
    return (
        good(
            out=t((6, 4, 8), 7.0),
            lse=t((4, 6), 7.0),
            q=t((6, 4, 8), 7.0),
            k=t((5, 2, 8), 7.0),
            v=t((5, 2, 8), 7.0),
        )
        | lengths
        | change
    )


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


BAD = [
    (good(q=None), TypeError, "q: expected an array"),
    (good(q=ones(2, 6, 4, 8, dtype=torch.int64)), TypeError, "q: expected a floating dtype"),
    (good(q=ones(6, 4, 8)), ValueError, "q: expected 4 dimensions"),
    (good(q=ones(2, 6, 4, 16)[..., ::2]), ValueError, "q: expected a contiguous last dimension"),
    (good(k=ones(5, 2, 8), v=ones(5, 2, 8)), ValueError, "k: expected 4 dimensions"),
    (good(k=ones(2, 5, 2, 8).half()), TypeError, "k: expected float32 as q has, got float16"),
    (
        good(k=ones(2, 5, 2, 9), v=ones(2, 5, 2, 9)),
        ValueError,
        "k: expected q's head dimension 8, got 9",
    ),
    (
        good(q=ones(2, 6, 4, 0), k=ones(2, 5, 2, 0), v=ones(2, 5, 2, 0), out=ones(2, 6, 4, 0)),
        ValueError,
        "q: expected a head dimension of at least 1, got 0",
    ),
    (good(k=ones(2, 5, 3, 8), v=ones(2, 5, 3, 8)), ValueError, "divides q's 4, got 3"),
    (good(k=ones(2, 5, 0, 8), v=ones(2, 5, 0, 8)), ValueError, "divides q's 4, got 0"),
    (good(k=ones(3, 5, 2, 8), v=ones(3, 5, 2, 8)), ValueError, "k: expected q's batch of 2, got 3"),
    (good(v=ones(2, 4, 2, 8)), ValueError, r"v: expected shape \(2, 5, 2, 8\)"),
    (good(v=ones(2, 5, 2, 8).double()), TypeError, "v: expected float32 as k has"),
    (good(out=ones(2, 6, 4, 7)), ValueError, r"out: expected shape \(2, 6, 4, 8\)"),
    (good(out=ones(2, 6, 4, 8).half()), TypeError, "out: expected float32"),
    (good(lse=ones(2, 6, 4)), ValueError, r"lse: expected shape \(2, 4, 6\)"),
    (good(lse=ones(2, 4, 6).double()), TypeError, "lse: expected float32"),
    (good(lse=ones(2, 6, 4).transpose(1, 2)), ValueError, "lse: expected a contiguous array"),
    (good(scale=NAN), ValueError, "scale: expected a finite number"),
    (good(scale="1"), TypeError, "scale: expected a real number"),
    (good(softcap=-1.0), ValueError, "softcap: expected a finite number >= 0"),
    (good(softcap=INF), ValueError, "softcap: expected a finite number >= 0"),
    (good(left=0.5), TypeError, "left: expected a 64-bit integer"),
    (packed([0, 6], None), ValueError, "cu_seqlens_k: expected an array exactly where"),
    (packed(None, [0, 5]), ValueError, "cu_seqlens_k: expected an array exactly where"),
    (packed([0, 6], [0, 2, 5]), ValueError, r"cu_seqlens_k: expected shape \(2,\)"),
    (packed(ones(2, dtype=torch.int64), [0, 5]), TypeError, "cu_seqlens_q: expected int32"),
    (packed(ones(1, 2, dtype=torch.int32), [0, 5]), ValueError, "cu_seqlens_q: expected 1 dim"),
    (packed([], []), ValueError, "cu_seqlens_q: expected at least 1 entry"),
    (packed([1, 6], [0, 5]), ValueError, "cu_seqlens_q: expected 0 first"),
    (packed([0, 6], [-1, 5]), ValueError, "cu_seqlens_k: expected 0 first"),
    (packed([0, 4, 3, 6], [0, 1, 2, 5]), ValueError, "cu_seqlens_q: expected entries that never"),
    (packed([0, 1, 2, 6], [0, 4, 3, 5]), ValueError, "cu_seqlens_k: expected entries that never"),
    (packed([0, 7], [0, 5]), ValueError, "cu_seqlens_q: the last entry exceeds"),
    (packed([0, 6], [0, 6]), ValueError, "cu_seqlens_k: the last entry exceeds"),
    (packed([0, 6], [0, 5], max_q=5), ValueError, "max_seqlen_q: a sequence of"),
    (packed([0, 6], [0, 5], max_k=4), ValueError, "max_seqlen_k: a sequence of"),
]


@pytest.mark.skipif(not _C.build_info()["cuda"], reason="a build without CUDA")
def test_workspace():
    """Of the backward on CUDA: sums of dq for a few heads where nothing needs those of all."""
    all_of = dict(backward=1, B=1, Sq=16384, Sk=16384, Hq=32, Hk=32, D=128, sequences=-1, left=-1,
                  right=0, capped=0, deterministic=0)  # fmt: skip

    def size(**other):
        return _C.attention_workspace(*(all_of | other).values())

    sums = 4 * 16384 * 32 * 128
    assert size() < sums / 4
    for other in (dict(deterministic=1), dict(left=64), dict(sequences=8)):
        assert size(**other) > sums, other
    assert size(D=64) < size(D=64, capped=1)
    assert size(Hk=8) >= size() + 2 * 2 * 16384 * 32 * 128  # shares of dk and dv
    assert size(backward=0) < 1 << 20


@pytest.mark.parametrize("exponent", [50, 55, 56, 57])
def test_more_keys_than_memory_can_hold(exponent):
    """At 2^57 the bytes of scratch pass 2^63."""
    k = torch.ones(1).expand(1, 2**exponent, 1, 1)
    with pytest.raises(MemoryError, match="attention_fwd: no memory for the tiles"):
        ft.attention(torch.ones(1, 1, 1, 1), k, k)


@pytest.mark.parametrize("args, error, message", BAD)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        call(args)
    for name in ("out", "lse"):
        assert ((args[name] == 7) | (args[name] == 1)).all(), "written before the checks"


def call(args):
    args = dict(args)
    out, lse = args.pop("out"), args.pop("lse")
    _C.attention_fwd(out, lse, None, *args.values())


@pytest.mark.parametrize("name", ["dq", "dk", "dv", "dout", "dlse", "out", "lse"])
@pytest.mark.parametrize("wrong", ["shape", "dtype"])
def test_bad_backward_input(name, wrong):
    args = good()
    shapes = dict(dq="q", dk="k", dv="v", dout="q", dlse="lse")
    t = {n: torch.full(ARGUMENTS[of], 7.0) for n, of in shapes.items()} | {
        n: args[n] for n in ARGUMENTS
    }
    t[name] = t[name][..., :-1].contiguous() if wrong == "shape" else t[name].half()
    tensors = [t[n] for n in ("dq", "dk", "dv", "dout", "dlse", "q", "k", "v", "out", "lse")]
    with pytest.raises(ValueError if wrong == "shape" else TypeError, match=f"{name}: expected"):
        _C.attention_bwd(*tensors[:3], None, *tensors[3:], None, None, 0, 0, 0.5, -1, -1, 0.0, 0)
    assert all((t[n] == 7).all() for n in ("dq", "dk", "dv"))


def test_bad_python_input():
    q, k, v, _, _ = make(4, 4, batch=(1,))
    for function in (ft.attention, lambda *a, **o: flatout.attention(*(x.numpy() for x in a), **o)):
        with pytest.raises(ValueError, match="window: expected -1 or more"):
            function(q, k, v, window=(-2, 0))
        with pytest.raises(ValueError, match="q: expected"):
            function(q[0, 0], k, v)
        with pytest.raises(ValueError, match="q: expected"):
            function(q[..., :0], k[..., :0], v[..., :0])
    with pytest.raises(TypeError, match="q: expected a torch tensor"):
        ft.attention(q.numpy(), k, v)
