import pytest
import torch
import torch.nn.functional as F

import flatout.torch as ft
from flatout.torch.nn import LinearCrossEntropyLoss, RMSNorm, SwiGLUMLP


def gradients(module, out, dy):
    return torch.autograd.grad(out, list(module.parameters()), dy)


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm():
    norm, x = RMSNorm(48, eps=1e-5), torch.randn(2, 5, 48)
    torch.nn.init.normal_(norm.weight)
    dy = torch.randn_like(x)
    expected = F.rms_norm(x, (48,), norm.weight, 1e-5)
    assert_same(norm(x), expected)
    assert_same(gradients(norm, norm(x), dy), gradients(norm, expected, dy))
    assert list(norm.state_dict()) == ["weight"]
    assert "eps=1e-05" in repr(norm)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_starts_as_identity(offset):
    x = torch.randn(5, 48)
    found = RMSNorm(48, offset=offset)(x)
    assert_same(found, F.rms_norm(x, (48,), eps=1e-6))


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_mlp(bias):
    mlp, x = SwiGLUMLP(32, 80, bias), torch.randn(2, 5, 32)
    dy = torch.randn_like(x)
    expected = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert_same(mlp(x), expected)
    assert_same(gradients(mlp, mlp(x), dy), gradients(mlp, expected, dy))
    names = {"gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[0] for name in mlp.state_dict()} == names


@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_loss(bias):
    loss = LinearCrossEntropyLoss(32, 70, bias, ignore_index=3, reduction="sum", shift=1)
    head = torch.nn.Linear(32, 70, bias)
    head.load_state_dict(loss.state_dict())
    x, target = torch.randn(2, 9, 32), torch.randint(0, 70, (2, 9))
    target[0, 4] = 3
    logits, labels = head(x)[:, :-1].reshape(-1, 70), target[:, 1:].reshape(-1)
    expected = F.cross_entropy(logits, labels, ignore_index=3, reduction="sum")
    found = loss(x, target)
    assert_same(found, expected)
    one = torch.ones(())
    assert_same(gradients(loss, found, one), gradients(head, expected, one))
    assert "shift=1" in repr(loss)


def test_tied_weight():
    embed, loss = torch.nn.Embedding(70, 32), LinearCrossEntropyLoss(32, 70)
    loss.weight = embed.weight
    ids = torch.randint(0, 70, (2, 9))
    loss(embed(ids), ids).backward()
    expected = embed.weight.detach().clone().requires_grad_()
    F.cross_entropy(F.linear(expected[ids], expected).view(-1, 70), ids.view(-1)).backward()
    assert_same(embed.weight.grad, expected.grad)


def test_unknown_option():
    with pytest.raises(TypeError, match="reduce"):
        LinearCrossEntropyLoss(4, 5, reduce=True)


def test_device_and_dtype():
    norm, mlp = RMSNorm(8, dtype=torch.bfloat16), SwiGLUMLP(8, 16, dtype=torch.bfloat16)
    x = torch.randn(3, 8).bfloat16()
    assert mlp(norm(x)).dtype == torch.bfloat16
    assert RMSNorm(8, device="meta").weight.is_meta
    assert ft.RMSNorm is RMSNorm
