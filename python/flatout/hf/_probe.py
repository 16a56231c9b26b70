"""Is this module what it looks like? Each probe runs a module's own forward and flatout's on one
small random input, of the module's dtype and device, and compares. A probe returns None if flatout
may take over, else the reason why not. Attribute names alone do not tell: dozens of classes called
RMSNorm differ in where they round and what they add to the weight."""

import contextlib

import torch
from torch.func import functional_call
from transformers import AttentionInterface

from .. import torch as ft
from ._attention import attention as flatout_attention


def random(shape, like, scale=1.0, dtype=None):
    """Normal numbers that leave torch's global generators as they are."""
    generator = torch.Generator(like.device).manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator, device=like.device) * scale
    return x.to(dtype or like.dtype)


def close(found, expected, tolerance=None):
    """Same shape and dtype and, unless a tolerance is given, the same rounding: float32 within
    1e-5 of the largest value, bfloat16 and float16 equal in 98 % of the values."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    error = (found.double() - expected.double()).abs().max()
    largest = expected.double().abs().max()
    if tolerance is None and expected.dtype in (torch.bfloat16, torch.float16):
        return error <= largest / 32 and (found != expected).double().mean() <= 0.02
    return bool(error <= largest * (tolerance or 1e-5))


def rounding(dtype):
    """The tolerance for formulas that round at several places: a few units in the last place."""
    return max(1e-5, 8 * torch.finfo(dtype).eps)


def weight_like(module):
    """A tensor with the device and dtype that this module computes in."""
    parameters = list(module.parameters())
    for parameter in parameters:
        if parameter.is_floating_point():
            return parameter
    return torch.empty(0, device=parameters[0].device, dtype=torch.bfloat16)  # quantized


def _device(module):
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


@contextlib.contextmanager
def same_random(module):
    """torch's global generators go on afterwards as if what runs here had drawn nothing, so that
    two such runs draw the same numbers."""
    device = _device(module)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def quiet(module, training=False):
    """No gradients and no autocast while a probe runs, and no dropout unless it is for training.
    Without gradient checkpointing, which makes no difference to what is computed."""
    names = "training", "gradient_checkpointing"
    flags = [(m, n, m.__dict__[n]) for m in module.modules() for n in names if n in m.__dict__]
    for m, name, _ in flags:
        m.__dict__[name] = training and name == "training"
    try:
        autocast = torch.autocast(_device(module).type, enabled=False)
        with torch.no_grad(), autocast, same_random(module):
            yield
    finally:
        for m, name, value in flags:
            m.__dict__[name] = value


def undecorated(function):
    """The function under transformers' and torch's own decorators. Any other does what is not
    known."""
    while hasattr(function, "__wrapped__"):
        home = getattr(function, "__globals__", {}).get("__name__", "")
        if home.partition(".")[0] not in ("transformers", "torch", "flatout"):
            raise ValueError(f"its forward is decorated in {home or 'an unknown module'}")
        function = function.__wrapped__
    return function


def unusable(module):
    """A reason that holds for any op, or None."""
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance"
    for parameter in module.parameters():
        if parameter.is_meta:
            return "its weights are on the meta device"
        if type(parameter.data) is not torch.Tensor:
            return f"its weights are {type(parameter.data).__name__}"
    return None


def run(probe, *args):
    """probe(*args), an exception being a reason too."""
    try:
        return probe(*args)
    except Exception as error:  # any failure of a foreign module's forward
        return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- RMSNorm -----------------------------------------------------------------------------------
def norm_eps(module):
    """eps of what could be an RMSNorm (one 1D weight, an eps), else None."""
    names = [name for name, _ in module.named_parameters()]
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if names != ["weight"] or module.weight.ndim != 1 or not isinstance(eps, float):
        return None
    return eps


def norm_forward(weight, eps, offset, x):
    """rms_norm whose result has the wider dtype of x and weight, as transformers' has."""
    dtype = torch.promote_types(x.dtype, weight.dtype) if offset == 0 else x.dtype
    return ft.rms_norm(x if x.dtype == dtype else x.to(dtype), weight, eps, offset=offset)


def rms_norm(module, found):
    """Sets found["offset"]: 0 (Llama, Qwen) or 1 (Gemma). The weight is replaced by random
    numbers, and bfloat16 is tried too: it shows where the class rounds."""
    eps = norm_eps(module)
    width = module.weight.shape[0]
    scales = torch.tensor([1.0, 1e-3, 30.0, 0.1], device=module.weight.device)
    offsets = {0.0, 1.0}
    for dtype in (module.weight.dtype, torch.bfloat16):
        weight = random((width,), module.weight, dtype=dtype)
        x = (random((4, width), weight) * scales[:, None]).to(dtype)
        expected = functional_call(module, {"weight": weight}, (x,))
        offsets &= {o for o in offsets if close(norm_forward(weight, eps, o, x), expected)}
    if not offsets:
        return "its result differs from RMSNorm's"
    found["offset"] = offsets.pop()
    return None


