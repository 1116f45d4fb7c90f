"""Run folders as the arms of a comparison: read, grouped over seeds, and named by the keys in which they differ."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ist.training.arguments import ARGUMENTS, DataArguments, RunArguments
from ist.training.command_line import UsageError
from ist.training.figures import probabilities_of
from ist.training.files import IMPORTANCE, METRICS, RUN, read_lines, read_text, reading
from ist.training.loss_figure import curve
from ist.training.record import CONTENT, flattened, metrics_of, read_run

# Where and how a run reports and saves; and what the digests of rows say already.
NOT_OF_AN_ARM = {
    *("seed", "peft_config", "trust_remote_code", "plan", "train_rows", "train_tokens"),
    *RunArguments.free_keys,
    *DataArguments.free_keys,
}
NAMES_CONTENT = {key for group in ARGUMENTS for key in getattr(group, "content_keys", ())}
SAME_TASK = ("model_digest", "train_digest", "validation_digest")  # runs that differ in them have losses of their own
# A name begins with these, where arms differ in them; they are named by their value alone.
FIRST = ("model_name_or_path", "peft_method", "adapter.peft_type", "selection")
VALUES = ("loss", "validation_loss", "step_seconds", "tokens_per_second", "tokens", "peak_memory_bytes")


@dataclass(eq=False)
class Run:
    """What the files of a run say.

    Attributes:
        folder: as it was given.
        record: run.json.
        settings: its configuration, flat, without what is none.
        lines: of metrics.jsonl; `left_out` could not be read.
        updates: lines of importance.jsonl.
    """

    folder: Path
    record: dict[str, Any]
    settings: dict[str, Any]
    lines: list[dict]
    updates: list[dict]
    left_out: int

    @property
    def seed(self) -> int | None:
        return self.settings.get("seed")

    @property
    def finished(self) -> bool:
        return self.record["status"] == "finished"

    @property
    def last_step(self) -> int:
        """The last one that was logged; 0 without any."""
        return max((line["step"] for line in self.lines if "loss" in line), default=0)

    def facts(self) -> dict[str, Any]:
        """Where it ran: commit, device, ranks, versions."""
        hardware = self.record.get("hardware") or {}
        facts = {key: self.record.get(key) for key in ("commit", "world_size", "distributed_type")}
        facts["device"] = hardware.get("device")
        return {key: value for key, value in facts.items() if value is not None} | (self.record.get("versions") or {})

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the lines that have the key."""
        steps, values = curve(self.lines, key)
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def seconds(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, seconds of training up to them): of all optimizer steps with their importance updates, without
        validations and saves. A line has the mean of the steps since the line before."""
        steps, each = self.series("step_seconds")
        return steps, np.cumsum(np.diff(steps, prepend=0.0) * each)


@dataclass
class Arm:
    """Runs that differ in nothing but the seed.

    Attributes:
        settings: of its first run, and where that ran.
    """

    name: str
    runs: list[Run]
    settings: dict[str, Any]

    @property
    def control(self) -> str | None:
        """What run.json says of an arm that is no method."""
        return next((run.record["control"] for run in self.runs if run.record.get("control")), None)

    @property
    def label(self) -> str:
        return f"{self.name} (control)" if self.control else self.name

    @property
    def counted(self) -> list[Run]:
        """The runs that its numbers are of, all with a logged step: those that are finished; where none is, all."""
        logged = [run for run in self.runs if run.last_step]
        return [run for run in logged if run.finished] or logged


def read_folder(folder: Path) -> Run:
    """
    Raises:
        UsageError: it is no folder, or not that of a run.
        ReadError: a file in it is damaged.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is {'no folder' if folder.exists() else 'not there'}. Name the folders of runs.")
    record = read_run(folder)
    if record is None:
        raise UsageError(f"{folder} holds no run (no {RUN}). Name the folders of runs.")
    with reading(folder, "a run that can be compared"):
        lines, updates = metrics_of(folder), read_lines(folder / IMPORTANCE)
        settings = {key: value for key, value in flattened(record["configuration"]).items() if value is not None}
        left_out = _written_lines(folder) - len(lines)
        run = Run(folder, record, settings, lines, updates, left_out)
        for key in VALUES:
            _require_a_curve(key, *run.series(key))
        probabilities_of(updates)
        run.facts()
        json.dumps(record, allow_nan=False)  # no run writes NaN, and comparison.json cannot hold it
        if not isinstance(run.seed, int | None):
            raise ValueError(f"seed must be an integer; got {str(run.seed)[:60]}")
    return run


def _written_lines(folder: Path) -> int:
    try:
        return sum(bool(text.strip()) for text in read_text(folder / METRICS).split("\n"))
    except FileNotFoundError:
        return 0


