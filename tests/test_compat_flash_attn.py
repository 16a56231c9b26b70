import inspect
import math

import pytest
import torch
from conftest import DEVICES
from peers import agree, literal, parameters, refuses, tiny_model, tokens, wide

from flatout.compat import flash_attn, flash_attn_interface, shadow, unshadow
from flatout.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flatout.compat.flash_attn.bert_padding import (
    index_first_axis,
    index_put_first_axis,
    pad_input,
    unpad_input,
)
from flatout.compat.flash_attn.layers.rotary import apply_rotary_emb
from flatout.compat.flash_attn.losses.cross_entropy import CrossEntropyLoss
from flatout.compat.flash_attn.ops.rms_norm import rms_norm
from flatout.compat.flash_attn.ops.triton.layer_norm import rms_norm_fn

DTYPES = [torch.float32, torch.bfloat16]
TAIL = (
    "dropout_p=0.0,softmax_scale=None,causal=False,window_size=(-1,-1),softcap=0.0,"
    "alibi_slopes=None,deterministic=False,return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q,cu_seqlens_k,max_seqlen_q,max_seqlen_k"
FA2 = {  # flash-attn 2.8.3
    flash_attn_func: f"q,k,v,{TAIL}",
    flash_attn_qkvpacked_func: f"qkv,{TAIL}",
    flash_attn_kvpacked_func: f"q,kv,{TAIL}",
    flash_attn_varlen_func: f"q,k,v,{LENGTHS},{TAIL},block_table=None",
    flash_attn_varlen_kvpacked_func: f"q,kv,{LENGTHS},{TAIL}",
    flash_attn_varlen_qkvpacked_func: f"qkv,cu_seqlens,max_seqlen,{TAIL}",
    unpad_input: "hidden_states,attention_mask,unused_mask=None",
    pad_input: "hidden_states,indices,batch,seqlen",
    index_first_axis: "input,indices",
    index_put_first_axis: "values,indices,first_axis_dim",
    apply_rotary_emb: "x,cos,sin,interleaved=False,inplace=False,seqlen_offsets=0,"
    "cu_seqlens=None,max_seqlen=None",
    CrossEntropyLoss: "ignore_index=-100,reduction='mean',label_smoothing=0.0,logit_scale=1.0,"
    "lse_square_scale=0.0,inplace_backward=False,process_group=None,return_z_loss=False",
    CrossEntropyLoss.forward: "self,input,target,precomputed_lse=None",
    rms_norm: "x,weight,epsilon",
    rms_norm_fn: "x,weight,bias,residual=None,x1=None,weight1=None,bias1=None,eps=1e-06,"
    "dropout_p=0.0,rowscale=None,prenorm=False,residual_in_fp32=False,zero_centered_weight=False,"
    "return_dropout_mask=False,out_dtype=None,out=None,residual_out=None",
}
KW = (
    "softmax_scale=None,causal=False,qv=None,q_descale=None,k_descale=None,v_descale=None,"
    "window_size=(-1,-1),attention_chunk=0,softcap=0.0,num_splits=1,pack_gqa=None,"
    "deterministic=False,sm_margin=0,return_attn_probs=False"
)
FA3 = {  # 3.0.0
    "flash_attn_func": f"q,k,v,{KW}",
    "flash_attn_varlen_func": f"q,k,v,{LENGTHS},seqused_q=None,seqused_k=None,{KW}",
    "flash_attn_combine": "out_partial,lse_partial,out=None,out_dtype=None",
    "flash_attn_qkvpacked_func": "qkv,softmax_scale=None,causal=False,q_descale=None,"
    "k_descale=None,v_descale=None,window_size=(-1,-1),attention_chunk=0,softcap=0.0,"
    "deterministic=False,num_heads_q=None,sm_margin=0,return_attn_probs=False",
}


@pytest.mark.parametrize("function", FA2, ids=lambda f: f.__qualname__)
def test_signature(function):
    assert parameters(function) == literal(FA2[function])


@pytest.mark.parametrize("name", FA3)
def test_fa3_signature(name):
    assert parameters(getattr(flash_attn_interface, name)) == literal(FA3[name])


def plain_attention(q, k, v, causal=False, window=(-1, -1), softcap=0.0, scale=None):
    """(out, lse): eager attention, softmax in fp32, aligned to the bottom right."""
    sq, sk, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(groups, 2) for t in (k, v))
    scores = wide(torch.einsum("bqhd,bkhd->bhqk", q, k)) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    positions = torch.arange(max(sq, sk), device=q.device)
    distance = positions[:sk] - positions[:sq, None] - (sk - sq)
    left, right = window[0], 0 if causal else window[1]
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    hidden |= (distance < -left) & (left >= 0)
    hidden |= (distance > right) & (right >= 0)
    scores = scores.masked_fill(hidden, -math.inf)
    weights = torch.softmax(scores, -1).masked_fill(hidden, 0.0).to(q.dtype)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), scores.logsumexp(-1)


