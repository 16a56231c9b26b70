"""What a call costs the host beside the work: each op on one row, in microseconds.

"_C" is the call into the extension module with the outputs given, as the public function makes it;
on CUDA it ends with the launch. "_C, no rows" is that call without a row, which has nothing to
launch: what comes before the launch (the losses and the norm launch a sum over nothing, embedding's
backward clears a table: no figure). "grad": the forward that records a graph; of a backward,
torch.autograd.grad."""

import gc
import time
from functools import partial

import numpy as np
import torch

import flatout
import flatout.torch
from flatout import _C
from ops import OPS, results, table

CALLS, BATCHES, SECONDS = 100, 60, 0.2
STATISTIC = {"statistic": "quickest"}  # of the batches: what measure() gives
LIMIT = 1.0  # of _C before the launch
TINY = {"T H": (1, 64), "S B Hq Hk D": (1, 1, 2, 1, 64), "T V": (1, 64), "T V H": (1, 16, 64),
        "P N": (64, 1)}  # fmt: skip
LAUNCHES_ANYWAY = ("cross_entropy", "cross_entropy backward", "embedding backward",
                   "embedding_padded backward", "adamw_clip", "global_norm",
                   "clip_grad_norm_")  # fmt: skip
BEFORE = "_C, no rows"
COLUMNS = [BEFORE, "_C", "flatout", "torch", "liger", "flatout, grad", "torch, grad",
           "liger, grad"]  # fmt: skip


def measure(function):
    """Microseconds a call, of batches of CALLS calls that nothing waits for: the quickest batch's,
    for what holds up the others (the system, other guests of the machine) is not the call's."""
    cuda = torch.cuda.is_available()
    function()
    times, began = [], time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        while len(times) < 4 or (len(times) < BATCHES and time.perf_counter() - began < SECONDS):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            times.append(1e6 * (time.perf_counter() - start) / CALLS)
    finally:
        gc.enable()
    return min(times)


def recorded(function):
    """The calls into _C that function() makes, as functions that make them again."""
    calls, real = [], {name: getattr(_C, name) for name in _C.build_info()["ops"]}

    def recorder(entry):
        def call(*arguments):
            calls.append(partial(entry, *arguments))
            return entry(*arguments)

        return call

    for name, entry in real.items():
        setattr(_C, name, recorder(entry))
    try:
        function()
    finally:
        for name, entry in real.items():
            setattr(_C, name, entry)
    return calls


def one_after_another(calls):
    if not calls:
        raise ValueError("no call into _C")
    if len(calls) == 1:
        return calls[0]

    def run():
        for call in calls:
            call()

    return run


def inputs_of(op, shape, device, grad):
    with torch.device(device):
        inputs = op.inputs(*shape)
    for x in inputs:
        x.requires_grad_(grad and x.requires_grad)
    return inputs


def public(op, device):
    """provider -> function of the inputs: flatout, torch's own op, Liger."""
    every = table.providers(op)
    own = next((n for n in every if n.startswith("torch ")), "torch")
    found = {"flatout": every["flatout"], "torch": every[own]}
    if device == "cuda" and "liger" in every:
        found["liger"] = every["liger"]
    return found


