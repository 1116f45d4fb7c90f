"""The file of an experiment: its recipe, its arms, their tuning, and the pairs that are compared."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ist.config import ConfigError
from ist.training.command_line import UsageError, brief
from ist.training.files import reading


@dataclass
class Arm:
    """One arm: its keys of train_ist.py, and those that are tuned or taken over from another arm.

    Attributes:
        tune: {key: numbers}; all values of the first key are tried, then those of the next at the best of the first.
        tuned_as: the arm whose tuned values it takes, but for those that it sets itself.
        top_of: the arm whose tuning run names the layers of highest importance, which this one trains.
    """

    name: str
    settings: dict[str, Any]
    tune: dict[str, list]
    tuned_as: str | None = None
    top_of: str | None = None


@dataclass
class Experiment:
    """A file of launch/experiments/: recipe, arms, seeds, tuning, pairs to compare, keys of ist.evaluate."""

    recipe: dict[str, Any]
    arms: dict[str, Arm]
    seeds: list[int]
    tuning_seed: int
    pairs: list[list[str]]
    split: dict[str, int]
    evaluate: dict[str, Any] | None
    answer_texts: bool  # answers in words instead of their labels

    @classmethod
    def read(cls, path: str, only: Sequence[str] | None) -> "Experiment":
        """
        Raises:
            UsageError: not such a file, or an arm refers to one that is not there.
        """
        try:
            values = yaml.safe_load(Path(path).read_text())
            tuning = values["tuning"]
            arms = {}
            for name, settings in values["arms"].items():
                extra = {key: settings.pop(key, None) for key in ("tune", "tuned_as", "top_of")}
                grid = {} if extra["tuned_as"] else dict(tuning["grid"])
                arms[name] = Arm(name, settings, grid | (extra["tune"] or {}), extra["tuned_as"], extra["top_of"])
            experiment = cls(
                values["recipe"],
                arms,
                values["seeds"],
                tuning["seed"],
                values.get("pairs", []),
                values["split"],
                values.get("evaluate"),
                values.get("answer_texts", False),
            )
            with reading(path, "like the files of launch/experiments/"):
                _check(path, arms, experiment)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}.") from error
        except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise UsageError(f"{path} is not like the files of launch/experiments/: {brief(error)}.") from error
        wanted = list(only or arms)
        for name in wanted:  # grows as arms name others
            if name not in arms:
                raise UsageError(f"{path} has no arm {name!r}; it has {', '.join(arms)}.")
            wanted += [other for other in (arms[name].tuned_as, arms[name].top_of) if other and other not in wanted]
        experiment.arms = {name: arm for name, arm in arms.items() if name in wanted}
        experiment.pairs = [pair for pair in experiment.pairs if set(pair) <= set(wanted)]
        return experiment


def _check(path: str, arms: dict[str, Arm], experiment: Experiment) -> None:
    """Raises UsageError for mistakes that would show only after hours."""
    for key in ("recipe", "evaluate"):
        value = getattr(experiment, key)
        if not isinstance(value, dict) and (key == "recipe" or value is not None):
            raise UsageError(f"{path}: {key} must hold `key: value` lines; got {value!r}.")
    for one, two in experiment.pairs:
        if missing := {one, two} - arms.keys():
            raise UsageError(f"{path}: pairs has no arm {missing.pop()!r}; it has {', '.join(arms)}.")
    _check_names(path, list(arms))
    for arm in arms.values():
        _check_arm(path, arm, arms)
    whole = isinstance(experiment.seeds, list) and all(isinstance(seed, int) for seed in experiment.seeds)
    if not whole or not experiment.seeds or experiment.tuning_seed in experiment.seeds:
        raise UsageError(f"{path}: seeds must be a list of numbers without that of tuning; got {experiment.seeds}.")
    sizes = experiment.split.values() if isinstance(experiment.split, dict) else ()
    if set(experiment.split) != {"test", "tuning"} or not all(type(size) is int and size > 0 for size in sizes):
        raise UsageError(f"{path}: split must name test and tuning rows; got {experiment.split}.")


def _check_names(path: str, names: list[Any]) -> None:
    """The name of an arm is that of a folder of runs, and of its files of results."""
    files: dict[str, str] = {}
    for name in names:
        plain = isinstance(name, str) and name.strip() not in ("", ".", "..")
        if not plain or re.search(r"[/\\\x00-\x1f]", name):
            raise UsageError(
                f"{path}: the name of an arm is that of a folder, so it must be a text without / and \\, and not empty "
                f"or ..; got {name!r}."
            )
        other = files.setdefault(file_stem(name), name)
        if other != name:
            raise UsageError(
                f"{path}: the results of the arms {other!r} and {name!r} would have the same file names "
                f"({file_stem(name) or 'none'}-SEED.json): rename one."
            )


def file_stem(arm: str) -> str:
    """`IST 8, mu 1000` as ist-8-mu-1000, the start of the names of its files of results."""
    return re.sub(r"[^a-z0-9]+", "-", arm.lower()).strip("-")


def _check_arm(path: str, arm: Arm, arms: dict[str, Arm]) -> None:
    for key in ("tuned_as", "top_of"):
        other = arms.get(getattr(arm, key))
        if other and (other.tuned_as or (key == "top_of" and other.top_of)):
            raise UsageError(f"{path}: {arm.name} cannot be {key} {other.name}, which takes from another arm itself.")
        if other and key == "top_of" and "ist" not in other.settings.get("selection", "ist"):
            raise UsageError(f"{path}: {arm.name} cannot be top_of {other.name}, which learns no importance.")
    lists = {key: many if isinstance(many, list) else [many] for key, many in arm.tune.items()}
    for key, value in [*arm.settings.items(), *((name, value) for name in lists for value in lists[name])]:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
            raise UsageError(f"{path}: {key} {value} is text in YAML: write {value.replace('e', '.0e')}.")
    for key, many in arm.tune.items():
        if key in arm.settings:
            raise UsageError(f"{path}: {arm.name} sets {key} and tunes it; set it in an arm with tuned_as.")
        if not isinstance(many, list) or not many or not all(type(value) in (int, float) for value in many):
            raise UsageError(f"{path}: {arm.name} can tune {key} over a list of numbers only; got {many}.")


def slug(values: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in values.items()) or "defaults"