def qkv(dtype, sq=9, sk=13, heads=(4, 2), size=16, batch=2):
    torch.manual_seed(3)
    return tuple(
        torch.randn(batch, s, h, size).to(dtype)
        for s, h in ((sq, heads[0]), (sk, heads[1]), (sk, heads[1]))
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "theirs,ours",
    [
        ({}, {}),
        ({"causal": True}, {"causal": True}),
        ({"window_size": (3, 1), "softmax_scale": 0.5}, {"window": (3, 1), "scale": 0.5}),
        ({"softcap": 2.0, "deterministic": True}, {"softcap": 2.0}),
    ],
    ids=["full", "causal", "window", "softcap"],
)
def test_attention(dtype, theirs, ours):
    inputs = qkv(dtype)
    rule = {"floor": 2.0**-18} if dtype == torch.float32 else {}
    plain = lambda *args: plain_attention(*args, **ours)[0]  # noqa: E731
    agree(lambda q, k, v: flash_attn_func(q, k, v, **theirs), plain, *inputs, **rule)
    fa3 = flash_attn_interface.flash_attn_func
    assert torch.equal(fa3(*inputs, **theirs), flash_attn_func(*inputs, **theirs))
    kv = torch.stack(inputs[1:], 2)
    packed = flash_attn_kvpacked_func(inputs[0], kv, **theirs)
    assert torch.equal(packed, flash_attn_func(*inputs, **theirs))


@pytest.mark.parametrize("dtype", DTYPES)
def test_qkvpacked(dtype):
    packed = torch.stack(qkv(dtype, 7, 7, (3, 3)), 2)
    rule = {"floor": 2.0**-18} if dtype == torch.float32 else {}
    plain = lambda t: plain_attention(*t.unbind(2), causal=True)[0]  # noqa: E731
    agree(lambda t: flash_attn_qkvpacked_func(t, causal=True), plain, packed, **rule)
    fa3 = flash_attn_interface.flash_attn_qkvpacked_func
    want = flash_attn_qkvpacked_func(packed, causal=True)
    assert torch.equal(fa3(packed, causal=True), want)
    q, k, v = qkv(dtype, 7, 7, (4, 2))
    assert torch.equal(
        fa3(torch.cat((q, k, v), 2), causal=True, num_heads_q=4),
        flash_attn_func(q, k, v, causal=True),
    )
    with pytest.raises(ValueError, match="num_heads_q"):
        fa3(torch.cat((q, k, v), 2))


def test_attn_probs():
    """Causal with more queries than keys: the first sq - sk rows see nothing."""
    q, k, v = qkv(torch.float32, 6, 4)
    plain, plain_lse = plain_attention(q, k, v, causal=True)
    out, lse, s_dmask = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert s_dmask.shape == (0,) and s_dmask.dtype == q.dtype
    assert lse.shape == (2, 4, 6) and lse.dtype == torch.float32
    assert (lse[..., :2] == math.inf).all() and (out[:, :2] == 0).all()
    torch.testing.assert_close(lse[..., 2:], plain_lse[..., 2:])
    torch.testing.assert_close(out[:, 2:], plain[:, 2:])
    fa3_out, fa3_lse = flash_attn_interface.flash_attn_func(
        q, k, v, causal=True, return_attn_probs=True
    )
    assert torch.equal(fa3_out, out) and (fa3_lse[..., :2] == -math.inf).all()
    assert torch.equal(fa3_lse[..., 2:], lse[..., 2:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_varlen(dtype):
    lengths = [5, 0, 9, 1]
    cu = torch.tensor([0, 5, 5, 14, 15], dtype=torch.int32)
    q, k, v = (t.squeeze(0) for t in qkv(dtype, 15, 15, batch=1))

    def plain(q, k, v):
        parts = [
            plain_attention(*(t[a : a + n][None] for t in (q, k, v)), causal=True)[0][0]
            for a, n in zip(cu.tolist(), lengths, strict=False)
            if n
        ]
        return torch.cat(parts)

    rule = {"floor": 2.0**-18} if dtype == torch.float32 else {}
    packed = (cu, cu, 9, 9)
    agree(lambda *t: flash_attn_varlen_func(*t, *packed, causal=True), plain, q, k, v, **rule)
    out, lse, s_dmask = flash_attn_varlen_func(
        q, k, v, *packed, causal=True, return_attn_probs=True
    )
    assert lse.shape == (4, 15) and s_dmask.shape == (0,)
    kv = torch.stack((k, v), 1)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q, kv, *packed, causal=True), out)
    same = torch.stack((k, k, v), 1)
    assert torch.equal(
        flash_attn_varlen_qkvpacked_func(same, cu, 9, causal=True),
        flash_attn_varlen_func(k, k, v, *packed, causal=True),
    )
    fa3 = flash_attn_interface.flash_attn_varlen_func
    fa3_out, fa3_lse = fa3(q, k, v, *packed, causal=True, return_attn_probs=True)
    assert torch.equal(fa3_out, out) and torch.equal(fa3_lse, lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(59, 59), (16, 40), (40, 12)], ids=lambda s: "{}-{}".format(*s))
