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
        (dict(amsgrad=True), NotImplementedError, "AdamW: amsgrad=True"),
        (dict(differentiable=True), NotImplementedError, "AdamW: differentiable=True"),
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
