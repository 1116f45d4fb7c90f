"""Statistics of results: bootstrap intervals, paired differences, rank correlation."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np


def interval(pairs: list[tuple[dict, dict]], tasks: list[str], draws: int = 2000) -> list[float]:
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
    """Spearman's rho; NaN where all values of a side are equal."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(one, two).statistic)


def paired(one: Sequence[float], two: Sequence[float]) -> dict[str, Any]:
    """{mean, sd, interval, seeds} of the differences of pairs; the 95 % interval is Student's t, None of one pair."""
    from scipy import stats

    differences = np.subtract(one, two)
    found = {"mean": float(differences.mean()), "sd": None, "interval": None, "seeds": len(differences)}
    if len(differences) > 1:
        found["sd"] = float(differences.std(ddof=1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of differences that are nearly equal
            found["interval"] = [*map(float, stats.ttest_rel(one, two).confidence_interval())]
    return found


def wilson(right: int, rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson's score interval)."""
    from scipy import stats

    return tuple(map(float, stats.binomtest(right, rows).proportion_ci(method="wilson")))
