"""The stage matrix: train one Qwen3 in many ways, each in a process of its own, and compare.

    python benchmarks/run_stages.py                      # tiny on a CPU, qwen3-8b on a GPU
    python benchmarks/run_stages.py --list
    python benchmarks/run_stages.py --rows 06_flatout_fused '00_*' --steps 20 --seconds 300
    python benchmarks/run_stages.py --resume --compare old/stages.json
    python benchmarks/run_stages.py --profile 04_flatout_lce      # where a step's time goes
    python benchmarks/run_stages.py --parity             # do the losses part by rounding alone?
    python benchmarks/run_stages.py --merge a/stages.json b/stages.json --out both
    python benchmarks/run_stages.py --readme benchmarks/results/h100

Into --out go stages.json (settings, environment, raw step times and losses), .csv, .png, and one
log per row; stages_expandable, profile and parity in place of stages with those options. Every row
that cannot run says why in its status. GIT_COMMIT names the sources outside a git checkout.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
from stages import data, machine, parity, profiling, readme, report
from stages import results as files
from stages.display import display
from stages.process import probe, run_row
from stages.rows import PRESETS, matching, running_order

HERE = Path(__file__).resolve().parent
PARITY_STEPS = 200
LEAST_S = 20  # a row is not begun with less of --seconds left


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="default: tiny on a CPU, qwen3-8b on a GPU")
    p.add_argument("--rows", nargs="+", default=[], metavar="GLOB", help="default: all")
    p.add_argument("--steps", type=int, help="training steps of each row")
    p.add_argument("--warmup", type=int, help="leading steps that no timing counts")
    p.add_argument("--data", metavar="FILE|random", help="default: the standard library's sources")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--resume", action="store_true", help="keep the rows that --out has")
    p.add_argument("--compare", metavar="OLD.json", type=Path, help="print changes since that run")
    p.add_argument("--out", type=Path, default=Path("runs/stages"))
    p.add_argument("--timeout", type=float, help="seconds a row may take")
    p.add_argument("--seconds", type=float, help="seconds all rows may take; --resume goes on")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32 on a CPU, else bf16")
    p.add_argument("--expandable-segments", action="store_true", help="of the GPU's allocator")
    p.add_argument(
        "--older-liger", metavar="FOLDER", type=Path, help="Liger 0.8.2, installed there"
    )
    p.add_argument("--profile", nargs="+", metavar="GLOB", help="rows, kernel by kernel")
    p.add_argument("--parity", action="store_true", help=f"losses over {PARITY_STEPS} steps")
    p.add_argument("--merge", nargs="+", metavar="FILE", type=Path, help="one run of several; stop")
    p.add_argument("--readme", metavar="FOLDER", type=Path, help="write its tables and stop")
    return p


def parse(argv):
    p = arguments()
    args = p.parse_args(argv)
    try:
        args.rows = matching(args.profile or args.rows, args.parity)
        args.old = json.loads(args.compare.read_text()) if args.compare else None
        if args.data not in (None, "random") and not Path(args.data).is_file():
            raise ValueError(f"--data: no file {args.data}")
        if args.steps is not None and args.steps < 1:
            raise ValueError(f"--steps: expected 1 or more, got {args.steps}")
        if args.profile and args.parity:
            raise ValueError("--profile and --parity are different runs")
        if not (args.list or args.readme):
            args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        p.error(str(error))
    return args


def kind_of(args):
    if args.profile or args.parity:
        return files.PROFILE if args.profile else files.PARITY
    return files.EXPANDABLE if args.expandable_segments else files.STAGES


def settings_of(args, info):
    """What two runs must share for their rows to stand in one table."""
    name = args.preset or ("tiny" if info["device"] == "cpu" else "qwen3-8b")
    preset = PRESETS[name]
    warmup = preset.warmup if args.warmup is None else args.warmup
    default = {files.PROFILE: warmup + 2 * profiling.STEPS, files.PARITY: PARITY_STEPS}
    steps = default.get(kind_of(args), preset.steps) if args.steps is None else args.steps
    if args.profile and steps < warmup + profiling.STEPS + 1:
        sys.exit(f"--steps: --profile needs {warmup + profiling.STEPS + 1} or more, got {steps}")
    return preset, {
        "preset": name, "config": preset.config, "batch": preset.batch, "seq": preset.seq,
        "steps": steps, "warmup": min(warmup, steps - 1), "lr_warmup": preset.lr_warmup,
        "seed": args.seed, "device": info["device"],
        "dtype": args.dtype or ("fp32" if info["device"] == "cpu" else "bf16"),
        "expandable_segments": args.expandable_segments, "profile": bool(args.profile),
    }  # fmt: skip


def resumed(args, results, path):
    """The rows that --resume keeps: all that the file has, if its settings are these."""
    if args.resume and path.exists():
        results["rows"] = files.load(path, results["settings"])["rows"]


def settled(results, row):
    return results["rows"].get(row.name, {}).get("status") in files.SETTLED


def run_all(args, results, tokens, timeout, path):
    todo = [row for row in running_order(args.rows) if not settled(results, row)]
    show, began = display(len(todo)), time.monotonic()
    log = args.out / "logs"
    log.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flatout-bench-") as scratch:
        # Rows share one Inductor cache, new with every run: it does not notice changed kernels.
        shared = {"log": log, "timeout": timeout, "cache": scratch}
        shared["older_liger"] = args.older_liger and str(args.older_liger.resolve())
        shared["spec"] = {"tokens": f"{scratch}/tokens.npy"}
        np.save(shared["spec"]["tokens"], tokens)
        try:
            for row in todo:
                left = (args.seconds or float("inf")) - (time.monotonic() - began)
                if left < LEAST_S:
                    print(f"{row.name} and later rows: not run, --seconds are over")
                    break
                shared["timeout"] = min(timeout, left)
                show.start(row)
                record = run_row(row, results["settings"], shared, show)
                record["where"] = machine.where(results["environment"])
                record["ran"] = datetime.now().astimezone().isoformat(timespec="seconds")
                record["git"] = results["git"]
                results["rows"][row.name] = record
                report.finish(results, path)
                show.end(results, record)
        finally:
            show.close()


def show_all(results, path):
    """Every table and picture of this kind of run."""
    notes = []
    print(f"\n{report.table(results)}\n\n{report.NOTE}\n")
    if results["kind"] == files.PARITY:
        notes += [parity.judge(results), parity.plot(results, path.with_suffix(".png"))]
        report.finish(results, path)
        print(f"{parity.table(results)}\n")
    elif results["kind"] == files.PROFILE:
        print(f"{profiling.table(results)}\n")
    elif results["rows"]:
        notes.append(report.chart(results, path.with_suffix(".png")))
    else:
        notes.append("nothing ran")
    notes = "; ".join(note for note in notes if note)
    print(f"results in {path}" + (f" ({notes})" if notes else ""))


def show_setting(results, out):
    s, info = results["settings"], results["environment"]
    device = f"{s['device']} ({info['gpu'] or info['cpu']})"
    print(f"{s['preset']}, {s['steps']} steps, {s['warmup']} of them warm-up, {s['dtype']} on "
          f"{device}; results go to {out}", flush=True)  # fmt: skip


def show_rows(rows):
    lines = [["row", "attention", "kernels", "loss", "compiled", "needs"]]
    for row in rows:
        compiled, needs = "yes" if row.compile else "-", "--older-liger" if row.older else "-"
        kernels = row.kernels or "transformers"
        lines.append([row.name, row.attention, kernels, row.loss, compiled, needs])
    print(report.text_table(lines))


def interrupted(*_):
    raise KeyboardInterrupt


def run(args):
    """Run the rows that are left; returns the exit code."""
    signal.signal(signal.SIGTERM, interrupted)
    info = machine.environment(probe(args.device))
    preset, settings = settings_of(args, info)
    tokens = data.batches(
        args.data, preset.text, preset.config["vocab_size"], settings["steps"], preset.batch,
        preset.seq, args.seed,
    )  # fmt: skip
    settings["data"] = f"{args.data or 'standard library'}, {data.digest(tokens)}"
    git = os.environ.get("GIT_COMMIT") or machine.output_of("git", "-C", HERE, "rev-parse", "HEAD")
    results = {
        "schema": files.SCHEMA, "kind": kind_of(args), "git": git or None, "argv": sys.argv[1:],
        "settings": settings, "environment": info, "published": report.PUBLISHED, "rows": {},
    }  # fmt: skip
    path = args.out / f"{results['kind']}.json"
    resumed(args, results, path)
    show_setting(results, args.out)
    code = 0
    try:
        run_all(args, results, tokens, args.timeout or preset.timeout, path)
    except KeyboardInterrupt:
        code = 130
        print("\ninterrupted")
    show_all(results, path)
    if args.old:
        print(f"\nSince {args.compare}:\n{report.comparison(args.old, results)}")
    return code


def main(argv=None):
    args = parse(argv)
    try:
        if args.list:
            show_rows(args.rows)
        elif args.readme:
            readme.update(args.readme)
        elif args.merge:
            results = files.merge(args.merge)
            path = args.out / f"{results['kind']}.json"
            report.finish(results, path)
            show_all(results, path)
        else:
            return run(args)
    except files.Mismatch as error:
        sys.exit(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
