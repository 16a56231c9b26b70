"""attn_implementation="flatout": transformers' attention and mask interfaces over attention().

What the layers see as attention_mask is one of
- None: dense, causal or not;
- Boundaries without cu_seqlens: plain causal, or in a window. It is no None, because models that
  work their mask into something of their own take None for "nothing is masked", and would see the
  future;
- Boundaries: where a new document or a run of padding starts, as cu_seqlens over the B * Sk keys.
  Padding needs no gather and no copy: a padding token is a document of its own, so no other row
  sees it, and rows stay where they are. Shapes are fixed, and nothing is read back from the device;
- a 4D mask, for everything else (a mask of the caller's, holes inside a row of a padding mask,
  static caches, masks that are not causal and block-diagonal, padding under a whole-model
  torch.compile): the exact computation with all scores, as transformers' eager attention does it.
"""

import inspect
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .. import torch as ft

NAME = "flatout"
UNPACKED = "flatout_unpacked"  # keyword from patch(): the caller passed no position_ids


class NotAMask(NotImplementedError, AttributeError):
    """A model's own code took what mask() made for a tensor; hasattr() takes it for no."""


class Boundaries(NamedTuple):
    cu_seqlens: torch.Tensor | None = None  # (B * Sk + 1,) int32: starts, then B * Sk
    from_positions: bool = False  # whether restarts of position_ids are in it
    causal: bool = True
    window: int | None = None  # keys that a query sees, itself included
    first: torch.Tensor | None = None  # (B,) unless causal: each row's first key that is no padding
    ndim = 4  # a mask that is ready: generate() hands one in, and it comes back to mask()

    def contiguous(self):
        return self

    def _refuse(self, other):
        raise NotAMask(
            "this model's own code computes with its attention mask, which it does not get with "
            'attn_implementation="flatout": use attn_implementation="eager"'
        )

    __getattr__ = __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = _refuse


def boundaries(starts):
    """starts (B, S) bool -> cu_seqlens (B * S + 1,) int32; a row always starts a sequence."""
    total = starts.numel()
    starts = torch.cat([torch.ones_like(starts[:, :1]), starts[:, 1:]], 1).flatten()
    token = torch.arange(total, device=starts.device)
    cu_seqlens = torch.full((total + 1,), total, dtype=torch.int32, device=starts.device)
    where = torch.where(starts, starts.cumsum(0) - 1, total)
    return cu_seqlens.scatter(0, where, torch.where(starts, token, total).int())


# ---- the mask function -------------------------------------------------------------------------
# Parts of a mask function whose meaning is known; any other leads to the exact 4D mask.
CAUSAL = {"causal_mask_function", "bidirectional_mask_function"}
WINDOW = {"sliding_window_overlay.<locals>.inner_mask"}
BLOCKS = {
    "packed_sequence_mask_function.<locals>.inner_mask",
    "chunked_overlay.<locals>.inner_mask",
}
AND = "and_masks.<locals>.and_mask"


def _name(function):
    return function.__code__.co_qualname if hasattr(function, "__code__") else "not a function"


def _parts(function):
    """The functions that and_masks() has joined into this one."""
    if _name(function) != AND:
        return [function]
    return [part for f in function.__closure__[0].cell_contents for part in _parts(f)]


def _structure(function, use_vmap):
    """(whether the mask is causal or full, windows and blocks aside, and nothing else; whether it
    is made of blocks; its window). use_vmap: True for masks of the caller's, None before
    transformers 5."""
    if use_vmap:
        return False, False, None
    if torch.compiler.is_compiling():  # it cannot look into closures: the layer knows its window
        joined = _name(function) == AND
        return _name(function) in CAUSAL or (joined and use_vmap is not None), joined, None
    parts = _parts(function)
    names = {_name(f) for f in parts}
    overlays = [inspect.getclosurevars(f).nonlocals for f in parts if _name(f) in WINDOW]
    window = min((variables["sliding_window"] for variables in overlays), default=None)
    return names <= CAUSAL | WINDOW | BLOCKS, bool(names & BLOCKS), window


def _aligned(q_length, q_offset, cache_position, kv_length, kv_offset):
    """Whether the last query stands at the last key, which attention() takes for granted."""
    if isinstance(q_offset, int):
        return q_offset + q_length == kv_offset + kv_length
    if q_length == kv_length and isinstance(kv_offset, int) and kv_offset == 0:
        return True
    start = q_offset if q_offset is not None else cache_position[0]
    if torch.compiler.is_compiling():
        return False
    return int(start) + q_length == int(kv_offset) + kv_length


def _padding(mask, kv_length):
    """(known, starts, first): starts (B, Sk) bool, or None where nothing is padded; first (B,) the
    first token's place; known is False where the mask is not one run of tokens a row."""
    if torch.compiler.is_compiling() or mask.ndim != 2 or mask.shape[1] < kv_length:
        return False, None, None
    mask = mask[:, -kv_length:].bool()
    change = torch.zeros_like(mask)
    change[:, 1:] = mask[:, 1:] != mask[:, :-1]
    runs = (change & mask).sum(1) + mask[:, 0]
    full, one_run = torch.stack([mask.all(), (runs <= 1).all()]).tolist()  # the one sync
    return one_run, None if full else change | ~mask, mask.int().argmax(1)


