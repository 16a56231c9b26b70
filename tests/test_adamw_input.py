"""Wrong arguments of the optimizer's entry points: every check of module.c."""

import copy
import random

import numpy as np
import pytest
import torch

from flatout import _C


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
         TypeError, "exp_avgs: expected float64 exactly where params are, got float64"),
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


def test_overlap_among_many():
    """In whatever order of addresses: arrays that touch pass, one shared element does not."""
    buffer = torch.ones(400 * 64)
    rows = list(buffer.view(400, 64))
    random.Random(0).shuffle(rows)
    _C.scale(rows, torch.full((1,), 2.0))
    assert (buffer == 2).all()
    for start in (1, 64 * 200 - 1, 64 * 398 + 1):
        for at in (0, 250, 399):
            shared = rows[:at] + [buffer[start : start + 64]] + rows[at + 1 :]
            with pytest.raises(ValueError, match="an array overlaps one of tensors"):
                _C.scale(shared, torch.full((1,), 2.0))
    assert (buffer == 2).all(), "written before the checks"
