"""Pictures: what importance.png shows; names are no TeX; one that cannot be drawn or saved costs no number."""

import os
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import scipy.stats
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.image import imread

from ist.analyze.results import draw
from ist.report.compare import main
from ist.report.figures import plot_arms
from ist.training import figures
from ist.training.figures import heat_map, importance_figure, importance_panels_figure, plot_importance_panels
from launch.experiments import tables

NAMES = ["a$\\foo{$b", "$x_{1$", "$$", "50 $ and 60 $", "\\frac", "$\\alpha$"]


def arm(updates=()) -> dict:
    sizes = {"weights": 1, "optimizer": 1, "gradients": 1, "saved": 1}
    runs = [{"validation": [[0, 2.0], [5, 1.0]], "updates": list(updates)}]
    return {"runs": runs, "step_seconds": 1.0, "bytes": sizes}


def analysis(*names: str) -> dict:
    losses = {name: 1.0 + i for i, name in enumerate(names)} | {"adapter": 0.5}
    return {"losses": losses, "tokens": 9, "directions": {"least": {"losses": [0.6, 0.9]}}}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_no_formula(tmp_path, name):
    plot_arms(tmp_path / "arms.png", {name: arm(), "other": arm()})
    plot_arms(tmp_path / "many.png", {name: arm()} | {str(i): arm() for i in range(9)})
    plot_importance_panels(tmp_path / "panels.png", {name: [{"step": 1, "probabilities": [0.2, 0.9]}]})
    draw(tmp_path / "layers.png", analysis(name))
    for picture in tmp_path.iterdir():
        assert imread(picture).shape[0] > 100


