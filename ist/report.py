"""What a run leaves to look at: metrics.jsonl, importance.jsonl, importance.png, run.json, and the same for trackers.

`python -m ist.report RUN_DIR` draws RUN_DIR/importance.png again from the files; `--results` compares evaluations.
"""

import argparse
import fcntl
import json
import os
import platform
import resource
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import accelerate
import matplotlib
import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator, PartialState
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ist.config import RULE_KEYS, LayerCounts, UsageError
from ist.training.checkpoint import checkpoint_steps, write_json
from ist.training.command_line import brief, run_command

METRICS, IMPORTANCE, RUN, PICTURE = "metrics.jsonl", "importance.jsonl", "run.json", "importance.png"


def read_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file; none when it is not there. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def read_run(output_dir: Path) -> dict | None:
    """run.json of a run, or None where there is none."""
    path = output_dir / RUN
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UsageError(f"{path} cannot be read ({error}); repair or remove it.") from error


def environment(accelerator: Accelerator | PartialState) -> dict[str, Any]:
    """What run.json says of where a run ran: versions, commit ("-dirty" with uncommitted changes), hardware, ranks."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        folder = Path(__file__).parent
        commit = subprocess.run(git, cwd=folder, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    device = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.processor() or "cpu"
    libraries = (torch, accelerate, transformers, peft)
    return {
        "versions": {"python": platform.python_version(), **{lib.__name__: lib.__version__ for lib in libraries}},
        "commit": commit,
        "hardware": {"device": device, "cpu_cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "world_size": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
    }


def listed(values: Iterable) -> str:
    """Each value once; of values that are such lists themselves, each of theirs."""
    return ", ".join(sorted({one for value in values for one in str(value).split(", ")}))


def joined(heads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{date, commit, versions, hardware} of results that were made apart, each listing what differs."""
    facts: dict[str, Any] = {key: listed(head[key] or "none" for head in heads) for key in ("date", "commit")}
    for name in ("versions", "hardware"):
        facts[name] = {key: listed(head[name][key] for head in heads) for key in heads[0][name]}
    return facts


def require_publishing(publish: str | None, readme: str | None) -> None:
    """Raises UsageError where `publish` below would have no place for the table, before anything is run."""
    if readme and not publish:
        raise UsageError("--readme needs --publish, whose name is that of the markers.")
    if readme and not Path(readme).is_file():
        raise UsageError(f"--readme {readme}: no such file.")
    if readme and f"<!-- {Path(publish).stem} -->" not in Path(readme).read_text():
        raise UsageError(f"--readme {readme} has no place <!-- {Path(publish).stem} --> for the tables.")


def publish(
    file: Path,
    command: str,
    accelerator: Accelerator | PartialState,
    table: str,
    readme: Path | None = None,
    **result: Any,
) -> dict[str, Any]:
    """Write a result as JSON, with command, date, versions, commit and hardware, and its table into a README.

    There the table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being that of the file, whose content is
    returned.
    """
    facts = environment(accelerator)
    head = {"command": command, "date": datetime.now(UTC).date().isoformat()}
    head |= {key: facts[key] for key in ("versions", "commit", "hardware")}
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = head | result
    write_json(file, whole)
    if readme:
        before, rest = readme.read_text().split(f"<!-- {file.stem} -->\n")
        after = rest.split(f"<!-- /{file.stem} -->\n")[1]
        readme.write_text(f"{before}<!-- {file.stem} -->\n{table}\n<!-- /{file.stem} -->\n{after}")
    return whole


