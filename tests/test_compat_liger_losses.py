import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peers import agree, refuses, wide

import flatout.compat.liger as liger
from flatout.compat.liger import CrossEntropyOutput

DTYPES = [torch.float32, torch.bfloat16]


def plain_loss(logits, target, reduction="mean", weight=None, ignore=-100, **options):
    """(loss, z_loss): the formula of record in fp32."""
    smoothing, z_scale = options.get("label_smoothing", 0.0), options.get("lse_square_scale", 0.0)
    softcap = options.get("softcap")
    logits = wide(logits)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    valid = target != ignore
    rows = F.cross_entropy(
        logits,
        target,
        None if weight is None else weight.to(logits.dtype),
        ignore_index=ignore,
        label_smoothing=smoothing,
        reduction="none",
    )
    z = (z_scale * logits.logsumexp(-1).square()).masked_fill(~valid, 0.0)
    if reduction == "none":
        return rows + z, z
    if reduction == "sum":
        return rows.sum() + z.sum(), z.sum()
    scale = valid.sum() if weight is None else weight[target[valid]].sum()
    return rows.sum() / scale + z.sum() / valid.sum(), z.sum() / valid.sum()


def example(dtype, rows=13, hidden=24, vocabulary=37):
    x = torch.randn(rows, hidden).to(dtype)
    w = (torch.randn(vocabulary, hidden) / hidden**0.5).to(dtype)
    b = torch.randn(vocabulary).to(dtype)
    target = torch.randint(0, vocabulary, (rows,))
    target[[1, 4]] = -100
    return x, w, b, target


OPTIONS = [
    {},
    {"label_smoothing": 0.1, "lse_square_scale": 1e-2},
    {"softcap": 3.0},
    {"weight": True, "lse_square_scale": 1e-2, "label_smoothing": 0.2},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothing", "softcap", "weight"])
def test_cross_entropy(dtype, reduction, options):
    x, w, b, target = example(dtype)
    logits = F.linear(x, w, b)
    options = dict(options)
    weight = torch.rand(37) + 0.5 if options.pop("weight", False) else None
    loss = liger.LigerCrossEntropyLoss(weight, reduction=reduction, **options)
    plain = lambda z: plain_loss(z, target, reduction, weight, **options)[0].to(z.dtype)  # noqa: E731
    agree(lambda z: loss(z, target), plain, logits, floor=2.0**-19)
    both = liger.LigerCrossEntropyLoss(weight, reduction=reduction, return_z_loss=True, **options)(
        logits, target
    )
    assert isinstance(both, CrossEntropyOutput) and both.token_accuracy is None
    assert both.z_loss.dtype == both.loss.dtype == dtype
    want = plain_loss(logits, target, reduction, weight, **options)
    torch.testing.assert_close(both.loss, want[0].to(dtype))
    torch.testing.assert_close(both.z_loss, want[1].to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "smoothing", "softcap", "weight"])
def test_fused_linear_cross_entropy(dtype, reduction, options):
    x, w, b, target = example(dtype)
    options = dict(options)
    weight = torch.rand(37) + 0.5 if options.pop("weight", False) else None
    loss = liger.LigerFusedLinearCrossEntropyLoss(weight, reduction=reduction, **options)

    def plain(x, w, b):
        return plain_loss(F.linear(x, w, b), target, reduction, weight, **options)[0]

    agree(lambda x, w, b: loss(w, x, target, b), plain, x, w, b, floor=2.0**-18)
    both = liger.liger_fused_linear_cross_entropy(
        x, w, target, b, weight, reduction=reduction, return_z_loss=True, **options
    )
    assert both.loss.dtype == torch.float32 and both.z_loss.dtype == dtype
    want = plain_loss(F.linear(x, w, b), target, reduction, weight, **options)
    torch.testing.assert_close(both.z_loss, want[1].to(dtype))


