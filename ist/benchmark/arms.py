"""The arms of a speed benchmark: train_ist.py itself, a bare loop, transformers.Trainer; each in its own process."""

import contextlib
import gc
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from ist.training.arguments import ARGUMENTS, Arguments
from ist.training.command_line import UsageError, parse_arguments
from ist.training.data import Data, GlobalBatches, collate, micro_batches, prepare_data
from ist.training.files import read_lines
from ist.training.model import load_model, plan_layers
from ist.training.observer import Observer
from ist.training.peft_config import make_peft_config
from ist.tuner import SparseTuner

WINDOW = 10  # steps: one importance update at the default interval
ARMS: dict[str, dict] = {
    "bare loop": {},
    "transformers.Trainer": {},
    "all": {"selection": "all"},
    "random": {"selection": "random"},
    "lisa": {"selection": "lisa"},
    "ist": {"selection": "ist"},
    "ist, cheap probe": {"selection": "ist", "probe": "cheap"},
    "ist, gradient probe": {"selection": "ist", "probe": "gradient"},
    "last": {"selection": "last"},
    "id3": {"selection": "id3"},
    "semantic+ist, cheap probe": {"selection": "semantic+ist", "probe": "cheap"},
}


def train(flags: dict[str, Any], observer: Observer) -> None:
    """Run train_ist.py, which is not part of the package, in this process.

    Raises:
        UsageError: it is not there: the package was installed by itself; or its exit code is not 0.
    """
    try:
        import train_ist
    except ImportError as error:
        raise UsageError("this needs train_ist.py: run it in a checkout of the repository, from its folder.") from error
    if code := train_ist.main(as_argv(flags), observer):
        raise UsageError(f"train_ist.py ended with {code}: {flags}.")


def as_argv(flags: dict[str, Any]) -> list[str]:
    """{"bf16": True, "fixed_layers": [1, 2]} as a command line."""

    def strings(value: Any) -> list[str]:
        return [text for item in value for text in strings(item)] if isinstance(value, list) else [str(value)]

    return [part for key, value in flags.items() for part in (f"--{key}", *strings(value))]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch(Observer):
    """Seconds in each part of a training step, from inside train_ist.py; each part waits for the device.

    Args:
        steps: those that count.
        parts: measure each part of a step.
        lockstep: wait for the other arms before each step.
    """

    def __init__(self, steps: range, parts: bool, lockstep: "Lockstep | None" = None) -> None:
        self.steps, self.parts, self.lockstep = steps, parts, lockstep
        self.seconds: dict[str, float] = defaultdict(float)
        self.on = False

    def ready(self, tuner: SparseTuner, optimizer: torch.optim.Optimizer) -> None:
        self.tuner = tuner

    def before_step(self, step: int) -> None:
        if self.lockstep:
            self.lockstep.wait(step)
        self.on = self.parts and step in self.steps

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        synchronize()
        start, probes = time.perf_counter(), self.tuner.probe_seconds
        yield
        synchronize()
        probes = self.tuner.probe_seconds - probes
        if probes:
            self.seconds["probe"] += probes
        self.seconds[name] += time.perf_counter() - start - probes


class Lockstep:
    """Inside an arm's process: before a step, wait until the others have done theirs, and say when it is done.

    Args:
        stride: steps of a turn. On a GPU a window, as a wait for the device at each step would slow it.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # all other output goes to stderr

    def wait(self, step: int) -> None:
        if step % self.stride == 0:
            synchronize()
            print("ready", file=self.out, flush=True)
            if not sys.stdin.readline():
                raise SystemExit("the benchmark process has ended")

    def finish(self, result: dict[str, float]) -> None:
        print(json.dumps(result), file=self.out, flush=True)


def reset() -> None:
    """Accelerate keeps its state in singletons: a second run in one process starts from none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def run_ours(flags: dict, parts: bool, lockstep: Lockstep | None = None) -> dict[str, float]:
    """Seconds per step of train_ist.py after the first window: `total`, and with `parts` of each part of a step."""
    reset()
    steps = int(flags["max_steps"])
    # The last step is no turn: after it, a run saves.
    watch = Stopwatch(range(WINDOW, steps - 1 if lockstep else steps), parts, lockstep)
    with tempfile.TemporaryDirectory() as folder:
        values = flags | {"output_dir": f"{folder}/run", "logging_steps": WINDOW, "report_to": "none"}
        with silent():
            train(values, watch)
        lines = [line for line in read_lines(Path(folder) / "run/metrics.jsonl") if "loss" in line][1:]
        # On a CPU a process's peak is that of all arms before.
        peak = {"peak_memory_bytes": lines[-1]["peak_memory_bytes"]} if torch.cuda.is_available() else {}
    total = statistics.mean(line["step_seconds"] for line in lines)
    return {"total": total, **peak} | {part: value / len(watch.steps) for part, value in watch.seconds.items()}


def run_bare(args: Arguments, model: PeftModel, rows: Dataset, pad: int, lockstep: Lockstep) -> None:
    """Plain PEFT as one would write it down: forward, backward, clip, AdamW."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0)
    stream = GlobalBatches(len(rows), args.per_device_train_batch_size, args.seed)
    device = model.device
    for step in range(args.max_steps):
        lockstep.wait(step)
        (batch,) = micro_batches(rows, stream.rows(step), args.per_device_train_batch_size, 0, 1, pad)
        batch = {key: tensor.to(device) for key, tensor in batch.items()}
        labels = nn.functional.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)  # logits[:, :-1] would be a copy
        with torch.autocast(device.type, torch.bfloat16, enabled=bool(args.bf16)):
            logits = model(**batch, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def run_trainer(args: Arguments, model: PeftModel, rows: Dataset, pad: int, lockstep: Lockstep) -> None:
    class TakeTurns(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            lockstep.wait(state.global_step)

    reset()
    with tempfile.TemporaryDirectory() as folder, silent():
        training = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=args.per_device_train_batch_size,
            max_steps=args.max_steps,
            learning_rate=args.learning_rate,
            bf16=bool(args.bf16),
            seed=args.seed,
            report_to=[],
            save_strategy="no",
            logging_steps=WINDOW,
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
        )

        def pad_rows(batch: list[dict]) -> dict[str, torch.Tensor]:
            return collate([row["input_ids"] for row in batch], [row["labels"] for row in batch], pad)

        Trainer(model=model, args=training, train_dataset=rows, data_collator=pad_rows, callbacks=[TakeTurns()]).train()


def arguments_of(flags: dict) -> Arguments:
    """The arguments of a run of train_ist.py, resolved as it does."""
    *groups, _ = parse_arguments(ARGUMENTS, as_argv(flags), "")
    return Arguments.joined(groups)


def load_arm(flags: dict) -> tuple[Arguments, PeftModel, Data]:
    """Arguments, model and rows of a run of train_ist.py, loaded as it does."""
    reset()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with silent():
        Accelerator()
        args = plan_layers(arguments_of(flags), sharded=False).args
        data = prepare_data(args)
        return args, load_model(args, make_peft_config(args), device).to(device), data


def run_arm(arm: str, flags: dict[str, str], stride: int, parts: bool) -> None:
    """Inside an arm's process: all its steps, in turn with the others."""
    lockstep = Lockstep(stride)
    if arm not in ("bare loop", "transformers.Trainer"):
        lockstep.finish(run_ours(flags, parts, lockstep))
        return
    args, model, data = load_arm(flags)
    run = run_bare if arm == "bare loop" else run_trainer
    run(args, model, data.rows, data.pad_token_id, lockstep)
    lockstep.finish({"peak_memory_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})
