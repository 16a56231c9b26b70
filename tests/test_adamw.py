import copy
import io

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
    theirs = torch.optim.AdamW(torchs, foreach=False, **options)
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


def test_first_step_is_sign_times_lr():
    """m / sqrt(v) is the gradient's sign after one step: exact numbers, no tolerance."""
    p, g = torch.zeros(4, requires_grad=True), torch.tensor([1.0, -4.0, 0.25, 0.0])
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


def test_wide_states():
    """bfloat16 parameters with float32 states: the float32 step, rounded once."""
    params = parameters(torch.bfloat16)
    optimizer = ft.AdamW(params)
    wide = [p.detach().float() for p in params]
    zeros = [[torch.zeros_like(p) for p in wide] for _ in range(4)]
    for p, m, v in zip(params, *zeros[:2], strict=True):
        optimizer.state[p] = dict(step=torch.zeros(()), exp_avg=m, exp_avg_sq=v)
    for t in range(1, 4):
        set_grads(params)
        optimizer.step()
        ft.adamw_step(wide, [p.grad.float() for p in params], *zeros[2:], t)
        wide = [p.bfloat16().float() for p in wide]
        assert same(params, [p.bfloat16() for p in wide])
        assert same(zeros[0], zeros[2]) and same(zeros[1], zeros[3])


def test_beta1_of_zero_and_large_share():
    """m is the gradient itself where beta1 = 0, to the bit, and torch's lerp where it is 0.3."""
    for beta1 in (0.0, 0.3):
        params = parameters()
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


# ---- torch.optim's contract -----------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to torch", "from torch", "to ourselves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict(direction, dtype):
    """Three steps, over to the other optimizer through a file, three more: as without a change."""
    first = torch.optim.AdamW if direction == "from torch" else ft.AdamW
    second = torch.optim.AdamW if direction == "to torch" else ft.AdamW
    options = [dict(fused=True) if c is torch.optim.AdamW else {} for c in (first, second)]
    groups = [SHAPES[:3], SHAPES[3:]]

    def make(cls, params, extra):
        split = [dict(params=params[:3], lr=1e-2), dict(params=params[3:], weight_decay=0.5)]
        return cls(split, betas=(0.8, 0.95), **extra)

    params = parameters(dtype, [s for g in groups for s in g])
    before = make(first, params, options[0])
    for _ in range(3):
        set_grads(params)
        before.step()
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    others = clones(params)
    after = make(second, others, options[1])
    after.load_state_dict(torch.load(file))
    assert after.param_groups[0]["lr"] == 1e-2 and after.param_groups[1]["weight_decay"] == 0.5
    for _ in range(3):
        set_grads(params, others)
        before.step()
        after.step()
    step = states(after, others)[0]
    assert step == 6 and step.dtype is torch.float32 and step.shape == ()
    for a, b in zip([*params, *states(before, params)], [*others, *states(after, others)],
                    strict=True):  # fmt: skip
        if a.numel():
            exact = (ulps(a.detach(), b.detach(), 1e-2) < 1).double().mean()
            assert exact >= (0.99 if FUSED else 0.5)
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-6)
    if direction == "to ourselves":
        assert same(params, others)


def test_state_dict_of_a_plain_torch_optimizer():
    """torch's steps on the host, numbers of old checkpoints, capturable: all load."""
    params = parameters()
    theirs = torch.optim.AdamW(params)
    set_grads(params)
    theirs.step()
    saved = copy.deepcopy(theirs.state_dict())
    saved["param_groups"][0] |= dict(capturable=True, foreach=True)
    for state in saved["state"].values():
        state["step"] = 1
    ours = ft.AdamW(params)
    ours.load_state_dict(saved)
    ours.step()
    assert all(ours.state[p]["step"].item() == 2 for p in params)
    saved["param_groups"][0]["amsgrad"] = True
    with pytest.raises(NotImplementedError, match="amsgrad"):
        ours.load_state_dict(saved)


def test_pickle_and_deepcopy():
    params = parameters()
    ours = ft.AdamW(params, max_grad_norm=0.5)
    set_grads(params)
    ours.step()
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for other in (copy.deepcopy(ours), torch.load(file, weights_only=False)):
        assert other.max_grad_norm == 0.5
        copies = other.param_groups[0]["params"]
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.clone()
        other.step()
        assert other.grad_norm > 0.5
    ours.step()
    assert same(params, copies)


