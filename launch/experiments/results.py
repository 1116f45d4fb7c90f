"""The results of an experiment as files: one for each run, and experiment.json for the rest.

<arm>-<seed>.json    a run: configuration, commit, hardware, losses over steps, layers trained, answers
experiment.json      recipe, data, tuning trials, and of each arm its settings, bytes and seconds per step
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ist.benchmark.arms import WINDOW, arguments_of
from ist.benchmark.speed import ratio_of, take_turns
from ist.instruments import effective_layers
from ist.report.tables import joined, listed
from ist.training.command_line import UsageError
from ist.training.files import (
    IMPORTANCE,
    METRICS,
    file_digest,
    keep_lines,
    read_lines,
    read_object,
    reading,
    write_json,
    write_text,
    writing,
)
from ist.training.memory import SavedByLayer, counting
from ist.training.model import plan_layers
from ist.training.peft_config import make_peft_config
from ist.training.record import read_run
from launch.experiments.design import Arm, file_stem
from launch.experiments.runner import Runner

SUMMARY = "experiment.json"
TIMED_AT_ONCE = 3  # arms that are timed together with the first one: all are in memory


def run_name(arm: str, seed: int) -> str:
    """The file of a run: "IST 8, mu 1000" of seed 1 is ist-8-mu-1000-1.json."""
    return f"{file_stem(arm)}-{seed}.json"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SUMMARY, summary)


def write_results(folder: Path, summary: dict[str, Any], runs: Sequence[dict[str, Any]]) -> None:
    """Write a folder of results; files of runs that are not among `runs` are removed."""
    write_summary(folder, summary)
    names = {run_name(run["arm"], run["seed"]): run for run in runs}
    for name, run in names.items():
        write_result(folder, run) if "row_losses" in run else write_json(folder / name, run)
    for file in folder.glob("*.json"):
        if file.name not in (SUMMARY, *names):
            file.unlink()


def read_results(folder: Path) -> dict[str, Any]:
    """experiment.json, its arms with their `runs` by seed, and the joined facts (date, commit, hardware, versions).

    Of an experiment that measures rows, whose results are written run by run, those that are there.

    Raises:
        UsageError: no folder of results, or the file of a run is missing.
    """
    if not (folder / SUMMARY).exists():
        raise UsageError(f"{folder} holds no whole results of an experiment: no {SUMMARY}.")
    results = read_object(folder / SUMMARY)
    with reading(folder, "a folder with the results of an experiment"):
        for name, arm in results["arms"].items():
            files = [folder / run_name(name, seed) for seed in arm.get("seeds", results["seeds"])]
            if results.get("measure") == "rows":
                files = [file for file in files if file.exists()]
            if missing := [file for file in files if not file.exists()]:
                raise UsageError(f"{folder} holds no whole results of an experiment: no {missing[0].name}.")
            arm["runs"] = [read_object(file) for file in files]
        runs = [run for arm in results["arms"].values() for run in arm["runs"]]
        if not runs:
            raise UsageError(f"{folder} holds no results of an experiment yet: no run is finished.")
        return results | joined(runs)


def finish_run(runner: Runner, inputs: dict[str, str], folders: Sequence[Path]) -> Callable[..., dict[str, Any]]:
    """A function of (arm, keys of a run) that does the run and writes its result into `folders`, as soon as it is
    there; a result that one of them has, of the same keys and inputs, is taken from there.

    Args:
        inputs: {name: digest} of what the run reads.
    """

    def finish(arm: Arm, flags: dict[str, Any]) -> dict[str, Any]:
        own = dict(inputs)
        if arm.scores_of:
            own["oracle_scores"] = file_digest(Path(arm.settings["oracle_scores"]))
        result = known_result(arm.name, flags, own, folders)
        if result is None:
            runner.run(flags, f"seed {flags['seed']}")
            result = row_result(arm.name, flags) | {"inputs": own}
        for folder in folders:
            write_result(folder, result)
        return result

    return finish


def configuration_of(flags: dict[str, Any]) -> dict[str, Any]:
    """The keys of a run without the names of files."""
    return {key: value for key, value in flags.items() if not isinstance(value, Path) and key != "oracle_scores"}


def known_result(
    arm: str, flags: dict[str, Any], inputs: dict[str, str], folders: Sequence[Path]
) -> dict[str, Any] | None:
    """
    Raises:
        UsageError: a folder has a result of this arm and seed that was made otherwise.
    """
    for file in (folder / run_name(arm, flags["seed"]) for folder in folders):
        if not file.exists():
            continue
        result, now = read_object(file), {"configuration": configuration_of(flags), "inputs": inputs}
        for kind, values in now.items():
            there = result.get(kind) or {}
            if other := sorted(key for key in values.keys() | there.keys() if values.get(key) != there.get(key)):
                raise UsageError(f"{file} is the result of another {', '.join(other)}: remove it, or rename the arm.")
        return result
    return None


def row_result(arm: str, flags: dict[str, Any]) -> dict[str, Any]:
    """The result of a finished run whose test rows were measured one by one."""
    run = Path(flags["output_dir"])
    result, _ = result_of(arm, flags)
    record, lines = read_run(run), read_lines(run / "evaluation" / "test.losses.jsonl")
    updates = read_lines(run / IMPORTANCE)
    seconds = [line["step_seconds"] for line in read_lines(run / METRICS) if "step_seconds" in line]
    with reading(run, "a run with the losses of its test rows"):
        tokens = [line["tokens"] for line in lines]
        loss = sum(line["loss"] for line in lines) / sum(tokens)
        result |= {
            **{"configuration": configuration_of(flags), "folder": run.name},
            **{"global_batch_size": record["configuration"]["global_batch_size"]},
            **{"validation": [[record["steps"], loss]], "effective_layers": effective_layers(record["trained_counts"])},
            **{"seconds_of_steps": round(sum(seconds), 1)},
            **{"row_losses": [round(line["loss"], 3) for line in lines], "row_tokens": tokens},
        }
    if measured := [update["effects"] for update in updates if "effects" in update]:
        # Of each update as it sees the layers one against another: later ones are smaller, as the loss is.
        shares = [[(e - statistics.mean(one)) / statistics.pstdev(one) for e in one] for one in measured]
        result["effects"] = [round(statistics.mean(layer), 4) for layer in zip(*shares, strict=True)]
    return result


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """A line for each key: some of the values are long lists."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in result.items())
    write_text(folder / run_name(result["arm"], result["seed"]), "{\n" + lines + "\n}\n")


