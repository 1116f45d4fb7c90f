"""The pictures of importance: a run, several side by side (paper, Figure 4), and the heat map of trackers."""

import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ist.instruments import effective_layers, remarks, uniform_effective_layers
from ist.training.command_line import brief
from ist.training.files import replacing
from ist.training.packages import require_package

if TYPE_CHECKING:  # matplotlib is imported when something is drawn: training goes without
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

# Safe with every colour blindness: they differ in lightness too.
IMPORTANCE = "PuOr_r"  # purple below 0.5, where scores begin; white; orange above
INSIDE, OUTSIDE, BAND = "0.72", "#0072B2", "0.35"


@contextmanager
def plain_text() -> Iterator[None]:
    """Around what draws: names of folders and arms may hold a $, which would be TeX.

    Raises:
        UsageError: matplotlib is not installed, or too old.
    """
    require_package("matplotlib", "a picture")
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def save(figure: "Figure", path: Path) -> None:
    """
    Raises:
        WriteError: it cannot be written; an older picture is left as it was.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix[1:])


def drawn(path: Path, draw: Callable[..., Any], *args: Any) -> bool:
    """Whether `draw(*args)` has made the picture `path`; if not, why is one line on stderr: it costs no numbers."""
    try:
        draw(*args)
    except Exception as error:  # whatever matplotlib or the disk says
        print(f"{path} is not drawn ({brief(error)}); the numbers are written.", file=sys.stderr, flush=True)
        return False
    return True


def _plot_semantic(axis: "Axes", semantic: dict) -> None:
    """Deviation of each latent space; the layers that are frozen for good are shaded, space k is above layer k - 1."""
    from matplotlib.ticker import MaxNLocator

    deviations, boundary = semantic["deviations"], semantic["boundary"]
    axis.plot(range(len(deviations)), deviations, marker=".", color="0.2", lw=1.2)
    axis.axvspan(0, boundary + 1, color="tab:blue", alpha=0.15, label=f"frozen: layers up to {boundary}")
    axis.set(xlabel="latent space", ylabel="deviation", title="Mean cosine distance from the semantic bases")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(loc="lower left", fontsize="small")


def panel_height(n_layers: int) -> float:
    """Inches of a panel with a row for each layer."""
    return min(8.0, 2.6 + 0.055 * n_layers)


def _layer_axis(axis: "Axes", n_layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_ylim(-0.5, n_layers - 0.5)
    axis.yaxis.set_major_locator(MaxNLocator(20, integer=True, steps=[1, 2, 5, 10]))
    axis.tick_params(axis="y", labelsize="small")


def probabilities_of(updates: Sequence[dict]) -> np.ndarray:
    """[updates, layers], of lines of importance.jsonl; [0] without any.

    Raises:
        ValueError: not as many numbers from 0 to 1 in each update, or steps that do not increase.
    """
    n_layers = len(updates[0]["probabilities"]) if updates else 0
    for update in updates:
        values = update["probabilities"]
        fits = isinstance(values, list) and len(values) == n_layers > 0
        if not fits or not all(isinstance(one, (int, float)) and 0 <= one <= 1 for one in values):
            told = str(values)[:60]
            raise ValueError(
                f"probabilities of step {update['step']} must be {n_layers} numbers from 0 to 1; got {told}"
            )
    steps = [update["step"] for update in updates]
    if any(not here < there for here, there in zip([-1, *steps], steps, strict=False)):
        raise ValueError(f"steps of importance updates must increase from 0; got {str(steps)[:60]}")
    return np.array([update["probabilities"] for update in updates], dtype=float)


def colour_scale(probabilities: Sequence[np.ndarray]) -> "ScalarMappable":
    """Of heat maps that are compared. Centred on 0.5: from 0 to 1, or from 0.45 to 0.55 where no value is outside."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    furthest = max((np.abs(values - 0.5).max() for values in probabilities if values.size), default=0.5)
    half = 0.05 if furthest <= 0.05 else 0.5
    return ScalarMappable(Normalize(0.5 - half, 0.5 + half), IMPORTANCE)


def colour_bar(colours: "ScalarMappable", axes: "Sequence[Axes]") -> None:
    """Beside the last of the axes, which share it."""
    low, high = colours.norm.vmin, colours.norm.vmax
    bar = axes[0].figure.colorbar(colours, ax=axes, ticks=np.linspace(low, high, 5), pad=0.05, aspect=30)
    bar.set_label("sigmoid(importance)" + (f"\nonly {low:g} to {high:g}" if low else ""))
    bar.ax.set_title("more", fontsize="small", y=1)
    bar.ax.set_xlabel("less", fontsize="small")
    bar.ax.tick_params(labelsize="small")


