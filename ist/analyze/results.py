"""An analysis: greedy orders, their agreement with importance scores, the picture and the tables."""

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ist.analyze.ablation import DIRECTIONS
from ist.config import ISTConfig
from ist.report.statistics import spearman
from ist.training.command_line import markdown_table
from ist.training.figures import plain_text, save
from ist.training.files import IMPORTANCE
from ist.training.styles import line_styles

BASE, ADAPTER = "base model", "adapter"


def greedy_order(analysis: dict, direction: str) -> list[int]:
    """The layers of an analysis.json from the one that matters least to the one that matters most."""
    order = analysis["directions"][direction]["order"]
    return list(order if direction == "least" else reversed(order))


def places(analysis: dict, direction: str) -> list[int]:
    """Each layer's place in a greedy order, from 0 for the one that matters least."""
    return np.argsort(greedy_order(analysis, direction)).tolist()


def agreement(scores: Sequence[float], importance: Sequence[float]) -> dict[str, Any]:
    """Spearman's rho over layers, and its 95 % interval: Fisher's z with Fieller's variance 1.06 / (n - 3).

    None where it is not defined: all values of a side are equal, or, for the interval, fewer than 4 layers.
    """
    rho, interval = spearman(scores, importance), None
    if math.isnan(rho):
        return {"rho": None, "interval": None}
    if len(scores) > 3:
        with np.errstate(divide="ignore"):  # a rho of 1 is infinitely far, and its interval is [1, 1]
            z = np.arctanh(np.clip(rho, -1, 1))
        spread = 1.959964 * math.sqrt(1.06 / (len(scores) - 3))
        interval = np.tanh([z - spread, z + spread]).tolist()
    return {"rho": rho, "interval": interval}


def compare_importance(analysis: dict, scores: Sequence[float]) -> dict[str, dict]:
    """Rank correlations of scores with each greedy order, and with the rise of the loss without each layer alone.

    Layers with equal losses (adapters still at zero) have places by their position in an order, but equal single
    ablations.
    """
    values = {d: places(analysis, d) for d in analysis["directions"]} | {"single_ablation": analysis["single_ablation"]}
    return {name: agreement(scores, importance) for name, importance in values.items()}


def compare_all(analysis: dict, scores: dict[str, Sequence[float]]) -> dict[str, Any]:
    """Importance in analysis.json: the rank correlations of each run's scores, and of their mean, with the orders; and
    of two runs, and of the two orders, with each other."""
    runs = {path: compare_importance(analysis, values) for path, values in scores.items()}
    found: dict[str, Any] = {"importance": runs} if runs else {}
    if len(scores) > 1:
        mean = np.mean(list(scores.values()), axis=0).tolist()
        runs[f"the mean of {len(scores)} runs"] = compare_importance(analysis, mean)
        found["between_runs"] = [agreement(one, two) for one, two in combinations(scores.values(), 2)]
    if len(analysis["directions"]) > 1:
        found["between_orders"] = agreement(*(places(analysis, d) for d in DIRECTIONS))
    return found


@plain_text()
def draw(path: Path, analysis: dict) -> None:
    """layers.png (paper, Figure 2): loss over the number of ablated layers, and the other models as lines."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axis = figure.subplots()
    full, labels = analysis["losses"][ADAPTER], {"least": "least important first", "most": "most important first"}
    styles = iter(line_styles(len(analysis["directions"]) + len(analysis["losses"])))
    for direction, result in analysis["directions"].items():
        losses = [full, *result["losses"]]
        axis.plot(range(len(losses)), losses, lw=1.2, label=labels[direction], **next(styles))
    for name, loss in analysis["losses"].items():
        axis.axhline(loss, lw=1, label=f"{name}: {loss:.3f}", **next(styles))
    title = f"Layers ablated one by one; loss on {analysis['tokens']} tokens"
    axis.set(xlabel="layers without their adapter response", ylabel="loss per token", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize="small")
    save(figure, path)


def with_interval(found: dict) -> str:
    """A rank correlation with its interval."""
    if found["rho"] is None:
        return "undefined"
    return f"{found['rho']:+.2f}" + (" ({:+.2f} … {:+.2f})".format(*found["interval"]) if found["interval"] else "")


def agreement_table(analysis: dict) -> str:
    """Markdown: rank correlations of runs' importance scores with the greedy orders, from an analysis.json."""
    names = {"least": "least important first", "most": "most important first", "single_ablation": "each layer alone"}
    orders = [*analysis["directions"], "single_ablation"]
    rows = []
    for path, found in analysis["importance"].items():
        rows.append([Path(path.removesuffix(IMPORTANCE)).name, *(with_interval(found[name]) for name in orders)])
    lines = markdown_table(["scores of", *(names[name] for name in orders)], rows)
    lines += ["", f"Spearman's rho over {len(analysis['layers'])} layers"]
    lines[-1] += " between IST's scores after the last update and"
    lines[-1] += f" what the loss of {analysis['tokens']} tokens says without them, 95 % interval by Fisher's z."
    if "between_runs" in analysis:
        lines[-1] += f" Of two runs with each other: {', '.join(map(with_interval, analysis['between_runs']))}."
    if "between_orders" in analysis:
        lines[-1] += f" Of the two orders with each other: {with_interval(analysis['between_orders'])}."
    hardware = ", ".join(f"{key} {value}" for key, value in analysis["hardware"].items())
    lines[-1] += f" {analysis['date']}, commit {analysis['commit']}; {hardware}."
    return "\n".join(lines)


def summary(analysis: dict) -> str:
    """The printed lines: the losses, the orders, and how to train only the layers at either end of an order."""
    lines = [f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.3f}" for name, loss in analysis["losses"].items()]
    count = ISTConfig().counts(len(analysis["layers"])).trained
    for direction, result in analysis["directions"].items():
        order = greedy_order(analysis, direction)
        lines.append(f"{direction} important first: {', '.join(map(str, result['order']))}")
        for name, layers in ((f"the {count} most important", order[-count:]), (f"the {count} least", order[:count])):
            lines.append(f"  train {name}: --selection fixed --fixed_layers {','.join(map(str, sorted(layers)))}")
    for path, orders in analysis.get("importance", {}).items():
        lines.append(f"rank correlation (95 % interval) of the importance scores of {path}")
        lines += [f"  with {name}: {with_interval(found)}" for name, found in orders.items()]
    if "between_runs" in analysis:
        lines.append("  of two runs with each other: " + ", ".join(map(with_interval, analysis["between_runs"])))
    if "between_orders" in analysis:
        lines.append(f"  of the two orders with each other: {with_interval(analysis['between_orders'])}")
    return "\n".join(lines)
