"""Build flatout._C: gcc on csrc/*.c, nvcc on kernels/*.cu, one abi3 module.

A new op never edits this file: both folders are globbed. FLATOUT_CUDA=auto (default) builds the
CUDA half where an nvcc is found, off never, require fails without one.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"
ARCH = "sm_90a"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]
CFLAGS = ["-std=c11", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno"]
NVCCFLAGS = [
    "-std=c++17", "-O3", f"-gencode=arch=compute_90a,code={ARCH}", "--Werror=all-warnings",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics",
]  # fmt: skip

# One compilation of every op per variant: see csrc/cpu.h.
VARIANTS = {"f32": [], "f64": ["-DREAL_IS_DOUBLE"]}
if platform.machine() == "x86_64":
    VARIANTS["f32_avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["f32_avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512",
    ]  # fmt: skip
PLAIN = {"module.c", "tensor.c", "cpu.c"}


def find_nvcc():
    """(nvcc, folder of libcudart_static.a), or None: CUDA_HOME, PATH, then the CUDA 13 wheels."""
    homes = [Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    on_path = shutil.which("nvcc")
    if on_path:  # may be a wrapper script: ask it where its toolkit is
        asked = [on_path, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null"]
        answer = subprocess.run(asked, capture_output=True, text=True).stderr
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", answer, re.M)]
    for site in {sysconfig.get_path("purelib"), *sys.path}:
        homes.append(Path(site) / "nvidia" / "cu13")
    for home in homes:
        for lib in ("lib64", "lib", "targets/x86_64-linux/lib"):
            if (home / "bin/nvcc").exists() and (home / lib / "libcudart_static.a").exists():
                return home / "bin/nvcc", home / lib
    return None


def run(command):
    print(" ".join(map(str, command)), flush=True)
    subprocess.run(list(map(str, command)), check=True)


class Build(build_ext):
    def build_extension(self, ext):
        mode = os.environ.get("FLATOUT_CUDA", "auto")
        if mode not in ("auto", "off", "require"):
            raise ValueError(f"FLATOUT_CUDA: expected auto, off or require, got {mode!r}")
        cuda = None if mode == "off" else find_nvcc()
        if mode == "require" and not cuda:
            raise RuntimeError("FLATOUT_CUDA=require, but no nvcc in CUDA_HOME, PATH or wheels")
        what = f"CUDA {ARCH} with {cuda[0]}" if cuda else "CPU only (no nvcc used)"
        print(f"flatout: building for {what}", flush=True)

        out = ROOT / "build" / f"{'cuda' if cuda else 'cpu'}-{sys.implementation.cache_tag}"
        out.mkdir(parents=True, exist_ok=True)
        jobs = self.c_jobs(out, cuda) + (self.cuda_jobs(out, cuda) if cuda else [])
        stale = [(command, target) for command, target, new in jobs if new]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(lambda job: run(job[0]), stale))
        for command, target in stale:
            target.with_suffix(".cmd").write_text(" ".join(map(str, command)))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*self.cc(), "-shared", *(target for _, target, _ in jobs), "-fopenmp", "-lm"]
        if cuda:
            link += [f"-L{cuda[1]}", "-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
        run([*link, "-Wl,--exclude-libs,ALL", "-o", target])

    def cc(self):
        return os.environ.get("CC", "gcc").split()

    def job(self, command, source, target, headers):
        """(command, object file, whether it must run): newer sources or another command."""
        command = [*command, "-c", source, "-o", target]
        stamp = target.with_suffix(".cmd")
        fresh = (
            target.exists()
            and stamp.exists()
            and stamp.read_text() == " ".join(map(str, command))
            and all(f.stat().st_mtime <= target.stat().st_mtime for f in [source, *headers])
        )
        return command, target, not fresh

    def c_jobs(self, out, cuda):
        headers = list((ROOT / "csrc").glob("*.h"))
        include = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{numpy.get_include()}"]
        defines = ["-DPy_LIMITED_API=0x030b0000", f'-DFLATOUT_VERSION="{VERSION}"']
        if cuda:
            defines.append(f'-DFLATOUT_CUDA_ARCHS="{ARCH}"')
        jobs = []
        for source in sorted((ROOT / "csrc").glob("*.c")):
            if source.name in PLAIN:
                command = [*self.cc(), *CFLAGS, *WARNINGS, *defines, *include]
                jobs.append(self.job(command, source, out / f"{source.stem}.o", headers))
                continue
            for variant, flags in VARIANTS.items():
                command = [*self.cc(), *CFLAGS, *WARNINGS, *flags, f"-DVARIANT={variant}"]
                target = out / f"{source.stem}_{variant}.o"
                jobs.append(self.job(command, source, target, headers))
        return jobs

    def cuda_jobs(self, out, cuda):
        headers = [*(ROOT / "kernels").glob("*.cuh"), *(ROOT / "csrc").glob("*.h")]
        return [
            self.job([cuda[0], *NVCCFLAGS], source, out / f"{source.stem}.cu.o", headers)
            for source in sorted((ROOT / "kernels").glob("*.cu"))
        ]


setup(
    ext_modules=[Extension("flatout._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
