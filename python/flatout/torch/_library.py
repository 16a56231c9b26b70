"""flatout's ops as torch sees them: one Op per entry point of csrc/ops.h.

An Op is a schema, a function that allocates the outputs, and a function that fills them. From
these three come the registered torch.ops.flatout op (for torch.compile and tensor subclasses: its
fake implementation is the allocation) and the direct call that eager mode takes, which skips the
dispatcher. Autograd lies outside, in each op's autograd.Function, whose backward the registered op
has, too: torch.export and make_fx leave nothing but the op.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd import function as _function
from torch.compiler import is_compiling

from .. import _C

LIBRARY = torch.library.Library("flatout", "FRAGMENT")
PLAIN = {Tensor, torch.nn.Parameter}
_tracing_state = torch._C._get_tracing_state
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_grad_enabled = torch.is_grad_enabled


def eager(x):
    """True where x can be handed to C: not for a compiler, a subclass, a dispatch mode,
    torch.jit.trace, or a transform of torch.func or forward-mode differentiation. (A tensor
    without memory may pass; the parser refuses it.)"""
    return not is_compiling() and type(x) in PLAIN and not _intercepted()


def _intercepted():
    """Something wants to see the calls of ops, not what they write."""
    return (
        _dispatch_modes()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
        or _functorch_level() is not None
    )


def _refuse_tangents(name, args):
    """Forward-mode differentiation would lose its tangents without a word."""
    for x in args:
        if isinstance(x, (list, tuple)):
            _refuse_tangents(name, x)
        elif isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"{name}: no forward-mode derivative (torch.func.jvp, forward_ad): use backward()"
            )


def has_memory(x):
    if x.is_meta:
        return False
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True


def all_tensors(*tensors):
    for x in tensors:
        if not isinstance(x, Tensor):
            return False
    return True


def expect_tensors(function, optional=(), **tensors):
    """Refuse what is no tensor, by its name; those in `optional` may be None."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (x is None and name in optional):
            raise _C.ArgumentTypeError(
                f"{function}: {name}: expected a torch tensor, got {type(x)!r}"
            )


class Op:
    """schema: torch's, without the namespace. outputs(*args) -> a tuple of new tensors, which
    may depend on shapes, dtypes and devices alone, with None for what is not asked for (from the
    registered op it comes as an empty tensor). fill(outputs, *args) computes them."""

    def __init__(self, schema, outputs, fill):
        self.outputs, self.fill = outputs, fill
        self.name = name = schema[: schema.index("(")]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, self.direct, key)
        torch.library.register_fake(f"flatout::{name}", self.fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.flatout, name).default

    def differentiable(self, inputs, function, setup, ask=None):
        """Gives the registered op the backward of `function`, an autograd.Function whose inputs
        begin as the op's. inputs: the indices of those that have a gradient. setup(ctx, inputs,
        outputs) leaves in ctx what function.forward does and returns the indices of the outputs
        whose gradients function.backward takes; the others are constants. ask(ctx, inputs) sets the
        flags among the inputs, a list, that ask for what only a backward needs (need_rstd, say),
        which eager mode passes itself, and a graph recorded without gradients does not."""
        self.inputs, self.gradient = inputs, _gradient(self, function, setup, ask)
        LIBRARY.impl(self.name, self.autograd, "Autograd", with_keyset=True)

    def autograd(self, keys, *args):
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        inputs = [args[n] for n in self.inputs]
        if _grad_enabled() and any([x is not None and x.requires_grad for x in inputs]):
            return apply(self.gradient, *args, keys)
        plain = all([type(x) in PLAIN for x in args if isinstance(x, Tensor)])
        if plain and not _dispatch_modes() and has_memory(args[0]):
            return self.direct(*args)  # spares compiled code the second way through the dispatcher
        return self.below_autograd(keys, *args)

    def below_autograd(self, keys, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return self.registered.redispatch(keys & torch._C._after_autograd_keyset, *args)

    def direct(self, *args):
        out = self.outputs(*args)
        self.fill(out, *args)
        return _returned(out, args)

    def fake(self, *args):
        return _returned(self.outputs(*args), args)

    def dispatched(self, *args):
        if not is_compiling() and forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        return self.registered(*args)

    def __call__(self, *args):
        if not eager(args[0]):
            return self.dispatched(*args)
        try:
            out = self.outputs(*args)
            self.fill(out, *args)
        except _C.ArgumentTypeError:
            if all(has_memory(x) for x in args if isinstance(x, Tensor)):
                raise
            return self.registered(*args)  # meta, or batched by grad(is_grads_batched=True)
        return out if len(out) > 1 else out[0]


class ListOp(Op):
    """An Op whose first argument is a list, which may be large: instead of looking at every
    tensor's type first, the direct call lets the parser refuse tensors without memory. It has no
    derivative: as a registered op it refuses what requires one."""

    def __init__(self, schema, outputs, fill):
        super().__init__(schema, outputs, fill)
        LIBRARY.impl(self.name, self.autograd, "Autograd", with_keyset=True)

    def autograd(self, keys, *args):
        flat = [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        if _grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in flat):
            raise RuntimeError(f"{self.name}: no derivative: call it under torch.no_grad()")
        return self.below_autograd(keys, *args)

    def __call__(self, *args):
        if is_compiling() or _intercepted() or (args[0] and args[0][0].is_meta):
            return self.dispatched(*args)
        return self.direct(*args)


def _returned(out, args):
    """What the registered op returns: one tensor, several, or nothing."""
    out = tuple(args[0].new_empty(0) if x is None else x for x in out)
    return out if len(out) > 1 else out[0] if out else None


# ---- Autograd -------------------------------------------------------------------------------


def needs_grad(*tensors):
    """True where the caller has to record the gradient: a compiler does so itself, from the
    registered op. (torch.export would trace a Function's forward alone, and not its backward.)"""
    if _grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return not is_compiling()
    return False


def apply(function, *args):
    """function.apply(*args), an autograd.Function's. Where nothing intercepts the call, past the
    method of that name, which spends as long on unwrapping functorch's tensors as all the rest."""
    if _functorch_level() is not None:
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)