def test_metrics():
    x, w, b, target = example(torch.float32)
    best = F.linear(x, w, b).argmax(-1)
    target[:6:2] = best[:6:2]
    valid = target != -100
    for reduction in ("mean", "none"):
        flags = {"return_token_accuracy": True, "return_predicted_tokens": True}
        outs = [
            liger.liger_cross_entropy(F.linear(x, w, b), target, reduction=reduction, **flags),
            liger.liger_fused_linear_cross_entropy(x, w, target, b, reduction=reduction, **flags),
        ]
        right = (best == target).float()
        for out in outs:
            accuracy = right[valid].mean() if reduction == "mean" else right
            assert torch.equal(out.token_accuracy, accuracy) and accuracy.dtype == torch.float32
            assert torch.equal(out.predicted_tokens, best.masked_fill(~valid, -1))
            assert out.predicted_tokens.dtype == torch.int64 and out.z_loss is None
    four = liger.LigerFusedLinearCrossEntropyFunction.apply(x, w, target, b)
    assert len(four) == 4 and four[1:] == (None, None, None)
    assert len(liger.LigerCrossEntropyFunction.apply(F.linear(x, w, b), target, None)) == 4


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_token_scaling(reduction, weighted):
    x, w, b, target = example(torch.float32)
    weight = torch.rand(37) + 0.5 if weighted else None
    options = {"label_smoothing": 0.1, "lse_square_scale": 1e-2} if weighted else {}
    loss = liger.LigerFusedLinearCrossEntropyLoss(
        weight, reduction=reduction, use_token_scaling=True, **options
    )

    def plain(x, w, b):
        logits, valid = F.linear(x, w, b), target != -100
        p = torch.softmax(logits.detach(), -1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
        rows, z = plain_loss(logits, target, "none", weight, **options)
        rows, z = (rows - z) * p, z * p
        if reduction == "none":
            return rows + z
        if reduction == "sum":
            return rows.sum() + z.sum()
        scale = valid.sum() if weight is None else weight[target[valid]].sum()
        return rows.sum() / scale + z.sum() / valid.sum()

    agree(lambda x, w, b: loss(w, x, target, b), plain, x, w, b, floor=2.0**-18)


def test_all_ignored_is_zero():
    x, w, b, target = example(torch.float32)
    target[:] = -100
    for t in (x, w, b):
        t.requires_grad_()
    for reduction in ("mean", "sum"):
        for loss in (
            liger.liger_fused_linear_cross_entropy(x, w, target, b, reduction=reduction),
            liger.liger_cross_entropy(F.linear(x, w, b), target, reduction=reduction),
        ):
            assert loss.item() == 0.0
            for grad in torch.autograd.grad(loss, (x, w, b)):
                assert not grad.any()


def test_losses_overwrite_nothing_and_a_frozen_input_freezes_no_weight():
    x, w, b, target = example(torch.float32)
    logits = F.linear(x, w, b).requires_grad_()
    kept = logits.detach().clone()
    liger.LigerCrossEntropyLoss()(logits, target).backward()
    assert torch.equal(logits.detach(), kept)
    w.requires_grad_()
    liger.LigerFusedLinearCrossEntropyLoss()(w, x, target).backward()
    assert w.grad.any()


def test_loss_errors():
    x, w, b, target = example(torch.float32)
    for cls in (liger.LigerCrossEntropyLoss, liger.LigerFusedLinearCrossEntropyLoss):
        for bad in ({"label_smoothing": 1.5}, {"reduction": "max"}, {"softcap": 0.0}):
            with pytest.raises(AssertionError, match=next(iter(bad))):
                cls(**bad)
    for wrong in (37, -1):
        target[0] = wrong
        with pytest.raises(AssertionError, match="out of bounds"):
            liger.liger_cross_entropy(F.linear(x, w, b), target)
        with pytest.raises(AssertionError, match="out of bounds"):
            liger.liger_fused_linear_cross_entropy(x, w, target)
    with pytest.raises(NotImplementedError, match="liger_cross_entropy_kernel"):
        liger.ops.liger_cross_entropy_kernel[(1,)]()
    refuses(liger.liger_cross_entropy, x, target, size_average=True)
    refuses(liger.liger_cross_entropy, x, target, reduce=True)


def test_out_of_bounds_on_cuda_without_asserts():
    """python -O drops assert statements, this check stays."""
    code = """
import torch
from flatout.compat import liger

class OnCuda(torch.Tensor):
    is_cuda = True

assert False, "asserts are on"
torch.cuda.is_current_stream_capturing = lambda: False  # a torch without CUDA cannot say
target = torch.tensor([0, 37]).as_subclass(OnCuda)
try:
    liger.LigerCrossEntropyLoss()(torch.randn(2, 37), target)
except AssertionError as error:
    print(error)
"""
    command = [sys.executable, "-O", "-c", code]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "a target is out of bounds: it must be in 0 .. 36" in result.stdout, result.stderr


@pytest.mark.gpu
def test_out_of_bounds_on_cuda():
    """The host waits for the device only where it can: not in the capture of a CUDA graph."""
    logits, target = torch.randn(5, 37, device="cuda"), torch.arange(5, device="cuda")
    loss = liger.LigerCrossEntropyLoss(ignore_index=99)
    target[1] = 99
    want = F.cross_entropy(logits, target, ignore_index=99)
    torch.testing.assert_close(loss(logits, target), want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = loss(logits, target)
    graph.replay()
    torch.testing.assert_close(replayed, want)
    for wrong in (37, -1):
        target[2] = wrong
        with pytest.raises(AssertionError, match="out of bounds"):
            loss(logits, target)
    graph.replay()
    assert replayed.isnan()


def test_accumulation_dtype_and_chunks_are_accepted():
    x, w, b, target = example(torch.bfloat16)
    w.requires_grad_()
    loss = liger.liger_fused_linear_cross_entropy
    for options in ({"accum_dtype": torch.float32}, {"chunk_mem_const": 4}):
        loss(x, w, target, **options).backward()
    assert w.grad.dtype == torch.bfloat16
    got, want = (
        torch.autograd.grad(loss(x, w, target, accum_dtype=dtype), w)[0]
        for dtype in (w.dtype, None)
    )
    assert torch.equal(got, want)
    refuses(loss, x, w, target, accum_dtype=torch.float16)
    wide_x, wide_w = x.float(), w.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, want = (
            torch.autograd.grad(loss(wide_x, wide_w, target, accum_dtype=dtype), wide_w)[0]
            for dtype in (torch.bfloat16, None)
        )
    assert torch.equal(got, want) and got.dtype == torch.float32
    refuses(loss, wide_x, wide_w, target, accum_dtype=torch.bfloat16)
    for wrong in (0, True, 1.5):
        with pytest.raises(ValueError, match="chunk_mem_const"):
            loss(x, w, target, chunk_mem_const=wrong)


def test_causal_lm_loss():
    x, w, _, _ = example(torch.float32, 12)
    x, labels = x.view(2, 6, 24), torch.randint(0, 37, (2, 6))
    labels[0, 2] = -100
    shifted = torch.full_like(labels, -100)
    shifted[:, :-1] = labels[:, 1:]
    rows = F.cross_entropy((x @ w.T).flatten(0, 1), shifted.flatten(), reduction="none")
    count = (shifted != -100).sum()
    mean = liger.LigerForCausalLMLoss(x, w, labels, 24, unknown_option=3)
    torch.testing.assert_close(mean, rows.sum() / count)
    given = liger.LigerForCausalLMLoss(x, w, None, 24, torch.tensor(7), shift_labels=shifted)
    torch.testing.assert_close(given, rows.sum() / 7)
    output = liger.LigerForCausalLMLoss(
        x, w, labels, 24, final_logit_softcapping=2.0, return_token_accuracy=True
    )
    capped = 2 * torch.tanh((x @ w.T) / 2)
    want = F.cross_entropy(capped.flatten(0, 1), shifted.flatten())
    torch.testing.assert_close(output.loss, want)
    right = (x @ w.T).argmax(-1) == shifted
    torch.testing.assert_close(output.token_accuracy, right.sum() / count)


def test_readme():
    """README.md of Liger: "Compose Your Own Model"."""
    model = torch.nn.Linear(128, 256)
    input = torch.randn(4, 128, requires_grad=True)
    target = torch.randint(256, (4,))
    loss_fn = liger.LigerFusedLinearCrossEntropyLoss()
    loss = loss_fn(model.weight, input, target)
    loss.backward()
    want = F.cross_entropy(input @ model.weight.T, target)
    torch.testing.assert_close(loss, want)
    assert model.weight.grad is not None and input.grad is not None
