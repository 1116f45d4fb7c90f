"""Arms of an experiment in one figure (paper, Figure 1)."""

from pathlib import Path

import numpy as np

from ist.training.figures import plain_text, save
from ist.training.styles import BLUE, ORANGE, VERMILION, line_styles


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
