"""run_ops.py --gemm: cuBLASLt's algorithms on the matrix products of one Qwen3-8B step of 2048
tokens: the heuristic's first, the best of those it returns, and the best of many more, built from
the library's lists of tiles, stages, clusters and swizzles."""

import ctypes
import datetime
import functools
import itertools
import random

import torch

from . import timing

TOKENS, LAYERS = 2048, 36
LINEAR = {"qkv": (4096, 6144), "o": (4096, 4096), "gate_up": (4096, 24576), "down": (12288, 4096),
          "lm_head": (4096, 151936)}  # fmt: skip
WORKSPACE = 32 << 20
RETURNED = 8  # candidates asked of the heuristic
TRIED, FINALISTS = 400, 8  # configurations timed once; of them, in turn with the heuristic's
CLUSTERS = (0, 2, 3, 4, 5, 6, 7, 8)  # cublasLtClusterShape_t: auto, 1x1, 2x1, 4x1, 1x2, 2x2, ...
CONFIG = {"tile": 1, "swizzle": 4, "custom": 5, "stages": 6, "cluster": 8}
BF16, COMPUTE_32F, SCALE_32F = 14, 68, 0


class Algorithm(ctypes.Structure):
    _fields_ = [("data", ctypes.c_uint64 * 8)]


class Candidate(ctypes.Structure):
    _fields_ = [("algorithm", Algorithm), ("workspace", ctypes.c_size_t), ("status", ctypes.c_int),
                ("waves", ctypes.c_float), ("reserved", ctypes.c_int * 4)]  # fmt: skip


