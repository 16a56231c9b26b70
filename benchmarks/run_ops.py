"""One op at a time: speed beside peers and the measured ceiling, and correctness beside speed.

    python benchmarks/run_ops.py --op all
    python benchmarks/run_ops.py --op rms_norm --shape 2048x4096 16384x4096 --dtype bf16
    python benchmarks/run_ops.py --op attention --providers 'torch*' flatout
    python benchmarks/run_ops.py --overhead

Every provider runs in turn on the same inputs (CUDA: with a cold L2 cache); figures are medians.
"of ceiling" is the share of a device copy's bandwidth, or of torch's matmul for ops bound by
arithmetic, both measured here. "error" is the largest distance from float64, as a multiple of
torch's own distance in the same dtype (plus half a unit of fp32): up to 2 is right.
Where a linear cross-entropy makes its gradients in the forward pass, compare "full" alone.
"""

import argparse
import csv
import json
import platform
import sys
from datetime import datetime
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import torch
from ops import table, timing
from ops.table import OPS, Skip

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIGER_COLUMNS = [
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
]  # fmt: skip
KEY = LIGER_COLUMNS[:8] + LIGER_COLUMNS[11:13]  # a newer measurement of the same thing replaces it


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--op", default="all", choices=["all", *OPS])
    p.add_argument("--shape", nargs="+", help="sizes joined by x, in the order the table prints")
    p.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, else bf16")
    p.add_argument("--device", choices=["cpu", "cuda"])
    p.add_argument("--providers", nargs="+", default=["*"], metavar="GLOB")
    p.add_argument("--overhead", action="store_true", help="print the cost of a call instead")
    p.add_argument("--csv", type=Path, default=Path("runs/ops.csv"), help="Liger's columns")
    p.add_argument("--seconds", type=float, default=1.0, help="for each function timed")
    args = p.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    if args.shape and args.op == "all":
        p.error("--shape needs one --op")
    try:
        args.shape = [tuple(map(int, shape.split("x"))) for shape in args.shape or []]
    except ValueError:
        p.error("--shape: expected sizes joined by x, such as 2048x4096")
    for shape in args.shape:
        if len(shape) != len(OPS[args.op].dims.split()):
            p.error(f"--shape: {args.op} has the sizes {OPS[args.op].dims}")
    return args


def placed(inputs, device, dtype):
    """Fresh copies of the inputs: floating ones in dtype, except tables (cos, sin) in float32."""
    out = []
    for x in inputs:
        to = dtype if x.requires_grad or dtype == torch.float64 else x.dtype
        copy = x.detach().to(device, to if x.is_floating_point() else None, copy=True)
        out.append(copy.requires_grad_(x.requires_grad))
    return out


def tensors(result):
    return list(result) if isinstance(result, tuple) else [result]


def differentiate(op, provider, inputs, seed=1):
    """The outputs and then the gradients, as a list, with fixed output gradients."""
    if op.updates:
        provider(inputs)()
        return [inputs[0].detach()]
    outputs = tensors(provider(inputs))
    needs = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(outputs, needs, output_gradients(outputs, seed))
    return [x.detach() for x in [*outputs, *grads]]


def output_gradients(outputs, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(y.shape, generator=generator).to(y.device, y.dtype) if y.ndim else
        torch.ones_like(y)
        for y in outputs
    ]  # fmt: skip


def largest_error(found, exact):
    return [float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True)]


def check(op, functions, shape, device, dtype):
    """name -> error against float64 over torch's, the worst of outputs and gradients; and the
    providers that cannot run, with the reason."""
    small = (min(shape[0], table.TOKENS), *shape[1:]) if not op.updates else shape
    torch.manual_seed(0)
    inputs = op.inputs(*small)
    rounded = placed(placed(inputs, device, dtype), device, torch.float64)
    exact = differentiate(op, functions["torch"], rounded)
    base = largest_error(
        differentiate(op, functions["torch"], placed(inputs, device, dtype)), exact
    )
    floor = [2**-23 * float(x.abs().max()) for x in exact]  # where torch happens to be exact
    ratios, skipped = {}, {}
    for name, function in functions.items():
        try:
            found = differentiate(op, function, placed(inputs, device, dtype))
        except Exception as error:  # a provider that fails is a line in the table
            first = str(error).strip().split("\n")[0]
            skipped[name] = first if isinstance(error, Skip) else f"{type(error).__name__}: {first}"
            continue
        errors = largest_error(found, exact)
        ratios[name] = max(
            e / max(b, f, 1e-30) for e, b, f in zip(errors, base, floor, strict=True)
        )
    return ratios, skipped


