"""The record of a run: metrics.jsonl, importance.jsonl, pictures, run.json, and the same numbers for trackers."""

import math
import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ist.config import LayerCounts
from ist.instruments import remarks
from ist.training.arguments import ARGUMENTS
from ist.training.checkpoint import checkpoint_steps
from ist.training.command_line import UsageError, brief
from ist.training.figures import heat_map, plot_importance
from ist.training.files import (
    IMPORTANCE,
    LOSS_PICTURE,
    METRICS,
    PICTURE,
    RESERVE,
    RUN,
    WriteError,
    append_line,
    keep_lines,
    read_lines,
    read_object,
    replacing,
    write_json,
)
from ist.training.loss_figure import plot_loss
from ist.training.packages import installed
from ist.training.trackers import Trackers, importance_values, tracked_values

RESERVE_BYTES = 1 << 16
CONTENT = {  # digests in a configuration, and of what
    "model_digest": "the base model's files",
    "train_digest": "the encoded training rows",
    "validation_digest": "the encoded validation rows",
    "adapter_digest": "the files of the adapter that it went on from",
    "importance_digest": "the scores that it began with",
}
_SAME = {name: value for group in ARGUMENTS for name, value in getattr(group, "same_values", {}).items()}


def read_run(output_dir: Path) -> dict | None:
    """run.json of a run, or None where there is none.

    Raises:
        ReadError: it is no JSON object, or cannot be read.
        UsageError: it is not that of a run.
    """
    path = output_dir / RUN
    if not path.exists():
        return None
    run = read_object(path)
    for key, kind in {"status": str, "start": str, "configuration": dict}.items():
        if not isinstance(run.get(key), kind):
            raise UsageError(f"{path} is not that of a run: it has no {key}. Repair or remove it.")
    return run


def flattened(configuration: dict) -> dict:
    """{"adapter": {"r": 4}} as {"adapter.r": 4}."""
    nested = {key: value for key, value in configuration.items() if isinstance(value, dict)}
    flat = {f"{key}.{inner}": value for key, values in nested.items() for inner, value in values.items()}
    return flat | {key: value for key, value in configuration.items() if key not in nested}


def _canonical(value: Any) -> Any:
    return _SAME.get(value, value) if isinstance(value, str) else value


def total_steps(configuration: dict) -> int | None:
    """Optimizer steps of a run, from its configuration; None where it has no rows yet."""
    if configuration["max_steps"] != -1:
        return configuration["max_steps"]
    if "train_rows" not in configuration:
        return None
    rows = configuration["num_train_epochs"] * configuration["train_rows"]
    return math.ceil(rows / configuration["global_batch_size"])


def differing_keys(there: dict, here: dict, longer: bool = False) -> str:
    """The keys, with both values, that keep one configuration from resuming another's run; empty without any.

    Args:
        longer: more steps than there are served.
    """
    for key in ("peft_config", "adapter_name_or_path"):
        if bool(there.get(key)) != bool(here.get(key)):
            return f"{key} ({'given' if there.get(key) else 'none'} there, the other way here)"
    steps = total_steps(there), total_steps(here)
    there, here = flattened(there), flattened(here)
    free = {key for group in ARGUMENTS for key in getattr(group, "free_keys", ())} | {"max_steps", "num_train_epochs"}
    digests = CONTENT.keys() & there.keys()
    # Names count where there are no digests; and in the message, where those differ. Before the rows are read, not yet.
    if digests and (not CONTENT.keys() & here.keys() or all(there[key] == here.get(key) for key in digests)):
        free |= {key for group in ARGUMENTS for key in getattr(group, "content_keys", ())}
    differing = []
    for key in sorted((there.keys() & here.keys()) - free):
        if _canonical(here[key]) != _canonical(there[key]):
            changed = f"{CONTENT[key]} have changed" if key in CONTENT else f"{there[key]} there, {here[key]} here"
            differing.append(f"{key} ({changed})")
    if None not in steps and steps[0] != steps[1] and not (longer and steps[1] > steps[0]):
        differing.append(f"max_steps ({steps[0]} there, {steps[1]} here)")
    return ", ".join(differing)


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