def library():
    for name in ("libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise SystemExit("--gemm: torch's cuBLASLt is not loaded")


class Product:
    """d (m, n) = a b, row-major, a and b given as stored and whether they are transposed."""

    def __init__(self, lt, handle, a, b, a_turned, b_turned, m, n):
        self.lt, self.handle, self.a, self.b = lt, handle, a, b
        self.d = torch.empty(m, n, device="cuda", dtype=a.dtype)
        self.flops = 2 * m * n * (a.shape[0] if a_turned else a.shape[1])
        self.workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
        self.desc = ctypes.c_void_p()
        self.call("MatmulDescCreate", ctypes.byref(self.desc), COMPUTE_32F, SCALE_32F)
        for name, turned in ((3, b_turned), (4, a_turned)):  # columns first: its A is our b
            value = ctypes.c_int32(turned)
            self.call("MatmulDescSetAttribute", self.desc, name, ctypes.byref(value), 4)
        self.layouts = [self.layout(t) for t in (b, a, self.d, self.d)]

    def layout(self, t):
        out = ctypes.c_void_p()
        rows, cols = ctypes.c_uint64(t.shape[1]), ctypes.c_uint64(t.shape[0])
        self.call("MatrixLayoutCreate", ctypes.byref(out), BF16, rows, cols,
                  ctypes.c_int64(t.stride(0)))  # fmt: skip
        return out

    def call(self, name, *arguments):
        if status := getattr(self.lt, f"cublasLt{name}")(*arguments):
            raise RuntimeError(f"cublasLt{name}: status {status}")

    def heuristic(self):
        prefer, most = ctypes.c_void_p(), ctypes.c_uint64(WORKSPACE)
        self.call("MatmulPreferenceCreate", ctypes.byref(prefer))
        self.call("MatmulPreferenceSetAttribute", prefer, 1, ctypes.byref(most), 8)
        out, found = (Candidate * RETURNED)(), ctypes.c_int()
        self.call("MatmulAlgoGetHeuristic", self.handle, self.desc, *self.layouts, prefer, RETURNED,
                  out, ctypes.byref(found))  # fmt: skip
        return [Algorithm.from_buffer_copy(c.algorithm) for c in out[: found.value]]

    def _initial(self, number):
        algorithm, types = Algorithm(), [BF16] * 4
        self.call("MatmulAlgoInit", self.handle, COMPUTE_32F, SCALE_32F, *types, number,
                  ctypes.byref(algorithm))  # fmt: skip
        return algorithm

    def _capability(self, algorithm, name, most=1):
        out, size = (ctypes.c_uint32 * most)(), ctypes.c_size_t()
        self.call("MatmulAlgoCapGetAttribute", ctypes.byref(algorithm), name, out, 4 * most,
                  ctypes.byref(size))  # fmt: skip
        return list(out[: size.value // 4])

    def configurations(self):
        """(words, algorithm) of all that the library accepts for this product."""
        numbers, found = (ctypes.c_int * 256)(), ctypes.c_int()
        self.call("MatmulAlgoGetIds", self.handle, COMPUTE_32F, SCALE_32F, *[BF16] * 4,
                  len(numbers), numbers, ctypes.byref(found))  # fmt: skip
        for number in numbers[: found.value]:
            try:
                start = self._initial(number)
                tiles = self._capability(start, 6, 1024) or [0]
                stages = self._capability(start, 13, 256) or [0]
                swizzles = range(self._capability(start, 2)[0] + 1)
                customs = range(min(self._capability(start, 7)[0], 3) + 1)
            except RuntimeError:
                continue
            every = list(itertools.product(tiles, stages, swizzles, customs, CLUSTERS))
            random.Random(0).shuffle(every)
            for tile, stage, swizzle, custom, cluster in every[: 5 * TRIED]:
                chosen = dict(tile=tile, stages=stage, swizzle=swizzle, custom=custom,
                              cluster=cluster)  # fmt: skip
                if algorithm := self._configured(start, chosen):
                    yield dict(id=number) | chosen, algorithm

    def _configured(self, start, chosen):
        algorithm, result = Algorithm.from_buffer_copy(start), Candidate()
        for name, value in chosen.items():
            kind = ctypes.c_uint16 if name == "cluster" else ctypes.c_uint32
            value = kind(value)
            if self.lt.cublasLtMatmulAlgoConfigSetAttribute(
                ctypes.byref(algorithm), CONFIG[name], ctypes.byref(value), ctypes.sizeof(value)
            ):
                return None
        status = self.lt.cublasLtMatmulAlgoCheck(
            self.handle, self.desc, *self.layouts, ctypes.byref(algorithm), ctypes.byref(result)
        )
        return algorithm if status == 0 and result.workspace <= WORKSPACE else None

    def run(self, algorithm):
        one, zero = ctypes.c_float(1), ctypes.c_float(0)
        at = [ctypes.c_void_p(t.data_ptr()) for t in (self.b, self.a, self.d, self.workspace)]
        b, a, c, d = self.layouts
        self.call("Matmul", self.handle, self.desc, ctypes.byref(one), at[0], b, at[1], a,
                  ctypes.byref(zero), at[2], c, at[2], d, ctypes.byref(algorithm), at[3],
                  ctypes.c_size_t(WORKSPACE), ctypes.c_void_p(0))  # fmt: skip

    def once(self, algorithm):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.run(algorithm)
        begin.record()
        self.run(algorithm)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def result(self, algorithm):
        self.run(algorithm)
        return self.d.clone()


def products(lt, handle):
    """(layers, name, product), one at a time."""
    for name, (wide, out) in LINEAR.items():
        x, dy = (torch.randn(TOKENS, n, device="cuda").bfloat16() for n in (wide, out))
        w = (torch.randn(out, wide, device="cuda") / wide**0.5).bfloat16()
        layers = 1 if name == "lm_head" else LAYERS
        yield layers, f"{name} fwd", Product(lt, handle, x, w, False, True, TOKENS, out)
        yield layers, f"{name} dgrad", Product(lt, handle, dy, w, False, False, TOKENS, wide)
        yield layers, f"{name} wgrad", Product(lt, handle, dy, x, True, False, out, wide)


def finalists(product):
    """name -> algorithm: the heuristic's, and the fastest of the other configurations."""
    out = {f"heuristic {i}": a for i, a in enumerate(product.heuristic())}
    tried = list(product.configurations())
    random.Random(0).shuffle(tried)
    timed = []
    for chosen, algorithm in tried[:TRIED]:
        try:
            timed.append((product.once(algorithm), str(chosen), algorithm))
        except RuntimeError:  # accepted by the check, and refused now
            continue
    timed.sort(key=lambda entry: entry[0])
    return out | {name: algorithm for _, name, algorithm in timed[:FINALISTS]}, len(tried)


def run(each):
    """Print a line a product; `each`: seconds for each finalist."""
    lt, handle = library(), ctypes.c_void_p()
    if lt.cublasLtCreate(ctypes.byref(handle)):
        raise SystemExit("--gemm: needs a CUDA device")
    version = lt.cublasLtGetVersion()
    print(f"{torch.cuda.get_device_name()}, cuBLASLt {version}, {datetime.date.today()}")
    sums = {"first": 0.0, "heuristic": 0.0, "any": 0.0}
    print(f"{'product':16}{'first':>9}{'heuristic':>11}{'any':>9}  TFLOPS, and the best of any")
    for layers, name, product in products(lt, handle):
        algorithms, count = finalists(product)
        functions = {
            n: timing.alone(functools.partial(product.run, a)) for n, a in algorithms.items()
        }
        ms = {n: t.median for n, t in timing.compare(functions, "cuda", each)[0].items()}
        first = product.result(algorithms["heuristic 0"])
        same = {n for n, a in algorithms.items() if torch.equal(product.result(a), first)}
        best = {
            "first": ms["heuristic 0"],
            "heuristic": min(t for n, t in ms.items() if n.startswith("heuristic") and n in same),
            "any": min(t for n, t in ms.items() if n in same),
        }
        winner = min((n for n in ms if n in same), key=ms.get)
        others = [n for n in ms if n not in same and ms[n] < best["any"]]
        rates = [product.flops / t / 1e9 for t in best.values()]
        note = f"; {len(others)} faster with other bits" if others else ""
        text = f"{name:16}{rates[0]:9.0f}{rates[1]:11.0f}{rates[2]:9.0f}  {winner}, of {count}"
        print(text + note, flush=True)
        for kind, t in best.items():
            sums[kind] += layers * t
        torch.cuda.empty_cache()
    print("ms a step: " + ", ".join(f"{kind} {t:.1f}" for kind, t in sums.items()))
