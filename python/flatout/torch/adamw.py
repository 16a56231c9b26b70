"""AdamW with the clipping folded in, and the global norm of gradients (formulas: csrc/ops.h).

Decoupled weight decay: Loshchilov and Hutter, 2019. The arithmetic is that of
torch.optim.AdamW(fused=True), so that the two continue each other's runs.
"""

import math
from operator import is_

import torch

from .. import _C
from .._numpy import two
from ._library import PLAIN, ListOp, all_tensors, expect_tensors, stream

PARTIALS = 1024  # partial norms; their number fixes the order of the sum

# ---- The registered ops ---------------------------------------------------------------------


def _stat_dtype(tensors):
    return torch.float64 if torch.float64 in [t.dtype for t in tensors] else torch.float32


def _contiguous(tensors):
    if all([t.is_contiguous() for t in tensors]):
        return tensors
    return [t.contiguous() for t in tensors]


def _norm_outputs(tensors, max_norm):
    like = dict(dtype=_stat_dtype(tensors), device=tensors[0].device)
    return torch.empty((), **like), torch.empty((), **like)


def _norm(out, tensors, max_norm):
    norm, coef = out
    partial = torch.empty(PARTIALS, dtype=norm.dtype, device=norm.device)
    _C.global_norm(norm, coef, partial, _contiguous(tensors), max_norm, stream(norm))


def _nothing(*args):
    return ()


def _scale(out, tensors, coef):
    _C.scale(tensors, coef, stream(coef))
    torch.autograd.graph.increment_version(tensors)


def _step(out, params, grads, exp_avgs, exp_avg_sqs, *rest):
    if not params:
        return
    _C.adamw_step(params, grads, exp_avgs, exp_avg_sqs, *rest, stream(params[0]))
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


_global_norm = ListOp(
    "global_norm(Tensor[] tensors, float max_norm) -> (Tensor, Tensor)", _norm_outputs, _norm
)
_scale_ = ListOp("scale_(Tensor(a!)[] tensors, Tensor coef) -> ()", _nothing, _scale)
_adamw_step_ = ListOp(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
    " Tensor(c!)[] exp_avg_sqs, Tensor[] steps, Tensor? coef, Tensor? grad_scale,"
    " Tensor? found_inf, Tensor? lr_tensor, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool maximize, bool stochastic_rounding, int seed) -> ()",
    _nothing,
    _step,
)


def _tensor_lists(function, **lists):
    """Lists of tensors; anything else is refused by its name."""
    result = []
    for name, tensors in lists.items():
        try:
            tensors = list(tensors)
        except TypeError:
            tensors = [tensors]
        if not all_tensors(*tensors):
            for x in tensors:
                expect_tensors(function, **{name: x})
        result.append(tensors)
    return result


# ---- The global norm ------------------------------------------------------------------------


def _reduce_over_mesh(square, mesh, placements):
    for dim, placement in enumerate(placements):
        if placement.is_shard():
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        elif not placement.is_replicate():
            raise NotImplementedError(f"global_norm: a DTensor placed as {placement}")
    return square


def _parts(tensors):
    """Lists of tensors with memory of their own, by device, mesh and placements."""
    if all(type(t) in PLAIN for t in tensors) and len({t.device for t in tensors}) == 1:
        return {(tensors[0].device, None, ()): tensors}
    parts = {}
    for t in tensors:
        if type(t) not in PLAIN and hasattr(t, "to_local"):
            key = t.device, t.device_mesh, tuple(t.placements)
            parts.setdefault(key, []).append(t.to_local())
        else:
            parts.setdefault((t.device, None, ()), []).append(t)
    return parts


def _norm_and_coef(tensors, max_norm):
    """The norm over all tensors and min(1, max_norm / (norm + 1e-6)), 0-dim, on the first
    tensor's device."""
    if not tensors:
        return torch.zeros(()), torch.ones(())
    parts = _parts(tensors)
    if len(parts) == 1 and all(mesh is None for _, mesh, _ in parts):
        return _global_norm(tensors, max_norm)
    squares = []
    for (_, mesh, placements), part in parts.items():
        square = _global_norm(part, 0.0)[0].double().square()
        squares.append(_reduce_over_mesh(square, mesh, placements) if mesh else square)
    device = squares[0].device
    norm = sum(square.to(device) for square in squares).sqrt()
    dtype = _stat_dtype(tensors)
    return norm.to(dtype), (max_norm / (norm + 1e-6)).clamp(max=1).to(dtype)


