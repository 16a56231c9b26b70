import inspect
import types

import pytest
import torch
import torch.nn.functional as F
from peers import agree, literal, parameters, wide

import flatout.compat.liger as liger
from flatout.compat.liger.transformers import functional, modules

DTYPES = [torch.float32, torch.bfloat16]
ARGS = (
    "ce_weight=None,ignore_index=-100,lse_square_scale=0.0,label_smoothing=0.0,reduction='mean',"
    "softcap=None,return_z_loss=False,accum_dtype=None,use_token_scaling=False,"
    "return_token_accuracy=False,return_predicted_tokens=False"
)
APPLY = (
    "rope=True,cross_entropy=False,fused_linear_cross_entropy=True,rms_norm=True,swiglu=True,"
    "model=None"
)
NORM = "eps=1e-06,offset=0.0,casting_mode='llama',init_fn='ones'"
ROPE = "q,k,cos,sin,position_ids=None,unsqueeze_dim=1,rotary_dim=None"
LIGER = {  # 0.8.5
    "LigerRMSNorm": f"hidden_size,{NORM},in_place=True,row_mode=None,elementwise_affine=True",
    "LigerFusedAddRMSNorm": f"hidden_size,{NORM},in_place=False",
    "LigerSwiGLUMLP": "config,intermediate_size=None",
    "LigerPhi3SwiGLUMLP": "config",
    "LigerCrossEntropyLoss": "weight=None,ignore_index=-100,lse_square_scale=0.0,"
    "label_smoothing=0.0,reduction='mean',softcap=None,return_z_loss=False,"
    "return_token_accuracy=False,return_predicted_tokens=False",
    "LigerFusedLinearCrossEntropyLoss": ARGS,
    "liger_rotary_pos_emb": ROPE,
    "liger_rope": ROPE,
    "liger_swiglu": "a,b",
    "liger_rms_norm": "X,W,eps,offset=0.0,casting_mode='llama',in_place=True",
    "liger_fused_add_rms_norm": "X,R,W,eps,offset=0.0,casting_mode='llama',in_place=True",
    "liger_cross_entropy": "input,target,weight=None,size_average=None,ignore_index=-100,"
    "reduce=None,reduction='mean',label_smoothing=0.0,lse_square_scale=0.0,softcap=None,"
    "return_z_loss=False,return_token_accuracy=False,return_predicted_tokens=False",
    "liger_fused_linear_cross_entropy": f"input,weight,target,bias=None,{ARGS},chunk_mem_const=1",
    "LigerForCausalLMLoss": "hidden_states,lm_head_weight,labels,hidden_size,"
    "num_items_in_batch=None,ignore_index=-100,shift_labels=None,final_logit_softcapping=None,"
    "return_token_accuracy=False,return_predicted_tokens=False,**kwargs",
    **{f"apply_liger_kernel_to_{model}": APPLY for model in ("qwen3", "qwen2", "llama", "mistral")},
}
FUNCTIONS = {
    "LigerRMSNormFunction": "X,W,eps,offset=0.0,casting_mode='llama',in_place=True,row_mode=None",
    "LigerFusedAddRMSNormFunction": "X,R,W,eps,offset=0.0,casting_mode='llama',in_place=False",
    "LigerSiLUMulFunction": "a,b,gate_multiplier=1.0,down_multiplier=1.0",
    "LigerFusedGateUpSiLUMulFunction": "y,in_place=False",
    "LigerRopeFunction": ROPE,
    "LigerCrossEntropyFunction": "_input,target,weight,ignore_index=-100,lse_square_scale=0.0,"
    "label_smoothing=0.0,reduction='mean',softcap=None,return_z_loss=False,"
    "return_token_accuracy=False,return_predicted_tokens=False",
    "LigerFusedLinearCrossEntropyFunction": f"_input,weight,target,bias=None,{ARGS},ce_impl=None,"
    "ce_mode=None,chunk_mem_const=1",
}


@pytest.mark.parametrize("name", LIGER)
def test_signature(name):
    assert parameters(getattr(liger, name)) == literal(LIGER[name])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_signature(name):
    assert parameters(getattr(liger, name).apply) == literal(FUNCTIONS[name])


