"""Trackers, one or several: what they get, and one that fails or cannot start."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wandb
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from support import ROOT, of_type, offline_records, read_lines
from support.runs import assert_same_adapter, cut_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ist.training import trackers
from ist.training.command_line import UsageError


@pytest.fixture(autouse=True)
def fresh_wandb():
    """A test before this one may have asked for a login, which W&B remembers."""
    wandb.teardown()


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


def required(folder, **environment) -> subprocess.CompletedProcess:
    """What train_ist.py finds of W&B before it trains, in a folder, by someone who has not logged in."""
    code = "from ist.training.trackers import require_trackers, tracker_names; require_trackers(['wandb'])"
    code += "; print(tracker_names(['wandb']), tracker_names(['wandb', 'tensorboard']))"
    ours = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    ours |= {"HOME": str(folder), "PYTHONPATH": str(ROOT), **environment}
    done = [sys.executable, "-c", code]
    return subprocess.run(done, cwd=folder, env=ours, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_the_settings_of_wandb_count(tmp_path, mode):
    """`wandb offline` and `wandb disabled` write wandb/settings in the working directory."""
    without = required(tmp_path)
    assert "finds no W&B login: run `wandb login`" in without.stderr
    wandb_command = Path(sys.executable).with_name("wandb")
    environment = os.environ | {"HOME": str(tmp_path)}
    subprocess.run([wandb_command, mode], cwd=tmp_path, env=environment, capture_output=True, timeout=120, check=True)
    assert (tmp_path / "wandb/settings").exists()
    done = required(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finds no W&B login" in required(tmp_path, WANDB_MODE="online").stderr  # the variable goes before


def test_wandb_disabled_leaves_wandb_out(tmp_path):
    done = required(tmp_path, WANDB_DISABLED="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "WANDB_DISABLED is set: W&B is left out.\n[] ['tensorboard']\n"
    assert "finds no W&B login" in required(tmp_path, WANDB_DISABLED="false").stderr


def test_several_trackers_get_the_same_numbers(train, tmp_path, monkeypatch):
    """TensorBoard and W&B, and one that Accelerate knows and takes no images."""
    given = []

    class Plain(GeneralTracker):
        name, requires_logging_directory, main_process_only = "mlflow", False, True

        def __init__(self, experiment_name, **kwargs):
            super().__init__()
            given.append(("started", experiment_name, kwargs))

        tracker = None

        def store_init_configuration(self, values):
            given.append(("configuration", values))

        def log(self, values, step, **kwargs):
            given.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Plain)
    available = [*tracking.get_available_trackers(), LoggerType.MLFLOW]
    for module in (trackers, tracking):
        monkeypatch.setattr(module, "get_available_trackers", lambda: available)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(report_to="wandb,tensorboard,mlflow", run_name="named", max_steps=6) == 0
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    events = EventAccumulator(str(next(tmp_path.glob("run/**/events*")).parent), size_guidance={"images": 0}).Reload()
    board = {event.step: event.value for event in events.Scalars("train/loss")}
    assert board == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)
    assert events.Images("importance/heat_map")
    assert {step: values["train/loss"] for step, values in given[2:] if "train/loss" in values} == {
        line["step"]: line["loss"] for line in lines
    }
    assert given[0] == ("started", "ist", {"run_name": "named"})
    wandb_rows = [
        row["item"] for (record,) in [offline_records(tmp_path / "run")] for row in of_type(record, "history")
    ]
    assert {row["train/loss"] for row in wandb_rows if "train/loss" in row} == {line["loss"] for line in lines}


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(train, tmp_path, monkeypatch, capsys):
    def fail(self, values, step=None, **kwargs):
        raise ConnectionError("gone")

    monkeypatch.setattr(tracking.WandBTracker, "log", fail)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(report_to="wandb,tensorboard", max_steps=4) == 0
    assert capsys.readouterr().err.count("wandb has failed (gone)") == 1
    wandb.finish()
    events = EventAccumulator(str(next(tmp_path.glob("run/**/events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("mlflow", "--report_to mlflow needs a package: pip install mlflow"),
        ("paper", "--report_to must be of aim, .* all or none; got paper"),
        ("none,wandb", "--report_to none wandb: all and none stand alone"),
    ],
)
def test_trackers_that_are_none(train, report_to, message):
    with pytest.raises(UsageError, match=message):
        train(report_to=report_to)


def test_a_tracker_that_cannot_end_costs_no_run(train, tmp_path, monkeypatch, capsys):
    def fail(self):
        raise ConnectionError("gone")

    monkeypatch.setattr(tracking.TensorBoardTracker, "finish", fail)
    assert train(report_to="tensorboard", max_steps=2) == 0
    assert f"tensorboard has failed (gone); {tmp_path / 'run'} has everything." in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
