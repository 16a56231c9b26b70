"""One op at a time: speed beside peers and the measured ceiling, and correctness beside speed.

    python benchmarks/run_ops.py --op elementwise
    python benchmarks/run_ops.py --op rms_norm --shape 2048x4096 16384x4096 --dtype bf16
    python benchmarks/run_ops.py --op adamw --shape qwen3-8b
    python benchmarks/run_ops.py --op attention --providers 'torch*' flatout
    python benchmarks/run_ops.py --op all --sweep --each 0.1
    python benchmarks/run_ops.py --overhead
    python benchmarks/run_ops.py --gemm
    python benchmarks/run_ops.py --readme benchmarks/results/h100
    python benchmarks/run_ops.py --plots benchmarks/results/h100

Every provider runs in turn on the same inputs; figures are medians. On CUDA "GPU us" is the time
between events around the call, with a cold L2 cache (256 MiB written before) and the host ahead of
the GPU; where it could not be, the line says so. "call us" is the time of day of one whole call in
a loop of them, without the flush: the larger of the host's time and the GPU's.
"of copy" is the share of the bandwidth of a 1 GiB device copy, "of same" that of a copy which
moves as many bytes, timed beside; for ops bound by arithmetic "of matmul" is that of torch's.
"x torch" is the time over torch's; "MiB" what a call takes at its peak beyond the gradients that it
returns.
"error" is the largest distance from float64, as a multiple of torch's own distance in the same
dtype (plus half a unit of fp32): up to 2 is right.
Where a loss makes its gradients in the forward pass, forward and backward have no rate: compare
"full" alone.
"""

import argparse
import gc
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import torch
from ops import GROUPS, OPS, optimizer, results, table, timing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--op", nargs="+", default=["all"], choices=[*GROUPS, *OPS])
    p.add_argument("--shape", nargs="+", help="sizes joined by x, in the order the table prints")
    p.add_argument("--sweep", action="store_true", help="many sizes, for --plots")
    p.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16")
    p.add_argument("--device", choices=["cpu", "cuda"])
    p.add_argument("--providers", nargs="+", default=["*"], metavar="GLOB")
    p.add_argument("--overhead", action="store_true", help="the host's cost of a call instead")
    p.add_argument("--gemm", action="store_true", help="cuBLASLt's algorithms instead")
    p.add_argument("--csv", type=Path, help="Liger's columns; default: runs/ops.csv, with "
                   "--sweep runs/sweep.csv, with --overhead runs/overhead.csv")  # fmt: skip
    p.add_argument("--each", type=float, default=0.3, help="seconds for each function timed")
    p.add_argument("--seconds", type=float, help="begin no further shape after so many")
    p.add_argument(
        "--readme", type=Path, metavar="FOLDER", help="README's tables from result files"
    )
    p.add_argument("--plots", type=Path, nargs="+", metavar="FOLDER", help="from result files")
    args = p.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    kind = "overhead" if args.overhead else "sweep" if args.sweep else "ops"
    args.csv = args.csv or Path("runs", kind + ".csv")
    args.op = list(dict.fromkeys(name for op in args.op for name in GROUPS.get(op, [op])))
    if args.shape and len({OPS[name].dims for name in args.op}) > 1:
        p.error("--shape needs ops of the same sizes")
    dims = OPS[args.op[0]].dims
    try:
        args.shape = [sizes_of(shape, dims) for shape in args.shape or []]
    except ValueError:
        p.error(f"--shape: {args.op[0]} has the sizes {dims}, joined by x, such as "
                + "x".join(map(str, OPS[args.op[0]].cpu[0])))  # fmt: skip
    return args


def sizes_of(text, dims):
    if dims == "P N" and text in optimizer.PRESETS:
        return optimizer.PRESETS[text]
    sizes = tuple(map(int, text.split("x")))
    if len(sizes) != len(dims.split()):
        raise ValueError(text)
    return sizes


def make_inputs(op, shape, device, dtype):
    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return op.inputs(*shape)
    finally:
        torch.set_default_dtype(default)


def placed(inputs, dtype=None):
    """Fresh copies of the inputs, views of one buffer staying views of one; with a dtype, the
    floating ones in it."""
    buffers, out = {}, []
    for x in inputs:
        key, to = x.untyped_storage().data_ptr(), dtype if x.is_floating_point() else None
        if key not in buffers:
            whole = x.detach().as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
            buffers[key] = whole.to(to or x.dtype, copy=True)
        copy = buffers[key].as_strided(x.shape, x.stride(), x.storage_offset()).detach()
        out.append(copy.requires_grad_(x.requires_grad))
    return out


