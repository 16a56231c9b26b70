"""Guard bands around every array that reaches flatout._C.

While guarded() lasts, an entry point gets copies of its arrays, each in a block of its own between
two bands of bytes 0xff (NaN in every float dtype), with the strides and the alignment of the
original; the gaps between strided rows are filled alike, and so is everything that the op has to
write. Afterwards the bands, the gaps and all inputs must be as they were, and the outputs filled.
"""

import contextlib

import torch

from flatout import _C

BAND = 4096  # bytes

# How many arguments, from the first, are outputs or scratch; which of them are scratch, which need
# not be filled; and which arguments, lists included, are read and written.
OUTPUTS = {
    "rms_norm_fwd": 2, "rms_norm_bwd": 3, "add_rms_norm_fwd": 3, "add_rms_norm_bwd": 3,
    "swiglu_fwd": 1, "swiglu_bwd": 2, "rope_fwd": 2, "rope_bwd": 2, "qk_norm_rope_fwd": 4,
    "qk_norm_rope_bwd": 6, "cross_entropy_fwd": 7, "cross_entropy_bwd": 2, "embedding_fwd": 1,
    "embedding_bwd": 3, "linear_cross_entropy_fwd": 13, "linear_cross_entropy_bwd": 8,
    "global_norm": 3, "attention_fwd": 3, "attention_bwd": 4,
}  # fmt: skip
SCRATCH = {
    "rms_norm_bwd": (2,), "add_rms_norm_bwd": (2,), "qk_norm_rope_bwd": (4, 5),
    "cross_entropy_fwd": (6,), "cross_entropy_bwd": (1,), "global_norm": (2,),
    "linear_cross_entropy_fwd": (8, 9, 10, 11, 12), "linear_cross_entropy_bwd": (3, 4, 5, 6, 7),
    "attention_fwd": (2,), "attention_bwd": (3,), "embedding_bwd": (1, 2),
}  # fmt: skip
UPDATED = {"scale": (0,), "adamw_step": (0, 2, 3)}


class Guarded:
    """A copy of the tensor t between two bands. role: input, output, scratch or updated."""

    def __init__(self, t, role):
        self.original, self.role = t, role
        extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        size = t.element_size()
        self.lead = BAND + t.data_ptr() % 256
        self.bytes = torch.full(
            (self.lead + extent * size + BAND,), 255, dtype=torch.uint8, device=t.device
        )
        self.flat = self.bytes[self.lead : self.lead + extent * size].view(t.dtype)
        place = torch.arange(extent, device=t.device)
        self.place = place.as_strided(t.shape, t.stride()).reshape(-1)
        self.copy = self.flat.as_strided(t.shape, t.stride(), self.flat.storage_offset())
        if role in ("input", "updated"):
            self.flat[self.place] = t.detach().reshape(-1)
        self.before = self.bytes.clone()

    def check(self, name):
        after = self.bytes.clone()
        if self.role != "input":
            inside = after[self.lead : -BAND].view(self.flat.dtype)
            want = self.before[self.lead : -BAND].view(self.flat.dtype)
            inside[self.place] = want[self.place]
        assert torch.equal(after, self.before), (
            f"{name}: {'changed' if self.role == 'input' else 'written outside'}"
        )
        if self.role in ("output", "updated"):
            unwritten = self.copy.isnan() if self.copy.is_floating_point() else self.copy == -1
            assert not unwritten.any(), f"{name}: not written throughout, or NaN"
            self.original.detach().copy_(self.copy)


def _role(entry, index):
    if index in UPDATED.get(entry, ()):
        return "updated"
    if index in SCRATCH.get(entry, ()):
        return "scratch"
    return "output" if index < OUTPUTS.get(entry, 0) else "input"


def _wrapped(entry, function, calls):
    def call(*args):
        known = {}

        def guard(t, index):
            if not isinstance(t, torch.Tensor) or not t.numel():
                return t
            key = t.data_ptr(), t.shape, t.stride(), t.dtype
            role = _role(entry, index)
            if key not in known:
                known[key] = Guarded(t, role), f"{entry}: argument {index}"
            elif role != known[key][0].role:  # an output over its input
                known[key] = Guarded(t, "updated"), f"{entry}: argument {index}"
            return key

        def copy_of(key):
            return known[key][0].copy if isinstance(key, tuple) else key

        keys = [
            [guard(t, i) for t in a] if isinstance(a, (list, tuple)) else guard(a, i)
            for i, a in enumerate(args)
        ]
        function(*([copy_of(k) for k in a] if isinstance(a, list) else copy_of(a) for a in keys))
        assert known, f"{entry}: no array among its arguments"
        for guarded, name in known.values():
            guarded.check(name)
        calls.append(entry)

    return call


@contextlib.contextmanager
def guarded():
    """Yields the list of the entry points called so far."""
    calls, functions = [], {}
    for entry in (*OUTPUTS, *UPDATED):
        functions[entry] = getattr(_C, entry)
        setattr(_C, entry, _wrapped(entry, functions[entry], calls))
    try:
        yield calls
    finally:
        for entry, function in functions.items():
            setattr(_C, entry, function)
