"""csrc/matmul.c by itself, compiled for every instruction set that runs here."""

import ctypes
import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

SOURCES = [Path(__file__).parent.parent / "csrc" / name for name in ("matmul.c", "cpu.c")]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
VARIANTS = {"f32": [], "f64": ["-DREAL_IS_DOUBLE"]}
if platform.machine() == "x86_64" and Path("/proc/cpuinfo").exists():
    has = Path("/proc/cpuinfo").read_text().split()
    VARIANTS |= {"f32_avx2": ["-mavx2", "-mfma"]} if "avx2" in has and "fma" in has else {}
    VARIANTS |= {"f32_avx512": AVX512} if "avx512vl" in has and "avx512dq" in has else {}
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


class View(ctypes.Structure):  # csrc/ops.h: Tensor
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 8),
        ("stride", ctypes.c_int64 * 8),
        ("name", ctypes.c_char_p),
        ("ndim", ctypes.c_int),
        ("device", ctypes.c_int),
        ("dtype", ctypes.c_int),
        ("readonly", ctypes.c_int),
        ("low", ctypes.c_size_t),
        ("high", ctypes.c_size_t),
    ]


def view(x):
    if x is None:
        return None
    view = View(data=x.data_ptr(), ndim=x.ndim, dtype=CODES[x.dtype])
    view.shape[: x.ndim], view.stride[: x.ndim] = x.shape, x.stride()
    return ctypes.byref(view)


@pytest.fixture(scope="module", params=VARIANTS)
def library(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("matmul") / f"{request.param}.so"
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=fast"]
    flags += [*VARIANTS[request.param], f"-DVARIANT={request.param}"]
    subprocess.run(["gcc", *flags, *SOURCES, "-o", out, "-lm"], check=True)
    library = ctypes.CDLL(str(out))
    library.variant = request.param
    return library


def matmul(library, c, a, b, bias=None, beta=0):
    f = getattr(library, f"matmul_cpu_{library.variant}")
    f.argtypes, f.restype = [ctypes.c_void_p] * 4 + [ctypes.c_int], ctypes.c_char_p
    assert f(view(c), view(a), view(b), view(bias), beta) is None


def dtypes(library):
    return [torch.float64] if library.variant == "f64" else [d for d in CODES if d.itemsize < 8]


def integers(m, n, dtype, layout):
    """Small integers: products and sums are exact, so every answer has one right value."""
    if layout == "transposed":
        return torch.randint(-3, 4, (n, m)).to(dtype).t()
    if layout == "strided":
        return torch.randint(-3, 4, (m, 2 * n + 2)).to(dtype)[:, 1 : 2 * n + 1 : 2]
    return torch.randint(-3, 4, (m, n + 3)).to(dtype)[:, 1 : n + 1]


LAYOUTS = [
    ("rows", "rows"),
    ("rows", "transposed"),
    ("transposed", "rows"),
    ("transposed", "strided"),
    ("strided", "transposed"),
]


@pytest.mark.parametrize("layouts", LAYOUTS)
def test_exact(library, layouts):
    for m, n, k in itertools.product([0, 1, 5, 13, 97, 200], [1, 31, 64, 130], [0, 1, 3, 256, 515]):
        dtype = dtypes(library)[(m + n + k) % len(dtypes(library))]
        a, b = integers(m, k, dtype, layouts[0]), integers(k, n, dtype, layouts[1])
        want = a.double() @ b.double()
        c = torch.full((m, n + 7), 99, dtype=max(dtypes(library), key=lambda d: d.itemsize))
        matmul(library, c[:, 2 : n + 2], a, b)
        assert torch.equal(c[:, 2 : n + 2].double(), want), (m, n, k, dtype)
        assert (c[:, :2] == 99).all() and (c[:, n + 2 :] == 99).all()
        if a.dtype == c.dtype:
            matmul(library, c[:, 2 : n + 2], a, b, beta=1)
            assert torch.equal(c[:, 2 : n + 2].double(), 2 * want), (m, n, k)


def test_bias_and_beta_round_once(library):
    for dtype in dtypes(library):
        a, b = torch.randn(100, 300).to(dtype), torch.randn(70, 300).to(dtype).t()
        bias, old = torch.randn(70).to(dtype), torch.randn(100, 70).to(dtype)
        c = old.clone()
        matmul(library, c, a, b, bias, 1)
        want = (a.double() @ b.double() + bias.double() + old.double()).numpy()
        half_ulp = torch.finfo(dtype).eps / 2
        real = 2.0**-50 if dtype == torch.float64 else 2.0**-22
        limit = half_ulp * 1.01 * np.abs(want) + real * 300
        assert (np.abs(c.double().numpy() - want) <= limit).all(), dtype


@pytest.mark.parametrize("beta", [0, 1])
def test_threads_and_tiles_do_not_change_a_bit(library, beta):
    """Nor does the part of the matrix that is asked for."""
    for dtype in dtypes(library):
        a, b = torch.randn(801, 520).to(dtype), torch.randn(520, 530).to(dtype)
        old = torch.randn(801, 530).to(dtype)
        results = []
        for count in (1, 2, 3):
            library.cpu_set_threads(count)
            c = old.clone()
            matmul(library, c, a, b, None, beta)
            results.append(c)
        assert all(torch.equal(r, results[0]) for r in results)
        part = old[100:103, 37:93].clone()
        matmul(library, part, a[100:103], b[:, 37:93], None, beta)
        assert torch.equal(part, results[0][100:103, 37:93])


def test_infinities_stay_in_their_row_and_column(library):
    dtype = dtypes(library)[0]
    a, b = torch.ones(20, 40, dtype=dtype), torch.ones(40, 50, dtype=dtype)
    a[3, 7], b[9, 11] = float("nan"), float("inf")
    c = torch.empty(20, 50, dtype=dtype)
    matmul(library, c, a, b)
    assert c[3].isnan().all() and c[:3, 11].isinf().all()
    c[3], c[:, 11] = 40, 40
    assert (c == 40).all()
