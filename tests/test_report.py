"""What trackers and the picture get: read back from their own files, not from our calls."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, read_lines
from matplotlib.image import imread

from ist.config import UsageError
from ist.report import draw_importance, main


def test_offline_wandb_holds_every_number(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = arguments(report_to="wandb", run_name="trial", validation_size=8, eval_steps=10, max_steps=10)
    subprocess.run([sys.executable, str(ROOT / "train_ist.py"), *options], check=True, cwd=ROOT, timeout=240)
    (offline,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(offline), "--summary", "--json"]
    inspected = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    summary, config = inspected["summary"], inspected["config"]
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "peak_memory_bytes"):
        assert summary[f"train/{key}"] == lines[-2][key]
    assert summary["train/step_seconds"] == lines[-2]["step_seconds"]
    assert summary["eval/loss"] == lines[-1]["validation_loss"]
    update = read_lines(tmp_path / "run/importance.jsonl")[-1]
    for i in range(4):
        assert summary[f"importance/score/layer_0{i}"] == pytest.approx(update["scores"][i])
    assert (
        sum(summary[f"importance/trained_steps/layer_0{i}"] for i in range(4)) == 9
    )  # 8 steps before the update, and the one it precedes
    for j in range(3):
        assert summary[f"probe/loss_{j}"] == pytest.approx(update["losses"][j])
        assert summary[f"probe/reward_{j}"] == pytest.approx(update["rewards"][j])
    assert 0 < summary["probe/time_share"] < 1
    assert len(list(offline.parent.glob("files/media/images/importance/heat_map_*.png"))) == 2
    assert config["lora_r"]["value"] == 4 if isinstance(config["lora_r"], dict) else config["lora_r"] == 4


def test_wandb_without_a_login_stops_before_anything(train, tmp_path, monkeypatch):
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match=r"wandb login.*WANDB_MODE=offline.*--report_to none"):
        train(report_to="wandb")


def test_report_to_none_imports_no_wandb(arguments):
    code = "import sys, train_ist; train_ist.main(sys.argv[1:]); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *arguments(max_steps=5)], check=True, cwd=ROOT, timeout=240)


def test_importing_ist_imports_neither_trainer_nor_wandb():
    code = (
        "import sys; from ist import ISTConfig, ImportanceSampler, SparseTuner; ISTConfig()\n"
        "assert not {'wandb', 'transformers.trainer', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_tensorboard(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(report_to="tensorboard", validation_size=8, max_steps=6) == 0
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    accumulator = EventAccumulator(str(events)).Reload()
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [e.value for e in accumulator.Scalars("train/loss")] == pytest.approx([x["loss"] for x in lines[1:7]])
    assert "importance/heat_map" in accumulator.Tags()["images"]


def test_the_picture_is_drawn_again_from_the_files(train, tmp_path, capsys):
    assert train() == 0
    picture = tmp_path / "run/importance.png"
    first = imread(picture)
    assert first.shape[0] > 300 < first.shape[1]
    assert len({tuple(p) for p in first.reshape(-1, 4)[::7].tolist()}) > 20  # not an empty canvas
    picture.unlink()
    capsys.readouterr()
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.strip() == str(picture)
    assert (imread(picture) == first).all()
    with pytest.raises(UsageError, match="holds no run"):
        draw_importance(tmp_path)
