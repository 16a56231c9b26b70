import pytest
import torch
from peers import agree, refuses, wide

from flatout.compat.flash_attn.layers.rotary import apply_rotary_emb
from flatout.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from flatout.compat.flash_attn.ops.rms_norm import rms_norm
from flatout.compat.flash_attn.ops.triton.layer_norm import rms_norm_fn

DTYPES = [torch.float32, torch.bfloat16]


def plain_rotary(x, cos, sin, interleaved=False):
    """cos, sin (S, R / 2) or (B, S, R / 2) already of x's positions."""
    rotated = 2 * cos.shape[-1]
    c, s = (wide(t).unsqueeze(-2) for t in (cos, sin))
    head = wide(x[..., :rotated])
    if interleaved:
        a, b = head[..., ::2], head[..., 1::2]
        out = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = head.chunk(2, -1)
        out = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((out.to(x.dtype), x[..., rotated:]), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [16, 8])
def test_rotary(dtype, interleaved, rotated):
    angle = torch.randn(20, rotated // 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x = torch.randn(2, 9, 3, 16).to(dtype)
    rule = {"floor": 2.0**-20} if dtype == torch.float32 else {}

    def match(f, rows, x):
        tables = [t[rows].double() for t in (cos, sin)]
        plain = lambda x: plain_rotary(x, *(t.to(x.dtype) for t in tables), interleaved)  # noqa: E731
        agree(f, plain, x, **rule)

    match(lambda x: apply_rotary_emb(x, cos, sin, interleaved), slice(0, 9), x)
    match(lambda x: apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=4), slice(4, 13), x)
    offsets = torch.tensor([0, 7])
    rows = offsets[:, None] + torch.arange(9)
    match(lambda x: apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets), rows, x)
    cu = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    local = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    packed = {"cu_seqlens": cu, "max_seqlen": 5}
    match(lambda x: apply_rotary_emb(x, cos, sin, interleaved, **packed), local, x[0])
    offsets = torch.tensor([3, 0, 5])
    match(
        lambda x: apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, **packed),
        local + torch.tensor([3] * 4 + [5] * 5),
        x[0],
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_inplace(interleaved):
    angle = torch.randn(9, 8)
    x = torch.randn(2, 9, 3, 16, requires_grad=True)
    want = apply_rotary_emb(x, angle.cos(), angle.sin(), interleaved)
    dout = torch.randn_like(want)
    kept = dout.clone()
    (dx,) = torch.autograd.grad(want, x, dout)
    copy = x * 1
    got = apply_rotary_emb(copy, angle.cos(), angle.sin(), interleaved, inplace=True)
    assert got is copy and torch.equal(got, want)
    assert torch.equal(torch.autograd.grad(got, x, dout)[0], dx) and torch.equal(dout, kept)
    leaf = x.detach().clone().requires_grad_()
    got = apply_rotary_emb(leaf, angle.cos(), angle.sin(), interleaved, inplace=True)
    assert torch.equal(got, want) and torch.equal(leaf, want)
    assert torch.equal(torch.autograd.grad(got, leaf, dout)[0], dx)
    views = [lambda t: t[:, 1], lambda t: t.unbind(1)[1]]
    for view, part in [(v, p) for v in views for p in (lambda t: t, lambda t: t * 1)]:
        leaf = torch.stack((x, x), 1).detach().requires_grad_()
        whole = part(leaf)
        got = apply_rotary_emb(view(whole), angle.cos(), angle.sin(), interleaved, inplace=True)
        assert torch.equal(got, want) and torch.equal(whole[:, 1], want)
        assert torch.equal(whole[:, 0], x)
        (grad,) = torch.autograd.grad(got, leaf, dout)
        assert torch.equal(grad[:, 1], dx) and not grad[:, 0].any()
    leaf = x.detach().clone().requires_grad_()
    with torch.no_grad():
        assert apply_rotary_emb(leaf, angle.cos(), angle.sin(), interleaved, inplace=True) is leaf
    with pytest.raises(ValueError, match="9 positions"):
        apply_rotary_emb(x, angle.cos(), angle.sin(), seqlen_offsets=1)
    with pytest.raises(ValueError, match="seqlen_offsets: expected >= 0, got -1"):
        apply_rotary_emb(x, angle.cos(), angle.sin(), seqlen_offsets=-1)
    with pytest.raises(ValueError, match="head_dim"):
        apply_rotary_emb(x[..., :8], angle.cos(), angle.sin())


