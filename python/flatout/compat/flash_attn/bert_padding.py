"""flash_attn.bert_padding: between padded (B, S, ...) and packed (T, ...) tokens."""

import torch
import torch.nn.functional as F


def index_first_axis(input, indices):
    """input[indices] over the first dimension -> (len(indices), ...); differentiable."""
    return input.index_select(0, indices)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Pack the tokens that are not padding.

    hidden_states (B, S, ...); attention_mask (B, S) bool or int, 1 = a token; unused_mask (B, S),
    1 = allocated but unused, kept in the packed tokens. Returns (tokens (T, ...), indices (T,)
    int64 into the flattened (B * S), cu_seqlens (B + 1,) int32, the longest sequence as an int,
    seqused (B,) int32: the tokens of attention_mask alone). The int waits for the device.
    """
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(-1, dtype=torch.int32)
    used = attention_mask.sum(-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    longest = lengths.max().item()
    cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens = index_first_axis(hidden_states.flatten(0, 1), indices)
    return tokens, indices, cu_seqlens, longest, used


def index_put_first_axis(values, indices, first_axis_dim):
    """Zeros (first_axis_dim, ...) but for rows `indices`, int32 or int64, which are those of values
    (len(indices), ...); differentiable."""
    rows = values.new_zeros(first_axis_dim, *values.shape[1:])
    return rows.index_copy(0, indices.long(), values)


def pad_input(hidden_states, indices, batch, seqlen):
    """Undo unpad_input: hidden_states (T, ...) -> (batch, seqlen, ...), zeros where padded."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )
