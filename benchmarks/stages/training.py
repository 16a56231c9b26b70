"""Training steps and what each took."""

import time

import numpy as np
import torch

from stages.model import loss_function, optimizer_step

LR = 3e-4


def schedule(step, steps, up):
    """Warmup-stable-decay: up over so many steps, down to 0 over the last fifth of the run."""
    return LR * min(1.0, (step + 1) / up, (steps - step) / max(1, steps // 5))


class Clock:
    """Marks between steps: CUDA events, so that the host never waits for the step it has just
    queued; the time of day on a CPU."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.marks = []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self, step):
        before, after = self.marks[step : step + 2]
        if not self.cuda:
            return 1e3 * (after - before)
        after.synchronize()
        return before.elapsed_time(after)


class Training:
    """One step after another over the run's tokens; loss and time of each go to emit."""

    def __init__(self, spec, row, model, emit):
        self.spec, self.row, self.emit = spec, row, emit
        self.device, self.steps = spec["device"], spec["steps"]
        self.loss_of = loss_function(row, model, self.device)
        self.optimizer, self.update = optimizer_step(row, model, LR)
        self.tokens = torch.from_numpy(np.load(spec["tokens"])).to(self.device)
        self.losses = torch.zeros(self.steps, pin_memory=self.device == "cuda")
        self.autocast = torch.autocast(self.device, torch.bfloat16, enabled=spec["dtype"] == "bf16")
        self.clock, self.done, self.told = Clock(self.device), 0, 0
        self.clock.mark()

    def step(self):
        step = self.done
        if self.row.compile and self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        for group in self.optimizer.param_groups:
            group["lr"] = schedule(step, self.steps, self.spec["lr_warmup"])
        with self.autocast:
            loss = self.loss_of(self.tokens[step])
        loss.backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses[step].copy_(loss.detach(), non_blocking=True)
        self.clock.mark()
        self.done += 1
        # One step late, save at both ends: reading a loss must not drain the GPU's queue.
        self.tell(self.done if step in (0, self.steps - 1) else step)

    def tell(self, ready):
        for i in range(self.told, ready):
            ms = self.clock.ms(i)  # waits until the step's loss is there too
            since = time.time() - self.spec["spawned"]
            self.emit(step=i, ms=ms, loss=self.losses[i].item(), since=since)
        self.told = max(self.told, ready)
