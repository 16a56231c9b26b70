"""Build flatout._C: gcc on csrc/*.c, nvcc on kernels/*.cu, one abi3 module.

A new op never edits this file: both folders are globbed, and a .c file that uses the macro CPU()
is an op, compiled once per instruction set. FLATOUT_CUDA=auto (default) builds the CUDA half where
an nvcc is found, off never, require fails without one (pip then fetches NVIDIA's wheels for the
build). CC, CFLAGS, LDFLAGS, NVCC_APPEND_FLAGS and MAX_JOBS have their usual meanings. Objects stay
in build/ and are made again where a source, a header, the command or the compiler has changed.

FLATOUT_CUDA_ARCH="80 90a 100 120 90-ptx", the default, names the GPUs: machine code for compute
capability 8.0 (runs on all 8.x), 9.0, 10.x and 12.x, and PTX, which the driver compiles when it
loads it on any other GPU from 9.0 on. 90a alone builds in less than half the time. A .cu file that
includes sm90.cuh, Hopper's own instructions, is compiled for 90a alone, and left out without it.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
ARCHS = "80 90a 100 120 90-ptx"
# clang reports loops that it does not vectorize; gcc does not know the option and says nothing.
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-pass-failed"]
CFLAGS = [
    "-std=c11", "-O3", "-g0", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno",
    "-ffp-contract=fast",  # c11 alone would forbid fused multiply-adds
]  # fmt: skip
NVCCFLAGS = [
    "-std=c++17", "-O3", "--Werror=all-warnings", "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics",
]  # fmt: skip
CUDA_WHEELS = "cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]==13.0.*"
ABI3 = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has no abi3

# One compilation of every op per variant: see csrc/cpu.h.
VARIANTS = {"f32": [], "f64": ["-DREAL_IS_DOUBLE"]}
if platform.machine() == "x86_64":
    VARIANTS["f32_avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["f32_avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512",
    ]  # fmt: skip


class Cuda(NamedTuple):
    nvcc: Path
    lib: Path  # holds libcudart_static.a
    include: Path
    version: str

    def archs(self):
        """As FLATOUT_CUDA_ARCH says; of the default, those that this nvcc knows."""
        asked = os.environ.get("FLATOUT_CUDA_ARCH", "").replace(",", " ").split()
        if wrong := [arch for arch in asked if not re.fullmatch(r"\d+[af]?(-ptx)?", arch)]:
            raise SystemExit(
                f"FLATOUT_CUDA_ARCH: expected words like 90a or 90-ptx, got {wrong[0]!r}"
            )
        known = output(self.nvcc, "--list-gpu-code")
        return asked or [a for a in ARCHS.split() if f"sm_{re.match('[0-9]+', a)[0]}\n" in known]


def gencode(arch):
    """nvcc's options for one architecture, and its name. The front end runs for 8.0, 9.0 and 9.0a
    at most: the generic kernels use nothing newer."""
    number, feature, ptx = re.fullmatch(r"(\d+)([af]?)(-ptx)?", arch).groups()
    virtual = number + feature if feature or ptx else "90" if int(number) >= 90 else "80"
    name = f"compute_{virtual}" if ptx else f"sm_{number}{feature}"
    return f"-gencode=arch=compute_{virtual},code={name}", name


def cuda_mode():
    mode = os.environ.get("FLATOUT_CUDA", "auto")
    if mode not in ("auto", "off", "require"):
        raise SystemExit(f"FLATOUT_CUDA: expected auto, off or require, got {mode!r}")
    return mode


def find_cuda():
    """The first of CUDA_HOME, PATH and the CUDA 13 wheels that has an nvcc of CUDA 12 or later."""
    homes = [Path(os.environ[k]) for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    on_path = shutil.which("nvcc")
    if on_path:  # may be a wrapper script: ask it where its toolkit is
        answer = output(on_path, "--dryrun", "-c", "-x", "cu", "/dev/null", "-o", "/dev/null")
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", answer, re.M)]
    # In an isolated build, purelib is the environment's own and sys.path has pip's.
    for site in dict.fromkeys([sysconfig.get_path("purelib"), *sys.path]):
        homes.append(Path(site) / "nvidia" / "cu13")
    for home in homes:
        nvcc = home / "bin" / "nvcc"
        libs = [home / "lib64", home / "lib", *home.glob("targets/*/lib")]
        lib = next((lib for lib in libs if (lib / "libcudart_static.a").exists()), None)
        if not lib or not nvcc.exists():
            continue
        version = re.search(r"release (\d+)[.\d]*, V([.\d]+)", output(nvcc, "--version"))
        if version and tuple(map(int, version[2].split(".")[:2])) >= (12, 1):
            return Cuda(nvcc, lib, lib.parent / "include", version[2])
    return None


def output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr


def flags(name):
    return os.environ.get(name, "").split()


class Job(NamedTuple):
    """One compilation; `stamp` is all that decides its result beside the files it reads."""

    command: list
    target: Path
    stamp: str

    def is_stale(self):
        """The compiler left the list of files that it read in the .d file."""
        try:
            read = self.target.with_suffix(".d").read_text().replace("\\\n", " ").split(":", 1)[1]
            newest = max(Path(name).stat().st_mtime_ns for name in read.split())
            made = self.target.stat().st_mtime_ns
            return newest > made or self.target.with_suffix(".stamp").read_text() != self.stamp
        except (OSError, IndexError):
            return True

    def run(self, *how):
        """how: more options, which do not change the result."""
        self.target.with_suffix(".stamp").unlink(missing_ok=True)
        log = run(
            [*self.command, *how, "-MD", "-MF", self.target.with_suffix(".d"), "-o", self.target]
        )
        self.target.with_suffix(".log").write_text(log)
        self.target.with_suffix(".stamp").write_text(self.stamp)


def run(command):
    command = [str(word) for word in command]
    print(f"flatout: {Path(command[0]).name} -> {Path(command[-1]).name}", flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(" ".join(command), done.stdout, sep="\n", flush=True)
        hint = " (FLATOUT_CUDA=off builds without CUDA)" if "nvcc" in command[0] else ""
        raise SystemExit(f"flatout: {Path(command[0]).name} failed, see above{hint}")
    return done.stdout


class Build(build_ext):
    def build_extension(self, ext):
        mode = cuda_mode()
        cuda = None if mode == "off" else find_cuda()
        if mode == "require" and not cuda:
            raise SystemExit("FLATOUT_CUDA=require, but no nvcc in CUDA_HOME, PATH or wheels")
        self.archs = cuda.archs() if cuda else []
        self.names = " ".join(gencode(arch)[1] for arch in self.archs)
        what = f"CUDA {self.names} with {cuda.nvcc} {cuda.version}" if cuda else "CPU only, no nvcc"
        print(f"flatout: building for {what}", flush=True)

        slow = self.cuda_jobs(cuda) if cuda else []
        jobs = slow + self.c_jobs(cuda)
        for job in jobs:
            job.target.parent.mkdir(parents=True, exist_ok=True)
        self.compile(slow, [job for job in jobs if job.is_stale()])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*self.cc(), "-shared", *(job.target for job in jobs), "-fopenmp", "-lm"]
        if cuda:
            link += [f"-L{cuda.lib}", "-l:libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
        new = target.with_suffix(".new")  # a running process keeps the old file
        run([*link, "-Wl,--exclude-libs,ALL", *flags("LDFLAGS"), "-o", new])
        new.replace(target)

    def compile(self, slow, stale):
        """MAX_JOBS at a time; where there are fewer nvccs, each one does its architectures so."""
        workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
        nvccs = [job for job in stale if job in slow]
        threads = -(-workers // max(len(nvccs), 1))
        with ThreadPoolExecutor(workers) as pool:
            how = {job.target: [f"--threads={threads}"] for job in nvccs}
            list(pool.map(lambda job: job.run(*how.get(job.target, [])), stale))

    def cc(self):
        return os.environ.get("CC", "gcc").split()

    def folder(self, cuda):
        """Of the objects: one for each way to build, so that none undoes another's work."""
        ways = [sys.implementation.cache_tag, *self.cc(), *flags("CFLAGS"), str(cuda), *self.archs]
        name = hashlib.sha256(" ".join(ways).encode()).hexdigest()[:8]
        return ROOT / "build" / f"{'cuda' if cuda else 'cpu'}-{name}"

    def c_jobs(self, cuda):
        compiler = output(*self.cc(), "--version").partition("\n")[0]
        plain = [f'-DFLATOUT_VERSION="{VERSION}"', f"-isystem{sysconfig.get_path('include')}"]
        plain += [f"-isystem{numpy.get_include()}"]
        if ABI3:
            plain.append("-DPy_LIMITED_API=0x030b0000")
        if cuda:
            plain += [f'-DFLATOUT_CUDA_ARCHS="{self.names}"', f"-isystem{cuda.include}"]
        jobs = []
        for source in sorted((ROOT / "csrc").glob("*.c")):
            is_op = re.search(r"\bCPU\(", source.read_text())
            variants = {f"_{v}": [*f, f"-DVARIANT={v}"] for v, f in VARIANTS.items()}
            for suffix, more in variants.items() if is_op else [("", plain)]:
                command = [*self.cc(), *CFLAGS, *WARNINGS, *more, *flags("CFLAGS"), "-c", source]
                target = self.folder(cuda) / f"{source.stem}{suffix}.o"
                jobs.append(Job(command, target, f"{compiler}\n{command}"))
        return jobs

    def cuda_jobs(self, cuda):
        jobs = []
        for source in sorted((ROOT / "kernels").glob("*.cu")):
            is_hopper = '#include "sm90.cuh"' in source.read_text()
            archs = [arch for arch in self.archs if arch == "90a" or not is_hopper]
            if not archs:
                continue
            command = [cuda.nvcc, *NVCCFLAGS, *(gencode(a)[0] for a in archs), "-c", source]
            stamp = f"{cuda.version}\n{command}\n{flags('NVCC_APPEND_FLAGS')}"
            jobs.append(Job(command, self.folder(cuda) / f"{source.stem}.cu.o", stamp))
        return jobs


setup(
    ext_modules=[Extension("flatout._C", sources=[], py_limited_api=ABI3)],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ABI3 else {},
    # pip asks for this before it builds: where CUDA is required and missing, it brings it along.
    setup_requires=[CUDA_WHEELS] if cuda_mode() == "require" and not find_cuda() else [],
)
