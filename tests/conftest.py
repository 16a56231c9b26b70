"""What the tests share: the error rule, the layouts, finite differences, devices."""

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np
import pytest
import torch

# Seconds after which a process has hung: a guard, not a measure. The longest on a CPU, a run of
# run_stages.py, takes some 16 on an idle machine, and has taken more than 300 on a busy one.
HANG = 900

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HAVE_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAVE_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device of capability 8.0"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    np.random.seed(0)


def f64(x):
    """Any tensor or array as a float64 NumPy array."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x).astype(np.float64)


def _rms(a):
    return float(np.sqrt(np.mean(np.square(a)))) if a.size else 0.0


def close(out, ref, base, kmax=2.0, krms=1.5, floor=2.0**-22, luck=0.0):
    """The rule of error: at most 2x the largest and 1.5x the rms error of `base`, which is the
    same op done by torch in the same dtype; both against the float64 `ref`. `floor` allows for
    the last bits of float32 where `base` happens to be exact; `luck`, of the largest error alone,
    for a `base` whose own is small by chance."""
    if out.shape != ref.shape or not np.isfinite(out).all():
        return False
    if not ref.size:
        return True
    error, allowed = np.abs(out - ref), np.abs(base - ref)
    slack = floor * np.abs(ref).max()
    largest = kmax * allowed.max() + max(floor, luck) * np.abs(ref).max()
    return error.max() <= largest and _rms(error) <= krms * _rms(allowed) + slack


def check(name, out, ref, base, **rule):
    """`out` is close to `ref`, and the rule would refuse planted wrong answers."""
    if isinstance(out, torch.Tensor) and out.numel() < 128 and out.dtype.is_floating_point:
        # so few that torch's own error is a matter of luck: half a unit in the last place
        rule["floor"] = max(rule.get("floor", 0.0), torch.finfo(out.dtype).eps / 2)
    out, ref, base = f64(out), f64(ref), f64(base)
    error = np.abs(out - ref).max() if out.shape == ref.shape and ref.size else out.shape
    assert close(out, ref, base, **rule), (
        f"{name}: error {error}, torch's {np.abs(base - ref).max() if ref.size else 0}"
    )
    if not ref.any():
        assert not out.any(), f"{name}: must be exactly zero"
        return
    dropped = out.copy()
    dropped[np.unravel_index(np.abs(ref).argmax(), ref.shape)[0] if ref.ndim else ()] = 0
    wrong = {"x1.05": out * 1.05, "zero": out * 0, "negated": -out, "row dropped": dropped}
    if ref.ndim and len(ref) > 1 and not np.array_equal(ref, np.roll(ref, 1, 0)):
        wrong["rows shifted"] = np.roll(out, 1, 0)
    for planted, values in wrong.items():
        assert not close(values, ref, base, **rule), f"{name}: test too weak, accepts {planted}"


def layouts(shape, dtype=torch.float32, device="cpu"):
    """(name, tensor of normal values): the ways a tensor of this shape (one of them with one more
    dimension, of size 1) can lie in memory."""
    *lead, H = shape

    def make(*size):
        return torch.randn(*size, device=device).to(dtype)

    count = int(np.prod(shape))
    yield "contiguous", make(*shape)
    yield "sliced last dimension", make(*lead, H + 8)[..., :H]
    yield "sliced rows", make(2 * lead[0], *lead[1:], H)[::2]
    yield "offset by 1", make(count + 1)[1:].view(shape)
    yield "offset by 8", make(count + 8)[8:].view(shape)
    yield "expanded", make(*([1] * len(lead)), H).expand(*shape)
    yield "swapped leading", make(*lead[::-1], H).permute(*range(len(lead))[::-1], len(lead))
    yield "transposed", make(H, *lead).movedim(0, -1)
    yield "packed view", make(*lead, 3 * H)[..., H : 2 * H]
    strange = make(*shape)
    yield "size-1 stride", strange.as_strided((1, *shape), (12345, *strange.stride()))
    yield "5-D flattened", make(1, *lead, 2, H)[:, ..., 0, :].reshape(shape)
    yield "one of three", make(3, *shape)[1]


def alike(got, want, layout):
    """Equal to the bit, but for a layout off a vector's boundary: there another kernel may add in
    another order, and each result is as good as the other."""
    pairs = list(zip(got, want, strict=True))
    if layout != "offset by 1":
        return all(torch.equal(a, b) for a, b in pairs)
    rounding = {a: 4 * torch.finfo(a.dtype).eps for a, _ in pairs}
    return all(torch.allclose(a, b, rtol=rounding[a], atol=rounding[a]) for a, b in pairs)


def numeric_grad(f, x, dy, h=1e-6):
    """d sum(f() * dy) / dx by central differences; x float64, changed in place and restored."""
    grad = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        old, step = x[i], h * max(1.0, abs(x[i]))
        x[i] = old + step
        up = np.sum(f() * dy)
        x[i] = old - step
        down = np.sum(f() * dy)
        x[i] = old
        grad[i] = (up - down) / (2 * step)
    return grad


def assert_grad(got, want, tolerance=1e-6):
    scale = max(1.0, np.abs(want).max()) if want.size else 1.0
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * scale)


@pytest.fixture
def threads():
    """Call with a count to set the CPU ops' threads; the default returns afterwards."""
    from flatout import _C

    yield _C.set_num_threads
    _C.set_num_threads(0)
