"""Arms in one figure: those of an experiment (paper, Figure 1), and those of runs side by side."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ist.report.arms import Arm, Run
from ist.training.figures import (
    colour_bar,
    colour_scale,
    panel_height,
    plain_text,
    plot_scores,
    probabilities_of,
    save,
)
from ist.training.styles import BLUE, ORANGE, PALETTE, VERMILION, line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@plain_text()
def plot_arms(path: Path, arms: dict[str, dict]) -> None:
    """Validation loss of each arm over steps and over time, and its memory by part (paper, Figure 1).

    Args:
        arms: {name: {runs: [{validation: [[step, loss]]}], step_seconds, bytes: {part: bytes}}}; lines are means over
            runs, bands their range.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, max(4.6, 1.5 + 0.3 * len(arms))), layout="constrained")
    by_step, by_time, memory = figure.subplots(1, 3, width_ratios=[3, 3, 2.2])
    for style, (name, arm) in zip(line_styles(len(arms)), arms.items(), strict=True):
        steps = np.array([step for step, _ in arm["runs"][0]["validation"]])
        losses = np.array([[loss for _, loss in run["validation"]] for run in arm["runs"]])
        for axis, at in ((by_step, steps), (by_time, steps * arm["step_seconds"])):
            axis.plot(at, losses.mean(axis=0), lw=1.4, label=name, **style)
            axis.fill_between(at, losses.min(axis=0), losses.max(axis=0), color=style["color"], alpha=0.15, lw=0)
    by_step.set(xlabel="optimizer step", ylabel="validation loss", title="Validation loss, mean and range over seeds")
    by_time.set(xlabel="seconds of training steps, probes included", title="The same over time")
    curves = [[loss for _, loss in run["validation"]] for arm in arms.values() for run in arm["runs"]]
    lowest, second = min(map(min, curves)), max(curve[min(1, len(curve) - 1)] for curve in curves)
    margin = 0.05 * (second - lowest) or 0.01
    for axis in (by_step, by_time):
        axis.set_ylim(lowest - margin, second + margin)  # the base model is off the top
    if len(arms) <= 8:
        by_step.legend(fontsize="small")
    else:  # would hide the curves
        figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    names = list(arms)[::-1]
    ends = np.zeros(len(names))
    shades = {"weights": "0.75", "optimizer": BLUE, "gradients": ORANGE, "saved": VERMILION}
    for part, shade in shades.items():
        sizes = np.array([arms[name]["bytes"][part] / 1e6 for name in names])
        label = {"saved": "saved for the backward"}.get(part, part)
        memory.barh(names, sizes, left=ends, color=shade, label=label)
        ends += sizes
    memory.set(xlabel="MB; saved for the backward: mean over steps", title="Memory by part, counted")
    memory.legend(fontsize="x-small", loc="lower center", bbox_to_anchor=(0.35, 1.06), ncols=4)
    memory.margins(x=0.15)
    save(figure, path)


WINDOW = 0.05  # of the longest run's steps: the running mean of training losses
START = 0.2  # of the steps: what is higher than the losses there may be off the top
MAPS = 4  # heat maps at most; of more arms, effective layers over steps