def peak_memory_bytes(device: torch.device) -> int:
    """Of this process so far: allocated on the GPU, or resident in memory where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require_tracker(report_to: str) -> None:
    """Stop now, not after the model is loaded, when the tracker cannot start."""
    if report_to == "tensorboard":
        try:
            import tensorboard  # noqa: F401
        except ImportError:
            raise UsageError("--report_to tensorboard needs a package: pip install tensorboard.") from None
    if report_to == "wandb" and os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
        import wandb

        try:
            reason = "" if wandb.login(prompt=False) else "finds no W&B login"
        except Exception as error:  # a wrong key, a service out of reach
            reason = f"cannot start ({brief(error)})"
        if reason:
            raise UsageError(
                f"--report_to wandb (the default) {reason}: run `wandb login`, or set WANDB_MODE=offline, "
                "or pass --report_to none."
            )


# What a resumed run may change: where and how it reports, saves and cuts its batches, not what it computes.
FREE_KEYS = {
    *("output_dir", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint"),
    *("report_to", "run_name", "log_adapter", "peft_config"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
}


def _flat(configuration: dict) -> dict:
    """{"adapter": {"r": 4}} as {"adapter.r": 4}."""
    nested = {key: value for key, value in configuration.items() if isinstance(value, dict)}
    flat = {f"{key}.{inner}": value for key, values in nested.items() for inner, value in values.items()}
    return flat | {key: value for key, value in configuration.items() if key not in nested}


def differing_keys(there: dict, here: dict) -> str:
    """What stands in the way of going on with a run of configuration `there`; empty when nothing does."""
    if ("adapter" in there) != ("adapter" in here):
        return f"peft_config ({'given' if 'adapter' in there else 'none'} there, the other way here)"
    there, here = _flat(there), _flat(here)
    keys = sorted((there.keys() & here.keys()) - FREE_KEYS)
    return ", ".join(f"{key} ({there[key]} there, {here[key]} here)" for key in keys if there[key] != here[key])


def require_writable(output_dir: Path) -> None:
    """Make the run folder if it is not there; stop now when nothing can be written to it.

    Raises:
        UsageError: it is a file, or cannot be made or written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink(missing_ok=True)  # other ranks do the same
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir} cannot be written: {error.strerror}.") from error


def is_finished_run(output_dir: Path, configuration: dict, resume: bool) -> bool:
    """Whether the run in `output_dir` is this one and finished.

    Raises:
        UsageError: it is another one, or it can go on but was not asked to.
    """
    run = read_run(output_dir)
    results = [output_dir / name for name in ("adapter", "model")]
    holds_results = read_lines(output_dir / METRICS) or checkpoint_steps(output_dir) or any(p.exists() for p in results)
    if not holds_results:
        return False
    if run is None:
        raise UsageError(
            f"--output_dir {output_dir} holds results but no {RUN} that says of what. Choose another folder."
        )
    if differing := differing_keys(run["configuration"], configuration):
        raise UsageError(f"--output_dir {output_dir} holds another run's results: {differing}. Choose another folder.")
    if run["status"] != "finished" and not resume:
        raise UsageError(
            f"--output_dir {output_dir} holds a run that is {run['status']}, not finished: go on with it by "
            "--resume_from_checkpoint auto, or choose another folder."
        )
    return run["status"] == "finished"


def keep_lines(path: Path, keep: Callable[[dict], bool]) -> None:
    """Leave only the lines of a .jsonl file that are to be kept; a file that is not there becomes an empty one."""
    lines = [line for line in read_lines(path) if keep(line)]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)


def importance_values(update: dict, trained_counts: Sequence[int]) -> dict[str, float]:
    """An importance update as trackers get it."""
    values: dict[str, float] = {"probe/seconds": update["probe_seconds"]}
    for j, (loss, reward) in enumerate(zip(update["losses"], update["rewards"], strict=True)):
        values |= {f"probe/loss_{j}": loss, f"probe/reward_{j}": reward}
    values |= {f"importance/score/layer_{i:02d}": score for i, score in enumerate(update["scores"])}
    return values | {f"importance/trained_steps/layer_{i:02d}": count for i, count in enumerate(trained_counts)}


def tracked_values(line: dict) -> dict[str, float]:
    """A line of metrics.jsonl or importance.jsonl as trackers get it."""
    if "scores" in line:
        return importance_values(line, ())
    if "validation_loss" in line:
        return {"eval/loss": line["validation_loss"]}
    return {f"train/{key}": value for key, value in line.items() if not isinstance(value, list)}


