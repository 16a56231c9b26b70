import pytest
import torch

from flatout import _C

Q, K, T = torch.ones(2, 5, 4, 8), torch.ones(2, 5, 2, 8), torch.ones(5, 8)


def rope_arguments():
    outputs = dict(q_out=torch.full_like(Q, 7), k_out=torch.full_like(K, 7))
    return outputs | dict(q=Q, k=K, cos=T, sin=T)


ROPE_BAD = [
    (dict(q=None), TypeError, "q: expected an array"),
    (dict(q=Q.long()), TypeError, "q: expected a floating dtype"),
    (dict(q=Q.transpose(2, 3)), ValueError, "q: expected a contiguous last dimension"),
    (dict(q=Q[0, 0]), ValueError, r"q: expected \(B, S, H, D\) or \(T, H, D\), got 2 dimensions"),
    (dict(q=Q[None]), ValueError, "q: expected .* got 5 dimensions"),
    (dict(q=Q[..., :7]), ValueError, "q: expected an even head dimension"),
    (dict(k=K[0]), ValueError, "k: expected 4 dimensions, got 3"),
    (dict(k=K.half()), TypeError, "k: expected float32 as q has"),
    (dict(k=K.long()), TypeError, "k: expected a floating dtype"),
    (dict(k=K[..., :6]), ValueError, r"k: expected shape \(2, 5, 2, 8\), got \(2, 5, 2, 6\)"),
    (dict(k=K[:1]), ValueError, r"k: expected shape \(2, 5, 2, 8\), got \(1, 5, 2, 8\)"),
    (dict(k=K[:, :4]), ValueError, r"k: expected shape \(2, 5, 2, 8\), got \(2, 4, 2, 8\)"),
    (dict(k=None), ValueError, "k_out: expected an array exactly where k is one"),
    (dict(k_out=None), ValueError, "k_out: expected an array exactly where k is one"),
    (dict(cos=T.long()), TypeError, "cos: expected a floating dtype"),
    (dict(cos=torch.ones(())), ValueError, "cos: expected at least 1 dimension"),
    (dict(cos=T[0]), ValueError, r"cos: expected shape \(2, 5, 8\), got \(8,\)"),
    (dict(cos=T[:4]), ValueError, r"cos: expected shape \(2, 5, 8\), got \(2, 4, 8\)"),
    (dict(cos=T[:, :4]), ValueError, r"cos: expected shape \(2, 5, 8\), got \(2, 5, 4\)"),
    (dict(cos=torch.ones(3, 5, 8)), ValueError, r"cos: expected shape .* got \(3, 5, 8\)"),
    (dict(cos=torch.ones(8, 5).t()), ValueError, "cos: expected a contiguous last dimension"),
    (dict(cos=T.double()), TypeError, "cos: expected float32, bfloat16 or float16 beside q"),
    (dict(sin=T.long()), TypeError, "sin: expected a floating dtype"),
    (dict(sin=T[:4]), ValueError, r"sin: expected shape \(2, 5, 8\), got \(2, 4, 8\)"),
    (dict(sin=torch.ones(8, 5).t()), ValueError, "sin: expected a contiguous last dimension"),
    (dict(sin=T.double()), TypeError, "sin: expected float32, bfloat16 or float16 beside q"),
    (dict(q_out=Q[:, :4].clone()), ValueError, "q_out: expected shape"),
    (dict(q_out=Q.half()), TypeError, "q_out: expected float32 as q has"),
    (dict(q_out=torch.ones(2, 5, 8, 4).mT), ValueError, "q_out: expected a contiguous"),
    (dict(k_out=K[:, :4].clone()), ValueError, "k_out: expected shape"),
    (dict(k_out=K.half()), TypeError, "k_out: expected float32 as k has"),
    (dict(q_out=Q, q=torch.ones(2, 5, 4, 8), k=Q, k_out=torch.ones(2, 5, 4, 8)), ValueError,
     "q_out: output overlaps k"),
    (dict(q_out=Q, q=Q, k=Q.clone(), k_out=Q), ValueError, "output overlaps"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, error, message", ROPE_BAD)
def test_bad_rope_input(wrong, error, message):
    good = rope_arguments()
    with pytest.raises(error, match=message):
        _C.rope_fwd(*(good | wrong).values())
    assert all((good[n] == 7).all() for n in ("q_out", "k_out")), "written before the checks"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(dk=None), "dk: expected an array exactly where dk_out is one"),
        (dict(dq=Q[:1].clone()), "dq: expected shape"),
        (dict(dk=K[:1].clone()), "dk: expected shape"),
        (dict(dk_out=K[..., :6]), "dk_out: expected shape"),
        (dict(dq_out=Q[0, 0]), "dq_out: expected .* got 2 dimensions"),
        (dict(cos=T[:4]), "cos: expected shape"),
    ],
)
def test_bad_rope_backward_input(wrong, message):
    order = "dq", "dk", "dq_out", "dk_out", "cos", "sin"
    names = dict(zip(order, rope_arguments().values(), strict=True))
    with pytest.raises(ValueError, match=message):
        _C.rope_bwd(*(names | wrong).values())
    assert (names["dq"] == 7).all() and (names["dk"] == 7).all()