def tensors(result):
    return list(result) if isinstance(result, (tuple, list)) else [result]


def differentiate(op, provider, inputs, seed=1):
    """The outputs and then the gradients, as a list, with fixed output gradients; of an op that
    updates, what it changed."""
    if op.updates:
        return [x.detach().clone() for x in provider(inputs)()]
    outputs = tensors(provider(inputs))
    needs = [x for x in inputs if x.requires_grad]
    grads = needs and torch.autograd.grad(outputs, needs, output_gradients(outputs, seed))
    return [x.detach() for x in [*outputs, *grads]]


def output_gradients(outputs, seed):
    torch.manual_seed(seed)
    return [torch.randn_like(y.detach()) if y.ndim else torch.ones_like(y) for y in outputs]


def largest_error(found, exact):
    return [float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True)]


def small(op, shape):
    """The shape for the check: as many rows as show an error."""
    if op.updates:
        return min(shape[0], 1 << 20), min(shape[1], 7)
    return min(shape[0], table.TOKENS), *shape[1:]


def check(op, functions, shape, device, dtype):
    """name -> error against float64 over torch's, the worst of outputs and gradients; and the
    providers that cannot run, with the reason."""
    inputs = make_inputs(op, small(op, shape), device, dtype)
    exact = differentiate(op, functions["torch"], placed(inputs, torch.float64))
    base = largest_error(differentiate(op, functions["torch"], placed(inputs)), exact)
    floor = [2**-23 * float(x.abs().max()) for x in exact]  # where torch happens to be exact
    ratios, skipped = {}, {}
    for name, function in functions.items():
        try:
            found = largest_error(differentiate(op, function, placed(inputs)), exact)
        except Exception as error:  # a provider that fails is a line in the table
            skipped[name] = str(error) if isinstance(error, table.Skip) else timing.reason(error)
            continue
        worst = max(e / max(b, f, 1e-30) for e, b, f in zip(found, base, floor, strict=True))
        ratios[name] = None if name in op.random else worst
    return ratios, skipped


def modes_of(op, function, inputs):
    """mode -> (prepare, what is timed), the modes as Liger names them. A backward is timed on a
    graph that it alone uses: some peers overwrite what they saved."""
    if op.updates:
        return {"step": timing.alone(function(inputs))}
    needs = [x for x in inputs if x.requires_grad]
    dout = output_gradients(tensors(function(inputs)), 1) if needs else []

    def forward():
        return tensors(function(inputs))

    def backward(outputs):
        torch.autograd.grad(outputs, needs, dout)

    every = {
        "forward": timing.alone(forward),
        "backward": (forward, backward),
        "full": timing.alone(lambda: backward(forward())),
    }
    return {mode: every[mode] for mode in op.modes}


def functions_of(op, shape, wanted, args):
    """mode -> provider -> what is timed, a copy of as many bytes first; and who cannot, and why."""
    inputs, failed, modes = make_inputs(op, shape, args.device, DTYPES[args.dtype]), {}, {}
    for mode in op.modes if op.moved else ():
        moved, _ = op.work(shape, mode, DTYPES[args.dtype].itemsize)
        modes[mode] = {timing.COPY: timing.copy(moved, args.device)[0]}
    for provider, function in wanted.items():
        try:
            found = modes_of(op, function, inputs if op.updates else placed(inputs))
        except Exception as error:
            failed[provider] = timing.reason(error)
            continue
        for mode, timed in found.items():
            if op.is_timed(provider, mode):
                modes.setdefault(mode, {})[provider] = timed
    return modes, failed


def line(op, shape, mode, provider, timings, copy_rate, error, args, ceilings):
    """One line of the table. copy_rate: of the copy of the same size."""
    amount, unit = op.work(shape, mode, DTYPES[args.dtype].itemsize)
    t, base = timings[provider], timings.get("torch")
    if provider == timing.COPY:
        amount = min(amount, timing.COPY_MOST)
    rate = amount / t.median / 1e9 if op.has_rate(provider, mode) else None
    text = f"  {provider:22}{mode:9}{1e3 * t.median:10.1f}"
    text += f"{rate:10.3g}{100 * rate / ceilings[unit]:10.1f}%" if rate else f"{'-':>10}{'-':>11}"
    text += f"{100 * rate / copy_rate:9.1f}%" if rate and copy_rate else f"{'-':>10}"
    text += f"{t.median / base.median:9.3f}" if base else f"{'-':>9}"
    text += f"{1e3 * t.call:10.1f}" if t.call else f"{'-':>10}"
    text += (
        f"{'-':>8}"
        if t.peak_mib is None
        else f"{t.peak_mib - returned_mib(op, shape, mode, args):8.0f}"
    )
    text += f"{'-':>8}" if error is None else f"{error:8.2f}" + ("" if error <= 2 else " > 2")
    return text + (f"  waited for the host: {100 * t.late:.0f} %" if t.late else "")