def bytes_by_part(flags: dict[str, Any], trained: Sequence[Sequence[int]], tokens: float) -> dict[str, float]:
    """{weights, optimizer, gradients, saved: bytes}, counted as on a GPU; `saved` are the tensors that a
    forward keeps for the backward, the mean over steps in which the layers `trained` trained.

    Args:
        tokens: of a row of a micro-batch, which is counted without padding.
    """
    args = arguments_of(flags)
    args, layers, config, _ = plan_layers(args, sharded=False)
    n_layers, peft_config = layers.n_layers, make_peft_config(args)
    shape = (args.per_device_train_batch_size, round(tokens))
    with counting(args, peft_config, config, shape) as counter:
        count = max(1, n_layers // 4)
        last = range(n_layers - count, n_layers)
        sets = (range(n_layers), [0, *last[1:]], last)
        by_layer = SavedByLayer.solved(*map(counter.saved, sets), n_layers, count)
        step = counter.step(trained[0], set().union(*trained))
    saved = statistics.mean(by_layer.saved(layers, n_layers) for layers in trained)
    return {"weights": step.weights, "optimizer": step.optimizer, "gradients": step.gradients, "saved": saved}


def result_of(arm: str, flags: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]]]:
    """(the results of a finished run as its file has them, the layers trained at each step)."""
    run = Path(flags["output_dir"])
    record, lines = read_run(run), read_lines(run / METRICS)
    steps = [line for line in lines if "loss" in line]
    updates = read_lines(run / IMPORTANCE)
    result = {
        **{"arm": arm, "seed": flags["seed"], "date": record["end"][:10], "folder": str(run)},
        **{key: record[key] for key in ("commit", "hardware", "versions")},
        "configuration": {key: value for key, value in flags.items() if not isinstance(value, Path)},
        "validation": [[line["step"], line["validation_loss"]] for line in lines if "validation_loss" in line],
        "loss": [round(line["loss"], 5) for line in steps],
        "trained_counts": record["trained_counts"],
        "updates": [{"step": u["step"], "probabilities": [round(p, 5) for p in u["probabilities"]]} for u in updates],
    }
    file = run / "evaluation" / "summary.json"
    if file.exists():
        summary = read_object(file)
        with reading(file, "the summary of an evaluation"):
            result |= {"exact": summary["average"], "tasks": {k: v["accuracy"] for k, v in summary["tasks"].items()}}
    return result, [line["trained_layers"] for line in steps]


