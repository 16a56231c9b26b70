"""The stage matrix: train one Qwen3 in many ways, each in a process of its own, and compare.

    python benchmarks/run_stages.py                      # tiny on a CPU, qwen3-8b on a GPU
    python benchmarks/run_stages.py --list
    python benchmarks/run_stages.py --rows '00_*' 06_flatout_fused --steps 20
    python benchmarks/run_stages.py --resume --compare old/results.json

Writes results.json (settings, environment, raw step times and losses), results.csv, results.png
and one log per row into --out. Every row that cannot run says why in its status.
"""

import argparse
import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path

import numpy as np
from stages import data, report
from stages.display import display
from stages.rows import PRESETS, matching, running_order

HERE = Path(__file__).resolve().parent
PACKAGES = [
    "flatout", "torch", "triton", "transformers", "kernels", "liger-kernel", "cut-cross-entropy",
    "flash-attn", "flash-attn-3", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas",
]  # fmt: skip


def parse(argv):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="default: tiny on a CPU, qwen3-8b on a GPU")
    p.add_argument("--rows", nargs="+", default=[], metavar="GLOB", help="default: all")
    p.add_argument("--steps", type=int, help="training steps of each row")
    p.add_argument("--warmup", type=int, help="leading steps that no timing counts")
    p.add_argument("--data", metavar="FILE|random", help="default: the standard library's sources")
    p.add_argument("--list", action="store_true", help="print the rows and stop")
    p.add_argument("--resume", action="store_true", help="keep the rows of --out that ran")
    p.add_argument("--compare", metavar="OLD.json", type=Path, help="print changes since that run")
    p.add_argument("--out", type=Path, default=Path("runs/stages"))
    p.add_argument("--timeout", type=float, help="seconds a row may take")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32 on a CPU, else bf16")
    args = p.parse_args(argv)
    try:
        args.rows = matching(args.rows)
        args.old = json.loads(args.compare.read_text()) if args.compare else None
        if args.data not in (None, "random") and not Path(args.data).is_file():
            raise ValueError(f"--data: no file {args.data}")
        if args.steps is not None and args.steps < 1:
            raise ValueError(f"--steps: expected 1 or more, got {args.steps}")
        if not args.list:
            (args.out / "logs").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        p.error(str(error))
    return args


# ---- the machine ---------------------------------------------------------------------------


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions():
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def environment(device):
    """Everything about this machine that a timing depends on."""
    info = {
        "python": platform.python_version(), "platform": platform.platform(),
        "cpu": cpu_name(), "cpus": len(os.sched_getaffinity(0)), "gpu": None,
        "versions": versions(),
        "variables": {
            k: v for k, v in os.environ.items()
            if k.startswith(("OMP_", "MKL_", "PYTORCH_", "TORCH", "CUDA_", "NCCL_", "FLATOUT_"))
        },
    }  # fmt: skip
    info |= probe(device)
    info |= {name: info["versions"][name] for name in ("torch", "transformers")}
    if info["device"] == "cuda":
        query = "power.limit,driver_version,clocks.max.sm"
        asked = output_of("nvidia-smi", "-i", "0", f"--query-gpu={query}", "--format=csv,noheader")
        keys = ("power_limit", "driver", "max_clock")
        info |= dict(zip(keys, [part.strip() for part in asked.split(",")], strict=False))
    return info


# ---- one row, in its own process -------------------------------------------------------------


