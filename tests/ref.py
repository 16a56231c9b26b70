"""Float64 references in NumPy, written from the formulas in csrc/ops.h; no code shared with C."""

import numpy as np


def rms_norm(x, w, eps=1e-6, offset=0.0):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return (offset + w) * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)


def rms_norm_bwd(dy, x, w, eps=1e-6, offset=0.0):
    dy, x, w = (np.asarray(a, np.float64) for a in (dy, x, w))
    rstd = 1 / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps)
    g, xhat = dy * (offset + w), x * rstd
    dx = rstd * (g - xhat * np.mean(g * xhat, -1, keepdims=True))
    dw = np.sum((dy * xhat).reshape(-1, x.shape[-1]), 0)
    return dx, dw


def swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def swiglu_bwd(dy, gate, up):
    s = 1 / (1 + np.exp(-gate))
    return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def rope(x, cos, sin):
    """x (B, S, H, D) or (T, H, D); cos, sin (S, D), (B, S, D) or (T, D)."""
    cos, sin = cos[..., None, :], sin[..., None, :]
    x1, x2 = np.split(x, 2, -1)
    return x * cos + np.concatenate([-x2, x1], -1) * sin


def rope_bwd(dout, cos, sin):
    cos, sin = cos[..., None, :], sin[..., None, :]
    d1, d2 = np.split(dout * sin, 2, -1)
    return dout * cos + np.concatenate([d2, -d1], -1)


def embedding_bwd(dy, ids, vocabulary):
    dw = np.zeros((vocabulary, dy.shape[-1]))
    np.add.at(dw, ids.reshape(-1), dy.reshape(-1, dy.shape[-1]))
    return dw


def global_norm(arrays):
    return np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in arrays))


def clip_coefficient(arrays, max_norm):
    return min(1.0, max_norm / (global_norm(arrays) + 1e-6))


def adamw_step(p, g, m, v, t, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2):
    """New p, m, v after step t (from 1)."""
    p, g, m, v = (np.asarray(a, np.float64) for a in (p, g, m, v))
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
    return p * (1 - lr * weight_decay) - lr * m_hat / (np.sqrt(v_hat) + eps), m, v


def _mix64(x):
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _mix32(x):
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def stochastic_noise(seed, step, index):
    """The 16 random bits that round p, m and v at these places of the list (csrc/random.h)."""
    index = np.asarray(index, np.uint64)
    with np.errstate(over="ignore"):
        a = _mix64(np.uint64(seed % 2**64))
        a = _mix64(_mix64(a ^ np.uint64(step)) ^ index >> np.uint64(32))
        b, low = _mix64(a), np.uint64(0xFFFFFFFF)
        inner = _mix32(((index ^ a) & low).astype(np.uint32))
        words = [_mix32(inner + outer.astype(np.uint32)) for outer in (a >> np.uint64(32), b & low)]
    half, mask = np.uint32(16), np.uint32(0xFFFF)
    return words[0] & mask, words[1] >> half, words[0] >> half


def stochastic_bfloat16(x, noise):
    """float32 x rounded up, in magnitude, where its lower 16 bits and the noise carry."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64) + noise
    return ((bits >> np.uint64(16)) << np.uint64(16)).astype(np.uint32).view(np.float32)


def attention_mask(sq, sk, left=-1, right=-1):
    """True where query i sees key j: the last query is aligned with the last key."""
    i, j = np.arange(sq)[:, None] + sk - sq, np.arange(sk)[None]
    mask = np.ones((sq, sk), bool)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


def heads_first(x):
    """(S, H, D) <-> (H, S, D)"""
    return np.swapaxes(x, 0, 1)


def attention(q, k, v, scale, left=-1, right=-1, softcap=0.0):
    """(out, lse, p) of one sequence: q (Sq, H, D), k, v (Sk, Hk, D); p (H, Sq, Sk)."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = scale * heads_first(q) @ heads_first(k).swapaxes(1, 2)
    if softcap:
        s = softcap * np.tanh(s / softcap)
    mask = attention_mask(len(q), len(k), left, right)
    s = np.where(mask, s, -np.inf)
    top = np.max(s, -1, initial=-np.inf, keepdims=True)
    e = np.where(mask, np.exp(s - np.where(np.isfinite(top), top, 0)), 0)
    total = e.sum(-1, keepdims=True)
    p = e / np.where(total == 0, 1, total)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return heads_first(p @ heads_first(v)), lse, p


