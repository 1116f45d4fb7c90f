"""Pictures: names are no TeX, and one that cannot be drawn or saved costs no number."""

import os

import pytest
from matplotlib.image import imread

from ist.analyze.results import draw
from ist.report.compare import main
from ist.report.figures import plot_arms
from ist.training.figures import plot_importance_panels
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
