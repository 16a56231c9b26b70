"""The optimizer's ops of run_ops.py: AdamW, with and without clipping, and the global norm.

A shape is (P, N): P parameters in N tensors. All providers work on the same parameters, gradients
and states, so that a model of 61 GiB fits a card of 80."""

import torch

from ops.table import Op

LR, MAX_NORM = 1e-5, 1.0
STOCHASTIC = "flatout, stochastic"


def qwen3_8b():
    """The shapes of Qwen3-8B's parameters, in the model's order."""
    hidden, heads, width = 4096, 128, 12288
    attention = [(4096, hidden), (1024, hidden), (1024, hidden), (hidden, 4096), (heads,), (heads,)]
    mlp = [(width, hidden), (width, hidden), (hidden, width)]
    layer = [*attention, *mlp, (hidden,), (hidden,)]
    return [(151936, hidden), *layer * 36, (hidden,), (151936, hidden)]


QWEN3_8B = (8190735360, 399)
PRESETS = {"qwen3-8b": QWEN3_8B}


def sizes(P, N):
    """The shapes of N tensors of P elements: those of the preset, else as equal as can be."""
    if (P, N) == QWEN3_8B:
        return qwen3_8b()
    return [(P // N + (n < P % N),) for n in range(N)]


def tensors_of(kind, P, N):
    return [make(size) for make in kind for size in sizes(P, N)]


def normal(size):
    return torch.randn(size)


def square(size):
    """Of gradients, as exp_avg_sq holds them: not negative."""
    return torch.rand(size)


def lists(inputs, n):
    """The inputs as n lists of tensors that belong together item by item."""
    each = len(inputs) // n
    return [inputs[i * each : (i + 1) * each] for i in range(n)]


def optimizer(make, inputs):
    """An AdamW over the inputs [p, g, m, v], which it changes; (it, its parameters)."""
    params, grads, exp_avgs, exp_avg_sqs = lists(inputs, 4)
    for p, g in zip(params, grads, strict=True):
        p.requires_grad_().grad = g
    adamw = make(params)
    for p, m, v in zip(params, exp_avgs, exp_avg_sqs, strict=True):
        step = torch.full((), 9.0, dtype=torch.float32, device=p.device)
        adamw.state[p] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    return adamw, params


def stepper(adamw, inputs, before=None):
    """A function that does one step and returns what it changed."""
    params, _, exp_avgs, exp_avg_sqs = lists(inputs, 4)
    changed = [*params, *exp_avgs, *exp_avg_sqs]

    def step():
        if before:
            before()
        adamw.step()
        return changed

    return step


def torch_adamw(*inputs, **which):
    which = which or {"fused": True}
    adamw, _ = optimizer(lambda ps: torch.optim.AdamW(ps, lr=LR, **which), inputs)
    return stepper(adamw, inputs)


def torch_adamw_clip(*inputs):
    adamw, params = optimizer(lambda ps: torch.optim.AdamW(ps, lr=LR, fused=True), inputs)
    return stepper(adamw, inputs, lambda: torch.nn.utils.clip_grad_norm_(params, MAX_NORM))


def flatout_adamw(**options):
    def make(ft, *inputs):
        adamw, _ = optimizer(lambda ps: ft.AdamW(ps, lr=LR, **options), inputs)
        return stepper(adamw, inputs)

    return make


def flatout_peer(**options):
    make = flatout_adamw(**options)

    def peer(*inputs):
        import flatout.torch as ft

        return make(ft, *inputs)

    return peer


def clipped(P, N):
    """Gradients, and on the host half of their norm: the first max_norm, which all share."""
    half = torch.tensor([0.5 * P**0.5], dtype=torch.float64, device="cpu")
    return [*tensors_of((normal,), P, N), half]


def clipping(clip, *inputs):
    """A function that scales the gradients by 0.97 in every call. All that clip them share the
    last input, the next call's max_norm: one that is not below their norm leaves nothing to scale.
    3 % is more than bf16's roundings of norm, coefficient and gradients come to."""
    *grads, max_norm = inputs
    params, shared = [g.detach() for g in grads], max_norm.numpy()
    for p, g in zip(params, grads, strict=True):
        p.grad = g.detach()

    def step():
        norm = clip(params, float(shared[0]))
        shared[0] *= 0.97
        return [*params, norm]

    return step


def shapes(P):
    return dict(dims="P N", cpu=[(1 << 20, 1), (1 << 14, 7)], cuda=P, modes=("step",))


OPTIMIZER = {
    "adamw": Op(
        **shapes([(1 << 30, 1), QWEN3_8B]),
        inputs=lambda P, N: tensors_of((normal, normal, normal, square), P, N),
        torch=torch_adamw,
        flatout=flatout_adamw(),
        peers={
            "torch, foreach": lambda *inputs: torch_adamw(*inputs, foreach=True),
            STOCHASTIC: flatout_peer(stochastic_rounding=True),
        },
        random=(STOCHASTIC,),
        moved=lambda P, N: (7 * P, 0),  # reads p, g, m, v, writes p, m, v
    ),
    "adamw_clip": Op(
        **shapes([(1 << 30, 1), QWEN3_8B]),
        inputs=lambda P, N: tensors_of((normal, normal, normal, square), P, N),
        torch=torch_adamw_clip,
        flatout=flatout_adamw(max_grad_norm=MAX_NORM),
        moved=lambda P, N: (8 * P, 0),  # and the norm reads g
    ),
    "global_norm": Op(
        **shapes([(1 << 30, 1), QWEN3_8B]),
        inputs=lambda P, N: tensors_of((normal,), P, N),
        torch=lambda *grads: lambda: [torch.nn.utils.get_total_norm(grads)],
        flatout=lambda ft, *grads: lambda: [ft.global_norm(grads)],
        moved=lambda P, N: (P, 0),
    ),
    "clip_grad_norm_": Op(
        **shapes([(1 << 30, 1), QWEN3_8B]),
        inputs=clipped,
        torch=lambda *inputs: clipping(torch.nn.utils.clip_grad_norm_, *inputs),
        flatout=lambda ft, *inputs: clipping(ft.clip_grad_norm_, *inputs),
        moved=lambda P, N: (3 * P, 0),  # bf16: 2 bytes for the norm, 4 for the scaling
    ),
}
