"""What is kept and shown of the rows: figures, loss check, table, CSV, chart, comparison."""

import csv
import math
import statistics

from stages.results import PARITY, PROFILE, RAN, save, write_atomically
from stages.rows import ALL, BY_NAME, PEAKS, PUBLISHED, REFERENCES

TOLERANCE = 0.02  # of the reference's loss, at every step
GROSS = 1.0  # the same of a parity run, which the spread of its references judges (parity.py)
SETTINGS = "preset steps warmup lr_warmup batch seq dtype seed data".split()  # that decide results
WIDTH = 72  # of a status in the table; the JSON and CSV files have every reason in full
COLUMNS = [
    "Config", "Status", "MFU %", "TFLOPS", "Mem(GB)", "Runtime(s)", "step ms", "IQR ms", "tokens/s",
    "allocated", "first loss", "last loss", "compile s", "first step s",
]  # fmt: skip
NOTE = """Mem(GB), so called in the public matrix, and allocated: GiB at the peak. Runtime(s): all
steps, warm-up and compilation included, without what comes before the first."""
COMPILER = {  # what a compiled row should have none of -> how its reason names it
    "graph_breaks": "graph breaks",
    "recompiles": "recompilations after warm-up",
    "cudagraph_skips": "CUDA graphs skipped",
}


def peak_tflops(environment):
    """The device's dense bf16 peak, or None on a CPU or an unknown GPU."""
    name = environment.get("gpu") or ""
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(parameters, config, seq):
    """6 N + 12 L H S: the formula of the matrix, causal attention counted in full."""
    return 6 * parameters + 12 * config["num_hidden_layers"] * config["hidden_size"] * seq


def summarize(record, settings, environment):
    """The figures of one row from its raw step times and losses; None where there is none."""
    steps, losses = record.get("step_ms", []), record.get("losses", [])
    profiled = len(steps) - record.get("timed_steps", len(steps))  # the profiler slowed these
    timed = steps[settings["warmup"] : len(steps) - profiled]
    out = dict.fromkeys(
        ("mfu", "tflops", "tokens_per_s", "step_ms", "iqr_ms", "compile_s", "first_loss",
         "first_step_s")
    )  # fmt: skip
    out["last_loss"] = losses[-1] if losses and record["status"] in RAN else None
    out["first_loss"] = losses[0] if losses else None
    if record.get("first_step_s") is not None:  # since the process began, model creation aside
        out["first_step_s"] = record["first_step_s"] - record.get("model_s", 0.0)
    if record["status"] not in RAN or not timed:
        return out
    out["step_ms"] = statistics.median(timed)
    quartiles = statistics.quantiles(timed, n=4) if len(timed) > 1 else [timed[0]] * 3
    out["iqr_ms"] = quartiles[2] - quartiles[0]
    width = min(10, len(timed))
    best = min(sum(timed[i : i + width]) for i in range(len(timed) - width + 1)) / width
    out["tokens_per_s"] = 1e3 * settings["batch"] * settings["seq"] / best
    work = flops_per_token(record["parameters"], settings["config"], settings["seq"])
    out["tflops"] = work * out["tokens_per_s"] / 1e12
    peak = peak_tflops(environment)
    out["mfu"] = 100 * out["tflops"] / peak if peak else None
    if BY_NAME[record["row"]].compile:  # what the first steps took beyond a usual one
        early = steps[: settings["warmup"]]
        out["compile_s"] = sum(max(0.0, ms - out["step_ms"]) for ms in early) / 1e3
    return out


def judge(records, tolerance=TOLERANCE):
    """Set every row's largest distance from the reference curve, and the status it earns."""
    name = next((n for n in REFERENCES if n in records and records[n]["status"] in RAN), None)
    for record in records.values():
        record["reference"], record["loss_difference"] = name, None
        if record["status"] not in RAN or name is None:
            continue
        pairs = zip(record["losses"], records[name]["losses"], strict=True)
        apart = [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs]
        worst = max(range(len(apart)), key=apart.__getitem__)
        record["loss_difference"] = apart[worst]
        off = not apart[worst] <= tolerance or not record.get("parity", {}).get("within", True)
        record["status"] = "Loss off" if off else "Success!"
        record["reason"] = f"step {worst}: {100 * apart[worst]:.1f} % from {name}'s" if off else ""
    for record in records.values():
        if record["status"] == "Success!":
            record["reason"] = compiler_note(record)


def compiler_note(record):
    """What went wrong in a compiled row that ran all the same."""
    if not BY_NAME[record["row"]].compile:
        return ""
    found = record.get("compiler", {})
    return ", ".join(f"{found[key]} {name}" for key, name in COMPILER.items() if found.get(key))


def number(value, digits=1):
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if abs(value) >= 1 else f"{value:.3g}"


def cached(record):
    """A remark on the seconds of a row that found a part of what it compiles in Inductor's cache,
    which the rows of a run share."""
    return " (part cached)" if record.get("compiler", {}).get("cache_hits") else ""


def cells(record):
    """One row of the table, as text in the order of COLUMNS."""
    figures = record["figures"]
    status = record["status"] + (f": {record['reason']}" if record["reason"] else "")
    status = status if len(status) <= WIDTH else status[: WIDTH - 3] + "..."
    compiled = number(figures["compile_s"]) + cached(record)
    return [
        record["row"], status, number(figures["mfu"]), number(figures["tflops"], 2),
        number(record.get("peak_gib"), 2), number(record.get("runtime_s")),
        number(figures["step_ms"]), number(figures["iqr_ms"]), number(figures["tokens_per_s"], 0),
        number(record.get("allocated_gib"), 2),
        number(figures["first_loss"], 3), number(figures["last_loss"], 3), compiled,
        number(figures["first_step_s"]),
    ]  # fmt: skip


