"""What flash-attn 2's and FA3's attention functions share: flatout.torch.attention with their
liberties in the shapes of heads."""

import torch.nn.functional as F

import flatout.torch as ft
from flatout.compat import refuse
from flatout.torch._library import expect_tensors


def attend(name, q, k, v, *, scale, **options):
    """(out, lse) of flatout.torch.attention for the peer's function `name`.

    v may have another head dimension than q and k, and on CUDA none need be a multiple of 8: zeros
    make up what is missing, which add nothing to a score and whose columns out leaves out. They
    cost copies of q, k, v and the work of the larger dimension.
    """
    _check(name, q=q, k=k, v=v)
    size, size_v = q.shape[-1], v.shape[-1]
    if size != size_v or (size % 8 and q.is_cuda):
        width = max(size, size_v)
        if q.is_cuda:
            width = -(-width // 8) * 8
        q, k, v = (F.pad(x, (0, width - n)) for x, n in ((q, size), (k, size), (v, size_v)))
        scale = size**-0.5 if scale is None and size else scale
        out, lse = ft.attention(q, k, v, scale=scale, return_lse=True, **options)
        return out[..., :size_v], lse
    return ft.attention(q, k, v, scale=scale, return_lse=True, **options)


def _check(name, **tensors):
    """Refuse what flatout.torch.attention would, but with the sizes before padding; and FP8."""
    expect_tensors(name, **tensors)
    for label, x in tensors.items():
        if x.dtype.itemsize == 1:
            refuse(name, **{str(x.dtype): True})
        if x.ndim < 3:
            raise ValueError(f"{name}: {label}: expected (..., H, D), got {tuple(x.shape)}")
    size, size_k = (tensors[label].shape[-1] for label in "qk")
    if size != size_k:
        raise ValueError(f"{name}: k: expected q's head dimension {size}, got {size_k}")
