"""The machine that rows run on: everything that a timing depends on."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = [
    "flatout", "torch", "triton", "transformers", "kernels", "liger-kernel", "cut-cross-entropy",
    "flash-attn", "flash-attn-3", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas",
]  # fmt: skip
VARIABLES = ("OMP_", "MKL_", "PYTORCH_", "TORCH", "CUDA_", "NCCL_", "FLATOUT_", "HF_HUB_")
ASKED = {  # of nvidia-smi
    "power_limit": "power.limit", "driver": "driver_version", "max_clock": "clocks.max.sm",
    "uuid": "uuid",
}  # fmt: skip
WHERE = ("gpu", "uuid", "cpu", "power_limit", "driver", "torch", "cuda", "cudnn", "transformers",
         "triton", "gemm_tflops")  # fmt: skip


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(distribution):
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def environment(probed):
    """Everything about this machine, with what torch saw of it (worker.probe)."""
    found = {name: version(name) for name in PACKAGES}
    info = {
        "python": platform.python_version(), "platform": platform.platform(),
        "cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0)), "gpu": None, "versions": found,
        "variables": {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)},
        **{name: found[name] for name in ("torch", "transformers", "triton")}, **probed,
    }  # fmt: skip
    if info["device"] == "cuda":
        query = ",".join(ASKED.values())
        asked = output_of("nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader")
        info |= dict(zip(ASKED, [part.strip() for part in asked.split(",")], strict=False))
    return info


def where(environment):
    """What a row keeps of it: rows of several runs may stand in one table."""
    return {key: environment[key] for key in WHERE if environment.get(key) is not None}
