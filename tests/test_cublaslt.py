"""csrc/cublaslt.c by itself, over a cuBLASLt that computes on the CPU (fake_cublaslt.c): layouts,
the choice of an algorithm, the file of choices, capture."""

import ctypes
import functools
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from test_matmul import view

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
HEADERS = [Path(p) / "include" for p in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if p]
HEADERS += [Path(site) / "nvidia" / "cu13" / "include" for site in sys.path]
HEADERS = [p for p in HEADERS if (p / "cuda_runtime_api.h").exists()]
WORKSPACE = 1 << 16

# The functions under test are hidden; and the one that is a kernel.
WRAPPER = """
#include <string.h>
#include "cublaslt.h"
#define E __attribute__((visibility("default")))
E const char *call_run(const Gemm *g) { return gemm(g, 0); }
E bool call_is_open(const Gemm *g) { return gemm_is_open(g, 0); }
E const char *call_choose(const Gemm *g) { return gemm_choose(g, 0); }
const char *checksum(unsigned long long *sum, const Tensor *t, void *stream) {
    (void)stream;
    for (int64_t i = 0; i < t->shape[0]; i++) {
        for (int64_t j = 0; j < t->shape[1]; j++) {
            float x = ((float *)t->data)[i * t->stride[0] + j * t->stride[1]];
            uint32_t bits;
            memcpy(&bits, &x, 4);
            sum[0] += (unsigned long long)(i * 1000003 + j + 1) * (bits + 1ull);
            sum[2] += x != 0;
        }
    }
    return NULL;
}
"""

pytestmark = pytest.mark.skipif(
    not shutil.which("gcc") or not HEADERS, reason="needs gcc and the CUDA runtime's headers"
)


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cublaslt")
    fake, ours = folder / "libcublasLt.so.13", folder / "ours.so"
    gcc = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*gcc, TESTS / "fake_cublaslt.c", "-Wl,-soname,libcublasLt.so.13", "-o", fake],
                   check=True)  # fmt: skip
    wrapper = folder / "wrapper.c"
    wrapper.write_text(WRAPPER)
    sources = [CSRC / "cublaslt.c", CSRC / "cublaslt_choice.c", CSRC / "cublaslt_file.c", wrapper]
    where = [f"-I{CSRC}", f"-isystem{sysconfig.get_path('include')}", f"-isystem{HEADERS[0]}"]
    subprocess.run([*gcc, '-DFLATOUT_CUDA_ARCHS="none"', *where, *sources, fake, "-o", ours],
                   check=True)  # fmt: skip
    return fake, ours


class Gemm(ctypes.Structure):  # csrc/cublaslt.h
    _fields_ = [(name, ctypes.c_void_p) for name in ("d", "a", "b", "bias", "workspace")]
    _fields_ += [("beta", ctypes.c_int)]


