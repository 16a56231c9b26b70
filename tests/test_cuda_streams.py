"""Repeats, CUDA graphs, streams, no waiting for the device, second derivatives refused, and
torch.compile: for every op."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import OPS, as_tuple, case, forward_backward, noise, same, upstream_of
from conftest import DEVICES

import flatout.torch as ft

SIZES = [(64, torch.bfloat16), (53, torch.float32)]


@contextlib.contextmanager
def no_waiting(device):
    """An error where torch would wait for the device."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def repeats(device):
    return 50 if device == "cuda" else 3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens, dtype", SIZES)
@pytest.mark.parametrize("name", OPS)
def test_repeats_do_not_change_a_bit(name, tokens, dtype, device):
    inputs, f = case(name, device, dtype, tokens)
    if name == "embedding":  # few rows, so that many terms meet in each
        ids = torch.randint(0, 5, (3000,), device=device)
        f = lambda x: ft.embedding(ids, x)  # noqa: E731
    want = forward_backward(inputs, f)
    for _ in range(repeats(device)):
        noise(device)
        assert same(forward_backward(inputs, f), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_repeats_of_cross_entropy(reduction, device):
    """Many rows, one of them ignored in five, and every result."""
    z = torch.randn(700, 1000, device=device, requires_grad=True)
    target = torch.randint(0, 1000, (700,), device=device)
    target[::5] = -100
    options = dict(reduction=reduction, z_loss=1e-3, return_lse=True, return_accuracy=True)

    def run():
        loss, lse, accuracy = ft.cross_entropy(z, target, **options)
        (dz,) = torch.autograd.grad((loss, lse), z, upstream_of((loss, lse)))
        return loss, lse, accuracy, dz

    want = run()
    for _ in range(repeats(device)):
        noise(device)
        assert same(run(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_repeats_of_the_optimizer(stochastic, device):
    sizes = [(300, 1000), (7,), (0, 4), (65537,)] + [(n,) for n in range(520)]
    start = [torch.randn(s, device=device).bfloat16() for s in sizes]
    grads = [torch.randn(s, device=device).bfloat16() for s in sizes]

    def run():
        params = [torch.nn.Parameter(t.clone()) for t in start]
        optimizer = ft.AdamW(params, max_grad_norm=1.0, stochastic_rounding=stochastic)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        norm = ft.clip_grad_norm_(params, 0.5)
        states = [optimizer.state[p][k] for p in params for k in ("exp_avg", "exp_avg_sq")]
        everything = [*params, *states, *(p.grad for p in params)]
        return torch.cat([t.detach().reshape(-1) for t in everything]), norm, optimizer.grad_norm

    want = run()
    for _ in range(repeats(device)):
        noise(device)
        assert same(run(), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_no_op_waits_for_the_device(name, device):
    inputs, f = case(name, device)
    upstream = upstream_of(as_tuple(f(*inputs)))
    forward_backward(inputs, f, upstream)
    with no_waiting(device):
        forward_backward(inputs, f, upstream)
        with torch.no_grad():
            f(*inputs)


@pytest.mark.parametrize("device", DEVICES)
def test_bounds_of_attention_are_not_waited_for(device):
    """max_seqlen as a tensor, which is what transformers derives from position_ids."""
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("attention on CUDA needs compute capability 9.0")
    q = torch.randn(20, 2, 64, device=device).bfloat16().requires_grad_()
    cu = torch.tensor([0, 7, 20], dtype=torch.int32, device=device)
    dout = torch.randn_like(q)

    def run(bound):
        out = ft.attention(q, q, q, cu_seqlens_q=cu, max_seqlen_q=bound, deterministic=True)
        return out, *torch.autograd.grad(out, q, dout)

    want, bound = run(13), cu.diff().max()
    with no_waiting(device):
        got = run(bound)
    assert same(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy_options_do_not_wait(device):
    z = torch.randn(20, 30, device=device, requires_grad=True)
    target, weight = torch.zeros(20, device=device).long(), torch.ones(30, device=device)
    with no_waiting(device):
        for options in (dict(num_items=3), dict(class_weight=weight), dict(return_accuracy=True)):
            out = as_tuple(ft.cross_entropy(z, target, **options))
            torch.autograd.grad(out[0], z)


def with_gradients(dtype, device):
    params = [torch.nn.Parameter(torch.randn(50, 7, device=device).to(dtype)) for _ in range(600)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_does_not_wait(device):
    params = with_gradients(torch.bfloat16, device)
    lr = torch.full((), 1e-3, device=device)
    optimizer = ft.AdamW(params, lr=lr, max_grad_norm=1.0, stochastic_rounding=True)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    with no_waiting(device):
        optimizer.step()
        ft.clip_grad_norm_(params, 1.0)
        ft.global_norm([p.grad for p in params])
    assert not any(map(torch.equal, params, before))


@pytest.mark.parametrize("device", DEVICES)
def test_the_optimizer_does_not_wait_under_a_scaler(device):
    params = with_gradients(torch.float32, device)  # torch unscales no bf16 on CUDA
    optimizer = ft.AdamW(params, lr=1e-3, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    scaler.scale(torch.ones((), device=device))
    scaler.step(optimizer), scaler.update()
    before = [p.detach().clone() for p in params]
    with no_waiting(device):
        scaler.step(optimizer)
    assert not any(map(torch.equal, params, before))


# ---- CUDA graphs and streams ---------------------------------------------------------------------


def captured(f):
    """(graph, f's results in it), after two runs on a stream of their own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = f()
    return graph, out


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_cuda_graph_replays_with_new_data(name):
    """Forward and backward in one graph, replayed on the stream of capture and on another."""
    inputs, f = case(name, "cuda")
    upstream = upstream_of(as_tuple(f(*inputs)))
    graph, out = captured(lambda: forward_backward(inputs, f, upstream))
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.no_grad():
            for t in (*inputs, *upstream):
                t.normal_()
        stale = [t.clone() for t in out]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.replay()
        torch.cuda.current_stream().wait_stream(stream)
        want = forward_backward(inputs, f, upstream)
        assert same(out, want) and not any(map(torch.equal, out, stale))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_side_stream_is_honoured(name):
    """The values arrive late, on that stream alone; the backward follows there too."""
    inputs, f = case(name, "cuda")
    upstream = upstream_of(as_tuple(f(*inputs)))
    want = forward_backward(inputs, f, upstream)
    saved = [t.detach().clone() for t in inputs]
    with torch.no_grad():
        for t in inputs:
            t.fill_(float("nan"))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        with torch.no_grad():
            for t, value in zip(inputs, saved, strict=True):
                t.copy_(value)
        got = forward_backward(inputs, f, upstream)
    side.synchronize()
    assert same(got, want)


@pytest.mark.gpu
def test_optimizer_on_a_side_stream():
    params = [torch.nn.Parameter(torch.randn(1000, device="cuda")) for _ in range(3)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    grads = [torch.randn_like(p) for p in params]
    ours, theirs = ft.AdamW(params, max_grad_norm=1.0), ft.AdamW(others, max_grad_norm=1.0)
    for p, q, g in zip(params, others, grads, strict=True):
        p.grad, q.grad = torch.full_like(p, float("nan")), g
    theirs.step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        for p, g in zip(params, grads, strict=True):
            p.grad.copy_(g)
        ours.step()
    side.synchronize()
    assert same(params, others) and torch.equal(ours.grad_norm, theirs.grad_norm)


@pytest.mark.gpu
def test_inputs_may_be_freed_at_once():
    """A tensor that dies after an asynchronous call is not reused before the call has read it."""
    for name in OPS:
        inputs, f = case(name, "cuda")
        want = [o.detach().clone() for o in as_tuple(f(*inputs))]
        torch.cuda._sleep(5_000_000)
        with torch.no_grad():
            got = as_tuple(f(*(t.clone() for t in inputs)))
            poison = [torch.full_like(t, float("nan")) for t in inputs]
        assert same(got, want) and all(p.isnan().all() for p in poison), name


@pytest.mark.parametrize("device", DEVICES)
def test_threads_with_streams_of_their_own(device):
    """Eight threads run every op at once, each on a stream of its own."""
    cases = [case(name, device, tokens=200) for name in OPS]
    upstream = [upstream_of(as_tuple(f(*inputs))) for inputs, f in cases]

    def work():
        stream = torch.cuda.Stream() if device == "cuda" else None
        if stream:
            stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            out = [forward_backward(*c, d) for c, d in zip(cases, upstream, strict=True)]
        if stream:
            stream.synchronize()
        return out

    want = work()
    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(24)]:
            assert all(map(same, future.result(), want))


# ---- Second derivatives ----------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_gradient_penalty_is_refused(name, device):
    """The upstream gradient is a constant: the penalty must not be left out without a word."""
    inputs, f = case(name, device, torch.float32, tokens=6, H=64, D=16)
    loss = sum(y.sum() for y in as_tuple(f(*inputs)))
    found = torch.autograd.grad(loss, inputs, create_graph=True)
    penalty = sum(g.square().sum() for g in found)
    with pytest.raises(RuntimeError, match="differentiat"):
        (loss + penalty).backward()


# ---- torch.compile -------------------------------------------------------------------------------


def compiled_as_eager(name, device, **options):
    inputs, f = case(name, device, torch.float32, tokens=6, H=64, D=16)
    compiled = torch.compile(f, fullgraph=True, **options)
    for a, b in zip(forward_backward(inputs, compiled), forward_backward(inputs, f), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_compile(name, device):
    compiled_as_eager(name, device, backend="aot_eager")


@pytest.mark.gpu
@pytest.mark.slow
def test_compile_with_inductor():
    """One model of all ops, as torch compiles for the GPU by default."""
    pytest.importorskip("triton")
    (x, w), _ = case("rms_norm", "cuda", torch.bfloat16, tokens=32, H=256)
    table = torch.randn(40, 256, device="cuda").bfloat16().requires_grad_()
    cos, sin = torch.randn(2, 32, 64, device="cuda")
    ids = torch.randint(0, 40, (32,), device="cuda")

    def model(x, w, table):
        y, s = ft.add_rms_norm(x, ft.embedding(ids, table), w)
        q = (y * 2).view(1, 32, 4, 64)
        q, k = ft.qk_norm_rope(q, q + 1, w[:64], w[64:128], cos, sin)
        q, k = ft.rope(q, k, cos, sin)
        z = ft.swiglu(q.reshape(32, 256), k.reshape(32, 256)) + s
        return ft.cross_entropy(ft.rms_norm(z, w).tanh(), ids)

    inputs = (x, w, table)
    compiled = torch.compile(model, fullgraph=True)
    for a, b in zip(forward_backward(inputs, compiled), forward_backward(inputs, model),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)
