"""Stochastic rounding, and that threads and restarts change no bit of a run."""

import copy

import numpy as np
import pytest
import ref
import torch
from conftest import DEVICES
from test_adamw import parameters, same, set_grads, states

import flatout.torch as ft


def train(stochastic_rounding, dtype, resume=False, device="cpu"):
    torch.manual_seed(5)
    params = parameters(dtype, [(123, 457), (0,), (90_000,)], device)
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


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_survives_a_restart(device):
    want = train(True, torch.bfloat16, device=device)
    assert same(train(True, torch.bfloat16, resume=True, device=device), want)
    assert not same(train(False, torch.bfloat16, device=device), want)


def round_stochastically(x, seed=0, step=3, count=1 << 18, of="p", device="cpu"):
    """`count` draws of SR(x), by a step whose exact result is x in float32."""
    one = torch.ones(count, dtype=torch.bfloat16, device=device)
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
@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_has_no_bias(share, of, device):
    """x lies `share` of the way between two neighbours in bf16: the mean is x to 5 sigma."""
    low, high = 1 - 2.0**-8, 1.0
    x = low + share * (high - low)
    draws = round_stochastically(x, of=of, device=device).double()
    assert set(draws.tolist()) == {low, high}
    sigma = (high - low) * (share * (1 - share) / draws.numel()) ** 0.5
    assert abs(draws.mean().item() - x) < 5 * sigma
    up = (draws == high).double() - share  # neighbours, and elements 256 apart, are independent
    for lag in (1, 2, 16, 256, 65536):
        correlation = (up[lag:] * up[:-lag]).mean() / (share * (1 - share))
        assert abs(correlation) < 5 / draws.numel() ** 0.5, lag


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_of_seeds_and_steps(device):
    x = 1 - 2.0**-9
    base = round_stochastically(x, device=device)
    assert torch.equal(base, round_stochastically(x, device=device))
    for other in (dict(seed=1), dict(step=4), dict(of="v"), dict(of="m"), dict(seed=-7)):
        agree = (round_stochastically(x, **other, device=device) == base).double().mean()
        assert abs(agree - 0.5) < 0.01, other


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_of_exact_values(device):
    """Every bf16 number, NaN and infinity included, is its own rounding."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    p = bits.to(device).view(torch.bfloat16).clone()
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


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_depends_on_the_place_in_the_list_alone(device):
    x = torch.randn(5000, device=device).bfloat16()
    whole, parts = x.clone(), [t.clone() for t in x.split([1, 1999, 0, 3000])]
    for params in ([whole], parts):
        zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        grads = [torch.ones_like(p) for p in params]
        ft.adamw_step(params, grads, *zeros, 2, lr=1e-3, stochastic_rounding=True, seed=9)
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("device", DEVICES)
def test_stochastic_rounding_lets_small_updates_through(device):
    """200 steps of 1e-5 on weights of 1: lost to the nearest bf16, kept on average at random."""
    moved = {}
    for stochastic in (False, True):
        p = torch.nn.Parameter(torch.ones(4096, device=device).bfloat16())
        optimizer = ft.AdamW([p], lr=1e-5, weight_decay=0, stochastic_rounding=stochastic)
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[stochastic] = 1 - p.double().mean().item()
    assert moved[False] == 0 and abs(moved[True] / 200e-5 - 1) < 0.15


@pytest.mark.parametrize("device", DEVICES)
def test_bits_are_those_of_the_hash(device):
    """p, m and v to the bit from csrc/random.h's formula, and so the same on the CPU and CUDA, in
    one tensor and in a list with empty and unaligned ones. Steps whose results in float32 are exact
    or rounded once: p (1 - lr wd) and beta2 v with m = 0; 0.75 m with lr = 0."""
    n, seed, step = 150_000, -3, 9
    old = [torch.rand(n).bfloat16() + 0.25 for _ in range(3)]
    p, m, v = (t.float().numpy() for t in old)
    noise = ref.stochastic_noise(seed, step, np.arange(n))
    decay, beta2 = np.float32(1 - 0.5 * 0.25), np.float32(0.9)
    of = [ref.stochastic_bfloat16(x, bits) for x, bits in zip((p * decay, m * np.float32(0.75),
          v * beta2), noise, strict=True)]  # fmt: skip
    for sizes in ([n], [1, 65536, 0, 3, 70_001, n - 135_541]):
        for lr, weight_decay, zero in ((0.5, 0.25, 1), (0.0, 0.25, None)):
            lists = [[t.to(device) for t in x.clone().split(sizes)] for x in old]
            for t in lists[zero] if zero is not None else ():
                t.zero_()
            grads = [torch.zeros_like(t) for t in lists[0]]
            ft.adamw_step(lists[0], grads, *lists[1:], step, lr=lr, weight_decay=weight_decay,
                          betas=(0.75, 0.9), seed=seed, stochastic_rounding=True)  # fmt: skip
            got = [torch.cat(x).float().cpu().numpy() for x in lists]
            want = [of[0] if lr else p, of[1] if zero is None else 0 * m, of[2]]
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a, b)
