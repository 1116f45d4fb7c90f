"""What the seeded suites share: launches, the comparison of a run with the undisturbed one, the tables."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import load_file

from ist.training.command_line import markdown_table
from ist.training.word_problems import arithmetic_rows
from support import ROOT, make_tiny, read_lines
from support.runs import without_times

TOPOLOGIES = ("one", "ddp", "fsdp2")
RANKS = {"one": 1, "ddp": 2, "fsdp2": 2}
ENVIRONMENT = {
    **{"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_OFFLINE": "1"},
}


def prepare(work: Path) -> None:
    """The model and the rows that all runs of a suite train on."""
    if not (work / "train.json").exists():
        rows = arithmetic_rows(60, seed=1, held_out=False)
        make_tiny(work / "tiny", rows)
        (work / "train.json").write_text(json.dumps(rows))


def flags(work: Path, run: Path, topology: str, **options) -> list[str]:
    """The command line of a short run with everything that a checkpoint has to keep."""
    values = {
        **{"model_name_or_path": work / "tiny", "train_file": work / "train.json", "output_dir": run},
        **{"report_to": "none", "update_interval": 3, "score_lr": 1000, "lora_dropout": 0.1, "learning_rate": 5e-3},
        **{"warmup_steps": 2, "logging_steps": 1, "validation_size": 8, "weight_decay": 0.01, "lora_r": 4},
        **{"per_device_train_batch_size": 4 // RANKS[topology], **options},
    }
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def start(
    topology: str, work: Path, script: Sequence[str], output: Path, launcher: bool = True, **environment: str
) -> subprocess.Popen:
    """`accelerate launch` of a script with the topology's configuration, in a process group of its own.

    Without `launcher`, one process is python's alone, which has it begin some seconds earlier.
    """
    command = [sys.executable]
    if launcher:
        config = f"accelerate_configs/{'single' if topology == 'one' else topology}.yaml"
        command += ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file", config]
    variables = {**os.environ, **ENVIRONMENT, "HF_DATASETS_CACHE": str(work / "datasets"), **environment}
    with open(output, "a") as stream:
        return subprocess.Popen(
            [*command, *script], env=variables, cwd=ROOT, stdout=stream, stderr=stream, start_new_session=True
        )


def after(line: dict, step: int) -> bool:
    return isinstance(line.get("step"), int) and line["step"] > step


def differences(run: Path, whole: Path, record_damaged: list[dict] | None = None) -> list[str]:
    """In what a finished run is another than the undisturbed one; clocks aside. Empty: they are equal to the bit.

    `record_damaged`: the lines that a damaged record still had. Those up to the resumed checkpoint cannot come back;
    any part of them, and of the true ones, may be there.
    """
    adapter, both = Path("adapter/adapter_model.safetensors"), (run, whole)
    if not (run / adapter).is_file():
        return ["no adapter"]
    found = ["adapter"] if (run / adapter).read_bytes() != (whole / adapter).read_bytes() else []
    record, expected = (json.loads((path / "run.json").read_text()) for path in both)
    keys = ("status", "steps", "trained_counts", "final_train_loss", "final_validation_loss", "best")
    found += [f"run.json: {key}" for key in keys if record.get(key) != expected.get(key)]
    resumed = int(re.sub(r".*step_", "", record["resumed_from"] or "0"))
    for name, last in (("metrics.jsonl", resumed), ("importance.jsonl", resumed - 1)):
        lines, true = (without_times(read_lines(path / name)) for path in both)
        if record_damaged is not None:
            allowed = without_times(record_damaged) + true
            strange = [line for line in lines if line not in allowed]
            lines, true = ([line for line in part if after(line, last)] for part in (lines, true))
            found += [f"{name}: {strange[0]}"] if strange else []
        found += [name] if lines != true else []
    newest = max((whole / "checkpoints").iterdir()).name
    if resumed < int(newest.removeprefix("step_")):  # else it is the one that was damaged
        found += [f"{newest}: {part}" for part in checkpoint_differences(*(p / "checkpoints" / newest for p in both))]
    return found


def checkpoint_differences(one: Path, two: Path) -> list[str]:
    """In what two checkpoints of runs in other folders differ; the second is right, the first may hold more tensors."""
    if not (one / "checkpoint.json").is_file():
        return ["missing"]
    tensors = [load_file(path / "optimizer.safetensors") for path in (one, two)]
    same = all(name in tensors[0] and bool((tensors[0][name] == tensors[1][name]).all()) for name in tensors[1])
    states = [json.loads((path / "checkpoint.json").read_text()) for path in (one, two)]
    keys = ("step", "optimizer", "scheduler", "tuner", "data", "rng", "tokens", "loss", "validation_loss", "best")
    return ([] if same else ["optimizer"]) + [key for key in keys if states[0].get(key) != states[1][key]]


def heading(title: str, command: str) -> list[str]:
    """The first lines of a page of results."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    return [f"# {title}", "", f"{datetime.now(UTC):%Y-%m-%d}, commit {commit}. {command}", ""]


def write_results(file: Path, title: str, command: str, outcomes: Sequence[str], results: Iterable[dict]) -> None:
    """A Markdown page: a table for each topology, and what was not as it must be.

    A result has topology, kind, outcome, and where it is a fault also number and what (as one line).
    """
    results = list(results)
    lines = heading(title, command)
    for topology in dict.fromkeys(result["topology"] for result in results):
        those = [result for result in results if result["topology"] == topology]
        counts = Counter((result["kind"], result["outcome"]) for result in those)
        rows = [
            [kind, *(str(counts[kind, outcome] or "") for outcome in outcomes)]
            for kind in dict.fromkeys(sorted(result["kind"] for result in those))
        ]
        totals = Counter(result["outcome"] for result in those)
        rows.append(["**all**", *(f"**{totals[outcome]}**" for outcome in outcomes)])
        lines += [f"## {topology}: {len(those)}", "", *markdown_table(["kind", *outcomes], rows), ""]
    faults = [result for result in results if result.get("fault")]
    lines += [f"## Not as it must be: {len(faults)}", ""]
    for result in faults:
        lines.append(
            f"- {result['topology']} {result['number']}, {result['kind']} ({result['what']}): {result['fault']}"
        )
    file.write_text("\n".join(lines) + "\n")
