"""flatout on NumPy arrays (fp32, fp64, fp16, ml_dtypes.bfloat16), forward and backward.

Arrays have any strides; one whose last dimension is not contiguous is copied first. Any other
DLPack array is read too, but needs `out=` of its own kind (and, on CUDA, `stream=`: the stream's
handle as an int). `X_bwd` recomputes what it needs. Wrong arguments raise ArgumentTypeError (a
TypeError) or ArgumentValueError (a ValueError) that names the argument, before anything is
written.
"""

import numpy as np

from . import _C

__all__ = [
    "global_norm",
    "clip_grad_norm_",
    "adamw_step",
    "rms_norm",
    "rms_norm_bwd",
    "add_rms_norm",
    "add_rms_norm_bwd",
    "swiglu",
    "swiglu_bwd",
    "rope",
    "rope_bwd",
    "qk_norm_rope",
    "qk_norm_rope_bwd",
    "embedding",
    "embedding_bwd",
]

PARTIALS = 64  # partial sums of a weight's gradient; their number fixes the order of the sum


def _rows(x):
    """x, or a copy of it where its last dimension is not contiguous."""
    if type(x) is np.ndarray and not x.flags.c_contiguous and x.ndim:
        if x.strides[-1] != x.itemsize:
            return np.ascontiguousarray(x)
    return x


def _empty_like(x):
    if not isinstance(x, np.ndarray):
        raise _C.ArgumentTypeError(f"expected a NumPy array, or out=; got {type(x)!r}")
    return np.empty(x.shape, x.dtype)


def _stat(x):
    """The dtype of statistics beside x: float32, and float64 for float64."""
    return np.float64 if x.dtype == np.float64 else np.float32


