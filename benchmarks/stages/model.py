"""Build a row's model: random weights of a fixed seed, then the row's attention, kernels, loss."""

import importlib
import importlib.util
import inspect

import torch

from stages.machine import version

HUB_CLIENTS = ("httpx", "httpcore", "requests", "huggingface_hub")  # their errors: no hub


class Skip(Exception):
    """The row cannot run here, for a reason that is nobody's fault."""


def require(module):
    """The module, or Skip if it is not installed. Its own errors pass."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            raise Skip(f"{error.name} not installed") from error
        raise


def prerequisites(row, device):
    """Raise Skip at once for what the row cannot do without."""
    if row.attention in ("fa2", "fa3") and device == "cpu":
        raise Skip("needs CUDA")
    if row.kernels == "liger" and device == "cpu":
        raise Skip("needs CUDA (Liger's kernels are Triton)")
    needs = {"hub": "kernels", "flatout-hub": "kernels", "liger": "liger_kernel"}
    for package in (needs.get(row.kernels), "cut_cross_entropy" if row.loss == "cce" else None):
        if package:
            require(package)


def choose_attention(row, device):
    """(transformers' name of the attention, what it really is, SDPA backends to allow or None)."""
    if row.attention == "fa2" and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2", f"flash-attn {version('flash-attn')}", None
    if row.attention == "fa3":
        if not importlib.util.find_spec("flash_attn_3"):
            require("flash_attn_interface")
        return "flash_attention_3", f"flash-attn-3 {version('flash-attn-3') or ''}".strip(), None
    if row.attention == "flatout":
        require("flatout.hf")
        return "sdpa" if row.kernels else "flatout", "flatout", None  # the others by patch()
    if row.attention == "eager":
        return "eager", "eager", None
    from torch.nn.attention import SDPBackend

    if row.attention == "fa2":
        return "sdpa", "torch's own flash (no flash-attn)", [SDPBackend.FLASH_ATTENTION]
    if device == "cpu":
        return "sdpa", "torch SDPA", None
    order = ["CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"]
    return "sdpa", "torch SDPA, cuDNN first", [getattr(SDPBackend, name) for name in order]


def packages(row, label):
    """{distribution: version} of the peers that a row runs."""
    names = {"hub": "kernels", "flatout-hub": "kernels", "liger": "liger-kernel"}
    used = [names.get(row.kernels), "cut-cross-entropy" if row.loss == "cce" else None]
    used += [name for name in ("flash-attn-3", "flash-attn") if label.startswith(name)]
    return {name: version(name) for name in used if name}


@torch.no_grad()
def nudge(model, seed):
    """Move every weight that is not 0 up or down by one unit in the last place."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        bits = parameter.data.view({2: torch.int16, 4: torch.int32}[parameter.element_size()])
        change = torch.empty_like(bits).random_(0, 2, generator=generator).mul_(2).sub_(1)
        bits.add_(change.mul_(parameter != 0))


def build(config, attention, device, dtype, seed):
    """A Qwen3 with random weights. The same seed and device give every row the same weights."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            Qwen3Config(**config), dtype=dtype, attn_implementation=attention
        )
    return model.train()


def replaced(module):
    """Whether kernelize gave this module another forward than its class's (it sets the class's
    own where it finds no kernel)."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", forward) not in (None, type(module).forward)


def hub_kernels(model, device):
    """transformers' own kernelize: the kernels that its default mapping finds on the hub."""
    kernels = require("kernels")
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    takes_mode = "mode" in inspect.signature(model.set_use_kernels).parameters
    try:
        model.set_use_kernels(True, **({"mode": mode} if takes_mode else {}))
    except ValueError as error:
        raise Skip(str(error).splitlines()[0]) from error
    except Exception as error:  # what the hub's client raises when offline differs by version
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in HUB_CLIENTS:
            raise Skip(f"the hub's kernels cannot be fetched: {error}".splitlines()[0]) from error
        raise
    if not any(replaced(module) for module in model.modules()):
        raise Skip("needs CUDA" if device == "cpu" else "the hub has no kernel for these layers")


