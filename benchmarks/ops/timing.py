"""Time functions side by side: in turn, medians; on CUDA the GPU's time, with a cold L2 cache
and the host always ahead, and beside it the time of day that a whole call takes."""

import gc
import random
import time
from dataclasses import dataclass

import torch

FLUSH = 256 << 20  # bytes written between calls: five times the L2 cache of an H100
CYCLES_PER_US = 2000  # of torch.cuda._sleep: an H100 runs at 1980 MHz at most
LONGEST_US = 20_000  # what a host may take for one call; beyond, its time is in the figure
COPY = "device copy"
COPY_MOST = 1 << 31  # bytes that a copy reads and writes together
LOOPS = 5  # of whole calls, of every function
STATES = 4 << 30  # bytes that the graphs of one loop of whole calls may hold


@dataclass
class Timing:
    """Milliseconds: the median and the 20 % and 80 % quantiles of the GPU's time (on a CPU: of the
    time of day); of one whole call in loops of them, host included; MiB a call takes at its peak
    beyond what was there before (the last two None on a CPU); and the share of the samples in
    which the GPU waited for the host."""

    median: float
    low: float
    high: float
    call: float = None
    peak_mib: float = None
    late: float = 0.0


class Clock:
    """Milliseconds of one call: between CUDA events, or by the time of day on a CPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.ahead_us = {}  # name -> how long the GPU is kept busy while the host enqueues
        if self.cuda:
            self.flush = torch.empty(FLUSH, dtype=torch.uint8, device="cuda")

    def start(self, name, prepare, function):
        """Run function(prepare()), timing the function alone; returns what ms() turns into a time,
        later, so that calls can queue. Taken again where the host was late."""
        while True:
            if not self.cuda:
                return self._by_the_day(prepare, function)
            ahead = self.ahead_us.setdefault(name, 100)
            *marks, late = self._by_events(prepare, function, ahead)
            if not late or ahead >= LONGEST_US:
                return *marks, late
            self.ahead_us[name] = 2 * ahead

    @staticmethod
    def _by_the_day(prepare, function):
        state = prepare()
        began = time.perf_counter()
        function(state)
        return 1e3 * (time.perf_counter() - began)

    def _by_events(self, prepare, function, ahead_us):
        """The two events, and whether the GPU reached the first before all was enqueued. The flush
        comes last: it leaves nothing of the inputs in L2."""
        state = prepare()
        torch.cuda._sleep(ahead_us * CYCLES_PER_US)
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function(state)
        end.record()
        return begin, end, begin.query()

    def ms(self, handle):
        if not self.cuda:
            return handle
        begin, end, _ = handle
        end.synchronize()
        return begin.elapsed_time(end)


def peak_mib(prepare, function):
    state = prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(state)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def loop_length(prepare, expected_ms, budget_s):
    """How many calls fill the budget, in as many graphs as memory may hold at once."""
    before = torch.cuda.memory_allocated()
    state = prepare()
    size = torch.cuda.memory_allocated() - before
    del state
    return max(2, min(50, STATES // max(size, 1) - 1, int(1e3 * budget_s / max(expected_ms, 0.02))))


def loop_ms(prepare, function, calls):
    """Milliseconds of one call in a loop without a flush, until the last is done: the larger of
    the host's time and the GPU's. A first call, not timed, replaces what L2 held."""
    states = [prepare() for _ in range(calls + 1)]
    function(states.pop())
    torch.cuda.synchronize()
    start = time.perf_counter()
    while states:
        function(states.pop())
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def whole_calls(functions, expected_ms, budget_s, turns):
    """name -> milliseconds of a whole call: the median over rounds in which every function has one
    loop, in an order that changes: what ran before has left the GPU warm or cool."""
    calls = {
        name: loop_length(prepare, expected_ms[name], budget_s / LOOPS)
        for name, (prepare, _) in functions.items()
    }
    times = {name: [] for name in functions}
    for _ in range(LOOPS):
        for name in turns.sample(list(functions), len(functions)):
            times[name].append(loop_ms(*functions[name], calls[name]))
    return {name: quantile(found, 0.5) for name, found in times.items()}


def alone(function):
    """The pair (prepare, function) of a function that needs no preparation."""
    return lambda: None, lambda _: function()


def quantile(values, q):
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


def reason(error):
    first = (str(error).strip() or "failed").split("\n")[0]
    return f"{type(error).__name__}: {first}"


def warmed(clock, functions):
    """Those that run (compilers, caches and allocator are warm now), and why the others do not."""
    able, failed = {}, {}
    for name, function in functions.items():
        try:
            for _ in range(2):  # first without the clock: a compiler would look like a slow host
                prepare, timed = function
                timed(prepare())
            clock.ms(clock.start(name, *function))
            able[name] = function
        except Exception as error:
            failed[name] = reason(error)
    return able, failed


def compare(functions, device, budget_s=1.0):
    """(name -> Timing of every (prepare, function), called in turn for about budget_s each;
    name -> the reason of every one that failed). Each round has an order of its own: a GPU at its
    power limit is slower after a function that heats than after one that waits for the host."""
    clock = Clock(device)
    functions, failed = warmed(clock, functions)
    handles = {name: [] for name in functions}
    samples = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        deadline, rounds = time.perf_counter() + budget_s * len(functions), 0
        turns = random.Random(0)
        while rounds < 5 or (rounds < 200 and time.perf_counter() < deadline):
            for name in turns.sample(list(functions), len(functions)):
                handles[name].append(clock.start(name, *functions[name]))
            for name, found in handles.items():
                samples[name].append(clock.ms(found[-1]))
            rounds += 1
        found = {n: Timing(*(quantile(samples[n], q) for q in (0.5, 0.2, 0.8))) for n in functions}
        if clock.cuda:
            add_whole_calls(found, functions, handles, budget_s, turns)
        return found, failed
    finally:
        gc.enable()


def add_whole_calls(found, functions, handles, budget_s, turns):
    """Set what only CUDA has of every Timing in `found`."""
    medians = {name: timing.median for name, timing in found.items()}
    for name, ms in whole_calls(functions, medians, budget_s / 3, turns).items():
        found[name].call = ms
        found[name].peak_mib = peak_mib(*functions[name])
        found[name].late = sum(late for *_, late in handles[name]) / len(handles[name])


def copy(size, device):
    """A copy within the device that reads and writes `size` bytes together, at most COPY_MOST; and
    how many it moves."""
    n = max(1, min(size, COPY_MOST) // 2)
    x = torch.zeros(n, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return alone(lambda: y.copy_(x)), 2 * n


def copy_ceiling(device):
    """TB/s of a device copy, read and written: what an op bound by memory can reach."""
    function, moved = copy(COPY_MOST if device == "cuda" else 1 << 27, device)
    return moved / 1e9 / compare({COPY: function}, device)[0][COPY].median


def matmul_ceiling(device, dtype):
    """TFLOPS of torch's matmul: what an op bound by arithmetic can reach."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    b = torch.randn(n, n, device=device, dtype=dtype)
    found, _ = compare({"matmul": alone(lambda: a @ b)}, device)
    return 2 * n**3 / 1e9 / found["matmul"].median