def norm_arguments():
    a = rope_arguments()
    weights = dict(q_weight=torch.ones(8), k_weight=torch.ones(8))
    rstd = dict(q_rstd=torch.ones(2, 5, 4), k_rstd=torch.ones(2, 5, 2))
    first = dict(q_out=a["q_out"], k_out=a["k_out"], **rstd, q=Q, k=K)
    return first | weights | dict(cos=T, sin=T, eps=1e-6)


NORM_BAD = [
    (dict(k=None), TypeError, "k: expected an array"),
    (dict(q=Q[..., :7]), ValueError, "q: expected an even head dimension"),
    (dict(q=Q[..., :0], k=K[..., :0], cos=T[:, :0], sin=T[:, :0], q_out=Q[..., :0].clone(),
          k_out=K[..., :0].clone()), ValueError, "q: expected a head dimension of at least 2"),
    (dict(q_out=Q[:1].clone()), ValueError, "q_out: expected shape"),
    (dict(k_out=K[:1].clone()), ValueError, "k_out: expected shape"),
    (dict(q_weight=torch.ones(7)), ValueError, r"q_weight: expected shape \(8,\), got \(7,\)"),
    (dict(k_weight=torch.ones(7)), ValueError, r"k_weight: expected shape \(8,\), got \(7,\)"),
    (dict(q_weight=torch.ones(8).long()), TypeError, "q_weight: expected a floating dtype"),
    (dict(q_weight=torch.ones(16)[::2]), ValueError, "q_weight: expected a contiguous last dim"),
    (dict(k_weight=torch.ones(8).double()), TypeError, "k_weight: expected .* beside k of float32"),
    (dict(q_rstd=torch.ones(2, 5, 4).double()), TypeError, "q_rstd: expected float32"),
    (dict(q_rstd=torch.ones(2, 5, 2)), ValueError, r"q_rstd: expected shape \(2, 5, 4\)"),
    (dict(k_rstd=torch.ones(2, 2, 5).transpose(1, 2)), ValueError, "k_rstd: expected a contiguous"),
    (dict(eps=-1.0), ValueError, "eps: expected a finite number"),
    (dict(eps=float("inf")), ValueError, "eps: expected a finite number"),
    (dict(eps="1"), TypeError, "eps: expected a real number"),
    (dict(q_out=Q, q=torch.ones(2, 5, 4, 8), k=Q, k_out=torch.ones(2, 5, 4, 8)), ValueError,
     "q_out: output overlaps k"),
]  # fmt: skip


@pytest.mark.parametrize("wrong, error, message", NORM_BAD)
def test_bad_norm_input(wrong, error, message):
    good = norm_arguments()
    with pytest.raises(error, match=message):
        _C.qk_norm_rope_fwd(*(good | wrong).values())
    assert all((good[n] == 7).all() for n in ("q_out", "k_out")), "written before the checks"


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(dq_weight=None), "dq_partial: expected an array exactly where dq_weight is one"),
        (dict(dk_partial=None), "dk_partial: expected an array .* dk_weight is one, got None"),
        (dict(dq_partial=torch.ones(4, 7)), r"dq_partial: expected shape \(4, 8\)"),
        (dict(dk_partial=torch.ones(0, 8)), "dk_partial: expected at least 1 row, got 0"),
        (dict(dq_weight=torch.ones(7)), r"dq_weight: expected shape \(8,\), got \(7,\)"),
        (dict(dq=Q[:1].clone()), "dq: expected shape"),
        (dict(dk=K[:1].clone()), "dk: expected shape"),
        (dict(dq_out=Q[:1]), "dq_out: expected shape"),
        (dict(dk_out=K[:1]), "dk_out: expected shape"),
        (dict(k_rstd=torch.ones(2, 5, 4)), r"k_rstd: expected shape \(2, 5, 2\)"),
        (dict(k_weight=torch.ones(7)), "k_weight: expected shape"),
        (dict(q=Q[0, 0]), "q: expected .* got 2 dimensions"),
    ],
)
def test_bad_norm_backward_input(wrong, message):
    good = dict(dq=torch.full_like(Q, 7), dk=torch.full_like(K, 7))
    good |= dict(dq_weight=torch.ones(8), dk_weight=torch.ones(8))
    good |= dict(dq_partial=torch.ones(4, 8), dk_partial=torch.ones(4, 8))
    good |= dict(dq_out=torch.ones_like(Q), dk_out=torch.ones_like(K), q=Q, k=K)
    good |= dict(q_weight=torch.ones(8), k_weight=torch.ones(8))
    good |= dict(q_rstd=torch.ones(2, 5, 4), k_rstd=torch.ones(2, 5, 2), cos=T, sin=T)
    with pytest.raises(ValueError, match=message):
        _C.qk_norm_rope_bwd(*(good | wrong).values())
    assert (good["dq"] == 7).all() and (good["dk"] == 7).all()