class Library:
    """A fresh copy of the code under test, with its own state and its own fake."""

    def __init__(self, binary, tmp_path):
        Library.count = getattr(Library, "count", 0) + 1
        copy = shutil.copy(binary[1], tmp_path / f"ours{Library.count}.so")
        self.fake = ctypes.CDLL(str(binary[0]), mode=ctypes.RTLD_GLOBAL)
        self.ours = ctypes.PyDLL(str(copy))  # it looks at sys.path: with the interpreter's lock
        self.ours.call_run.restype = self.ours.call_choose.restype = ctypes.c_char_p
        self.ours.call_is_open.restype = ctypes.c_bool
        self.costs = (ctypes.c_double * 5).in_dll(self.fake, "cost")
        self.costs[:] = [5.0, 4.0, 3.0, 2.0, 6.0]
        self.loading = (ctypes.c_double * 5).in_dll(self.fake, "loading")
        self.lapse = (ctypes.c_double * 5).in_dll(self.fake, "lapse")
        self.loading[:], self.lapse[:] = [0.0] * 5, [0.0] * 5
        self.wrong = (ctypes.c_int * 5).in_dll(self.fake, "is_wrong")
        self.fails = (ctypes.c_int * 5).in_dll(self.fake, "fails")
        self.wrong[:], self.fails[:] = [0] * 5, [0] * 5
        (ctypes.c_int * 5).in_dll(self.fake, "calls")[:] = [0] * 5
        self.set("is_capturing", 0)

    def get(self, name, kind=ctypes.c_int):
        return kind.in_dll(self.fake, name).value

    def set(self, name, value):
        ctypes.c_int.in_dll(self.fake, name).value = value

    def call(self, function, d, a, b, bias=None, beta=0, workspace=True):
        scratch = np.zeros(WORKSPACE + 64, np.float32)  # more than its length in bytes says
        scratch = torch.from_numpy(scratch[-scratch.ctypes.data % 256 // 4 :][:WORKSPACE])
        views = [view(t) for t in (d, a, b, bias, scratch if workspace else None)]
        pointers = [ctypes.cast(v, ctypes.c_void_p) if v is not None else None for v in views]
        error = getattr(self.ours, f"call_{function}")(ctypes.byref(Gemm(*pointers, beta)))
        if isinstance(error, bytes):
            raise RuntimeError(error.decode())
        return error


@pytest.fixture
def library(binary, tmp_path, monkeypatch):
    monkeypatch.delenv("FLATOUT_GEMM_TUNE", raising=False)
    monkeypatch.delenv("FLATOUT_GEMM_CACHE", raising=False)
    return functools.partial(Library, binary, tmp_path)


def matrix(rows, cols, how):
    if how == "rows":
        return torch.randn(rows, cols)
    if how == "columns":
        return torch.randn(cols, rows).t()
    if how == "gaps":
        return torch.randn(rows, cols + 5)[:, 2 : 2 + cols]
    return torch.randn(cols + 1, rows + 3).t()[3:, 1:]


@pytest.mark.parametrize("m, k, n", [(5, 7, 3), (1, 4, 6), (4, 1, 6), (4, 6, 1), (1, 1, 1)])
@pytest.mark.parametrize("left", ["rows", "columns", "gaps", "gaps in columns"])
@pytest.mark.parametrize("right", ["rows", "columns", "gaps", "gaps in columns"])
def test_layouts(left, right, m, k, n, library):
    a, b, bias = matrix(m, k, left), matrix(k, n, right), torch.randn(n)
    run = library().call
    for d in (torch.randn(m, n), torch.randn(m, n + 3)[:, :n]):
        before = d.clone()
        run("run", d, a, b)
        torch.testing.assert_close(d, a @ b)
        run("run", d, a, b, bias)
        torch.testing.assert_close(d, a @ b + bias)
        d.copy_(before)
        run("run", d, a, b, beta=1)
        torch.testing.assert_close(d, a @ b + before)


def test_empty(library):
    lib = library()
    d = torch.ones(3, 4)
    lib.call("run", d, torch.ones(3, 0), torch.ones(0, 4), beta=1)
    assert (d == 1).all()
    lib.call("run", d, torch.ones(3, 0), torch.ones(0, 4))
    assert not d.any()
    lib.call("run", torch.ones(0, 4), torch.ones(0, 2), torch.ones(2, 4))
    with pytest.raises(RuntimeError, match="NotImplementedError: a bias"):
        lib.call("run", d, torch.ones(3, 0), torch.ones(0, 4), torch.ones(4))


def test_refused(library):
    lib, d, b = library(), torch.ones(3, 4), torch.ones(5, 4)
    for a in (torch.ones(1, 5).expand(3, 5), torch.ones(3, 10)[:, ::2]):
        with pytest.raises(RuntimeError, match="ValueError: rows that overlap or have gaps"):
            lib.call("run", d, a, b)
    with pytest.raises(RuntimeError, match="NotImplementedError: bias"):
        lib.call("run", d, torch.ones(3, 5), b, torch.ones(4).half())


def large(zeros=False):
    """Just beyond what is worth a choice."""
    a, b = torch.ones(1500, 2300), torch.ones(2300, 1500)
    return torch.zeros(1500, 1500), a * (not zeros), b


def test_the_fastest_equal_candidate_is_chosen(library):
    lib, operands = library(), large()
    lib.wrong[3], lib.fails[4] = 1, 1
    d, a, b = operands
    lib.call("run", d, a, b)
    assert lib.get("used", ctypes.c_uint64) == 0, "the heuristic's first, before a choice"
    first = d.clone()
    for beta in (0, 1):
        assert lib.call("is_open", d, a, b, beta=beta)
        lib.call("choose", d, a, b, beta=beta)
        assert not lib.call("is_open", d, a, b, beta=beta)
        d.zero_()
        lib.call("run", d, a, b, beta=beta)
        assert lib.get("used", ctypes.c_uint64) == 2 and torch.equal(d, first)
    products = lib.get("products")
    lib.call("choose", d, a, b)
    assert lib.get("products") == products, "chosen twice"
    assert lib.get("live") == 0, "a descriptor or an event is left"


@pytest.mark.parametrize("beta", [0, 1])
def test_loading_a_kernel_is_no_part_of_its_time(beta, library):
    lib, (d, a, b) = library(), large()
    lib.loading[:] = [50.0, 10.0, 90.0, 70.0, 20.0]
    lib.call("choose", d, a, b, beta=beta)
    lib.call("run", d, a, b, beta=beta)
    assert lib.get("used", ctypes.c_uint64) == 3, "the fastest, of those loaded"


@pytest.mark.parametrize(
    "costs, lapses, chosen",
    [
        ([5, 4.04, 4.0, 6, 6], [0] * 5, 1),  # a draw: the heuristic's order
        ([5, 4.2, 4.0, 6, 6], [0] * 5, 2),
        ([3.5, 5, 3, 5, 5], [0, 0, 8, 0, 0], 0),  # slow now and then
        ([14, 15, 13, 30, 30], [0, 0, 8, 0, 0], 0),  # long ones, too, are run more than once
    ],
)
def test_draws_and_algorithms_that_lapse(costs, lapses, chosen, library):
    lib, (d, a, b) = library(), large()
    lib.costs[:], lib.lapse[:] = costs, lapses
    lib.call("choose", d, a, b)
    lib.call("run", d, a, b)
    assert lib.get("used", ctypes.c_uint64) == chosen


def test_nothing_is_chosen_where_the_clock_stands_still(library):
    lib, (d, a, b) = library(), large()
    lib.costs[:] = [0.0] * 5
    lib.call("choose", d, a, b)
    lib.call("run", d, a, b)
    assert lib.get("used", ctypes.c_uint64) == 0 and lib.call("is_open", d, a, b)


def test_nothing_is_chosen_where_zeros_hide_differences(library):
    lib, (d, a, b) = library(), large(zeros=True)
    for _ in range(3):
        assert lib.call("is_open", d, a, b)
        lib.call("choose", d, a, b)
        lib.call("run", d, a, b)
        assert lib.get("used", ctypes.c_uint64) == 0
    assert not lib.call("is_open", d, a, b), "tried for ever"


def test_not_open(library, monkeypatch):
    lib, (d, a, b) = library(), large()
    assert not lib.call("is_open", d[:64], a[:64], b), "small"
    assert not lib.call("is_open", d, a, b, workspace=False)
    lib.set("is_capturing", 1)
    assert not lib.call("is_open", d, a, b)
    lib.call("choose", d, a, b)
    lib.call("run", d, a, b)
    assert lib.get("used", ctypes.c_uint64) == 0
    lib.set("is_capturing", 0)
    assert lib.call("is_open", d, a, b), "what was captured is open afterwards"
    monkeypatch.setenv("FLATOUT_GEMM_TUNE", "off")
    assert not library().call("is_open", d, a, b)


def test_the_file_of_choices(library, monkeypatch, tmp_path):
    path = tmp_path / "choices"
    monkeypatch.setenv("FLATOUT_GEMM_CACHE", str(path))
    d, a, b = large()
    lib = library()
    lib.call("choose", d, a, b)
    lib.call("choose", d, a, b, beta=1)
    text = path.read_text()
    assert text.count("\n") == 2 and text.startswith("A fake GPU, driver 13000, cuBLASLt 130100: ")
    assert path.stat().st_mode & 0o777 == 0o644 and list(tmp_path.glob("choices.*")) == []
    other = library()
    assert not other.call("is_open", d, a, b)
    other.call("run", d, a, b)
    assert other.get("used", ctypes.c_uint64) == 3 and path.read_text() == text
    # Another library's algorithm is not taken, nor is a damaged line; the file is kept.
    for damaged in (text.replace("0abc", "0abd"), text[:-30] + "\n", "words\n"):
        path.write_text(damaged)
        assert library().call("is_open", d, a, b, beta=1)
        library().call("choose", d, a, b, beta=1)
        assert path.read_text().startswith(damaged)
    path.write_text("no end of line")
    library().call("choose", d, a, b)
    assert path.read_text() == "no end of line", "somebody else's file"
    # Nor is what is no file at all.
    monkeypatch.setenv("FLATOUT_GEMM_CACHE", str(path := tmp_path / "socket"))
    os.mknod(path, stat.S_IFSOCK)
    library().call("choose", d, a, b)
    assert path.is_socket() and list(tmp_path.glob("socket.*")) == []