def _row_stat(x):
    return np.empty(x.size // x.shape[-1] if x.size else 0, _stat(x))


def rms_norm(x, weight, eps=1e-6, *, offset=0.0, out=None, stream=0):
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019).

    y = weight * round(x / sqrt(mean(x^2) + eps)), rounded to x's dtype before the weight, as
    Llama and Qwen do; with offset != 0 (Gemma) y = (offset + weight) * x / sqrt(...), one rounding.
    x (..., H), weight (H,) of any float dtype; returns (..., H) of x's dtype.
    """
    if out is None:
        out = _empty_like(x)
    _C.rms_norm_fwd(out, None, _rows(x), _rows(weight), eps, offset, stream)
    return out


def rms_norm_bwd(dy, x, weight, eps=1e-6, *, offset=0.0):
    """Gradients of rms_norm: dy, x (..., H), weight (H,) -> dx (..., H), dweight (H,)."""
    x, weight = _rows(x), _rows(weight)
    dx, dw, rstd = _empty_like(x), _empty_like(weight), _row_stat(x)
    _C.rms_norm_fwd(dx, rstd, x, weight, eps, offset)
    partial = np.empty((PARTIALS, x.shape[-1]), rstd.dtype)
    _C.rms_norm_bwd(dx, dw, partial, _rows(dy), x, weight, rstd, offset)
    return dx, dw


def add_rms_norm(x, residual, weight, eps=1e-6, *, offset=0.0, out=None, stream=0):
    """(y, s): s = x + residual rounded to x's dtype, y = rms_norm(s). All (..., H).

    out: a pair of arrays (y, s)."""
    y, s = (_empty_like(x), _empty_like(x)) if out is None else out
    _C.add_rms_norm_fwd(y, s, None, _rows(x), _rows(residual), _rows(weight), eps, offset, stream)
    return y, s


def add_rms_norm_bwd(dy, ds, x, residual, weight, eps=1e-6, *, offset=0.0):
    """Gradients of add_rms_norm for dy and ds (ds None: s is not used further).

    Returns dx, which is dresidual too, (..., H), and dweight (H,)."""
    x, residual, weight = _rows(x), _rows(residual), _rows(weight)
    dx, s, dw, rstd = _empty_like(x), _empty_like(x), _empty_like(weight), _row_stat(x)
    _C.add_rms_norm_fwd(dx, s, rstd, x, residual, weight, eps, offset)
    partial = np.empty((PARTIALS, x.shape[-1]), rstd.dtype)
    ds = None if ds is None else _rows(ds)
    _C.add_rms_norm_bwd(dx, dw, partial, _rows(dy), ds, s, weight, rstd, offset)
    return dx, dw


def _halves(x, function):
    """The views [gate | up] of a packed array."""
    shape = getattr(x, "shape", None)
    if shape is None:
        raise _C.ArgumentTypeError(f"{function}: gate: expected an array, got {type(x)!r}")
    if not shape or shape[-1] % 2:
        raise _C.ArgumentValueError(
            f"{function}: gate: expected [gate | up] in an even last dimension, got {shape}"
        )
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def swiglu(gate, up=None, *, out=None, stream=0):
    """silu(gate) * up (Shazeer, 2020), silu(z) = z / (1 + exp(-z)) rounded to gate's dtype first.

    gate, up (..., I) of one dtype; up=None: gate holds [gate | up] in its last dimension (..., 2I).
    Returns (..., I).
    """
    gate, up = _halves(_rows(gate), "swiglu") if up is None else (_rows(gate), _rows(up))
    out = _empty_like(gate) if out is None else out
    _C.swiglu_fwd(out, gate, up, stream)
    return out


def swiglu_bwd(dy, gate, up=None):
    """Gradients of swiglu: dgate, dup (..., I), or with up=None [dgate | dup] (..., 2I)."""
    if up is None:
        packed = _rows(gate)
        dx = _empty_like(packed)
        halves, gradients = _halves(packed, "swiglu_bwd"), _halves(dx, "swiglu_bwd")
        _C.swiglu_bwd(*gradients, _rows(dy), *halves)
        return dx
    dgate, dup = _empty_like(gate), _empty_like(up)
    _C.swiglu_bwd(dgate, dup, _rows(dy), _rows(gate), _rows(up))
    return dgate, dup


def _pair(q, k, inplace, out):
    """Where a rotation of q and k (which may be None) is written."""
    if inplace and out is not None:
        raise _C.ArgumentValueError("rope: out: expected None with inplace=True")
    if inplace:
        return q, k
    return (_empty_like(q), None if k is None else _empty_like(k)) if out is None else out


def _rows_of(*arrays):
    return [None if x is None else _rows(x) for x in arrays]


def rope(q, k, cos, sin, *, inplace=False, out=None, stream=0):
    """HF's rotate-half rotation (Su et al., 2021): x * cos + rotate_half(x) * sin, one rounding.

    q (B, S, Hq, D), k (B, S, Hk, D) or None, with cos, sin (S, D), (1, S, D) or (B, S, D); or
    packed q (T, Hq, D), k (T, Hk, D) with cos, sin (T, D). D is even; cos and sin hold both halves
    and may be of another float dtype. out: a pair of arrays; inplace=True overwrites q and k, which
    need a contiguous last dimension. Returns (q_out, k_out).
    """
    q_out, k_out = _pair(q, k, inplace, out)
    q, k = (q, k) if inplace else _rows_of(q, k)
    _C.rope_fwd(q_out, k_out, q, k, _rows(cos), _rows(sin), stream)
    return q_out, k_out


def rope_bwd(dq_out, dk_out, q, k, cos, sin):
    """Gradients of rope: dq like q, dk like k (None where k is None). The rotation is linear: q and
    k are not read, and stand here as every forward argument does."""
    dq, dk = _empty_like(dq_out), None if dk_out is None else _empty_like(dk_out)
    _C.rope_bwd(dq, dk, *_rows_of(dq_out, dk_out, cos, sin))
    return dq, dk


def qk_norm_rope(
    q, k, q_weight, k_weight, cos, sin, eps=1e-6, *, inplace=False, out=None, stream=0
):
    """Qwen3's attention inputs: rope of rms_norm(q, q_weight) and of rms_norm(k, k_weight).

    The norms are over each head, with rms_norm's roundings; shapes, out and inplace as in rope,
    q_weight and k_weight (D,). Returns (q_out, k_out).
    """
    q_out, k_out = _pair(q, k, inplace, out)
    q, k = (q, k) if inplace else _rows_of(q, k)
    rest = _rows_of(q_weight, k_weight, cos, sin)
    _C.qk_norm_rope_fwd(q_out, k_out, None, None, q, k, *rest, eps, stream)
    return q_out, k_out


def qk_norm_rope_bwd(dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, eps=1e-6):
    """Gradients of qk_norm_rope: dq, dk, dq_weight, dk_weight."""
    inputs = q, k, q_weight, k_weight = _rows_of(q, k, q_weight, k_weight)
    gradients = dq, dk, *_ = [_empty_like(x) for x in inputs]
    rstd = [np.empty(x.shape[:-1], _stat(x)) for x in (q, k)]
    tables = _rows_of(cos, sin)
    _C.qk_norm_rope_fwd(dq, dk, *rstd, *inputs, *tables, eps)
    partials = [np.empty((PARTIALS, x.shape[-1]), _stat(x)) for x in (q, k)]
    _C.qk_norm_rope_bwd(*gradients, *partials, *_rows_of(dq_out, dk_out), *inputs, *rstd, *tables)
    return tuple(gradients)


def embedding(ids, weight, *, out=None, stream=0):
    """weight[ids]: ids (...) int32 or int64, weight (V, H); returns (..., H).

    An id outside 0 .. V - 1 raises IndexError. out: of shape (N, H) for N ids in one dimension.
    """
    if out is not None:
        _C.embedding_fwd(out, ids, _rows(weight), stream)
        return out
    ids, weight = np.asarray(ids), _rows(weight)
    y = np.empty((ids.size, *weight.shape[1:]), weight.dtype)
    _C.embedding_fwd(y, ids.reshape(-1), weight)
    return y.reshape(*ids.shape, *weight.shape[1:])


def embedding_bwd(dy, ids, weight):
    """Gradient of embedding, dense: dweight like weight. The terms of a row are summed in float32,
    in the order of ids, and rounded once."""
    dw, ids = np.zeros(weight.shape, weight.dtype), np.asarray(ids).reshape(-1)
    order = np.argsort(ids, kind="stable").astype(np.int64, copy=False)
    _C.embedding_bwd(dw, _rows(dy.reshape(ids.size, *weight.shape[1:])), ids, order)
    return dw


def _norm_and_coef(arrays, max_norm):
    dtype = np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32
    norm, coef, partial = np.empty(1, dtype), np.empty(1, dtype), np.empty(1024, dtype)
    _C.global_norm(norm, coef, partial, arrays, max_norm)
    return norm[0], coef


def global_norm(arrays):
    """sqrt of the sum of squares over all arrays, as float32 (float64 where one of them is)."""
    return _norm_and_coef([np.ascontiguousarray(a) for a in arrays], 0.0)[0]


def clip_grad_norm_(grads, max_norm):
    """Scale the gradient arrays (contiguous) in place by min(1, max_norm / (norm + 1e-6)); returns
    the norm over all of them."""
    grads = list(grads)
    norm, coef = _norm_and_coef(grads, max_norm)
    _C.scale(grads, coef)
    return norm


def adamw_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    step,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    maximize=False,
    stochastic_rounding=False,
    seed=0,
    max_grad_norm=None,
):
    """One AdamW step (Loshchilov and Hutter, 2019) over lists of contiguous arrays, in place.

    params and grads of one dtype, exp_avgs and exp_avg_sqs of one dtype (zeros before step 1),
    equal shapes item by item; step: the number of this step, from 1. max_grad_norm: the update
    sees gradients scaled by min(1, max_grad_norm / (norm + 1e-6)), which are not written; the
    norm is returned, else None. stochastic_rounding: of bfloat16 params and states, a function of
    seed, step and place in the lists alone.
    """
    params, grads = list(params), list(grads)
    if lr < 0:
        raise _C.ArgumentValueError(f"adamw_step: lr: expected a number >= 0, got {lr}")
    norm = coef = None
    if max_grad_norm is not None:
        norm, coef = _norm_and_coef(grads, max_grad_norm)
    steps = [np.full(1, step, np.float32)] * len(params)
    _C.adamw_step(
        params, grads, list(exp_avgs), list(exp_avg_sqs), steps, coef, None, None, None, lr,
        *betas, eps, weight_decay, bool(maximize), bool(stochastic_rounding), seed,
    )  # fmt: skip
    return norm
