"""benchmarks/run_ops.py: one op beside its peers, the table of overheads, the result files."""

import csv
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import run_ops  # noqa: E402
from conftest import DEVICES  # noqa: E402
from ops import optimizer, overhead, readme, results, table, timing  # noqa: E402

HOST_OPS = ["rms_norm", "rope_inplace", "cross_entropy", "embedding", "adamw"]
RESULTS = ROOT / "benchmarks" / "results" / "h100"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_overhead(tmp_path, capsys, monkeypatch, threads):
    monkeypatch.setattr(overhead, "CALLS", 3)
    monkeypatch.setattr(overhead, "SECONDS", 0.0)
    path = tmp_path / "overhead.csv"
    arguments = ["--overhead", "--device", "cpu", "--csv", str(path), "--op", *HOST_OPS]
    assert run_ops.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "adamw, 399 tensors" in printed
    found = {}
    for row in rows_of(path):
        key = row["kernel_name"], row["kernel_operation_mode"], row["x_value"]
        found.setdefault(key, {})[row["kernel_provider"]] = float(row["y_value_50"])
    forward, backward = found["rms_norm", "forward", "1"], found["rms_norm", "backward", "1"]
    assert set(forward) == set(overhead.COLUMNS) - {"liger", "liger, grad"}
    assert set(backward) == {overhead.BEFORE, "_C", "flatout, grad", "torch, grad"}
    assert overhead.BEFORE not in found["cross_entropy", "forward", "1"]
    assert all(0 < figure for row in found.values() for figure in row.values())
    assert json.loads(path.with_suffix(".json").read_text())["adamw"]["statistic"] == "quickest"


def test_overhead_replays_the_call_that_the_public_function_made():
    x = torch.randn(3, 8)
    out = []
    calls = overhead.recorded(lambda: out.append(run_ops.OPS["swiglu"].flatout(flatout(), x, x)))
    assert len(calls) == 1
    expected = out[0].clone()
    out[0].zero_()
    calls[0]()
    assert torch.equal(out[0], expected)
    assert overhead._C.swiglu_fwd is calls[0].func


def flatout():
    import flatout.torch

    return flatout.torch


def run(tmp_path, *arguments):
    path = tmp_path / "ops.csv"
    run_ops.main([*arguments, "--device", "cpu", "--each", "0.01", "--csv", str(path)])
    return rows_of(path)


def test_one_op(tmp_path, capsys):
    arguments = ["--op", "rms_norm", "--shape", "7x64", "--providers", "torch", "liger", "flatout"]
    rows = run(tmp_path, *arguments)
    assert list(rows[0]) == results.COLUMNS
    speeds = [r for r in rows if r["metric_name"] == "speed"]
    assert {(r["kernel_provider"], r["kernel_operation_mode"]) for r in speeds} == {
        (p, m) for p in ("torch", "flatout", timing.COPY) for m in ("forward", "backward")
    }
    assert all(float(r["y_value_20"]) <= float(r["y_value_50"]) for r in rows)
    where = json.loads((tmp_path / "ops.json").read_text())
    assert where["rms_norm"]["torch"] == torch.__version__ and where["rms_norm"]["TB/s"] > 0
    printed = capsys.readouterr().out
    assert "skipped: " in printed and "> 2" not in printed
    again = run(tmp_path, *arguments)  # measured again: replaced, not added
    assert len(again) == len(rows)


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, capsys):
    ops = ["--op", "rms_norm", "--shape", "7x64", "--providers", "torch", "flatout"]
    path = tmp_path / "ops.csv"
    run_ops.main([*ops, "--device", "cuda", "--each", "0.05", "--csv", str(path)])
    rows = rows_of(path)
    for metric in ("speed", "call", "memory"):
        found = {r["kernel_provider"] for r in rows if r["metric_name"] == metric}
        assert found == {timing.COPY, "torch", "flatout"}
    printed = capsys.readouterr().out
    assert "skipped" not in printed and "> 2" not in printed and "waited" not in printed
    where = json.loads((tmp_path / "ops.json").read_text())["rms_norm"]
    assert where["driver_version"] and where["power.limit"]


