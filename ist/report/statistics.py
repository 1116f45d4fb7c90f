"""What results say: bootstrap intervals and rank correlation."""

from collections.abc import Sequence

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
    """Spearman's rho; equal values share their mean rank. NaN where all values of a side are equal."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        values = np.array(values)
        return np.array([(values < value).sum() + ((values == value).sum() - 1) / 2 for value in values])

    with np.errstate(invalid="ignore"):
        return float(np.corrcoef(ranks(one), ranks(two))[0, 1])
