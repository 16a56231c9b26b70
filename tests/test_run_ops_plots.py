"""benchmarks/run_ops.py: plots over sizes, and the result files that are in the repository."""

import json

import pytest
import test_run_ops as ops_tests  # puts benchmarks/ on the path
from test_run_ops import RESULTS, made_up_results, rows_of

from ops import plots, readme, results, timing  # isort: skip

run_ops = ops_tests.run_ops


def curve_of(axis, label):
    line = next(c for c in axis.containers if c.get_label() == label)[0]
    return [(int(x), float(y)) for x, y in line.get_xydata()]


def test_plots_from_the_result_files(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from PIL import Image

    folder = tmp_path / "results"
    made_up_results(folder, monkeypatch)
    metrics = results.timing_metrics(timing.Timing(0.04, 0.02, 0.08, None, 640.0), 1.0)
    args = "rms_norm", ["T", "H"], (8192, 4096), "bf16", "cpu", "flatout", "forward"
    results.save(folder / "sweep.csv", results.rows(*args, metrics),
                 results.environment("cpu", {"TB/s": 3.5}))  # fmt: skip
    run_ops.main(["--plots", str(folder)])
    names = sorted(path.stem for path in (folder / "plots").iterdir())
    assert names == ["adamw", "rms_norm"]
    for name in names:
        with Image.open(folder / "plots" / f"{name}.png") as image:
            assert image.width > 400 and len(image.convert("L").getcolors()) > 20
    found = plots.curves(folder)
    key = plots.chosen(found)["rms_norm"]
    assert key == ("rms_norm", "bf16", (4096,))
    figure = plots.figure_of(key, found[key], {"TB/s": 3.5})
    forward, backward, memory, _ = figure.axes
    assert (forward.get_title(), backward.get_title()) == ("forward", "backward")
    moved = 2 * 4096 * 2  # bytes a token
    assert dict(curve_of(forward, "flatout")) == pytest.approx({
        2048: moved * 2048 / 0.0125e9, 8192: moved * 8192 / 0.04e9,
        16384: moved * 16384 / 0.1e9})  # fmt: skip
    assert curve_of(memory, "flatout") == [(8192, 640.0)]
    ceiling = [line for line in forward.get_lines() if set(line.get_ydata()) == {3.5}]
    assert len(ceiling) == 1
    again = (folder / "plots" / "rms_norm.png").read_bytes()
    plots.draw(folder)
    assert (folder / "plots" / "rms_norm.png").read_bytes() == again
    assert "![rms_norm](plots/rms_norm.png)" in readme.every_line(folder)


def test_of_a_loss_both_passes_are_drawn_together():
    panels = {(mode, "speed"): {} for mode in ("forward", "backward", "full")}
    assert plots.modes_of("linear_cross_entropy", panels) == ["full"]
    assert plots.modes_of("attention", panels) == ["forward", "backward", "full"]


COMMITTED = sorted(RESULTS.parent.glob("*/ops.csv")) + sorted(RESULTS.parent.glob("*/sweep.csv"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_committed_results_are_in_ligers_format(path):
    rows = rows_of(path)
    assert list(rows[0]) == results.COLUMNS
    assert len({tuple(r[k] for k in results.KEY) for r in rows}) == len(rows)
    units = {"speed": "ms", "memory": "MB"}
    for row in rows:
        low, median, high = (float(row[f"y_value_{q}"]) for q in (20, 50, 80))
        assert 0 <= low <= median <= high
        assert int(row["x_value"]) > 0 and json.loads(row["extra_benchmark_config_str"])["dtype"]
        assert row["kernel_operation_mode"] in ("forward", "backward", "full", "step")
        assert units.get(row["metric_name"], row["metric_unit"]) == row["metric_unit"]


@pytest.mark.parametrize("folder", {p.parent for p in COMMITTED}, ids=lambda p: p.name)
def test_committed_plots_are_of_the_committed_results(folder):
    drawn = {path.stem for path in (folder / "plots").glob("*.png")}
    assert drawn == set(plots.chosen(plots.curves(folder))), "make plots"
