"""No op writes outside its outputs, leaves a part of them unwritten, changes an input or uses what
lies around it. `make sanitize-cuda` runs this file under compute-sanitizer: small shapes, and yet
every kernel."""

import pytest
import torch
from cases import OPS, case, entries, forward_backward, same
from conftest import DEVICES, DTYPES
from guard import guarded

import flatout.torch as ft
from flatout import _C

# Small: whole vectors, odd (one element at a time), several vectors a thread.
WIDTHS = [64, 65, 2048]
HEADS = [(128, (4, 2)), (6, (3, 1)), (64, (1, 1))]
STATES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def guarded_as_without(inputs, f):
    want = forward_backward(inputs, f)
    with guarded() as calls:
        got = forward_backward(inputs, f)
    assert same(got, want)
    return set(calls)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_op(name, dtype, device):
    sizes = (
        [dict(D=D, heads=h) for D, h in HEADS] if "rope" in name else [dict(H=H) for H in WIDTHS]
    )
    for size in sizes:
        inputs, f = case(name, device, dtype, tokens=9, **size)
        assert guarded_as_without(inputs, f) == entries(name, dtype), size


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_wide_and_many(name, device):
    """Beyond what a block holds in registers or shared memory, and more rows than blocks."""
    for tokens, H, D in ((3, 16392, 256), (2, 40001, 130), (2100, 8, 2)):
        heads = (2, 1) if tokens > 9 else (33, 7)
        inputs, f = case(name, device, torch.bfloat16, tokens, H, D, heads)
        guarded_as_without(inputs, f)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "swiglu", "rope", "embedding"])