def test_several_ops_and_a_budget(tmp_path, capsys):
    ops = ["--op", "adamw", "global_norm", "--providers", "torch", "flatout*"]
    rows = run(tmp_path, *ops, "--shape", "1000x3")
    assert {r["kernel_name"] for r in rows} == {"adamw", "global_norm"}
    providers = {r["kernel_provider"] for r in rows if r["kernel_name"] == "adamw"}
    assert providers == {timing.COPY, "torch", "flatout", "flatout, stochastic"}
    assert "> 2" not in capsys.readouterr().out
    assert run(tmp_path, *ops, "--seconds", "1e-9") == rows
    assert "not run, --seconds are over" in capsys.readouterr().out


def test_attention_prints_tflops(tmp_path, capsys):
    run(tmp_path, "--op", "attention", "--shape", "16x1x4x2x16", "--providers", "torch")
    assert "TFLOPS" in capsys.readouterr().out


def test_no_rate_where_the_forward_makes_the_gradients(tmp_path, capsys):
    arguments = ["--shape", "8x16x32", "--providers", "torch", "flatout"]
    run(tmp_path, "--op", "linear_cross_entropy", *arguments)
    lines = [x.split() for x in capsys.readouterr().out.splitlines() if x.startswith("  ")]
    empty = {(x[0], x[1]) for x in lines[1:] if x[3] == x[4] == x[5] == "-"}
    assert empty == {("flatout", "forward"), ("flatout", "backward")}
    loss = run_ops.OPS["cross_entropy"]
    assert loss.has_rate("flatout", "forward") and not loss.has_rate("liger", "forward")


def test_a_sweep_goes_over_many_sizes(tmp_path):
    rows = run(tmp_path, "--op", "swiglu", "adamw", "--sweep", "--providers", "torch", "flatout")
    for name, many in (("swiglu", [64, 256, 1024]), ("adamw", [4**6, 4**7, 4**8])):
        found = {int(r["x_value"]) for r in rows if r["kernel_name"] == name}
        assert sorted(found) == many
    assert run_ops.parse(["--sweep"]).csv.name == "sweep.csv"
    assert run_ops.OPS["cross_entropy"].sweep("cuda")[-1] == (8192, 151936)  # 2.3 GiB of logits
    assert run_ops.OPS["linear_cross_entropy"].sweep("cuda")[-1] == (32768, 4096, 151936)
    for op in run_ops.OPS.values():
        sizes = [shape[0] for shape in op.sweep("cuda")]
        assert len(sizes) >= 3 and sizes == sorted(sizes)
        assert all(len(shape) == len(op.cuda[0]) for shape in op.sweep("cuda"))


def fake_op(function):
    return table.Op(
        "T H", [(8, 64)], [], lambda T, H: [table.grad(T, H)],
        lambda x: x * 3, function, moved=lambda T, H: (T * H, T * H),
    )  # fmt: skip


