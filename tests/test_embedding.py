import dlpack
import ml_dtypes
import numpy as np
import pytest
import ref
import torch
import torch.nn.functional as F
from conftest import DEVICES, DTYPES, assert_grad, check, f64, layouts, numeric_grad

import flatout
import flatout.torch as ft
from flatout import _C

# ids' shape, V, H
SHAPES = [((1,), 1, 1), ((7,), 5, 3), ((3, 50), 11, 64), ((4, 256), 512, 130), ((2000,), 3, 65),
          ((600,), 5, 1032), ((900,), 40001, 512)]  # fmt: skip
INDEX = [torch.int64, torch.int32]


def make(shape, vocabulary, H, dtype, device="cpu", index=torch.int64):
    ids = torch.randint(vocabulary, shape, device=device, dtype=index)
    weight = torch.randn(vocabulary, H, device=device).to(dtype)
    return ids, weight, torch.randn(*shape, H, device=device).to(dtype)


def current_stream(device):
    return torch.cuda.current_stream().cuda_stream if device == "cuda" else 0


def grad(ids, weight, dy):
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(ft.embedding(ids, weight), weight, dy)[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, vocabulary, H", SHAPES)
def test_against_float64(shape, vocabulary, H, dtype, index, device):
    ids, weight, dy = make(shape, vocabulary, H, dtype, device, index)
    y = ft.embedding(ids, weight)
    assert y.dtype == dtype and torch.equal(y, weight[ids.long()])
    dw = grad(ids, weight, dy)
    assert dw.dtype == dtype
    # the same sums by torch, where they start from zero and each row is rounded as it grows; on the
    # CPU, for on CUDA their order, and with it the error that is allowed, changes from run to run
    base = torch.zeros_like(weight, device="cpu")
    base.index_add_(0, ids.reshape(-1).cpu(), dy.reshape(-1, H).cpu())
    check("dw", dw, ref.embedding_bwd(f64(dy), f64(ids).astype(int), vocabulary), base)


@pytest.mark.parametrize("device", DEVICES)
def test_sum_of_many_is_rounded_once(device):
    """4097 equal terms: a sum kept in bfloat16 would stop growing at 256."""
    ids, dy = (
        torch.zeros(4097, dtype=torch.int64, device=device),
        torch.ones(4097, 8, dtype=torch.bfloat16, device=device),
    )
    dw = grad(ids, torch.zeros(2, 8, dtype=torch.bfloat16, device=device), dy)
    assert (dw[0] == torch.tensor(4097.0, device=device).bfloat16()).all() and not dw[1].any()


def test_float64():
    ids, weight, dy = make((3, 20), 7, 9, torch.float64)
    want = ref.embedding_bwd(f64(dy), ids.numpy(), 7)
    np.testing.assert_allclose(grad(ids, weight, dy), want, rtol=1e-13, atol=1e-14)


def test_gradient_by_differences():
    ids, weight, dy = np.array([[0, 2], [2, 3]]), np.random.randn(5, 3), np.random.randn(2, 2, 3)
    dw = flatout.embedding_bwd(dy, ids, weight)
    assert_grad(dw, numeric_grad(lambda: flatout.embedding(ids, weight), weight, dy))
    assert not dw[[1, 4]].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", [5, 72, 1040])
def test_frequent_ids(dtype, H, device):
    """Runs of equal ids that end before, at and behind the ends of pieces, and span several; for
    any number of pieces, the last of them empty or with fewer terms."""
    runs = [1, 31, 32, 33, 1, 63, 64, 65, 300, 2, 30, 32, 5, 3, 100]
    sorted_ids = torch.repeat_interleave(torch.arange(0, 2 * len(runs), 2), torch.tensor(runs))
    order = torch.randperm(sorted_ids.numel())
    dy = torch.randn(order.numel(), H).to(dtype)
    ids = torch.empty_like(sorted_ids)
    ids[order] = sorted_ids
    V = 2 * len(runs) + 1
    base = torch.zeros(V, H, dtype=dtype).index_add_(0, ids, dy)
    want = ref.embedding_bwd(f64(dy), ids.numpy(), V)
    dy, sorted_ids, order = dy.to(device), sorted_ids.to(device), order.to(device)
    stream = current_stream(device)
    for P in (1, 2, 3, 7, 24, 100, 800) if device == "cuda" else (1,):
        for gap, first in ((0, 0), (0, 1), (8, 0), (3, 3)):
            room = torch.full((V, H + gap), 7.0, dtype=dtype, device=device)
            dw = room[:, :H]
            partial = torch.full((first + 2 * P * H,), float("nan"), device=device)[first:]
            _C.embedding_bwd(dw, partial.view(2 * P, H), None, dy, sorted_ids, order, stream)
            check(f"dw of {P} pieces, {gap} columns apart", dw, want, base)
            assert (room[:, H:] == 7).all()


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_a_table_in_reverse(device):
    """Rows that lie one before the other in memory, as DLPack allows."""
    ids, dy = torch.tensor([0, 0, 2], device=device), torch.randn(3, 16, device=device)
    room = torch.full((5, 16), 7.0, device=device)
    order, partial = torch.arange(3, device=device), torch.empty(2, 16, device=device)
    stream = current_stream(device)
    kind = {"device_type": dlpack.CUDA if device == "cuda" else dlpack.CPU}
    dw = dlpack.Producer((3, 16), room[3].data_ptr(), strides=(-16, 1), **kind)
    want = torch.stack([dy[2], torch.zeros_like(dy[0]), dy[0] + dy[1]])
    scratch = torch.empty(2, 3, dtype=torch.int64, device=device)
    for way in ((None, dy, ids, order), (scratch, dy, ids, None)):
        room.fill_(7)
        _C.embedding_bwd(dw, partial, *way, stream)
        assert torch.equal(room[1:4], want) and (room[[0, 4]] == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("index", INDEX)
def test_gradient_leaves_out_ids_that_name_no_row(index, device="cuda"):
    """The CPU refuses them."""
    ids, weight, dy = make((500,), 5, 24, torch.float32, device, index)
    bad = torch.tensor([-1, 5, 2**31 - 1, -(2**31)], dtype=index, device=device)
    outside = torch.rand(500, device=device) < 0.6
    good = torch.zeros(5, 24, device=device).index_add_(0, ids[~outside], dy[~outside])
    ids[outside] = bad[torch.randint(4, (500,), device=device)[outside]]
    torch.testing.assert_close(grad(ids, weight, dy), good)
    assert not grad(torch.full_like(ids, 5), weight, dy).any()


def both_ways(dw, dy, ids):
    """Writes dw by ids that come sorted, and again by ids as they are: the same bits."""
    partial = torch.empty(2 * max(1, len(ids) // 32), dy.shape[1], device=dy.device)
    scratch = torch.empty(2, len(ids), dtype=torch.int64, device=dy.device)
    by_id, order = torch.sort(ids, stable=True)
    results = []
    for way in ((None, dy, by_id, order), (scratch, dy, ids, None)):
        dw.fill_(7)
        _C.embedding_bwd(dw, partial, *way, current_stream(dy.device.type))
        results.append(dw.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("N", [1, 2, 31, 33, 1024, 1025, 2047, 2048, 2049, 16384])
@pytest.mark.parametrize("V, H", [(1, 8), (3, 40), (700, 5), (30000, 16), (400000, 3)])
def test_ids_in_any_order(V, H, N, index, device):
    """Different ones, all equal, and one in most places, as padding is; dw with gaps and on odd
    addresses."""
    random = torch.randint(V, (N,), device=device, dtype=index)
    padded = torch.where(torch.rand(N, device=device) < 7 / 8, V // 2, random).to(index)
    dy = torch.randn(N, H, device=device).bfloat16()
    for ids in (random, padded, torch.full_like(random, V - 1)):
        for gap, first in ((0, 0), (8, 0), (3, 1)):
            room = torch.full((V, H + gap), 5.0, dtype=dy.dtype, device=device)
            both_ways(room[:, first : H + first], dy, ids)
            assert (room[:, :first] == 5).all() and (room[:, H + first :] == 5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("index", INDEX)
@pytest.mark.parametrize("N, V", [(1, 5), (500, 5), (16384, 150000)])
def test_ids_in_any_order_that_name_no_row(N, V, index, device="cuda"):
    ids, _, dy = make((N,), V, 24, torch.float32, device, index)
    bad = [-1, V, V + 1, 2**31 - 1, -(2**31)]
    bad += [2**32, 2**32 + 1, -(2**32) + 1, 2**63 - 1, -(2**63)] if index == torch.int64 else []
    bad = torch.tensor(bad, dtype=index, device=device)
    for share in (0.5, 1.0):
        outside = torch.rand(N, device=device) < share
        ids[outside] = bad[torch.randint(len(bad), (N,), device=device)[outside]]
        dy[outside] = float("nan")
        dw = torch.empty(V, 24, device=device)
        both_ways(dw, dy, ids)
        good = torch.zeros_like(dw).index_add_(0, ids[~outside].long(), dy[~outside])
        torch.testing.assert_close(dw, good)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N, V", [(16384, 50), (16385, 50), (40, (1 << 20) + 1)])
def test_more_ids_or_rows_than_it_sorts_itself(N, V, device):
    ids, weight, dy = make((N,), V, 3, torch.float32, device)
    order = torch.argsort(ids, stable=True)
    dw = torch.empty_like(weight)
    pieces = -(-N // 32)
    partial = torch.empty(2 * pieces, 3, device=device)
    _C.embedding_bwd(dw, partial, None, dy, ids[order], order, current_stream(device))
    assert torch.equal(grad(ids, weight, dy), dw)


def test_unsorted_ids():
    dw, dy, ids = torch.ones(5, 4), torch.randn(3, 4), torch.tensor([3, 1, 1])
    with pytest.raises(ValueError, match="ids: expected ascending"):
        _C.embedding_bwd(dw, torch.ones(2, 4), None, dy, ids, torch.argsort(ids, stable=True))
    assert (dw == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device):
    ids = torch.randint(6, (4, 6), device=device)
    for name, weight in layouts((6, 64), device=device):
        weight = weight.reshape(6, 64) if weight.ndim == 3 else weight
        assert torch.equal(ft.embedding(ids, weight), weight[ids]), name
        assert torch.equal(ft.embedding(ids.t(), weight), weight[ids.t()]), name
    weight = torch.randn(6, 64, device=device)
    for name, dy in layouts((4, 6, 64), device=device):
        want = grad(ids, weight, dy.contiguous().view(4, 6, 64))
        assert torch.equal(grad(ids, weight, dy.view(4, 6, 64) if dy.ndim > 3 else dy), want), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape, vocabulary, H",
    [((0,), 5, 3), ((2, 0), 5, 3), ((4,), 5, 0), ((4,), 1, 0), ((0,), 0, 8), ((0,), 0, 0)],
)
def test_empty(shape, vocabulary, H, device):
    weight, dy = torch.randn(vocabulary, H, device=device), torch.randn(*shape, H, device=device)
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    assert ft.embedding(ids, weight).shape == (*shape, H)
    assert grad(ids, weight, dy).shape == weight.shape and not grad(ids, weight, dy).any()
    ids, weight, dy = ids.cpu(), weight.cpu(), dy.cpu()
    assert flatout.embedding(ids.numpy(), weight.numpy()).shape == (*shape, H)
    assert not flatout.embedding_bwd(dy.numpy(), ids.numpy(), weight.numpy()).any()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_numpy(dtype, index):
    ids = np.random.randint(0, 9, (5, 4)).astype(index)
    weight, dy = (np.random.randn(*s).astype(dtype) for s in ((9, 24), (5, 4, 24)))
    np.testing.assert_array_equal(flatout.embedding(ids, weight), weight[ids])
    np.testing.assert_array_equal(flatout.embedding(ids[:, ::-1], weight[:, ::-1]),
                                  weight[:, ::-1][ids[:, ::-1]])  # fmt: skip
    want = ref.embedding_bwd(dy.astype(np.float64), ids, 9)
    atol = float(ml_dtypes.finfo(dtype).eps) * 4 * np.abs(want).max()
    dw = flatout.embedding_bwd(dy, ids, weight)
    assert dw.dtype == dtype
    np.testing.assert_allclose(dw.astype(np.float64), want, atol=atol)


def test_out():
    ids, weight, _ = make((6,), 5, 8, torch.float32)
    out = torch.empty(6, 8)
    assert flatout.embedding(ids, weight, out=out) is out and torch.equal(out, weight[ids])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_threads_do_not_change_a_bit(count, threads):
    ids, weight, dy = make((3000,), 40, 333, torch.float32)
    threads(4)
    want = ft.embedding(ids, weight), grad(ids, weight, dy)
    threads(count)
    assert all(map(torch.equal, (ft.embedding(ids, weight), grad(ids, weight, dy)), want))


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("index", INDEX)
def test_id_outside(bad, index):
    ids, weight = torch.tensor([0, 4, bad], dtype=index), torch.randn(5, 8)
    y, dw = torch.full((3, 8), 7.0), torch.full((5, 8), 7.0)
    with pytest.raises(IndexError, match="embedding_fwd: ids: expected 0 .. V - 1"):
        _C.embedding_fwd(y, ids, weight)
    with pytest.raises(IndexError, match="embedding_bwd: ids: expected 0 .. V - 1"):
        _C.embedding_bwd(dw, torch.ones(2, 8), None, torch.ones(3, 8), ids, torch.arange(3))
    assert (y == 7).all() and (dw == 7).all(), "written before the check"
    for call in (ft.embedding, lambda i, w: flatout.embedding(i.numpy(), w.numpy())):
        with pytest.raises(IndexError):
            call(ids, weight)


def test_an_empty_table_has_no_id():
    with pytest.raises(IndexError):
        ft.embedding(torch.tensor([0]), torch.ones(0, 8))


IDS, W = torch.tensor([0, 1, 2]), torch.ones(5, 8)
BAD = [
    (dict(w=None), TypeError, "w: expected an array"),
    (dict(w=W.long()), TypeError, "w: expected a floating dtype"),
    (dict(w=torch.ones(5)), ValueError, "w: expected 2 dimensions, got 1"),
    (dict(w=torch.ones(8, 5).t()), ValueError, "w: expected a contiguous last dimension"),
    (dict(ids=IDS.float()), TypeError, "ids: expected int32 or int64, got float32"),
    (dict(ids=IDS[None]), ValueError, "ids: expected 1 dimensions, got 2"),
    (dict(ids=torch.arange(6)[::2]), ValueError, "ids: expected a contiguous array"),
    (dict(y=torch.ones(3, 8).half()), TypeError, "y: expected float32 as w has"),
    (dict(y=torch.ones(8, 3).t()), ValueError, "y: expected a contiguous last dimension"),
    (dict(y=torch.ones(4, 8)), ValueError, r"y: expected shape \(3, 8\), got \(4, 8\)"),
    (dict(y=W[:3], w=W), ValueError, "y: output overlaps w"),
]


@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input(wrong, error, message):
    good = dict(y=torch.full((3, 8), 7.0), ids=IDS, w=W)
    with pytest.raises(error, match=message):
        _C.embedding_fwd(*(good | wrong).values())
    assert (good["y"] == 7).all(), "written before the checks"


ORDER, SORTED = torch.arange(3), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (dict(dy=torch.ones(3, 7)), ValueError, r"dy: expected shape \(3, 8\), got \(3, 7\)"),
        (dict(dy=torch.ones(3, 8).half()), TypeError, "dy: expected float32 as dw has"),
        (dict(dw=torch.ones(8)), ValueError, "dw: expected 2 dimensions"),
        (dict(order=ORDER.int()), TypeError, "order: expected int64, got int32"),
        (dict(order=torch.arange(6)[::2]), ValueError, "order: expected a contiguous array"),
        (dict(order=torch.arange(4)), ValueError, r"order: expected shape \(3,\), got \(4,\)"),
        (dict(partial=torch.ones(2, 8).half()), TypeError, "partial: expected float32"),
        (dict(partial=torch.ones(2, 7)), ValueError, r"expected shape \(2, 8\), got \(2, 7\)"),
        (dict(partial=torch.ones(1, 8)), ValueError, "partial: expected at least 2 rows, got 1"),
        (dict(partial=torch.ones(3, 8)), ValueError, "expected an even number of rows, got 3"),
        (dict(ids=IDS.short()), TypeError, "ids: expected float32, .*got DLPack type"),
        (dict(partial=torch.ones(16)), ValueError, "partial: expected 2 dimensions"),
        (dict(order=ORDER + 1), IndexError, "order: expected 0 .. N - 1"),
        (dict(order=ORDER - 1), IndexError, "order: expected 0 .. N - 1"),
        (dict(sorted=SORTED), ValueError, "sorted: expected None where order is given"),
        (dict(order=None), ValueError, "order: expected an array where sorted is None"),
        (
            dict(sorted=SORTED.int(), order=None),
            TypeError,
            "sorted: expected int64, got int32",
        ),
        (dict(sorted=SORTED[:1], order=None), ValueError, r"expected shape \(2, 3\), got \(1, 3\)"),
        (dict(sorted=SORTED.view(3, 2).T, order=None), ValueError, "sorted: expected a contiguous"),
        (dict(sorted=SORTED, order=None, ids=IDS + 3), IndexError, "ids: expected 0 .. V - 1"),
    ],
)
def test_bad_backward_input(wrong, error, message):
    good = dict(dw=torch.full((5, 8), 7.0), partial=torch.ones(2, 8), sorted=None)
    good |= dict(dy=torch.ones(3, 8), ids=IDS, order=ORDER)
    with pytest.raises(error, match=message):
        _C.embedding_bwd(*(good | wrong).values())
    assert (good["dw"] == 7).all(), "written before the checks"


def test_too_many_ids_to_sort():
    scratch, ids = torch.zeros(2, 16385, dtype=torch.int64), torch.zeros(16385, dtype=torch.int64)
    with pytest.raises(ValueError, match="ids: expected at most 16384 where order is None, got 16"):
        _C.embedding_bwd(W.clone(), torch.ones(2, 8), scratch, torch.ones(16385, 8), ids, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.uint8, torch.bool])
def test_ids_of_another_dtype(dtype):
    for call in (
        lambda ids: ft.embedding(ids, W),
        lambda ids: ft.ops.embedding_bwd(torch.ones(3, 8), ids, 5),
    ):
        with pytest.raises(TypeError, match="ids: expected "):
            call(IDS.to(dtype))


def test_bad_weight():
    with pytest.raises(ValueError, match="embedding: weight: expected 2 dimensions"):
        ft.embedding(IDS, torch.ones(8))


def test_agrees_with_torch_module():
    ids, weight, dy = make((2, 33), 17, 48, torch.float32)
    weight.requires_grad_()
    want = torch.autograd.grad(F.embedding(ids, weight), weight, dy)[0]
    torch.testing.assert_close(grad(ids, weight, dy), want)


def test_torch_registration():
    ids, weight, dy = make((2, 3), 5, 8, torch.float32)
    torch.library.opcheck(ft.ops.embedding_fwd.default, (weight, ids))
    torch.library.opcheck(ft.ops.embedding_bwd.default, (dy, ids, 5))


def test_compile():
    def f(ids, weight):
        return ft.embedding(ids, weight).cos().sum()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        ids, weight, _ = make((2, n), 7, 16, torch.float32)
        weight.requires_grad_()
        want = torch.autograd.grad(f(ids, weight), weight)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(ids, weight), weight)[0], want)


def test_double_backward_is_refused():
    ids, weight, dy = make((4,), 5, 8, torch.float32)
    weight.requires_grad_(), dy.requires_grad_()
    (dw,) = torch.autograd.grad(ft.embedding(ids, weight), weight, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        dw.sum().backward()
