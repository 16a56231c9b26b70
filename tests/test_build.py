"""The package as it is built and installed: symbols, tags, import time, modes of FLATOUT_CUDA."""

import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import setuptools
import setuptools.command.build_ext  # noqa: F401  before sys.path is taken from setup.py
from conftest import HANG

import flatout
from flatout import _C

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, ok=True, **keywords):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=HANG, **keywords
    )
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(code, **environment):
    path = os.pathsep.join(sys.path)
    return run(sys.executable, "-c", code, env={**os.environ, "PYTHONPATH": path, **environment})


# ---- The module -------------------------------------------------------------------------------


def needs_binutils(name):
    return pytest.mark.skipif(not shutil.which(name), reason=f"needs {name}")


@needs_binutils("nm")
def test_one_symbol_is_exported():
    symbols = run("nm", "-D", "--defined-only", "--format=posix", _C.__file__).split("\n")
    assert [line.split()[0] for line in symbols if line] == ["PyInit__C"]


@needs_binutils("readelf")
def test_needs_nothing_but_libc_libm_libgomp():
    needed = re.findall(r"NEEDED.*\[(.*)\]", run("readelf", "-d", _C.__file__))
    names = {re.sub(r"\.so.*", "", name) for name in needed}
    assert names <= {"libc", "libm", "libgomp", "ld-linux-x86-64", "ld-linux-aarch64"}


@needs_binutils("nm")
def test_only_the_stable_abi_is_used():
    """No private function of CPython, whose names begin with an underscore."""
    symbols = re.findall(r"\bU (_Py\w+)", run("nm", "-D", _C.__file__))
    # But for what the limited API's own macros stand for.
    macros = re.compile(r"_Py_Dealloc|_Py_\w+Struct|_Py\w+_SizeT")
    assert [name for name in symbols if not macros.fullmatch(name)] == []


def test_file_name_is_that_of_abi3():
    assert Path(_C.__file__).name == "_C.abi3.so"


# ---- Import -----------------------------------------------------------------------------------


def test_import_is_quick_and_brings_no_torch():
    """flatout adds less than 50 ms to NumPy's import. In processes of their own, the
    median of several, and the best of three tries, because machines are busy."""
    code = (
        "import time, numpy, sys; t = time.perf_counter(); import flatout; "
        "print(time.perf_counter() - t); assert 'torch' not in sys.modules"
    )
    for _ in range(3):
        median = statistics.median(float(python(code)) for _ in range(5))
        if median < 0.05:
            return
    pytest.fail(f"import flatout took {median * 1e3:.0f} ms over import numpy")


def test_import_leaves_the_process_alone():
    """No signal handler, locale, directory, thread or floating point mode changes."""
    python(
        """
import locale, os, signal, sys, threading
import numpy as np
def state():
    signals = {s: signal.getsignal(s) for s in signal.valid_signals()}
    tiny = float(np.float32(1e-40) * np.float32(0.5))  # 0 where denormals are flushed
    return (signals, locale.setlocale(locale.LC_ALL), os.getcwd(), threading.active_count(),
            tiny, sys.getswitchinterval(), len(os.listdir("/proc/self/task")))
before = state()
import flatout
flatout.rms_norm(np.ones((2, 8), np.float32), np.ones(8, np.float32))
assert before == state(), (before, state())
"""
    )


def test_import_twice_and_with_warnings_as_errors():
    python(
        "import sys, flatout; old = flatout._C\n"
        "for name in [n for n in sys.modules if n.startswith('flatout')]: del sys.modules[name]\n"
        "import flatout; flatout.info()",
        PYTHONWARNINGS="error",
    )


# ---- info() -------------------------------------------------------------------------------------