def plain_loss(logits, target, reduction, smoothing=0.0, z_scale=0.0, scale=1.0, ignore=-100):
    """(loss, z_loss), both in fp32."""
    logits = wide(logits) * scale
    valid = target != ignore
    lse = logits.logsumexp(-1)
    label = logits.gather(-1, target.masked_fill(~valid, 0)[:, None])[:, 0]
    rows = lse - (1 - smoothing) * label - smoothing * logits.mean(-1)
    z = (z_scale * lse.square()).masked_fill(~valid, 0.0)
    rows = rows.masked_fill(~valid, 0.0) + z
    if reduction == "none":
        return rows, z
    count = valid.sum() if reduction == "mean" else 1
    return rows.sum() / count, z.sum() / count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(dtype, reduction):
    logits = (3 * torch.randn(11, 37)).to(dtype)
    target = torch.randint(0, 37, (11,))
    target[[2, 5]] = 7
    options = {"label_smoothing": 0.1, "logit_scale": 0.7, "lse_square_scale": 1e-2}
    loss = CrossEntropyLoss(7, reduction, **options)
    plain = lambda x: plain_loss(x, target, reduction, 0.1, 1e-2, 0.7, 7)[0]  # noqa: E731
    agree(lambda x: loss(x, target), plain, logits, floor=2.0**-20)
    assert loss(logits, target).dtype == torch.float32
    both = CrossEntropyLoss(7, reduction, **options, return_z_loss=True)
    got = both(logits.clone().requires_grad_(), target)
    want = plain_loss(logits, target, reduction, 0.1, 1e-2, 0.7, 7)
    torch.testing.assert_close(got[0].detach(), want[0])
    torch.testing.assert_close(got[1], want[1])
    assert not got[1].requires_grad


def test_cross_entropy_refuses():
    refuses(CrossEntropyLoss, process_group=object())
    refuses(CrossEntropyLoss, reduction="batchmean")
    refuses(CrossEntropyLoss(), torch.zeros(2, 3), torch.zeros(2, dtype=int), precomputed_lse=1)
    logits = torch.randn(2, 3, requires_grad=True)
    kept = logits.detach().clone()
    CrossEntropyLoss(inplace_backward=True)(logits, torch.tensor([1, 2])).backward()
    assert torch.equal(logits, kept)


def plain_rms_norm(x, weight, bias=None, residual=None, eps=1e-6, offset=0.0):
    """(y, sum) in fp32, y rounded once, the sum not."""
    total = wide(x) if residual is None else wide(x) + wide(residual)
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * (wide(weight) + offset)
    return (y if bias is None else y + wide(bias)).to(x.dtype), total


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype):
    x, residual = (torch.randn(4, 5, 48).to(dtype) for _ in range(2))
    weight, bias = (torch.rand(48).to(dtype) for _ in range(2))
    rule = {"floor": 2.0**-20} if dtype == torch.float32 else {}
    agree(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: plain_rms_norm(x, w, eps=1e-5)[0],
        x,
        weight,
        **rule,
    )
    agree(
        lambda x, w, b, r: rms_norm_fn(x, w, b, r, prenorm=True),
        lambda x, w, b, r: (plain_rms_norm(x, w, b, r)[0], (wide(x) + wide(r)).to(x.dtype)),
        x,
        weight,
        bias,
        residual,
        **rule,
    )
    agree(
        lambda x, w: rms_norm_fn(x, w, None, zero_centered_weight=True),
        lambda x, w: plain_rms_norm(x, w, offset=1.0)[0],
        x,
        weight,
        **rule,
    )


def test_rms_norm_dtypes():
    x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.ones(8)
    y, total = rms_norm_fn(x, weight, None, residual, prenorm=True)
    assert y.dtype == torch.bfloat16 and total.dtype == torch.float32
    assert torch.equal(total, x.float() + residual)
    y, total = rms_norm_fn(x, weight, None, prenorm=True)
    assert total is x
    y, total = rms_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)
    assert torch.equal(total, x.float()) and total.dtype == torch.float32
    assert rms_norm_fn(x, weight, None, out_dtype=torch.float32).dtype == torch.float32
    options = {"x1": x, "weight1": weight, "bias1": weight, "dropout_p": 0.1, "rowscale": weight}
    options |= {"return_dropout_mask": True, "out": x, "residual_out": x}
    for name, value in options.items():
        refuses(rms_norm_fn, x, weight, None, **{name: value})
