"""Time functions side by side: interleaved, medians, a cold L2 cache on CUDA."""

import gc
import time
from dataclasses import dataclass

import torch

FLUSH = 256 << 20  # bytes written between calls: five times the L2 cache of an H100


@dataclass
class Timing:
    """Milliseconds: the median and the 20 % and 80 % quantiles, and MiB a call takes at its peak
    beyond what was there before (None on a CPU)."""

    median: float
    low: float
    high: float
    peak_mib: float = None


class Clock:
    """Milliseconds of one call: between CUDA events, or by the time of day on a CPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        if self.cuda:
            self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def start(self, prepare, function):
        """Run function(prepare()), timing the function alone; returns what ms() turns into a time,
        later, so that calls can queue."""
        state = prepare()
        if not self.cuda:
            began = time.perf_counter()
            function(state)
            return 1e3 * (time.perf_counter() - began)
        self.flush.zero_()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        function(state)
        marks[1].record()
        return marks

    def ms(self, handle):
        if not self.cuda:
            return handle
        handle[1].synchronize()
        return handle[0].elapsed_time(handle[1])


def peak_mib(prepare, function):
    state = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(state)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def alone(function):
    """The pair (prepare, function) of a function that needs no preparation."""
    return lambda: None, lambda _: function()


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def compare(functions, device, budget_s=1.0):
    """name -> Timing of every (prepare, function), called in turn for about budget_s each."""
    clock, samples = Clock(device), {name: [] for name in functions}
    longest = 0.0
    for function in functions.values():  # warm: compilers, caches, allocator
        clock.ms(clock.start(*function))
        longest = max(longest, clock.ms(clock.start(*function)))
    rounds = max(5, min(200, int(1e3 * budget_s / max(longest, 1e-3))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            handles = {name: clock.start(*function) for name, function in functions.items()}
            for name, handle in handles.items():
                samples[name].append(clock.ms(handle))
    finally:
        gc.enable()
    return {
        name: Timing(
            *(quantile(samples[name], q) for q in (0.5, 0.2, 0.8)),
            peak_mib(*function) if device == "cuda" else None,
        )
        for name, function in functions.items()
    }


def copy_ceiling(device):
    """GB/s of a device copy, read and written: what an op bound by memory can reach."""
    size = 1 << 30 if device == "cuda" else 1 << 26
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / 1e6 / compare({"copy": alone(lambda: y.copy_(x))}, device)["copy"].median


def matmul_ceiling(device, dtype):
    """TFLOPS of torch's matmul: what an op bound by arithmetic can reach."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / 1e9 / compare({"matmul": alone(lambda: a @ b)}, device)["matmul"].median
