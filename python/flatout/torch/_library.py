"""flatout's ops as torch sees them: one Op per entry point of csrc/ops.h.

An Op is a schema, a function that allocates the outputs, and a function that fills them. From
these three come the registered torch.ops.flatout op (for torch.compile and tensor subclasses: its
fake implementation is the allocation) and the direct call that eager mode takes, which skips the
dispatcher. Autograd lies outside, in each op's autograd.Function.
"""

import torch

LIBRARY = torch.library.Library("flatout", "FRAGMENT")
PLAIN = (torch.Tensor, torch.nn.Parameter)


def eager(x):
    """True where x can be handed to C: not for a compiler, a subclass or a dispatch mode."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in PLAIN
        and not torch._C._len_torch_dispatch_stack()
    )


class Op:
    """schema: torch's, without the namespace. outputs(*args) -> a tuple of new tensors, which
    may depend on shapes, dtypes and devices alone. fill(outputs, *args) computes them."""

    def __init__(self, schema, outputs, fill):
        self.outputs, self.fill = outputs, fill
        name = schema[: schema.index("(")]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, self.direct, key)
        torch.library.register_fake(f"flatout::{name}", self.fake, lib=LIBRARY)
        self.registered = getattr(torch.ops.flatout, name).default

    def direct(self, *args):
        out = self.outputs(*args)
        self.fill(out, *args)
        return _returned(out)

    def fake(self, *args):
        return _returned(self.outputs(*args))

    def __call__(self, *args):
        return self.direct(*args) if eager(args[0]) else self.registered(*args)


class ListOp(Op):
    """An Op whose first argument is a list, which may be large: instead of looking at every
    tensor's type first, the direct call lets the parser refuse tensors without memory."""

    def __call__(self, *args):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self.registered(*args)
        return self.direct(*args)


def _returned(out):
    return out if len(out) > 1 else out[0] if out else None


def stream(x):
    """The handle of the current CUDA stream of x's device; 0 on the CPU."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


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


def partial_rows(x):
    """How many partial sums a weight's gradient is made of: it fixes the order of the sum."""
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count * 2
    return 64


def needs_grad(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
