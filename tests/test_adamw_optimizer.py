"""ft.AdamW as a torch.optim.Optimizer: state_dict, groups, schedulers, closures, GradScaler."""

import copy
import functools
import io
import math

import pytest
import torch
from conftest import DEVICES
from test_adamw import FUSED, SHAPES, clones, parameters, same, set_grads, states, ulps

import flatout.torch as ft


@pytest.mark.parametrize("direction", ["to torch", "from torch", "to ourselves"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_state_dict(direction, dtype, device):
    """Three steps, over to the other optimizer through a file, three more: as without a change."""
    first = torch.optim.AdamW if direction == "from torch" else ft.AdamW
    second = torch.optim.AdamW if direction == "to torch" else ft.AdamW
    options = [dict(fused=True) if c is torch.optim.AdamW else {} for c in (first, second)]
    groups = [SHAPES[:3], SHAPES[3:]]

    def make(cls, params, extra):
        split = [dict(params=params[:3], lr=1e-2), dict(params=params[3:], weight_decay=0.5)]
        return cls(split, betas=(0.8, 0.95), **extra)

    params = parameters(dtype, [s for g in groups for s in g], device)
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
            assert exact >= (0.99 if FUSED and device == "cpu" else 0.5)
            # bf16: an exp_avg of terms that cancel keeps their roundings
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3 if dtype.itemsize == 2 else 1e-6)
    if direction == "to ourselves":
        assert same(params, others)


@pytest.mark.parametrize("device", DEVICES)
def test_state_dict_of_a_plain_torch_optimizer(device):
    """torch's steps on the host, numbers of old checkpoints, capturable: all load."""
    params = parameters(device=device)
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


@pytest.mark.parametrize("device", DEVICES)
def test_pickle_and_deepcopy(device):
    params = parameters(device=device)
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


@pytest.mark.parametrize("device", DEVICES)
def test_param_groups_and_defaults(device):
    params = parameters(device=device)
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
@pytest.mark.parametrize("device", DEVICES)
def test_schedulers(tensor_lr, device):
    params = parameters(device=device)
    torchs = clones(params)
    rates = [torch.tensor(0.1, device=device) if tensor_lr else 0.1 for _ in range(2)]
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


@pytest.mark.parametrize("device", DEVICES)
def test_closure_and_missing_gradients(device):
    params = parameters(device=device)
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


@pytest.mark.parametrize("device", DEVICES)
def test_replaced_state_is_seen(device):
    """The lists that step() keeps follow what others do to `state` and to the parameters."""
    params, torchs = parameters(device=device), None
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


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    """Channels-last and transposed parameters, and gradients in another order than they."""
    values = [torch.randn(4, 3, 5, 6, device=device), torch.randn(7, 9, device=device)]
    params = [torch.nn.Parameter(values[0].contiguous(memory_format=torch.channels_last)),
              torch.nn.Parameter(values[1].t())]  # fmt: skip
    torchs = [torch.nn.Parameter(p.detach().contiguous()) for p in params]
    ours, theirs = ft.AdamW(params, max_grad_norm=1.0), ft.AdamW(torchs, max_grad_norm=1.0)
    for expand in (False, True):
        set_grads(torchs)
        for p, q in zip(params, torchs, strict=True):
            if expand:
                q.grad = torch.randn(q.shape[-1], device=device).expand(q.shape)
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
        (dict(lr=-1.0), ValueError, "lr: expected a finite number >= 0, got -1.0"),
        (dict(lr=float("nan")), ValueError, "lr: expected"),
        (dict(lr=torch.ones(2)), ValueError, "a tensor of one element"),
        (dict(betas=(1.0, 0.9)), ValueError, "betas: expected two numbers in 0 .. 1"),
        (dict(betas=(0.9, -0.1)), ValueError, "betas: expected"),
        (dict(eps=-1e-8), ValueError, "eps: expected a finite number >= 0"),
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


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_step_changes_nothing(device):
    params = parameters(device=device)
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
@pytest.mark.parametrize("device", DEVICES)
def test_grad_scaler(unscale, max_grad_norm, device):
    """As without a scaler (a power of two); a step whose gradients overflow changes nothing."""
    params = parameters(device=device)
    plain = clones(params)
    ours = ft.AdamW(params, lr=1e-2, max_grad_norm=max_grad_norm)
    other = ft.AdamW(plain, lr=1e-2, max_grad_norm=max_grad_norm)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    for k in range(4):
        set_grads(params, plain)
        for p in params:
            p.grad *= scaler.get_scale()
        if k == 2:
            params[4].grad[3] = float("inf")
            before = copy.deepcopy([params, states(ours, params)])
        scaler.scale(torch.ones((), device=device))  # makes the scale exist
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


def test_a_bad_number_in_any_group_changes_nothing():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = ft.AdamW([dict(params=[p]), dict(params=[q])])
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    for name, value in (("lr", math.nan), ("eps", -1.0), ("weight_decay", math.inf)):
        good, optimizer.param_groups[1][name] = optimizer.param_groups[1][name], value
        with pytest.raises(ValueError, match=f"AdamW: {name}: expected a finite number >= 0"):
            optimizer.step()
        optimizer.param_groups[1][name] = good
        assert (p == 1).all() and (q == 1).all()
    optimizer.step()
    assert optimizer.state[p]["step"] == optimizer.state[q]["step"] == 1


def test_a_refused_state_dict_changes_nothing():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer, other = ft.AdamW([p]), torch.optim.AdamW([p], amsgrad=True)
    p.grad = torch.ones(3)
    other.step()
    with pytest.raises(NotImplementedError, match="amsgrad"):
        optimizer.load_state_dict(other.state_dict())
    assert not optimizer.state and not optimizer.param_groups[0]["amsgrad"]


@pytest.mark.parametrize("device", DEVICES)
def test_layouts_that_change_between_steps(device):
    """Of the parameters, and of states from a checkpoint: as torch's loop. (Its fused step differs
    from that on the CPU where layouts do.)"""
    theirs = functools.partial(torch.optim.AdamW, foreach=False, fused=False)

    def run(make, checkpoint=None):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(device)
        optimizer, saved = make(model.parameters(), lr=0.1), []
        for layout in (None, torch.channels_last, torch.contiguous_format, torch.channels_last):
            if layout is not None:
                model.to(memory_format=layout)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, device=device)
            if checkpoint and layout is torch.contiguous_format:
                optimizer.load_state_dict(copy.deepcopy(checkpoint))
            optimizer.step()
            saved.append(copy.deepcopy(optimizer.state_dict()))
        return [p.detach().clone() for p in model.parameters()], saved

    (mine, _), (base, saved) = run(ft.AdamW), run(theirs)
    torch.testing.assert_close(mine, base)
    mine, base = (run(make, saved[1])[0] for make in (ft.AdamW, theirs))
    torch.testing.assert_close(mine, base)