def test_head_dims(device, sizes):
    """On CUDA no head dimension need be a multiple of 8; FA3's v may have one of its own."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention on CUDA needs compute capability 9.0")
    q, k, _ = qkv(torch.bfloat16, size=sizes[0])
    v = qkv(torch.bfloat16, size=sizes[1])[2]
    inputs = [t.to(device) for t in (q, k, v)]
    functions = [flash_attn_interface.flash_attn_func]
    functions += [flash_attn_func] if sizes[0] == sizes[1] else []
    for function in functions:
        f = lambda *t: function(*t, causal=True, return_attn_probs=True)[:2]  # noqa: B023, E731
        agree(f, lambda *t: plain_attention(*t, causal=True), *inputs, floor=2.0**-18)
    out, lse = f(*inputs)
    cu = [torch.tensor([0, s], dtype=torch.int32, device=device) for s in (9, 13)]
    one = [t[0] for t in inputs]
    packed = flash_attn_interface.flash_attn_varlen_func(
        *one, *cu, 9, 13, causal=True, return_attn_probs=True
    )
    assert torch.equal(packed[0], out[0]) and torch.equal(packed[1], lse[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("used", ["qk", "q", "k"])
def test_seqused(device, used):
    """As if the rows behind the used ones were not there."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention on CUDA needs compute capability 9.0")
    # not so short that attention's rounded output, which gradients come from, matters to the rule
    lengths = {"q": [50, 30, 0, 40], "k": [60, 20, 30, 40]}
    counts = {"q": [30, 0, 0, 40], "k": [40, 20, 10, 0]}
    cu, seqused, rows = {}, {}, {}
    for x in "qk":
        ends = torch.tensor([0, *lengths[x]]).cumsum(0)
        cu[x] = ends.to(device, torch.int32)
        seqused[x] = torch.tensor(counts[x], dtype=torch.int32, device=device)
        taken = counts[x] if x in used else lengths[x]
        rows[x] = [range(a, a + n) for a, n in zip(ends.tolist(), taken, strict=False)]
    q, k, v = (t[0].to(device) for t in qkv(torch.bfloat16, 120, 150, batch=1))

    def plain(q, k, v):
        out, lse = torch.zeros_like(q), wide(q).new_full((4, 120), -math.inf)
        for at_q, at_k in zip(rows["q"], rows["k"], strict=True):
            if len(at_q) and len(at_k):
                at_q, at_k = torch.tensor(at_q), torch.tensor(at_k)
                parts = (t[None] for t in (q[at_q], k[at_k], v[at_k]))
                one, one_lse = plain_attention(*parts, causal=True)
                out[at_q], lse[:, at_q] = one[0], one_lse[0]
        return out, lse

    def function(q, k, v):
        options = {f"seqused_{x}": seqused[x] for x in used}
        return flash_attn_interface.flash_attn_varlen_func(
            q, k, v, cu["q"], cu["k"], 50, 60, causal=True, return_attn_probs=True, **options
        )

    agree(lambda *t: function(*t)[0], lambda *t: plain(*t)[0], q, k, v)
    want = plain(*(t.float() for t in (q, k, v)))[1]
    torch.testing.assert_close(function(q, k, v)[1], want, rtol=1e-4, atol=1e-4)
    name = f"seqused_{used[0]}"
    with pytest.raises(ValueError, match=name):
        flash_attn_interface.flash_attn_varlen_func(
            q, k, v, cu["q"], cu["k"], 50, 60, **{name: seqused["q"][:1]}
        )