class RunRecord:
    """The files of one run and its trackers. Every rank makes one and calls it alike; the main process writes.

    Args:
        output_dir: folder of the run.
        accelerator: its trackers get the same numbers, as train/<key>, eval/loss, importance/..., probe/...
        configuration: the resolved arguments, for run.json.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, configuration: dict[str, Any], **facts: Any) -> None:
        self.output_dir = output_dir
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        earlier = read_run(output_dir) or {}
        start = earlier["start"] if earlier and facts.get("resumed_from") else _now()
        self.summary = {"status": "running", "start": start, "end": None, **facts, "configuration": configuration}
        # One curve, however often the run was interrupted; under a sweep the agent names the run.
        self.summary["wandb_run_id"] = os.environ.get("WANDB_RUN_ID") or earlier.get("wandb_run_id")
        self._lost = bool(earlier.get("wandb_run_id")) and not earlier.get("wandb_complete")
        self._scores: list[list[float]] = []
        if self.main:
            self._lock = _lock(output_dir)
            write_json(output_dir / RUN, self.summary)

    def start_trackers(self, run_name: str) -> None:
        """Start the trackers the accelerator was made with.

        W&B: the project is WANDB_PROJECT, else "ist"; the group WANDB_RUN_GROUP, else `run_name`; the job type
        WANDB_JOB_TYPE, else "train"; the run id WANDB_RUN_ID, else the one that the run had before it was interrupted.
        """
        options = {}
        if self.summary["configuration"]["report_to"] == "wandb":
            self.summary["wandb_run_id"] = self.summary["wandb_run_id"] or secrets.token_hex(4)
            options["wandb"] = {
                "name": run_name,
                "dir": str(self.output_dir),
                "id": None if "WANDB_RUN_ID" in os.environ else self.summary["wandb_run_id"],
                "resume": "allow",
                "group": os.environ.get("WANDB_RUN_GROUP", run_name),
                "job_type": os.environ.get("WANDB_JOB_TYPE", "train"),
            }
            if self.main:
                write_json(self.output_dir / RUN, self.summary)
        self.accelerator.project_configuration.logging_dir = str(self.output_dir)
        scalars = {
            key: value if isinstance(value, (int, float, str)) else str(value)
            for key, value in self.summary["configuration"].items()
        }
        self.accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "ist"), scalars, options)
        if self._lost:  # a process that is killed takes along what W&B has not written yet, offline all of it
            lines = [*read_lines(self.output_dir / METRICS), *read_lines(self.output_dir / IMPORTANCE)]
            for line in sorted(lines, key=lambda line: line["step"]):
                self._track(self.accelerator.log, tracked_values(line), step=line["step"])

    def rewind(self, step: int) -> None:
        """Drop lines of steps that a run resumed after `step` finished steps does again: each step stands once."""
        if not self.main:
            return
        # The importance update of step t comes before it: a checkpoint after t steps does not hold it yet.
        for name, keeps in (
            (METRICS, lambda line: line["step"] <= step),
            (IMPORTANCE, lambda line: line["step"] < step),
        ):
            keep_lines(self.output_dir / name, lambda line, keeps=keeps: step > 0 and keeps(line))
        self._scores = [line["scores"] for line in read_lines(self.output_dir / IMPORTANCE)]

    def close(self, status: str, **facts: Any) -> None:
        """The last word of a run, whatever its end: finished, interrupted or failed; draws the picture.

        W&B puts a run of a sweep that is marked as preempting back into the sweep's queue. SIGUSR1 and SIGUSR2 are a
        cluster's; SIGTERM is how W&B itself ends a run of a sweep early, and Ctrl-C is a user's.
        """
        self.summary.update(status=status, end=_now(), **facts)
        if self.main:
            write_json(self.output_dir / RUN, self.summary)
            if (self.output_dir / METRICS).exists():
                draw_importance(self.output_dir)
            if run := self._wandb_run():
                if facts.get("signal") in ("SIGUSR1", "SIGUSR2"):
                    self._track(run.mark_preempting)
                self._track(run.finish, exit_code={"finished": 0, "interrupted": 3}.get(status, 1))
                self.summary["wandb_complete"] = bool(self.accelerator.trackers)
                write_json(self.output_dir / RUN, self.summary)
            os.close(self._lock)

    def artifact(self, folder: Path) -> None:
        """Give a folder (adapter/ or model/) to W&B."""
        if run := self._wandb_run():
            self._track(run.log_artifact, folder, name=f"{folder.name}-{run.id}", type="model")

    def _wandb_run(self) -> Any:
        """W&B's run on the main process, where that is the tracker; else None."""
        trackers = self.accelerator.trackers if self.main else []
        return next((tracker.run for tracker in trackers if tracker.name == "wandb"), None)

    def _track(self, call: Callable, *args: Any, **kwargs: Any) -> None:
        """Tell the trackers. One that fails does not take the run along: from then on there are the files alone."""
        try:
            call(*args, **kwargs)
        except Exception as error:
            print(f"The tracker has failed ({brief(error)}); {self.output_dir} has everything.", file=sys.stderr)
            self.accelerator.trackers = []

    def metrics(self, line: dict) -> None:
        """A logged training step."""
        self._append(METRICS, line)
        self._track(self.accelerator.log, tracked_values(line), step=line["step"])

    def semantic(self, summary: dict, counts: LayerCounts) -> None:
        """What a semantic rule saw before training, and the layers that it left to train."""
        self.summary.update(semantic=summary, layer_counts=counts._asdict())
        if self.main:
            write_json(self.output_dir / RUN, self.summary)
        values = {"semantic/boundary": summary["boundary"]}
        values |= {f"semantic/deviation/space_{i:02d}": value for i, value in enumerate(summary["deviations"])}
        self._track(self.accelerator.log, values, step=self.summary["steps"])

    def validation(self, line: dict) -> None:
        self._append(METRICS, line)
        self._track(self.accelerator.log, tracked_values(line), step=line["step"])

    def importance(self, line: dict, trained_counts: Sequence[int], probe_share: float) -> None:
        """An importance update, how often each layer was trained so far, and the share of time spent on probes."""
        self._append(IMPORTANCE, line)
        step = line["step"]
        values = importance_values(line, trained_counts) | {"probe/time_share": probe_share}
        self._track(self.accelerator.log, values, step=step)
        if self.main:
            self._scores.append(line["scores"])
            for tracker in self.accelerator.trackers:
                image = _heat_map(self._scores)
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                self._track(tracker.log_images, {"importance/heat_map": image[None]}, step=step, **layout)

    def _append(self, name: str, line: dict) -> None:
        if self.main:
            with open(self.output_dir / name, "a") as file:
                file.write(json.dumps(line) + "\n")