def test_signatures_of_the_installed_liger():
    pytest.importorskip("triton")
    peer = pytest.importorskip("liger_kernel.transformers")
    ops = pytest.importorskip("liger_kernel.ops")
    peer_functional = pytest.importorskip("liger_kernel.transformers.functional")
    loss_utils = pytest.importorskip("liger_kernel.transformers.model.loss_utils")
    for name in LIGER:
        where = next(m for m in (peer, peer_functional, loss_utils) if hasattr(m, name))
        assert parameters(getattr(liger, name)) == parameters(getattr(where, name)), name
        theirs = getattr(where, name)
        if isinstance(theirs, type):
            ours = parameters(getattr(liger, name).forward)
            assert ours == parameters(theirs.forward), name
    for name in FUNCTIONS:
        ours = parameters(getattr(liger, name).apply)
        assert ours == parameters(getattr(ops, name).forward, skip=1), name


def plain_norm(x, w, eps, offset, mode):
    if mode == "none":
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (offset + w)
    norm = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    if mode == "llama":
        norm = wide(norm.to(x.dtype))
    return (norm * (offset + wide(w))).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["llama", "gemma", "none"])
def test_rms_norm(mode, offset, dtype):
    x, r = (torch.randn(6, 5, 64).to(dtype) for _ in range(2))
    w = (1 + 0.3 * torch.randn(64)).to(dtype)
    rule = {"floor": 2.0**-20} if dtype == torch.float32 else {}

    agree(
        lambda x, w: liger.liger_rms_norm(x, w, 1e-5, offset, mode),
        lambda x, w: plain_norm(x, w, 1e-5, offset, mode),
        x,
        w,
        **rule,
    )
    agree(
        lambda x, r, w: liger.liger_fused_add_rms_norm(x, r, w, 1e-5, offset, mode),
        lambda x, r, w: (plain_norm(x + r, w, 1e-5, offset, mode), x + r),
        x,
        r,
        w,
        **rule,
    )


def test_rms_norm_rounds_as_llama_and_gemma_do():
    """In bf16 the modes differ by where they round: bit for bit the plain formula's result."""
    x, w = torch.randn(40, 64).bfloat16(), (1 + 0.3 * torch.randn(64)).bfloat16()
    outs = {}
    for mode in ("llama", "gemma", "none"):
        for offset in (0.0, 1.0):
            y = liger.LigerRMSNormFunction.apply(x, w, 1e-6, offset, mode)
            same = (y == plain_norm(x, w, 1e-6, offset, mode)).float().mean()
            assert same > 0.995, (mode, offset, same)
            outs[mode, offset] = y
    assert not torch.equal(outs["llama", 0.0], outs["gemma", 0.0])
    assert not torch.equal(outs["llama", 1.0], outs["gemma", 1.0])


def test_rms_norm_module():
    norm = liger.LigerRMSNorm(8, eps=1e-5, offset=1.0, casting_mode="gemma", init_fn="zeros")
    assert norm.weight.eq(0).all() and list(norm.state_dict()) == ["weight"]
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), plain_norm(x, norm.weight, 1e-5, 1.0, "gemma"))
    assert norm.extra_repr() == (
        "weight_shape=(8,), eps=1e-05, offset=1.0, in_place=True, row_mode=None"
    )
    assert (norm.variance_epsilon, norm.casting_mode) == (1e-5, "gemma")
    bare = liger.LigerRMSNorm(8, elementwise_affine=False)
    assert bare.weight is None and "weight_shape=None" in bare.extra_repr()
    torch.testing.assert_close(bare(x), F.rms_norm(x, (8,), eps=1e-6))
    fused = liger.LigerFusedAddRMSNorm(8)
    assert fused.extra_repr() == "(8,), eps=1e-06, offset=0.0, in_place=False"
    y, total = fused(x, x)
    torch.testing.assert_close(total, 2 * x)
    torch.testing.assert_close(y, F.rms_norm(2 * x, (8,), eps=1e-6))
    with pytest.raises(AssertionError, match="init_fn"):
        liger.LigerRMSNorm(8, init_fn="normal")
    with pytest.raises(AssertionError, match="casting mode"):
        liger.liger_rms_norm(x, norm.weight, 1e-6, casting_mode="fp8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["llama", "gemma", "none"])
def test_rms_norm_without_a_weight_has_no_offset(mode, dtype):
    x = torch.randn(6, 64).to(dtype)
    norm = liger.LigerRMSNorm(64, 1e-5, 1.0, mode, elementwise_affine=False)

    def plain(x):
        return plain_norm(x, torch.ones(64).to(x.dtype), 1e-5, 0.0, mode)

    agree(norm, plain, x, **({"floor": 2.0**-20} if dtype == torch.float32 else {}))


def test_norms_overwrite_nothing():
    norm, x = liger.LigerRMSNorm(8, in_place=True), torch.randn(3, 8, requires_grad=True)
    dy = torch.randn(3, 8)
    kept = dy.clone()
    norm(x).backward(dy, inputs=[x])
    assert torch.equal(dy, kept) and norm.weight.grad is None


def config(act="silu"):
    return types.SimpleNamespace(hidden_size=16, intermediate_size=24, hidden_act=act)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu(dtype):
    a, b = (torch.randn(4, 7, 24).to(dtype) for _ in range(2))
    rule = {"floor": 2.0**-20} if dtype == torch.float32 else {}

    def plain(a, b, gate=1.0, down=1.0):
        return F.silu(wide(a) * gate).to(b.dtype) * b * down

    agree(liger.liger_swiglu, plain, a, b, **rule)
    scaled = lambda a, b: liger.LigerSiLUMulFunction.apply(a, b, 0.5, 2.0)  # noqa: E731
    agree(scaled, lambda a, b: plain(a, b, 0.5, 2.0), a, b, **rule)
    agree(
        liger.LigerFusedGateUpSiLUMulFunction.apply,
        lambda y: plain(*y.chunk(2, -1)),
        torch.cat((a, b), -1),
        **rule,
    )


def test_mlps():
    x = torch.randn(3, 16)
    mlp = liger.LigerSwiGLUMLP(config())
    assert set(mlp.state_dict()) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}
    want = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), want)
    assert liger.LigerSwiGLUMLP(config("swish"), 40).gate_proj.out_features == 40
    phi = liger.LigerPhi3SwiGLUMLP(config())
    assert set(phi.state_dict()) == {"gate_up_proj.weight", "down_proj.weight"}
    gate, up = phi.gate_up_proj(x).chunk(2, -1)
    torch.testing.assert_close(phi(x), phi.down_proj(F.silu(gate) * up))
    for cls in (liger.LigerSwiGLUMLP, liger.LigerPhi3SwiGLUMLP):
        with pytest.raises(ValueError, match="gelu"):
            cls(config("gelu"))