def liger_kernels(model, loss):
    """Liger's documented call; its default loss is the fused linear one."""
    require("liger_kernel.transformers").apply_liger_kernel_to_qwen3(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=loss == "liger-logits",
        fused_linear_cross_entropy=loss == "liger", model=model,
    )  # fmt: skip


def swap_kernels(row, model, device):
    """Replace the layers' ops as the row says; its loss is loss_function's part."""
    if row.kernels == "hub":
        hub_kernels(model, device)
    elif row.kernels == "liger":
        liger_kernels(model, row.loss)
    elif row.kernels == "flatout":
        linear = row.loss == "flatout-linear"
        require("flatout.hf").patch(model, linear_cross_entropy=linear)
    elif row.kernels == "flatout-hub":  # kernelize swaps layers; attention is none
        rest = dict(rms_norm=False, swiglu=False, rope=False, linear_cross_entropy=False)
        require("flatout.hf").patch(model, **rest)
        require("flatout.hf").kernelize(model)
    elif row.kernels == "flatout-fused":
        require("flatout.hf").fuse(model)


def active_ops(row, model):
    """flatout's report of what runs where, as text; raises where an op of the row is not active:
    patch() keeps the module's own forward when its probe fails, and the row would measure that;
    an op that fits no module of the model is not active either."""
    if not row.ours:
        return None
    ops = ["attention"]
    if row.kernels:
        ops += ["rms_norm", "swiglu"]
    if row.kernels in ("flatout", "flatout-fused"):
        ops.append("rope")
    if row.loss == "flatout-linear":
        ops.append("linear_cross_entropy")
    if row.kernels == "flatout-fused":
        ops += ["fused layer", "embedding"]
    report = require("flatout.hf").report(model)
    for name, states in report.items():
        for op in ops:
            if states.get(op, "flatout") != "flatout":
                raise RuntimeError(f"{op} is not active in {name or 'the model'}: {states[op]}")
    missing = [op for op in ops if not report.active(op)]
    if missing:
        raise RuntimeError(f"{missing[0]} is not active: no module of the model has it")
    return str(report)


def flatout_loss(logits, labels, vocab_size, **_):
    """transformers' ForCausalLMLoss by flatout: the shift is an index, the logits stay as are."""
    return require("flatout.torch").cross_entropy(logits, labels, shift=1)


def loss_function(row, model, device):
    """ids (batch, seq) -> mean next-token loss, by the row's own loss."""
    if row.loss == "cce":
        package = require("cut_cross_entropy")
        impl = "torch_compile" if device == "cpu" else "cce"

        def loss(ids):
            hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
            weight = model.lm_head.weight
            return package.linear_cross_entropy(hidden, weight, ids, shift=True, impl=impl)

        return loss
    if row.loss == "flatout":
        model.loss_function = flatout_loss
    # A mask of ones: without any, transformers 4.57 materialises one and SDPA loses is_causal.
    return lambda ids: model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss


def compile_layers(model, device):
    """Every decoder layer by itself, as the public matrix does; max-autotune is for GPUs."""
    mode = "default" if device == "cpu" else "max-autotune"
    for layer in model.model.layers:
        layer.compile(fullgraph=True, mode=mode)


def optimizer_step(row, model, lr):
    """(optimizer, step()): torch's fused AdamW and clip, and in stage 06 flatout's, which clips."""
    parameters = list(model.parameters())
    setting = dict(lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    if row.optimizer:
        optimizer = require("flatout.torch").AdamW(parameters, max_grad_norm=1.0, **setting)
        return optimizer, optimizer.step
    optimizer = torch.optim.AdamW(parameters, fused=True, **setting)

    def step():
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return optimizer, step
