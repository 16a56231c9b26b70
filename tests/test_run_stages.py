"""benchmarks/run_stages.py: whatever becomes of a row is a status, and the files stay valid."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import HANG

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import run_stages  # noqa: E402
from stages import data, model, parity, process, profiling, report, rows, worker  # noqa: E402
from stages import results as files  # noqa: E402
from stages import training as train  # noqa: E402
from stages.display import Plain  # noqa: E402


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """bench(*arguments) -> (exit code, its JSON file): run_stages.py in this process, its rows in
    theirs."""
    monkeypatch.setattr(run_stages, "probe", lambda _: {"device": "cpu", "threads": 2})
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*arguments, out=tmp_path / "out", kind="stages"):
        code = run_stages.main([*arguments, "--out", str(out)])
        return code, json.loads((out / f"{kind}.json").read_text())

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one real run of two rows, three steps each."""
    out = tmp_path_factory.mktemp("trained")
    command = [sys.executable, BENCHMARKS / "run_stages.py", "--out", out, "--steps", "3"]
    command += ["--warmup", "1", "--device", "cpu", "--rows", "00_baseline", "00_sdpa", "00_fa3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_list(capsys):
    assert run_stages.main(["--list"]) == 0
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head == ["row", "attention", "kernels", "loss", "compiled", "needs"]
    assert len(lines) == len(rows.ROWS) == 27
    assert lines[0] == ["00_baseline", "eager", "transformers", "logits", "-", "-"]
    older = [line[0] for line in lines if line[-1] == "--older-liger"]
    assert older == ["03_liger_old_sdpa_compile", "05_liger_old_cce_sdpa_compile"]


def test_unknown_row(capsys):
    with pytest.raises(SystemExit):
        run_stages.main(["--rows", "07_*"])
    assert "no row is called '07_*'" in capsys.readouterr().err


def test_rows_come_in_the_order_asked_for_and_references_first():
    asked = rows.matching(["06_*", "04_flatout_lce", "00_*", "06_flatout_fused"])
    names = [row.name for row in rows.running_order(asked)]
    assert names[:4] == ["00_baseline", "00_sdpa", "06_flatout_fused", "04_flatout_lce"]
    assert len(names) == len(set(names)) == 7
    assert [row.name for row in rows.matching([])] == [row.name for row in rows.ROWS]
    compared = rows.matching([], parity=True)
    assert compared[:3] == rows.PARITY_REFERENCES and all(row.ours for row in compared[3:])
    assert {row.name[:2] for row in compared[3:]} == {f"0{i}" for i in range(7)}


@pytest.mark.slow
def test_files(trained):
    out, printed = trained
    results = json.loads((out / "stages.json").read_text())
    assert results["schema"] == files.SCHEMA and results["environment"]["versions"]["torch"]
    found = results["rows"]
    assert [found[n]["status"] for n in ("00_baseline", "00_sdpa")] == ["Success!"] * 2
    assert len(found["00_sdpa"]["losses"]) == len(found["00_sdpa"]["step_ms"]) == 3
    assert found["00_sdpa"]["losses"][2] < found["00_sdpa"]["losses"][0]
    assert found["00_sdpa"]["loss_difference"] < 1e-4
    assert found["00_fa3"]["status"] == "Skipped" and found["00_fa3"]["reason"] == "needs CUDA"
    assert "Skipped: needs CUDA" in printed and "00_baseline" in printed
    with open(out / "stages.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["Config"] for row in table] == ["00_baseline", "00_fa3", "00_sdpa"]
    assert table[2]["Status"] == "Success!" and table[2]["MFU %"] == "-"
    assert (out / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.part"))


@pytest.mark.slow
def test_resume_and_compare(trained, bench, capsys):
    out, _ = trained
    before = json.loads((out / "stages.json").read_text())
    old = out / "old.json"
    before["rows"]["00_sdpa"]["figures"]["step_ms"] *= 2
    old.write_text(json.dumps(before))
    same = ["--steps", "3", "--warmup", "1", "--resume"]
    code, after = bench(*same, "--rows", "00_[bsf]*", "--compare", str(old), out=out)
    assert code == 0
    for name in ("00_baseline", "00_sdpa"):  # not trained again
        assert after["rows"][name]["step_ms"] == before["rows"][name]["step_ms"]
    printed = capsys.readouterr().out
    assert "[ 1/3] 00_fa2" in printed and "(-50.0 %)" in printed and "only now" in printed
    assert after["rows"]["00_fa3"]["ran"] != before["rows"]["00_fa3"]["ran"]  # tried again
    code, alone = bench(*same, "--rows", "00_fa2", out=out)  # the rows not chosen stay
    assert len(alone["rows"]) == 5 and alone["rows"]["00_sdpa"]["where"]["torch"]
    with pytest.raises(SystemExit, match="made with steps 3, not 4"):
        bench("--steps", "4", "--resume", out=out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant, status, reason",
    [
        ("raise ModuleNotFoundError(name='cut_cross_entropy')", "Skipped", "not installed"),
        ("import os; os.kill(os.getpid(), 9)", "Host OOM", "signal 9"),
        ("raise ZeroDivisionError('planted')", "Failed", "ZeroDivisionError: planted"),
    ],
)
def test_planted(plant, status, reason, bench, monkeypatch, tmp_path):
    package = tmp_path / "site" / "cut_cross_entropy.py"
    package.parent.mkdir()
    package.write_text(plant)
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    code, results = bench("--rows", "05_cce_sdpa_compile")
    row = results["rows"]["05_cce_sdpa_compile"]
    assert (code, row["status"]) == (0, status) and reason in row["reason"]


@pytest.mark.slow
def test_a_folder_given_to_a_worker_comes_before_what_is_installed(tmp_path):
    (tmp_path / "flatout.py").write_text("raise ImportError('planted')")
    started = process.Worker({"probe": "cpu", "site": str(tmp_path)}, subprocess.DEVNULL)
    (seen,) = [event for event in started.events(time.monotonic() + HANG) if event]
    started.kill()
    assert seen["flatout"] == "not usable: planted"


def test_timeout(bench, tmp_path, capsys):
    _, results = bench("--rows", "00_baseline", "--timeout", "0.3")
    row = results["rows"]["00_baseline"]
    assert row["status"] == "Timeout" and row["reason"] == "not done after 0.3 s"
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("tiny, 60 steps, 5 of them warm-up, fp32 on cpu (")
    assert first.endswith(f"); results go to {tmp_path / 'out'}")
    assert last.startswith(f"results in {tmp_path / 'out'}")


def test_the_line_of_a_row_that_ran(capsys):
    figures = dict.fromkeys(["mfu", "tflops", "iqr_ms", "tokens_per_s", "first_loss", "last_loss",
                             "compile_s", "first_step_s"]) | {"step_ms": 309.0}  # fmt: skip
    ran = record("00_sdpa", [9.0, 8.0], figures=figures, peak_gib=70.111, runtime_s=10.6)
    Plain(1).end({}, ran)
    told = "Success!; 309.0 ms a step, 70.11 GiB, all steps 10.6 s, loss 9.000 -> 8.000"
    assert capsys.readouterr().out.strip() == told


def test_no_seconds_left(bench, tmp_path, capsys):
    with pytest.raises(FileNotFoundError):  # nothing ran: no file
        bench("--rows", "00_baseline", "--seconds", "1")
    assert "00_baseline and later rows: not run" in capsys.readouterr().out


def text_of(path):
    try:
        return path.read_text()
    except OSError:  # a process that has just ended
        return ""


@pytest.mark.slow
def test_interrupt(tmp_path):
    command = [sys.executable, BENCHMARKS / "run_stages.py", "--out", tmp_path, "--device", "cpu"]
    command += ["--rows", "00_fa2", "00_fa3", "00_flatout"]
    env = {**os.environ, "TMPDIR": str(tmp_path)}  # so that the worker's arguments name it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("[ 2/3]"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(HANG) == 130 and "interrupted" in rest
    results = json.loads((tmp_path / "stages.json").read_text())
    assert list(results["rows"]) == ["00_fa2"] and (tmp_path / "stages.csv").exists()
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in text_of(p)]
    assert not list(tmp_path.glob("flatout-bench-*"))


def test_classify():
    from torch._dynamo.exc import Unsupported

    def of(error, cause=None):
        error.__cause__ = cause
        return worker.classify(error)[0]

    assert of(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "CUDA OOM"
    assert of(Unsupported("graph break")) == "Compile Issue"
    assert of(Unsupported("inner"), torch.OutOfMemoryError("x")) == "CUDA OOM"
    assert of(RuntimeError("DefaultCPUAllocator: can't allocate memory")) == "Host OOM"
    assert of(RuntimeError("boom"), Unsupported("why")) == "Compile Issue"
    assert of(model.Skip("needs CUDA")) == "Skipped"
    assert worker.classify(ValueError("first\nsecond")) == ("Failed", "ValueError: first")
    with pytest.raises(model.Skip, match="no_such_package not installed"):
        model.require("no_such_package.part")


def record(name, losses, **more):
    return {"row": name, "status": "Success!", "reason": "", "losses": losses, **more}


@pytest.mark.parametrize("wrong", [4.11, 3.9, float("nan"), float("inf")])
def test_a_loss_off_the_reference_is_a_status(wrong):
    records = {
        "00_baseline": record("00_baseline", [5.0, 4.0]),
        "00_sdpa": record("00_sdpa", [5.0, 4.05]),
        "02_flatout": record("02_flatout", [5.0, wrong]),
    }
    report.judge(records)
    assert records["00_sdpa"]["status"] == "Success!"
    assert records["02_flatout"]["status"] == "Loss off"
    assert records["02_flatout"]["reason"].startswith("step 1")
    records["00_baseline"]["status"] = "CUDA OOM"  # then 00_sdpa is the reference
    records["02_flatout"]["losses"] = [5.0, 4.05]
    report.judge(records)
    assert records["02_flatout"]["status"] == "Success!"
    assert records["02_flatout"]["reference"] == "00_sdpa"


def test_a_parity_run_has_another_judge(tmp_path):
    """Its references themselves part by more than the tolerance of one run."""
    losses = {"00_sdpa": [5.0, 4.0], "ulp1_sdpa": [5.0, 4.2], "02_flatout": [5.0, float("nan")]}
    results = {"kind": "parity", "settings": {}, "environment": {}}
    results["rows"] = {n: record(n, kept, figures=None) for n, kept in losses.items()}
    settings = dict(preset="tiny", warmup=2, batch=1, seq=8, config={})
    report.finish(results | {"settings": settings}, tmp_path / "parity.json")
    states = {n: r["status"] for n, r in results["rows"].items()}
    assert states == {"00_sdpa": "Success!", "ulp1_sdpa": "Success!", "02_flatout": "Loss off"}


def test_figures_of_the_setting_of_record():
    """Qwen3-8B at 314.0 ms a step of 2048 tokens is 344.4 TFLOPS and an MFU of 34.8 %."""
    preset = rows.PRESETS["qwen3-8b"]
    built = model.build(preset.config, "eager", "meta", torch.bfloat16, 0)
    parameters = sum(p.numel() for p in built.parameters())
    assert parameters == 8190735360
    settings = dict(warmup=2, batch=1, seq=2048, config=preset.config)
    one = record("00_sdpa", [1.0], parameters=parameters, step_ms=[9e3, 9e3] + [314.0] * 12)
    figures = report.summarize(one, settings, {"gpu": "NVIDIA H100 80GB HBM3"})
    assert figures["step_ms"] == 314.0 and figures["iqr_ms"] == 0
    assert round(figures["mfu"], 1) == 34.8 and abs(figures["tflops"] - 344.4) < 0.5
    assert figures["compile_s"] is None and figures["last_loss"] == 1.0
    short = report.summarize({**one, "status": "CUDA OOM"}, settings, {})  # of a loss amid the run
    assert short["first_loss"] == 1.0 and short["last_loss"] is None
    compiled = report.summarize({**one, "row": "01_sdpa_compile"}, settings, {})
    assert compiled["mfu"] is None and compiled["compile_s"] == pytest.approx(17.372)


def test_a_row_whose_ops_are_not_active_fails():
    hf = pytest.importorskip("flatout.hf")
    config = {**rows.PRESETS["tiny"].config, "num_hidden_layers": 1}
    built = model.build(config, "sdpa", "cpu", torch.float32, 0)
    hf.patch(built, linear_cross_entropy=False)
    assert "rms_norm" in model.active_ops(rows.BY_NAME["02_flatout"], built)
    with pytest.raises(RuntimeError, match="linear_cross_entropy is not active in the model"):
        model.active_ops(rows.BY_NAME["04_flatout_lce"], built)
    hf.patch(built)
    with pytest.raises(RuntimeError, match="(embedding|fused layer) is not active in model"):
        model.active_ops(rows.BY_NAME["06_flatout_fused"], built)
    assert model.active_ops(rows.BY_NAME["00_sdpa"], built) is None
    del built.model.layers[0].mlp  # no module that could run the row's swiglu
    with pytest.raises(RuntimeError, match="swiglu is not active"):
        model.active_ops(rows.BY_NAME["02_flatout"], built)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nudge_moves_every_weight_by_one_unit_in_the_last_place(dtype):
    layer = torch.nn.Linear(64, 64).to(dtype)
    layer.bias.data[:32] = 0
    before = [p.detach().clone() for p in layer.parameters()]
    model.nudge(layer, 1)
    for was, now in zip(before, layer.parameters(), strict=True):
        up, down = (torch.nextafter(was, was + sign) for sign in (1, -1))
        moved = (now == up) | (now == down)
        assert torch.equal(moved, was != 0) and torch.equal(now[was == 0], was[was == 0])
    weight = layer.weight.detach()
    assert 0.4 < (weight > before[0]).double().mean() < 0.6
    again = torch.nn.Linear(64, 64).to(dtype)
    again.load_state_dict(dict(zip(("weight", "bias"), before, strict=True)))
    model.nudge(again, 2)
    assert 0.3 < (again.weight != weight).double().mean() < 0.7


def test_data(tmp_path):
    tokens = data.batches(None, "bytes", 512, 3, 4, 256, seed=0)
    assert tokens.shape == (3, 4, 256) and 0 <= tokens.min() and tokens.max() < 256
    assert data.digest(tokens) == data.digest(data.batches(None, "bytes", 512, 3, 4, 256, seed=0))
    assert data.digest(tokens) != data.digest(data.batches(None, "bytes", 512, 3, 4, 256, seed=1))
    words = data.batches(None, "words", 151936, 1, 1, 2048, seed=0)
    assert words.max() > 140000 and words.min() < 12000
    text = tmp_path / "text.txt"
    text.write_text("abc")
    assert (data.batches(str(text), "bytes", 512, 1, 1, 3, seed=0)[0, 0] == [97, 98, 99]).all()
    with pytest.raises(ValueError, match="3 tokens, fewer than one row of 4"):
        data.batches(str(text), "bytes", 512, 1, 1, 4, seed=0)


def test_schedule():
    rates = [train.schedule(step, 50, 5) / train.LR for step in range(50)]
    assert rates[0] == 0.2 and rates[4:40] == [1.0] * 36 and rates[-1] == pytest.approx(0.1)
    assert train.schedule(9, 30, 200) == pytest.approx(train.LR / 20)  # a run that ends before


@pytest.mark.slow
def test_parity(bench, tmp_path, capsys):
    short = ["--parity", "--steps", "3", "--warmup", "1", "--dtype", "bf16", "--rows"]
    _, results = bench(*short, "00_sdpa", "ulp*", "02_flatout", kind="parity")
    assert {r["status"] for r in results["rows"].values()} == {"Success!"}
    first = [results["rows"][name]["losses"][0] for name in parity.NAMES]
    assert len(set(first)) == 3  # the weights did differ
    found = results["rows"]["02_flatout"]["parity"]
    assert found["worst"] >= 0 and "02_flatout" in capsys.readouterr().out.split("within")[1]
    assert (tmp_path / "out" / "parity.png").read_bytes().startswith(b"\x89PNG")
    del results["rows"]["ulp1_sdpa"]
    assert "must all have run" in parity.judge(results)


@pytest.mark.slow
def test_profile(bench, capsys):
    _, results = bench("--profile", "00_sdpa", "--warmup", "1", kind="profile")
    row = results["rows"]["00_sdpa"]
    assert row["timed_steps"] == 1 + profiling.STEPS == len(row["step_ms"]) - profiling.STEPS
    assert row["figures"]["step_ms"] == np.median(row["step_ms"][1 : 1 + profiling.STEPS])
    assert 0.2 < row["profile"]["busy_ms"] / row["figures"]["step_ms"] < 5
    assert row["profile"]["groups"]["gemm"] > 0 and "idle" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.slow
def test_flatout_compiles_with_cuda_graphs(tmp_path):
    """fullgraph, max-autotune: one graph for all layers, no break, recorded as CUDA graphs (one
    forward and one backward a layer), no recompilation after warm-up, the reference's losses."""
    names = ["01_flatout_kernelize_compile", "03_flatout_compile", "05_flatout_lce_compile"]
    command = [sys.executable, BENCHMARKS / "run_stages.py", "--out", tmp_path, "--device", "cuda"]
    command += ["--preset", "tiny", "--steps", "8", "--warmup", "4", "--rows", "00_sdpa", *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "stages.json").read_text())["rows"]
    layers = rows.PRESETS["tiny"].config["num_hidden_layers"]
    for name in names if model.version("kernels") else names[1:]:
        row = found[name]
        assert (row["status"], row["reason"]) == ("Success!", ""), done.stdout
        assert row["compiler"]["graphs"] == 1 and row["compiler"]["cuda_graphs"] >= 2 * layers
        assert row["compiler"]["cudagraph_skips"] == row["compiler"]["recompiles"] == 0
