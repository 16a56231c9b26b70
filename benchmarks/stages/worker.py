"""Train one row of the stage matrix in a process of its own.

`python -m stages.worker SPEC FD`: SPEC is JSON, FD an open file descriptor that gets one line of
JSON per event: {"step", "ms", "loss"} as it trains, and {"end": {...}} with the status, last.
"""

import json
import os
import resource
import sys
import time
import traceback
from contextlib import nullcontext

import numpy as np
import torch
from torch._dynamo.utils import counters as dynamo

from stages import model as build
from stages.model import loss_function, optimizer_step
from stages.rows import BY_NAME

LR = 3e-4


def schedule(step, steps):
    """Warmup-stable-decay: up over a tenth of the steps, down to 0 over the last fifth."""
    up, down = max(1, steps // 10), max(1, steps // 5)
    return LR * min(1.0, (step + 1) / up, (steps - step) / down)


def error_chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def classify(error):
    """(status, reason) of an exception."""
    chain = list(error_chain(error))
    text = "\n".join(str(e) for e in chain)
    first = next(iter(str(error).strip().splitlines()), "")
    reason = f"{type(error).__name__}: {first}"
    if isinstance(error, build.Skip):
        return "Skipped", first
    if any(isinstance(e, torch.OutOfMemoryError) for e in chain) or "CUDA out of memory" in text:
        return "CUDA OOM", reason
    if any(isinstance(e, MemoryError) for e in chain) or "DefaultCPUAllocator" in text:
        return "Host OOM", reason
    compilers = ("torch._dynamo", "torch._inductor", "torch._functorch")
    if any(type(e).__module__.startswith(compilers) for e in chain):
        return "Compile Issue", reason
    return "Failed", reason


class Clock:
    """Marks between steps: CUDA events, so that the host never waits for the step it has just
    queued; the time of day on a CPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.marks = []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self, step):
        before, after = self.marks[step : step + 2]
        if not self.cuda:
            return 1e3 * (after - before)
        after.synchronize()
        return before.elapsed_time(after)


def counters():
    """What torch.compile did so far."""
    return {
        "graphs": dynamo["stats"]["unique_graphs"],
        "graph_breaks": sum(dynamo["graph_break"].values()),
        "cache_hits": dynamo["inductor"]["fxgraph_cache_hit"],
        "cache_misses": dynamo["inductor"]["fxgraph_cache_miss"],
        "cudagraph_skips": dynamo["inductor"]["cudagraph_skips"],
    }


def train(spec, row, model, emit):
    """Run all the steps; returns what only the end knows."""
    device, steps = spec["device"], spec["steps"]
    loss_of = loss_function(row, model, device)
    optimizer, update = optimizer_step(row, model, LR)
    tokens = torch.from_numpy(np.load(spec["tokens"])).to(device)
    losses = torch.zeros(steps, pin_memory=device == "cuda")
    autocast = torch.autocast(device, torch.bfloat16, enabled=spec["dtype"] == "bf16")
    clock, told, graphs = Clock(device), 0, 0
    began = time.perf_counter()
    clock.mark()
    for step in range(steps):
        if row.compile and device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        for group in optimizer.param_groups:
            group["lr"] = schedule(step, steps)
        with autocast:
            loss = loss_of(tokens[step])
        loss.backward()
        update()
        optimizer.zero_grad(set_to_none=True)
        losses[step].copy_(loss.detach(), non_blocking=True)
        clock.mark()
        if step + 1 == spec["warmup"]:
            graphs = counters()["graphs"]
        # One step late, save at both ends: reading a loss must not drain the GPU's queue.
        ready = step + 1 if step in (0, steps - 1) else step
        for i in range(told, ready):
            emit(step=i, ms=clock.ms(i), loss=losses[i].item(), since=time.time() - spec["spawned"])
        told = ready
    runtime = time.perf_counter() - began
    compiler = counters()
    compiler["recompiles"] = compiler["graphs"] - graphs  # after warm-up
    return {"runtime_s": runtime, "compiler": compiler}


def memory(device):
    """Peaks in GiB: of the GPU's allocator, or of the process on a CPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "cpu":
        return {"peak_gib": host}
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    return {"peak_gib": reserved / 2**30, "allocated_gib": allocated / 2**30, "host_gib": host}


def run(spec, emit):
    """Build, patch, compile and train; the record of a row that got to its end."""
    row, device = BY_NAME[spec["row"]], spec["device"]
    build.prerequisites(row, device)
    import transformers  # noqa: F401  its import is every row's cost, not the model's

    imported = time.time()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    implementation, label, backends = build.choose_attention(row, device)
    emit(attention=label)
    model = build.build(spec["config"], implementation, device, dtype, spec["seed"])
    built = time.time()
    build.swap_kernels(row, model, device)
    emit(active=build.active_ops(row, model))
    if row.compile:
        build.compile_layers(model, device)
    emit(
        import_s=imported - spec["spawned"], model_s=built - imported, patch_s=time.time() - built,
        parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads(),
    )  # fmt: skip
    allow = nullcontext()
    if backends:
        allow = torch.nn.attention.sdpa_kernel(backends, set_priority=len(backends) > 1)
    with allow:
        return train(spec, row, model, emit)


def probe(device):
    """What torch sees on this machine, asked in a process that ends: the caller must not hold a
    CUDA context while rows measure memory."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    info = {"device": device, "threads": torch.get_num_threads(), "cuda": torch.version.cuda}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        info |= {
            "gpu": properties.name, "sms": properties.multi_processor_count,
            "gpu_gib": properties.total_memory / 2**30, "cudnn": torch.backends.cudnn.version(),
        }  # fmt: skip
    try:
        import flatout

        info["flatout"] = flatout.info()
    except (ImportError, AttributeError) as error:
        info["flatout"] = f"not usable: {error}"
    return info


def main():
    spec, stream = json.loads(sys.argv[1]), os.fdopen(int(sys.argv[2]), "w")

    def emit(**event):
        print(json.dumps(event), file=stream, flush=True)

    if "probe" in spec:
        emit(**probe(spec["probe"]))
        return
    try:
        record = {"status": "Success!", "reason": "", **run(spec, emit)}
    except BaseException as error:
        traceback.print_exc()  # to the row's log
        status, reason = classify(error)
        record = {"status": status, "reason": reason}
    try:
        record |= {} if record["status"] == "Skipped" else memory(spec["device"])
    except RuntimeError as error:  # a lost device: the status above says more
        print(f"memory: {error}", file=sys.stderr)
    emit(end=record)


if __name__ == "__main__":
    main()