def modes_of(op, function, inputs):
    """mode -> (prepare, what is timed), the modes as Liger names them. A backward is timed on a
    graph that it alone uses: some peers overwrite what they saved."""
    if op.updates:
        return {"full": timing.alone(function(inputs))}
    needs = [x for x in inputs if x.requires_grad]
    dout = output_gradients(tensors(function(inputs)), 1)

    def forward():
        return tensors(function(inputs))

    def backward(outputs):
        torch.autograd.grad(outputs, needs, dout)

    return {
        "forward": timing.alone(forward),
        "backward": (forward, backward),
        "full": timing.alone(lambda: backward(forward())),
    }


def work_of(op, shape, mode, itemsize):
    """(amount, unit): bytes moved or floating-point operations of one call in this mode."""
    pair = (op.flops or op.moved)(*shape)
    amount = {"forward": pair[0], "backward": pair[1], "full": sum(pair)}[mode]
    return (amount, "TFLOPS") if op.flops else (amount * itemsize, "GB/s")


def run(name, shape, args, ceilings):
    """Check and time one op at one shape; prints the table and returns the CSV's rows."""
    op, dtype = OPS[name], DTYPES[args.dtype]
    every = table.providers(op)
    wanted = {n: f for n, f in every.items() if any(fnmatch(n, g) for g in args.providers)}
    # torch is always checked: its error is what the others' is compared with.
    ratios, skipped = check(op, {"torch": every["torch"], **wanted}, shape, args.device, dtype)
    sizes = ", ".join(f"{d} {n}" for d, n in zip(op.dims.split(), shape, strict=True))
    print(f"\n{name} ({sizes}), {args.dtype}, {args.device}")
    unit = "TFLOPS" if op.flops else "GB/s"
    print(f"  {'provider':24}{'mode':10}{'us':>12}{unit:>10}{'of ceiling':>12}{'error':>8}")
    torch.manual_seed(0)
    inputs, modes = op.inputs(*shape), {}
    for provider in wanted:
        if provider in ratios:
            found = modes_of(op, wanted[provider], placed(inputs, args.device, dtype))
            for mode, function in found.items():
                modes.setdefault(mode, {})[provider] = function
    rows = []
    for mode, functions in modes.items():
        for provider, t in timing.compare(functions, args.device, args.seconds).items():
            amount, unit = work_of(op, shape, mode, dtype.itemsize)
            rate = amount / t.median / (1e9 if op.flops else 1e6)
            over = " > 2" if not ratios[provider] <= 2 else ""
            print(
                f"  {provider:24}{mode:10}{1e3 * t.median:12.1f}{rate:10.3g}"
                f"{100 * rate / ceilings[unit]:11.1f}%{ratios[provider]:8.2f}{over}"
            )
            rows += csv_rows(name, op, shape, args, provider, mode, t)
    for provider, reason in skipped.items():
        print(f"  {provider:24}skipped: {reason}")
    return rows


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"


def liger_version():
    try:
        return metadata.version("liger-kernel")
    except metadata.PackageNotFoundError:
        return ""


def csv_rows(name, op, shape, args, provider, mode, t):
    dims = op.dims.split()
    config = json.dumps({**dict(zip(dims[1:], shape[1:], strict=True)), "dtype": args.dtype})
    label = {"T": "tokens", "S": "sequence length", "P": "parameters"}[dims[0]]
    metrics = [("speed", "ms", t.median, t.low, t.high)]
    if t.peak_mib is not None:
        metrics.append(("memory", "MB", t.peak_mib, t.peak_mib, t.peak_mib))
    when = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    tail = [config, device_name(args.device), when, liger_version()]
    return [
        dict(zip(LIGER_COLUMNS, [name, provider, mode, metric, unit, dims[0], label, shape[0],
                                 *map(str, values), *tail], strict=True))
        for metric, unit, *values in metrics
    ]  # fmt: skip


def write_csv(path, rows):
    """Add the rows to the file, each in place of an older one of the same key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {}
    if path.exists():
        with open(path, newline="") as file:
            kept = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    kept |= {tuple(str(row[k]) for k in KEY): row for row in rows}
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as file:
        out = csv.DictWriter(file, LIGER_COLUMNS)
        out.writeheader()
        out.writerows(kept.values())
    part.replace(path)


def main(argv=None):
    args = parse(argv)
    if args.overhead:
        from ops import overhead

        for line in overhead.table(args.device):
            print(line, flush=True)
        return 0
    ceilings = {
        "GB/s": timing.copy_ceiling(args.device),
        "TFLOPS": timing.matmul_ceiling(args.device, DTYPES[args.dtype]),
    }
    print(f"{device_name(args.device)}: copy {ceilings['GB/s']:.0f} GB/s, ", end="")
    print(f"{args.dtype} matmul {ceilings['TFLOPS']:.3g} TFLOPS")
    rows = []
    try:
        for name in OPS if args.op == "all" else [args.op]:
            op = OPS[name]
            for shape in args.shape or (op.cuda if args.device == "cuda" else op.cpu):
                rows += run(name, shape, args, ceilings)
    finally:
        write_csv(args.csv, rows)
        print(f"\n{len(rows)} rows in {args.csv}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
