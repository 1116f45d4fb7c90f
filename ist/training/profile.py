"""--profile: a trace of a few steps by torch.profiler."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ist.training.files import writing

SKIPPED, WARM, TRACED = 2, 1, 3  # steps: the first ones allocate and compile


class StepProfile:
    """Traces the operations of three steps, and writes them when the last of the three is done.

    Args:
        folder: gets trace.json, for chrome://tracing or ui.perfetto.dev, and operations.txt, the operations by time.
        left: steps that the run has left; of a run with fewer than six some of the last ones are traced.
        say: prints a line.
    """

    def __init__(self, folder: Path, left: int, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        traced = max(1, min(TRACED, left - WARM))
        skipped = max(0, min(SKIPPED, left - WARM - traced))
        self.last = skipped + WARM + traced
        self.done = 0
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=skipped, warmup=WARM, active=traced, repeat=1)
        self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self._profile.start()

    def step(self) -> None:
        """A step is over."""
        if self.done < self.last:
            self.done += 1
            self._profile.step()
            if self.done == self.last:
                self._profile.stop()

    def close(self) -> None:
        """The run ends; what was not traced is said."""
        if self.done < self.last:
            self.done = self.last
            self._profile.stop()

    def _write(self, traced: profile) -> None:
        trace = self.folder / "trace.json"
        by_time = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        with writing(trace):
            self.folder.mkdir(parents=True, exist_ok=True)
            traced.export_chrome_trace(str(trace))
            (self.folder / "operations.txt").write_text(
                traced.key_averages().table(sort_by=by_time, row_limit=50) + "\n"
            )
        self.say(f"profile: {trace} (ui.perfetto.dev shows it), operations by time in {self.folder / 'operations.txt'}")
