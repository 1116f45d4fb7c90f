"""Accelerate's trackers: whether they can start, and the numbers that they get."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ist.training.command_line import UsageError, brief

_NAMED = {  # how each takes the name of a run, which is not the project's
    **{"mlflow": "run_name", "swanlab": "experiment_name", "trackio": "name", "clearml": "task_name"},
    "wandb": "name",
}


def tracker_names(report_to: Sequence[str]) -> list[str]:
    """The trackers of --report_to: none of `none`, of `all` those that are installed; WANDB_DISABLED takes W&B out."""
    names = [str(name) for name in get_available_trackers()] if "all" in report_to else dict.fromkeys(report_to)
    return [name for name in names if name != "none" and not (name == "wandb" and _wandb_is_disabled())]


def _wandb_is_disabled() -> bool:
    """By the variable that transformers 4 took."""
    return os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")


def require_trackers(report_to: Sequence[str]) -> None:
    """Stop now, not after the model is loaded, when a tracker cannot start."""
    names = tracker_names(report_to)
    if "wandb" in report_to and _wandb_is_disabled() and os.environ.get("RANK", "0") == "0":
        print("WANDB_DISABLED is set: W&B is left out.")
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            raise UsageError(f"--report_to {name} needs a package: pip install {name}.")
    if "wandb" in names:
        import wandb

        # WANDB_MODE, else what `wandb offline` or `wandb disabled` has written into wandb/settings.
        if (os.environ.get("WANDB_MODE") or wandb.setup().settings.mode) in ("offline", "disabled", "dryrun"):
            return
        try:
            reason = "" if wandb.login(prompt=False) else "finds no W&B login"
        except Exception as error:  # a wrong key, a service out of reach
            reason = f"cannot start ({brief(error)})"
        if reason:
            raise UsageError(
                f"--report_to wandb (the default) {reason}: run `wandb login`, or set WANDB_MODE=offline, "
                "or pass --report_to none."
            )


class Trackers:
    """The trackers of a run, on the main process. One that fails is left out from then on; the run goes on.

    Args:
        report_to: names, as --report_to has them.
        place: where everything is, for the line about one that failed.
    """

    def __init__(self, accelerator: Accelerator, report_to: Sequence[str], place: str) -> None:
        self.accelerator, self.names, self.place = accelerator, tracker_names(report_to), place

    def start(
        self, project: str, run_name: str, config: Mapping[str, Any], options: Mapping[str, dict], required: bool
    ) -> None:
        """
        Args:
            config: the run's configuration; what is no number or text is written as text.
            options: by name, more arguments of a tracker's start.

        Raises:
            UsageError: one cannot start, and it is `required`.
        """
        started: list = []
        scalars = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in config.items()}
        for name in self.names:
            named = {_NAMED[name]: run_name} if name in _NAMED else {}
            self.accelerator.log_with, self.accelerator.trackers = [LoggerType(name)], []
            try:
                self.accelerator.init_trackers(project, scalars, {name: {**named, **options.get(name, {})}})
                started += self.accelerator.trackers
            except Exception as error:  # a service out of reach, a setting that the tracker refuses
                self.accelerator.trackers = started  # the one that has failed could not be ended
                reason = f"cannot start ({brief(error)})"
                if required:
                    help_ = "correct its settings, set WANDB_MODE=offline, or pass --report_to none"
                    raise UsageError(f"--report_to {name} {reason}: {help_}.") from error
                print(f"{name} {reason}; {self.place} has everything.", file=sys.stderr)
        self.accelerator.trackers = started

    def call(self, tracker: Any, method: Callable, *args: Any, **kwargs: Any) -> None:
        """Call a tracker's method. If it fails, the tracker gets nothing more."""
        try:
            method(*args, **kwargs)
        except Exception as error:
            print(f"{tracker.name} has failed ({brief(error)}); {self.place} has everything.", file=sys.stderr)
            self.accelerator.trackers = [one for one in self.accelerator.trackers if one is not tracker]

    def log(self, values: Mapping[str, Any], step: int, only: str | None = None) -> None:
        if self.accelerator.is_main_process:
            for tracker in [one for one in self.accelerator.trackers if only in (None, one.name)]:
                self.call(tracker, tracker.log, dict(values), step=step)

    def image(self, name: str, image: Callable[[], np.ndarray], step: int) -> None:
        """uint8 [H, W, 3], made where a tracker takes images: TensorBoard, W&B, Aim, ClearML, SwanLab."""
        takes = [one for one in self.accelerator.trackers if hasattr(one, "log_images")]
        if not self.accelerator.is_main_process or not takes:
            return
        try:
            picture = image()
        except Exception as error:  # whatever matplotlib says: a picture costs no run
            print(f"{name} of step {step} is not drawn ({brief(error)}); the run goes on.", file=sys.stderr)
            return
        for tracker in takes:
            batched = tracker.name in ("tensorboard", "wandb", "swanlab")
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            values = {name: picture[None] if batched else picture}
            self.call(tracker, tracker.log_images, values, step=step, **layout)

    def layers(self, update: Mapping[str, Any], trained_counts: Sequence[int], step: int) -> None:
        """Give W&B all layers of an importance update: a histogram of the scores, and a table with a row for each."""
        tracker, run = self.wandb()
        if not run:
            return
        import wandb

        # The counts are not known of an update that is logged anew on resume.
        counts = trained_counts or [None] * len(update["scores"])
        rows = zip(range(len(counts)), update["scores"], update["probabilities"], counts, strict=True)

        def log() -> None:
            table = wandb.Table(["layer", "score", "probability", "steps trained"], [list(row) for row in rows])
            values = {"importance/scores": wandb.Histogram(update["scores"]), "importance/layers": table}
            tracker.log(values, step=step)

        self.call(tracker, log)

    def finish(self) -> None:
        """End them all; what one of them says is no error of the run."""
        for tracker in list(self.accelerator.trackers):
            self.call(tracker, tracker.finish)
        self.accelerator.trackers = []

    def wandb(self) -> tuple[Any, Any]:
        """(W&B's tracker, its run) on the main process, where that is one; else (None, None)."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else ():
            if tracker.name == "wandb":
                return tracker, getattr(tracker, "run", None)  # one whose start failed has no run
        return None, None


def importance_values(update: dict, trained_counts: Sequence[int], layers: bool = True) -> dict[str, float]:
    """An importance update as trackers get it.

    Args:
        layers: with two keys for each layer, its score and the steps that it was trained.
    """
    values: dict[str, float] = {"probe/seconds": update["probe_seconds"]}
    if "effective_layers" in update:  # lines of earlier versions lack it
        values["importance/effective_layers"] = update["effective_layers"]
    values |= {f"probe/loss_{j}": loss for j, loss in enumerate(update["losses"])}
    values |= {f"probe/reward_{j}": reward for j, reward in enumerate(update["rewards"])}  # none under `expected`
    if update.get("split_half") is not None:
        values["probe/split_half"] = update["split_half"]
    for key in ("rare_layers", "successive_correlation", "mean_correlation"):
        if update.get(key) is not None:
            values[f"importance/{key}"] = update[key]
    if not layers:
        return values
    values |= {f"importance/score/layer_{i:02d}": score for i, score in enumerate(update["scores"])}
    return values | {f"importance/trained_steps/layer_{i:02d}": count for i, count in enumerate(trained_counts)}


def tracked_values(line: dict, layers: bool = True) -> dict[str, float]:
    """A line of metrics.jsonl or importance.jsonl as trackers get it; `layers` as for `importance_values`."""
    if "scores" in line:
        return importance_values(line, (), layers)
    if "validation_loss" in line:
        return {"eval/loss": line["validation_loss"]}
    return {f"train/{key}": value for key, value in line.items() if not isinstance(value, list)}
