"""Hypotheses of an experiment that measures rows: differences in pairs, their verdicts, and two pictures."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ist.training.command_line import markdown_table
from ist.training.figures import drawn, plain_text, save
from ist.training.styles import BLUE, VERMILION, line_styles

DIFFERS, EQUAL, LITTLE, OPEN = "differs", "equal within {}", "differs by less than {}", "not settled"


def is_by_rows(results: dict[str, Any]) -> bool:
    return results.get("measure") == "rows"


@dataclass
class Difference:
    """The mean loss of one arm's runs less that of another's, over the seeds that both have, on the same rows.

    Attributes:
        mean: in nats per token.
        over_seeds: standard error of the mean over seeds; None of one seed.
        over_rows: the same over rows, of the seeds' mean: of a ratio of sums, losses over tokens.
        within: 90 % and 95 % interval, Student's t over seeds; None of one seed.
    """

    mean: float
    seeds: int
    rows: int
    over_seeds: float | None
    over_rows: float
    within: dict[int, tuple[float, float]] | None

    def verdict(self, margin: float) -> str:
        """By the 95 % interval against zero, and the 90 % interval against the margin (two one-sided tests at 5 %)."""
        if self.within is None:
            return OPEN
        (low, high), (least, most) = self.within[95], self.within[90]
        differs, small = not low <= 0 <= high, -margin < least and most < margin
        text = LITTLE if differs and small else DIFFERS if differs else EQUAL if small else OPEN
        return text.format(margin)


def difference(one: Sequence[dict[str, Any]], two: Sequence[dict[str, Any]]) -> Difference | None:
    """Of two arms' runs; None where they have no seed in common.

    Args:
        one, two: runs, {seed, row_losses: [rows] sums, row_tokens: [rows]}.
    """
    from scipy import stats

    others = {run["seed"]: run for run in two}
    pairs = [(run, others[run["seed"]]) for run in one if run["seed"] in others]
    if not pairs:
        return None
    tokens = np.array(pairs[0][0]["row_tokens"], dtype=float)
    by_row = np.array([np.subtract(a["row_losses"], b["row_losses"]) for a, b in pairs])  # [seeds, rows]
    by_seed = by_row.sum(axis=1) / tokens.sum()
    mean, (seeds, rows) = by_seed.mean(), by_row.shape
    residuals = by_row.mean(axis=0) - mean * tokens
    over_rows = math.sqrt(rows / (rows - 1) * (residuals**2).sum()) / tokens.sum() if rows > 1 else math.nan
    if seeds < 2:
        return Difference(float(mean), seeds, rows, None, over_rows, None)
    error = float(by_seed.std(ddof=1) / math.sqrt(seeds))
    margins = {level: stats.t.ppf(0.5 + level / 200, seeds - 1) * error for level in (90, 95)}
    within = {level: (float(mean - margin), float(mean + margin)) for level, margin in margins.items()}
    return Difference(float(mean), seeds, rows, error, over_rows, within)


def differences(results: dict[str, Any]) -> list[tuple[dict[str, Any], Difference | None]]:
    arms = results["arms"]
    return [(one, difference(*(arms[name]["runs"] for name in one["arms"]))) for one in results["hypotheses"]]


def rows_table(results: dict[str, Any]) -> str:
    """Markdown: arms, then the hypotheses with their verdicts."""
    rows = [["base model", "", "", f"{results['base']['validation']:.4f}", "", ""]]
    for name, arm in results["arms"].items():
        runs = arm["runs"]
        loss = [run["validation"][-1][1] for run in runs]
        spread = f" ± {statistics.stdev(loss):.4f}" if len(loss) > 1 else ""
        rows.append(
            [
                name,
                ", ".join(str(run["seed"]) for run in runs) or "not run",
                str(runs[0]["validation"][-1][0]) if runs else "",
                f"{statistics.mean(loss):.4f}{spread}" if runs else "",
                f"{statistics.mean(run['effective_layers'] for run in runs):.1f}" if runs else "",
                f"{statistics.mean(run['seconds_of_steps'] for run in runs):.0f}" if runs else "",
            ]
        )
    lines = markdown_table(["arm", "seeds", "steps", "loss per token", "effective layers", "seconds of steps"], rows)
    if results["hypotheses"]:
        asked = [_verdict_row(one, found, results["margin"]) for one, found in differences(results)]
        header = ["question", "arms", "difference", "standard error over seeds", "over rows", "95 % interval"]
        lines += ["", *markdown_table([*header, "seeds", "verdict"], asked)]
    lines += [
        "",
        f"Of {results['test_rows']} rows that neither training nor tuning has seen: nats per token of the answers, "
        "mean ± standard deviation over seeds. Differences are taken row by row; below 0 the first arm is better. "
        f"Verdicts: see the design; the margin is {results['margin']}. Seconds: of the steps as they ran, beside other "
        "runs.",
    ]
    return "\n".join(lines)


def _verdict_row(one: dict[str, Any], found: Difference | None, margin: float) -> list[str]:
    pair = " − ".join(one["arms"])
    if found is None:
        return [one["asks"], pair, "not run", *[""] * 5]
    error = "" if found.over_seeds is None else f"{found.over_seeds:.4f}"
    interval = "" if found.within is None else " … ".join(f"{end:+.4f}" for end in found.within[95])
    numbers = [f"{found.mean:+.4f}", error, f"{found.over_rows:.4f}", interval, str(found.seeds)]
    return [one["asks"], pair, *numbers, found.verdict(margin)]


def draw_rows(results: dict[str, Any], folder: Path) -> list[Path]:
    """differences.png and concentration.png; those that were drawn. Why another was not is a line on stderr."""
    pictures = {"differences.png": plot_differences, "concentration.png": plot_concentration}
    return [folder / name for name, plot in pictures.items() if drawn(folder / name, plot, folder / name, results)]


@plain_text()
def plot_differences(path: Path, results: dict[str, Any]) -> None:
    """Each hypothesis' difference with its 90 % and 95 % interval, beside zero and the margin."""
    from matplotlib.figure import Figure

    found = [(one, seen) for one, seen in differences(results) if seen is not None]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(found)), layout="constrained")
    axis, margin = figure.subplots(), results["margin"]
    axis.axvspan(-margin, margin, color="0.92", label=f"less than would matter, {margin}")
    axis.axvline(0, color="0.5", lw=1)
    for i, (_, seen) in enumerate(found):
        for level, width in ((95, 1.2), (90, 3.5)):
            if seen.within:
                label = f"{level} % interval over seeds" if i == 0 else None
                axis.plot(seen.within[level], [i, i], color=BLUE, lw=width, solid_capstyle="butt", label=label)
        axis.plot(seen.mean, i, "o", color=VERMILION, ms=6, label="mean difference" if i == 0 else None)
    names = [f"{one['arms'][0]} − {one['arms'][1]}\n{seen.verdict(margin)}, {seen.seeds} seeds" for one, seen in found]
    axis.set_yticks(range(len(found)), names, fontsize="small")
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set(xlabel="difference of the loss, nats per token; left of 0 the first arm is better")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small", frameon=False)
    save(figure, path)


