"""LoRA + ID3 against plain LoRA on a real model: validation loss and optimizer state (ist/selection/README.md).

    python tests/support/id3.py --train_file math.json              prints
    python tests/support/id3.py --train_file math.json --publish    writes launch/results/id3.json and the table

Rows as train_ist.py takes them, some of them held out. Every arm is a run of train_ist.py's own main, its optimizer and
rule watched from inside. The file has seconds too, but of arms that ran one after the other: to compare times, use
`python -m ist.benchmark speed`, where arms take turns.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import MethodType

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from accelerate import Accelerator

from ist.report.tables import publish
from ist.selection import StepwiseUnmasking
from ist.training import prepare as training_model
from support import read_lines, reset_accelerate

ARMS = {
    "LoRA": {"selection": "all"},
    "LoRA + ID3, 25 %": {"selection": "id3", "id3_budget": 0.25},
    "LoRA + ID3, 5 %": {"selection": "id3", "id3_budget": 0.05},
}


def timed(function: Callable, seconds: list[float]) -> Callable:
    def call(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def try_arm(arm: str, options: argparse.Namespace) -> dict:
    import train_ist

    choosing: list[float] = []
    updating: list[float] = []
    made: list[torch.optim.Optimizer] = []
    make_optimizer, unmask = training_model.make_optimizer, StepwiseUnmasking.unmask

    def watched(*args):
        optimizer = make_optimizer(*args)
        optimizer.step = MethodType(timed(type(optimizer).step, updating), optimizer)
        made.append(optimizer)
        return optimizer

    with tempfile.TemporaryDirectory() as folder:
        values = {
            **{"model_name_or_path": options.model, "train_file": options.train_file, "output_dir": f"{folder}/run"},
            **{"max_steps": options.max_steps, "per_device_train_batch_size": options.rows_per_step},
            **{"validation_size": options.validation_size, "completion_only_loss": True, "bf16": True},
            **{"learning_rate": 5e-4, "warmup_steps": 4, "logging_steps": 1, "report_to": "none", **ARMS[arm]},
        }
        reset_accelerate()
        training_model.make_optimizer, StepwiseUnmasking.unmask = watched, timed(unmask, choosing)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))])
        finally:
            training_model.make_optimizer, StepwiseUnmasking.unmask = make_optimizer, unmask
        assert code == 0
        run = json.loads(Path(folder, "run/run.json").read_text())
        lines = read_lines(Path(folder, "run/metrics.jsonl"))
    (optimizer,) = made
    n_scalars = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    state = [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
    return {
        "scalars": run["id3"]["unmasked"] if "id3" in run else n_scalars,
        "optimizer_state_bytes": sum(tensor.nbytes for tensor in state),
        "validation_loss": {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line},
        "train_loss": [line["loss"] for line in lines if "loss" in line],
        "step_seconds": median(line["step_seconds"] for line in lines if "loss" in line),
        "choosing_seconds": median(choosing) if choosing else 0.0,
        "update_seconds": median(updating),
        "configuration": run["configuration"],
        "id3": run.get("id3"),
    }


def as_table(answers: dict[str, dict]) -> str:
    last = max(next(iter(answers.values()))["validation_loss"], key=int)
    lines = [
        f"| arm | scalars trained | optimizer state | validation loss, step 0 → {last} |",
        "|---|---|---|---|",
    ]
    for arm, answer in answers.items():
        loss = {int(step): value for step, value in answer["validation_loss"].items()}
        megabytes = answer["optimizer_state_bytes"] / 1e6
        lines.append(f"| {arm} | {answer['scalars']:,} | {megabytes:.1f} MB | {loss[0]:.3f} → {loss[int(last)]:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"))
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--max_steps", type=int, default=40)
    parser.add_argument("--rows_per_step", type=int, default=8)
    parser.add_argument("--validation_size", type=int, default=160)
    parser.add_argument("--publish", action="store_true")
    options = parser.parse_args()
    answers = {}
    for arm in ARMS:
        answers[arm] = try_arm(arm, options)
        print(as_table({arm: answers[arm]}), flush=True)
    if not options.publish:
        return
    for answer in answers.values():  # a result names files, not where they lay
        for key in ("model_name_or_path", "train_file", "output_dir"):
            value = answer["configuration"].pop(key)
            answer["configuration"][key] = (
                [Path(v).name for v in value] if isinstance(value, list) else Path(value).name
            )
    sizes = " ".join(f"--{key} {getattr(options, key)}" for key in ("max_steps", "rows_per_step", "validation_size"))
    command = f"python tests/support/id3.py --train_file {Path(options.train_file).name} {sizes} --publish"
    reset_accelerate()
    file, accelerator = ROOT / "launch/results/id3.json", Accelerator(cpu=True)
    publish(file, command, accelerator, as_table(answers), ROOT / "ist/selection/README.md", seed=42, answers=answers)


if __name__ == "__main__":
    main()