def returned_mib(op, shape, mode, args):
    """The gradients that a call in this mode returns."""
    if mode not in ("backward", "full"):
        return 0
    inputs = make_inputs(op, shape, "meta", DTYPES[args.dtype])
    return sum(x.numel() * x.itemsize for x in inputs if x.requires_grad) / 2**20


def head(name, op, shape, args):
    sizes = ", ".join(f"{d} {n}" for d, n in zip(op.dims.split(), shape, strict=True))
    us, unit = ("GPU us", "us")[args.device == "cpu"], ("TB/s", "TFLOPS")[bool(op.flops)]
    ceiling = "of matmul" if op.flops else "of copy"
    return (f"\n{name} ({sizes}), {args.dtype}, {args.device}\n  {'provider':22}{'mode':9}{us:>10}"
            f"{unit:>10}{ceiling:>11}{'of same':>10}{'x torch':>9}{'call us':>10}{'MiB':>8}"
            f"{'error':>8}")  # fmt: skip


def run(name, shape, args, ceilings, checked):
    """Check and time one op at one shape; prints the table and returns the CSV's rows."""
    op, dtype = OPS[name], DTYPES[args.dtype]
    every = table.providers(op)
    wanted = {n: f for n, f in every.items() if any(fnmatch(n, g) for g in args.providers)}
    print(head(name, op, shape, args), flush=True)
    key = name, small(op, shape)
    if key not in checked:  # torch always: its error is what the others' is compared with
        checked[key] = check(op, {"torch": every["torch"], **wanted}, shape, args.device, dtype)
    ratios, skipped = checked[key]
    able = {n: f for n, f in wanted.items() if n in ratios}
    modes, failed = functions_of(op, shape, able, args)
    skipped, rows = skipped | failed, []
    for mode, functions in modes.items():
        timings, failed = timing.compare(functions, args.device, args.each)
        skipped |= {f"{n}, {mode}": reason for n, reason in failed.items()}
        copy = timings.get(timing.COPY)
        moved = min(op.work(shape, mode, dtype.itemsize)[0], timing.COPY_MOST)
        copy_rate = moved / copy.median / 1e9 if copy else None
        for provider, t in timings.items():
            error = ratios.get(provider)
            text = line(op, shape, mode, provider, timings, copy_rate, error, args, ceilings)
            print(text, flush=True)
            metrics = results.timing_metrics(t, error)
            dims = op.dims.split()
            rows += results.rows(
                name, dims, shape, args.dtype, args.device, provider, mode, metrics
            )
    for provider, reason in skipped.items():
        print(f"  {provider}: skipped: {reason}", flush=True)
    return rows


def shapes_of(op, args):
    if args.sweep:
        return op.sweep(args.device)
    return args.shape or (op.cuda if args.device == "cuda" else op.cpu)


def free():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_all(args):
    ceilings = {}
    if any(OPS[name].moved for name in args.op):
        ceilings["TB/s"] = timing.copy_ceiling(args.device)
    if any(OPS[name].flops for name in args.op):
        ceilings["TFLOPS"] = timing.matmul_ceiling(args.device, DTYPES[args.dtype])
    where = results.environment(args.device, ceilings)
    found = ", ".join(f"{rate:.4g} {unit}" for unit, rate in ceilings.items())
    print(f"{where['device']}: ceilings {found}", flush=True)
    began, checked = time.monotonic(), {}
    for name in args.op:
        op = OPS[name]
        for shape in shapes_of(op, args):
            free()
            if args.seconds and time.monotonic() - began > args.seconds:
                print(f"\n{name} {shape}: not run, --seconds are over")
                continue
            try:
                rows = run(name, shape, args, ceilings, checked)
            except torch.OutOfMemoryError as error:
                print(f"  skipped: {timing.reason(error)}", flush=True)
                continue
            results.save(args.csv, rows, where)
    print(f"\nrows in {args.csv}; {time.monotonic() - began:.0f} s")


def main(argv=None):
    args = parse(argv)
    if args.readme:
        from ops import readme

        readme.update(args.readme)
    elif args.plots:
        from ops import plots

        for folder in args.plots:
            plots.draw(folder)
    elif args.gemm:
        from ops import gemm

        gemm.run(args.each)
    elif args.overhead:
        from ops import overhead

        overhead.run(args.op, args.device, args.csv)
    else:
        run_all(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
