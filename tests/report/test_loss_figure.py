"""loss.png shows the numbers of metrics.jsonl and the best step of run.json."""

import json

import pytest
from matplotlib.figure import Figure
from support import read_lines

from ist.report.compare import main
from ist.training.command_line import UsageError


def drawn_again(run, monkeypatch) -> Figure:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (figures.append(self), save(self, *a, **kw)))
    (run / "loss.png").unlink(missing_ok=True)
    assert main([str(run)]) == 0
    assert (run / "loss.png").stat().st_size > 10_000
    return figures[-1]


def points(line) -> list[tuple[float, float]]:
    return [tuple(point) for point in line.get_xydata().tolist()]


def test_the_curves_are_those_of_the_files(train, tmp_path, monkeypatch):
    assert train(validation_size=8, eval_steps=4, max_steps=12, load_best_model_at_end=True, save_steps=4) == 0
    run = tmp_path / "run"
    lines = read_lines(run / "metrics.jsonl")
    validated = [line for line in lines if "validation_loss" in line]
    summary = json.loads((run / "run.json").read_text())
    losses, below, rate = drawn_again(run, monkeypatch).axes
    training, validation, best = losses.lines
    assert points(training) == [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert points(validation) == [(line["step"], line["validation_loss"]) for line in validated]
    lowest = min((point for point in points(validation) if point[0]), key=lambda point: point[1])
    assert points(best) == [lowest] == [(summary["best"]["step"], summary["best"]["validation_loss"])]
    assert validation.get_marker() == "o"
    for axis, key in ((below, "grad_norm"), (rate, "learning_rate")):
        assert points(axis.lines[0]) == [(line["step"], line[key]) for line in lines if key in line]
    named = [axis.get_ylabel() for axis in (losses, below, rate)] + [below.get_xlabel()]
    assert named == ["loss per token", "gradient norm", "learning rate (dashed)", "optimizer step"]


def a_run(folder, lines) -> None:
    folder.mkdir()
    run = {"status": "interrupted", "start": "", "configuration": {}, "trained_counts": [1, 1], "steps": 1}
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_run_without_logged_steps_and_one_of_validation_alone(tmp_path, monkeypatch):
    a_run(tmp_path / "empty", [])
    losses = drawn_again(tmp_path / "empty", monkeypatch).axes[0]
    assert [text.get_text() for text in losses.texts] == ["no logged steps in this run"]
    a_run(tmp_path / "validated", [{"step": 0, "epoch": 0, "validation_loss": 2.5}])
    (validation,) = drawn_again(tmp_path / "validated", monkeypatch).axes[0].lines
    assert points(validation) == [(0, 2.5)]


def test_a_loss_that_is_no_number_is_one_line(tmp_path):
    a_run(tmp_path / "run", [{"step": 1, "loss": "low"}])
    message = r"run is not a run that can be drawn: loss of step 1 must be a number; got low\."
    with pytest.raises(UsageError, match=message):
        main([str(tmp_path / "run")])
