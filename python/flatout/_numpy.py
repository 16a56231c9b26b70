"""flatout on NumPy arrays (fp32, fp64, fp16, ml_dtypes.bfloat16), forward and backward.

Arrays have any strides; one whose last dimension is not contiguous is copied first. rms_norm,
add_rms_norm, swiglu, rope, qk_norm_rope, embedding and attention take `out=`, and with it any other
DLPack array of out's kind (on CUDA with `stream=`: the stream's handle as an int); the other
functions take NumPy arrays alone. `X_bwd` recomputes what it needs. Wrong arguments raise
ArgumentTypeError (a TypeError) or ArgumentValueError (a ValueError) that names the argument,
before anything is written.
"""

import inspect

import numpy as np

from . import _C

__all__ = [
    "global_norm",
    "clip_grad_norm_",
    "adamw_step",
    "attention",
    "attention_bwd",
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
    "cross_entropy",
    "cross_entropy_bwd",
    "linear_cross_entropy",
    "linear_cross_entropy_bwd",
]

PARTIALS = 64  # partial sums of a weight's gradient; their number fixes the order of the sum


def _rows(x):
    """x, or a copy of it where its last dimension is not contiguous."""
    if type(x) is np.ndarray and not x.flags.c_contiguous and x.ndim:
        if x.strides[-1] != x.itemsize:
            return np.ascontiguousarray(x)
    return x


def _arrays(function, least=1, **arrays):
    """Refuse what is no NumPy array of at least `least` dimensions, by its name."""
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise _C.ArgumentTypeError(
                f"{function}: {name}: expected a NumPy array, got {type(x)!r}"
            )
        if x.ndim < least:
            raise _C.ArgumentValueError(
                f"{function}: {name}: expected at least {least} dimensions, got {x.ndim}"
            )


def _list(function, name, arrays):
    try:
        return list(arrays)
    except TypeError:
        raise _C.ArgumentTypeError(
            f"{function}: {name}: expected a sequence of arrays, got {type(arrays)!r}"
        ) from None


def two(values, function, name):
    """The two items of an argument that is a pair."""
    try:
        first, second = values
    except (TypeError, ValueError):
        raise _C.ArgumentTypeError(f"{function}: {name}: expected a pair, got {values!r}") from None
    return first, second


def _out_pair(out, function):
    if type(out) is tuple and len(out) == 2:
        return out
    if not isinstance(out, (tuple, list)) or len(out) != 2:
        raise _C.ArgumentTypeError(f"{function}: out: expected a pair of arrays, got {type(out)!r}")
    return tuple(out)


def _empty_like(x, function=None, name=None):
    if not isinstance(x, np.ndarray):
        raise _C.ArgumentTypeError(
            f"{function}: {name}: expected a NumPy array, or out=; got {type(x)!r}"
        )
    return np.empty(x.shape, x.dtype)


def _stat(x):
    """The dtype of statistics beside x: float32, and float64 for float64."""
    return np.float64 if x.dtype == np.float64 else np.float32


