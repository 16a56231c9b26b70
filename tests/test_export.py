"""What torch.export leaves of a model are the registered ops: their gradients are those of the
eager functions, to the bit."""

import io

import pytest
import torch
from cases import OPS, as_tuple, case, forward_backward, same, upstream_of
from conftest import DEVICES
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flatout.torch as ft


class Calls(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def small(name, device="cpu"):
    """cases.case() of few numbers; attention, and losses with every result."""
    if name == "attention" and device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention on CUDA needs compute capability 9.0")
    target = torch.tensor([3, 0, -100, 7], device=device)
    x, w, b = (torch.randn(s, device=device).requires_grad_() for s in ((4, 16), (8, 16), 8))
    every = dict(return_lse=True, return_accuracy=True, z_loss=0.1)
    q = [torch.randn(1, 9, 2, 8, device=device).bfloat16().requires_grad_() for _ in range(3)]
    options = dict(causal=True, return_lse=True, deterministic=True)
    more = {
        "attention": (q, lambda *q: ft.attention(*q, **options)),
        "cross_entropy, lse": ((x,), lambda x: ft.cross_entropy(x, target, **every)[:2]),
        "cross_entropy, none": ((x,), lambda x: ft.cross_entropy(x, target, reduction="none")),
        "linear_cross_entropy, lse": (
            (x, w, b),
            lambda x, w, b: ft.linear_cross_entropy(x, w, target, bias=b, **every)[:2],
        ),
    }
    return more.get(name) or case(name, device, torch.float32, 12, H=64, D=16, heads=(4, 2))


def decomposed(module, inputs):
    return torch.export.export(module, inputs).run_decompositions().module()


def recorded_without_gradients(module, inputs):
    with torch.no_grad():
        return torch.export.export(module, inputs).module()


def saved_and_loaded(module, inputs):
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, inputs), file)
    return torch.export.load(io.BytesIO(file.getvalue())).module()