@plain_text()
def plot_runs(path: Path, arms: Sequence[Arm]) -> None:
    """The curves of runs side by side: losses over steps and over time, memory, importance.

    Lines are means over an arm's runs, bands their range. Where runs of an arm are finished, those that are not are
    thin lines of their own, which end in a cross.
    """
    from matplotlib.figure import Figure

    validated = any((run.series("validation_loss")[0] > 0).any() for arm in arms for run in arm.runs)
    first = MAPS if len(arms) == 1 else 1  # runs of an arm whose importance is drawn
    learned = [(arm, run) for arm in arms for run in [run for run in arm.counted if run.updates][:first]]
    top = max(4.2 * (1 + validated), 1.8 + 0.3 * len(arms))
    names_height = 0.4 + 0.22 * math.ceil(min(len(arms), 9) / 3)
    bottom = 0 if not learned else panel_height(max(len(run.updates[0]["probabilities"]) for _, run in learned)) + 0.4
    heights = [top, names_height] + ([bottom if len(learned) <= MAPS else 3.2] if learned else [])
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    curves, names, *below = figure.subfigures(len(heights), 1, height_ratios=heights).flat
    rows = [["training", "training over time", "memory"]]
    rows += [["validation", "validation over time", "memory"]] if validated else []
    axes = curves.subplot_mosaic(rows, width_ratios=[3, 3, 2])
    styles = line_styles(len(arms))
    for kind in ("training", "validation") if validated else ("training",):
        _plot_losses(kind, axes[kind], axes[f"{kind} over time"], arms, styles)
    _plot_memory(axes["memory"], arms, styles)
    names.legend(handles=_legend(arms, styles), loc="center", ncols=3, fontsize="small", frameon=False)
    if learned and len(learned) <= MAPS:
        _plot_maps(below[0], learned)
    elif learned:
        _plot_effective_layers(below[0], learned, dict(zip([arm.name for arm in arms], styles, strict=True)))
    runs = [run for arm in arms for run in arm.runs]
    title = f"{len(runs)} runs, {len(arms)} arm{'s' * (len(arms) > 1)}: mean and range over seeds"
    if unfinished := sum(not run.finished for run in runs):
        title += f"; {unfinished} unfinished (beside finished ones thin, with a cross at the end)"
    figure.suptitle(title)
    save(figure, path)


def _legend(arms: Sequence[Arm], styles: Sequence[dict]) -> list[Any]:
    """A line for each arm that has a colour, one for all that are grey."""
    from matplotlib.lines import Line2D

    seeds = [f", {len(arm.counted)} seeds" if len(arm.counted) > 1 else "" for arm in arms]
    labels = [arm.label + of for arm, of in zip(arms, seeds, strict=True)]
    if (grey := len(arms) - len(PALETTE)) > 0:
        labels[len(PALETTE) :] = [f"grey: {grey} more arm{'s' * (grey > 1)}"]
    return [Line2D([], [], lw=1.5, label=label, **style) for label, style in zip(labels, styles, strict=False)]