def plot_scores(
    axis: "Axes", updates: Sequence[dict], colours: "ScalarMappable", steps: int | None = None, kept: bool = False
) -> None:
    """A row for each layer, a column from each update to the next, the first one from step 0, where scores are zero.

    Args:
        steps: of the run; where they are not known, the last column is as wide as the one before.
        kept: the run began with scores of another one, which its files do not have: the first column is grey.
    """
    from matplotlib.ticker import MaxNLocator

    axis.set(xlabel="optimizer step", ylabel="layer")
    axis.set_title("Layer importance", y=1)  # a height that need not be found, at each drawing
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    if not updates:
        axis.text(0.5, 0.5, "no importance updates in this run", ha="center", transform=axis.transAxes)
        axis.set_xlim(0, max(1, steps or 0))
        return
    values = probabilities_of(updates)
    starts = [update["step"] for update in updates]
    if starts[0] > 0:
        values = np.vstack([np.full((1, values.shape[1]), np.nan if kept else 0.5), values])
        starts.insert(0, 0)
    width = starts[-1] - starts[-2] if len(starts) > 1 else 1
    end = starts[-1] + width if steps is None else max(steps, starts[-1] + 1)
    rows = np.arange(values.shape[1] + 1) - 0.5
    shown = np.ma.masked_invalid(values.T)
    axis.pcolorfast(np.array([*starts, end]), rows, shown, cmap=colours.get_cmap(), norm=colours.norm)
    if kept and updates[0]["step"] > 0:
        axis.set_facecolor(INSIDE)
        axis.set_title("Layer importance (grey: scores kept from another run)", y=1, fontsize="medium")
    axis.set_xlim(0, end)
    _layer_axis(axis, values.shape[1])


def uniform_band(counts: Sequence[int], steps: int) -> tuple[float, float] | None:
    """Within it are about 95 % of layers where N_u of N_L are drawn uniformly at each step.

    Each n_i ~ Binomial(steps, p), p = N_u / N_L = sum(counts) / (steps N_L): mean +- 2 sd.

    Returns:
        (low, high); None where nothing was drawn: each layer was trained at every step or at none.
    """
    if steps < 1 or set(counts) <= {0, max(steps, *counts)}:
        return None
    share = min(1.0, sum(counts) / (steps * len(counts)))
    mean, margin = steps * share, 2 * math.sqrt(steps * share * (1 - share))
    return mean - margin, mean + margin


def _plot_counts(axis: "Axes", legend: "Axes", counts: Sequence[int], steps: int) -> None:
    """A bar for each layer; those that uniform draws would hardly give are dark."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    band, n_layers, mean = uniform_band(counts, steps), len(counts), sum(counts) / len(counts)
    low, high = band or (0, math.inf)
    outside = [not low <= count <= high for count in counts]
    axis.barh(range(n_layers), counts, color=[OUTSIDE if one else INSIDE for one in outside], height=0.8)
    handles: list[Any] = [axis.axvline(mean, color="black", ls="--", lw=1, label=f"mean over layers: {mean:.4g}")]
    if band:
        label = "uniform draws: 95 % of layers"
        handles.append(axis.axvspan(max(0, low), min(high, steps), color=BAND, alpha=0.25, lw=0, label=label))
        # Mean +- 2 sd leaves out 4.6 % of a normal distribution.
        label = f"outside: {sum(outside)} of {n_layers} layers\n(uniform draws: about {0.046 * n_layers:.1f})"
        handles.append(Patch(color=OUTSIDE, label=label))
    axis.set(xlabel="steps", ylabel="layer", title=f"Steps each layer was trained (of {steps})")
    axis.set_xlim(0, 1.04 * max(1, *counts, min(high, steps) if band else 0))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _layer_axis(axis, n_layers)
    legend.axis("off")
    legend.legend(handles=handles, loc="upper left", fontsize="small", frameon=False)


def _plot_effective(axis: "Axes", updates: Sequence[dict], counts: Sequence[int], steps: int) -> None:
    """Effective layers of the steps so far: those of the updates' lines, where they have them, and of the counts."""
    from matplotlib.ticker import MaxNLocator

    n_layers, final = len(counts), effective_layers(counts)
    seen = [(update["step"], update["effective_layers"]) for update in updates if "effective_layers" in update]
    for step, value in seen:
        if not isinstance(value, (int, float)) or not 0 <= value <= n_layers + 1e-6:
            raise ValueError(f"effective_layers of step {step} must be a number from 0 to {n_layers}; got {value}")
    at, values = zip(*seen, (steps, final), strict=True)
    axis.plot(at, values, color=OUTSIDE, lw=1.8)
    axis.plot(steps, final, "o", color=OUTSIDE, clip_on=False, label=f"this run: {final:.1f}")
    if uniform_band(counts, steps):
        share = min(1.0, sum(counts) / (steps * n_layers))
        t = np.unique(np.geomspace(1, steps, 200).round())
        expected = [uniform_effective_layers([step * share] * n_layers, step) for step in t]
        axis.plot(t, expected, color="0.45", ls=":", lw=1.8, label=f"uniform draws: {expected[-1]:.1f}")
    axis.axhline(n_layers, color="black", ls="--", lw=1, label=f"all layers: {n_layers}")
    axis.set(xlabel="optimizer step", ylabel="layers", title="Effective layers", ylim=(0, 1.12 * n_layers))
    axis.set_xlim(0, max(1, steps))
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.legend(loc="lower right", fontsize="small", ncols=3)


