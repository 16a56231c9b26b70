"""Embedding lookup (formulas: csrc/ops.h)."""

import torch
from torch import Tensor

from .. import _C
from ._library import (
    Op,
    apply,
    expect_tensors,
    needs_grad,
    once_differentiable,
    rows,
    stat_dtype,
    stream,
)

TERMS = 32  # of a piece, at most, unless there would be more than PARTIALS / H pieces
PARTIALS = 1 << 20  # floats of one share of every piece; of two shares they are 8 MiB
SORTED = 16384  # ids that embedding_bwd sorts itself, at most: EMBEDDING_SORTED
# Rows of a table for which it does, at most: every MOST_BINS of them (kernels/embedding_sort.cuh)
# take a block that reads all ids, while the work of torch.sort does not grow with the table.
ROWS = 1 << 20


def _flat(ids):
    return ids.contiguous() if ids.ndim == 1 else ids.reshape(-1).contiguous()


def _fwd_outputs(weight, ids):
    return (weight.new_empty(*ids.shape, weight.shape[1]),)


def _fwd(out, weight, ids):
    (y,) = out
    if ids.ndim != 1:
        y = y.view(ids.numel(), weight.shape[1])
    _C.embedding_fwd(y, _flat(ids), rows(weight), stream(weight))


def _bwd_outputs(dy, ids, vocabulary):
    return (dy.new_empty((vocabulary, dy.shape[-1])),)


def _narrow(ids, vocabulary):
    """In int32, whose sort passes over half as many bits; what names no row still names none."""
    if ids.dtype != torch.int64 or vocabulary >= 2**31:
        return ids
    return ids.clamp(-1, vocabulary).int()


def _partial(dy, N, H):
    pieces = max(1, min((N + TERMS - 1) // TERMS, PARTIALS // max(H, 1)))
    return dy.new_empty(2 * pieces, H, dtype=stat_dtype(dy))


def _order(ids, vocabulary):
    """What embedding_bwd takes: sorted (scratch), ids, order."""
    # The kernel that clears dw sorts few ids on the way: no launches of torch.sort.
    if len(ids) <= SORTED and vocabulary <= ROWS:
        return ids.new_empty(2, len(ids), dtype=torch.int64), ids, None
    return None, *torch.sort(_narrow(ids, vocabulary), stable=True)


def _bwd(out, dy, ids, vocabulary):
    N, H = ids.numel(), dy.shape[-1]
    scratch, ids, order = _order(_flat(ids), vocabulary)
    dy, partial = rows(dy.reshape(N, H)), _partial(dy, N, H)
    _C.embedding_bwd(*out, partial, scratch, dy, ids, order, stream(dy))


embedding_fwd = Op("embedding_fwd(Tensor weight, Tensor ids) -> Tensor", _fwd_outputs, _fwd)
embedding_bwd = Op(
    "embedding_bwd(Tensor dy, Tensor ids, SymInt vocabulary) -> Tensor", _bwd_outputs, _bwd
)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids):
        ctx.save_for_backward(ids)
        ctx.vocabulary = weight.shape[0]
        return embedding_fwd(weight, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return embedding_bwd(dy, *ctx.saved_tensors, ctx.vocabulary), None


def _setup(ctx, inputs, outputs):
    weight, ids = inputs
    ctx.save_for_backward(ids)
    ctx.vocabulary = weight.shape[0]
    return (0,)


embedding_fwd.differentiable((0,), _Embedding, _setup)


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """weight[ids]: ids (...) int32 or int64, weight (V, H); returns (..., H).

    The gradient of weight is dense (V, H): a row's terms are summed in float32 (float64 in
    float64), in a fixed order, and rounded once. An id outside 0 .. V - 1 raises IndexError on the
    CPU and gives NaN on CUDA, where nothing waits for the device to tell. Differentiable once.
    """
    if not (isinstance(ids, Tensor) and isinstance(weight, Tensor)):
        expect_tensors("embedding", ids=ids, weight=weight)
    if weight.ndim != 2:
        raise _C.ArgumentValueError(
            f"embedding: weight: expected 2 dimensions, got shape {tuple(weight.shape)}"
        )
    if needs_grad(weight):
        return apply(_Embedding, weight, ids)
    return embedding_fwd(weight, ids)