def call_of(op, function, shape, device, grad=False, backward=False):
    """A function without arguments: the op on one row, or its backward."""
    inputs = inputs_of(op, shape, device, grad)
    if op.updates:
        return function(inputs)
    if not backward:
        return lambda: function(inputs)
    needs = [x for x in inputs if x.requires_grad]
    outputs = function(inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    dout = [torch.ones_like(y) for y in outputs]
    return lambda: torch.autograd.grad(outputs, needs, dout, retain_graph=True)


def before_launch(op, device, backward):
    """The calls into _C for no rows, of the gradients of inputs without rows alone."""
    function = table.providers(op)["flatout"]
    shape = (0, *TINY[op.dims][1:])
    if not backward:
        return recorded(call_of(op, function, shape, device))
    inputs = inputs_of(op, shape, device, True)
    empty = [x for x in inputs if x.requires_grad and not x.numel()]
    for x in inputs if empty else ():
        x.requires_grad_(x.requires_grad and not x.numel())
    outputs = function(inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    needs = empty or [x for x in inputs if x.requires_grad]
    dout = [torch.ones_like(y) for y in outputs]
    return recorded(lambda: torch.autograd.grad(outputs, needs, dout))


def figures(name, device, backward, shape):
    """column -> microseconds of one op, forward or backward; what cannot run is left out."""
    op, timed = OPS[name], {}
    grads = (True,) if backward else (False, True) if "backward" in op.modes else (False,)
    makers = {}
    for provider, function in public(op, device).items():
        for grad in grads:
            column = f"{provider}, grad" if grad else provider
            makers[column] = partial(call_of, op, function, shape, device, grad, backward)
    flatout_call = makers["flatout, grad" if backward else "flatout"]
    makers["_C"] = lambda: one_after_another(recorded(flatout_call()))
    call = f"{name} backward" if backward else name
    if call not in LAUNCHES_ANYWAY and shape[0] < 64 * 64:
        makers[BEFORE] = lambda: one_after_another(before_launch(op, device, backward))
    for column, make in makers.items():
        try:
            timed[column] = measure(make())
        except Exception as error:  # this provider has no such call here
            print(f"{name}, {column}: skipped: {error}")
    return timed


def row(label, cells):
    return f"{label:30}" + "".join(f"{cell:>15}" for cell in cells)


def line(label, found):
    text = row(label, (f"{found[c]:.2f}" if c in found else "-" for c in COLUMNS))
    return text + ("  over 1 us" if found.get(BEFORE, 0) > LIMIT else "")


def others(device):
    """What the figures are to be compared with."""
    a, b, c = (np.ones((1, 64), np.float32) for _ in range(3))
    rstd, w = c[0, :1].copy(), b[0]
    x, y = (torch.ones(1, 64, device=device) for _ in range(2))
    found = {
        "_C.rms_norm_fwd, NumPy": lambda: _C.rms_norm_fwd(c, rstd, a, w, 1e-6, 0.0, 0),
        "flatout.rms_norm, NumPy": lambda: flatout.rms_norm(a, w),
        "np.add, output given": lambda: np.add(a, b, out=c),
        "torch.add, output given": lambda: torch.add(x, y, out=y),
        "torch.empty_like": lambda: torch.empty_like(x),
    }
    if device == "cuda":
        found["an empty kernel's launch"] = lambda: torch.cuda._sleep(0)
    return found


def cases(names):
    """(op, mode, shape, label) of every line."""
    for name in names:
        op = OPS[name]
        if op.dims not in TINY or op.flops:
            continue
        shape = TINY[op.dims]
        yield name, op.modes[0], shape, name
        if "backward" in op.modes:
            yield name, "backward", shape, f"{name}, backward"
        if op.updates:
            yield name, "step", (399 * 64, 399), f"{name}, 399 tensors"


def run(names, device, path):
    """Print the table and add it to the CSV. On one thread: waking others is work."""
    _C.set_num_threads(1)
    where = results.environment(device, {}) | STATISTIC
    print(f"{where['device']}: microseconds of the host for one call on 64 numbers a row")
    print(row("", COLUMNS))
    for name, mode, shape, label in cases(names):
        found = figures(name, device, mode == "backward", shape)
        print(line(label, found), flush=True)
        metrics = {c: [("host", "us", t, t, t)] for c, t in found.items()}
        dims = OPS[name].dims.split()
        rows = [results.rows(name, dims, shape, "fp32", device, c, mode, m)
                for c, m in metrics.items()]  # fmt: skip
        results.save(path, sum(rows, []), where)
    for what, function in others(device).items():
        print(row(what, [f"{measure(function):.2f}"]), flush=True)
    print(f"\nrows in {path}")
