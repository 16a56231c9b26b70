"""Do the losses part by more than rounding? (--parity)

The reference trains three times, from weights that differ by one unit in the last place, which is
all that a bf16 number can tell apart. How far those curves lie from each other is what rounding
alone does to a loss; a row must lie no farther from the nearest of them. Of curves that differ by
rounding alone one in ten leaves that span at a step or two of 200, and a few in a thousand by half
of its width: INSIDE and FARTHEST leave room for that."""

import math

import numpy as np

from stages.report import ordered, save_figure, text_table
from stages.results import RAN
from stages.rows import PARITY_REFERENCES

WINDOW = 10  # steps to both sides over which the references' largest distance counts
INSIDE = 0.98  # of the steps must lie within the spread
FARTHEST = 2.0  # spreads, at every step
NAMES = [row.name for row in PARITY_REFERENCES]


def spread(references):
    """(rows, steps) -> (steps,): the largest distance of two of them within WINDOW steps."""
    apart = np.ptp(references, axis=0)
    padded = np.pad(apart, WINDOW, mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * WINDOW + 1).max(axis=1)


def verdict(losses, references):
    """How a loss curve (steps,) lies to the references (rows, steps).

    inside: the share of the steps at which it lies within their spread; worst: its largest
    distance from the nearest of them, as a share of their spread there; step: where; bias: its
    mean distance, signed, from their mean; noise: the largest of theirs, unsigned."""
    share = np.abs(references - losses).min(axis=0) / np.maximum(spread(references), 1e-12)
    share = np.where(np.isfinite(losses), share, math.inf)
    mean = references.mean(axis=0)
    away = (references - mean).mean(axis=1)
    return {
        "within": bool((share <= 1).mean() >= INSIDE and share.max() <= FARTHEST),
        "inside": float((share <= 1).mean()), "worst": float(share.max()),
        "step": int(share.argmax()),
        "bias": float((losses - mean).mean()), "noise": float(np.abs(away).max()),
    }  # fmt: skip


def references_of(results):
    """(rows, steps) of the reference's losses, or None while one of them is missing."""
    found = [results["rows"].get(name, {}) for name in NAMES]
    if not all(record.get("status") in RAN for record in found):
        return None
    return np.array([record["losses"] for record in found])


def compared(results):
    return [r for r in ordered(results["rows"]) if r["row"] not in NAMES and r["status"] in RAN]


def judged(results):
    return [record for record in compared(results) if "parity" in record]


def judge(results):
    """Give every row its verdict; returns a note where there is none."""
    references = references_of(results)
    if references is None:
        return f"no verdict: {', '.join(NAMES)} must all have run"
    for record in compared(results):
        record["parity"] = verdict(np.array(record["losses"]), references)
    return None


def cells(record):
    p = record["parity"]
    within = "yes" if p["within"] else "NO"
    return [
        record["row"], within, f"{100 * p['inside']:.1f} %", f"{p['worst']:.2f}", str(p["step"]),
        f"{p['bias']:+.1e}", f"{p['noise']:.1e}",
    ]  # fmt: skip


def table(results):
    head = ["Config", "within", "of the steps", "worst", "at step", "bias", "references' own"]
    return text_table([head, *map(cells, judged(results))])


def plot(results, path):
    """All curves, and their distance from the references' mean with the spread around it; returns
    a note when it cannot be drawn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no plot: matplotlib not installed"
    references = references_of(results)
    if references is None:
        return "no plot: the references have not run"
    steps, mean, wide = np.arange(references.shape[1]), references.mean(axis=0), spread(references)
    figure, (curves, apart) = plt.subplots(1, 2, figsize=(16, 6))
    low, high = references.min(axis=0) - mean - wide, references.max(axis=0) - mean + wide
    apart.fill_between(steps, low, high, color="0.9", label="spread of the references")
    for name, losses in zip(NAMES, references, strict=True):
        curves.plot(losses, color="0.5", linewidth=2, label=name)
        apart.plot(losses - mean, color="0.5", linewidth=1)
    for record in compared(results):
        curves.plot(record["losses"], linewidth=0.8, label=record["row"])
        apart.plot(np.array(record["losses"]) - mean, linewidth=0.8, label=record["row"])
    curves.set_ylabel("loss")
    apart.set_ylabel("loss - mean of the references")
    for axis in (curves, apart):
        axis.set_xlabel("step")
        axis.legend(fontsize=7)
    setting = results["settings"]
    figure.suptitle(
        f"{setting['preset']}, {setting['batch']} x {setting['seq']} tokens, {setting['dtype']}: "
        "references' first weights differ by one unit in the last place"
    )
    save_figure(figure, path)
    return None