def test_info():
    info = flatout.info()
    assert info["flatout"] == PROJECT["version"]
    assert info["backends"] == (["cpu", "cuda"] if info["cuda"] else ["cpu"])
    assert info["cpu"]["level"] in ("plain", "avx2", "avx512") and info["cpu"]["threads"] >= 1
    assert {"rms_norm", "add_rms_norm"} <= set(info["features"]["cpu"])
    assert info["versions"]["python"] == sys.version.split()[0]
    if info["cuda"]:
        assert info["cuda"]["archs"] and all(
            re.fullmatch(r"(sm|compute)_\d+a?", arch) for arch in info["cuda"]["archs"]
        )
        assert re.fullmatch(r"1[2-9]\.\d+", info["cuda"]["version"])
        assert "rms_norm" in info["features"]["cuda"]
    else:
        assert "not built in" in str(info)
    for key in info:
        assert re.search(rf"^{key} ", str(info), re.M)


@pytest.mark.parametrize("level", ["plain", "avx2"])
def test_info_tells_the_instruction_set_in_use(level):
    found = python("import flatout; print(flatout.info()['cpu']['level'])", FLATOUT_CPU=level)
    assert found.strip() in ("plain", level)


def test_info_without_driver_or_torch():
    python(
        "import sys; sys.modules['torch'] = None; import flatout; flatout.info()",
        CUDA_VISIBLE_DEVICES="",
    )


# ---- Building -----------------------------------------------------------------------------------


class Setup:
    """setup.py as a module, run with setuptools.setup() only noting its arguments, in a world where
    no toolkit is found but those that the test makes."""

    def __init__(self, monkeypatch, tmp_path):
        self.monkeypatch, self.folder = monkeypatch, tmp_path
        (tmp_path / "bin").mkdir()
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        for name in ("CUDA_HOME", "CUDA_PATH", "FLATOUT_CUDA"):
            monkeypatch.delenv(name, raising=False)

    def run(self, mode=None, site="nowhere"):
        if mode:
            self.monkeypatch.setenv("FLATOUT_CUDA", mode)
        spec = importlib.util.spec_from_file_location("flatout_setup", ROOT / "setup.py")
        module, said = importlib.util.module_from_spec(spec), {}
        real_which = shutil.which
        with self.monkeypatch.context() as patch:
            patch.setattr(setuptools, "setup", lambda **arguments: said.update(arguments))
            patch.setattr(sysconfig, "get_path", lambda name: str(self.folder / site))
            patch.setattr(sys, "path", [str(self.folder / site)])
            patch.setattr(
                shutil,
                "which",
                lambda name: real_which(name, path=self.folder / "bin") if name == "nvcc" else None,
            )
            spec.loader.exec_module(module)
            self.module = module
            return module.find_cuda(), said

    def toolkit(self, home, lib="lib64", version="13.0", codes="sm_80 sm_90 sm_100 sm_120"):
        home = self.folder / home
        for folder in (home / "bin", home / lib):
            folder.mkdir(parents=True)
        (home / lib / "libcudart_static.a").touch()
        says = f"Cuda compilation tools, release {version}, V{version}.88"
        self.script(home / "bin" / "nvcc", f"echo '{says}'; printf '%s\\n' {codes}")
        return home

    def script(self, path, line):
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)


@pytest.fixture
def build(monkeypatch, tmp_path):
    return Setup(monkeypatch, tmp_path)


def test_without_nvcc(build):
    for mode, wanted in (("auto", 0), ("off", 0), ("require", 1)):
        found, said = build.run(mode)
        assert found is None
        assert len(said["setup_requires"]) == wanted  # what pip brings into an isolated build
    assert PROJECT["optional-dependencies"]["cuda-build"] == said["setup_requires"]
    with pytest.raises(SystemExit, match="FLATOUT_CUDA: expected auto, off or require, got 'on'"):
        build.run("on")


def test_cuda_home(build, monkeypatch):
    home = build.toolkit("cuda")
    monkeypatch.setenv("CUDA_HOME", str(home))
    found, said = build.run("require")
    assert (found.nvcc, found.lib) == (home / "bin/nvcc", home / "lib64")
    assert found.include == home / "include" and found.version == "13.0.88"
    assert said["setup_requires"] == []


def test_wrapper_script_on_path(build):
    home = build.toolkit("cuda", lib="targets/x86_64-linux/lib")
    build.script(build.folder / "bin" / "nvcc", f"echo '#$ TOP={home}' >&2")
    found, _ = build.run()
    assert found.nvcc == home / "bin/nvcc" and found.lib == home / "targets/x86_64-linux/lib"