def _blocks(mask_function, batch_size, kv_length, kv_offset, device):
    """Starts (B, Sk) of the blocks of a block-diagonal mask, from its subdiagonal."""
    key = torch.arange(kv_length, device=device)[None] + kv_offset
    row = torch.arange(batch_size, device=device)[:, None]
    before = (key - 1).clamp(min=0)
    return ~mask_function(row, row * 0, key, before).expand(batch_size, -1)


def mask(**kwargs):
    """The function registered with AttentionMaskInterface; transformers passes keywords only."""
    function = kwargs["mask_function"]
    if isinstance(kwargs.get("attention_mask"), Boundaries):
        return kwargs["attention_mask"]
    padding, kv_length = kwargs.get("attention_mask"), kwargs["kv_length"]
    cache_position, kv_offset = kwargs.get("cache_position"), kwargs.get("kv_offset", 0)
    q_length = kwargs.get("q_length")
    q_length = cache_position.shape[0] if q_length is None else q_length

    def exact():
        return ALL_MASK_ATTENTION_FUNCTIONS["eager"](**kwargs)

    known, in_blocks, window = _structure(function, kwargs.get("use_vmap"))
    if not known:
        return exact()
    causal = _name(function) != "bidirectional_mask_function"
    if causal:
        if not _aligned(q_length, kwargs.get("q_offset"), cache_position, kv_length, kv_offset):
            return exact()
    elif window:
        return exact()
    starts = first = None
    if padding is not None:
        known, starts, first = _padding(padding, kv_length)
        if not known or (starts is not None and in_blocks and not causal):
            return exact()
    if in_blocks:
        device = cache_position.device if cache_position is not None else kwargs["device"]
        blocks = _blocks(function, kwargs["batch_size"], kv_length, kv_offset, device)
        blocks[:, 0] = False
        if torch.compiler.is_compiling() or blocks.any():
            starts = blocks if starts is None else starts | blocks
    window = window if window and window < kv_length else None
    if starts is None:
        return Boundaries(window=window) if causal else None
    first = None if causal or in_blocks else first
    return Boundaries(boundaries(starts), in_blocks, causal, window, first)


# ---- the attention function --------------------------------------------------------------------
# Keywords that layers hand on and that do not change what attention computes.
HARMLESS = {
    "cache_params", "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "deterministic",
    "encoder_attention_mask", "input_ids", "inputs_embeds", "labels", "layer_idx",
    "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch", "num_logits_to_keep",
    "output_attentions", "output_hidden_states", "output_router_logits", "past_key_value",
    "mm_token_type_ids", "past_key_values", "position_embeddings", "return_dict", "seq_idx",
    "token_type_ids", "use_cache", UNPACKED,
    # options of the loss, which models pass to every layer too
    "accum_dtype", "ce_weight", "chunk_mem_const", "final_logit_softcapping", "ignore_index",
    "label_smoothing", "lse_square_scale", "reduction", "return_predicted_tokens",
    "return_token_accuracy", "return_z_loss", "shift_labels", "skip_logits", "use_token_scaling",
}  # fmt: skip


def _refuse(dropout, s_aux, kwargs):
    """For what would change the result, and for every keyword of which that is not known."""
    unknown = [k for k, v in kwargs.items() if k not in HARMLESS and v is not None]
    unknown = [k for k in unknown if kwargs[k] is not False]
    what = f"keyword {unknown[0]}" if unknown else None
    if dropout:
        what = f"dropout={dropout}"
    elif s_aux is not None:
        what = "attention sinks (s_aux)"
    elif kwargs.get("output_attentions"):
        what = "output_attentions=True"
    if what:
        raise NotImplementedError(
            f'attn_implementation="flatout" has no {what}: use attn_implementation="eager"'
        )


