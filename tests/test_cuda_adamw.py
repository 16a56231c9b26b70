"""AdamW beside torch.optim.AdamW(fused=True) over 50 steps, long lists, CUDA graphs: on the CPU too
where that makes sense."""

import copy

import pytest
import torch
from cases import noise, same
from conftest import DEVICES, check
from test_adamw import FUSED, clones, parameters, set_grads, states, ulps
from test_cuda_streams import captured

import flatout.torch as ft

# ---- Parity --------------------------------------------------------------------------------------


def float64_step(p, g, m, v, t, lr, weight_decay, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step in float64; the caller rounds."""
    p = p * (1 - lr * weight_decay)
    m, v = m + (1 - beta1) * (g - m), beta2 * v + (1 - beta2) * g * g
    root = v.sqrt() / (1 - beta2**t) ** 0.5 + eps
    return p - lr / (1 - beta1**t) * m / root, m, v


def histogram(distance):
    """Shares of the distances that are 0, 1, 2, 3 to 4, 5 to 8 and more."""
    rounded = distance.round()
    edges = [0, 1, 2, 3, 5, 9, float("inf")]
    bins = zip(("0", "1", "2", "3-4", "5-8", "more"), edges[:-1], edges[1:], strict=True)
    return {name: ((rounded >= x) & (rounded < y)).double().mean().item() for name, x, y in bins}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_beside_torch(dtype, device):
    """The deciding rule: no farther than torch is (conftest.close) from the same 50 steps in
    float64 that round p, m and v to the dtype wherever both optimizers store them."""
    options = dict(lr=1e-2, weight_decay=0.1)
    params = parameters(dtype, [(300, 401), (1001,)], device)
    torchs = clones(params)
    exact = [(p.detach().double(), *torch.zeros(2, *p.shape, device=device).double())
             for p in params]  # fmt: skip
    ours = ft.AdamW(params, **options)
    theirs = torch.optim.AdamW(torchs, fused=True, **options)
    for t in range(1, 51):
        set_grads(params, torchs)
        for i, p in enumerate(params):
            new = float64_step(exact[i][0], p.grad.double(), *exact[i][1:], t, **options)
            exact[i] = tuple(x.to(dtype).double() for x in new)
        ours.step()
        theirs.step()
    # bf16: a value between two neighbours goes to one or the other for the last bits of float32
    floor = 2.0**-11 if dtype is torch.bfloat16 else 2.0**-22
    for p, q, want in zip(params, torchs, exact, strict=True):
        triples = [("p", p.detach(), q.detach(), want[0], floor)]
        for k, w in zip(("exp_avg", "exp_avg_sq"), want[1:], strict=True):
            # the float32 of beta2 itself is 1.3e-8 off, 50 times over
            triples.append((k, ours.state[p][k], theirs.state[q][k], w, max(floor, 2.0**-19)))
        for name, a, b, w, least in triples:
            distance = ulps(a, b, 0.1)
            shares = histogram(distance)
            shown = ", ".join(f"{n}: {share:.5f}" for n, share in shares.items())
            print(f"{device} {dtype} {name} {tuple(p.shape)}: ulps from torch: {shown}")
            if device == "cuda" or dtype is torch.bfloat16 or FUSED:
                assert shares["0"] >= 0.98 and distance.max() <= 16
            check(name, a, w, b, floor=least)


@pytest.mark.parametrize("device", DEVICES)
def test_over_to_torch_and_back(device):
    """flatout -> torch -> flatout without a step in torch: not a bit of the run changes."""
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype, device=device)
        others, plain = clones(params), ft.AdamW(params, lr=1e-2)
        for _ in range(3):
            set_grads(params)
            plain.step()
        between = torch.optim.AdamW(others, lr=1.0, fused=True)
        between.load_state_dict(copy.deepcopy(plain.state_dict()))
        back = ft.AdamW(others, lr=2.0)
        back.load_state_dict(copy.deepcopy(between.state_dict()))
        with torch.no_grad():
            for p, q in zip(params, others, strict=True):
                q.copy_(p)
        for _ in range(3):
            set_grads(params, others)
            plain.step()
            back.step()
        assert same(params, others) and same(states(plain, params), states(back, others))
        assert states(back, others)[0].device == params[0].device


# ---- Lists ---------------------------------------------------------------------------------------


def long_lists(device, dtype, state):
    """1,300 tensors of p, g, m, v: most are small, some empty, some off a vector's boundary, two
    span several chunks of the kernel."""
    sizes = [n % 23 for n in range(1298)] + [65536 * 2 + 1, 70_000]
    torch.manual_seed(4)
    for kind in (dtype, dtype, state, state):
        pools = [torch.rand(n + i % 3, device=device).to(kind) for i, n in enumerate(sizes)]
        yield [pool[i % 3 :] for i, pool in enumerate(pools)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("state", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_long_list_is_as_one_tensor(dtype, state, device):
    for stochastic in (False, True):
        options = dict(lr=1e-2, stochastic_rounding=stochastic, seed=5)
        lists = list(long_lists(device, dtype, state))
        whole = [[torch.cat(x)] for x in lists]
        before = whole[0][0].clone()
        ft.adamw_step(*lists, 3, **options)
        ft.adamw_step(*whole, 3, **options)
        assert all(torch.equal(torch.cat(a), b[0]) for a, b in zip(lists, whole, strict=True))
        assert (before != whole[0][0]).double().mean() > 0.2
        norm, want = ft.global_norm(lists[1]), whole[1][0].double().norm()
        assert abs(norm.item() / want.item() - 1) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_steps_of_their_own(device):
    """Every tensor of a list has its own count of steps."""
    params, grads, exp_avgs, exp_avg_sqs = ([torch.rand(9, device=device) for _ in range(600)]
                                            for _ in range(4))  # fmt: skip
    alone = [[t.clone() for t in x] for x in (params, grads, exp_avgs, exp_avg_sqs)]
    steps = [torch.full((), float(1 + n % 7), device=device) for n in range(600)]
    ft.adamw_step(params, grads, exp_avgs, exp_avg_sqs, steps)
    for count in range(1, 8):
        part = [[x[n] for n in range(count - 1, 600, 7)] for x in alone]
        ft.adamw_step(*part, count)
    assert same(params, alone[0]) and not torch.equal(params[0], params[1])


@pytest.mark.parametrize("device", DEVICES)
def test_lists_of_nothing(device):
    empty = [torch.zeros(0, 3, device=device) for _ in range(3)]
    ft.adamw_step([], [], [], [], 1)
    ft.adamw_step(empty, empty, empty, empty, 1)
    assert ft.global_norm(empty) == 0 and ft.clip_grad_norm_(empty, 1.0) == 0
    p = torch.nn.Parameter(torch.zeros(0, 3, device=device))
    p.grad = torch.zeros_like(p)
    optimizer = ft.AdamW([p], max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1 and optimizer.grad_norm == 0


# ---- CUDA graphs, scalars on the device ----------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_scalars_on_the_device(device):
    """lr, coef, grad_scale and found_inf as tensors are as the numbers folded in by hand."""

    def scalar(x):
        return torch.full((), x, device=device)

    lists = [[torch.rand(1000, device=device)] for _ in range(4)]
    want = [[t.clone() for t in x] for x in lists]
    untouched = [x[0].clone() for x in lists]
    on_device = dict(coef=scalar(0.5), grad_scale=scalar(4.0), lr=scalar(0.25))
    ft.adamw_step(*lists, 2, found_inf=scalar(1.0), **on_device)
    assert same([x[0] for x in lists], untouched)
    ft.adamw_step(*lists, 2, found_inf=scalar(0.0), **on_device)
    want[1][0].mul_(0.125)
    ft.adamw_step(*want, 2, lr=0.25)
    assert same([x[0] for x in lists[2:]], [x[0] for x in want[2:]])
    assert same(lists[0], want[0]) and not torch.equal(lists[0][0], untouched[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stochastic", [False, True])
def test_a_step_in_a_cuda_graph(stochastic, dtype):
    """Clipping, counting and update in one graph: replays go on with new gradients and a new lr."""
    params = parameters(dtype, [(70, 33), (513,), (0, 4)] + [(n,) for n in range(600)], "cuda")
    others = clones(params)
    lr = torch.full((), 1e-2, device="cuda")
    make = dict(max_grad_norm=1.0, stochastic_rounding=stochastic)
    ours, plain = ft.AdamW(params, lr=lr, **make), ft.AdamW(others, lr=lr.clone(), **make)
    set_grads(params, others)
    graph, _ = captured(ours.step)
    for _ in range(2):  # as often as captured() ran it
        plain.step()
    for k in range(4):
        lr.fill_(1e-2 / (k + 1))
        plain.param_groups[0]["lr"].fill_(1e-2 / (k + 1))
        for p, q in zip(params, others, strict=True):
            p.grad.normal_()
            q.grad.copy_(p.grad)
        noise("cuda")
        graph.replay()
        plain.step()
        assert torch.equal(ours.grad_norm, plain.grad_norm)
        assert same(params, others) and same(states(ours, params), states(plain, others))
    assert ours.state[params[0]]["step"] == 6
