"""kernelize(model): flatout's layers put in by the `kernels` package, without a hub."""

from torch import nn

from .. import torch as ft
from . import _probe
from ._patch import REASONS, attempt, pretrained
from ._swap import active, members


class RMSNorm(nn.Module):
    """Stateless, as `kernels` wants it: forward runs on the model's own module."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return _probe.norm_forward(self.weight, eps, 0.0, hidden_states)


class RMSNormOffset1(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return _probe.norm_forward(self.weight, eps, 1.0, hidden_states)


class SwiGLUMLP(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, x):
        return self.down_proj(ft.swiglu(self.gate_proj(x), self.up_proj(x)))


class PackedSwiGLUMLP(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, x):
        return self.down_proj(ft.swiglu(self.gate_up_proj(x)))


LAYERS = {c.__name__: c for c in (RMSNorm, RMSNormOffset1, SwiGLUMLP, PackedSwiGLUMLP)}


class _Repository:
    """What `kernels` takes for a place to load a layer from."""

    def __init__(self, layer_name):
        self.layer_name = layer_name

    def load(self):
        return LAYERS[self.layer_name]

    def __eq__(self, other):
        return type(other) is _Repository and other.layer_name == self.layer_name

    def __hash__(self):
        return hash((_Repository, self.layer_name))

    def __str__(self):
        return f"flatout:{self.layer_name}"


class _Only(nn.Module):
    """Shows `kernels` the chosen modules and nothing inside them."""

    def __init__(self, chosen):
        super().__init__()
        self.chosen = (chosen,)

    def named_modules(self, *args, **kwargs):
        return ((str(i), module) for i, module in enumerate(self.chosen[0]))


@members("kernel layer")
def _kernel_layer(base, layer_name):
    """The mark of kernels.replace_kernel_forward_from_hub, on this model's modules alone."""
    from kernels import replace_kernel_forward_from_hub

    class Marked:
        pass

    replace_kernel_forward_from_hub(Marked, f"flatout {layer_name}")
    marks = ("kernel_layer_name", "kernel_condition")
    return {name: Marked.__dict__[name] for name in marks if name in Marked.__dict__}


def _norm_layer(module, found):
    reason = _probe.rms_norm(module, found)
    found["layer"] = RMSNormOffset1 if found.get("offset") else RMSNorm
    return reason


def _mark(module):
    """Marks a module that passes its probe with the layer to load."""
    if "kernel layer" in active(type(module)):
        return
    options = {"kind": "kernel layer"}
    if _probe.norm_eps(module) is not None:
        found = {}
        options["variant"] = lambda: found["layer"].__name__
        attempt(module, "rms_norm", _norm_layer, found, **options)
    elif parts := _probe.mlp_parts(module):
        options["variant"] = (SwiGLUMLP if len(parts) == 2 else PackedSwiGLUMLP).__name__
        attempt(module, "swiglu", _probe.swiglu, **options)


def kernelize(model: nn.Module, *, mode=None, device=None) -> nn.Module:
    """RMSNorm and SwiGLU modules get flatout's layers through `kernels.kernelize`; returns the
    model. Needs `pip install kernels` (0.12 or newer), else ImportError. Nothing is downloaded.

    mode: kernels.Mode, by default TRAINING | TORCH_COMPILE. device: "cpu" or "cuda", by default
    the model's. As with patch(), a module must pass a probe, and only this model changes.

    `kernels` is called directly and not through transformers, whose 5.23 accepts no released
    version of it (use_kernels=True does nothing there) and whose own kernelize() runs again, and
    drops these layers, on every train() and eval(). Rotary embedding is left out: transformers'
    hook for it is one object for all models of a file; use patch(model, rope=True). Attention and
    the loss are not layers of this kind: use attn_implementation="flatout" and patch().
    """
    try:
        import kernels
        import kernels.layer  # a folder called kernels on the path would pass for the package
    except ImportError as error:
        raise ImportError(
            "flatout.hf.kernelize needs the kernels package: pip install kernels "
            "(flatout.hf.patch does the same without it)"
        ) from error
    top = pretrained(model)
    for module in model.modules():
        _mark(module)
    chosen = [m for m in model.modules() if "kernel layer" in active(type(m))]
    device = device or next(top.parameters()).device.type
    mapping = {f"flatout {name}": {device: _Repository(name)} for name in LAYERS}
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(
            _Only(chosen),
            mode=mode or kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE,
            device=device,
            use_fallback=False,
        )
    for module in chosen:
        REASONS.pop(module, None)
    return model
