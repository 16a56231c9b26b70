"""A row in a process of its own: Liger and CCE patch globals, and memory starts from nothing."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]


class Worker:
    """A process of stages/worker.py and the events it sends."""

    def __init__(self, spec, log, cache=None):
        reader, writer = os.pipe()
        env = dict(os.environ)
        path = [str(BENCHMARKS), spec.get("site"), env.get("PYTHONPATH")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR") if cache else ():
            env.setdefault(name, f"{cache}/{name.split('_')[0].lower()}")
        env.setdefault("TOKENIZERS_PARALLELISM", "false")
        if spec.get("expandable_segments"):
            env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
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
            answers = [e for e in worker.events(time.monotonic() + 600) if e]
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


def take(event, record):
    """Add one event of a worker to its row's record."""
    if "step" in event:
        record["step_ms"].append(event["ms"])
        record["losses"].append(event["loss"])
        record.setdefault("first_step_s", event["since"])
    else:
        record.update(event.get("end", event))


def run_row(row, settings, shared, show):
    """Train one row; always returns its record, whatever became of it.

    shared: spec (beyond the settings), log (folder), cache (folder), timeout (seconds), and
    older_liger (folder or None)."""
    record = {"row": row.name, "status": "", "reason": "", "step_ms": [], "losses": []}
    spec = {**settings, **shared["spec"], "row": row.name, "spawned": time.time()}
    spec["site"] = shared["older_liger"] if row.older else None
    began = time.monotonic()
    with open(shared["log"] / f"{row.name}.log", "w") as log:
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
