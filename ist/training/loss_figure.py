"""loss.png: training and validation loss of a run, gradient norm and learning rate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ist.training.figures import plain_text, save
from ist.training.styles import BLUE, GREEN, VERMILION

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curve(lines: Sequence[dict], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of the lines of metrics.jsonl that have the key.

    Raises:
        ValueError: a value is no number.
    """
    found = [(line["step"], line[key]) for line in lines if key in line]
    for step, value in found:
        if not isinstance(value, (int, float)) or not isinstance(step, int):
            raise ValueError(f"{key} of step {step} must be a number; got {str(value)[:60]}")
    return [step for step, _ in found], [value for _, value in found]


@plain_text()
def loss_figure(lines: Sequence[dict], title: str, best: dict | None = None) -> "Figure":
    """The figure of `plot_loss`, not saved."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, 5.2))
    losses, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    # Margins in place of a layout that is computed, which takes twice the time, at the end of each run.
    figure.subplots_adjust(left=0.1, right=0.88, bottom=0.1, top=0.92, hspace=0.1)
    steps, values = curve(lines, "loss")
    if not steps:
        losses.text(0.5, 0.5, "no logged steps in this run", ha="center", transform=losses.transAxes)
    else:
        # A run of one logged step is a point.
        marker = "." if len(steps) == 1 else ""
        losses.plot(steps, values, color="0.55", lw=1, marker=marker, label=f"training: {values[-1]:.4g} at the end")
    at, validation = curve(lines, "validation_loss")
    if at:
        label = f"validation: {validation[-1]:.4g} at the end"
        losses.plot(at, validation, color=BLUE, lw=1.6, marker="o", markersize=4, label=label)
    if best:
        label = f"best: {best['validation_loss']:.4g} at step {best['step']}"
        style = {"color": VERMILION, "marker": "*", "markersize": 14, "linestyle": "none", "zorder": 3}
        losses.plot([best["step"]], [best["validation_loss"]], label=label, **style)
    losses.set(ylabel="loss per token")
    if steps or at:
        losses.legend(loc="upper right", fontsize="small")
    (rates_at, rates), rate = curve(lines, "learning_rate"), below.twinx()
    below.plot(*curve(lines, "grad_norm"), color="0.45", lw=0.9)
    below.set(xlabel="optimizer step", ylabel="gradient norm")
    below.set_ylim(bottom=0)
    rate.plot(rates_at, rates, color=GREEN, lw=1.4, ls="--")
    rate.set_ylabel("learning rate (dashed)", color=GREEN)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", scilimits=(-2, 3))
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    for axis in (losses, below):
        axis.grid(color="0.92", lw=0.8)
    figure.suptitle(title)
    return figure


def plot_loss(path: Path, lines: Sequence[dict], title: str, best: dict | None = None) -> None:
    """The picture, from the lines of metrics.jsonl.

    Args:
        best: step and validation_loss of the step whose weights are in adapter/, where that is not the last one.

    Raises:
        ValueError: a value is no number.
        WriteError: it cannot be written.
    """
    with plain_text():
        save(loss_figure(lines, title, best), path)
