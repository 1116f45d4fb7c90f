"""A tracker that cannot start: a new run says so and stops, a resumed one goes on."""

import json

import pytest
import wandb
from support.runs import assert_same_adapter, cut_after

from ist.training.command_line import UsageError


def test_a_tracker_that_cannot_start(train, tmp_path, monkeypatch, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert train(output_dir=whole, max_steps=6, save_steps=3) == 0
    cut_after(3, whole, cut)

    def refuse(*args, **kwargs):
        raise wandb.errors.CommError("the service is\nout of reach")

    monkeypatch.setattr(wandb, "init", refuse)
    message = r"--report_to wandb cannot start \(.*out of reach\): correct its settings, set WANDB_MODE=offline, or"
    with pytest.raises(UsageError, match=message):
        train(output_dir=tmp_path / "new", max_steps=6, report_to="wandb")
    record = json.loads((tmp_path / "new/run.json").read_text())
    assert record["status"] == "failed"
    assert "out of reach" in record["error"]
    capsys.readouterr()
    options = {"max_steps": 6, "save_steps": 3, "report_to": "wandb", "resume_from_checkpoint": "auto"}
    assert train(output_dir=cut, **options) == 0
    assert f"wandb cannot start (the service is out of reach); {cut} has everything." in capsys.readouterr().err
    assert_same_adapter(cut, whole)