def _strided(tensors, what):
    if any([t.is_complex() for t in tensors]):
        raise RuntimeError(f"{what}: complex gradients are not supported")
    if any([t.layout is not torch.strided for t in tensors]):
        raise RuntimeError(f"{what}: sparse gradients are not supported")
    return tensors


@torch.no_grad()
def global_norm(tensors) -> torch.Tensor:
    """sqrt of the sum of squares over all tensors: 0-dim float32 (float64 where one of them is)
    on the first one's device, always summed in the same order. DTensors are reduced over their
    mesh. The gradient is not tracked."""
    (tensors,) = _tensor_lists("global_norm", tensors=tensors)
    return _norm_and_coef(_strided(tensors, "global_norm"), 0.0)[0]


@torch.no_grad()
def clip_grad_norm_(
    parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach=None,
) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ for the 2-norm: scales the gradients of `parameters` (a
    tensor or an iterable) in place by min(1, max_norm / (norm + 1e-6)) and returns the norm, both
    without a synchronization. Gradients that need no clipping are not written. `foreach` is
    accepted and without effect; another norm_type raises NotImplementedError."""
    if norm_type != 2:
        raise NotImplementedError(f"clip_grad_norm_: norm_type={norm_type}, only 2.0 is supported")
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: max_norm: expected a number >= 0, got {max_norm}")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else parameters
    (parameters,) = _tensor_lists("clip_grad_norm_", parameters=parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm, coef = _norm_and_coef(_strided(grads, "clip_grad_norm_"), float(max_norm))
    if error_if_nonfinite and not norm.isfinite():
        raise RuntimeError(f"clip_grad_norm_: the norm of the gradients is {norm.item()}")
    for (device, _, _), part in _parts(grads).items():
        factor = coef.to(device, _stat_dtype(part))
        _scale_([t for t in part if t.is_contiguous()], factor)
        for t in part:
            if not t.is_contiguous():
                t.mul_(factor)
    return norm


# ---- The step -------------------------------------------------------------------------------


def _order(t):
    """The dimensions from the largest stride to the smallest; None for a contiguous tensor."""
    if t.is_contiguous():
        return None
    return sorted(range(t.dim()), key=lambda d: (-t.stride(d), -t.size(d)))


def _in_order(t, order):
    return t if order is None else t.permute(order)


def adamw_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    *,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=1e-2,
    maximize=False,
    stochastic_rounding=False,
    seed=0,
    coef=None,
    grad_scale=None,
    found_inf=None,
) -> None:
    """One AdamW step over lists of contiguous tensors on one device, in place.

    params and grads of one dtype, exp_avgs and exp_avg_sqs of one dtype, equal shapes item by
    item. steps: the number of this step (from 1), or a list with a float32 tensor of one element
    per parameter that counts this step already. lr: a float, or a float32 tensor on the device.
    coef (1 element, float32, float64 for float64 params): multiplies every gradient; grad_scale
    (float32): divides it; found_inf (float32): not 0, nothing changes. stochastic_rounding: of
    bfloat16 params and states, a function of seed, step and place in the list alone.
    """
    params, grads, exp_avgs, exp_avg_sqs = _tensor_lists(
        "adamw_step", params=params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs
    )
    beta1, beta2 = two(betas, "adamw_step", "betas")
    if not isinstance(steps, (list, tuple)):
        device = params[0].device if params else None
        steps = [torch.full((), float(steps), dtype=torch.float32, device=device)] * len(params)
    lr_tensor = lr if isinstance(lr, torch.Tensor) else None
    lr = 0.0 if lr_tensor is not None else float(lr)
    if lr < 0:
        raise ValueError(f"adamw_step: lr: expected a number >= 0, got {lr}")
    with torch.no_grad():
        _adamw_step_(
            params, grads, exp_avgs, exp_avg_sqs, list(steps), coef, grad_scale, found_inf,
            lr_tensor, lr, float(beta1), float(beta2), float(eps), float(weight_decay),
            bool(maximize), bool(stochastic_rounding), int(seed),
        )  # fmt: skip


def _local(t):
    return t if type(t) in PLAIN or not hasattr(t, "to_local") else t.to_local()


class _Bucket:
    """Parameters of one group that one call updates: of one device and dtypes."""

    def __init__(self, seed):
        self.seed, self.params, self.states, self.plain = seed, [], [], True

    def add(self, param, state):
        self.params.append(param)
        self.states.append(state)

    def match(self):
        """Lays the states out in memory as their parameters are. True where a layout has changed:
        to(memory_format=...) changes the parameters', a state_dict brings the states' own."""
        plain, changed = all(type(p) in PLAIN and p.is_contiguous() for p in self.params), False
        for p, state in zip(self.params, self.states, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                if (t := state[name]).stride() != p.stride():
                    state[name] = torch.empty_like(p, dtype=t.dtype).copy_(t)
                    changed |= state[name].stride() != t.stride()
        changed, self.plain = changed or plain != self.plain, plain
        return changed

    def tensors(self, grads):
        """The lists that the call takes: params, grads, exp_avgs, exp_avg_sqs."""
        params = self.params
        exp_avgs = [s["exp_avg"] for s in self.states]
        exp_avg_sqs = [s["exp_avg_sq"] for s in self.states]
        if not self.plain:
            params = [_local(p) for p in params]
            orders = [_order(p) for p in params]
            params, grads, exp_avgs, exp_avg_sqs = (
                [_in_order(_local(t), order) for t, order in zip(tensors, orders, strict=True)]
                for tensors in (params, grads, exp_avgs, exp_avg_sqs)
            )
        return params, _contiguous(grads), exp_avgs, exp_avg_sqs


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW(fused=True), clipping included.

    params: tensors, (name, tensor) pairs or groups with options of their own (lr, betas, eps,
    weight_decay, maximize, stochastic_rounding). lr: a float or a tensor of one element.
    max_grad_norm: scale the gradients of all groups together by min(1, max_grad_norm / (norm +
    1e-6)) on their way into the update; neither .grad is written nor the host waits, and
    `grad_norm` holds the norm as a device-side tensor. stochastic_rounding: round bfloat16
    parameters and states up or down at random, so that small updates are not lost; the choice
    depends on the step and the element's place alone. state_dict() is torch.optim.AdamW's.
    GradScaler is supported (a step with infinite gradients changes nothing), sparse and complex
    gradients are not (RuntimeError). foreach, capturable and fused are accepted and change nothing;
    amsgrad=True and differentiable=True raise NotImplementedError."""

    _step_supports_amp_scaling = True
    max_grad_norm = None

    def __init__(
        self,
        params,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach=None,
        capturable=False,
        differentiable=False,
        fused=None,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
    ):
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"AdamW: max_grad_norm: expected a number >= 0, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self._norm = [None]  # a list: torch.compile up to 2.11 lets step() set no attribute
        self._plans = {}
        # foreach, capturable and fused are there for torch.optim.AdamW to load our state_dict.
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad,
            maximize=maximize, foreach=None, capturable=False, differentiable=differentiable,
            fused=True, decoupled_weight_decay=True, stochastic_rounding=stochastic_rounding,
        )  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        self._plans = {}
        params = self.param_groups[-1]["params"]
        try:
            _check_options(self.param_groups[-1])
            if len({id(p) for p in params}) != len(params):
                raise ValueError("AdamW: params: a parameter is listed twice")
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self):
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def __setstate__(self, state):
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            _check_options({**defaults, **group})
        super().__setstate__(state)
        self._norm = [None]
        self._plans = {}
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            group |= dict(fused=True, foreach=None, capturable=False)
            for p in group["params"]:
                if self.state.get(p):
                    step = torch.as_tensor(self.state[p]["step"])
                    self.state[p]["step"] = step.to(p.device, torch.float32)

    @property
    def grad_norm(self):
        """Of the last step with max_grad_norm: the norm of all gradients, a tensor (), or None."""
        return self._norm[0]

    @torch.no_grad()
    def step(self, closure=None):
        """One step; `closure` computes the loss again and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for index, group in enumerate(self.param_groups):
            _check_numbers(group)
            for bucket in self._buckets(index, group):
                grads = _strided([p.grad for p in bucket.params], "AdamW")
                work.append((group, bucket, grads))
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        coef = self._clip([g for _, _, grads in work for g in grads], grad_scale)
        for group, bucket, grads in work:
            try:
                self._update(group, bucket, grads, coef, grad_scale, found_inf)
            except _C.ArgumentValueError:  # nothing of the bucket is written
                if not bucket.match():
                    raise
                self._update(group, bucket, grads, coef, grad_scale, found_inf)
        return loss

    def _buckets(self, index, group):
        """The group's parameters with a gradient, from the last step where they are the same."""
        params = [p for p in group["params"] if p.grad is not None]
        known, states, buckets = self._plans.get(index, ((), (), ()))
        if (
            len(known) == len(params)
            and len(states) == len(self.state)
            and all(map(is_, known, params))
            and all(map(is_, states, self.state.values()))
        ):
            return buckets
        buckets = {}
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            key = p.device, p.dtype, state["exp_avg"].dtype
            if key not in buckets:
                buckets[key] = _Bucket(index << 16 | len(buckets))
            buckets[key].add(p, state)
        buckets = list(buckets.values())
        for bucket in buckets:
            bucket.match()
        self._plans[index] = params, list(self.state.values()), buckets
        return buckets

    def _clip(self, grads, grad_scale):
        """The clip coefficient of gradients that are still multiplied by grad_scale."""
        if self.max_grad_norm is None or not grads:
            return None
        norm, coef = _norm_and_coef(grads, float(self.max_grad_norm))
        if grad_scale is not None:
            norm = norm / grad_scale.to(norm.device).reshape(())
            coef = (self.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        self._norm[0] = norm
        return coef

    def _update(self, group, bucket, grads, coef, grad_scale, found_inf):
        params, grads, exp_avgs, exp_avg_sqs = bucket.tensors(grads)
        device, steps = params[0].device, [s["step"] for s in bucket.states]
        counted = 1.0
        if found_inf is not None:
            found_inf = found_inf.to(device, torch.float32)
            # A list, even of one tensor: a tensor on its own would be read on the host.
            counted = [(found_inf == 0).float().reshape(())] * len(steps)
        if grad_scale is not None:
            grad_scale = grad_scale.to(device, torch.float32)
        if coef is not None:
            coef = coef.to(device, _stat_dtype(params[:1]))
        lr, lr_tensor = group["lr"], None
        if isinstance(lr, torch.Tensor) and not lr.is_cpu:
            lr, lr_tensor = 0.0, lr.to(device, torch.float32)
        torch._foreach_add_(steps, counted)
        try:
            _adamw_step_(
                params, grads, exp_avgs, exp_avg_sqs, steps, coef, grad_scale, found_inf,
                lr_tensor, float(lr), float(group["betas"][0]), float(group["betas"][1]),
                float(group["eps"]), float(group["weight_decay"]), bool(group["maximize"]),
                bool(group["stochastic_rounding"]), bucket.seed,
            )  # fmt: skip
        except Exception:
            torch._foreach_sub_(steps, counted)
            self._plans = {}
            raise


def _check_numbers(group):
    """Of every group before any is updated: a schedule may have set them. Those on a device are not
    waited for."""
    betas = group["betas"]
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"AdamW: betas: expected two numbers in 0 .. 1, 1 excluded, got {betas}")
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if not isinstance(value, torch.Tensor) and not 0 <= value < math.inf:
            raise ValueError(f"AdamW: {name}: expected a finite number >= 0, got {value}")


def _check_options(group):
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError(f"AdamW: lr: expected a tensor of one element, got {lr.numel()}")
    if isinstance(lr, torch.Tensor) and not lr >= 0:
        raise ValueError(f"AdamW: lr: expected a number >= 0, got {lr}")
    _check_numbers(group)
    for name in ("amsgrad", "differentiable"):
        if group[name]:
            raise NotImplementedError(f"AdamW: {name}=True is not supported")
