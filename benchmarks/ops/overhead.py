"""What a call costs beside its work: one row of 64 numbers, in microseconds."""

import gc
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

import flatout
import flatout.torch
from flatout import _C

CALLS, BATCHES = 500, 60


def measure(function):
    """(best, median) microseconds a call, of BATCHES batches of CALLS calls."""
    for _ in range(CALLS):
        function()
    times = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(BATCHES):
            began = time.perf_counter()
            for _ in range(CALLS):
                function()
            times.append(1e6 * (time.perf_counter() - began) / CALLS)
    finally:
        gc.enable()
    return min(times), statistics.median(times)


def cases(device):
    """(what, the most it may cost or None, function), best read from top to bottom."""
    a, b, c, stat = (np.ones((1, 64), np.float32) for _ in range(4))
    w, rstd = b[0], stat[0, :1]
    x, y, wt = (torch.ones(size, device=device) for size in ((1, 64), (1, 64), (64,)))
    rt = torch.ones(1, device=device)
    xg, wg = x.clone().requires_grad_(), wt.clone().requires_grad_()
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    return [
        ("_C.rms_norm_fwd, outputs given, NumPy", 1.0,
         lambda: _C.rms_norm_fwd(c, rstd, a, w, 1e-6, 0.0, 0)),
        ("_C.rms_norm_fwd, outputs given, torch", 1.0,
         lambda: _C.rms_norm_fwd(y, rt, x, wt, 1e-6, 0.0, stream)),
        ("flatout.rms_norm, NumPy", 2.0, lambda: flatout.rms_norm(a, w)),
        ("flatout.torch.rms_norm, no grad", 6.0, lambda: flatout.torch.rms_norm(x, wt)),
        ("flatout.torch.rms_norm, with grad", 25.0, lambda: flatout.torch.rms_norm(xg, wg)),
        ("np.add, output given", None, lambda: np.add(a, b, out=c)),
        ("torch.add, output given", None, lambda: torch.add(x, y, out=y)),
        ("torch.empty_like", None, lambda: torch.empty_like(x)),
        ("F.rms_norm, no grad", None, lambda: F.rms_norm(x, (64,), wt, 1e-6)),
        ("F.rms_norm, with grad", None, lambda: F.rms_norm(xg, (64,), wg, 1e-6)),
    ]  # fmt: skip


def table(device):
    """The table of call overheads, as lines of text. On one thread: waking others is work."""
    _C.set_num_threads(1)
    yield f"{'one call, 64 numbers':40}{'best us':>9}{'median us':>11}{'at most':>9}"
    for what, limit, function in cases(device):
        best, median = measure(function)
        over = "  over" if limit and best > limit else ""
        yield f"{what:40}{best:9.2f}{median:11.2f}{limit if limit else '-':>9}{over}"