def test_mlps_of_other_models():
    x = torch.randn(3, 16)
    block = liger.LigerBlockSparseTop2MLP(config())
    assert set(block.state_dict()) == {"w1.weight", "w2.weight", "w3.weight"}
    torch.testing.assert_close(block(x), block.w2(F.silu(block.w1(x)) * block.w3(x)))
    falcon = liger.LigerFalconH1SwiGLUMLP(
        types.SimpleNamespace(**vars(config()), mlp_bias=True, mlp_multipliers=[1.5, 0.25])
    )
    want = F.silu(1.5 * falcon.gate_proj(x)) * falcon.up_proj(x) * 0.25
    torch.testing.assert_close(falcon(x), falcon.down_proj(want))
    assert falcon.down_proj.bias is not None
    moe = liger.LigerQwen3MoeSwiGLUMLP(config(), intermediate_size=8)
    assert moe.gate_proj.out_features == 8
    for cls in (liger.LigerBlockSparseTop2MLP, liger.LigerFalconH1SwiGLUMLP, liger.LigerExperts):
        with pytest.raises(ValueError, match="gelu"):
            cls(config("gelu"))


@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_experts(shape):
    options = {"num_local_experts": 5, "moe_intermediate_size": 12}
    experts = liger.LigerExperts(types.SimpleNamespace(**vars(config()), **options))
    up, down = experts.gate_up_proj, experts.down_proj
    assert up.shape == (5, 24, 16) and down.shape == (5, 16, 12)
    for weight in (up, down):
        torch.nn.init.normal_(weight)
    x = torch.randn(*shape, 16, requires_grad=True)
    weights, index = torch.rand(*shape, 4).softmax(-1).topk(2)  # nothing for the fifth expert

    def plain():
        gate, rest = torch.einsum("...h,ejh->...ej", x, up).chunk(2, -1)
        every = torch.einsum("...ei,ehi->...eh", F.silu(gate) * rest, down)
        taken = every.gather(-2, index[..., None].expand(*index.shape, 16))
        return (taken * weights[..., None]).sum(-2)

    outs = experts(x, index, weights), plain()
    torch.testing.assert_close(*outs)
    grads = (torch.autograd.grad(out.square().sum(), (x, up, down)) for out in outs)
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_experts_of_no_tokens_and_of_other_processes():
    experts = liger.LigerExperts(types.SimpleNamespace(**vars(config()), n_routed_experts=3))
    up, down = experts.gate_up_proj, experts.down_proj
    for weight in (up, down):
        torch.nn.init.normal_(weight)
    none = torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)
    assert experts(*none).shape == (0, 16)
    x, index, weights = torch.randn(4, 16), torch.tensor([[0, 3]] * 4), torch.rand(4, 2)
    gate, rest = (x @ up[0].T).chunk(2, -1)
    want = (F.silu(gate) * rest) @ down[0].T * weights[:, :1]
    torch.testing.assert_close(experts(x, index, weights), want)
    for wrong in (-1, 4):
        index[2, 1] = wrong
        with pytest.raises(IndexError, match=f"expected 0 .. 3, got {wrong}"):
            experts(x, index, weights)


