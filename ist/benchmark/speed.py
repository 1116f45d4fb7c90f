"""Seconds of the steps of different arms in turn, for `python -m ist.benchmark speed`.

An arm is a run of train_ist.py itself, of a bare loop, or of transformers.Trainer, over the same rows, in a process of
its own. Arms take turns step by step, A B C A B C, so that other load of the machine slows all of them; then again with
another seed, as the draws matter too.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from ist.benchmark.arms import ARMS, WINDOW, load_arm, synchronize
from ist.loss import token_loss_sum
from ist.training.command_line import UsageError, markdown_table
from ist.training.data import GlobalBatches, micro_batches


class ArmProcess:
    """An arm as seen from the benchmark: a process that does `stride` steps at each `go`."""

    def __init__(self, arm: str, flags: dict[str, Any], stride: int, parts: bool) -> None:
        asked = {key: value if isinstance(value, list) else str(value) for key, value in flags.items()}
        command = [sys.executable, "-m", "ist.benchmark", "arm", "--name", arm, "--flags", json.dumps(asked)]
        command += ["--stride", str(stride), *["--parts"] * parts]
        self.arm = arm
        path = [str(Path(__file__).parent.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": os.pathsep.join(path)}, text=True, **pipes
        )
        self._read()  # loaded, and about to begin

    def _read(self) -> str:
        if not (line := self.process.stdout.readline()):
            raise UsageError(f"the arm {self.arm} ended with {self.process.wait()}; its error is above.")
        return line

    def go(self) -> float:
        """Do one turn; its seconds."""
        start = time.perf_counter()
        print(file=self.process.stdin, flush=True)
        self._read()
        return time.perf_counter() - start

    def finish(self) -> dict[str, float]:
        """Seconds per step of the parts that the arm measures, and its peak memory on a GPU."""
        print(file=self.process.stdin, flush=True)
        return json.loads(self._read())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def take_turns(arms: dict[str, dict], steps: int, parts: bool, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """{arm: {total: seconds per step after the first window, turns: those of each turn of `stride` steps, parts}}.

    Args:
        arms: {name: keys of train_ist.py}.
    """
    stride = WINDOW if torch.cuda.is_available() else 1
    with contextlib.ExitStack() as stack:
        processes = {}
        for arm, flags in arms.items():
            # The last step is not counted: after it, a run saves.
            processes[arm] = ArmProcess(arm, flags | {"max_steps": steps + 1}, stride, parts)
            stack.callback(processes[arm].close)
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for step in range(0, steps, stride):
            if step % WINDOW == 0:
                say(f"step {step}/{steps} of {len(arms)} arms")
            for arm, process in processes.items():
                seconds[arm].append(process.go())
        counted = {arm: values[WINDOW // stride :] for arm, values in seconds.items()}
        return {
            arm: process.finish()
            | {"total": sum(counted[arm]) / (steps - WINDOW), "turns": counted[arm], "stride": stride}
            for arm, process in processes.items()
        }


def measure_speed(
    flags: dict, arms: Sequence[str], rounds: int, together: int, say: Callable[[str], None]
) -> dict[str, list[dict]]:
    """{arm: [seconds per step and of its parts, one for each round]}; `bare` has the seconds of the bare loop's turns.

    Args:
        together: arms in memory at a time, and with each such group the bare loop; 0 is all.
    """
    bare = [arm for arm in arms if arm == "bare loop"]
    others = [arm for arm in arms if arm not in bare]
    together = together or max(1, len(others))
    groups = [[*bare, *others[i : i + together]] for i in range(0, len(others), together)] or [bare]
    results: dict[str, list[dict]] = {arm: [] for arm in arms}
    for turn in range(rounds):
        for group in groups:
            settings, steps = {arm: flags | {"seed": turn} | ARMS[arm] for arm in group}, int(flags["max_steps"])
            measured = take_turns(settings, steps, not torch.cuda.is_available(), say)
            if torch.cuda.is_available():  # where timing each part slows the whole
                for arm, parts in take_turns(settings, steps, True, say).items():
                    measured[arm] = parts | measured[arm]
            for arm, result in measured.items():
                result |= {"bare": measured["bare loop"]["turns"]} if bare else {}
                results[arm].append(result)
                say(f"round {turn + 1}/{rounds}  {arm}: {100 * result['total']:.1f} s per 100 steps")
    return results


def count_flops(flags: dict) -> dict[str, float]:
    """FLOPs of the matrix products of one forward, and of its backward with all layers trained; counted, not timed."""
    args, model, data = load_arm(flags)
    indices = GlobalBatches(len(data.rows), args.per_device_train_batch_size, 0).rows(0)
    (batch,) = micro_batches(data.rows, indices, args.per_device_train_batch_size, 0, 1, data.pad_token_id)
    batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
    with FlopCounterMode(display=False) as forward:
        loss = token_loss_sum(model, batch)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return {
        "forward": forward.get_total_flops(),
        "backward": backward.get_total_flops(),
        "tokens": batch["labels"].numel(),
    }


def matmul_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of square matrix products of that size, the best of several on this machine."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one, two = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, start = 0.0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        synchronize()
        begin = time.perf_counter()
        one @ two
        synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - begin))
    return best


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} … {max(values):.3g})"


def ratio_of(runs: Sequence[dict], draws: int = 2000) -> tuple[float, list[float]]:
    """(seconds of an arm / those of the bare loop, its 95 % interval by bootstrap of the turns).

    Turns at the first step of a window, when importance is updated, are drawn for one another only.
    """
    generator, sums = np.random.default_rng(0), np.zeros((draws, 2))
    first, other = [], []
    for run in runs:
        for i, pair in enumerate(zip(run["turns"], run["bare"], strict=True)):
            (other if i * run["stride"] % WINDOW else first).append(pair)
    for pairs in (np.array(kind) for kind in (first, other) if kind):
        sums += pairs[generator.integers(len(pairs), size=(draws, len(pairs)))].sum(1)
    own, bare = np.array(first + other).sum(0)
    return float(own / bare), np.percentile(sums[:, 0] / sums[:, 1], [2.5, 97.5]).tolist()


def window_means(run: dict) -> list[float]:
    """Seconds per step of each window."""
    turns = WINDOW // run["stride"]
    return [sum(run["turns"][i : i + turns]) / WINDOW for i in range(0, len(run["turns"]), turns)]


def speed_table(result: dict[str, Any], rows: int, length: int, rounds: int) -> str:
    """Markdown: seconds per 100 steps by part, and the ratio to the bare loop; at the end the floor by FLOPs."""
    header = ["arm", "forward", "backward", "optimizer", "probe", "bookkeeping", "total (range of windows)"]
    header += ["tokens/s", "/ bare loop (95 % interval)"]
    table, flops = [], result["flops"]
    for arm, runs in result["results"].items():
        cells = []
        for part in ("forward", "backward", "optimizer", "probe", "bookkeeping"):
            values = [100 * run[part] for run in runs if part in run]
            cells.append(f"{statistics.median(values):.3g}" if values else "")
        cells.append(spread([100 * mean for run in runs for mean in window_means(run)]))
        cells.append(f"{flops['tokens'] / statistics.median(run['total'] for run in runs):.0f}")
        ratio = ""
        if "bare" in runs[0]:
            ratio, (low, high) = ratio_of(runs)
            ratio = f"{ratio:.3f}" + (f" ({low:.3f} … {high:.3f})" if arm != "bare loop" else "")
        table.append([arm, *cells, ratio])
    forward, backward = (100 * flops[key] / result["matmul_flops_per_second"] for key in ("forward", "backward"))
    floor = [f"{forward:.3g}", f"{backward:.3g}", "", "", "", f"{forward + backward:.3g}"]
    floor.append(f"{100 * flops['tokens'] / (forward + backward):.0f}")
    table.append(["floor of `all`: FLOPs / rate of matrix products", *floor, ""])
    shape = f"seconds per 100 steps, {rows} x {length} tokens, {rounds} rounds"
    return "\n".join([shape, "", *markdown_table(header, table)])
