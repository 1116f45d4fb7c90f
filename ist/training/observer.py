"""Who looks on while a run trains: benchmarks and tests, by subclassing."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


class Observer:
    """Called by the loop of train_ist.py at each step; does nothing."""

    def ready(self, tuner: Any, optimizer: torch.optim.Optimizer) -> None:
        """All is made, nothing is loaded from a checkpoint yet."""

    def before_step(self, step: int) -> None:
        """Before the importance update and the draw of `step`, from 0."""

    def part(self, name: str) -> AbstractContextManager:
        """Around a part of a step: bookkeeping (with the importance update), forward, backward, optimizer."""
        return nullcontext()

    def evaluating(self) -> AbstractContextManager:
        """Around a validation."""
        return nullcontext()


class StepClock:
    """Seconds of steps, without validations and saves, since the last logged step and since the run began."""

    def __init__(self) -> None:
        self.run_seconds = self.window_seconds = 0.0
        self.window_steps = self.window_tokens = 0

    def start(self) -> None:
        self._start = time.perf_counter()

    def elapsed(self) -> float:
        """Of the run, up to now."""
        return self.run_seconds + time.perf_counter() - self._start

    def stop(self, tokens: int) -> None:
        """The step is over; it had so many tokens."""
        seconds = time.perf_counter() - self._start
        self.run_seconds += seconds
        self.window_seconds += seconds
        self.window_steps += 1
        self.window_tokens += tokens

    def window(self) -> dict[str, float]:
        """{step_seconds, tokens_per_second} since the last call."""
        values = {
            "step_seconds": self.window_seconds / self.window_steps,
            "tokens_per_second": self.window_tokens / self.window_seconds,
        }
        self.window_seconds, self.window_steps, self.window_tokens = 0.0, 0, 0
        return values