def test_a_picture_that_fails_is_a_line_and_the_others_are_drawn(tmp_path, capsys):
    results = {"arms": {"a": arm([{"step": 1, "probabilities": [0.5, "x"]}]), "b": arm([{"step": 1}])}}
    assert tables.draw(results, tmp_path) == [tmp_path / "curves.png"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/importance.png is not drawn (")
    (tmp_path / "curves.png").unlink()
    (tmp_path / "curves.png").mkdir()  # cannot be saved
    assert tables.draw({"arms": {"a": arm()}}, tmp_path) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/curves.png is not drawn (")
    assert sorted(os.listdir(tmp_path)) == ["curves.png"]  # no part of a picture


def test_figure_4_of_a_folder_with_dollars(tmp_path):
    run = tmp_path / NAMES[0]
    run.mkdir()
    (run / "importance.jsonl").write_text('{"step": 1, "probabilities": [0.5, 0.25], "scores": [0, 1]}\n')
    assert main(["--importance", str(run), "--output_dir", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/importance-panels.png").stat().st_size > 1000


def test_an_analysis_keeps_its_numbers(tmp_path, monkeypatch, capsys):
    from types import SimpleNamespace

    from accelerate import PartialState

    from ist.analyze import command

    monkeypatch.setattr(command, "draw", lambda *_: 1 / 0)
    args = SimpleNamespace(output_dir=str(tmp_path), publish=str(tmp_path / "p/found.json"), readme=None)
    command.publish_analysis(args, analysis("base model"), "python -m ist.analyze", PartialState(cpu=True))
    assert (tmp_path / "analysis.json").exists() and (tmp_path / "p/found.json").exists()
    assert "layers.png is not drawn (division by zero)" in capsys.readouterr().err


def made_up(n_layers: int, at: list[int], spread: float = 0.4, **more) -> list[dict]:
    """Updates at these steps; probabilities within 0.5 +- spread, which one of them reaches."""
    values = 0.5 + spread * np.random.default_rng(n_layers).uniform(-1, 1, (len(at), n_layers))
    values[-1, -1] = 0.5 + spread
    return [{"step": step, "probabilities": row.tolist(), **more} for step, row in zip(at, values, strict=True)]


def draws(n_layers: int, n_trained: int, steps: int, weights: np.ndarray | None = None) -> list[int]:
    """Steps that each layer was trained, with these weights (uniform without)."""
    generator = np.random.default_rng(3)
    drawn = [generator.choice(n_layers, n_trained, replace=False, p=weights) for _ in range(steps)]
    return np.bincount(np.concatenate(drawn), minlength=n_layers).tolist()


def panel(figure, title: str):
    (axis,) = [axis for axis in figure.axes if axis.get_title().startswith(title)]
    return axis


def labels(axis) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def test_columns_stand_at_the_steps_of_the_updates():
    """Irregular steps: each pixel of the heat map has the colour of the last update before it."""
    updates = made_up(6, [3, 4, 20])
    figure = importance_figure(updates, draws(6, 2, 30), 30, "run")
    axis = panel(figure, "Layer importance")
    renderer = rendered(figure)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("optimizer step", "layer")
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 30), (-0.5, 5.5))
    (image,) = axis.images
    pixels = np.asarray(renderer.buffer_rgba())[::-1]
    columns = [(1.5, [0.5] * 6), (3.5, updates[0]["probabilities"]), (12, updates[1]["probabilities"])]
    for step, values in [*columns, (19.7, updates[1]["probabilities"]), (25, updates[2]["probabilities"])]:
        for layer, value in enumerate(values):
            x, y = axis.transData.transform((step, layer)).astype(int)
            assert pixels[y, x] == pytest.approx(255 * np.array(image.cmap(value)), abs=2), (step, layer)


@pytest.mark.parametrize(("spread", "limits"), [(0.4, (0, 1)), (0.051, (0, 1)), (0.049, (0.45, 0.55))])
def test_the_colour_bar_has_a_fixed_range_or_says_a_narrower_one(spread, limits):
    figure = importance_figure(made_up(8, [10, 20], spread), draws(8, 2, 30), 30, "run")
    (bar,) = [axis for axis in figure.axes if axis.get_ylabel().startswith("sigmoid(importance)")]
    assert bar.get_ylim() == limits
    assert ("only 0.45 to 0.55" in bar.get_ylabel()) == (limits != (0, 1))
    (image,) = panel(figure, "Layer importance").images
    assert (image.norm.vmin, image.norm.vmax) == limits
    white = np.array(image.cmap(image.norm(0.5))[:3])
    assert white.min() > 0.95  # centred
    above, below = (np.array(image.cmap(image.norm(0.5 + side * (limits[1] - 0.5)))) for side in (0.9, -0.9))
    assert above[0] > above[2] and below[2] > below[0]  # orange, purple


@pytest.mark.parametrize("n_layers", [4, 30, 80])
def test_bars_outside_the_band_are_those_that_scipy_says(n_layers):
    weights = np.linspace(1, 3, n_layers)
    for counts in (draws(n_layers, n_layers // 4, 200), draws(n_layers, n_layers // 4, 200, weights / weights.sum())):
        figure = importance_figure([], counts, 200, "run")
        axis = panel(figure, "Steps each layer was trained (of 200)")
        uniform = scipy.stats.binom(200, (n_layers // 4) / n_layers)
        expected = [abs(count - uniform.mean()) > 2 * uniform.std() for count in counts]
        bars = axis.containers[0]
        assert [bar.get_width() for bar in bars] == counts
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == pytest.approx(range(n_layers))
        assert [bar.get_facecolor() == to_rgba(figures.OUTSIDE) for bar in bars] == expected
        assert panel(figure, "Layer importance").get_ylim() == axis.get_ylim()  # rows and bars line up
        legend = [label for one in figure.axes if one.get_legend() for label in labels(one)]
        assert f"outside: {sum(expected)} of {n_layers}" in " ".join(legend)
        low, high = figures.uniform_band(counts, 200)
        assert uniform.cdf(high) - uniform.cdf(low) == pytest.approx(0.95, abs=0.025)


@pytest.mark.parametrize("counts", [[20] * 4, [20, 0, 0, 20], [0] * 4])
def test_what_is_not_drawn_has_no_band(counts):
    figure = importance_figure([], counts, 20, "run")
    assert not any("uniform" in label for one in figure.axes if one.get_legend() for label in labels(one))
    assert {bar.get_facecolor() for bar in panel(figure, "Steps").containers[0]} == {to_rgba(figures.INSIDE)}
    assert "no importance updates in this run" in [text.get_text() for text in panel(figure, "Layer imp").texts]


def test_effective_layers_over_steps():
    updates = made_up(8, [10, 20])
    updates[1]["effective_layers"] = 5.5  # the first line is of an earlier version
    counts = [1, 2, 3, 4, 10, 10, 15, 15]
    axis = panel(importance_figure(updates, counts, 30, "run"), "Effective layers")
    final = 60**2 / 680
    run, dot, uniform, every = axis.lines
    assert run.get_xydata().tolist() == [[20, 5.5], [30, pytest.approx(final)]]
    assert dot.get_xydata().tolist() == [[30, pytest.approx(final)]]
    assert uniform.get_xydata()[0].tolist() == [1, 2]  # N_u of N_L at the first step
    assert uniform.get_xydata()[-1].tolist() == [30, pytest.approx(8 * 7.5 / (0.75 + 7.5))]
    assert set(every.get_ydata()) == {8}
    assert labels(axis) == ["this run: 5.3", "uniform draws: 7.3", "all layers: 8"]
    older = panel(importance_figure(made_up(8, [10, 20]), counts, 30, "run"), "Effective layers")
    assert [len(line.get_xdata()) for line in older.lines[:2]] == [1, 1]  # the dot alone


@pytest.mark.parametrize("updates", [[], made_up(4, [2])], ids=["none", "one"])
@pytest.mark.parametrize(("counts", "steps"), [([0] * 4, 0), ([1, 0, 0, 0], 1), ([2, 1, 0, 1], 3)])
def test_runs_of_a_few_steps(updates, counts, steps):
    rendered(importance_figure(updates, counts, steps, "run"))
    semantic = {"deviations": [0.1, 0.2, 0.3, 0.4, 0.5], "boundary": 1}
    figure = importance_figure(updates, counts, steps, "run", semantic)
    rendered(figure)
    assert [axis.get_title() for axis in figure.axes].count("Layer importance") == len(updates)
    assert panel(figure, "Mean cosine distance")


BAD = {
    "NaN": {"probabilities": [0.5, float("nan")]},
    "above 1": {"probabilities": [0.5, 1.5]},
    "text": {"probabilities": [0.5, "x"]},
    "fewer": {"probabilities": [0.5]},
    "effective": {"effective_layers": float("nan")},
    "effective text": {"effective_layers": "many"},
    "an earlier step": {"step": 3},
}


@pytest.mark.parametrize("bad", BAD)
def test_values_of_another_kind_are_refused(bad):
    good = {"step": 4, "probabilities": [0.25, 0.75], "effective_layers": 1.5}
    importance_figure([good, good | {"step": 8}], [4, 5], 9, "run")
    with pytest.raises(ValueError, match=r"must (be|increase)"):
        importance_figure([good, good | {"step": 8} | BAD[bad]], [4, 5], 9, "run")
    with pytest.raises(ValueError, match="are of 2 layers, trained_counts of 3"):
        importance_figure([good], [4, 5, 6], 9, "run")


@pytest.mark.parametrize("n_layers", [4, 32, 80])
@pytest.mark.parametrize("steps", [11, 3000])
def test_labels_do_not_overlap(n_layers, steps):
    updates = made_up(n_layers, list(range(10, steps, 10)), effective_layers=n_layers / 2)
    figure = importance_figure(updates, draws(n_layers, max(1, n_layers // 4), steps), steps, "run")
    panels = importance_panels_figure({"one": updates, "two": updates})
    for one in (figure, panels):
        renderer = rendered(one)
        for axis in one.axes:
            for side, ends in ((axis.xaxis, ("x0", "x1")), (axis.yaxis, ("y0", "y1"))):
                texts = [label for label in side.get_ticklabels() if label.get_text() and label.get_visible()]
                boxes = [label.get_window_extent(renderer) for label in texts if axis.axison]
                boxes.sort(key=lambda box: getattr(box, ends[0]))
                for box, following in pairwise(boxes):
                    assert getattr(box, ends[1]) < getattr(following, ends[0]), (axis.get_title(), side)
        whole = one.bbox
        extents = [box for axis in one.axes if (box := axis.get_tightbbox(renderer)) is not None]
        assert all(box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 for box in extents)
    ticks = [tick for tick in panel(figure, "Layer importance").get_yticks() if 0 <= tick < n_layers]
    assert ticks[0] == 0 and 4 <= len(ticks) <= 21 and all(tick == int(tick) for tick in ticks)


def test_the_heat_map_of_trackers_is_the_panel_of_the_run():
    scores = np.array([[-1.0, 0.0, 2.0], [-800.0, 0.1, 800.0]])
    image = heat_map(scores.tolist(), [10, 20])
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    left = image[:, : int(0.7 * image.shape[1])]  # without the colour bar, which has every colour
    colours = np.unique(left.reshape(-1, 3), axis=0).astype(int)
    cmap = matplotlib.colormaps[figures.IMPORTANCE]
    for value in (0.5, 1 / (1 + np.e), 1 / (1 + np.exp(-2)), 0.0, 1.0):
        assert (np.abs(np.array(cmap(value)[:3]) * 255 - colours).max(axis=1) <= 2).any(), value
    assert heat_map([[0.0] * 80] * 3, [5, 10, 15]).shape[0] > heat_map([[0.0] * 4] * 3, [5, 10, 15]).shape[0]


def test_a_run_that_went_on_from_other_scores_does_not_begin_at_a_half():
    figure = importance_figure(made_up(4, [5, 10]), [4, 4, 4, 3], 15, "run", None, True)
    (image,) = panel(figure, "Layer importance (grey: scores kept from another run)").images
    assert image.get_array().mask.tolist() == [[True, False, False]] * 4
