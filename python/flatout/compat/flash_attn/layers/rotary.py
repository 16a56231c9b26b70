"""flash_attn.layers.rotary: apply_rotary_emb."""

import torch

import flatout.torch as ft


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets=0,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Rotate the first R features of every head, in fp32 with one rounding -> like x.

    x (B, S, H, D), or packed (T, H, D) with cu_seqlens (B + 1,) int32; cos and sin (positions,
    R / 2) with R <= D. interleaved: pairs are (0, 1), (2, 3), ... (GPT-J) and not the two halves
    of R (NeoX, Llama). seqlen_offsets: an int, or (B,) ints, added to every position.
    inplace: x gets the result and is returned. Where torch lets x have no history (a leaf that
    requires a gradient, a view of one, one of unbind's views), x also gets the result, but as in
    flash-attn a new tensor with the history is returned (RuntimeError for such views in
    torch.compile). The gradient is never overwritten.
    max_seqlen is not needed. The interleaved form runs in plain torch, the other in
    `flatout.torch.rope`. ValueError if the tables hold too few positions.
    """
    rotated = 2 * cos.shape[-1]
    if rotated > x.shape[-1]:
        raise ValueError(
            f"apply_rotary_emb: cos has {cos.shape[-1]} columns, head_dim is too small"
        )
    cos, sin = (_rows(t, x, seqlen_offsets, cu_seqlens) for t in (cos, sin))
    head = x[..., :rotated]
    head = _interleaved(head, cos, sin) if interleaved else _halves(head, cos, sin)
    out = head if rotated == x.shape[-1] else torch.cat((head, x[..., rotated:]), -1)
    return _write(x, out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def _write(x, out):
    """out, in x's memory too: x itself where it can have out's history."""
    if not (x.is_leaf and x.requires_grad and torch.is_grad_enabled()):
        try:
            return x.copy_(out)
        except RuntimeError:  # a view that can have none
            pass
    with torch.no_grad():
        x.copy_(out)
    return out


def _rows(table, x, offsets, cu_seqlens):
    """The rows of `table` that belong to x's tokens: (S, R / 2), (B, S, R / 2) or (T, R / 2)."""
    if isinstance(offsets, int) and offsets < 0:
        raise ValueError(f"apply_rotary_emb: seqlen_offsets: expected >= 0, got {offsets}")
    if cu_seqlens is None and isinstance(offsets, int):
        if offsets + x.shape[1] > table.shape[0]:
            raise ValueError(
                f"apply_rotary_emb: cos and sin have {table.shape[0]} positions, "
                f"{offsets + x.shape[1]} are needed"
            )
        return table[offsets : offsets + x.shape[1]]
    if cu_seqlens is None:
        return table[offsets[:, None] + torch.arange(x.shape[1], device=x.device)]
    token = torch.arange(x.shape[0], device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
    sequence = sequence.clamp(max=cu_seqlens.numel() - 2)
    start = (
        cu_seqlens[sequence] if isinstance(offsets, int) else (cu_seqlens[:-1] - offsets)[sequence]
    )
    return table[token - start + (offsets if isinstance(offsets, int) else 0)]


def _halves(x, cos, sin):
    cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    return ft.rope(x, None, cos, sin)[0]


def _interleaved(x, cos, sin):
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (t.to(dtype).unsqueeze(-2) for t in (cos, sin))  # (..., 1, R / 2): every head
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return pairs.flatten(-2).to(x.dtype)
