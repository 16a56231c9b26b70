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