def _running_mean(steps: np.ndarray, values: np.ndarray, window: float) -> np.ndarray:
    """The mean of the values of the last `window` steps at each step."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.searchsorted(steps, steps - window, side="right")
    return (sums[1:] - sums[first]) / (np.arange(1, len(values) + 1) - first)


def loss_curve(run: Run, kind: str, window: float) -> np.ndarray:
    """[3, n]: steps, seconds up to them (NaN where they are not known) and losses; of training a running mean."""
    steps, values = run.series("loss" if kind == "training" else "validation_loss")
    if kind == "training":
        values = _running_mean(steps, values, window)
    at, seconds = run.seconds()
    known = np.interp(steps, [0, *at], [0, *seconds]) if at.size else np.full(len(steps), np.nan)
    return np.array([steps, known, values])


def joint_curve(curves: Sequence[np.ndarray]) -> np.ndarray:
    """[5, n]: steps, mean seconds, and the mean, least and greatest loss of several curves, at steps that all span."""
    steps = np.unique(np.concatenate([curve[0] for curve in curves]))
    steps = steps[(steps >= max(curve[0][0] for curve in curves)) & (steps <= min(curve[0][-1] for curve in curves))]
    seconds = np.mean([np.interp(steps, curve[0], curve[1]) for curve in curves], axis=0)
    losses = np.array([np.interp(steps, curve[0], curve[2]) for curve in curves])
    return np.array([steps, seconds, losses.mean(axis=0), losses.min(axis=0), losses.max(axis=0)])


def _plot_losses(kind: str, by_step: "Axes", by_time: "Axes", arms: Sequence[Arm], styles: Sequence[dict]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = max(run.last_step for arm in arms for run in arm.runs)
    window, curves = WINDOW * steps, []
    for i, (arm, style) in enumerate(zip(arms, styles, strict=True)):
        counted = [run.folder for run in arm.counted]
        drawn = [(run, loss_curve(run, kind, window)) for run in arm.runs]
        drawn = [(run, curve) for run, curve in drawn if curve.size]
        joint = [curve for run, curve in drawn if run.folder in counted]
        for axis, row in ((by_step, 0), (by_time, 1)):
            if joint:
                mean = joint_curve(joint)
                every = max(1, len(mean[0]) // 8)
                marks = {"markevery": (i * every // len(PALETTE) % every, every)}
                axis.plot(mean[row], mean[2], lw=1.5, label=arm.label, **style, **marks)
                if i < len(PALETTE) and len(joint) > 1:
                    axis.fill_between(mean[row], mean[3], mean[4], color=style["color"], alpha=0.15, lw=0)
            for run, curve in drawn:
                if run.folder not in counted:
                    thin = {"lw": 0.7, "color": style["color"], "alpha": 0.7, "label": "_unfinished"}
                    axis.plot(curve[row], curve[2], marker="x", markevery=[-1], markersize=6, **thin)
        curves += [curve for _, curve in drawn]
    mean = f", mean over {window:.0f} steps" if kind == "training" and window >= 2 else ""
    by_step.set(xlabel="optimizer step", ylabel="loss per token", title=f"{kind.capitalize()} loss{mean}")
    by_time.set(xlabel="seconds of training steps, importance updates included", title="The same over time")
    by_step.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    if not curves:
        by_step.text(0.5, 0.5, "no logged steps in these runs", ha="center", transform=by_step.transAxes)
        return
    lowest = min(losses.min() for _, _, losses in curves)
    highest = max(losses[min(np.searchsorted(at, START * steps), len(at) - 1)] for at, _, losses in curves)
    margin = 0.05 * (highest - lowest) or 0.01
    for axis in (by_step, by_time):
        axis.grid(color="0.92", lw=0.8)
        axis.set_ylim(lowest - margin, highest + margin)


def _plot_memory(axis: "Axes", arms: Sequence[Arm], styles: Sequence[dict]) -> None:
    """A bar for each arm, the largest of its runs; in the order of the legend from the top."""
    peaks = [max((run.series("peak_memory_bytes")[1].max(initial=0) for run in arm.counted), default=0) for arm in arms]
    unit, name = (1e9, "GB") if max(peaks) >= 1e10 else (1e6, "MB")
    colours = [style["color"] for style in styles]
    bars = axis.barh(range(len(arms)), [peak / unit for peak in peaks], color=colours, height=0.7)
    axis.set_yticks(range(len(arms)), [arm.label for arm in arms])
    axis.bar_label(
        bars, [f"{peak / unit:.4g}" if peak else "not recorded" for peak in peaks], padding=3, fontsize="small"
    )
    axis.set(xlabel=name, title="Peak memory (largest run)")
    axis.set_ylim(max(len(arms), 6) - 0.5, -0.5)
    axis.margins(x=0.2)


def _plot_maps(figure: Any, learned: Sequence[tuple[Arm, Run]]) -> None:
    axes = figure.subplots(1, len(learned), squeeze=False)[0]
    colours = colour_scale([probabilities_of(run.updates) for _, run in learned])
    for axis, (arm, run) in zip(axes, learned, strict=True):
        kept = bool(run.settings.get("keep_importance"))
        plot_scores(axis, run.updates, colours, run.record.get("steps"), kept)
        axis.set_title(f"{arm.label}" + (f", seed {run.seed}" if len(arm.runs) > 1 else ""), fontsize="medium", y=1)
    colour_bar(colours, list(axes))


def _plot_effective_layers(figure: Any, learned: Sequence[tuple[Arm, Run]], styles: dict[str, dict]) -> None:
    axis = figure.subplots()
    for arm, run in learned:
        seen = [(update["step"], update["effective_layers"]) for update in run.updates if "effective_layers" in update]
        steps, values = zip(*seen, strict=True) if seen else ((), ())
        axis.plot(steps, values, lw=1.5, label=arm.label, **styles[arm.name], markevery=max(1, len(steps) // 8))
    axis.set(xlabel="optimizer step", ylabel="layers", title="Effective layers, of the first run of each arm")
    axis.set_ylim(bottom=0)
    axis.grid(color="0.92", lw=0.8)