def test_unaligned_and_strided(name, device):
    """One element off a vector's boundary, and rows with gaps between them."""
    for offset, gap in ((1, 0), (0, 8), (3, 5)):
        inputs, f = case(name, device, torch.bfloat16, tokens=5, H=256, D=64)
        moved = []
        for t in inputs:
            pool = torch.randn(t.numel() // t.shape[-1], t.shape[-1] + gap + offset, device=device)
            view = pool.to(t.dtype)[:, offset : offset + t.shape[-1]]
            moved.append(view.unflatten(0, t.shape[:-1]) if t.ndim > 1 else view[0])
        guarded_as_without([t.detach().requires_grad_() for t in moved], f)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [
    dict(reduction="none", shift=1),
    dict(label_smoothing=0.1, z_loss=1e-3, softcap=5.0),
    dict(class_weight=True, return_accuracy=True, return_predicted=True),
    dict(num_items=7.0, reduction="sum"),
], ids=str)  # fmt: skip
def test_cross_entropy_options(options, device):
    logits = torch.randn(4, 6, 130, device=device).bfloat16().requires_grad_()
    target = torch.randint(0, 130, (4, 6), device=device)
    if "class_weight" in options:
        options = {**options, "class_weight": torch.rand(130, device=device)}

    def f(z):
        out = ft.cross_entropy(z, target, **options)
        return out[0] if isinstance(out, tuple) else out

    assert guarded_as_without((logits,), f) == entries("cross_entropy")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [
    dict(reduction="none", label_smoothing=0.1, softcap=5.0),
    dict(accum_dtype=torch.float32, z_loss=1e-3),
    dict(num_items=7.0, return_accuracy=True, return_predicted=True),
], ids=str)  # fmt: skip
def test_linear_cross_entropy_options(options, device):
    """With a bias, over three chunks."""
    x, w, bias = (torch.randn(s, device=device).bfloat16() for s in ((150, 72), (264, 72), (264,)))
    target = torch.randint(0, 264, (150,), device=device)
    inputs = [t.requires_grad_() for t in (x, w, bias)]

    def f(x, w, bias):
        out = ft.linear_cross_entropy(x, w, target, bias=bias, chunk_size=64, **options)
        return out[0] if isinstance(out, tuple) else out

    name = "linear_cross_entropy" + ", mean" * ("reduction" not in options)
    assert guarded_as_without(inputs, f) == entries(name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_attention(packed, dtype, device):
    """Ragged tiles, two of keys, whose sum has the same bits in any order; packed with an empty
    sequence and rows behind the last, dense with queries enough for attention_bwd_units.cuh."""
    if device == "cuda" and (dtype == torch.float32 or torch.cuda.get_device_capability()[0] != 9):
        pytest.skip("attention on CUDA: 16 bits, compute capability 9.0")
    lead, cu, all_options = (2, 150), None, [dict(causal=True), dict(softcap=5.0, window=(20, 10))]
    if packed:
        lead, cu = (200,), torch.tensor([0, 3, 3, 150, 190], dtype=torch.int32, device=device)
    else:
        all_options += [
            dict(deterministic=True),
            dict(queries=1100),
            dict(queries=1100, softcap=5.0),
        ]
    for D, heads in ((128, (4, 2)), (64, (1, 1)), (8, (3, 1))):
        for options in all_options:
            options = dict(cu_seqlens_q=cu, **options)
            of_q = (*lead[:-1], options.pop("queries", lead[-1]))
            q, k, v = (
                torch.randn(*rows, h, D, device=device).to(dtype).requires_grad_()
                for rows, h in ((of_q, heads[0]), (lead, heads[1]), (lead, heads[1]))
            )
            reached = guarded_as_without((q, k, v), lambda *x, o=options: ft.attention(*x, **o))
            assert reached == {"attention_fwd", "attention_bwd"}, (D, options)


@pytest.mark.parametrize("device", DEVICES)
def test_in_place(device):
    cos, sin = torch.randn(2, 7, 64, device=device)
    w = torch.randn(64, device=device)
    for dtype in DTYPES:
        qkv = torch.randn(7, 5, 64, device=device).to(dtype)
        for f in (
            lambda q, k: ft.rope(q, k, cos, sin, inplace=True),
            lambda q, k: ft.qk_norm_rope(q, k, w, w, cos, sin, inplace=True),
        ):
            want, got = qkv.clone(), qkv.clone()
            f(want[:, :3], want[:, 3:4])
            with guarded() as calls:
                f(got[:, :3], got[:, 3:4])
            assert calls and torch.equal(got, want) and torch.equal(got[:, 4], qkv[:, 4])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtypes", STATES, ids=str)
def test_optimizer(dtypes, stochastic, device):
    """The norm, the scaling and the step, of aligned and unaligned tensors."""
    params, state = dtypes

    def make(kind):
        sizes = ((1000, 0), (7, 0), (0, 0), (65537, 0), (300, 1))
        return [torch.rand(n + skip, device=device).to(kind)[skip:] for n, skip in sizes]

    def lists():
        torch.manual_seed(3)
        return make(params), make(params), make(state), make(state)

    def scalar(x):
        return torch.full((), x, device=device)

    options = dict(
        coef=scalar(0.5), grad_scale=scalar(2.0), found_inf=scalar(0.0), lr=scalar(0.1),
        stochastic_rounding=stochastic, seed=3,
    )  # fmt: skip
    steps = [scalar(2.0) for _ in range(5)]
    want, got = lists(), lists()
    ft.adamw_step(*want, steps, **options)
    norm = ft.global_norm(want[1])
    with guarded() as calls:
        ft.adamw_step(*got, steps, **options)
        assert torch.equal(ft.global_norm(got[1]), norm)
        for p, g in zip(got[0], got[1], strict=True):
            p.grad = g
        ft.clip_grad_norm_(got[0], 0.1)
    assert set(calls) == {"adamw_step", "global_norm", "scale"}
    for p, g in zip(want[0], want[1], strict=True):
        p.grad = g
    ft.clip_grad_norm_(want[0], 0.1)
    assert all(same(a, b) for a, b in zip(got, want, strict=True))
    assert not same(got[0], lists()[0]) and not same(got[1], lists()[1])


@pytest.mark.parametrize("device", DEVICES)
def test_found_inf_writes_nothing(device):
    p, g, m, v = ([torch.rand(1000, device=device)] for _ in range(4))
    before = [t[0].clone() for t in (p, m, v)]
    with guarded():
        ft.adamw_step(p, g, m, v, 1, found_inf=torch.ones((), device=device))
    assert same(before, [t[0] for t in (p, m, v)])


def test_the_guard_sees_what_it_should(monkeypatch):
    """A write beyond the end, one between the rows, an input that changes, a hole in the output."""
    x, y = torch.randn(3, 8)[:, :6], torch.empty(3, 8)[:, :6]

    def beyond(y, gate, up, stream=0):
        y.as_strided((1,), (1,), y.storage_offset() + 23).fill_(0)
        y.fill_(1)

    def between(y, gate, up, stream=0):
        y.as_strided((3, 8), (8, 1))[:, :].fill_(1)

    def changes(y, gate, up, stream=0):
        y.fill_(1)
        gate[0, 0] = 5

    def hole(y, gate, up, stream=0):
        y[:2].fill_(1)

    for wrong, message in (
        (beyond, "argument 0: written outside"),
        (between, "argument 0: written outside"),
        (changes, "argument 1: changed"),
        (hole, "argument 0: not written throughout"),
    ):
        monkeypatch.setattr(_C, "swiglu_fwd", wrong)
        with guarded(), pytest.raises(AssertionError, match=message):
            _C.swiglu_fwd(y, x, x.clone(), 0)