def _lock(folder: Path) -> int:
    """Take the folder for this process until it ends: a launcher that was killed may have left the last one running.

    Raises:
        UsageError: another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(f"--output_dir {folder} is being written by another process that is still running.") from error
    except OSError:  # a file system without locks
        pass
    return descriptor


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _heat_map(scores: list[list[float]]) -> np.ndarray:
    """uint8 [H, W, 3]: layers upwards, updates to the right (at most 256 of them), colour = sigmoid of the score."""
    columns = np.linspace(0, len(scores) - 1, min(len(scores), 256)).astype(int)
    probabilities = 1 / (1 + np.exp(-np.array(scores)[columns].T[::-1]))
    rgb = matplotlib.colormaps["viridis"](probabilities)[..., :3]
    return (255 * rgb).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)


def draw_importance(output_dir: Path) -> Path:
    """importance.png: sigmoid of every layer's score over steps (paper, Figure 4), and how often each was trained.

    Raises:
        UsageError: the folder holds no run.
    """
    run = read_run(output_dir)
    if run is None or "trained_counts" not in run:
        raise UsageError(f"{output_dir} holds no run with layers to draw (no {RUN} with trained_counts).")
    path = output_dir / PICTURE
    title = f"{output_dir.name}: {run['status']}"
    updates, semantic = read_lines(output_dir / IMPORTANCE), run.get("semantic")
    plot_importance(path, updates, run["trained_counts"], run["steps"], title, semantic)
    return path


def _plot_semantic(axis: Axes, semantic: dict) -> None:
    """Deviation of each latent space; the layers that are frozen for good are shaded, space k is above layer k - 1."""
    deviations, boundary = semantic["deviations"], semantic["boundary"]
    axis.plot(range(len(deviations)), deviations, marker=".", color="0.2", lw=1.2)
    axis.axvspan(0, boundary + 1, color="tab:blue", alpha=0.15, label=f"frozen: layers up to {boundary}")
    axis.set(xlabel="latent space", ylabel="deviation", title="Mean cosine distance from the semantic bases")
    axis.legend(loc="lower left", fontsize="small")


def plot_importance(
    path: Path, updates: list[dict], counts: list[int], steps: int, title: str, semantic: dict | None = None
) -> None:
    """The picture, from the lines of importance.jsonl and the steps in which each layer was trained.

    `semantic` is what SemanticFreezing.summary gives; its panel takes the place of importance without updates.
    """
    n_layers = len(counts)
    colours = ScalarMappable(Normalize(0, max(1, n_layers - 1)), "viridis")
    panels = (["semantic"] if semantic else []) + (["importance"] if updates or not semantic else []) + ["counts"]
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), width_ratios=[3] * (len(panels) - 1) + [2.2]), strict=True))
    right = axes["counts"]
    if semantic:
        _plot_semantic(axes["semantic"], semantic)
    if "importance" in axes:
        _plot_scores(axes["importance"], updates, colours)
        figure.colorbar(colours, ax=axes["importance"], label="layer")
    right.bar(range(n_layers), counts, color=[colours.to_rgba(i) for i in range(n_layers)])
    right.axhline(sum(counts) / n_layers, color="0.3", ls="--", lw=1, label="mean over layers")
    right.set(xlabel="layer", ylabel="steps", title=f"Steps each layer was trained (of {steps})")
    right.legend(loc="upper left", fontsize="small")
    for axis in (*(axes[name].xaxis for name in panels), right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _plot_scores(left: Axes, updates: list[dict], colours: ScalarMappable) -> None:
    n_layers = len(updates[0]["probabilities"]) if updates else 0
    for i in range(n_layers):
        at = [0] + [update["step"] for update in updates]
        left.plot(at, [0.5] + [update["probabilities"][i] for update in updates], color=colours.to_rgba(i), lw=1.2)
    if not updates:
        left.text(0.5, 0.5, "no importance updates in this run", ha="center", transform=left.transAxes)
    left.set(ylim=(0, 1), xlabel="optimizer step", ylabel="sigmoid(importance)", title="Layer importance")


def plot_importance_panels(path: Path, runs: dict[str, list[dict]]) -> None:
    """A panel for each of several runs: importance of every layer over steps (paper, Figure 4).

    Args:
        runs: {title: lines of importance.jsonl, of which step and probabilities are read}.
    """
    n_layers = max(len(updates[0]["probabilities"]) for updates in runs.values())
    colours = ScalarMappable(Normalize(0, max(1, n_layers - 1)), "viridis")
    figure = Figure(figsize=(4.6 * len(runs), 4.2), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (title, updates) in zip(axes, runs.items(), strict=True):
        _plot_scores(axis, updates, colours)
        axis.set_title(title)
    figure.colorbar(colours, ax=axes, label="layer")
    figure.savefig(path, dpi=110)


def plot_arms(path: Path, arms: dict[str, dict]) -> None:
    """Validation loss of each arm over steps and over time, and its memory by part (paper, Figure 1).

    Args:
        arms: {name: {runs: [{validation: [[step, loss]]}], step_seconds, bytes: {part: bytes}}}; lines are means over
            runs, bands their range.
    """
    figure = Figure(figsize=(15, max(4.6, 1.5 + 0.3 * len(arms))), layout="constrained")
    by_step, by_time, memory = figure.subplots(1, 3, width_ratios=[3, 3, 2.2])
    colours = list(islice(cycle(matplotlib.colormaps["tab10" if len(arms) <= 10 else "tab20"].colors), len(arms)))
    for colour, (name, arm) in zip(colours, arms.items(), strict=True):
        steps = np.array([step for step, _ in arm["runs"][0]["validation"]])
        losses = np.array([[loss for _, loss in run["validation"]] for run in arm["runs"]])
        for axis, at in ((by_step, steps), (by_time, steps * arm["step_seconds"])):
            axis.plot(at, losses.mean(axis=0), marker=".", color=colour, lw=1.4, label=name)
            axis.fill_between(at, losses.min(axis=0), losses.max(axis=0), color=colour, alpha=0.15, lw=0)
    by_step.set(xlabel="optimizer step", ylabel="validation loss", title="Validation loss, mean and range over seeds")
    by_time.set(xlabel="seconds of training steps, probes included", title="The same over time")
    curves = [[loss for _, loss in run["validation"]] for arm in arms.values() for run in arm["runs"]]
    lowest, second = min(map(min, curves)), max(curve[min(1, len(curve) - 1)] for curve in curves)
    margin = 0.05 * (second - lowest) or 0.01
    for axis in (by_step, by_time):
        axis.set_ylim(lowest - margin, second + margin)  # the model as it is is off the top
    if len(arms) <= 8:
        by_step.legend(fontsize="small")
    else:  # would hide the curves
        figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    names = list(arms)[::-1]
    ends = np.zeros(len(names))
    shades = {"weights": "0.75", "optimizer": "tab:blue", "gradients": "tab:orange", "saved": "tab:red"}
    for part, shade in shades.items():
        sizes = np.array([arms[name]["bytes"][part] / 1e6 for name in names])
        label = {"saved": "saved for the backward"}.get(part, part)
        memory.barh(names, sizes, left=ends, color=shade, label=label)
        ends += sizes
    memory.set(xlabel="MB; saved for the backward: mean over steps", title="Memory by part, counted")
    memory.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.35, 1.06), ncols=4)
    memory.margins(x=0.15)
    figure.savefig(path, dpi=110)


def read_results(folder: Path) -> dict[str, Any]:
    """A result folder of `python -m ist.evaluate`: {file, model, arm, seed, right: {task: [0 or 1 for each row]}}.

    The arm is told from the run.json beside the adapter: the method, and the selection unless it is all layers.

    Raises:
        UsageError: no finished evaluation.
    """
    file = folder / "summary.json"
    try:
        summary = json.loads(file.read_text())
        lines = {task: read_lines(folder / f"{task}.jsonl") for task in summary["tasks"]}
        right = {task: [int(line["right"]) for line in rows] for task, rows in lines.items()}
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder} holds no finished evaluation: {brief(error)}.") from error
    training = summary["training"]
    settings = training["configuration"] if training else {}
    model = settings.get("model_name_or_path", summary["arguments"]["model_name_or_path"])  # of a model/: its base
    if not training:
        arm, seed = summary["arguments"]["adapter"] or "base", None
    else:
        arm = (settings.get("adapter") or {"peft_type": settings["peft_method"]})["peft_type"].upper()
        arm = "FULL" if arm == "NONE" else arm
        seed = settings["seed"]
        if settings["selection"] != "all":
            arm += f" + {settings['selection']}"
            arm += "" if settings["trained_layers"] == 0.25 else f" ({settings['trained_layers']} layers)"
            keys = [key for key, (_, default) in RULE_KEYS.items() if settings.get(key) not in (None, default)]
            arm += "".join(f" {key} {settings[key]}" for key in keys)
    return {"file": str(file), "model": Path(model).name, "arm": arm, "seed": seed, "right": right}


def _interval(pairs: list[tuple[dict, dict]], tasks: list[str], draws: int = 2000) -> list[float]:
    """95 % interval of the mean difference over tasks, by bootstrap: seeds are drawn, then pairs of rows of a task."""
    generator = np.random.default_rng(0)
    differences = [[np.subtract(one["right"][task], two["right"][task]) for task in tasks] for one, two in pairs]

    def resampled(rows: np.ndarray) -> np.ndarray:
        return rows[generator.integers(len(rows), size=len(rows))]

    means = []
    for _ in range(draws):
        seeds = generator.integers(len(pairs), size=len(pairs))
        means.append(np.mean([resampled(rows).mean() for i in seeds for rows in differences[i]]))
    return np.percentile(means, [2.5, 97.5]).tolist()


def spearman(one: Sequence[float], two: Sequence[float]) -> float:
    """Spearman's rho; equal values share their mean rank. NaN where all values of a side are equal."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        values = np.array(values)
        return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])

    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks(one), ranks(two))[0, 1])


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """Accuracy per task and arm over seeds, and differences of a method's arms in pairs, from result folders.

    Raises:
        UsageError: a folder holds no finished evaluation, the folders have no task in common, or other rows of one.
    """
    results = [read_results(folder) for folder in folders]
    tasks = [task for task in results[0]["right"] if all(task in result["right"] for result in results)]
    if not tasks:
        raise UsageError("the result folders have no task in common, so there is nothing to compare.")
    for task in tasks:
        if len({len(result["right"][task]) for result in results}) > 1:
            raise UsageError(f"the result folders have different numbers of rows of {task}: evaluate the same ones.")
    arms: dict[tuple[str, str], list[dict]] = {}
    for result in results:
        arms.setdefault((result["model"], result["arm"]), []).append(result)

    accuracy, differences = [], []
    for (model, arm), members in arms.items():
        values = np.array([[np.mean(result["right"][task]) for task in tasks] for result in members])
        values = np.column_stack([values, values.mean(axis=1)])
        spread = values.std(axis=0, ddof=1).tolist() if len(members) > 1 else [None] * values.shape[1]
        cells = zip([*tasks, "average"], values.mean(axis=0).tolist(), spread, strict=True)
        accuracy.append(
            {
                **{"model": model, "arm": arm, "seeds": [result["seed"] for result in members]},
                "accuracy": {task: {"mean": mean, "std": std} for task, mean, std in cells},
                "files": [result["file"] for result in members],
            }
        )
        method, _, selection = arm.partition(" + ")
        for other in (method, f"{method} + random") if selection and selection != "random" else ():
            by_seed = {result["seed"]: result for result in arms.get((model, other), [])}
            pairs = [(result, by_seed[result["seed"]]) for result in members if result["seed"] in by_seed]
            if pairs:
                points = [np.mean([np.mean(a["right"][t]) - np.mean(b["right"][t]) for a, b in pairs]) for t in tasks]
                points = [*map(float, points), float(np.mean(points))]
                differences.append(
                    {
                        **{"model": model, "arms": f"{arm} − {other}", "seeds": [one["seed"] for one, _ in pairs]},
                        "difference": dict(zip([*tasks, "average"], points, strict=True)),
                        "interval": _interval(pairs, tasks),
                        "files": [result["file"] for pair in pairs for result in pair],
                    }
                )
    return {"tasks": tasks, "accuracy": accuracy, "differences": differences}


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def comparison_table(comparison: dict) -> str:
    """Markdown: accuracy in percent with its spread over seeds, differences in points with their 95 % intervals."""

    def percent(cell: dict) -> str:
        return f"{100 * cell['mean']:.1f}" + ("" if cell["std"] is None else f" ± {100 * cell['std']:.1f}")

    columns = [*comparison["tasks"], "average"]
    rows = []
    for row in comparison["accuracy"]:
        cells = [percent(row["accuracy"][column]) for column in columns]
        rows.append([row["model"], row["arm"], str(len(row["files"])), *cells, ", ".join(row["files"])])
    lines = markdown_table(["model", "arm", "seeds", *columns, "from"], rows)
    rows = []
    for row in comparison["differences"]:
        cells = [f"{100 * row['difference'][column]:+.1f}" for column in columns]
        interval = " … ".join(f"{100 * end:+.1f}" for end in row["interval"])
        rows.append([row["model"], row["arms"], str(len(row["seeds"])), *cells, interval, ", ".join(row["files"])])
    if rows:
        lines += [
            "",
            *markdown_table(["model", "points", "seeds", *columns, "95 % interval of the average", "from"], rows),
        ]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ist.report",
        description="Draws RUN_DIR/importance.png from a run's files; or compares results of python -m ist.evaluate: "
        "accuracy per task and arm over seeds, and in pairs the differences to all layers and to random ones.",
    )
    parser.add_argument("run_dir", nargs="?", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--importance", nargs="+", metavar="NAME=RUN_DIR", help="runs of several tasks, drawn side by side (Figure 4)"
    )
    parser.add_argument("--results", nargs="+", type=Path, metavar="DIR", help="result folders to compare")
    parser.add_argument("--output_dir", type=Path, metavar="DIR", help="where comparison.md and comparison.json go")
    args = parser.parse_args(argv)
    if sum(given is not None for given in (args.run_dir, args.results, args.importance)) != 1:
        parser.error("give RUN_DIR, or --results DIR [DIR ...], or --importance NAME=RUN_DIR [NAME=RUN_DIR ...]")
    if args.importance:
        if not args.output_dir:
            parser.error("--importance needs --output_dir")
        runs = {}
        for item in args.importance:
            name, _, folder = ("", "", item) if Path(item).is_dir() else item.partition("=")
            runs[name or Path(folder).name] = updates = read_lines(Path(folder) / IMPORTANCE)
            if not updates:
                raise UsageError(f"--importance {item}: {folder} has no importance updates to draw.")
        require_writable(args.output_dir)
        plot_importance_panels(args.output_dir / "importance-panels.png", runs)
        print(args.output_dir / "importance-panels.png")
        return 0
    if args.run_dir:
        print(draw_importance(args.run_dir))
        return 0
    comparison = compare(args.results)
    print(comparison_table(comparison))
    if args.output_dir:
        require_writable(args.output_dir)
        write_json(args.output_dir / "comparison.json", comparison)
        (args.output_dir / "comparison.md").write_text(comparison_table(comparison) + "\n")
    return 0


if __name__ == "__main__":
    run_command(main)