def test_sizes_of_experts():
    sizes = {"hidden_size": 16, "hidden_act": "silu"}
    one = types.SimpleNamespace(**sizes, num_experts=2, moe_intermediate_size=12)
    assert liger.LigerExperts(one).down_proj.shape == (2, 16, 12)
    for given, missing in (
        ({"intermediate_size": 12}, "num_experts, num_local_experts, n_routed_experts"),
        ({"num_experts": 2}, "moe_intermediate_size, intermediate_size"),
    ):
        with pytest.raises(AttributeError, match=f"config has none of {missing}"):
            liger.LigerExperts(types.SimpleNamespace(**sizes, **given))


def rotate_half(x, cos, sin):
    """Hugging Face's rotary embedding in fp32 on x (B, H, S, D), cos (B or 1, S, R)."""
    rotated = cos.shape[-1]
    c, s = (wide(t).unsqueeze(1) for t in (cos, sin))
    head = wide(x[..., :rotated])
    a, b = head.chunk(2, -1)
    out = head * c + torch.cat((-b, a), -1) * s
    return torch.cat((out.to(x.dtype), x[..., rotated:]), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rotated", [16, 8])
def test_rope(dtype, batch, rotated):
    q = torch.randn(2, 9, 4, 16).to(dtype).transpose(1, 2)  # BSHD in memory, as in transformers
    k = torch.randn(2, 2, 9, 16).to(dtype)  # contiguous BHSD
    angle = torch.randn(batch, 9, rotated // 2)
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angle.cos(), angle.sin()))
    kept = q.clone(), k.clone()
    rule = {"floor": 2.0**-20} if dtype == torch.float32 else {}

    def plain(q, k):
        return rotate_half(q, cos.to(q.dtype), sin.to(q.dtype)), rotate_half(
            k, cos.to(q.dtype), sin.to(q.dtype)
        )

    agree(lambda q, k: liger.liger_rotary_pos_emb(q, k, cos, sin), plain, q, k, **rule)
    got = liger.liger_rope(q, k, cos, sin)
    assert torch.equal(q, kept[0]) and torch.equal(k, kept[1])
    half = [t[..., : rotated // 2] for t in (cos, sin)]
    forms = [(cos[:, None], sin[:, None], {})]
    forms += [(*half, {"rotary_dim": rotated})]
    if batch == 1:
        forms.append((cos[0], sin[0], {}))
    for c, s, options in forms:
        for mine, want in zip(liger.liger_rope(q, k, c, s, None, 1, **options), got, strict=True):
            assert torch.equal(mine, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_of_gpt_oss_and_of_vision(dtype):
    q, k = torch.randn(2, 4, 9, 16).to(dtype), torch.randn(2, 1, 9, 16).to(dtype)
    angle = torch.randn(2, 9, 8)
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    want = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2.0**-7, "atol": 2.0**-9}
    half = liger.liger_rotary_pos_emb_gpt_oss(q, k, cos[..., :8], sin[..., :8])
    heads = q[0].transpose(0, 1), k[0].transpose(0, 1)
    vision = liger.liger_rotary_pos_emb_vision(*heads, cos[0], sin[0])
    for i in range(2):
        torch.testing.assert_close(half[i], want[i], **tolerance)
        torch.testing.assert_close(vision[i], want[i][0].transpose(0, 1), **tolerance)


def test_rope_refuses():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(NotImplementedError, match="unsqueeze_dim"):
        liger.liger_rotary_pos_emb(q, q, q[0, 0], q[0, 0], unsqueeze_dim=2)
    for rotary_dim in (3, 10, 0):
        with pytest.raises(ValueError, match="rotary_dim"):
            liger.liger_rotary_pos_emb(q, q, q[0, 0], q[0, 0], rotary_dim=rotary_dim)
    with pytest.raises(ValueError, match="columns"):
        liger.liger_rope(q, q, q[0, 0, :, :2], q[0, 0, :, :2], rotary_dim=8)


def test_submodules_hold_the_same_objects():
    assert modules.LigerRMSNorm is liger.LigerRMSNorm
    assert functional.liger_swiglu is liger.liger_swiglu
    assert inspect.ismodule(liger.ops)