def set_last_flag(ctx, inputs):
    """For Op.differentiable: asks an op whose last argument is need_rstd for rstd."""
    inputs[-1] = True


def _gradient(op, function, setup, ask):
    """The autograd.Function of a registered op: see Op.differentiable."""

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *inputs, keys = args
            if ask:
                ask(ctx, inputs)
            result = op.below_autograd(keys, *inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            ctx.differentiable = setup(ctx, inputs, outputs)
            constant = [x for n, x in enumerate(outputs) if n not in ctx.differentiable]
            ctx.mark_non_differentiable(*constant)
            return result

        @staticmethod
        def backward(ctx, *grads):
            grads = function.backward(ctx, *[grads[n] for n in ctx.differentiable])
            inputs = len(ctx.needs_input_grad)
            return (*grads, *[None] * inputs)[:inputs]

    return Gradient


def once_differentiable(backward):
    """torch's decorator, which costs nothing where no second derivative can be asked for, and which
    refuses one of a constant upstream gradient, too: torch's leaves that out without a word."""
    refusing = _function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if not _grad_enabled():
            return backward(ctx, *grads)
        return refusing(ctx, *(g if g is None else g.detach().requires_grad_() for g in grads))

    return wrapper


# ---- Arguments ------------------------------------------------------------------------------


def stream(x):
    """The handle of the current CUDA stream of x's device; 0 on the CPU."""
    return _current_stream(x.get_device()) if x.is_cuda else 0


def rows(x):
    """x as the ops can read it: with a contiguous last dimension and, on CUDA, leading dimensions
    that merge into one stride. Copies only where that does not hold."""
    if x.is_neg():
        x = x.resolve_neg()
    if x.is_contiguous():
        return x
    if x.stride(-1) != 1 or (x.is_cuda and not _merges(x)):
        return x.contiguous()
    return x


def _merges(x):
    pairs = [(n, s) for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True) if n != 1]
    return all(outer == n * s for (_, outer), (n, s) in zip(pairs[:-1], pairs[1:], strict=True))


def empty_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def stat_dtype(x):
    """The dtype of statistics beside x: float32, and float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def partial_rows(x, blocks=2):
    """How many partial sums a weight's gradient is made of: one for each block of a CUDA kernel
    that has at most so many on a multiprocessor. The number fixes the order of the sum."""
    return _C.multiprocessors(x.get_device()) * blocks or 1 if x.is_cuda else 64


def autocasts(x):
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)