RECORD = {
    "export": lambda module, inputs: torch.export.export(module, inputs).module(),
    "strict": lambda module, inputs: torch.export.export(module, inputs, strict=True).module(),
    "no_grad": recorded_without_gradients,
    "decomposed": decomposed,
    "loaded": saved_and_loaded,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("how", RECORD)
@pytest.mark.parametrize(
    "name",
    [*OPS, "attention", "cross_entropy, lse", "cross_entropy, none", "linear_cross_entropy, lse"],
)
def test_gradients(name, how, device):
    inputs, f = small(name, device)
    g = RECORD[how](Calls(f), tuple(inputs))
    assert same(forward_backward(inputs, g), forward_backward(inputs, f))
    for n, _ in enumerate(as_tuple(f(*inputs))):  # of one result alone, of one input alone
        for x in inputs:
            got, want = (
                torch.autograd.grad(out, x, upstream_of([out]), allow_unused=True)[0]
                for out in (as_tuple(g(*inputs))[n], as_tuple(f(*inputs))[n])
            )
            assert (got is None) == (want is None) and (got is None or torch.equal(got, want))


class Model(torch.nn.Module):
    """A decoder layer between an embedding and the loss."""

    def __init__(self, vocabulary=20, H=32, heads=2):
        super().__init__()
        self.embed = torch.nn.Parameter(torch.randn(vocabulary, H))
        self.norm, self.qkv = ft.RMSNorm(H), torch.nn.Linear(H, 3 * H)
        self.q_norm, self.k_norm = (torch.nn.Parameter(torch.rand(H // heads)) for _ in range(2))
        self.heads, self.mlp_norm = heads, torch.nn.Parameter(torch.rand(H))
        self.mlp, self.loss = ft.SwiGLUMLP(H, 2 * H), ft.LinearCrossEntropyLoss(H, vocabulary)

    def forward(self, ids, target, cos, sin):
        x = ft.embedding(ids, self.embed)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = ft.qk_norm_rope(q, k, self.q_norm, self.k_norm, cos, sin)
        y, x = ft.add_rms_norm(ft.attention(q, k, v, causal=True).flatten(2), x, self.mlp_norm)
        return self.loss(x + self.mlp(y), target)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_model_of_any_batch(strict, compiled):
    def inputs(batch):
        return (*torch.randint(0, 20, (2, batch, 7)), *torch.randn(2, 7, 16))

    def step(model, batch):
        parameters = dict(model.named_parameters())
        loss = torch.func.functional_call(model, parameters, batch)
        return loss, torch.autograd.grad(loss, [parameters[name] for name in names])

    model, batch = Model(), torch.export.Dim("batch", min=2, max=64)
    names = [name for name, _ in model.named_parameters()]
    shapes = dict(dynamic_shapes=({0: batch}, {0: batch}, None, None), strict=strict)
    exported = torch.export.export(model, inputs(3), **shapes).module()
    if compiled:
        exported.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5):
        data = inputs(n)
        (got, grads), (want, wanted) = step(exported, data), step(model, data)
        assert torch.equal(got, want) and same(grads, wanted)
        assert all(g.any() for g in grads)


@pytest.mark.parametrize("name", OPS)
def test_tangents_are_refused(name):
    """As by the eager functions: forward-mode differentiation would lose them without a word."""
    inputs, f = small(name)
    inputs = tuple(x.detach() for x in inputs)
    g = torch.export.export(Calls(f), inputs).module()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(g, inputs, tuple(map(torch.ones_like, inputs)))


@pytest.mark.parametrize("record", [False, True])
def test_constants_have_no_gradient(record):
    x, w = torch.randn(4, 16), torch.randn(8, 16)
    target, weight = torch.tensor([3, 0, 5, 7]), torch.rand(8, requires_grad=True)
    f = lambda x, w, c: ft.linear_cross_entropy(x, w, target, class_weight=c)  # noqa: E731
    g = torch.export.export(Calls(f), (x, w, weight)).module() if record else f
    assert not g(x, w, weight).requires_grad
    leaf = w.clone().requires_grad_()
    assert torch.autograd.grad(g(x, leaf, weight), (leaf, weight), allow_unused=True)[1] is None


def test_rope_of_q_alone_by_name():
    q, table = torch.randn(1, 5, 2, 8, requires_grad=True), torch.rand(1, 5, 8)
    out, none = ft.ops.rope_fwd(q, None, table, table)
    want = torch.autograd.grad(ft.rope(q, None, table, table)[0].sum(), q)
    assert same(torch.autograd.grad(out.sum() + none.sum(), q), want)


def test_any_fake_argument_makes_a_fake_result():
    table, ids = torch.randn(9, 4), torch.tensor([1, 2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(ids)
    y = ft.ops.embedding_fwd(table, fake)
    assert isinstance(y, FakeTensor) and y.shape == (2, 4)


def test_double_backward_is_refused():
    inputs, f = small("rms_norm")
    y = torch.export.export(Calls(f), inputs).module()(*inputs)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiat"):
        grads[0].sum().backward()


# ---- The registered ops by name --------------------------------------------------------------


def test_every_forward_op_has_a_gradient():
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("flatout::")]
    forward = {n for n in names if n.endswith("_fwd")}
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert len(forward) >= 9 and forward <= {n for n in names if has(n, "Autograd")}


@pytest.mark.parametrize("need_rstd", [False, True])
def test_called_by_name(need_rstd):
    inputs, _ = small("rms_norm")
    y, rstd = ft.ops.rms_norm_fwd(*inputs, 1e-6, 0.0, need_rstd)
    assert y.requires_grad and not rstd.requires_grad
    want = forward_backward(inputs, ft.rms_norm)
    assert same([y, *torch.autograd.grad(y, inputs, upstream_of([y]))], want)
    with torch.no_grad():
        y, rstd = ft.ops.rms_norm_fwd(*inputs, 1e-6, 0.0, need_rstd)
    assert not y.requires_grad and len(rstd) == (len(y) if need_rstd else 0)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_wanted_gradients_of_a_loss(needs):
    """Whatever was wanted when the loss was recorded."""
    inputs, f = small("linear_cross_entropy, mean")
    both = torch.export.export(Calls(f), inputs).module()
    neither = torch.export.export(Calls(f), tuple(x.detach() for x in inputs)).module()
    inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    (leaf,) = (x for x in inputs if x.requires_grad)
    want = torch.autograd.grad(f(*inputs), leaf)
    for g in (both, neither):
        assert same(torch.autograd.grad(g(*inputs), leaf), want)


def test_what_has_no_gradient_says_so():
    x, coef = torch.ones(3, requires_grad=True), torch.ones(())
    calls = {
        "global_norm": lambda: ft.ops.global_norm([x], 1.0),
        "scale_": lambda: ft.ops.scale_([x * 1], coef),
        "adamw_step_": lambda: ft.ops.adamw_step_(
            [x * 1], [x], [x], [x], [coef], *[None] * 4, *[0.1] * 5, False, False, 0
        ),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"{name}: no derivative"):
            call()
    (q, k, *weights), _ = small("qk_norm_rope")
    tables = torch.ones(2, q.shape[1], q.shape[-1])
    inplace = Calls(lambda q, k: ft.qk_norm_rope(q * 1, k * 1, *weights, *tables, inplace=True))
    with pytest.raises(RuntimeError, match="inplace=True overwrites"):
        torch.export.export(inplace, (q, k))