def _one_dtype(query, key, value):
    """Under autocast its dtype (q and k come in float32 from rotary tables); else v's."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else value.dtype
    return tuple(x if x.dtype == dtype else x.to(dtype) for x in (query, key, value))


def restarts(position_ids, batch_size):
    """cu_seqlens (B * S + 1,) of documents: a new one wherever position_ids do not go up.
    Outside torch.compile None where there is one document a row; tested once a tensor."""
    if torch.compiler.is_compiling():
        return boundaries(_jumps(position_ids).expand(batch_size, -1))
    version = None if position_ids.is_inference() else position_ids._version
    known = getattr(position_ids, "_flatout_restarts", None)
    if known is None or known[0] != (version, batch_size):
        jumps = _jumps(position_ids)
        cu_seqlens = boundaries(jumps.expand(batch_size, -1)) if jumps.any() else None
        known = position_ids._flatout_restarts = ((version, batch_size), cu_seqlens)
    return known[1]


def _jumps(position_ids):
    jumps = torch.zeros_like(position_ids, dtype=torch.bool)
    jumps[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    return jumps


def _position_boundaries(attention_mask, position_ids, batch, sq, sk, kwargs):
    """cu_seqlens from position_ids, or None where they cannot restart or are known already."""
    if position_ids is None or position_ids.ndim != 2 or sq == 1 or kwargs.get(UNPACKED):
        return None
    if attention_mask is not None and attention_mask.from_positions:
        return None
    if position_ids.shape[1] != sq or position_ids.shape[0] not in (1, batch):
        return None
    if sq == sk:
        return restarts(position_ids, batch)
    unseen = attention_mask is None and not torch.compiler.is_compiling()
    if unseen and restarts(position_ids, batch) is not None:
        raise NotImplementedError(
            "packed documents (position_ids that restart) on top of cached keys: "
            "run them without past_key_values"
        )
    return None


def _sequences(attention_mask, position_ids, causal, q_shape, k_shape, kwargs):
    """(cu_seqlens_q, cu_seqlens_k, max_q, max_k), or None for dense attention."""
    (batch, sq), sk = q_shape, k_shape[1]
    if kwargs.get("cu_seq_lens_q") is not None:
        cu_q, cu_k = kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"]
        if isinstance(attention_mask, Boundaries) and not attention_mask.from_positions:
            raise ValueError("cu_seq_lens_q beside an attention_mask with padding: pass one")
        return cu_q, cu_k, kwargs.get("max_length_q"), kwargs.get("max_length_k")
    found = [attention_mask.cu_seqlens] if attention_mask is not None else []
    if causal:
        cu = _position_boundaries(attention_mask, position_ids, batch, sq, sk, kwargs)
        found += [] if cu is None else [cu]
    if not found:
        return None
    cu_k = found[0] if len(found) == 1 else torch.cat(found).sort().values  # doubles are empty
    cu_q = cu_k
    if attention_mask is not None and attention_mask.first is not None:
        row = cu_k // sk  # all of its queries see the one document that is no padding
        behind = cu_k % sk > attention_mask.first[row.clamp(max=batch - 1)]
        cu_q = (row * sq + behind * sq).int()
    elif sq != sk:  # keys of row b end where its queries end
        cu_q = (cu_k // sk * sq + (cu_k % sk + sq - sk).clamp(min=0)).int()
    return cu_q, cu_k, sq, sk


def _exact(query, key, value, mask, scale, softcap):
    """Attention with all scores, for a 4D mask: added, or True where a key is seen."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask.dtype == torch.bool:
        least = torch.finfo(scores.dtype).min
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, least)
    scores = scores + mask[..., : key.shape[2]]
    out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    return out.transpose(1, 2).contiguous()


def _window(sliding_window, causal):
    if sliding_window is None:
        return -1, -1
    if not causal:
        raise NotImplementedError("sliding_window of attention that is not causal")
    return sliding_window - 1, 0


def attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None,
    softcap=None, s_aux=None, is_causal=None, position_ids=None, **kwargs,
):  # fmt: skip
    """The function registered with AttentionInterface: query (B, Hq, Sq, D), key and value
    (B, Hk, Sk, D) -> out (B, Sq, Hq, D), None. Causal and in a window as the mask is, or without
    a mask by is_causal, else by the module; bottom-right aligned, so that a cache of earlier keys
    is seen whole. sliding_window W lets a query see itself and the W - 1 keys before it. Documents
    are kept apart by DataCollatorWithFlattening's cu_seq_lens_q and cu_seq_lens_k (documents + 1,),
    or by position_ids that restart, with a cache or without. Raises NotImplementedError for
    dropout, sinks (s_aux), output_attentions, values of other columns than queries have, and
    keywords it does not know, such as T5's position_bias."""
    _refuse(dropout, s_aux, kwargs)
    query, key, value = _one_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = softcap or 0.0
    if value.shape[-1] != query.shape[-1]:
        raise NotImplementedError(
            f'attn_implementation="flatout" has no values of {value.shape[-1]} columns beside '
            f'queries of {query.shape[-1]}: use attn_implementation="eager"'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, Boundaries):
        causal = attention_mask.causal
        sliding_window = attention_mask.window if sliding_window is None else sliding_window
        attention_mask = None if attention_mask.cu_seqlens is None else attention_mask
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4:
        return _exact(query, key, value, attention_mask, scale, softcap), None
    if not isinstance(attention_mask, (Boundaries, type(None))):
        shape = getattr(attention_mask, "shape", None)
        raise TypeError(
            "attention_mask: expected None, a 4D tensor or what flatout's mask function made, "
            f"got {type(attention_mask).__name__} of shape {shape}"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {
        "causal": causal, "scale": scale, "softcap": softcap,
        "window": _window(sliding_window, causal),
        "deterministic": bool(kwargs.get("deterministic")),
    }  # fmt: skip
    packed = _sequences(attention_mask, position_ids, causal, q.shape[:2], k.shape[:2], kwargs)
    if packed is None:
        return ft.attention(q, k, v, **options), None
    cu_q, cu_k, max_q, max_k = packed
    out = ft.attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        max_seqlen_q=max_q, max_seqlen_k=max_k, **options,
    )  # fmt: skip
    return out.view(q.shape), None


def register():
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
