"""Lines of a panel are told apart with deuteranopia, and without colour."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ist.analyze.results import draw
from ist.report.arms import Arm, Run
from ist.report.figures import plot_arms, plot_runs

# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009),
# Table 1: deuteranomaly of severity 1.0, on linear RGB.
DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
WHITE = [0.95047, 1.0, 1.08883]  # D65


def seen(colour) -> np.ndarray:
    """CIE Lab of a colour as a deuteranope sees it."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(DEUTERANOPIA @ linear, 0, 1) / WHITE
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one, two) -> float:
    return float(np.linalg.norm(seen(one) - seen(two)))


def test_the_simulation_confuses_what_a_deuteranope_confuses():
    assert distance("white", "black") == pytest.approx(100, abs=0.1)
    assert distance("tab:green", "tab:red") < 20 < distance("tab:blue", "tab:orange")


def lines_of(monkeypatch, plot, *args) -> list[list]:
    """The labelled lines of each panel that `plot` draws."""
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (drawn.append(self), save(self, *a, **kw)))
    plot(*args)
    panels = [[line for line in axis.lines if line.get_label()[0] != "_"] for axis in drawn[0].axes]
    return [panel for panel in panels if panel]


def told_apart(one, two) -> bool:
    return distance(one.get_color(), two.get_color()) >= 20 or one.get_linestyle() != two.get_linestyle()


def arm(loss: float) -> dict:
    sizes = dict.fromkeys(("weights", "optimizer", "gradients", "saved"), 1)
    return {"runs": [{"validation": [[0, 2.0], [5, loss]]}], "step_seconds": 1.0, "bytes": sizes}


def run_arm(name: str, loss: float) -> Arm:
    """One finished run with importance."""
    lines = [{"step": 0, "validation_loss": 2.0}]
    lines += [{"step": step, "loss": loss / step, "step_seconds": 1.0} for step in range(1, 30)]
    lines += [{"step": 30, "validation_loss": loss}]
    updates = [{"step": 9, "probabilities": [0.4, 0.6], "effective_layers": loss}]
    return Arm(name, [Run(Path(name), {"status": "finished"}, {"seed": 1}, lines, updates, 0)], {})


ARMS = {
    "an experiment": (plot_arms, {str(i): arm(1 + i / 20) for i in range(20)}, 2),
    "runs": (plot_runs, [run_arm(str(i), 1 + i / 20) for i in range(20)], 5),  # losses, effective layers
}


@pytest.mark.parametrize("name", ARMS)
def test_arms_differ_in_colour_or_dashes_and_beyond_eight_are_grey(tmp_path, monkeypatch, name):
    plot, arms, count = ARMS[name]
    panels = lines_of(monkeypatch, plot, tmp_path / "arms.png", arms)
    assert [len(panel) for panel in panels] == [20] * count
    for panel in panels:
        coloured, rest = panel[:8], panel[8:]
        assert all(told_apart(one, two) for one, two in combinations(coloured, 2))
        assert len({line.get_marker() for line in coloured}) == 8  # without colour too
        assert {(line.get_color(), line.get_marker()) for line in rest} == {("0.7", "")}


def test_the_legend_says_how_many_arms_are_grey(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (drawn.append(self), save(self, *a, **kw)))
    plot_runs(tmp_path / "arms.png", ARMS["runs"][1])
    (legend,) = [legend for part in drawn[0].subfigs for legend in part.legends]
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, range(8)), "grey: 12 more arms"]


def test_lines_of_an_analysis_differ(tmp_path, monkeypatch):
    orders = {name: {"losses": [0.6, 0.9]} for name in ("least", "most")}
    losses = {name: 1 + i / 9 for i, name in enumerate(("base model", "adapter", "full", "LoRA", "LISA", "random"))}
    analysis = {"losses": losses, "tokens": 9, "directions": orders}
    (panel,) = lines_of(monkeypatch, draw, tmp_path / "layers.png", analysis)
    assert len({(line.get_linestyle(), line.get_marker()) for line in panel}) == 8
    assert all(told_apart(one, two) for one, two in combinations(panel, 2))
