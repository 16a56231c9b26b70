"""Data-parallel training on two gloo processes, against one process on the joined batch."""

import sys

import pytest
import torch
import torch.distributed as dist
from conftest import HANG
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

import flatout.torch as ft

B, S, H, HEADS, INNER, V = 4, 12, 32, 4, 48, 61


class Block(torch.nn.Module):
    """A decoder layer and the loss, of flatout's functions."""

    def __init__(self):
        super().__init__()

        def weight(*shape):
            return torch.nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)

        self.embedding, self.head = weight(V, H), weight(V, H)
        self.norms = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(H)) for _ in range(3)])
        self.qkv, self.out, self.gate_up, self.down = (
            weight(3 * H, H), weight(H, H), weight(2 * INNER, H), weight(H, INNER),
        )  # fmt: skip

    def forward(self, ids):
        angle = torch.arange(S)[:, None] / 100 ** (torch.arange(0, H // HEADS, 2) / (H // HEADS))
        cos, sin = (f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
        x = ft.embedding(ids, self.embedding)
        q, k, v = (
            linear(ft.rms_norm(x, self.norms[0]), self.qkv)
            .view(*x.shape[:2], 3 * HEADS, -1)
            .chunk(3, 2)
        )
        q, k = ft.rope(q, k, cos, sin)
        y = ft.attention(q, k, v, causal=True).reshape(x.shape)
        y, x = ft.add_rms_norm(linear(y, self.out), x, self.norms[1])
        y = linear(ft.swiglu(linear(y, self.gate_up)), self.down)
        y, _ = ft.add_rms_norm(y, x, self.norms[2])
        return ft.linear_cross_entropy(y, self.head, ids, shift=1)


def batch(step):
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(step))


def train(wrap, rows, steps=4):
    """Losses, norms and weights of `steps` steps on rows of each batch."""
    torch.manual_seed(3)
    inner = Block()
    model = wrap(inner)
    optimizer = ft.AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step)[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        norms.append(optimizer.grad_norm)
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in inner.parameters()]
    return torch.stack(losses), torch.stack(norms), [w.detach() for w in weights]


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def worker(rank, port, kind, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    wrap = DistributedDataParallel if kind == "ddp" else sharded
    losses, norms, weights = train(wrap, slice(rank * B // 2, (rank + 1) * B // 2))
    dist.all_reduce(losses)
    results.put((rank, (losses / 2).numpy(), norms.numpy(), [w.numpy() for w in weights]))
    dist.barrier()
    dist.destroy_process_group()


def free_port():
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(
    not dist.is_available() or sys.platform != "linux", reason="needs torch.distributed with gloo"
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_as_one(kind):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=worker, args=(rank, port, kind, results), daemon=True)
        for port in [free_port()]
        for rank in range(2)
    ]
    for w in workers:
        w.start()
    try:
        got = sorted(results.get(timeout=HANG) for _ in workers)
        for w in workers:
            w.join(HANG)
            assert w.exitcode == 0
    finally:
        for w in workers:
            w.kill()
    losses, norms, weights = train(lambda model: model, slice(None))
    assert losses[0] > 4 and norms[0] > 0.6 and losses.std() > 1e-3
    for _, got_losses, got_norms, got_weights in got:
        torch.testing.assert_close(torch.as_tensor(got_losses), losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.as_tensor(got_norms), norms, rtol=1e-4, atol=1e-5)
        for a, b in zip(got_weights, weights, strict=True):
            torch.testing.assert_close(torch.as_tensor(a), b, rtol=1e-3, atol=1e-4)
    assert all((a == b).all() for a, b in zip(got[0][3], got[1][3], strict=True))
