"""benchmarks/run_ops.py: the table of overheads, one op beside its peers, the CSV."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import run_ops  # noqa: E402
from ops import overhead, table  # noqa: E402


def test_overhead(capsys, monkeypatch, threads):
    monkeypatch.setattr(overhead, "CALLS", 5)
    monkeypatch.setattr(overhead, "BATCHES", 3)
    assert run_ops.main(["--overhead", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and lines[0].split()[-5:] == ["us", "median", "us", "at", "most"]
    figures = [line[40:].split() for line in lines[1:]]
    assert all(0 < float(best) <= float(median) for best, median, *_ in figures)


def run(tmp_path, *arguments):
    path = tmp_path / "ops.csv"
    run_ops.main([*arguments, "--device", "cpu", "--seconds", "0.01", "--csv", str(path)])
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_one_op(tmp_path, capsys):
    arguments = ["--op", "rms_norm", "--shape", "7x64", "--providers", "torch", "liger", "flatout"]
    rows = run(tmp_path, *arguments)
    assert list(rows[0]) == run_ops.LIGER_COLUMNS
    assert {(r["kernel_provider"], r["kernel_operation_mode"]) for r in rows} == {
        (p, m) for p in ("torch", "flatout") for m in ("forward", "backward", "full")
    }
    assert all(float(r["y_value_20"]) <= float(r["y_value_50"]) for r in rows)
    printed = capsys.readouterr().out
    assert "skipped: " in printed and "> 2" not in printed
    again = run(tmp_path, *arguments)  # measured again: replaced, not added
    assert len(again) == len(rows)


def test_attention_prints_tflops(tmp_path, capsys):
    run(tmp_path, "--op", "attention", "--shape", "16x1x4x2x16", "--providers", "torch")
    assert "TFLOPS" in capsys.readouterr().out


def test_a_wrong_result_is_marked(tmp_path, capsys, monkeypatch):
    wrong = table.Op(
        "T H", [(8, 64)], [], lambda T, H: [table.grad(T, H)],
        lambda x: x * 3, lambda ft, x: x * 3.001, moved=lambda T, H: (T * H, T * H),
    )  # fmt: skip
    monkeypatch.setitem(run_ops.OPS, "rms_norm", wrong)
    run(tmp_path, "--op", "rms_norm", "--providers", "torch", "flatout")
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  flatout")]
    assert len(lines) == 3 and all(line.endswith("> 2") for line in lines)


@pytest.mark.parametrize("name", table.OPS)
def test_every_op_has_what_it_needs(name):
    op = table.OPS[name]
    inputs = op.inputs(*op.cpu[0])
    assert len(op.cpu[0]) == len(op.cuda[0]) == len(op.dims.split())
    assert any(x.requires_grad for x in inputs) and (op.moved or op.flops)
    exact = run_ops.placed(inputs, "cpu", torch.float64)
    outputs = run_ops.differentiate(op, lambda xs: op.torch(*xs), exact)
    assert all(torch.isfinite(x).all() for x in outputs)
