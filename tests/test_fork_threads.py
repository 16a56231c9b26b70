"""fork, spawn, DataLoader workers and threads of Python."""

import gc
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch
from conftest import HANG

import flatout
import flatout.torch as ft
from flatout import _C


def run(code):
    """`code` as a program of its own; it must print "passed". libgomp hangs after a bad fork()."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "2"}
    program = textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, timeout=HANG, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.strip().endswith("passed"), done.stderr


WORK = """
    import numpy as np, os, signal, sys
    import flatout

    x, w = np.random.RandomState(0).randn(1000, 256).astype(np.float32), np.ones(256, np.float32)

    def work():
        y = flatout.rms_norm(x, w)
        grads = flatout.swiglu_bwd(y, x, y)
        return flatout.global_norm([y, *grads, *flatout.rms_norm_bwd(y, x, w)]).tobytes()
"""


def test_fork_after_openmp():
    """The threads of the parent's pool do not exist in the child: it works on its own."""
    run(
        WORK
        + """
    want = work()  # starts the pool
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if work() == want and work() == want else 1)
        children.append(child)
        assert work() == want  # the parent's pool is still there
    for child in children:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    child = os.fork()
    if child == 0:  # a child of a child
        signal.alarm(20)
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if work() == want else 1)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print("passed")
    """
    )


def test_fork_during_a_call():
    """fork() while another thread is inside an op: the child must not wait for its lock."""
    run(
        WORK
        + """
    import threading
    want, stop = work(), threading.Event()

    def busy():
        while not stop.is_set():
            assert work() == want

    threads = [threading.Thread(target=busy) for _ in range(2)]
    for t in threads:
        t.start()
    codes = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if work() == want else 1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    stop.set()
    for t in threads:
        t.join()
    assert codes == [0] * 5, codes
    print("passed")
    """
    )


@pytest.mark.slow
def test_data_loader_workers():
    run("""
    import torch, flatout.torch as ft

    class Data(torch.utils.data.Dataset):
        x = torch.randn(8, 300, 256, generator=torch.Generator().manual_seed(0))
        def __len__(self):
            return 8
        def __getitem__(self, i):
            return ft.rms_norm(self.x[i], torch.ones(256))

    data = Data()
    want = torch.stack([data[i] for i in range(8)])  # OpenMP runs before the workers fork
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, timeout=300, multiprocessing_context="fork"
    )
    for _ in range(2):
        assert torch.equal(torch.cat(list(loader)), want)
    print("passed")
    """)


@pytest.mark.slow
def test_spawn():
    """A function of flatout is pickled by name; the child imports it anew."""
    run("""
    import multiprocessing, numpy as np, flatout

    if __name__ == "__main__":
        x, w = np.random.randn(300, 256), np.random.randn(256)
        want = flatout.rms_norm(x, w)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for got in pool.starmap(flatout.rms_norm, [(x, w)] * 4):
                assert (got == want).all()
        print("passed")
    """)


# ---- Threads --------------------------------------------------------------------------------