def _require_a_curve(key: str, steps: np.ndarray, values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"{key} of step {steps[~np.isfinite(values)][0]:.0f} is not finite")
    if (np.diff(steps) <= 0).any():
        raise ValueError(f"the steps of {key} do not increase after step {steps[:-1][np.diff(steps) <= 0][0]:.0f}")


def read_arms(folders: Sequence[Path]) -> list[Arm]:
    """The runs as arms, in the order in which they are given.

    Runs of one configuration and seed are arms of their own: told apart by where they ran, else by their folders.

    Raises:
        UsageError: a folder is no run, or given twice.
        ReadError: a file is damaged.
    """
    seen: dict[Path, Path] = {}
    for folder in folders:
        if (there := folder.resolve()) in seen:
            same = "" if seen[there] == folder else f" (as {seen[there]} too)"
            raise UsageError(f"{folder} is given twice{same}. Name each run once.")
        seen[there] = folder
    groups = _grouped([read_folder(folder) for folder in folders], [_identity, Run.facts, _place])
    settings = [group[0].settings | group[0].facts() | _place(group[0]) for group in groups]
    keys = dict.fromkeys(key for group in groups for key in group[0].settings if key not in CONTENT)
    elsewhere = dict.fromkeys(key for one in settings for key in one if key not in keys)  # digests, then facts
    ordered = dict.fromkeys([*FIRST, *keys, *CONTENT, *elsewhere])
    names = _names(settings, [key for key in ordered if key not in NOT_OF_AN_ARM])
    fallback = str(settings[0].get("selection", "run"))  # of a single arm
    return [Arm(*one) for one in zip([name or fallback for name in names], groups, settings, strict=True)]


def _identity(run: Run) -> dict[str, Any]:
    """The keys that make an arm; digests of files in the place of their names."""
    digests = CONTENT.keys() & run.settings.keys()
    left_out = NOT_OF_AN_ARM | (NAMES_CONTENT if digests else set())
    return {key: value for key, value in run.settings.items() if key not in left_out}


def _place(run: Run) -> dict[str, str]:
    return {"folder": str(run.folder)}


def _grouped(runs: list[Run], kinds: list) -> list[list[Run]]:
    """Groups of runs that agree in the first of `kinds`, and where a group has a seed twice, in the next."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(kinds[0](run), sort_keys=True), []).append(run)
    found = []
    for group in groups.values():
        repeated = len({run.seed for run in group}) < len(group) and len(kinds) > 1
        found += _grouped(group, kinds[1:]) if repeated else [group]
    return found


def _names(arms: list[dict[str, Any]], keys: list[str]) -> list[str]:
    """A name for each arm: as few of the keys as tell it from the others."""
    key = next((key for key in keys if len({json.dumps(arm.get(key)) for arm in arms}) > 1), None)
    if key is None:
        return [""] * len(arms)
    values = [json.dumps(arm.get(key)) for arm in arms]
    short = {value: _told(key, json.loads(value)) for value in values}
    if len(set(short.values())) < len(short):
        short = {value: f"{key} {value}" for value in values}
    below = {
        value: iter(_names([arm for arm, own in zip(arms, values, strict=True) if own == value], keys))
        for value in short
    }
    return [", ".join(part for part in (short[value], next(below[value])) if part) for value in values]


def _told(key: str, value: Any) -> str:
    """A key with its value, short."""
    if value is None:
        return f"no {key}"
    if key == "model_name_or_path":
        return Path(str(value)).name
    if key in FIRST:
        return str(value)
    return f"{key} {cell(key, value)}"


def cell(key: str, value: Any) -> str:
    """A value of a configuration in a table or a name: digests shortened, numbers and lists plain."""
    if value is None:
        return ""
    if key in CONTENT:
        return str(value)[:8]
    if isinstance(value, bool) or not isinstance(value, (float, list, dict)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if isinstance(value, float):
        return f"{value:g}" if math.isfinite(value) else str(value)
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def differing_settings(arms: Sequence[Arm]) -> dict[str, list[Any]]:
    """{key: its value in each arm} of the keys of a configuration in which arms differ; None where an arm has none.

    Names of files are left out where their content is the same.
    """
    hidden = NOT_OF_AN_ARM - {"train_rows", "train_tokens"}
    contents = [{str(arm.settings.get(key)) for arm in arms} for key in SAME_TASK]
    if "train_digest" in arms[0].settings and all(len(one) == 1 for one in contents):
        hidden |= NAMES_CONTENT
    keys = dict.fromkeys(key for arm in arms for key in arm.runs[0].settings)
    found = {key: [arm.settings.get(key) for arm in arms] for key in keys if key not in hidden}
    return {key: values for key, values in found.items() if len(set(map(json.dumps, values))) > 1}