@pytest.mark.parametrize("used", ["q", "k"])
def test_max_seqlen_bounds_the_used_rows(used):
    q, k, v = (t[0] for t in qkv(torch.float32, 20, 20, batch=1))
    cu = torch.tensor([0, 10, 20], dtype=torch.int32)
    longest = {f"max_seqlen_{x}": 3 if x == used else 10 for x in "qk"}
    counts = torch.tensor([2, 3], dtype=torch.int32)

    def attend(**options):
        return flash_attn_interface.flash_attn_varlen_func(q, k, v, cu, cu, **options)

    want = attend(max_seqlen_q=10, max_seqlen_k=10, **{f"seqused_{used}": counts})
    assert torch.equal(attend(**longest, **{f"seqused_{used}": counts}), want)
    with pytest.raises(ValueError, match="cu_seqlens"):
        attend(**longest, **{f"seqused_{used}": counts + 8})


def test_bad_tensors():
    q, k, v = qkv(torch.float32)
    for module in (flash_attn, flash_attn_interface):
        for at, name in enumerate("qkv"):
            inputs = [q, k, v]
            inputs[at] = None
            with pytest.raises(
                TypeError, match=f"flash_attn_func: {name}: expected a torch tensor"
            ):
                module.flash_attn_func(*inputs)
            inputs[at] = torch.tensor(1.0)
            with pytest.raises(ValueError, match=rf"{name}: expected \(..., H, D\), got \(\)"):
                module.flash_attn_func(*inputs)
            inputs[at] = (q, k, v)[at].to(torch.float8_e5m2)
            with pytest.raises(NotImplementedError, match="float8_e5m2"):
                module.flash_attn_func(*inputs)
        # The sizes are the caller's and not those that padding makes.
        with pytest.raises(ValueError, match="k: expected q's head dimension 16, got 12"):
            module.flash_attn_func(q, k[..., :12], v[..., :8])


def test_combine():
    """Attention to parts of the keys makes attention to all of them, gradients too."""
    q, k, v = qkv(torch.float32, 5, 9)

    def combined(q, k, v):
        parts = zip(k.split((4, 0, 5), 1), v.split((4, 0, 5), 1), strict=True)
        both = [
            flash_attn_interface.flash_attn_func(q, *kv, return_attn_probs=True) for kv in parts
        ]
        out, lse = (torch.stack(x) for x in zip(*both, strict=True))
        return flash_attn_interface.flash_attn_combine(out, lse.transpose(-1, -2))

    def plain(q, k, v):
        out, lse = plain_attention(q, k, v)
        return out, lse.transpose(-1, -2)

    agree(combined, plain, q, k, v, floor=2.0**-18)
    combine = flash_attn_interface.flash_attn_combine
    out = torch.randn(2, 3, 4, 8, requires_grad=True)
    lse = torch.randn(2, 3, 4)
    lse[:, 1] = -math.inf
    lse.requires_grad_()
    total, total_lse = combine(out, lse)
    assert (total[1] == 0).all() and (total_lse[1] == -math.inf).all()
    for grad in torch.autograd.grad(total.sum() + total_lse[0].sum(), (out, lse)):
        assert grad.isfinite().all() and (grad[:, 1] == 0).all()
    given = torch.empty(3, 4, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        assert combine(out, lse, given)[0] is given
        assert torch.equal(given, total.bfloat16())
        assert torch.equal(combine(out, lse, out_dtype=torch.bfloat16)[0], given)


def test_refused_options():
    q, k, v = qkv(torch.float32)
    cu = torch.tensor([0, 13], dtype=torch.int32)
    lengths = (k[0], k[0], v[0], cu, cu, 13, 13)
    packed = torch.stack((k, k, v), 2)
    slopes = torch.ones(4)
    for option in ({"dropout_p": 0.1}, {"alibi_slopes": slopes}):
        refuses(flash_attn_func, q, k, v, **option)
        refuses(flash_attn_kvpacked_func, q, packed[:, :, 1:], **option)
        refuses(flash_attn_qkvpacked_func, packed, **option)
        refuses(flash_attn_varlen_func, *lengths, **option)
        refuses(flash_attn_varlen_kvpacked_func, k[0], packed[0, :, 1:], cu, cu, 13, 13, **option)
        refuses(flash_attn_varlen_qkvpacked_func, packed[0], cu, 13, **option)
    refuses(flash_attn_varlen_func, *lengths, block_table=cu)
    for module in (flash_attn, flash_attn_interface):
        with pytest.raises(NotImplementedError, match="cache"):
            module.flash_attn_with_kvcache(q, k, v)
    fa3 = flash_attn_interface
    with pytest.raises(NotImplementedError, match="cache"):
        flash_attn_interface.get_scheduler_metadata(1, 1, 1, 1, 1, 64, cu)
    with pytest.raises(NotImplementedError, match="dropout_p"):
        flash_attn.flash_attn_interface._get_block_size_n(q.device, 64, True, False)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn"):
        flash_attn_interface.flash_attn_func(*[q.to(torch.float8_e4m3fn)] * 3)
    options = [{"qv": q}, {"attention_chunk": 4}]
    options += [{f"{x}_descale": slopes} for x in "qkv"]
    for option in options:
        refuses(fa3.flash_attn_func, q, k, v, **option)
        refuses(fa3.flash_attn_varlen_func, *lengths, **option)
        if "qv" not in option:
            refuses(fa3.flash_attn_qkvpacked_func, packed, **option)
    for option in ({"seqused_q": cu[1:]}, {"seqused_k": cu[1:]}):
        refuses(fa3.flash_attn_varlen_func, q, k, v, None, None, 9, 13, **option)
    accepted = fa3.flash_attn_func(q, k, v, num_splits=4, pack_gqa=True, sm_margin=8)
    assert torch.equal(accepted, fa3.flash_attn_func(q, k, v))


def test_readme():
    q, k, v = qkv(torch.bfloat16, 8, 8, (4, 4))
    out = flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=True)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert flash_attn.__version__.startswith("2.8")