def is_finished_run(output_dir: Path, configuration: dict, resume: bool, checkpoint: bool = True) -> bool:
    """Whether the run in `output_dir` is this one and finished.

    Args:
        checkpoint: a whole one was found to go on from.

    Raises:
        UsageError: it is another one, or it can go on but was not asked to.
    """
    run = read_run(output_dir)
    results = [output_dir / name for name in ("adapter", "model")]
    holds_results = read_lines(output_dir / METRICS) or checkpoint_steps(output_dir) or any(p.exists() for p in results)
    left = [output_dir / name for name in (METRICS, IMPORTANCE, PICTURE, LOSS_PICTURE)]
    if run is None and not holds_results:  # files that are not a run's are not overwritten either
        holds_results = any(path.exists() and path.stat().st_size for path in left)
    if not holds_results:
        return False
    if run is None:
        raise UsageError(f"--output_dir {output_dir} holds results but no {RUN}. Choose another folder.")
    if differing := differing_keys(run["configuration"], configuration, longer=resume):
        raise UsageError(f"--output_dir {output_dir} holds another run's results: {differing}. Choose another folder.")
    result = output_dir / ("model" if configuration["peft_method"] == "none" else "adapter")
    whole = any(result.glob("*.safetensors"))
    if (run["status"] != "finished" or not whole) and not resume:
        state = run["status"] if run["status"] != "finished" else f"without its {result.name}/"
        raise UsageError(
            f"--output_dir {output_dir} holds a run that is {state}, not finished: go on with it by "
            "--resume_from_checkpoint auto, or choose another folder."
        )
    if run["status"] != "finished" or not whole:
        return False
    steps = total_steps(run["configuration"]), total_steps(configuration)
    if None in steps or steps[1] <= steps[0]:
        return True
    if not checkpoint:
        raise UsageError(
            f"--output_dir {output_dir} holds a run finished after {steps[0]} steps, without a whole checkpoint to go "
            f"on from (--save_steps writes them). Begin from its {result.name}/ in another folder."
        )
    return False


def _is_metrics(line: dict) -> bool:
    return type(line.get("step")) is int and ("loss" in line or "validation_loss" in line)