def calls():
    """(name, function): every op on inputs that all threads share; results are new tensors."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape, grad=True):
        return torch.randn(shape, generator=g).requires_grad_(grad)

    x, r, w, dy = rand(300, 128), rand(300, 128), rand(128), rand(300, 128, grad=False)
    q, k, v = rand(2, 40, 4, 32), rand(2, 40, 2, 32), rand(2, 40, 2, 32)
    qw, table = rand(32), rand(40, 32, grad=False)
    table_v, ids = rand(97, 128), torch.randint(97, (300,), generator=g)
    packed = rand(300, 256)

    def run_of(f, *inputs):
        def call():
            out = f(*inputs)
            outs = out if isinstance(out, tuple) else (out,)
            leaves = [t for t in inputs if t.requires_grad]
            ups = [dy.new_full((), 0.5).expand(o.shape) for o in outs]
            return [*outs, *torch.autograd.grad(outs, leaves, ups)]

        return call

    def adamw():
        p = [x.detach().clone(), w.detach().clone()]
        states = [[torch.zeros_like(t) for t in p] for _ in range(2)]
        ft.adamw_step(p, [r.detach(), qw.detach().repeat(4)], *states, 1)
        return [*p, *states[0], *states[1]]

    def clip():
        p = [torch.nn.Parameter(t.detach()) for t in (x, w)]
        p[0].grad, p[1].grad = r.detach().clone(), qw.detach().repeat(4)
        return [ft.clip_grad_norm_(p, 1.0), p[0].grad, p[1].grad]

    yield "rms_norm", run_of(ft.rms_norm, x, w)
    yield "add_rms_norm", run_of(ft.add_rms_norm, x, r, w)
    yield "swiglu", run_of(ft.swiglu, packed)
    yield "rope", run_of(lambda *a: ft.rope(*a, table, table), q, k)
    yield "qk_norm_rope", run_of(lambda *a: ft.qk_norm_rope(*a, table, table), q, k, qw, qw)
    yield "attention", run_of(lambda *a: ft.attention(*a, causal=True), q, k, v)
    yield "embedding", run_of(lambda t: ft.embedding(ids, t), table_v)
    yield "cross_entropy", run_of(lambda t: ft.cross_entropy(t, ids % 128), x)
    yield "linear_cross_entropy", run_of(lambda *a: ft.linear_cross_entropy(*a, ids), x, table_v)
    yield "adamw", adamw
    yield "clip", clip
    yield (
        "numpy",
        lambda: [torch.as_tensor(flatout.rms_norm(x.detach().numpy(), w.detach().numpy()))],
    )


def bad_input():
    with pytest.raises(ValueError, match="w: expected shape"):
        flatout.rms_norm(np.ones((300, 128), np.float32), np.ones(7, np.float32))
    with pytest.raises(TypeError, match="tensors: expected an array"):
        _C.scale([torch.ones(3), None], torch.ones(1))


def test_threads_on_shared_inputs():
    """8 threads run every op at once, each from another place in the list; another one passes
    wrong arguments and another one collects garbage. Every result is that of one thread alone."""
    ops = list(calls())
    want = [f() for _, f in ops]
    stop, errors = threading.Event(), []

    def guarded(body):
        def target():
            try:
                body()
            except BaseException as e:  # noqa: BLE001  for the main thread to raise
                errors.append(e)
                stop.set()

        return threading.Thread(target=target)

    def all_ops(first):
        for n in range(3 * len(ops)):
            at = (first + n) % len(ops)
            for a, b in zip(ops[at][1](), want[at], strict=True):
                assert torch.equal(a, b), ops[at][0]

    def until_stopped(body):
        def loop():
            while not stop.is_set():
                body()

        return loop

    workers = [guarded(lambda i=i: all_ops(i)) for i in range(8)]
    helpers = [guarded(until_stopped(bad_input)), guarded(until_stopped(gc.collect))]
    for t in workers + helpers:
        t.start()
    for t in workers:
        t.join()
    stop.set()
    for t in helpers:
        t.join()
    if errors:
        raise errors[0]


def test_small_stacks_are_enough():
    """Of a thread of Python and of OpenMP's own: the matrix product packs into heap memory."""
    run("""
        import os
        os.environ["OMP_STACKSIZE"] = "256k"
        import ml_dtypes, numpy as np, threading
        import flatout

        def work():
            for dtype in (np.float32, np.float64, ml_dtypes.bfloat16):
                x, w = np.ones((300, 256), dtype), np.ones((600, 256), dtype)
                loss = flatout.linear_cross_entropy(x, w, np.zeros(300, np.int64))
                assert abs(float(loss) - np.log(600)) < 1e-4, loss
            q = np.ones((1, 300, 2, 64), np.float32)
            assert np.allclose(flatout.attention(q, q, q), 1)
            print("passed")

        threading.stack_size(256 << 10)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    """)