def test_padding():
    hidden = torch.randn(3, 5, 2, requires_grad=True)
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    packed, indices, cu, longest, used = unpad_input(hidden, mask)
    assert torch.equal(packed, hidden[mask.bool()])
    assert indices.tolist() == [0, 1, 10, 11, 12, 13, 14] and indices.dtype == torch.int64
    assert cu.tolist() == [0, 2, 2, 7] and cu.dtype == torch.int32
    assert longest == 5 and isinstance(longest, int)
    assert used.tolist() == [2, 0, 5] and used.dtype == torch.int32
    padded = pad_input(packed, indices, 3, 5)
    assert torch.equal(padded, hidden * mask[..., None])
    padded.backward(torch.ones_like(padded))
    assert torch.equal(hidden.grad, mask[..., None].expand(3, 5, 2).float())
    unused = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    packed, indices, cu, longest, used = unpad_input(hidden, mask.bool(), unused.bool())
    assert cu.tolist() == [0, 3, 4, 9] and used.tolist() == [2, 0, 5] and len(packed) == 9
    rows = index_first_axis(hidden.flatten(0, 1), torch.tensor([7, 7, 0]))
    assert torch.equal(rows, hidden.flatten(0, 1)[[7, 7, 0]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_indices(dtype):
    """transformers' decoding gives pad_input a slice of cu_seqlens, which is int32."""
    values = torch.randn(3, 2, requires_grad=True)
    indices = torch.tensor([4, 0, 1], dtype=dtype)
    rows = index_put_first_axis(values, indices, 6)
    want = torch.stack((values[1], values[2], *torch.zeros(2, 2), values[0], torch.zeros(2)))
    assert torch.equal(rows, want)
    assert torch.equal(pad_input(values, indices, 2, 3), want.view(2, 3, 2))
    assert torch.equal(index_first_axis(rows, indices), values)
    (grad,) = torch.autograd.grad(rows, values, torch.arange(12.0).view(6, 2))
    assert torch.equal(grad, torch.tensor([[8.0, 9.0], [0.0, 1.0], [2.0, 3.0]]))


@pytest.mark.parametrize("name", ["flash_attn", "flash_attn_interface"])
def test_transformers_generates(name, monkeypatch):
    """Its own flash attention over these names gives eager attention's tokens."""
    utils = pytest.importorskip("transformers.modeling_flash_attention_utils")
    version = 2 if name == "flash_attn" else 3
    for n in (2, 3, 4):
        available = lambda n=n: n == version  # noqa: E731
        monkeypatch.setattr(utils, f"is_flash_attn_{n}_available", available)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    model = tiny_model("Qwen3").eval()
    ids, _ = tokens()
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(ids, **options)
    model.config._attn_implementation = f"flash_attention_{version}"
    shadow(name)
    try:
        assert torch.equal(model.generate(ids, **options), want)
    finally:
        unshadow(name)
    assert want.shape == (2, 18)


def test_flash_attention_names_that_transformers_reads():
    names = inspect.signature(flash_attn_varlen_func).parameters
    assert {"max_seqlen_q", "window_size", "softcap", "deterministic"} <= set(names)
