import ml_dtypes
import numpy as np
import pytest
import ref
import torch
from conftest import DEVICES, check, f64

import flatout
import flatout.torch as ft
from flatout import _C

SHAPES = [(70, 33), (0, 5), (1,), (), (513,), (3, 100, 70)]
# Where ours has torch's fused multiply-adds (never in double): the same results to the last bit.
FUSED = _C.build_info()["cpu"] != "plain"
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def parameters(dtype=torch.float32, shapes=SHAPES, device="cpu"):
    return [torch.nn.Parameter(torch.randn(s, device=device).to(dtype)) for s in shapes]


def set_grads(*lists, scale=1.0):
    for tensors in zip(*lists, strict=True):
        grad = torch.randn_like(tensors[0]) * scale
        for p in tensors:
            p.grad = grad.to(p.device, p.dtype).clone()


def clones(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def states(optimizer, params):
    return [optimizer.state[p][k] for p in params for k in ("step", "exp_avg", "exp_avg_sq")]


def ulps(a, b, least):
    """|a - b| in units of the last place, of numbers of at least magnitude `least`."""
    size = torch.maximum(a.abs(), b.abs()).double().clamp(min=least)
    unit = torch.exp2(size.log2().floor()) * torch.finfo(a.dtype).eps
    return (a.double() - b.double()).abs() / unit


# ---- Against the formula and against torch --------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_against_float64(dtype, maximize, device):
    if dtype is torch.float64 and device != "cpu":
        pytest.skip("float64 runs on the CPU")
    options = dict(lr=3e-2, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, maximize=maximize)
    params = parameters(dtype, device=device)
    torchs = clones(params)
    want = [(f64(p), np.zeros(p.shape), np.zeros(p.shape)) for p in params]
    ours = ft.AdamW(params, **options)
    kind = dict(fused=True) if device == "cuda" else dict(foreach=False)
    theirs = torch.optim.AdamW(torchs, **kind, **options)
    options.pop("maximize")
    for t in range(1, 6):
        set_grads(params, torchs)
        for i, p in enumerate(params):
            want[i] = ref.adamw_step(
                want[i][0], (-1) ** maximize * f64(p.grad), *want[i][1:], t, **options
            )
        ours.step()
        theirs.step()
    for p, q, (value, m, v) in zip(params, torchs, want, strict=True):
        if not p.numel():
            continue
        for name, expected in ("exp_avg", m), ("exp_avg_sq", v):
            check(name, ours.state[p][name], expected, f64(theirs.state[q][name]))
        check("p", p, value, f64(q))


@pytest.mark.parametrize("device", DEVICES)
def test_first_step_is_sign_times_lr(device):
    """m / sqrt(v) is the gradient's sign after one step: exact numbers, no tolerance."""
    p, g = (
        torch.zeros(4, device=device, requires_grad=True),
        torch.tensor([1.0, -4.0, 0.25, 0.0], device=device),
    )
    p.grad = g
    ft.AdamW([p], lr=0.5, betas=(0.5, 0.75), eps=0, weight_decay=0).step()
    assert p.tolist()[:3] == [-0.5, 0.5, -0.5]


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulps_from_torch(dtype):
    """50 steps beside torch's fused CPU kernel: (nearly) every element is the same to the bit."""
    lr, params = 1e-2, parameters(dtype, [(100, 301), (7,)])
    torchs, before = clones(params), clones(params)
    ours, theirs = ft.AdamW(params, lr=lr), torch.optim.AdamW(torchs, lr=lr, fused=True)
    for _ in range(50):
        set_grads(params, torchs)
        ours.step()
        theirs.step()
    share, most = (0.999, 5) if FUSED and dtype is not torch.float64 else (0, 16)
    for p, q, old in zip(params, torchs, before, strict=True):
        pairs = [(p.detach(), q.detach())]
        pairs += [(ours.state[p][k], theirs.state[q][k]) for k in ("exp_avg", "exp_avg_sq")]
        for a, b in pairs:
            distance = ulps(a, b, 0.1)
            assert distance.max() <= most
            if p.numel() > 100:  # of the few, most are in the tail that torch does without vectors
                assert (distance < 1).double().mean() >= share
                assert (ulps(old.detach(), b, 0.1) > 5).double().mean() > 0.5, "test too weak"


@pytest.mark.parametrize("device", DEVICES)
def test_wide_states(device):
    """bfloat16 parameters with float32 states: the float32 step, rounded once."""
    params = parameters(torch.bfloat16, device=device)
    optimizer = ft.AdamW(params)
    wide = [p.detach().float() for p in params]
    zeros = [[torch.zeros_like(p) for p in wide] for _ in range(4)]
    for p, m, v in zip(params, *zeros[:2], strict=True):
        optimizer.state[p] = dict(step=torch.zeros((), device=device), exp_avg=m, exp_avg_sq=v)
    for t in range(1, 4):
        set_grads(params)
        optimizer.step()
        ft.adamw_step(wide, [p.grad.float() for p in params], *zeros[2:], t)
        wide = [p.bfloat16().float() for p in wide]
        assert same(params, [p.bfloat16() for p in wide])
        assert same(zeros[0], zeros[2]) and same(zeros[1], zeros[3])


@pytest.mark.parametrize("device", DEVICES)
def test_beta1_of_zero_and_large_share(device):
    """m is the gradient itself where beta1 = 0, to the bit, and torch's lerp where it is 0.3."""
    for beta1 in (0.0, 0.3):
        params = parameters(device=device)
        torchs = clones(params)
        ours = ft.AdamW(params, betas=(beta1, 0.9))
        theirs = torch.optim.AdamW(torchs, betas=(beta1, 0.9), fused=True)
        for _ in range(3):
            set_grads(params, torchs)
            ours.step()
            theirs.step()
        for p, q in zip(params, torchs, strict=True):
            m = ours.state[p]["exp_avg"]
            assert torch.equal(m, p.grad) if beta1 == 0 else True
            torch.testing.assert_close(m, theirs.state[q]["exp_avg"], rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


# ---- Registration, NumPy ---------------------------------------------------------------------


def test_torch_registration():
    tensors = [torch.randn(3, 4), torch.randn(5)]
    torch.library.opcheck(ft.ops.global_norm.default, (tensors, 1.0))
    torch.library.opcheck(ft.ops.scale_.default, (tensors, torch.full((), 0.5)))
    lists = [[torch.rand(3, 4), torch.rand(5)] for _ in range(4)]
    steps = [torch.ones(()), torch.ones(())]
    scalars = (1e-3, 0.9, 0.999, 1e-8, 0.1, False, False, 0)
    coef = torch.full((), 0.5)
    for optional in ((None, None, None, None), (coef, coef, torch.zeros(()), coef)):
        torch.library.opcheck(
            ft.ops.adamw_step_.default, (*lists, steps, *optional, *scalars)
        )  # fmt: skip


def test_compile():
    def clip_and_norm(params):
        norm = ft.clip_grad_norm_(params, 0.5)
        return norm, ft.global_norm([p.grad for p in params])

    params = parameters(shapes=[(3, 4), (5,)])
    set_grads(params)
    want = ref.global_norm([f64(p.grad) for p in params])
    norm, after = torch.compile(clip_and_norm, fullgraph=True, backend="aot_eager")(params)
    assert abs(norm.item() / want - 1) < 1e-6 and abs(after.item() / 0.5 - 1) < 1e-4
    others = clones(params)
    ours, plain = ft.AdamW(params, max_grad_norm=0.1), ft.AdamW(others, max_grad_norm=0.1)
    compiled = torch.compile(ours.step, backend="aot_eager")
    for _ in range(2):
        set_grads(params, others)
        compiled()
        plain.step()
        assert same(params, others)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_numpy(dtype):
    p, g = ([np.random.randn(*s).astype(dtype) for s in ((30, 7), (0, 2), (40,))] for _ in range(2))
    m, v = ([np.zeros_like(a) for a in p] for _ in range(2))
    scale = ref.clip_coefficient(g, 1.0)
    want = [
        ref.adamw_step(a, b.astype(np.float64) * scale, 0 * a, 0 * a, 1, eps=1.0)
        for a, b in zip(p, g, strict=True)
    ]
    norm = flatout.adamw_step(p, g, m, v, 1, eps=1.0, max_grad_norm=1.0)
    assert abs(norm / ref.global_norm(g) - 1) < 1e-6 and norm > 5
    eps = float(ml_dtypes.finfo(dtype).eps)
    for a, b, c, (wp, wm, wv) in zip(p, m, v, want, strict=True):
        np.testing.assert_allclose(a.astype(np.float64), wp, rtol=2 * eps, atol=2 * eps)
        np.testing.assert_allclose(b.astype(np.float64), wm, rtol=2 * eps, atol=1e-6)
        np.testing.assert_allclose(c.astype(np.float64), wv, rtol=2 * eps, atol=1e-7)
    assert flatout.adamw_step(p, g, m, v, 2) is None
    norm = flatout.clip_grad_norm_(g, 0.5)
    assert norm > 5 and abs(flatout.global_norm(g) / 0.5 - 1) < 4 * eps + 1e-6
    assert (
        abs(flatout.global_norm([a.T[::2] for a in g[:1]]) - ref.global_norm([g[0].T[::2]])) < 1e-6
    )
    with pytest.raises(ValueError, match="lr: expected a number >= 0"):
        flatout.adamw_step(p, g, m, v, 3, lr=-1.0)