def test_wheels(build):
    home = build.toolkit("site/nvidia/cu13", lib="lib")
    found, _ = build.run("require", site="site")
    assert found.nvcc == home / "bin/nvcc" and found.lib == home / "lib"


def test_toolkits_that_do_not_do(build, monkeypatch):
    """One of CUDA 11, one without the static runtime, one that does not run."""
    old = build.toolkit("old", version="11.8")
    bare = build.toolkit("bare")
    (bare / "lib64/libcudart_static.a").unlink()
    broken = build.toolkit("broken")
    (broken / "bin/nvcc").write_text("not a program")
    for home in (old, bare, broken):
        monkeypatch.setenv("CUDA_HOME", str(home))
        assert build.run()[0] is None
    good = build.toolkit("site/nvidia/cu13", lib="lib")
    assert build.run(site="site")[0].nvcc == good / "bin/nvcc"


def test_architectures(build, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(build.toolkit("cuda")))
    cuda, _ = build.run()
    assert " ".join(cuda.archs()) == build.module.ARCHS
    monkeypatch.setenv("FLATOUT_CUDA_ARCH", "90a, 86 80-ptx")
    assert cuda.archs() == ["90a", "86", "80-ptx"]
    monkeypatch.setenv("FLATOUT_CUDA_ARCH", "sm_90a")
    with pytest.raises(SystemExit, match="FLATOUT_CUDA_ARCH: expected .* got 'sm_90a'"):
        cuda.archs()
    for arch, *option in (
        ("80", "compute_80", "sm_80"),
        ("89", "compute_80", "sm_89"),
        ("90a", "compute_90a", "sm_90a"),
        ("120", "compute_90", "sm_120"),
        ("90-ptx", "compute_90", "compute_90"),
    ):
        wanted = "-gencode=arch={},code={}".format(*option), option[1]
        assert build.module.gencode(arch) == wanted


