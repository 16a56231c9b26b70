"""Progress while the rows run: a live table where rich is installed and a terminal watches, plain
lines otherwise."""

import sys
import time

from stages import report


class Plain:
    """One line when a row starts and one when it ends."""

    def __init__(self, total):
        self.total, self.count = total, 0

    def start(self, row):
        self.count += 1
        print(f"[{self.count:2}/{self.total}] {row.name} ...", flush=True)

    def progress(self, record, steps):
        pass

    def end(self, results, record):
        _, status, mfu, tflops, mem, runtime, step, *_ = report.cells(record)
        line = f"        {status}"
        if record["status"] in report.RAN:
            line += f"; {step} ms a step, {mem} GiB, all steps {runtime} s"
            line += f", loss {record['losses'][0]:.3f} -> {record['losses'][-1]:.3f}"
        print(line, flush=True)

    def close(self):
        pass


class Live:
    """One line on the row that runs, above the table so far, redrawn in place."""

    def __init__(self, total):
        import rich.live

        self.total, self.count, self.results, self.line = total, 0, None, ""
        self.live = rich.live.Live(get_renderable=self.draw, refresh_per_second=4, transient=True)
        self.live.start()

    def draw(self):
        import rich.console
        import rich.table

        table = rich.table.Table(*report.COLUMNS)
        for record in report.ordered(self.results["rows"]) if self.results else []:
            color = {"Success!": "green", "Skipped": "dim"}.get(record["status"], "red")
            table.add_row(*report.cells(record), style=color)
        return rich.console.Group(self.line, table)

    def name(self):
        return f"row {self.count} of {self.total}, {self.row.name}"

    def start(self, row):
        self.count += 1
        self.row, self.began = row, time.monotonic()
        self.line = f"{self.name()}: starting"

    def progress(self, record, steps):
        done = len(record["losses"])
        seconds = time.monotonic() - self.began
        what = "building, first step" if not done else f"loss {record['losses'][-1]:.3f}"
        bar = "#" * (30 * done // steps)
        self.line = f"{self.name()}: {bar:30} {done}/{steps}, {what}, {seconds:.0f} s"

    def end(self, results, record):
        self.results, self.line = results, ""

    def close(self):
        self.line = ""
        self.live.stop()


def display(total):
    if sys.stdout.isatty():
        try:
            return Live(total)
        except ImportError:
            pass
    return Plain(total)
