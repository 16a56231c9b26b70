import numpy as np
import pytest
import ref
import torch
from conftest import DEVICES, f64
from test_adamw import FLOATS, clones, parameters, same, set_grads

import flatout.torch as ft


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
        p.grad = torch.as_tensor(g * scale, device=device)
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


@pytest.mark.parametrize("device", DEVICES)
def test_clip_agrees_with_torch(device):
    params = parameters(device=device)
    torchs = clones(params)
    set_grads(params, torchs)
    ours = ft.clip_grad_norm_(params, 2.0)
    theirs = torch.nn.utils.clip_grad_norm_(torchs, 2.0)
    torch.testing.assert_close(ours, theirs)
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("device", DEVICES)
def test_norm_that_is_not_finite(bad, device):
    params, torchs = (parameters(device=device) for _ in range(2))
    set_grads(params, torchs)
    params[0].grad[3, 3] = torchs[0].grad[3, 3] = bad
    with pytest.raises(RuntimeError, match="norm of the gradients is"):
        ft.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    norm, theirs = ft.clip_grad_norm_(params, 1.0), torch.nn.utils.clip_grad_norm_(torchs, 1.0)
    assert torch.equal(norm.isnan(), theirs.isnan()) and torch.equal(norm.isinf(), theirs.isinf())
    for p, q in zip(params, torchs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, equal_nan=True)


@pytest.mark.parametrize("size", [1e-25, 1e-30, 1e25, 1e30])
@pytest.mark.parametrize("device", DEVICES)
def test_norm_beyond_the_range_of_squares(size, device):
    x = torch.randn(100_000, device=device) * size
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
