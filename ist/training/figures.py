"""The pictures of importance: a run (paper, Figure 4), several side by side, and the heat map of trackers."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ist.training.command_line import brief
from ist.training.files import replacing
from ist.training.packages import require_package

if TYPE_CHECKING:  # matplotlib is imported when something is drawn: training goes without
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure


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


def layer_colours(n_layers: int) -> "ScalarMappable":
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(0, max(1, n_layers - 1)), "viridis")


def heat_map(scores: list[list[float]]) -> np.ndarray:
    """uint8 [H, W, 3]: layers upwards, updates to the right (at most 256 of them), colour = sigmoid of the score."""
    import matplotlib

    columns = np.linspace(0, len(scores) - 1, min(len(scores), 256)).astype(int)
    probabilities = 1 / (1 + np.exp(-np.array(scores)[columns].T[::-1]))
    rgb = matplotlib.colormaps["viridis"](probabilities)[..., :3]
    return (255 * rgb).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)


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
    deviations, boundary = semantic["deviations"], semantic["boundary"]
    axis.plot(range(len(deviations)), deviations, marker=".", color="0.2", lw=1.2)
    axis.axvspan(0, boundary + 1, color="tab:blue", alpha=0.15, label=f"frozen: layers up to {boundary}")
    axis.set(xlabel="latent space", ylabel="deviation", title="Mean cosine distance from the semantic bases")
    axis.legend(loc="lower left", fontsize="small")


@plain_text()
def plot_importance(
    path: Path, updates: list[dict], counts: list[int], steps: int, title: str, semantic: dict | None = None
) -> None:
    """The picture, from the lines of importance.jsonl and the steps in which each layer was trained.

    `semantic` is SemanticFreezing's summary; its panel takes the place of importance without updates.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n_layers = len(counts)
    colours = layer_colours(n_layers)
    panels = (["semantic"] if semantic else []) + (["importance"] if updates or not semantic else []) + ["counts"]
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), width_ratios=[3] * (len(panels) - 1) + [2.2]), strict=True))
    right = axes["counts"]
    if semantic:
        _plot_semantic(axes["semantic"], semantic)
    if "importance" in axes:
        _plot_scores(axes["importance"], updates, colours)
        figure.colorbar(colours, ax=axes["importance"], label="layer")
    right.bar(range(n_layers), counts, color=[colours.to_rgba(i) for i in range(n_layers)])
    right.axhline(sum(counts) / n_layers, color="0.3", ls="--", lw=1, label="mean over layers")
    right.set(xlabel="layer", ylabel="steps", title=f"Steps each layer was trained (of {steps})")
    right.legend(loc="upper left", fontsize="small")
    for axis in (*(axes[name].xaxis for name in panels), right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    save(figure, path)


def _plot_scores(left: "Axes", updates: list[dict], colours: "ScalarMappable") -> None:
    n_layers = len(updates[0]["probabilities"]) if updates else 0
    for update in updates:
        values = update["probabilities"]
        fits = isinstance(values, list) and len(values) == n_layers > 0
        if not fits or not all(isinstance(one, (int, float)) and 0 <= one <= 1 for one in values):
            told = str(values)[:60]
            raise ValueError(
                f"probabilities of step {update['step']} must be {n_layers} numbers from 0 to 1; got {told}"
            )
    for i in range(n_layers):
        at = [0] + [update["step"] for update in updates]
        left.plot(at, [0.5] + [update["probabilities"][i] for update in updates], color=colours.to_rgba(i), lw=1.2)
    if not updates:
        left.text(0.5, 0.5, "no importance updates in this run", ha="center", transform=left.transAxes)
    left.set(ylim=(0, 1), xlabel="optimizer step", ylabel="sigmoid(importance)", title="Layer importance")


@plain_text()
def plot_importance_panels(path: Path, runs: dict[str, list[dict]]) -> None:
    """A panel for each of several runs: importance of every layer over steps (paper, Figure 4).

    Args:
        runs: {title: lines of importance.jsonl, of which step and probabilities are read}.
    """
    from matplotlib.figure import Figure

    n_layers = max(len(updates[0]["probabilities"]) for updates in runs.values())
    colours = layer_colours(n_layers)
    figure = Figure(figsize=(4.6 * len(runs), 4.2), layout="constrained")
    axes = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axis, (title, updates) in zip(axes, runs.items(), strict=True):
        _plot_scores(axis, updates, colours)
        axis.set_title(title)
    figure.colorbar(colours, ax=axes, label="layer")
    save(figure, path)
