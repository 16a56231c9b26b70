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

import torch

from stages import model as build
from stages import profiling
from stages.rows import BY_NAME
from stages.training import Training


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


def cuda_graphs():
    """How many CUDA graphs max-autotune recorded, or None where it cannot be known."""
    try:
        from torch._inductor import cudagraph_trees

        manager = cudagraph_trees.get_manager(torch.cuda.current_device(), False)
        nodes, count = list(manager.get_roots()) if manager else [], 0
        while nodes:
            count += 1
            nodes += [node for children in nodes.pop().children.values() for node in children]
        return count
    except (AttributeError, ImportError, TypeError):  # another version's internals
        return None


def counters():
    """What torch.compile did so far."""
    # Here, not above: its import takes seconds, which the first step need not wait for.
    from torch._dynamo.utils import counters as dynamo

    return {
        "graphs": dynamo["stats"]["unique_graphs"],
        "graph_breaks": sum(dynamo["graph_break"].values()),
        "cache_hits": dynamo["inductor"]["fxgraph_cache_hit"],
        "cache_misses": dynamo["inductor"]["fxgraph_cache_miss"],
        "cudagraph_skips": dynamo["inductor"]["cudagraph_skips"],
    }


def train(spec, row, model, emit):
    """Run all the steps; returns what only the end knows."""
    profiled = profiling.STEPS if spec.get("profile") else 0
    training = Training(spec, row, model, emit)
    began, graphs, extra = time.perf_counter(), 0, {}
    for step in range(spec["steps"] - profiled):
        training.step()
        if step + 1 == spec["warmup"]:
            graphs = counters()["graphs"]
    if profiled:
        extra["timed_steps"] = training.done
        extra["profile"] = profiling.measure(training.step, spec["device"])
    runtime = time.perf_counter() - began
    compiler = counters()
    compiler["recompiles"] = compiler["graphs"] - graphs  # after warm-up
    if row.compile and spec["device"] == "cuda":
        compiler["cuda_graphs"] = cuda_graphs()
    return {"runtime_s": runtime, "compiler": compiler, **extra}


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
    if row.older and not spec.get("site"):
        raise build.Skip("needs --older-liger")
    import transformers  # noqa: F401  its import is every row's cost, not the model's

    imported = time.time()
    torch.empty(1, device=device)  # the CUDA context's seconds are no part of the model's
    ready = time.time()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["dtype"]]
    implementation, label, backends = build.choose_attention(row, device)
    emit(attention=label, packages=build.packages(row, label))
    model = build.build(spec["config"], implementation, device, dtype, spec["seed"])
    if row.nudge:
        build.nudge(model, row.nudge)
    if device == "cuda":
        torch.cuda.synchronize()
    built = time.time()
    build.swap_kernels(row, model, device)
    emit(active=build.active_ops(row, model))
    if row.compile:
        build.compile_layers(model, device)
    emit(
        import_s=imported - spec["spawned"], context_s=ready - imported,
        model_s=built - ready, patch_s=time.time() - built,
        parameters=sum(p.numel() for p in model.parameters()), threads=torch.get_num_threads(),
    )  # fmt: skip
    allow = nullcontext()
    if backends:
        allow = torch.nn.attention.sdpa_kernel(backends, set_priority=len(backends) > 1)
    with allow:
        return train(spec, row, model, emit)


def sustained_gemm(size=8192, seconds=1.5):
    """TFLOPS of one bf16 product over and over: what this GPU's power cap leaves of its peak, so
    that rows of different machines can be told apart."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeats in (20, int(seconds * 600e12 / (2 * size**3))):  # the first warms up
        begin.record()
        for _ in range(repeats):
            torch.mm(a, b)
        end.record()
    end.synchronize()
    return round(2 * size**3 * repeats / begin.elapsed_time(end) / 1e9, 1)


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
            "gemm_tflops": sustained_gemm(),
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