def test_architectures_that_an_older_nvcc_does_not_know(build, monkeypatch):
    monkeypatch.delenv("FLATOUT_CUDA_ARCH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(build.toolkit("cuda", version="12.4", codes="sm_80 sm_90")))
    assert build.run()[0].archs() == ["80", "90a", "90-ptx"]


def test_files_for_hopper_alone(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(build.toolkit("cuda")))
    cuda, _ = build.run()
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/a.cu").write_text('#include "common.cuh"\n')
    (tmp_path / "kernels/b.cu").write_text('#include "common.cuh"\n#include "sm90.cuh"\n')
    monkeypatch.setattr(build.module, "ROOT", tmp_path)
    command = build.module.Build(setuptools.Distribution())

    def codes(*archs):
        command.archs = archs
        return [re.findall(r",code=(\w+)", str(job.command)) for job in command.cuda_jobs(cuda)]

    assert codes("80", "90a", "90-ptx") == [["sm_80", "sm_90a", "compute_90"], ["sm_90a"]]
    assert codes("80-ptx") == [["compute_80"]]


def test_attention_is_for_hopper_alone(build, monkeypatch):
    """Every file that uses a header of Hopper's instructions is known by its own includes."""
    monkeypatch.setenv("CUDA_HOME", str(build.toolkit("cuda")))
    cuda, _ = build.run()
    command = build.module.Build(setuptools.Distribution())
    command.archs = ["80"]
    compiled = {Path(job.command[-1]).name for job in command.cuda_jobs(cuda)}
    kernels = Path(build.module.ROOT) / "kernels"
    hopper = {p.name for p in kernels.glob("attention*.cu")}
    assert len(hopper) > 1 and compiled == {p.name for p in kernels.glob("*.cu")} - hopper


def test_objects_are_made_again_when_something_changed(build, tmp_path):
    build.run()
    module = build.module
    source, header = tmp_path / "a.c", tmp_path / "a.h"
    header.write_text("int a;")
    source.write_text('#include "a.h"\nint b;')

    def job(stamp):
        return module.Job(["gcc", "-c", source], tmp_path / "a.o", stamp)

    assert job("1").is_stale()
    job("1").run()
    assert not job("1").is_stale()
    assert job("another command or compiler").is_stale()
    later = (tmp_path / "a.o").stat().st_mtime + 1
    os.utime(header, (later, later))
    assert job("1").is_stale()
    job("1").run()
    header.unlink()
    assert job("1").is_stale()
    with pytest.raises(SystemExit, match="gcc failed"):
        job("1").run()
    assert job("1").is_stale()


# ---- Kernels compiled clean: .ci/check_cuda.py --------------------------------------------------

KERNELS = """
__global__ void __launch_bounds__(64) clean(float *x) { x[threadIdx.x] += 1; }
#ifdef PLANTED
__global__ void unbounded(float *x) { x[threadIdx.x] += 1; }
__global__ void __launch_bounds__(64) local_array(float *x, const int *at) {
    float held[64];
    for (int i = 0; i < 64; i++) held[at[i] & 63] = x[i];
    x[threadIdx.x] = held[at[threadIdx.x] & 63];
}
__global__ void __launch_bounds__(1024, 2) spilled(float *x) {
    float held[64];
#pragma unroll
    for (int i = 0; i < 64; i++) held[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; i++) x[threadIdx.x * 64 + i] = held[i] * held[63 - i];
}
#endif
"""


@pytest.fixture
def check_cuda():
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / ".ci/check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_of_kernels(check_cuda, tmp_path, capsys, monkeypatch):
    """Machine code with planted faults; each one is found in every architecture, and only they."""
    try:
        check_cuda.cuobjdump("--version")
    except FileNotFoundError:
        pytest.skip("needs cuobjdump")
    if not shutil.which("nvcc"):
        pytest.skip("needs nvcc on PATH")
    monkeypatch.delenv("NVCC_APPEND_FLAGS", raising=False)
    (tmp_path / "a.cu").write_text(KERNELS)
    flags = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    for planted in ("-UPLANTED", "-DPLANTED"):
        command = ["nvcc", *flags, planted, "-Xptxas=-v", "-c", "a.cu", "-o", "a.o"]
        (tmp_path / "a.log").write_text(run(*command, cwd=tmp_path))
        failed = check_cuda.main(tmp_path / "a.o", tmp_path / "a.log")
        said = capsys.readouterr().out
        assert failed == (planted == "-DPLANTED")
        if not failed:
            assert re.search(r"^ +\d+ +\d+ +64 +32  clean$", said, re.M)
            continue
        for arch in ("sm_80", "sm_90a"):
            assert re.search(rf"^{arch} \S*unbounded\S*: no __launch_bounds__$", said, re.M)
            for name in ("local_array", "spilled"):
                assert re.search(rf"^{arch} \S*{name}\S*: \d+ bytes of stack", said, re.M)
            assert re.search(rf"^a.log: {arch} \S*spilled\S*: .* spill loads$", said, re.M)
    assert check_cuda.main(tmp_path / "a.o") and "in no log" in capsys.readouterr().out


def test_check_of_attention(check_cuda, monkeypatch):
    """A module without attention's kernels, or with one that does not use what it should."""
    monkeypatch.setattr(check_cuda, "cuobjdump", lambda *_: "")
    assert len(list(check_cuda.check_attention("a.so"))) == 2
    assert not list(check_cuda.check_attention("a.o"))
    sass = {"fwd": "HGMMA UTMALDG UTMASTG", "bwd": "HGMMA UTMALDG UTMASTG UTMAREDG"}

    def said():
        text = "".join(f"Function : attention_{k}_kernel\n{v}\n" for k, v in sass.items())
        monkeypatch.setattr(check_cuda, "cuobjdump", lambda *_: text)
        return list(check_cuda.check_attention("a.so"))

    assert not said()
    sass["fwd"] += " LDL"
    assert len(said()) == 1
    sass["fwd"], sass["bwd"] = "HGMMA UTMALDG UTMASTG", "UTMALDG UTMASTG UTMAREDG"
    assert len(said()) == 1


def test_check_of_what_ptxas_says(check_cuda, tmp_path):
    log = tmp_path / "a.log"
    entry = "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
    log.write_text(f"{entry}    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n")
    assert check_cuda.check_log(log) == ({("sm_90a", "k")}, [])
    for line in (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are ...",
        "ptxas warning : setmaxnreg ignored",
        "    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
    ):
        log.write_text(entry + line)
        assert check_cuda.check_log(log)[1] == [f"a.log: sm_90a k: {line.strip()}"]


def test_registers_that_do_not_fit(check_cuda):
    def kernel(registers, threads):
        return check_cuda.Kernel(registers, stack=0, shared=0, threads=threads)

    assert (kernel(64, 256).blocks(), kernel(65, 256).blocks(), kernel(32, 64).blocks()) == (
        4,
        3,
        32,
    )
    assert list(kernel(64, 1024).faults()) == []
    assert "do not fit" in next(kernel(65, 1024).faults())


# ---- Distributions ------------------------------------------------------------------------------


def test_source_distribution(tmp_path):
    """Holds what a build needs: neither folder of sources is a Python package."""
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", code, tmp_path, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("flatout-*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    suffixes = (".c", ".h", ".cu", ".cuh", ".py")
    for folder in ("csrc", "kernels", "python", "tests"):
        files = [file for file in (ROOT / folder).rglob("*.[chp]*") if "egg-info" not in str(file)]
        wanted = {str(f.relative_to(ROOT)) for f in files if f.suffix in suffixes}
        assert wanted <= names
    assert {"setup.py", "Makefile", "constraints.txt", "LICENSE"} <= names


def interpreters():
    """Pythons of other versions on this machine: those on PATH and pyenv's."""
    for version in ("3.11", "3.12", "3.13", "3.14"):
        pyenv = Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
        for candidate in (*pyenv, shutil.which(f"python{version}")):
            command = [candidate, "-c", "import venv, sys; print(*sys.version_info[:2], sep='.')"]
            if candidate and subprocess.run(command, capture_output=True).returncode == 0:
                yield candidate
                break


CHECK = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import flatout, ref
rng = np.random.default_rng(0)
for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5), (np.float16, 1e-2)):
    x, w, dy = (rng.standard_normal(s).astype(dtype) for s in ((5, 33), (33,), (5, 33)))
    y = flatout.rms_norm(x, w)
    want = ref.rms_norm(*(a.astype(np.float64) for a in (x, w)), 1e-6)
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=tolerance, atol=tolerance)
    dx, dw = flatout.rms_norm_bwd(dy, x, w)
    assert dx.shape == x.shape and dw.shape == w.shape and np.isfinite(dx).all()
    assert not np.array_equal(dx, dy)
