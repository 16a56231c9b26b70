"""flatout.info(): what this installation can do, for people and for bug reports."""

from . import _C

PACKAGES = ["numpy", "ml_dtypes", "torch", "transformers", "kernels", "liger-kernel"]
PACKAGES += ["cut-cross-entropy", "flash-attn"]


class Info(dict):
    """A dict that prints one fact a line."""

    def __repr__(self):
        return "\n".join(f"{key:9} {_words(value)}" for key, value in self.items())


def _words(value):
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "not built in (no nvcc was used)" if value is None else str(value)


def _ops(table, backend):
    """The ops whose every entry point is there: rms_norm stands for rms_norm_fwd and _bwd."""
    there = {}
    for entry, backends in table.items():
        name = entry.removesuffix("_fwd").removesuffix("_bwd")
        there[name] = there.get(name, True) and backend in backends.split()
    return [name for name, complete in there.items() if complete]


def _versions():
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def info() -> Info:
    """What this installation can do, as a dict that prints well:

    - "flatout": its version; "backends": those compiled in, ["cpu"] or ["cpu", "cuda"]
    - "cpu": the instruction set in use ("level": plain, avx2 or avx512) and the threads
    - "cuda": None for a build without nvcc, else the toolkit's version, the GPU architectures
      ("archs": sm_90a is machine code for that one; compute_90 is PTX, which the driver compiles
      for GPUs from there on that have none) and the number of devices that the driver shows (0
      without a driver)
    - "features": for each backend, the ops it has
    - "versions": Python's and those of the installed packages that flatout works with

    torch is not imported. Nothing raises where there is no GPU or no driver.
    """
    built = _C.build_info()
    major, minor = divmod(built["cuda_version"] // 10, 100)
    cuda = {
        "version": f"{major}.{minor}",
        "archs": built["cuda_archs"].split(),
        "devices": _C.device_count(),
    }
    backends = ["cpu", "cuda"] if built["cuda"] else ["cpu"]
    return Info(
        flatout=built["version"],
        backends=backends,
        cpu={"level": built["cpu"], "threads": built["cpu_threads"]},
        cuda=cuda if built["cuda"] else None,
        features={backend: _ops(built["ops"], backend) for backend in backends},
        versions=_versions(),
    )
