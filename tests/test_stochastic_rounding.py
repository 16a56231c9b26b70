"""Stochastic rounding, and that threads and restarts change no bit of a run."""

import copy

import pytest
import torch
from test_adamw import parameters, same, set_grads, states

import flatout.torch as ft


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