try:
    flatout.rms_norm(x, w[:-1])
except ValueError as error:
    assert "expected shape" in str(error)
else:
    raise AssertionError
print(flatout.info())
"""


@pytest.mark.slow
def test_wheel_from_nothing_but_pip(tmp_path):
    """`pip wheel .` with build isolation in a fresh environment; that one wheel runs on every
    Python from 3.11 on that this machine has."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "PYTHONPATH")}
    env = {**kept, "FLATOUT_CUDA": "off", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(sys.executable, "-m", "venv", tmp_path / "build")
    pip = [tmp_path / "build/bin/python", "-m", "pip"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, env=env)
    wheel = next(tmp_path.glob("*.whl"))
    version, machine = PROJECT["version"], os.uname().machine
    assert wheel.name == f"flatout-{version}-cp311-abi3-linux_{machine}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if "dist-info" not in name}
    modules = {str(f.relative_to(ROOT / "python")) for f in (ROOT / "python").rglob("*.py")}
    assert names == modules | {"flatout/_C.abi3.so", "flatout/py.typed"}
    for number, interpreter in enumerate(interpreters()):
        place = tmp_path / str(number)
        run(interpreter, "-m", "venv", place)
        run(place / "bin/python", "-m", "pip", "install", wheel, env=env)
        told = run(place / "bin/python", "-c", CHECK, ROOT / "tests", env=env, cwd=tmp_path)
        assert "not built in (no nvcc was used)" in told
        shutil.rmtree(place)