# ---- SwiGLU ------------------------------------------------------------------------------------
def mlp_parts(module):
    """The names of the projections of what could be a SwiGLU MLP, else None."""
    for names in (("gate_proj", "up_proj"), ("gate_up_proj",)):
        if all(isinstance(getattr(module, n, None), torch.nn.Module) for n in names):
            if isinstance(getattr(module, "down_proj", None), torch.nn.Module):
                return names
    return None


def swiglu(module):
    """The projections answer with random numbers: what reaches down_proj must be their swiglu,
    and what down_proj returns must be the result."""
    names, seen = mlp_parts(module), {}

    def answer(name):
        def hook(_, args, out):
            seen[name] = random(out.shape, out), args[0]
            return seen[name][0]

        return hook

    x = random((3, _width(getattr(module, names[0]), module)), weight_like(module))
    hooks = [getattr(module, n).register_forward_hook(answer(n)) for n in (*names, "down_proj")]
    try:
        out = module(x)
    finally:
        for hook in hooks:
            hook.remove()
    answers = [seen[n][0] for n in names]
    if not all(torch.equal(seen[n][1], x) for n in names):
        return "the input of its projections differs from SwiGLU's"
    if not close(seen["down_proj"][1], ft.swiglu(*answers)):
        return "the input of its down_proj differs from SwiGLU's"
    return None if torch.equal(out, seen["down_proj"][0]) else "its result is not down_proj's"


def _width(projection, module):
    if hasattr(projection, "in_features"):
        return projection.in_features
    return module.config.hidden_size


# ---- rotary embedding and attention ------------------------------------------------------------
def is_attention(module):
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    split = all(isinstance(getattr(module, n, None), torch.nn.Module) for n in names)
    packed = isinstance(getattr(module, "qkv_proj", None), torch.nn.Module)
    return (split or packed) and hasattr(module, "head_dim") and hasattr(module, "config")


def tables(model, positions=8):
    """cos, sin (1, positions, D) of the model's own rotary embedding, for probes."""
    rotary = next((m for m in model.modules() if hasattr(m, "inv_freq")), None)
    if rotary is None:
        raise ValueError("no rotary embedding found in the model")
    position_ids = torch.arange(positions, device=rotary.inv_freq.device)[None]
    return rotary(random((1, positions, 8), weight_like(model)), position_ids)


def apply_rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    """transformers' apply_rotary_pos_emb: q, k (B, H, S, D), or (B, S, H, D) with
    unsqueeze_dim=2. position_ids is unused there too."""
    if isinstance(position_ids, int):  # 5.x: the fifth argument is unsqueeze_dim
        unsqueeze_dim = position_ids
    if unsqueeze_dim == 2:
        return ft.rope(q, k, cos, sin)
    q, k = ft.rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


def rope(module, cos_sin):
    forward = undecorated(type(module).forward)
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return "its forward does not call apply_rotary_pos_emb"
    original = forward.__globals__["apply_rotary_pos_emb"]
    cos, sin = cos_sin()
    q = random((2, 4, cos.shape[1], module.head_dim), cos)
    k = random((2, 2, cos.shape[1], module.head_dim), cos)
    pairs = zip(apply_rope(q, k, cos, sin), original(q, k, cos, sin), strict=True)
    if not all(close(a, b, rounding(cos.dtype)) for a, b in pairs):
        return "its apply_rotary_pos_emb is not the rotate-half rotation"
    return None


RECORDER = "flatout_recorder"
_recorded = {}


def _record(module, query, key, value, attention_mask, **kwargs):
    _recorded.update(kwargs)
    return flatout_attention(module, query, key, value, attention_mask, **kwargs)


def _run_attention(module, cos_sin, implementation, mask=None):
    """The attention module on random hidden states with this attention implementation."""
    cos, sin = cos_sin()
    x = random((1, cos.shape[1], module.config.hidden_size), weight_like(module))
    before = module.config._attn_implementation
    try:
        module.config._attn_implementation = implementation
        return module(hidden_states=x, position_embeddings=(cos, sin), attention_mask=mask)[0]
    finally:
        module.config._attn_implementation = before


def attention_options(module, cos_sin):
    """(result, options): what an attention module hands to the attention interface."""
    AttentionInterface.register(RECORDER, _record)
    _recorded.clear()
    out = _run_attention(module, cos_sin, RECORDER)
    names = ("scaling", "sliding_window", "softcap")
    return out, tuple((n, _recorded[n]) for n in names if _recorded.get(n) is not None)


def attention(module, cos_sin):
    """Eager with the causal mask against flatout on the whole attention module."""
    found, options = attention_options(module, cos_sin)
    length = found.shape[1]
    seen = torch.ones(length, length, device=found.device).tril()
    seen = seen.triu(1 - dict(options).get("sliding_window", length))
    mask = torch.zeros_like(seen).masked_fill(seen == 0, torch.finfo(found.dtype).min)
    expected = _run_attention(module, cos_sin, "eager", mask[None, None].to(found.dtype))
    same = close(found, expected, max(1e-4, rounding(found.dtype)))
    return None if same else "its result differs from eager's"
