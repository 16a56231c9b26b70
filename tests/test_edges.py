"""Every op against float64 at the edges of its shapes: no row, one row, one column, one more or
less than a vector, a block or a buffer holds, more rows than blocks; weights and tables of another
dtype."""

import numpy as np
import pytest
import ref
import torch
import torch.nn.functional as F
from conftest import DEVICES, check, f64
from test_cross_entropy import in_torch
from test_rms_norm import plain as plain_norm
from test_rope import EPS, plain_rope, tables
from test_rope import plain_norm as head_norm

import flatout.torch as ft

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, BF16), (F16, F32)]  # data, weight
WIDTHS = [2, 3, 7, 8, 9, 31, 33, 127, 129, 255, 257, 1000, 2047, 2048, 2049, 4095, 4104]
WIDE = [8184, 8191, 8192, 8193, 8200, 12288, 16384, 16392, 32768, 40000, 40001]
MANY = [(1, 1), (0, 8), (2, 0, 64), (1, 1, 4096), (600, 64), (3000, 33), (70000, 8)]
SHAPES = [(3, H) for H in WIDTHS] + [(2, H) for H in WIDE] + MANY


def randn(*shape, dtype, device):
    return torch.randn(shape, device=device).to(dtype)


def leaf(*shape, dtype, device):
    return randn(*shape, dtype=dtype, device=device).requires_grad_()


def floor(dtype, of=8):
    """A part of a unit in the last place, since with few elements torch's own error is a matter of
    luck; for dw, a sum of terms of this dtype, a larger one."""
    return max(2.0**-17 / of, torch.finfo(dtype).eps / of)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype, weight_dtype", PAIRS, ids=str)