def test_param_groups_and_defaults():
    params = parameters()
    torchs, before = clones(params), clones(params)

    def groups(p):
        return [dict(params=p[:2]), dict(params=p[2:4], lr=0.0, weight_decay=0.0)]

    ours, theirs = ft.AdamW(groups(params)), torch.optim.AdamW(groups(torchs), fused=True)
    for o, p in ((ours, params), (theirs, torchs)):
        o.add_param_group(dict(params=p[4:], maximize=True, betas=(0.5, 0.6), eps=1e-2))
    for _ in range(2):
        set_grads(params, torchs)
        ours.step()
        theirs.step()
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert same(params[2:4], before[2:4]) and not same(params[4:], before[4:])
    named = ft.AdamW([("a", params[0]), ("b", params[1])])
    assert named.param_groups[0]["param_names"] == ["a", "b"]


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(tensor_lr):
    params = parameters()
    torchs = clones(params)
    rates = [torch.tensor(0.1) if tensor_lr else 0.1 for _ in range(2)]
    ours, theirs = ft.AdamW(params, lr=rates[0]), torch.optim.AdamW(torchs, lr=rates[1], fused=True)
    schedules = [
        torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
             torch.optim.lr_scheduler.CosineAnnealingLR(o, 5)],
            milestones=[3],
        )
        for o in (ours, theirs)
    ]  # fmt: skip
    for _ in range(8):
        set_grads(params, torchs)
        ours.step()
        theirs.step()
        for s in schedules:
            s.step()
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_closure_and_missing_gradients():
    params = parameters()
    before = clones(params)
    ours = ft.AdamW(params)
    assert ours.step() is None and not ours.state and same(params, before)

    def closure():
        assert torch.is_grad_enabled()
        ours.zero_grad()
        loss = params[0].square().sum() + params[4].square().sum()
        loss.backward()
        return loss

    assert ours.step(closure).item() > 0
    assert list(ours.state) == [params[0], params[4]]
    assert same(params[1:4], before[1:4]) and not torch.equal(params[4], before[4])
    params[0].grad, params[5].grad = None, torch.ones_like(params[5])
    ours.step()  # another set of gradients than in the step before
    assert ours.state[params[4]]["step"] == 2 and ours.state[params[5]]["step"] == 1
    assert ours.state[params[0]]["step"] == 1


def test_replaced_state_is_seen():
    """The lists that step() keeps follow what others do to `state` and to the parameters."""
    params, torchs = parameters(), None
    ours = ft.AdamW(params)
    set_grads(params)
    ours.step()
    torchs = clones(params)
    theirs = torch.optim.AdamW(torchs, fused=True)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    for o, group in ((ours, params), (theirs, torchs)):
        o.state[group[0]]["exp_avg"] = torch.ones_like(group[0])
        o.state[group[4]] = {k: v.clone() * 2 for k, v in o.state[group[4]].items()}
        group[5].data = group[5].data + 1
    set_grads(params, torchs)
    ours.step()
    theirs.step()
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_layouts():
    """Channels-last and transposed parameters, and gradients in another order than they."""
    values = [torch.randn(4, 3, 5, 6), torch.randn(7, 9)]
    params = [torch.nn.Parameter(values[0].contiguous(memory_format=torch.channels_last)),
              torch.nn.Parameter(values[1].t())]  # fmt: skip
    torchs = [torch.nn.Parameter(p.detach().contiguous()) for p in params]
    ours, theirs = ft.AdamW(params, max_grad_norm=1.0), ft.AdamW(torchs, max_grad_norm=1.0)
    for expand in (False, True):
        set_grads(torchs)
        for p, q in zip(params, torchs, strict=True):
            if expand:
                q.grad = torch.randn(q.shape[-1]).expand(q.shape)
            p.grad = q.grad.clone(memory_format=torch.contiguous_format)
        ours.step()
        theirs.step()
        for p, q in zip(params, torchs, strict=True):
            torch.testing.assert_close(p, q)
            assert not p.is_contiguous()


