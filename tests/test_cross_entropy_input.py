"""Wrong arguments of cross-entropy's entry points: every check of module.c."""

import pytest
import torch

from flatout import _C


def arguments(N=4, V=6, **change):
    args = {name: torch.full((N,), 7.0) for name in ("loss", "losses", "lse", "accuracy")}
    args |= dict(predicted=torch.full((N,), 7), lse_low=torch.full((N,), 7.0))
    args |= dict(stats=torch.ones(4), logits=torch.ones(N, V))
    args |= dict(loss=torch.full((), 7.0), accuracy=torch.full((), 7.0))
    args |= dict(target=torch.zeros(N).long(), class_weight=torch.ones(V), num_items=torch.ones(1))
    args |= dict(ignore_index=-100, reduction=1, seq=2, shift=0, label_smoothing=0.0, z_loss=0.0)
    return args | dict(softcap=0.0) | change


def backward_arguments(N=4, V=6, **change):
    args = arguments(N, V)
    out = dict(dlogits=torch.full((N, V), 7.0), stats=args["stats"], dloss=torch.ones(()))
    out |= dict(dlse=None)
    names = ["logits", "target", "class_weight", "num_items", "lse", "lse_low"]
    names += ["ignore_index", "reduction", "seq", "shift", "label_smoothing", "z_loss", "softcap"]
    return out | {name: args[name] for name in names} | change


ONES = torch.ones
BOTH = [
    (dict(logits=ONES(4, 6).int()), TypeError, "logits: expected a floating dtype"),
    (dict(logits=ONES(2, 2, 6)), ValueError, "logits: expected 2 dimensions"),
    (dict(logits=ONES(4, 12)[:, ::2]), ValueError, "logits: expected a contiguous last dimension"),
    (dict(logits=ONES(4, 0), class_weight=None), ValueError, "logits: expected at least 1 class"),
    (dict(target=ONES(4)), TypeError, "target: expected int32 or int64, got float32"),
    (dict(target=torch.zeros(3).long()), ValueError, r"target: expected shape \(4,\)"),
    (dict(target=torch.zeros(8).long()[::2]), ValueError, "target: expected a contiguous"),
    (dict(class_weight=ONES(6).half()), TypeError, "class_weight: expected float32"),
    (dict(class_weight=ONES(5)), ValueError, r"class_weight: expected shape \(6,\)"),
    (dict(num_items=ONES(2)), ValueError, "num_items: expected one element, got 2"),
    (dict(num_items=ONES(1).double()), TypeError, "num_items: expected float32"),
    (dict(stats=ONES(3)), ValueError, r"stats: expected shape \(4,\)"),
    (dict(stats=ONES(4).half()), TypeError, "stats: expected float32"),
    (dict(lse=ONES(3)), ValueError, r"lse: expected shape \(4,\)"),
    (dict(lse=ONES(4).half()), TypeError, "lse: expected float32"),
    (dict(lse_low=ONES(3)), ValueError, r"lse_low: expected shape \(4,\)"),
    (dict(lse_low=ONES(4).half()), TypeError, "lse_low: expected float32"),
    (dict(reduction=3), ValueError, r"reduction: expected 0 \(none\), 1 \(mean\) or 2 \(sum\)"),
    (dict(seq=3), ValueError, "seq: expected the last dimension of target"),
    (dict(label_smoothing=2.0), ValueError, "label_smoothing: expected a number in 0 .. 1"),
    (dict(z_loss=float("nan")), ValueError, "z_loss: expected a finite number"),
    (dict(softcap=-1.0), ValueError, "softcap: expected a finite number"),
]
FORWARD = [
    (dict(losses=ONES(4).double()), TypeError, "losses: expected float32"),
    (dict(losses=ONES(3)), ValueError, r"losses: expected shape \(4,\)"),
    (dict(loss=ONES(2)), ValueError, "loss: expected one element, got 2"),
    (dict(loss=None), ValueError, "loss: expected None exactly for reduction none"),
    (dict(accuracy=ONES(2)), ValueError, "accuracy: expected one element, got 2"),
    (dict(predicted=ONES(4)), TypeError, "predicted: expected int64"),
    (dict(predicted=torch.zeros(3).long()), ValueError, r"predicted: expected shape \(4,\)"),
]
BACKWARD = [
    (dict(dlogits=ONES(4, 5)), ValueError, r"dlogits: expected shape \(4, 6\)"),
    (dict(dlogits=ONES(4, 6).half()), TypeError, "dlogits: expected float32 as logits has"),
    (dict(dloss=ONES(4)), ValueError, "dloss: expected one element, got 4"),
    (dict(reduction=0), ValueError, r"dloss: expected shape \(4,\)"),
    (dict(dlse=ONES(3)), ValueError, r"dlse: expected shape \(4,\)"),
    (dict(dlse=ONES(4).half()), TypeError, "dlse: expected float32"),
]


@pytest.mark.parametrize("wrong, error, message", BOTH + FORWARD)
def test_bad_forward_arguments(wrong, error, message):
    good = arguments()
    with pytest.raises(error, match=message):
        _C.cross_entropy_fwd(*(good | wrong).values())
    assert all((good[name] == 7).all() for name in list(good)[:6]), "written before the checks"
    _C.cross_entropy_fwd(*good.values())


@pytest.mark.parametrize("wrong, error, message", BOTH + BACKWARD)
def test_bad_backward_arguments(wrong, error, message):
    good = backward_arguments()
    with pytest.raises(error, match=message):
        _C.cross_entropy_bwd(*(good | wrong).values())
    assert (good["dlogits"] == 7).all(), "written before the checks"
    _C.cross_entropy_bwd(*good.values())