def attention_bwd(dout, dlse, q, k, v, scale, left=-1, right=-1, softcap=0.0):
    """(dq, dk, dv) of one sequence; dlse (H, Sq) or None."""
    dout, q, k, v = (np.asarray(a, np.float64) for a in (dout, q, k, v))
    out, lse, p = attention(q, k, v, scale, left, right, softcap)
    sk, heads_k, D = k.shape
    group = q.shape[1] // heads_k
    wide_k, wide_v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    dp = heads_first(dout) @ heads_first(wide_v).swapaxes(1, 2)
    ds = p * (dp - np.einsum("ihd,ihd->hi", dout, out)[..., None])
    if dlse is not None:
        ds += p * np.where(np.isfinite(lse), np.asarray(dlse, np.float64), 0)[..., None]
    if softcap:
        s = scale * heads_first(q) @ heads_first(wide_k).swapaxes(1, 2)
        ds *= 1 - np.tanh(s / softcap) ** 2
    dq = scale * heads_first(ds @ heads_first(wide_k))
    dk = scale * heads_first(ds.swapaxes(1, 2) @ heads_first(q))
    dv = heads_first(p.swapaxes(1, 2) @ heads_first(dout))
    return dq, *(a.reshape(sk, heads_k, group, D).sum(2) for a in (dk, dv))


def _shifted(target, shift, ignore_index):
    """target moved `shift` places along its last dimension; what has no label is ignored."""
    out = np.full(target.shape, ignore_index, np.int64)
    if shift < target.shape[-1]:
        out[..., : target.shape[-1] - shift] = target[..., shift:]
    return out


def cross_entropy(z, target, ignore_index=-100, reduction="mean", shift=0, class_weight=None,
                  label_smoothing=0.0, z_loss=0.0, softcap=0.0, num_items=None):  # fmt: skip
    """dict of loss, lse, accuracy and predicted; none of them cut at the shift."""
    z, V = np.asarray(z, np.float64), z.shape[-1]
    weight = np.ones(V) if class_weight is None else np.asarray(class_weight, np.float64)
    label = _shifted(target, shift, ignore_index)
    valid = label != ignore_index
    y = np.where(valid, label, 0)
    z = softcap * np.tanh(z / softcap) if softcap else z
    top = z.max(-1, keepdims=True) if V else np.zeros((*z.shape[:-1], 1))
    lse = (np.log(np.exp(z - top).sum(-1, keepdims=True)) + top)[..., 0]
    nll = lse[..., None] - z
    own = weight[y] * np.take_along_axis(nll, y[..., None], -1)[..., 0]
    main = (1 - label_smoothing) * own + label_smoothing * (weight * nll).mean(-1)
    main, zs = np.where(valid, main, 0), np.where(valid, z_loss * lse**2, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        if reduction == "none":
            loss = main + zs
        elif num_items is not None:
            loss = (main + zs).sum() / num_items
        elif reduction == "sum":
            loss = (main + zs).sum()
        else:
            loss = main.sum() / weight[y][valid].sum() + zs.sum() / np.float64(valid.sum())
        right = (z.argmax(-1) == label) & valid
        accuracy = right.sum() / np.float64(valid.sum())
    predicted = np.where(valid, z.argmax(-1), -1)
    return dict(loss=loss, lse=lse, accuracy=accuracy, predicted=predicted)


def cross_entropy_bwd(dloss, z, target, dlse=None, ignore_index=-100, reduction="mean", shift=0,
                      class_weight=None, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
                      num_items=None):  # fmt: skip
    raw, V = np.asarray(z, np.float64), z.shape[-1]
    z = softcap * np.tanh(raw / softcap) if softcap else raw
    weight = np.ones(V) if class_weight is None else np.asarray(class_weight, np.float64)
    label = _shifted(target, shift, ignore_index)
    valid = label != ignore_index
    y = np.where(valid, label, 0)
    lse = cross_entropy(raw, target, softcap=softcap, reduction="none")["lse"]
    p = np.exp(z - lse[..., None])
    if reduction == "none":
        g = gz = np.asarray(dloss, np.float64)
    elif num_items is not None:
        g = gz = dloss / num_items
    elif reduction == "sum":
        g = gz = dloss
    else:
        g = dloss / max(weight[y][valid].sum(), 1e-300)
        gz = dloss / max(valid.sum(), 1)
    onehot = np.zeros((*y.shape, V))
    np.put_along_axis(onehot, y[..., None], 1, -1)
    # d/dz of sum_v q_v (lse - z_v) with the weighted target distribution q is p sum(q) - q
    q = (1 - label_smoothing) * weight[y][..., None] * onehot + label_smoothing / V * weight
    dz = np.expand_dims(g * valid, -1) * (p * q.sum(-1, keepdims=True) - q)
    dz += np.expand_dims(gz * valid * 2 * z_loss * lse, -1) * p
    if dlse is not None:
        dz += np.asarray(dlse, np.float64)[..., None] * p
    return dz * (1 - (z / softcap) ** 2) if softcap else dz


def linear_cross_entropy_bwd(dloss, x, w, target, bias=None, dlse=None, **options):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    z = x @ w.T + (0 if bias is None else bias)
    dz = cross_entropy_bwd(dloss, z, target, dlse, **options).reshape(-1, len(w))
    return (dz @ w).reshape(x.shape), dz.T @ x.reshape(len(dz), -1), dz.sum(0)