@plain_text()
def importance_figure(
    updates: Sequence[dict],
    counts: Sequence[int],
    steps: int,
    title: str,
    semantic: dict | None = None,
    kept: bool = False,
) -> "Figure":
    """The figure of `plot_importance`, not saved."""
    from matplotlib.figure import Figure

    columns = ([["semantic", "semantic"]] if semantic else []) + [["importance", "effective"], ["counts", "legend"]]
    if semantic and not updates:
        columns = [["semantic", "effective"], ["counts", "legend"]]
    rows, widths = [list(row) for row in zip(*columns, strict=True)], [3.0] * (len(columns) - 1) + [1.9]
    heights = [panel_height(len(counts)), 1.9]
    figure = Figure(figsize=(1.1 + 2.1 * sum(widths), 0.4 + sum(heights)), layout="constrained")
    axes = figure.subplot_mosaic(rows, width_ratios=widths, height_ratios=heights)
    if semantic:
        _plot_semantic(axes["semantic"], semantic)
    _plot_effective(axes["effective"], updates, counts, steps)
    _plot_counts(axes["counts"], axes["legend"], counts, steps)
    if "importance" in axes:
        probabilities = probabilities_of(updates)
        if updates and probabilities.shape[1] != len(counts):
            raise ValueError(f"probabilities are of {probabilities.shape[1]} layers, trained_counts of {len(counts)}")
        colours = colour_scale([probabilities])
        axes["importance"].sharey(axes["counts"])
        axes["importance"].sharex(axes["effective"])
        plot_scores(axes["importance"], updates, colours, steps, kept)
        if updates:
            colour_bar(colours, [axes["importance"]])
    said = remarks(updates[-1], len(updates), counts, steps) if updates else []
    figure.suptitle("\n".join([title, *(textwrap.fill(said[0], 88) for _ in said[:1])]))
    return figure


def plot_importance(
    path: Path,
    updates: list[dict],
    counts: list[int],
    steps: int,
    title: str,
    semantic: dict | None = None,
    kept: bool = False,
) -> None:
    """The picture, from the lines of importance.jsonl and the steps in which each layer was trained.

    Args:
        updates: step, probabilities and, where they have it, effective_layers are read.
        semantic: SemanticFreezing's summary; its panel takes the place of importance without updates.
        kept: the run began with the scores of another one (`keep_importance`).

    Raises:
        ValueError: an update has other values than numbers from 0 to 1, as many in each.
        WriteError: it cannot be written.
    """
    with plain_text():
        save(importance_figure(updates, counts, steps, title, semantic, kept), path)


@plain_text()
def importance_panels_figure(runs: dict[str, list[dict]]) -> "Figure":
    """The figure of `plot_importance_panels`, not saved."""
    from matplotlib.figure import Figure

    probabilities = [probabilities_of(updates) for updates in runs.values()]
    n_layers = max(values.shape[1] for values in probabilities)
    figure = Figure(figsize=(4.6 * len(runs) + 0.8, 0.8 + panel_height(n_layers)), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    colours = colour_scale(probabilities)
    for axis, (title, updates) in zip(axes, runs.items(), strict=True):
        plot_scores(axis, updates, colours)
        axis.set_title(title)
    colour_bar(colours, list(axes))
    return figure


def plot_importance_panels(path: Path, runs: dict[str, list[dict]]) -> None:
    """A heat map for each of several runs: importance of every layer over steps (paper, Figure 4).

    Args:
        runs: {title: lines of importance.jsonl, of which step and probabilities are read}.
    """
    with plain_text():
        save(importance_panels_figure(runs), path)


def heat_map(scores: Sequence[Sequence[float]], steps: Sequence[int], kept: bool = False) -> np.ndarray:
    """uint8 [H, W, 3]: the heat map of a run so far, for trackers.

    Args:
        scores: [updates, layers] after each update.
        steps: [updates] at which they were.
        kept: the run began with the scores of another one (`keep_importance`).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    probabilities = 0.5 + 0.5 * np.tanh(0.5 * np.array(scores))  # the sigmoid, without overflow
    updates = [{"step": step, "probabilities": row.tolist()} for step, row in zip(steps, probabilities, strict=True)]
    height = 0.6 + panel_height(probabilities.shape[1])
    figure = Figure(figsize=(7, height), dpi=100)
    # Margins in place of a layout that is computed, which takes twice the time, and in a training loop.
    axis = figure.subplots(gridspec_kw={"left": 0.08, "right": 0.94, "bottom": 0.55 / height, "top": 1 - 0.35 / height})
    colours = colour_scale([probabilities])
    plot_scores(axis, updates, colours, kept=kept)
    colour_bar(colours, [axis])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