def test_versions_are_counted():
    params = parameters()
    loss = (params[0] * params[0]).sum()
    set_grads(params)
    optimizer = ft.AdamW(params, max_grad_norm=1e-3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    version = params[0].grad._version
    ft.clip_grad_norm_(params, 1e-3)
    assert params[0].grad._version > version


def test_sparse_and_complex_gradients():
    p = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = ft.AdamW([p])
    p.grad = torch.randn(4, 3).to_sparse()
    for call in (optimizer.step, lambda: ft.clip_grad_norm_([p], 1.0)):
        with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
            call()
    z = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    z.grad = torch.ones_like(z)
    with pytest.raises(RuntimeError, match="complex gradients are not supported"):
        ft.AdamW([z]).step()


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(lr=-1.0), ValueError, "lr: expected a number >= 0, got -1.0"),
        (dict(lr=float("nan")), ValueError, "lr: expected"),
        (dict(lr=torch.ones(2)), ValueError, "a tensor of one element"),
        (dict(betas=(1.0, 0.9)), ValueError, "betas: expected two numbers in 0 .. 1"),
        (dict(betas=(0.9, -0.1)), ValueError, "betas: expected"),
        (dict(eps=-1e-8), ValueError, "eps: expected a number >= 0"),
        (dict(weight_decay=float("nan")), ValueError, "weight_decay: expected"),
        (dict(max_grad_norm=-1.0), ValueError, "max_grad_norm: expected a number >= 0"),
        (dict(amsgrad=True), TypeError, "unexpected keyword argument 'amsgrad'"),
        (dict(foreach=True), TypeError, "unexpected keyword argument 'foreach'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ft.AdamW(parameters(), **options)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice():
    params = parameters()
    with pytest.raises(ValueError, match="listed twice"):
        ft.AdamW([params[0], params[0]])
    with pytest.raises(ValueError, match="more than one parameter group"):
        ft.AdamW([dict(params=params[:2]), dict(params=params[1:])])
    with pytest.raises(NotImplementedError, match="amsgrad"):
        ft.AdamW([dict(params=params, amsgrad=True)])


def test_a_failed_step_changes_nothing():
    params = parameters()
    optimizer = ft.AdamW(params)
    set_grads(params)
    optimizer.step()
    before = copy.deepcopy([params, states(optimizer, params)])
    optimizer.param_groups[0]["eps"] = -1.0
    with pytest.raises(ValueError, match="eps"):
        optimizer.step()
    assert same(params, before[0]) and same(states(optimizer, params), before[1])


# ---- Mixed precision ------------------------------------------------------------------------


@pytest.mark.parametrize("max_grad_norm", [None, 0.7])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale, max_grad_norm):
    """As without a scaler (a power of two); a step whose gradients overflow changes nothing."""
    params = parameters()
    plain = clones(params)
    ours = ft.AdamW(params, lr=1e-2, max_grad_norm=max_grad_norm)
    other = ft.AdamW(plain, lr=1e-2, max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for k in range(4):
        set_grads(params, plain)
        for p in params:
            p.grad *= scaler.get_scale()
        if k == 2:
            params[4].grad[3] = float("inf")
            before = copy.deepcopy([params, states(ours, params)])
        scaler.scale(torch.ones(()))  # makes the scale exist
        if unscale:
            scaler.unscale_(ours)
        scaler.step(ours)
        scaler.update()
        if k == 2:
            assert same(params, before[0]) and same(states(ours, params), before[1])
            assert scaler.get_scale() == 512.0
        else:
            other.step()
    assert ours.state[params[0]]["step"] == 3
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    if max_grad_norm:
        torch.testing.assert_close(ours.grad_norm, other.grad_norm)
        assert ours.grad_norm > 2 * max_grad_norm


# ---- Clipping -------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm", [1e-3, 0.999, 1.001, 37.0, 1e3])
def test_clipped_step_against_float64(norm, dtype, device):
    if dtype is torch.float64 and device != "cpu":
        pytest.skip("float64 runs on the CPU")
    params = parameters(dtype, device=device)
    set_grads(params)
    whole = ref.global_norm([f64(p.grad) for p in params])
    for p in params:
        p.grad *= norm / whole
    grads = [f64(p.grad) for p in params]
    scale = ref.clip_coefficient(grads, 1.0)
    assert (scale < 1) == (norm > 1)
    wide = [torch.nn.Parameter(p.detach().double()) for p in params]
    for p, g in zip(wide, grads, strict=True):
        p.grad = torch.as_tensor(g * scale)
    groups = [dict(params=params[:2]), dict(params=params[2:], lr=3e-3)]
    ours = ft.AdamW(groups, betas=(0.5, 0.5), eps=1.0, max_grad_norm=1.0)
    theirs = torch.optim.AdamW([dict(params=wide[:2]), dict(params=wide[2:], lr=3e-3)],
                               betas=(0.5, 0.5), eps=1.0)  # fmt: skip
    ours.step()
    theirs.step()
    assert ours.grad_norm.device == params[0].device
    assert abs(ours.grad_norm.item() / ref.global_norm(grads) - 1) < 1e-6
    for p, q in zip(params, wide, strict=True):
        rounding = torch.finfo(dtype).eps
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_allclose(
                f64(ours.state[p][key]), f64(theirs.state[q][key]),
                rtol=4 * max(rounding, 1e-14), atol=1e-7 if dtype is torch.float16 else 1e-30,
            )  # fmt: skip
        np.testing.assert_allclose(f64(p), f64(q), rtol=2 * rounding, atol=2 * rounding)
    assert all(np.array_equal(f64(p.grad), g) for p, g in zip(params, grads, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_clip_grad_norm(dtype, device):
    if dtype is torch.float64 and device != "cpu":
        pytest.skip("float64 runs on the CPU")
    params = [*parameters(dtype, device=device), torch.nn.Parameter(torch.ones(3, device=device))]
    set_grads(params[:-1], scale=0.3)
    grads = [p.grad.clone() for p in params[:-1]]
    want = ref.global_norm([f64(g) for g in grads])
    norm = ft.clip_grad_norm_((p for p in params), 1.0)
    assert norm.shape == () and norm.device == params[0].device
    assert norm.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert abs(norm.item() / want - 1) < (1e-14 if dtype is torch.float64 else 1e-6) and want > 5
    for p, g in zip(params, grads, strict=False):
        exact = f64(g) * (1.0 / (want + 1e-6))
        error = np.abs(f64(p.grad) - exact).max(initial=0.0)
        assert error <= 2 * torch.finfo(dtype).eps * np.abs(exact).max(initial=0.0)
    assert abs(ft.global_norm([p.grad for p in params[:-1]]).item() - 1) < 1e-2
    untouched = [p.grad.clone() for p in params[:-1]]
    ft.clip_grad_norm_(params, 100.0)
    assert same([p.grad for p in params[:-1]], untouched)
    ft.clip_grad_norm_(params[0], 1e-3)
    assert params[1].grad.equal(untouched[1]) and not params[0].grad.equal(untouched[0])


def test_clip_agrees_with_torch():
    params = parameters()
    torchs = clones(params)
    set_grads(params, torchs)
    ours = ft.clip_grad_norm_(params, 2.0)
    theirs = torch.nn.utils.clip_grad_norm_(torchs, 2.0)
    torch.testing.assert_close(ours, theirs)
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_norm_that_is_not_finite(bad):
    params, torchs = parameters(), parameters()
    set_grads(params, torchs)
    params[0].grad[3, 3] = torchs[0].grad[3, 3] = bad
    with pytest.raises(RuntimeError, match="norm of the gradients is"):
        ft.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    norm, theirs = ft.clip_grad_norm_(params, 1.0), torch.nn.utils.clip_grad_norm_(torchs, 1.0)
    assert torch.equal(norm.isnan(), theirs.isnan()) and torch.equal(norm.isinf(), theirs.isinf())
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


@pytest.mark.parametrize("size", [1e-25, 1e-30, 1e25, 1e30])
def test_norm_beyond_the_range_of_squares(size):
    x = torch.randn(100_000) * size
    assert abs(ft.global_norm([x]).item() / ref.global_norm([f64(x)]) - 1) < 1e-6


def test_norm_of_odd_lists():
    assert ft.global_norm([]) == 0 and ft.global_norm([torch.zeros(0), torch.zeros(3)]) == 0
    assert ft.clip_grad_norm_([], 1.0) == 0
    assert ft.global_norm([torch.full((), 3.0), torch.full((1, 1), -4.0).bfloat16()]) == 5
    mixed = ft.global_norm([torch.ones(2), torch.ones(2, dtype=torch.float64)])
    assert mixed == 2 and mixed.dtype is torch.float64
    x = torch.randn(40, 50)
    torch.testing.assert_close(ft.global_norm([x.t()[::2]]), x.t()[::2].norm())
    for bad in ("inf", 1.0, 3):
        with pytest.raises(NotImplementedError, match=f"norm_type={bad}"):
            ft.clip_grad_norm_(parameters(), 1.0, norm_type=bad)
    with pytest.raises(ValueError, match="max_norm: expected a number >= 0, got nan"):
        ft.clip_grad_norm_(parameters(), float("nan"))


# ---- Threads and stochastic rounding --------------------------------------------------------


def train(stochastic_rounding, dtype, resume=False):
    torch.manual_seed(5)
    params = parameters(dtype, [(123, 457), (0,), (90_000,)])
    make = dict(lr=1e-3, stochastic_rounding=stochastic_rounding, max_grad_norm=1.0)
    optimizer = ft.AdamW([dict(params=params[:1]), dict(params=params[1:])], **make)
    for k in range(4):
        if resume and k == 2:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = ft.AdamW([dict(params=params[:1]), dict(params=params[1:])], **make)
            optimizer.load_state_dict(saved)
        set_grads(params)
        optimizer.step()
    return [*params, *states(optimizer, params), optimizer.grad_norm]


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_threads_do_not_change_a_bit(stochastic_rounding, threads):
    dtype = torch.bfloat16 if stochastic_rounding else torch.float32
    threads(1)
    want = train(stochastic_rounding, dtype)
    for count in (2, 3, 7):
        threads(count)
        assert same(train(stochastic_rounding, dtype), want)


def test_stochastic_rounding_survives_a_restart():
    want = train(True, torch.bfloat16)
    assert same(train(True, torch.bfloat16, resume=True), want)
    assert not same(train(False, torch.bfloat16), want)


def round_stochastically(x, seed=0, step=3, count=1 << 18, of="p"):
    """`count` draws of SR(x), by a step whose exact result is x in float32."""
    one = torch.ones(count, dtype=torch.bfloat16)
    zero, state = torch.zeros_like(one), torch.zeros_like(one)
    p, m, v = one.clone() * 0 + (1 if of == "p" else 0), state.clone(), state.clone()
    options = dict(lr=1.0, betas=(0.5, 0.5), eps=1.0, weight_decay=0.0)
    if of == "p":  # 1 - lr * weight_decay
        options["weight_decay"] = 1.0 - x
    else:  # beta * 1
        (m if of == "m" else v).fill_(1.0)
        options["betas"] = (x, 0.5) if of == "m" else (0.5, x)
        options["lr"] = 0.0
    ft.adamw_step([p], [zero], [m], [v], step, stochastic_rounding=True, seed=seed, **options)
    return {"p": p, "m": m, "v": v}[of]


@pytest.mark.parametrize("of", ["p", "m", "v"])
@pytest.mark.parametrize("share", [1 / 16, 0.5, 0.9])
def test_stochastic_rounding_has_no_bias(share, of):
    """x lies `share` of the way between two neighbours in bf16: the mean is x to 5 sigma."""
    low, high = 1 - 2.0**-8, 1.0
    x = low + share * (high - low)
    draws = round_stochastically(x, of=of).double()
    assert set(draws.tolist()) == {low, high}
    sigma = (high - low) * (share * (1 - share) / draws.numel()) ** 0.5
    assert abs(draws.mean().item() - x) < 5 * sigma
    up = (draws == high).double() - share  # neighbours, and elements 256 apart, are independent
    for lag in (1, 2, 16, 256, 65536):
        correlation = (up[lag:] * up[:-lag]).mean() / (share * (1 - share))
        assert abs(correlation) < 5 / draws.numel() ** 0.5, lag


def test_stochastic_rounding_of_seeds_and_steps():
    x = 1 - 2.0**-9
    base = round_stochastically(x)
    assert torch.equal(base, round_stochastically(x))
    for other in (dict(seed=1), dict(step=4), dict(of="v"), dict(of="m"), dict(seed=-7)):
        agree = (round_stochastically(x, **other) == base).double().mean()
        assert abs(agree - 0.5) < 0.01, other


def test_stochastic_rounding_of_exact_values():
    """Every bf16 number, NaN and infinity included, is its own rounding."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    p = bits.view(torch.bfloat16).clone()
    zero = torch.zeros_like(p)
    for options in (dict(lr=0.0), dict(lr=1.0, weight_decay=0.0)):
        before = p.clone()
        ft.adamw_step(
            [p], [zero], [zero.clone()], [zero.clone()], 1, stochastic_rounding=True, **options
        )
        assert torch.equal(p.isnan(), before.isnan())
        finite = ~before.isnan()
        same_bits = p.view(torch.int16)[finite] == before.view(torch.int16)[finite]
        assert (same_bits | (before[finite] == 0)).all()


def test_stochastic_rounding_depends_on_the_place_in_the_list_alone():
    x = torch.randn(5000).bfloat16()
    whole, parts = x.clone(), [t.clone() for t in x.split([1, 1999, 0, 3000])]
    for params in ([whole], parts):
        zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        grads = [torch.ones_like(p) for p in params]
        ft.adamw_step(params, grads, *zeros, 2, lr=1e-3, stochastic_rounding=True, seed=9)
    assert torch.equal(torch.cat(parts), whole)


def test_stochastic_rounding_lets_small_updates_through():
    """200 steps of 1e-5 on weights of 1: lost to the nearest bf16, kept on average at random."""
    moved = {}
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = ft.AdamW([p], lr=1e-5, weight_decay=0, stochastic_rounding=stochastic)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = 1 - p.double().mean().item()
    assert moved[False] == 0 and abs(moved[True] / 200e-5 - 1) < 0.15


# ---- Registration, NumPy, bad input ---------------------------------------------------------


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


def step_arguments(**changes):
    def pair(fill):
        return [torch.full((2, 3), fill), torch.full((4,), fill)]

    good = dict(params=pair(7.0), grads=pair(1.0), exp_avgs=pair(0.0), exp_avg_sqs=pair(0.0))
    good |= dict(steps=[torch.ones(()), torch.ones(1)], coef=None, grad_scale=None, found_inf=None)
    good |= dict(lr_tensor=None, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)
    return good | dict(maximize=0, stochastic_rounding=0, seed=0) | changes


X = torch.zeros(2, 3)
Y = torch.zeros(4)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(params=None), TypeError, "params: expected a sequence of arrays"),
        (dict(params=[X, 3]), TypeError, "params: expected an array"),
        (dict(params=[X.int(), Y.int()]), TypeError, "params: expected a floating dtype"),
        (dict(params=[torch.zeros(3, 2).t(), Y]), ValueError, "params: expected a contiguous"),
        (dict(params=[X, Y.double()]), TypeError, "params: expected float32"),
        (dict(grads=[X]), ValueError, "grads: expected 2 arrays as in params, got 1"),
        (dict(grads=[]), ValueError, "expected 2 arrays as in params, got 0"),
        (dict(grads=[X, torch.zeros(5)]), ValueError, r"grads: expected shape \(4,\), got \(5,\)"),
        (dict(grads=[X, Y.bfloat16()]), TypeError, "grads: expected float32 as params has"),
        (dict(grads=[X.to_sparse(), Y]), TypeError, "grads: expected"),
        (dict(exp_avgs=[X, Y.half()]), TypeError, "exp_avgs: expected"),
        (dict(exp_avg_sqs=[X.half(), Y.half()]), TypeError, "exp_avg_sqs: expected float32"),
        (dict(exp_avgs=[X.double(), Y.double()], exp_avg_sqs=[X.double(), Y.double()]),
         ValueError, "exp_avgs: expected float64 exactly where params are"),
        (dict(steps=[torch.ones(())]), ValueError, "steps: expected one array per parameter"),
        (dict(steps=[torch.ones(()), torch.ones(2)]), ValueError, "steps: expected one element"),
        (dict(steps=[torch.ones((), dtype=torch.int64)] * 2), TypeError, "steps: expected float32"),
        (dict(steps=[torch.ones(()), torch.zeros(())]), ValueError, "steps: expected numbers >= 1"),
        (dict(steps=[torch.full((), float("nan"))] * 2), ValueError, "steps: expected numbers"),
        (dict(coef=torch.ones(2)), ValueError, "coef: expected one element, got 2"),
        (dict(coef=torch.ones(1).double()), TypeError, "coef: expected float32, got float64"),
        (dict(grad_scale=torch.ones(1).half()), TypeError, "grad_scale: expected float32"),
        (dict(found_inf=torch.ones(0)), ValueError, "found_inf: expected one element, got 0"),
        (dict(lr_tensor=torch.ones(3)), ValueError, "lr_tensor: expected one element"),
        (dict(lr=float("inf")), ValueError, "lr: expected a finite number"),
        (dict(lr="1"), TypeError, "lr: expected a real number"),
        (dict(beta1=1.0), ValueError, "beta1: expected a number in 0 .. 1"),
        (dict(beta2=-0.1), ValueError, "beta2: expected a number in 0 .. 1"),
        (dict(beta2=float("nan")), ValueError, "beta2: expected a number in 0 .. 1"),
        (dict(eps=-1.0), ValueError, "eps: expected a finite number >= 0"),
        (dict(weight_decay=-1.0), ValueError, "weight_decay: expected a finite number >= 0"),
        (dict(seed=1 << 70), ValueError, "seed: expected a 64-bit integer"),
        (dict(params=[X, X.view(6)[:4]]), ValueError, "params: an array overlaps one of params"),
        (dict(exp_avgs=[X, Y], exp_avg_sqs=[X, Y]), ValueError, "overlaps one of exp_avg"),
        (dict(params=[X, Y], grads=[X, Y]), ValueError, "overlaps one of"),
    ],
)  # fmt: skip
def test_bad_step(changes, error, message):
    args = step_arguments(**changes)
    before = copy.deepcopy(args)
    with pytest.raises(error, match=message):
        _C.adamw_step(*args.values())
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        for a, b in zip(args[key] or (), before[key] or (), strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b), "written before the checks"


def test_gradients_may_share_memory():
    args = step_arguments(grads=[X + 1, (X + 1).view(6)[:4]])
    _C.adamw_step(*args.values())
    assert (args["params"][1] < 7).all()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(tensors=3), TypeError, "tensors: expected a sequence of arrays"),
        (dict(tensors=[X.int()]), TypeError, "tensors: expected a floating dtype"),
        (dict(tensors=[X.t()]), ValueError, "tensors: expected a contiguous array"),
        (dict(norm=torch.ones(2)), ValueError, "norm: expected one element"),
        (dict(norm=torch.ones(1).double()), TypeError, "norm: expected float32"),
        (dict(coef=torch.ones(2)), ValueError, "coef: expected one element"),
        (dict(coef=torch.ones(1).half()), TypeError, "coef: expected float32"),
        (dict(partial=torch.ones(0)), ValueError, "partial: expected at least 1 element, got 0"),
        (dict(partial=torch.ones(4).double()), TypeError, "partial: expected float32"),
        (dict(max_norm=-1.0), ValueError, "max_norm: expected a number >= 0"),
        (dict(max_norm=float("nan")), ValueError, "max_norm: expected a number >= 0"),
    ],
)
def test_bad_norm(changes, error, message):
    args = dict(norm=torch.ones(1), coef=None, partial=torch.ones(4), tensors=[X], max_norm=1.0)
    with pytest.raises(error, match=message):
        _C.global_norm(*(args | changes).values())
    assert args["norm"] == 1


@pytest.mark.parametrize(
    "tensors, coef, error, message",
    [
        ([X, X], torch.ones(1), ValueError, "tensors: an array overlaps one of tensors"),
        ([X.t()], torch.ones(1), ValueError, "tensors: expected a contiguous array"),
        ([X.int()], torch.ones(1), TypeError, "tensors: expected a floating dtype"),
        ([X], torch.ones(2), ValueError, "coef: expected one element"),
        ([X], torch.ones(1).double(), TypeError, "coef: expected float32"),
        ([X.double()], torch.ones(1), TypeError, "coef: expected float64"),
        ([np.broadcast_to(np.float32(1), 3)], torch.ones(1), ValueError, "read-only"),
    ],
)
def test_bad_scale(tensors, coef, error, message):
    with pytest.raises(error, match=message):
        _C.scale(tensors, coef)