@plain_text()
def plot_concentration(path: Path, results: dict[str, Any]) -> None:
    """The loss of every run against its effective layers; the large marks are the means of arms."""
    from matplotlib.figure import Figure

    arms = {name: arm["runs"] for name, arm in results["arms"].items() if arm["runs"]}
    most = max(run["validation"][-1][0] for runs in arms.values() for run in runs)
    steps = {name: runs[0]["validation"][-1][0] for name, runs in arms.items()}
    common = statistics.mode(steps.values()) if steps else most
    arms = {name: runs for name, runs in arms.items() if steps[name] == common}
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axis = figure.subplots()
    for style, (name, runs) in zip(line_styles(len(arms)), arms.items(), strict=True):
        at = np.array([[run["effective_layers"], run["validation"][-1][1]] for run in runs])
        mark = {"color": style["color"], "marker": style.get("marker", "o"), "ls": "none"}
        axis.plot(*at.T, ms=4, alpha=0.5, **mark)
        axis.plot(*at.mean(axis=0), ms=10, label=f"{name}, {len(runs)} seeds", **mark)
    axis.set(xlabel="effective layers (1 / sum of squared shares of the steps trained)", ylabel="loss per token")
    axis.set_title(f"Loss after {common} steps, by concentration: each run small, each arm's mean large")
    axis.grid(color="0.92", lw=0.8)
    figure.legend(loc="outside right center", fontsize="small")
    save(figure, path)