def test_rms_norm(dtype, weight_dtype, offset, device):
    for shape in SHAPES:
        x = leaf(*shape, dtype=dtype, device=device)
        w = leaf(shape[-1], dtype=weight_dtype, device=device)
        dy = randn(*shape, dtype=dtype, device=device)
        y = ft.rms_norm(x, w, 1e-5, offset=offset)
        got = torch.autograd.grad(y, (x, w), dy)
        base = plain_norm(x, w, 1e-5, offset)
        base_dx, base_dw = torch.autograd.grad(base, (x, w), dy)
        want_dx, want_dw = ref.rms_norm_bwd(f64(dy), f64(x), f64(w), 1e-5, offset)
        assert y.dtype == got[0].dtype == dtype and got[1].dtype == weight_dtype
        check(f"y {shape}", y, ref.rms_norm(f64(x), f64(w), 1e-5, offset), base, floor=floor(dtype))
        if shape[-1] > 3:  # few columns: small differences of large numbers
            check(f"dx {shape}", got[0], want_dx, base_dx, floor=floor(dtype))
            check(f"dw {shape}", got[1], want_dw, base_dw, floor=floor(dtype, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, weight_dtype", PAIRS, ids=str)
def test_add_rms_norm(dtype, weight_dtype, device):
    for shape in SHAPES[::2] + MANY:
        x, r = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        w = leaf(shape[-1], dtype=weight_dtype, device=device)
        dy, ds = (randn(*shape, dtype=dtype, device=device) for _ in range(2))
        y, s = ft.add_rms_norm(x, r, w, 1e-5)
        dx, dr, dw = torch.autograd.grad((y, s), (x, r, w), (dy, ds))
        assert torch.equal(s, x + r) and torch.equal(dx, dr)
        base_s = (x + r).detach().requires_grad_()
        base = plain_norm(base_s, w, 1e-5, 0.0)
        base_dx, base_dw = torch.autograd.grad((base, base_s * 1), (base_s, w), (dy, ds))
        want_dx, want_dw = ref.rms_norm_bwd(f64(dy), f64(s), f64(w), 1e-5)
        check(f"y {shape}", y, ref.rms_norm(f64(s), f64(w), 1e-5), base, floor=floor(dtype))
        if shape[-1] > 3:
            check(f"dx {shape}", dx, want_dx + f64(ds), base_dx, floor=floor(dtype))
            check(f"dw {shape}", dw, want_dw, base_dw, floor=floor(dtype, 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_swiglu(dtype, packed, device):
    for shape in SHAPES:
        gate, up = (leaf(*shape, dtype=dtype, device=device) for _ in range(2))
        dy = randn(*shape, dtype=dtype, device=device)
        if packed:
            x = torch.cat([gate, up], -1).detach().requires_grad_()
            y = ft.swiglu(x)
            dgate, dup = torch.autograd.grad(y, x, dy)[0].chunk(2, -1)
        else:
            y = ft.swiglu(gate, up)
            dgate, dup = torch.autograd.grad(y, (gate, up), dy)
        base = F.silu(gate) * up
        base_dgate, base_dup = torch.autograd.grad(base, (gate, up), dy)
        want_dgate, want_dup = ref.swiglu_bwd(f64(dy), f64(gate), f64(up))
        check(f"y {shape}", y, ref.swiglu(f64(gate), f64(up)), base, floor=floor(dtype))
        check(f"dgate {shape}", dgate, want_dgate, base_dgate, floor=floor(dtype))
        check(f"dup {shape}", dup, want_dup, base_dup, floor=floor(dtype))


# B, S, Hq, Hk, D
HEADS = [(1, 3, 2, 1, D) for D in (2, 4, 6, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256)]
HEADS += [(1, 1, 1, 1, 64), (2, 5, 3, 1, 64), (2, 3, 7, 5, 128), (1, 9, 33, 11, 32)]
HEADS += [(1, 2, 64, 8, 128), (0, 5, 2, 1, 64), (2, 0, 2, 1, 64), (1, 9000, 1, 1, 16)]


def rope_case(shape, dtype, device):
    B, S, Hq, Hk, D = shape
    sizes = [(B, S, Hq, D), (B, S, Hk, D)] * 2
    return [randn(*size, dtype=dtype, device=device) for size in sizes]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, table_dtype", PAIRS, ids=str)
def test_rope(dtype, table_dtype, device):
    for shape in HEADS:
        *leaves, dq_out, dk_out = rope_case(shape, dtype, device)
        leaves = [x.requires_grad_() for x in leaves]
        cos, sin = tables(shape[1], shape[4], dtype=table_dtype, device=device)
        out = ft.rope(*leaves, cos, sin)
        grads = torch.autograd.grad(out, leaves, (dq_out, dk_out))
        c, s = f64(cos), f64(sin)
        for x, y, dx, dy in zip(leaves, out, grads, (dq_out, dk_out), strict=True):
            assert y.dtype == dx.dtype == dtype
            base = plain_rope(x, cos, sin)
            (base_dx,) = torch.autograd.grad(base, x, dy)
            check(f"out {shape}", y, ref.rope(f64(x), c, s), base, floor=floor(dtype))
            check(f"dx {shape}", dx, ref.rope_bwd(f64(dy), c, s), base_dx, floor=floor(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, other", PAIRS, ids=str)
def test_qk_norm_rope(dtype, other, device):
    for i, shape in enumerate(HEADS):
        q, k, dq_out, dk_out = rope_case(shape, dtype, device)
        qw, kw = (randn(shape[4], dtype=other, device=device) for _ in range(2))
        cos, sin = tables(shape[1], shape[4], dtype=(dtype, other)[i % 2], device=device)
        leaves = [x.requires_grad_() for x in (q, k, qw, kw)]
        out = ft.qk_norm_rope(*leaves, cos, sin, EPS)
        dq, dk, dqw, dkw = torch.autograd.grad(out, leaves, (dq_out, dk_out))
        assert dqw.dtype == other and dq.dtype == dtype
        c, s = f64(cos), f64(sin)
        for x, w, dy, y, dx, dw in (
            (q, qw, dq_out, out[0], dq, dqw),
            (k, kw, dk_out, out[1], dk, dkw),
        ):
            base = plain_rope(head_norm(x, w).to(dtype), cos, sin)
            base_dx, base_dw = torch.autograd.grad(base, (x, w), dy)
            want_dx, want_dw = ref.rms_norm_bwd(ref.rope_bwd(f64(dy), c, s), f64(x), f64(w), EPS)
            check(
                f"out {shape}",
                y,
                ref.rope(ref.rms_norm(f64(x), f64(w), EPS), c, s),
                base,
                floor=floor(dtype),
            )
            if shape[4] > 4:
                check(f"dx {shape}", dx, want_dx, base_dx, floor=floor(dtype))
                check(f"dw {shape}", dw, want_dw, base_dw, floor=floor(dtype, 4))


# rows, V
LOGITS = [(3, V) for V in (1, 2, 7, 31, 33, 511, 512, 513, 4095, 4096, 4097, 8191, 8193, 12289)]
LOGITS += [(2, 32768), (2, 40000), (2, 50257), (2, 151936), (1, 2), (3000, 17), (70000, 4)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [{}, dict(reduction="sum", label_smoothing=0.1, z_loss=0.05), dict(reduction="none")],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_cross_entropy(dtype, options, device):
    for N, V in LOGITS:
        target = torch.randint(0, V, (N,), device=device)
        z = 2 * torch.randn(N, V, device=device)
        z = (z + 9 * F.one_hot(target, V) * (torch.rand(N, 1, device=device) < 0.5)).to(dtype)
        target[torch.rand(N, device=device) < 0.2] = -100
        target[-1] = V - 1
        z.requires_grad_()
        loss, base = ft.cross_entropy(z, target, **options), in_torch(z, target, **options)
        labels = f64(target).astype(np.int64)
        want = ref.cross_entropy(f64(z), labels, **options)["loss"]
        check(f"loss {N, V}", loss, want, base, floor=2.0**-20)
        dloss = torch.randn(loss.shape, device=device) * (1 if options else N)  # of a mean
        (got,), (base,) = (torch.autograd.grad(out, z, dloss) for out in (loss, base))
        want = ref.cross_entropy_bwd(f64(dloss), f64(z), labels, **options)
        check(f"dlogits {N, V}", got, want, base, floor=floor(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_embedding(dtype, index, device):
    sizes = [(5, 11, H) for H in (1, 2, 7, 8, 9, 127, 129, 1024, 1032, 4097, 8192, 40000, 40001)]
    for N, V, H in [*sizes, (0, 3, 8), (1, 1, 8), (300, 3, 40), (70000, 70000, 8)]:
        ids = torch.randint(0, V, (N,), device=device, dtype=index)
        weight = leaf(V, H, dtype=dtype, device=device)
        dy = randn(N, H, dtype=dtype, device=device)
        y = ft.embedding(ids, weight)
        assert torch.equal(y, weight[ids.long()]), (N, V, H)
        (dw,) = torch.autograd.grad(y, weight, dy)
        base = torch.zeros(V, H, dtype=dtype).index_add_(0, ids.cpu(), dy.cpu())
        want = ref.embedding_bwd(f64(dy), f64(ids).astype(np.int64), V)
        check(f"dw {N, V, H}", dw, want, base, floor=floor(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [(F32,), (BF16,), (F16,), (F32, BF16, F16)], ids=str)
def test_global_norm(dtypes, device):
    """Around a chunk of 65,536 elements, and of tensors off a vector's boundary."""
    sizes = [0, 1, 2, 7, 9, 65535, 65536, 65537, 131072, 300001]
    for skip in (0, 1, 3):
        tensors = [
            randn(n + skip, dtype=dtypes[i % len(dtypes)], device=device)[skip:]
            for i, n in enumerate(sizes)
        ]
        for part in (tensors, tensors[3:6], tensors[:1], tensors[::-1]):
            got, want = ft.global_norm(part).item(), ref.global_norm([f64(t) for t in part])
            assert abs(got - want) <= 1e-6 * want