def metrics_of(output_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, each with a step and a training or validation loss."""
    return [line for line in read_lines(output_dir / METRICS) if _is_metrics(line)]


def _is_importance(line: dict) -> bool:
    return type(line.get("step")) is int and isinstance(line.get("scores"), list)


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
        self.trackers = Trackers(accelerator, configuration["report_to"], str(output_dir))
        self._log_layers = configuration["log_layers"]
        self.main = accelerator.is_main_process
        earlier = read_run(output_dir) or {}
        start = earlier["start"] if earlier and facts.get("resumed_from") else _now()
        self.summary = {"status": "running", "start": start, "end": None, **facts, "configuration": configuration}
        # One curve, however often the run was interrupted; under a sweep the agent names the run.
        self.summary["wandb_run_id"] = os.environ.get("WANDB_RUN_ID") or earlier.get("wandb_run_id")
        self._lost = bool(earlier.get("wandb_run_id")) and not earlier.get("wandb_complete")
        self._updates: list[dict] = []  # lines of importance.jsonl
        if self.main:
            # Given back by close(), so that run.json can be written when the disk has become full.
            with replacing(output_dir / RESERVE) as file:
                file.write_bytes(os.urandom(RESERVE_BYTES))
            write_json(output_dir / RUN, self.summary)

    def open(self, step: int, run_name: str) -> None:
        """The run goes on after `step` finished steps. All ranks wait until its files are so."""
        self._rewind(step)
        self.accelerator.wait_for_everyone()
        self._start_trackers(step, run_name)

    def _start_trackers(self, step: int, run_name: str) -> None:
        """Start the trackers the accelerator was made with. A run that resumes is not lost with its tracker.

        W&B: the project is WANDB_PROJECT, else "ist"; the group WANDB_RUN_GROUP, else `run_name`; the job type
        WANDB_JOB_TYPE, else "train"; the run id WANDB_RUN_ID, else the one that the run had before it was interrupted.

        Raises:
            UsageError: the tracker of a new run cannot start.
        """
        options = {}
        if "wandb" in self.trackers.names:
            self.summary["wandb_run_id"] = self.summary["wandb_run_id"] or secrets.token_hex(4)
            options["wandb"] = {
                "dir": str(self.output_dir),
                "id": None if "WANDB_RUN_ID" in os.environ else self.summary["wandb_run_id"],
                "resume": "allow",
                "group": os.environ.get("WANDB_RUN_GROUP", run_name),
                "job_type": os.environ.get("WANDB_JOB_TYPE", "train"),
            }
            if self.main:
                write_json(self.output_dir / RUN, self.summary)
        self.accelerator.project_configuration.logging_dir = str(self.output_dir)
        project = os.environ.get("WANDB_PROJECT", "ist")
        self.trackers.start(project, run_name, self.summary["configuration"], options, required=step == 0)
        if self._lost:  # lines that W&B had not written yet are lost with a killed process, offline all of them
            lines = [*read_lines(self.output_dir / METRICS), *read_lines(self.output_dir / IMPORTANCE)]
            for line in sorted(lines, key=lambda line: line["step"]):
                self.trackers.log(tracked_values(line, self._log_layers), line["step"], only="wandb")
                if "scores" in line:
                    self.trackers.layers(line, (), line["step"])

    def _rewind(self, step: int) -> None:
        """Drop lines of steps that a run resumed after `step` finished steps does again: each step stands once."""
        if not self.main:
            return
        # The importance update of step t comes before it: a checkpoint after t steps does not hold it yet.
        for name, keeps in (
            (METRICS, lambda line: _is_metrics(line) and line["step"] <= step),
            (IMPORTANCE, lambda line: _is_importance(line) and line["step"] < step),
        ):
            keep_lines(self.output_dir / name, lambda line, keeps=keeps: step > 0 and keeps(line))
        self._updates = read_lines(self.output_dir / IMPORTANCE)

    def progress(self, **facts: Any) -> None:
        """Update run.json's content, which is written at the next change of status."""
        self.summary.update(facts)

    def close(self, status: str, quiet: bool = False, **facts: Any) -> None:
        """The last word of a run, whatever its end: finished, interrupted or failed; draws the pictures.

        W&B puts a run of a sweep that is marked as preempting back into the sweep's queue. SIGUSR1 and SIGUSR2 are a
        cluster's; SIGTERM is how W&B itself ends a run of a sweep early, and Ctrl-C is a user's.

        Args:
            quiet: no line where run.json cannot be written: the run has ended with a WriteError, which is one.

        Raises:
            WriteError: the run is finished, and run.json cannot say so.
        """
        self.summary.update(status=status, end=_now(), **facts)
        if not self.main:
            return
        with suppress(OSError):  # a disk that is read-only by now
            (self.output_dir / RESERVE).unlink(missing_ok=True)
        self._write_summary(required=status == "finished", quiet=quiet)
        if (self.output_dir / METRICS).exists():
            for name, draw in ((PICTURE, draw_importance), (LOSS_PICTURE, draw_loss)):
                try:
                    draw(self.output_dir)
                except Exception as error:  # whatever matplotlib or the disk says: a picture costs no run
                    if status != "failed":  # a failed run says why it failed, and no more
                        again = f"python -m ist.report {self.output_dir} draws it again"
                        print(f"{name} is not drawn ({brief(error)}); {again}.", file=sys.stderr)
        tracker, run = self.trackers.wandb()
        if run:
            if facts.get("signal") in ("SIGUSR1", "SIGUSR2"):
                self.trackers.call(tracker, run.mark_preempting)
            self.trackers.call(tracker, run.finish, exit_code={"finished": 0, "interrupted": 3}.get(status, 1))
            self.summary["wandb_complete"] = self.trackers.wandb()[0] is not None
            self._write_summary(required=False, quiet=quiet)

    def _write_summary(self, required: bool, quiet: bool) -> None:
        """Write run.json. If it cannot be written and is not `required`, a line says so: the error that the run has
        ended with must not be hidden by this one.

        Raises:
            WriteError: it is required, and cannot be written.
        """
        try:
            write_json(self.output_dir / RUN, self.summary)
        except WriteError as error:
            if required:
                raise
            if not quiet:
                print(f"{error}.", file=sys.stderr)

    def artifact(self, folder: Path) -> None:
        """Give a folder (adapter/ or model/) to W&B."""
        tracker, run = self.trackers.wandb()
        if run:
            self.trackers.call(tracker, run.log_artifact, folder, name=f"{folder.name}-{run.id}", type="model")

    def metrics(self, line: dict) -> None:
        """A logged training step."""
        self._append(METRICS, line)
        self.trackers.log(tracked_values(line), line["step"])

    def semantic(self, summary: dict, counts: LayerCounts) -> None:
        """The summary of a semantic rule, and the layers that it left to train."""
        self.summary.update(semantic=summary, layer_counts=counts._asdict())
        if self.main:
            write_json(self.output_dir / RUN, self.summary)
        values = {"semantic/boundary": summary["boundary"]}
        values |= {f"semantic/deviation/space_{i:02d}": value for i, value in enumerate(summary["deviations"])}
        self.trackers.log(values, self.summary["steps"])

    def validation(self, line: dict) -> None:
        self._append(METRICS, line)
        self.trackers.log(tracked_values(line), line["step"])

    def importance(self, line: dict, trained_counts: Sequence[int], probe_share: float) -> None:
        """An importance update, how often each layer was trained so far, and the share of time spent on probes."""
        self._append(IMPORTANCE, line)
        step = line["step"]
        values = importance_values(line, trained_counts, self._log_layers) | {"probe/time_share": probe_share}
        self.trackers.log(values, step)
        self.trackers.layers(line, trained_counts, step)
        if self.main:
            self._updates.append(line)
        if self.main and installed("matplotlib"):
            kept = self.summary["configuration"].get("keep_importance", False)
            scores, steps = ([update[key] for update in self._updates] for key in ("scores", "step"))
            image = partial(heat_map, scores, steps, kept)
            self.trackers.image("importance/heat_map", image, step)

    def remarks(self, trained_counts: Sequence[int], steps: int) -> dict[str, list[str]]:
        """What the importance updates say of the scores, in sentences, for run.json; on the main process."""
        if not self._updates:
            return {}
        return {"importance_remarks": remarks(self._updates[-1], len(self._updates), trained_counts, steps)}

    def _append(self, name: str, line: dict) -> None:
        if self.main:
            append_line(self.output_dir / name, line)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def draw_importance(output_dir: Path) -> Path:
    """importance.png: every layer's importance over steps, how often each was trained, and effective layers.

    Raises:
        UsageError: the folder holds no run.
    """
    run = read_run(output_dir)
    if run is None or "trained_counts" not in run:
        raise UsageError(f"{output_dir} holds no run with layers to draw (no {RUN} with trained_counts).")
    path = output_dir / PICTURE
    title = f"{output_dir.name}: {run['status']}"
    updates, semantic = read_lines(output_dir / IMPORTANCE), run.get("semantic")
    kept = run["configuration"].get("keep_importance", False)
    plot_importance(path, updates, run["trained_counts"], run["steps"], title, semantic, kept)
    return path


def draw_loss(output_dir: Path) -> Path:
    """loss.png: training and validation loss over steps, gradient norm and learning rate.

    Raises:
        UsageError: the folder holds no run.
    """
    run = read_run(output_dir)
    if run is None:
        raise UsageError(f"{output_dir} holds no run (no {RUN}).")
    path = output_dir / LOSS_PICTURE
    plot_loss(path, metrics_of(output_dir), f"{output_dir.name}: {run['status']}", run.get("best"))
    return path