class Worker:
    """A process of stages/worker.py and the events it sends."""

    def __init__(self, spec, log, cache=None):
        reader, writer = os.pipe()
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), env.get("PYTHONPATH")]))
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR") if cache else ():
            env.setdefault(name, f"{cache}/{name.split('_')[0].lower()}")
        env.setdefault("TOKENIZERS_PARALLELISM", "false")
        command = [sys.executable, "-m", "stages.worker", json.dumps(spec), str(writer)]
        # A session of its own: Ctrl-C reaches this process alone, and kill() the whole family.
        self.process = subprocess.Popen(
            command, pass_fds=[writer], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env,
            start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        self.reader = reader

    def events(self, deadline):
        """Yield its events, and None twice a second; raises TimeoutError at the deadline."""
        pending = b""
        while True:
            if time.monotonic() > deadline:
                raise TimeoutError
            if not select.select([self.reader], [], [], 0.5)[0]:
                yield None
                continue
            chunk = os.read(self.reader, 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from map(json.loads, lines)

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        os.close(self.reader)


@contextlib.contextmanager
def held_signals():
    """Ctrl-C waits until the worker that is being started is known, and can be killed."""
    caught = []
    held = {
        s: signal.signal(s, lambda *_: caught.append(1)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if caught:
            raise KeyboardInterrupt


def probe(device):
    """What torch sees, asked in another process: stages/worker.py says why."""
    with tempfile.TemporaryFile() as log:
        worker = Worker({"probe": device}, log)
        try:
            answers = [e for e in worker.events(time.monotonic() + 120) if e]
        finally:
            worker.kill()
        if not answers:
            log.seek(0)
            sys.exit(f"cannot import torch:\n{log.read().decode(errors='replace')}")
        return answers[0]


def died(code):
    """The status of a worker that ended without a word."""
    if code == -signal.SIGKILL:
        return "Host OOM", "killed by the system (signal 9), most often for memory"
    return "Failed", f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}"


def run_row(row, settings, shared, show):
    """Train one row; always returns its record, whatever became of it."""
    record = {"row": row.name, "status": "", "reason": "", "step_ms": [], "losses": []}
    spec = {**settings, **shared["spec"], "row": row.name, "spawned": time.time()}
    began = time.monotonic()
    with open(shared["out"] / "logs" / f"{row.name}.log", "w") as log:
        worker = None
        try:
            with held_signals():
                worker = Worker(spec, log, shared["cache"])
            for event in worker.events(began + shared["timeout"]):
                take(event or {}, record)
                show.progress(record, settings["steps"])
            if not record["status"]:
                record["status"], record["reason"] = died(worker.process.wait())
        except TimeoutError:
            record["status"] = "Timeout"
            record["reason"] = f"not done after {shared['timeout']:g} s"
        finally:
            if worker:
                worker.kill()
    return {**record, "wall_s": time.monotonic() - began}


def take(event, record):
    """Add one event of a worker to its row's record."""
    if "step" in event:
        record["step_ms"].append(event["ms"])
        record["losses"].append(event["loss"])
        record.setdefault("first_step_s", event["since"])
    else:
        record.update(event.get("end", event))


# ---- the run -----------------------------------------------------------------------------------


def settings_of(args, info):
    """What two runs must share for their rows to stand in one table."""
    name = args.preset or ("tiny" if info["device"] == "cpu" else "qwen3-8b")
    preset = PRESETS[name]
    steps = preset.steps if args.steps is None else args.steps
    warmup = preset.warmup if args.warmup is None else args.warmup
    return preset, {
        "preset": name, "config": preset.config, "batch": preset.batch, "seq": preset.seq,
        "steps": steps, "warmup": min(warmup, steps - 1),
        "seed": args.seed, "device": info["device"],
        "dtype": args.dtype or ("fp32" if info["device"] == "cpu" else "bf16"),
    }  # fmt: skip


def earlier_rows(args, settings):
    """The rows that --resume keeps: those that ran, of a run with the same settings."""
    path = args.out / "results.json"
    if not args.resume or not path.exists():
        return {}
    old = json.loads(path.read_text())
    if old["schema"] != report.SCHEMA:
        sys.exit(f"--resume: {path} has schema {old['schema']}, not {report.SCHEMA}")
    for key, value in settings.items():
        if old["settings"].get(key) != value:
            was = old["settings"].get(key)
            sys.exit(f"--resume: {path} was made with {key} {was}, not {value}: use another --out")
    return {name: row for name, row in old["rows"].items() if row["status"] in report.RAN}


def finish_row(results, record, folder):
    """Put a record among the results, check every loss curve, write the files."""
    results["rows"][record["row"]] = record
    report.judge(results["rows"])
    for row in results["rows"].values():
        row["figures"] = report.summarize(row, results["settings"], results["environment"])
    results["saved"] = datetime.now().astimezone().isoformat(timespec="seconds")
    report.save(results, folder)


def run_all(args, results, tokens, timeout):
    todo = [row for row in running_order(args.rows) if row.name not in results["rows"]]
    show = display(len(todo))
    with tempfile.TemporaryDirectory(prefix="flatout-bench-") as scratch:
        # Rows share one Inductor cache, new with every run: it does not notice changed kernels.
        shared = {"out": args.out, "timeout": timeout, "cache": scratch}
        shared["spec"] = {"tokens": f"{scratch}/tokens.npy"}
        np.save(shared["spec"]["tokens"], tokens)
        try:
            for row in todo:
                show.start(row)
                record = run_row(row, results["settings"], shared, show)
                finish_row(results, record, args.out)
                show.end(results, record)
        finally:
            show.close()


def interrupted(*_):
    raise KeyboardInterrupt


def main(argv=None):
    args = parse(argv)
    if args.list:
        for row in args.rows:
            print(f"{row.name:32}{row.attention:9}{row.kernels or 'transformers':16}{row.loss}")
        return 0
    signal.signal(signal.SIGTERM, interrupted)
    info = environment(args.device)
    preset, settings = settings_of(args, info)
    tokens = data.batches(
        args.data, preset.text, preset.config["vocab_size"], settings["steps"], preset.batch,
        preset.seq, args.seed,
    )  # fmt: skip
    settings["data"] = f"{args.data or 'standard library'}, {data.digest(tokens)}"
    results = {
        "schema": report.SCHEMA, "git": output_of("git", "-C", HERE, "rev-parse", "HEAD") or None,
        "argv": sys.argv if argv is None else argv, "settings": settings, "environment": info,
        "published": report.PUBLISHED, "rows": earlier_rows(args, settings),
    }  # fmt: skip
    code = 0
    try:
        run_all(args, results, tokens, args.timeout or preset.timeout)
    except KeyboardInterrupt:
        code = 130
    print(f"\n{report.table(results)}\n")
    note = report.chart(results, args.out / "results.png") if results["rows"] else "nothing ran"
    print(
        f"{'interrupted; ' if code else ''}results in {args.out}" + (f" ({note})" if note else "")
    )
    if args.old:
        print(f"\nSince {args.compare}:\n{report.comparison(args.old, results)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