def measure_seconds(file: Path, arms: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{arm: {step_seconds, ratio: to the first arm's, interval: 95 %, by bootstrap of steps}}.

    Each arm takes turns with the first one, step by step, a few arms at a time and nothing else: runs at the same time
    hold one another up. Arms that `file` has are not measured again.

    Args:
        arms: {name: keys of train_ist.py}; arms whose steps are alike are timed once.
    """

    def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key not in keys}

    own = ("output_dir", "max_steps", "validation_file", "eval_steps")
    settings = {name: without(flags, *own) for name, flags in arms.items()}
    alike = {name: without(flags, "seed", "learning_rate", "score_lr") for name, flags in settings.items()}
    text = {name: json.dumps(values, sort_keys=True, default=str) for name, values in alike.items()}
    first = next(iter(arms))
    lines = {line["settings"]: line for line in read_lines(file) if line.get("reference") == text[first]}
    others = {text[name]: name for name in reversed(arms) if text[name] != text[first]} or {text[first]: first}
    names = [name for name in reversed(others.values()) if text[name] not in lines]
    steps = WINDOW * (11 if torch.cuda.is_available() else 3)
    keep_lines(file, lambda line: True)
    for i in range(0, len(names), TIMED_AT_ONCE):
        group = {f"arm {name}": settings[name] for name in (first, *names[i : i + TIMED_AT_ONCE])}
        found = take_turns(group, steps, False, lambda line: print(f"seconds  {line}", flush=True))
        for name in names[i : i + TIMED_AT_ONCE]:
            this, reference = found[f"arm {name}"], found[f"arm {first}"]
            ratio, interval = ratio_of([this | {"bare": reference["turns"]}])
            line = {"settings": text[name], "reference": text[first], "seconds": this["total"]}
            lines[text[name]] = line | {"first": reference["total"], "ratio": ratio, "interval": interval}
            with open(file, "a") as stream:
                stream.write(json.dumps(lines[text[name]]) + "\n")
    seconds = statistics.median(lines[text[name]]["first"] for name in arms if text[name] in lines)
    itself = {"ratio": 1.0, "interval": [1.0, 1.0]}
    kept = {name: itself if text[name] == text[first] else lines[text[name]] for name in arms}
    return {
        name: {"step_seconds": one["ratio"] * seconds, "ratio": one["ratio"], "interval": one["interval"]}
        for name, one in kept.items()
    }


def the_same(sizes: set[int]) -> int:
    """The global batch size that all runs had.

    Raises:
        UsageError: they differ, so that the runs cannot be compared.
    """
    if len(sizes) > 1:
        raise UsageError(f"runs differ in global_batch_size ({listed(sizes)}): choose another --output_dir.")
    return next(iter(sizes))
