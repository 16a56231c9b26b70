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


def attention_mask(sq, sk, left=-1, right=-1):
    """True where query i sees key j: the last query is aligned with the last key."""
    i, j = np.arange(sq)[:, None] + sk - sq, np.arange(sk)[None]
    mask = np.ones((sq, sk), bool)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    return mask


def attention(q, k, v, scale, left=-1, right=-1, softcap=0.0):
    """(out, lse, p) of one sequence: q (Sq, H, D), k, v (Sk, Hk, D); p (H, Sq, Sk)."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    s = scale * np.einsum("ihd,jhd->hij", q, k)
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
    return np.einsum("hij,jhd->ihd", p, v), lse, p


def attention_bwd(dout, dlse, q, k, v, scale, left=-1, right=-1, softcap=0.0):
    """(dq, dk, dv) of one sequence; dlse (H, Sq) or None."""
    dout, q, k, v = (np.asarray(a, np.float64) for a in (dout, q, k, v))
    out, lse, p = attention(q, k, v, scale, left, right, softcap)
    sk, heads_k, D = k.shape
    group = q.shape[1] // heads_k
    wide_k, wide_v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    dp = np.einsum("ihd,jhd->hij", dout, wide_v)
    ds = p * (dp - np.einsum("ihd,ihd->hi", dout, out)[..., None])
    if dlse is not None:
        ds += p * np.where(np.isfinite(lse), np.asarray(dlse, np.float64), 0)[..., None]
    if softcap:
        s = scale * np.einsum("ihd,jhd->hij", q, wide_k)
        ds *= 1 - np.tanh(s / softcap) ** 2
    dq = scale * np.einsum("hij,jhd->ihd", ds, wide_k)
    dk = scale * np.einsum("hij,ihd->jhd", ds, q)
    dv = np.einsum("hij,ihd->jhd", p, dout)
    return dq, *(a.reshape(sk, heads_k, group, D).sum(2) for a in (dk, dv))