def _row_stat(x):
    return np.empty(x.size // x.shape[-1] if x.size else 0, _stat(x))


def rms_norm(
    x: np.ndarray,
    weight: np.ndarray,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    out=None,
    stream: int = 0,
) -> np.ndarray:
    """RMSNorm over the last dimension (Zhang and Sennrich, 2019).

    y = weight * round(x / sqrt(mean(x^2) + eps)), rounded to x's dtype before the weight, as
    Llama and Qwen do; with offset != 0 (Gemma) y = (offset + weight) * x / sqrt(...), one rounding.
    x (..., H), weight (H,) of any float dtype; returns (..., H) of x's dtype.
    """
    if out is None:
        out = _empty_like(x, "rms_norm", "x")
    _C.rms_norm_fwd(out, None, _rows(x), _rows(weight), eps, offset, stream)
    return out


def rms_norm_bwd(
    dy: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of rms_norm: dy, x (..., H), weight (H,) -> dx (..., H), dweight (H,)."""
    _arrays("rms_norm_bwd", dy=dy, x=x, weight=weight)
    x, weight = _rows(x), _rows(weight)
    dx, dw, rstd = _empty_like(x), _empty_like(weight), _row_stat(x)
    _C.rms_norm_fwd(dx, rstd, x, weight, eps, offset)
    partial = np.empty((PARTIALS, x.shape[-1]), rstd.dtype)
    _C.rms_norm_bwd(dx, dw, partial, _rows(dy), x, weight, rstd, offset)
    return dx, dw


def add_rms_norm(
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    out=None,
    stream: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(y, s): s = x + residual rounded to x's dtype, y = rms_norm(s). All (..., H).

    out: a pair of arrays (y, s)."""
    if out is None:
        y, s = _empty_like(x, "add_rms_norm", "x"), _empty_like(x)
    else:
        y, s = _out_pair(out, "add_rms_norm")
    _C.add_rms_norm_fwd(y, s, None, _rows(x), _rows(residual), _rows(weight), eps, offset, stream)
    return y, s


def add_rms_norm_bwd(
    dy: np.ndarray,
    ds: np.ndarray | None,
    x: np.ndarray,
    residual: np.ndarray,
    weight: np.ndarray,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of add_rms_norm for dy and ds (ds None: s is not used further).

    Returns dx, which is dresidual too, (..., H), and dweight (H,)."""
    _arrays("add_rms_norm_bwd", dy=dy, x=x, residual=residual, weight=weight)
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


def swiglu(
    gate: np.ndarray, up: np.ndarray | None = None, *, out=None, stream: int = 0
) -> np.ndarray:
    """silu(gate) * up (Shazeer, 2020), silu(z) = z / (1 + exp(-z)) rounded to gate's dtype first.

    gate, up (..., I) of one dtype; up=None: gate holds [gate | up] in its last dimension (..., 2I).
    Returns (..., I).
    """
    gate, up = _halves(_rows(gate), "swiglu") if up is None else (_rows(gate), _rows(up))
    out = _empty_like(gate, "swiglu", "gate") if out is None else out
    _C.swiglu_fwd(out, gate, up, stream)
    return out


def swiglu_bwd(
    dy: np.ndarray, gate: np.ndarray, up: np.ndarray | None = None
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Gradients of swiglu: dgate, dup (..., I), or with up=None [dgate | dup] (..., 2I)."""
    if up is None:
        _arrays("swiglu_bwd", dy=dy, gate=gate)
        packed = _rows(gate)
        dx = _empty_like(packed)
        halves, gradients = _halves(packed, "swiglu_bwd"), _halves(dx, "swiglu_bwd")
        _C.swiglu_bwd(*gradients, _rows(dy), *halves)
        return dx
    _arrays("swiglu_bwd", 0, dy=dy, gate=gate, up=up)
    dgate, dup = _empty_like(gate), _empty_like(up)
    _C.swiglu_bwd(dgate, dup, _rows(dy), _rows(gate), _rows(up))
    return dgate, dup


def _pair(q, k, inplace, out, function):
    """Where a rotation of q and k (which may be None) is written."""
    if inplace and out is not None:
        raise _C.ArgumentValueError(f"{function}: out: expected None with inplace=True")
    if inplace:
        return q, k
    if out is not None:
        return _out_pair(out, function)
    return _empty_like(q, function, "q"), None if k is None else _empty_like(k, function, "k")


def _rows_of(*arrays):
    return [None if x is None else _rows(x) for x in arrays]


def rope(
    q: np.ndarray,
    k: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    *,
    inplace: bool = False,
    out=None,
    stream: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """HF's rotate-half rotation (Su et al., 2021): x * cos + rotate_half(x) * sin, one rounding.

    q (B, S, Hq, D), k (B, S, Hk, D) or None, with cos, sin (S, D), (1, S, D) or (B, S, D); or
    packed q (T, Hq, D), k (T, Hk, D) with cos, sin (T, D). D is even; cos and sin hold both halves
    and may be of another float dtype. out: a pair of arrays; inplace=True overwrites q and k, which
    need a contiguous last dimension. Returns (q_out, k_out).
    """
    q_out, k_out = _pair(q, k, inplace, out, "rope")
    q, k = (q, k) if inplace else _rows_of(q, k)
    _C.rope_fwd(q_out, k_out, q, k, _rows(cos), _rows(sin), stream)
    return q_out, k_out


def rope_bwd(
    dq_out: np.ndarray,
    dk_out: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of rope: dq like q, dk like k (None where k is None). The rotation is linear: q and
    k are not read, and stand here as every forward argument does."""
    dq = _empty_like(dq_out, "rope_bwd", "dq_out")
    dk = None if dk_out is None else _empty_like(dk_out, "rope_bwd", "dk_out")
    _C.rope_bwd(dq, dk, *_rows_of(dq_out, dk_out, cos, sin))
    return dq, dk


def qk_norm_rope(
    q: np.ndarray,
    k: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float = 1e-6,
    *,
    inplace: bool = False,
    out=None,
    stream: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Qwen3's attention inputs: rope of rms_norm(q, q_weight) and of rms_norm(k, k_weight).

    The norms are over each head, with rms_norm's roundings; shapes, out and inplace as in rope,
    q_weight and k_weight (D,). Returns (q_out, k_out).
    """
    q_out, k_out = _pair(q, k, inplace, out, "qk_norm_rope")
    q, k = (q, k) if inplace else _rows_of(q, k)
    rest = _rows_of(q_weight, k_weight, cos, sin)
    _C.qk_norm_rope_fwd(q_out, k_out, None, None, q, k, *rest, eps, stream)
    return q_out, k_out


def qk_norm_rope_bwd(
    dq_out: np.ndarray,
    dk_out: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    q_weight: np.ndarray,
    k_weight: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    eps: float = 1e-6,
) -> tuple[np.ndarray, ...]:
    """Gradients of qk_norm_rope: dq, dk, dq_weight, dk_weight."""
    _arrays("qk_norm_rope_bwd", q=q, k=k, q_weight=q_weight, k_weight=k_weight)
    inputs = q, k, q_weight, k_weight = _rows_of(q, k, q_weight, k_weight)
    gradients = dq, dk, *_ = [_empty_like(x) for x in inputs]
    rstd = [np.empty(x.shape[:-1], _stat(x)) for x in (q, k)]
    tables = _rows_of(cos, sin)
    _C.qk_norm_rope_fwd(dq, dk, *rstd, *inputs, *tables, eps)
    partials = [np.empty((PARTIALS, x.shape[-1]), _stat(x)) for x in (q, k)]
    _C.qk_norm_rope_bwd(*gradients, *partials, *_rows_of(dq_out, dk_out), *inputs, *rstd, *tables)
    return tuple(gradients)


def embedding(ids: np.ndarray, weight: np.ndarray, *, out=None, stream: int = 0) -> np.ndarray:
    """weight[ids]: ids (...) int32 or int64, weight (V, H); returns (..., H).

    An id outside 0 .. V - 1 raises IndexError. out: of shape (N, H) for N ids in one dimension.
    """
    if out is not None:
        _C.embedding_fwd(out, ids, _rows(weight), stream)
        return out
    _arrays("embedding", 2, weight=weight)
    ids, weight = np.asarray(ids), _rows(weight)
    y = np.empty((ids.size, *weight.shape[1:]), weight.dtype)
    _C.embedding_fwd(y, ids.reshape(-1), weight)
    return y.reshape(*ids.shape, *weight.shape[1:])


def embedding_bwd(dy: np.ndarray, ids: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Gradient of embedding, dense: dweight like weight. The terms of a row are summed in float32
    (float64 in float64), in the order of ids, and rounded once."""
    _arrays("embedding_bwd", 2, weight=weight)
    _arrays("embedding_bwd", dy=dy)
    shape = (*np.shape(ids), *weight.shape[1:])
    if dy.shape != shape:
        raise _C.ArgumentValueError(f"embedding_bwd: dy: expected shape {shape}, got {dy.shape}")
    dw, ids = np.empty(weight.shape, weight.dtype), np.asarray(ids).reshape(-1)
    order = np.argsort(ids, kind="stable").astype(np.int64, copy=False)
    dy = _rows(dy.reshape(ids.size, *weight.shape[1:]))
    _C.embedding_bwd(dw, np.empty((2, dy.shape[1]), _stat(dy)), None, dy, ids[order], order)
    return dw


REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
CHUNK_BYTES = 16 << 20


def chunk_rows(N, V, itemsize, budget=CHUNK_BYTES):
    """How many rows' logits linear_cross_entropy has at once: a multiple of 128 within the budget
    (but at least 256), spread evenly over the chunks."""
    most = max(256, budget // (V * itemsize or 1) // 128 * 128)
    even = -(-N // max(1, -(-N // most)))
    return max(1, min(N, -(-even // 128) * 128))


_OPTIONS = dict(
    ignore_index=-100, reduction="mean", shift=0, class_weight=None, label_smoothing=0.0,
    z_loss=0.0, softcap=0.0, num_items=None,
)  # fmt: skip


def _takes_options(function):
    """Show _OPTIONS in the signature where the function has **options."""
    signature = inspect.signature(function)
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    known += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v)
              for n, v in _OPTIONS.items()]  # fmt: skip
    function.__signature__ = signature.replace(parameters=known)
    return function


def _scoring(function, x, target, options):
    """What the four functions below share, as _C takes it: x and target flat, class_weight,
    num_items and the scalar options; and how many places of the last dimension are scored."""
    if unknown := options.keys() - _OPTIONS.keys():
        raise _C.ArgumentTypeError(f"{function}: {unknown.pop()}: no such option")
    o = _OPTIONS | options
    _arrays(function, x=x)
    _arrays(function, 0, target=target)
    reduction, shift, class_weight = o["reduction"], o["shift"], o["class_weight"]
    if reduction not in REDUCTIONS:
        raise _C.ArgumentValueError(
            f"{function}: reduction: expected none, mean or sum, got {reduction!r}"
        )
    if target.shape != x.shape[:-1]:
        raise _C.ArgumentValueError(
            f"{function}: target: expected shape {x.shape[:-1]}, got {target.shape}"
        )
    check_shift(function, shift, target)
    num_items = o["num_items"]
    if num_items is not None:
        if reduction == "none":
            raise _C.ArgumentValueError(f"{function}: num_items: expected None with reduction none")
        num_items = np.asarray(num_items, _stat(x)).reshape(1)
    if class_weight is not None:
        class_weight = np.ascontiguousarray(class_weight, _stat(x))
    N, seq = target.size, target.shape[-1] if target.ndim else 1
    scalars = (
        o["ignore_index"], REDUCTIONS[reduction], seq, int(shift), o["label_smoothing"],
        o["z_loss"], o["softcap"],
    )  # fmt: skip
    x = _rows(x).reshape(N, x.shape[-1])
    return x, np.ascontiguousarray(target).reshape(N), (class_weight, num_items), scalars


def check_shift(function, shift, target):
    if not isinstance(shift, (int, np.integer)):
        raise _C.ArgumentTypeError(f"{function}: shift: expected an integer, got {shift!r}")
    if shift < 0 or (shift and not target.ndim):
        raise _C.ArgumentValueError(
            f"{function}: shift: expected 0, or a positive number for a target of at least 1 "
            f"dimension, got {shift}"
        )


def _loss_arrays(x, scalars, accuracy, predicted):
    """loss, losses, lse, accuracy, predicted, for _C."""
    N, stat = len(x), _stat(x)
    return (
        np.empty((), stat) if scalars[1] else None,
        np.empty(N, stat),
        np.empty(N, stat),
        np.empty((), stat) if accuracy else None,
        np.empty(N, np.int64) if predicted else None,
    )


def _loss_results(out, shape, scalars, return_lse):
    loss, losses, lse, accuracy, predicted = out
    reduction, shift = scalars[1], scalars[3]
    places = slice(None, max(0, shape[-1] - shift)) if shift else slice(None)

    def per_token(a):
        a = a.reshape(shape)
        return a[..., places] if shift else a

    results = [loss if reduction else per_token(losses)]
    results += [per_token(lse)] if return_lse else []
    results += [accuracy] if accuracy is not None else []
    results += [per_token(predicted)] if predicted is not None else []
    return tuple(results) if len(results) > 1 else results[0]


def _upstream(argument, grad, shape, stat):
    grad = np.asarray(grad, stat)
    if grad.shape != shape:
        raise _C.ArgumentValueError(f"{argument}: expected shape {shape}, got {grad.shape}")
    return grad


def _upstreams(function, dloss, dlse, target, scalars, stat):
    """Gradients of a loss and of an lse, or None, as _C takes them: those of tokens flat, zeros
    in the last `shift` places."""
    shape, shift = target.shape, scalars[3]
    scored = (*shape[:-1], max(0, shape[-1] - shift)) if shape else ()

    def of_tokens(name, grad):
        every = np.zeros(shape, stat)
        every[tuple(map(slice, scored))] = _upstream(f"{function}: {name}", grad, scored, stat)
        return every.reshape(-1)

    is_scalar = scalars[1] != REDUCTIONS["none"]
    dloss = (
        _upstream(f"{function}: dloss", dloss, (), stat) if is_scalar else of_tokens("dloss", dloss)
    )
    return dloss, None if dlse is None else of_tokens("dlse", dlse)


def _is_wide(function, accum_dtype, x):
    """Whether a 16-bit weight's gradient is summed in float32."""
    if accum_dtype is None:
        return False
    try:
        dtype = np.dtype(accum_dtype)
    except TypeError:
        dtype = None
    if dtype is None or dtype not in (np.float32, x.dtype):
        raise _C.ArgumentValueError(
            f"{function}: accum_dtype: expected None or float32, got {accum_dtype!r}"
        )
    return dtype == np.float32 and x.dtype != _stat(x)


def _linear_scratch(function, x, weight, chunk_size, accum_dtype, need_db):
    """dw_accum, db_accum, logits_chunk, stats, workspace."""
    N, V, stat = len(x), len(weight), _stat(x)
    check_chunk_size(function, chunk_size)
    C = max(1, min(chunk_size, N)) if chunk_size else chunk_rows(N, V, x.itemsize)
    return (
        np.empty(weight.shape, stat) if _is_wide(function, accum_dtype, x) else None,
        np.empty(V, stat) if need_db else None,
        np.empty((C, V), x.dtype),
        np.empty(4, stat),
        None,
    )


def check_chunk_size(function, chunk_size):
    if chunk_size is not None and not isinstance(chunk_size, (int, np.integer)):
        raise _C.ArgumentTypeError(
            f"{function}: chunk_size: expected an integer, got {chunk_size!r}"
        )
    if chunk_size is not None and chunk_size < 1:
        raise _C.ArgumentValueError(
            f"{function}: chunk_size: expected at least 1, got {chunk_size}"
        )


@_takes_options
def cross_entropy(
    logits: np.ndarray,
    target: np.ndarray,
    *,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predicted: bool = False,
    **options,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """Cross-entropy of logits (..., V) for target (...), int32 or int64, computed in float32.

    Options: ignore_index=-100, reduction="mean", shift=0, class_weight=None, label_smoothing=0.0,
    z_loss=0.0, softcap=0.0, num_items=None, as flatout.torch.linear_cross_entropy explains them.
    Returns the loss, () or for reduction "none" (...); then lse (...), accuracy (), predicted
    (...) as asked for. A label out of range: IndexError.
    """
    x, labels, weights, scalars = _scoring("cross_entropy", logits, target, options)
    out = _loss_arrays(x, scalars, return_accuracy, return_predicted)
    _C.cross_entropy_fwd(*out, None, np.empty(4, _stat(x)), x, labels, *weights, *scalars)
    return _loss_results(out, target.shape, scalars, return_lse)


@_takes_options
def cross_entropy_bwd(
    dloss, logits: np.ndarray, target: np.ndarray, *, dlse: np.ndarray | None = None, **options
) -> np.ndarray:
    """Gradient of cross_entropy, (..., V): dloss is () or, for reduction "none", (...); dlse
    (...) is lse's own gradient."""
    function = "cross_entropy_bwd"
    x, labels, weights, scalars = _scoring(function, logits, target, options)
    dloss, dlse = _upstreams(function, dloss, dlse, target, scalars, _stat(x))
    loss, losses, lse, *_ = out = _loss_arrays(x, scalars, False, False)
    stats, dlogits = np.empty(4, _stat(x)), np.empty(x.shape, x.dtype)
    _C.cross_entropy_fwd(*out, None, stats, x, labels, *weights, *scalars)
    _C.cross_entropy_bwd(dlogits, stats, dloss, dlse, x, labels, *weights, lse, None, *scalars)
    return dlogits.reshape(logits.shape)


@_takes_options
def linear_cross_entropy(
    x: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    chunk_size: int | None = None,
    accum_dtype=None,
    return_lse: bool = False,
    return_accuracy: bool = False,
    return_predicted: bool = False,
    **options,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """cross_entropy of the logits x @ weight.T + bias in x's dtype, chunk_size rows at a time.

    x (..., H), weight (V, H) of x's dtype, target (...), bias (V,); options and results are
    cross_entropy's; accum_dtype is linear_cross_entropy_bwd's and changes no loss.
    """
    x, labels, weights, scalars = _scoring("linear_cross_entropy", x, target, options)
    out = _loss_arrays(x, scalars, return_accuracy, return_predicted)
    function = "linear_cross_entropy"
    _arrays(function, 2, weight=weight)
    weight, bias = _rows(weight), _rows(bias)
    scratch = _linear_scratch(function, x, weight, chunk_size, accum_dtype, False)
    scratch = (None, *scratch[1:])  # no gradient, no sum of it
    _C.linear_cross_entropy_fwd(
        *out, None, None, None, *scratch, x, weight, labels, bias, *weights, *scalars
    )
    return _loss_results(out, target.shape, scalars, return_lse)


@_takes_options
def linear_cross_entropy_bwd(
    dloss,
    x: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    chunk_size: int | None = None,
    accum_dtype=None,
    dlse: np.ndarray | None = None,
    **options,
) -> tuple[np.ndarray, ...]:
    """Gradients of linear_cross_entropy: dx, dweight and, with a bias, dbias.

    accum_dtype: np.float32 sums a 16-bit weight's gradient over the chunks in float32."""
    shape, function = np.shape(x), "linear_cross_entropy_bwd"
    x, labels, weights, scalars = _scoring(function, x, target, options)
    dloss, dlse = _upstreams(function, dloss, dlse, target, scalars, _stat(x))
    loss, losses, lse, *_ = out = _loss_arrays(x, scalars, False, False)
    _arrays(function, 2, weight=weight)
    if bias is not None:
        _arrays(function, bias=bias)
    weight, bias = _rows(weight), _rows(bias)
    scratch = _linear_scratch(function, x, weight, chunk_size, accum_dtype, bias is not None)
    forward = (None, None, *scratch[2:])
    _C.linear_cross_entropy_fwd(
        *out, None, None, None, *forward, x, weight, labels, bias, *weights, *scalars
    )
    grads = np.empty(x.shape, x.dtype), np.empty(weight.shape, weight.dtype)
    db = None if bias is None else np.empty(bias.shape, bias.dtype)
    _C.linear_cross_entropy_bwd(
        *grads, db, *scratch, dloss, dlse, x, weight, labels, bias, *weights, lse, *scalars
    )
    dx, dw = grads[0].reshape(shape), grads[1]
    return (dx, dw) if db is None else (dx, dw, db)


def _norm_and_coef(function, name, arrays, max_norm):
    for a in arrays:
        _arrays(function, 0, **{name: a})
    dtype = np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32
    norm, coef, partial = np.empty(1, dtype), np.empty(1, dtype), np.empty(1024, dtype)
    _C.global_norm(norm, coef, partial, arrays, max_norm)
    return norm[0], coef


def global_norm(arrays) -> np.floating:
    """sqrt of the sum of squares over all arrays, as float32 (float64 where one of them is)."""
    arrays = [np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a
              for a in _list("global_norm", "arrays", arrays)]  # fmt: skip
    return _norm_and_coef("global_norm", "arrays", arrays, 0.0)[0]


def clip_grad_norm_(grads, max_norm: float) -> np.floating:
    """Scale the gradient arrays (contiguous) in place by min(1, max_norm / (norm + 1e-6)); returns
    the norm over all of them."""
    grads = _list("clip_grad_norm_", "grads", grads)
    norm, coef = _norm_and_coef("clip_grad_norm_", "grads", grads, max_norm)
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
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    stochastic_rounding=False,
    seed=0,
    max_grad_norm=None,
) -> np.floating | None:
    """One AdamW step (Loshchilov and Hutter, 2019) over lists of contiguous arrays, in place.

    params and grads of one dtype, exp_avgs and exp_avg_sqs of one dtype (zeros before step 1),
    equal shapes item by item; step: the number of this step, from 1. max_grad_norm: the update
    sees gradients scaled by min(1, max_grad_norm / (norm + 1e-6)), which are not written; the
    norm is returned, else None. stochastic_rounding: of bfloat16 params and states, a function of
    seed, step and place in the lists alone.
    """
    params, grads = _list("adamw_step", "params", params), _list("adamw_step", "grads", grads)
    betas = two(betas, "adamw_step", "betas")
    if lr < 0:
        raise _C.ArgumentValueError(f"adamw_step: lr: expected a number >= 0, got {lr}")
    norm = coef = None
    if max_grad_norm is not None:
        norm, coef = _norm_and_coef("adamw_step", "grads", grads, max_grad_norm)
    steps = [np.full(1, step, np.float32)] * len(params)
    _C.adamw_step(
        params, grads, exp_avgs, exp_avg_sqs, steps, coef, None, None, None, lr,
        *betas, eps, weight_decay, bool(maximize), bool(stochastic_rounding), seed,
    )  # fmt: skip
    return norm


def lse_shape(q):
    """(B, Hq, Sq) for q (B, Sq, Hq, D), (Hq, Tq) for q (Tq, Hq, D)."""
    if len(q.shape) not in (3, 4):
        raise _C.ArgumentValueError(
            f"attention: q: expected (B, S, H, D) or (T, H, D), got {len(q.shape)} dimensions"
        )
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def attention_options(q, causal, scale, window, softcap):
    """(scale, left, right, softcap) as the C ops take them."""
    if len(q.shape) < 3 or q.shape[-1] == 0:
        raise _C.ArgumentValueError(f"attention: q: expected (..., H, D), got {tuple(q.shape)}")
    left, right = two(window, "attention", "window")
    if left < -1 or right < -1:
        raise _C.ArgumentValueError(f"attention: window: expected -1 or more, got {window}")
    return q.shape[-1] ** -0.5 if scale is None else scale, left, 0 if causal else right, softcap


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out=None,
    stream: int = 0,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """softmax(scale * q k^T + mask) v (Vaswani et al., 2017; Dao et al., 2022), or (out, lse).

    q (B, Sq, Hq, D), k, v (B, Sk, Hk, D), Hq a multiple of Hk; packed q (Tq, Hq, D), k, v
    (Tk, Hk, D) with cu_seqlens_q, cu_seqlens_k int32 (sequences + 1,). out like q; lse
    (B, Hq, Sq) or (Hq, Tq), float32 or for float64 float64. Options and masks:
    flatout.torch.attention; deterministic changes nothing here. out: a pair of arrays (out, lse).
    """
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_k or max_seqlen_q
    if out is None:
        _arrays("attention", 3, q=q, k=k, v=v)
    numbers = attention_options(q, causal, scale, window, softcap)
    if out is None:
        o, lse = np.empty(q.shape, q.dtype), np.empty(lse_shape(q), _stat(q))
    else:
        o, lse = _out_pair(out, "attention")
    q, k, v = _rows(q), _rows(k), _rows(v)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0
    _C.attention_fwd(o, lse, None, q, k, v, *lengths, *numbers, stream)
    return (o, lse) if return_lse else o


def attention_bwd(
    dout: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out,
    lse: np.ndarray,
    *,
    dlse: np.ndarray | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients (dq, dk, dv) of attention, from its results out and lse; dout like out, dlse like
    lse or None; the options that attention was given. Always deterministic."""
    _arrays("attention_bwd", 3, dout=dout, q=q, k=k, v=v, out=out)
    if cu_seqlens_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_k or max_seqlen_q
    numbers = attention_options(q, causal, scale, window, softcap)
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or 0, max_seqlen_k or 0
    grads = _empty_like(q), _empty_like(k), _empty_like(v)
    tensors = (_rows(x) for x in (q, k, v, out))
    dlse = None if dlse is None else np.ascontiguousarray(dlse)
    lse = np.ascontiguousarray(lse)
    _C.attention_bwd(*grads, None, _rows(dout), dlse, *tensors, lse, *lengths, *numbers, 1)
    return grads