def published(name):
    """The public matrix's figures of this row, as text."""
    value = PUBLISHED.get(name, "-")
    return value if isinstance(value, str) else f"{value[0]} %, {value[1]} GB"


def shows_published(settings, environment):
    return settings["preset"] == "qwen3-8b" and "H100" in (environment.get("gpu") or "")


def ordered(records):
    return [records[row.name] for row in ALL if row.name in records]


def text_table(rows):
    """Rows of cells (the first is the head) in aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def table(results):
    """Every row so far, as plain text."""
    head, rows = list(COLUMNS), [cells(r) for r in ordered(results["rows"])]
    if shows_published(results["settings"], results["environment"]):
        head.append("published")
        rows = [[*row, published(row[0])] for row in rows]
    return text_table([head, *rows])


def write_csv(results, file):
    out = csv.writer(file)
    compiler = ("graphs", "graph_breaks", "recompiles", "cuda_graphs", "cudagraph_skips")
    starting = ("import_s", "context_s", "model_s", "patch_s")
    extra = ["reason", "attention", "packages", "loss difference", *compiler, *starting]
    beside = shows_published(results["settings"], results["environment"])
    out.writerow([*COLUMNS, *extra, *(["published"] if beside else [])])
    for record in ordered(results["rows"]):
        extra = [record["reason"], record.get("attention", ""), peers(record)]
        extra.append(record["loss_difference"])
        extra += [record.get("compiler", {}).get(key, "") for key in compiler]
        extra += [record.get(key, "") for key in starting]
        row = [record["row"], record["status"], *cells(record)[2:]]
        out.writerow([*row, *extra, *([published(record["row"])] if beside else [])])


def peers(record):
    """The packages of a row and their versions, as text."""
    return ", ".join(f"{name} {version}" for name, version in record.get("packages", {}).items())


def finish(results, path):
    """Check every loss curve, work out every row's figures, write the JSON and the CSV file."""
    judge(results["rows"], GROSS if results["kind"] == PARITY else TOLERANCE)
    for record in results["rows"].values():
        settings, where = results["settings"], record.get("where", results["environment"])
        record["figures"] = summarize(record, settings, where)
    save(results, path)
    if results["kind"] != PROFILE:
        write_atomically(path.with_suffix(".csv"), lambda file: write_csv(results, file))


def save_figure(figure, path):
    from matplotlib import pyplot

    figure.tight_layout()
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format="png"), "wb")
    pyplot.close(figure)


def chart(results, path):
    """Step time, memory and loss of every row that ran; returns a note when it cannot be drawn."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no chart: matplotlib not installed"
    records = [r for r in ordered(results["rows"]) if r["status"] in RAN]
    if not records:
        return "no chart: no row ran"
    names = [r["row"] for r in records]
    colors = ["tab:green" if BY_NAME[n].ours else "tab:gray" for n in names]
    figure, (time, mem, loss) = plt.subplots(1, 3, figsize=(18, 2 + 0.3 * len(names)))
    spread = [r["figures"]["iqr_ms"] / 2 for r in records]
    time.barh(names, [r["figures"]["step_ms"] for r in records], xerr=spread, color=colors)
    time.set_xlabel("step, ms (median, IQR)")
    mem.barh(names, [r["peak_gib"] for r in records], color=colors)
    mem.set_xlabel("peak memory, GiB")
    mem.set_yticklabels([])
    for axis in (time, mem):
        axis.invert_yaxis()
    for record in records:
        loss.plot(record["losses"], label=record["row"], linewidth=1)
    loss.set_xlabel("step")
    loss.set_ylabel("loss")
    loss.legend(fontsize=6)
    setting = results["settings"]
    device = results["environment"].get("gpu") or results["environment"]["cpu"]
    figure.suptitle(f"{setting['preset']}, {setting['batch']} x {setting['seq']} tokens, {device}")
    save_figure(figure, path)
    return None


def change(old, new):
    if old is None or new is None:
        return "-"
    return f"{number(old)} -> {number(new)}" + (f" ({100 * (new / old - 1):+.1f} %)" if old else "")


def comparison(old, new):
    """An earlier run's rows beside this run's, as text; its first lines say what else differs."""
    notes = [
        f"note: {key} differs: {old[part].get(key)} then, {new[part].get(key)} now"
        for part, keys in (
            ("settings", SETTINGS),
            ("environment", ("cpu", "gpu", "power_limit", "torch", "transformers", "threads")),
        )
        for key in keys
        if old[part].get(key) != new[part].get(key)
    ]
    rows = [["Config", "Status", "step ms", "GiB", "last loss"]]
    for record in ordered({**old["rows"], **new["rows"]}):
        name = record["row"]
        a, b = old["rows"].get(name), new["rows"].get(name)
        if a is None or b is None:
            rows.append([name, "only then" if b is None else "only now", "-", "-", "-"])
            continue
        status = b["status"] if a["status"] == b["status"] else f"{a['status']} -> {b['status']}"
        row = [change(a["figures"][key], b["figures"][key]) for key in ("step_ms", "last_loss")]
        rows.append([name, status, row[0], change(a.get("peak_gib"), b.get("peak_gib")), row[1]])
    return "\n".join([*notes, text_table(rows)])
