"""What run_ops.py keeps of a run: a CSV with Liger's columns, and beside it a JSON file with the
machine, the commit (GIT_COMMIT outside a git checkout), the versions and the ceilings that each op
was measured with."""

import csv
import json
import os
import platform
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path

import torch
from stages.machine import output_of

HERE = Path(__file__).parent

COLUMNS = [
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
]  # fmt: skip
PACKAGES = {  # what an environment names if it is installed
    "cut-cross-entropy": "cut-cross-entropy", "flash-attn": "flash-attn",
    "flash-attn 3": "flash-attn-3", "flash-attn 4": "flash-attn-4", "quack": "quack-kernels",
}  # fmt: skip
KEY = COLUMNS[:8] + COLUMNS[11:13]  # a newer measurement of the same thing replaces it
LABELS = {"T": "tokens", "S": "sequence length", "P": "parameters"}


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu"


def version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def driver():
    """The driver's version, the power cap and the highest clock, as nvidia-smi tells them."""
    names = ["driver_version", "power.limit", "clocks.max.sm"]
    command = ["nvidia-smi", "--query-gpu=" + ",".join(names), "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
        return dict(zip(names, text.splitlines()[0].split(", "), strict=True))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return {}


def environment(device, ceilings):
    import flatout

    found = {"device": device_name(device), "date": datetime.now().strftime("%Y-%m-%d")}
    found["git"] = os.environ.get("GIT_COMMIT") or output_of("git", "-C", HERE, "rev-parse", "HEAD")
    if device == "cuda":
        found |= driver()
    found |= {
        "flatout": flatout.info()["flatout"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version("triton"),
        "liger": version("liger-kernel"),
    }
    found |= {name: v for name, package in PACKAGES.items() if (v := version(package))}
    return found | {name: round(value, 4) for name, value in ceilings.items()}


def rows(name, dims, shape, dtype, device, provider, mode, metrics):
    """CSV rows of one provider in one mode; metrics: (name, unit, median, low, high)."""
    config = json.dumps({**dict(zip(dims[1:], shape[1:], strict=True)), "dtype": dtype})
    when = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    tail = [config, device_name(device), when, version("liger-kernel")]
    label = LABELS[dims[0]]
    return [
        dict(zip(COLUMNS, [name, provider, mode, metric, unit, dims[0], label, shape[0],
                           *map(str, values), *tail], strict=True))
        for metric, unit, *values in metrics
    ]  # fmt: skip


def timing_metrics(t, error):
    """speed: the GPU's time; call: a whole call in a loop of them; error: run_ops.py explains."""
    found = [("speed", "ms", t.median, t.low, t.high)]
    if t.call is not None:
        found.append(("call", "ms", t.call, t.call, t.call))
    if t.peak_mib is not None:
        found.append(("memory", "MB", t.peak_mib, t.peak_mib, t.peak_mib))
    if t.late:
        found.append(("host late", "share", t.late, t.late, t.late))
    if error is not None:
        found.append(("error", "of torch's", error, error, error))
    return found


def read(path):
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def replace(path, write):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "w", newline="") as file:
        write(file)
    part.replace(path)


def save(path, new, where):
    """Add rows to the CSV, each in place of an older one of the same key, and to the JSON beside it
    the environment `where` under the name of every op that they time."""
    kept = {tuple(row[k] for k in KEY): row for row in read(path)}
    kept |= {tuple(str(row[k]) for k in KEY): row for row in new}

    def write(file):
        out = csv.DictWriter(file, COLUMNS)
        out.writeheader()
        out.writerows(kept.values())

    replace(path, write)
    beside = path.with_suffix(".json")
    environments = json.loads(beside.read_text()) if beside.exists() else {}
    environments |= {row["kernel_name"]: where for row in new}
    replace(beside, lambda file: file.write(json.dumps(environments, indent=1) + "\n"))