def test_a_wrong_result_is_marked(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(run_ops.OPS, "rms_norm", fake_op(lambda ft, x: x * 3.001))
    run(tmp_path, "--op", "rms_norm", "--providers", "torch", "flatout")
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  flatout")]
    assert len(lines) == 2 and all(line.endswith("> 2") for line in lines)


def test_the_same_forward_is_timed_once(tmp_path, monkeypatch):
    variant = {"peers": {"flatout, other": lambda x: x * 3}, "same_forward": ("flatout, other",)}
    op = replace(fake_op(lambda ft, x: x * 3), **variant)
    monkeypatch.setitem(run_ops.OPS, "rms_norm", op)
    rows = run(tmp_path, "--op", "rms_norm", "--providers", "torch", "flatout*")
    timed = {(r["kernel_provider"], r["kernel_operation_mode"]) for r in rows}
    assert ("flatout", "forward") in timed and ("flatout, other", "backward") in timed
    assert ("flatout, other", "forward") not in timed
    assert "flatout, deterministic" in run_ops.OPS["attention"].same_forward


def test_a_failure_while_timing_is_a_line(tmp_path, capsys, monkeypatch):
    calls = []

    def fails_later(ft, x):
        calls.append(x)
        if len(calls) > 3:
            raise RuntimeError("no more")
        return x * 3

    monkeypatch.setitem(run_ops.OPS, "rms_norm", fake_op(fails_later))
    rows = run(tmp_path, "--op", "rms_norm", "--providers", "torch", "flatout")
    assert "flatout, forward: skipped: RuntimeError: no more" in capsys.readouterr().out
    assert "torch" in {r["kernel_provider"] for r in rows}


@pytest.mark.parametrize("name", run_ops.OPS)
def test_every_op_has_what_it_needs(name):
    op = run_ops.OPS[name]
    shape = run_ops.small(op, op.cpu[0])
    assert len(shape) == len(op.cuda[0]) == len(op.dims.split())
    inputs = run_ops.make_inputs(op, shape, "cpu", torch.float32)
    assert op.moved or op.flops
    for mode in op.modes:
        assert op.work(shape, mode, 2)[0] > 0
    outputs = run_ops.differentiate(
        op, lambda xs: op.torch(*xs), run_ops.placed(inputs, torch.float64)
    )
    assert all(torch.isfinite(x).all() for x in outputs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", run_ops.GROUPS["elementwise"] | run_ops.GROUPS["matmul"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_flatout_is_right_for_the_inputs_of_the_benchmark(name, dtype, device):
    if device == "cuda" and name.startswith("attention"):
        if dtype == "fp32" or torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("attention on CUDA: 16 bits, compute capability 9.0")
    op = run_ops.OPS[name]
    shape = (8, *op.cpu[0][1:])
    functions = {n: f for n, f in table.providers(op).items() if n in ("torch", "flatout")}
    ratios, skipped = run_ops.check(op, functions, shape, device, run_ops.DTYPES[dtype])
    assert not skipped and ratios["flatout"] <= 2


PEERS = {
    "rms_norm": {"torch.compile", "torch F.rms_norm", "liger", "quack"},
    "add_rms_norm": {"torch.compile", "torch F.rms_norm", "liger", "quack"},
    "swiglu": {"torch.compile", "liger"},
    "rope": {"torch.compile", "liger"},
    "cross_entropy": {"torch.compile", "torch, not in fp32", "liger", "quack"},
    "embedding": {"torch.compile", "liger"},
    "adamw": {"torch", "torch, foreach"},
    "attention": {"torch.compile", "cuDNN in torch", "flash-attn 2 in torch", "flash-attn",
                  "flash-attn 3", "flash-attn 4"},
    "attention_full": {"torch.compile", "cuDNN in torch"},
    "attention_packed": {"torch.compile", "flatout, T + 1 entries", "flash-attn 2 in torch",
                         "flash-attn", "flash-attn 3", "flash-attn 4"},
    "linear_cross_entropy": {"torch.compile", "torch, chunked", "liger", "liger, fp32 sums",
                             "cut-cross-entropy", "quack"},
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_runs_or_says_why(name):
    op, peers = run_ops.OPS[name], table.providers(run_ops.OPS[name])
    assert PEERS[name] <= set(peers)
    functions = {n: f for n, f in peers.items() if n != "torch.compile"}
    ratios, skipped = run_ops.check(op, functions, (8, *op.cpu[0][1:]), "cpu", torch.float32)
    assert ratios.keys() | skipped.keys() == functions.keys() and "flatout" in ratios
    assert set(skipped.values()) <= {"needs CUDA", "needs torch 2.13"}


def test_documents_make_the_packed_tokens():
    from ops import matmul

    for T in (1, 7, 512, 8192):
        lengths = matmul.lengths(T)
        assert len(lengths) == matmul.DOCUMENTS and sum(lengths) == T and min(lengths) >= 0
        *_, starts, fixed = matmul.packed_inputs(T, 2, 1, 8)
        assert starts.tolist() == matmul.documents(T) and len(fixed) == max(T, 16) + 1
        assert fixed.unique_consecutive().tolist() == starts.unique_consecutive().tolist()
    whole, packed = (run_ops.OPS[n].flops for n in ("attention", "attention_packed"))
    assert packed(4096, 8, 2, 64)[0] == sum(whole(n, 1, 8, 2, 64)[0] for n in matmul.lengths(4096))


def test_packed_heads_are_views_of_one_buffer_in_every_copy():
    inputs = run_ops.make_inputs(run_ops.OPS["rope_packed"], (5, 2, 4, 2, 8), "cpu", torch.bfloat16)
    for copied in (run_ops.placed(inputs), run_ops.placed(inputs, torch.float64)):
        q, k = copied[:2]
        assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
        assert q.stride() == inputs[0].stride() and q.is_leaf and q.requires_grad
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(copied, inputs, strict=True))


def test_qwen3_8b_is_the_model():
    assert (sum(map(math.prod, optimizer.qwen3_8b())), len(optimizer.qwen3_8b())) == (
        optimizer.QWEN3_8B
    )
    assert optimizer.sizes(10, 3) == [(4,), (3,), (3,)]
    assert run_ops.parse(["--op", "adamw", "--shape", "qwen3-8b"]).shape == [optimizer.QWEN3_8B]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_clipping_scales_in_every_call_of_every_provider(dtype):
    op = run_ops.OPS["clip_grad_norm_"]
    inputs = run_ops.make_inputs(op, (4000, 3), "cpu", dtype)
    steps = [op.torch(*inputs), op.flatout(flatout(), *inputs), op.torch(*inputs)]
    grads = inputs[:-1]
    for turn in range(150):
        step = steps[turn % 2 if turn < 100 else 2]  # in turn, and one alone
        max_norm, before = float(inputs[-1][0]), [g.clone() for g in grads]
        assert torch.cat(grads).double().norm() > max_norm
        step()
        assert float(inputs[-1][0]) < max_norm
        assert not any(torch.equal(g, was) for g, was in zip(grads, before, strict=True))
    assert torch.cat(grads).double().norm() > 0


def test_clipping_counts_six_bytes_a_parameter_in_bf16():
    assert run_ops.OPS["clip_grad_norm_"].work((100, 3), "step", 2) == (600, "TB/s")


class Event:
    """A CUDA event that the GPU reaches at once, or only after a long sleep."""

    asleep_us = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.reached = Event.asleep_us < 700

    def query(self):
        return self.reached


@pytest.mark.parametrize("limit,late", [(20_000, False), (400, True)])
def test_the_host_is_given_more_time_until_it_is_ahead(monkeypatch, limit, late):
    def sleep(cycles):
        Event.asleep_us = cycles / timing.CYCLES_PER_US

    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "LONGEST_US", limit)
    clock, calls = timing.Clock("cpu"), []
    clock.cuda, clock.flush = True, torch.empty(1)
    *_, found = clock.start("f", lambda: None, calls.append)
    assert found is late and Event.asleep_us == (400 if late else 800)
    assert len(calls) == (3 if late else 4)


def test_whole_calls_take_turns(monkeypatch):
    """A loop of every function in every round, each as long as its share of the budget."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    order = []
    functions = {name: (lambda name=name: name, order.append) for name in "ab"}
    found = timing.whole_calls(functions, {"a": 1.0, "b": 4.0}, 0.01 * timing.LOOPS, Random(0))
    rounds = [order[i : i + 14] for i in range(0, len(order), 14)]
    assert len(rounds) == timing.LOOPS and set(found) == {"a", "b"}
    assert all(Counter(one) == {"a": 10 + 1, "b": 2 + 1} for one in rounds)
    assert len({one[0] for one in rounds}) == 2  # not always the same one first


def made_up_results(folder, monkeypatch):
    """Result files, and a README of the project, in the folder's parent."""
    shapes = {"rms_norm": (["T", "H"], [(2048, 4096), (16384, 4096)]),
              "adamw": (["P", "N"], [optimizer.QWEN3_8B])}  # fmt: skip
    timed = {timing.COPY: 0.01, "torch": 0.05, "torch F.rms_norm": 0.02, "flatout": 0.0125}
    new = []
    for name, (dims, sizes) in shapes.items():
        for shape in sizes:
            for provider, ms in timed.items():
                ms *= shape[0] / 2048
                metrics = results.timing_metrics(timing.Timing(ms, ms, ms, 2 * ms), 1.0)
                for mode in run_ops.OPS[name].modes:
                    new += results.rows(name, dims, shape, "bf16", "cpu", provider, mode, metrics)
    liger = timing.Timing(0.01, 0.01, 0.01, 0.02, late=1.0)  # ahead, and of the host
    metrics = results.timing_metrics(liger, 1.0)
    args = "rms_norm", ["T", "H"], (2048, 4096), "bf16", "cpu", "liger", "forward"
    results.save(folder / "ops.csv", new + results.rows(*args, metrics),
                 results.environment("cpu", {"TB/s": 3.0}))  # fmt: skip
    host = {"flatout": 11.0, "flatout, grad": 22.0, "torch": 20.0, "torch, grad": 20.0}
    args, where = ("rms_norm", ["T", "H"], (1, 64), "fp32", "cpu"), results.environment("cpu", {})
    for provider, us in host.items():
        rows = results.rows(*args, provider, "forward", [("host", "us", us, us, us)])
        results.save(folder / "overhead.csv", rows, where)
    monkeypatch.setattr(readme, "README", folder.parent / "README.md")
    readme.README.write_text(f"a\n{readme.BEGIN}\nas it was\n{readme.END}\nb\n")


def cells_of(text, start):
    line = next(x for x in text.splitlines() if x.startswith(start))
    return [x.strip() for x in line.strip("|").split("|")]


def test_readme_from_the_result_files(tmp_path, monkeypatch):
    folder = tmp_path / "results"
    made_up_results(folder, monkeypatch)
    for _ in range(2):
        run_ops.main(["--readme", str(folder)])
        text = readme.README.read_text()
        assert text.startswith("a\n") and text.endswith("b\n") and "as it was" not in text
        cells = cells_of(text, "| `rms_norm`")
        assert cells[1:3] == ["16384 tokens x 4096", "100.0 / 100.0"]
        assert cells[3:] == ["89 % / 134 %", "160.0 / 160.0 (torch)"]
        assert cells_of(text, "| `adamw`")[1] == "Qwen3-8B's 8.19e9 parameters in 399 tensors"
        assert "flatout 11.0 and 22.0 µs, torch 20.0 and 20.0 µs." in " ".join(text.split())
        assert "the host (median of batches of calls), without" in text
        assert "Peers: torch, Liger. Without figures" in text
        assert "- GPU time: `rms_norm` at 2048: forward 25 % (Liger).\n" in text
        assert "- the host's time on one row: `rms_norm` forward with grad 10 % (torch).\n" in text
        text = (folder / "README.md").read_text()
        assert "do not edit" in text and "--readme results`" in text
        assert cells_of(text, "| `rms_norm`")[1:] == [
            "2048 x 4096 (T x H)", "forward", "12.5", "2.68", "89 %", "80 %", "20.0", "-",
            "10.0 (late)", "-", "25.0", "40.0", "20.0", "-"]  # fmt: skip
        assert "| `rms_norm` | 2048 x 4096 | backward |" in text
        assert "Statistic over batches of calls: median." in text
        assert "3.00 TB/s; runs of 20" in " ".join(text.split())


def timed_rows(name, dims, shape, provider, mode):
    metrics = results.timing_metrics(timing.Timing(1.0, 1.0, 1.0, 2.0), None)
    return results.rows(name, dims, shape, "bf16", "cpu", provider, mode, metrics)


def test_rows_that_say_nothing_are_left_out(tmp_path):
    path, new = tmp_path / "ops.csv", []
    sizes = {"attention": ("S B Hq Hk D".split(), (64, 1, 2, 1, 64)),
             "linear_cross_entropy": ("T H V".split(), (64, 16, 32))}  # fmt: skip
    for name, (dims, shape) in sizes.items():
        for provider in ("flatout", "flatout, deterministic", "liger, fp32 sums"):
            for mode in ("forward", "backward", "full"):
                new += timed_rows(name, dims, shape, provider, mode)
    results.save(path, new, results.environment("cpu", {"TFLOPS": 700.0}))
    lines = list(readme.speed_lines(path))
    own = [(line[0], line[2]) for line in lines if "deterministic" in line[0]]
    assert ("`attention`, deterministic", "forward") not in own
    assert ("`attention`, deterministic", "backward") in own
    rates = {line[2]: line[4:7] for line in lines if line[0] == "`linear_cross_entropy`"}
    assert rates["forward"] == rates["backward"] == ["-"] * 3 and rates["full"][0] != "-"
    assert all(line[-1] == "2000 (Liger with fp32 sums)" for line in lines)
    page = readme.every_line(tmp_path)
    assert "k and v are repeated" not in page and page.count("- `linear_cross_entropy`: ") == 1
    assert "cuBLASLt" not in page
    (tmp_path / "gemm.txt").write_text("a GPU\nqkv fwd 747 750 750\n")
    assert "```text\na GPU\nqkv fwd 747 750 750\n```" in readme.every_line(tmp_path)


def test_peers_without_figures_are_named(tmp_path):
    path, new = tmp_path / "ops.csv", []
    for name, providers in {"rms_norm": ["torch", "torch.compile"], "swiglu": ["liger"]}.items():
        for provider in providers:
            new += timed_rows(name, ["T", "H"], (64, 64), provider, "forward")
    results.save(path, new, {})
    found = readme.absent(path, ["rms_norm", "swiglu"])
    missing = "Liger (of rms_norm), QuACK, torch (of swiglu), torch.compile (of swiglu). "
    assert found == readme.ABSENT_TEXT.format("").removesuffix(". ") + missing
    assert "Liger, QuACK" in readme.absent(path, ["rms_norm"])  # of these ops alone
    assert not readme.absent(path, [])


def test_each_figure_names_its_statistic_and_its_time(tmp_path):
    path = tmp_path / "overhead.csv"
    rows = {n: timed_rows(n, ["T", "H"], (1, 64), "flatout", "forward") for n in ("rope", "swiglu")}
    for name, when in (("rope", "2026-11-22 23:59:30"), ("swiglu", "2026-11-23 01:00:30")):
        rows[name] = [row | {"timestamp": when} for row in rows[name]]
    results.save(path, rows["rope"], {})
    results.save(path, rows["swiglu"], overhead.STATISTIC)
    assert readme.statistic(path, ["rope"]) == "median"
    assert readme.statistic(path, ["rope", "swiglu"]) == "rope: median. swiglu: quickest"
    assert readme.measured(path, ["swiglu"]) == "2026-11-23 01:00"
    assert readme.measured(path, ["rope", "swiglu"]) == "2026-11-22 23:59 to 2026-11-23 01:00"


def test_peers_without_a_column_have_one_together():
    found = {"flatout": 1.0, "torch": 3.0, "cuDNN in torch": 1.5, "flash-attn 3": 0.8}
    own = readme.OWN_COLUMN
    assert readme.other_cell(found, own) == "800.0 (flash-attn 3)"
    assert readme.other_cell(found, own, ("flash-attn 3",)) == "800.0 (late) (flash-attn 3)"
    assert readme.other_cell({"flatout": 1.0, "torch": 3.0, timing.COPY: 0.1}, own) == "-"
    calls = {"liger": 0.5, "torch.compile": 0.6, "quack": 0.7}
    assert readme.other_cell(calls, own) == "700.0 (QuACK)"
    assert readme.other_cell(calls, readme.OWN_CALL_COLUMN) == "600.0 (torch.compile)"


def test_where_a_peer_is_ahead():
    times = {"flatout": 1.0, "torch": 0.985, "liger": 0.9, timing.COPY: 0.1}
    loss, shape = "cross_entropy", (8, 512)
    found = {(loss, shape, "bf16", mode): times for mode in ("forward", "backward")}
    assert (
        readme.behind(found) == "`cross_entropy` at 8: forward 11 % (Liger), backward 11 % (Liger)"
    )
    found[loss, shape, "bf16", "full"] = {"flatout": 1.0, "torch": 0.985, "liger": 2.0}
    assert readme.behind(found) == "nowhere"  # less than 2 % is a draw
    own = {"flatout": 1.0, "flatout, stochastic": 0.3, timing.COPY: 0.1}
    found[loss, shape, "bf16", "full"] = own | {"torch, not in fp32": 0.5}
    assert readme.behind(found) == "`cross_entropy` at 8: full 100 % (torch)"
    found[loss, shape, "bf16", "full"] = own | {"cut-cross-entropy": 0.8}
    assert readme.behind(found) == "`cross_entropy` at 8: full 25 % (cut-cross-entropy)"


@pytest.mark.skipif(not (RESULTS / "ops.csv").exists(), reason="no result files")
def test_the_readmes_hold_what_the_result_files_hold():
    pages = readme.pages(RESULTS)
    assert set(pages) == {readme.README, RESULTS / "README.md"}
    for path, text in pages.items():
        assert path.read_text() == text, "make plots, then run_ops.py --readme"
    assert all(len(line) <= 120 for line in readme.README.read_text().splitlines())
