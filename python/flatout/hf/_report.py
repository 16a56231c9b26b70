"""report(model): which op runs where, and why not."""

import re

import torch

from . import _fuse, _loss, _probe
from ._attention import NAME
from ._patch import REASONS, pretrained
from ._swap import active

FLATOUT = "flatout"


class Report(dict):
    """{module name: {op: "flatout" or the reason why not}}; printed with equal layers merged."""

    def __str__(self):
        counts = {}
        for name, ops in self.items():
            for op, state in ops.items():
                row = op, re.sub(r"\b\d+\b", "*", name) or "(model)", state
                counts[row] = counts.get(row, 0) + 1
        rows = [("op", "where", "", "state")]
        rows += [(op, name, f"x{n}", state) for (op, name, state), n in sorted(counts.items())]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )

    __repr__ = __str__

    def active(self, op):
        """The names of the modules in which flatout runs this op."""
        return [name for name, ops in self.items() if ops.get(op) == FLATOUT]


def _state(module, op):
    """What runs `op` in this module now: found from the module itself, not from what was asked."""
    if "forward" in module.__dict__:
        kernel = getattr(module.__dict__["forward"], "__func__", None)
        if getattr(kernel, "__module__", "") == "flatout.hf._kernelize":
            return FLATOUT
        return "its forward is replaced on the instance"
    swapped = active(type(module))
    if op in swapped:
        return (op == "linear_cross_entropy" and _loss.unfit(module)) or FLATOUT
    if op == "linear_cross_entropy" and _loss.OF_HIDDEN in swapped:
        return _loss.not_plain(module.lm_head) or FLATOUT
    return REASONS.get(module, {}).get(op, "not asked for")


def report(model: torch.nn.Module) -> Report:
    """A Report of the RMSNorm, SwiGLU, rope, attention, decoder layer and loss modules."""
    implementation = pretrained(model).config._attn_implementation
    found = Report()
    for name, module in model.named_modules():
        ops = {}
        if _probe.norm_eps(module) is not None:
            ops["rms_norm"] = _state(module, "rms_norm")
        if _probe.mlp_parts(module):
            ops["swiglu"] = _state(module, "swiglu")
        if _probe.is_attention(module):
            ops["rope"] = _state(module, "rope")
            reason = REASONS.get(module, {}).get("attention", "not asked for")
            state = FLATOUT if module.config._attn_implementation == NAME else reason
            ops["attention"] = state if state == FLATOUT else f"{implementation}: {state}"
        if _fuse.is_decoder_layer(module):
            ops["fused layer"] = _state(module, "fused layer")
        if _loss.is_causal_lm(module):
            ops["linear_cross_entropy"] = _state(module, "linear_cross_entropy")
        if isinstance(module, torch.nn.Embedding):
            ops["embedding"] = _state(module, "embedding")
        if ops:
            found[name] = ops
    return found
