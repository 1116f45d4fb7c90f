"""The file of an experiment: its recipe, its arms, their tuning, and the pairs that are compared."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
        scores_of: {arm, factor}: the arm whose run measured the layers' effects; the normal quantiles of their ranks,
            times factor, are this one's oracle_scores.
        seeds: its own; default: those of the experiment.
    """

    name: str
    settings: dict[str, Any]
    tune: dict[str, list]
    tuned_as: str | None = None
    top_of: str | None = None
    scores_of: dict[str, Any] | None = None
    seeds: list[int] | None = None


@dataclass
class Hypothesis:
    """Two arms that a question is answered by: the loss of the first less that of the second."""

    asks: str
    arms: list[str]


@dataclass
class Experiment:
    """A file of launch/experiments/: recipe, arms, seeds, tuning, pairs to compare, keys of ist.evaluate.

    Attributes:
        measure: validation: by train_ist.py, over steps, and seconds and bytes of each arm; rows: the loss of every
            test row once, after training, by ist.evaluate.
        margin: the difference of losses, in nats per token, that would matter.
    """

    recipe: dict[str, Any]
    arms: dict[str, Arm]
    seeds: list[int]
    tuning_seed: int
    pairs: list[list[str]]
    split: dict[str, int]
    evaluate: dict[str, Any] | None
    answer_texts: bool  # answers in words instead of their labels
    measure: str = "validation"
    margin: float = 0.01
    hypotheses: list[Hypothesis] = field(default_factory=list)

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
                own = ("tune", "tuned_as", "top_of", "scores_of", "seeds")
                tune, tuned_as, *extra = [settings.pop(key, None) for key in own]
                grid = {} if tuned_as else dict(tuning["grid"])
                arms[name] = Arm(name, settings, grid | (tune or {}), tuned_as, *extra)
            experiment = cls(
                values["recipe"],
                arms,
                values["seeds"],
                tuning["seed"],
                values.get("pairs", []),
                values["split"],
                values.get("evaluate"),
                values.get("answer_texts", False),
                values.get("measure", "validation"),
                values.get("margin", 0.01),
                [Hypothesis(**one) for one in values.get("hypotheses", [])],
            )
            with reading(path, "like the files of launch/experiments/"):
                _check(path, arms, experiment)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}.") from error
        except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise UsageError(f"{path} is not like the files of launch/experiments/: {brief(error)}.") from error
        return experiment._only(path, only or list(arms))

    def _only(self, path: str, names: Sequence[str]) -> "Experiment":
        """With these arms, and those that they take from."""
        wanted = list(names)
        for name in wanted:  # grows as arms name others
            if name not in self.arms:
                raise UsageError(f"{path} has no arm {name!r}; it has {', '.join(self.arms)}.")
            wanted += [other for other in taken_from(self.arms[name]) if other not in wanted]
        arms = {name: arm for name, arm in self.arms.items() if name in wanted}
        pairs = [pair for pair in self.pairs if set(pair) <= set(wanted)]
        hypotheses = [one for one in self.hypotheses if set(one.arms) <= set(wanted)]
        return replace(self, arms=arms, pairs=pairs, hypotheses=hypotheses)

    def seeds_of(self, arm: Arm) -> list[int]:
        return self.seeds if arm.seeds is None else arm.seeds


def taken_from(arm: Arm) -> list[str]:
    """The arms whose runs must be there before this one's."""
    return [name for name in (arm.tuned_as, arm.top_of, (arm.scores_of or {}).get("arm")) if name]


def _check(path: str, arms: dict[str, Arm], experiment: Experiment) -> None:
    """Raises UsageError for mistakes that would show only after hours."""
    for key in ("recipe", "evaluate"):
        value = getattr(experiment, key)
        if not isinstance(value, dict) and (key == "recipe" or value is not None):
            raise UsageError(f"{path}: {key} must hold `key: value` lines; got {value!r}.")
    if experiment.measure not in ("validation", "rows"):
        raise UsageError(f"{path}: measure must be validation or rows; got {experiment.measure!r}.")
    if type(experiment.margin) not in (int, float) or not 0 < experiment.margin < math.inf:
        raise UsageError(f"{path}: margin must be above 0; got {experiment.margin!r}.")
    asked = [("pairs", pair) for pair in experiment.pairs]
    for key, (one, two) in [*asked, *(("hypotheses", hypothesis.arms) for hypothesis in experiment.hypotheses)]:
        if missing := {one, two} - arms.keys():
            raise UsageError(f"{path}: {key} has no arm {missing.pop()!r}; it has {', '.join(arms)}.")
    _check_names(path, list(arms))
    for arm in arms.values():
        _check_arm(path, arm, arms)
    for seeds in (experiment.seeds, *(experiment.seeds_of(arm) for arm in arms.values())):
        whole = isinstance(seeds, list) and all(isinstance(seed, int) for seed in seeds)
        if not whole or not seeds or experiment.tuning_seed in seeds:
            raise UsageError(f"{path}: seeds must be a list of numbers without that of tuning; got {seeds}.")
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
    if arm.scores_of is not None:
        _check_scores_of(path, arm, arms)
    lists = {key: many if isinstance(many, list) else [many] for key, many in arm.tune.items()}
    for key, value in [*arm.settings.items(), *((name, value) for name in lists for value in lists[name])]:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value):
            raise UsageError(f"{path}: {key} {value} is text in YAML: write {value.replace('e', '.0e')}.")
    for key, many in arm.tune.items():
        if key in arm.settings:
            raise UsageError(f"{path}: {arm.name} sets {key} and tunes it; set it in an arm with tuned_as.")
        if not isinstance(many, list) or not many or not all(type(value) in (int, float) for value in many):
            raise UsageError(f"{path}: {arm.name} can tune {key} over a list of numbers only; got {many}.")


def _check_scores_of(path: str, arm: Arm, arms: dict[str, Arm]) -> None:
    given = arm.scores_of
    whole = isinstance(given, dict) and given.keys() == {"arm", "factor"} and type(given["factor"]) in (int, float)
    other = arms.get(given["arm"]) if whole else None
    if other is None or other.settings.get("score_rule") != "expected" or other.scores_of:
        raise UsageError(
            f"{path}: {arm.name}: scores_of must be {{arm: NAME, factor: NUMBER}}, of an arm with score_rule expected, "
            f"which measures effects; got {given!r}."
        )


def slug(values: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in values.items()) or "defaults"
