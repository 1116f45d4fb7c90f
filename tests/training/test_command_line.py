"""What a recipe, a name or a stream must not do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, read_lines
from support.runs import assert_same_adapter, cut_after

from ist.training.command_line import UsageError
from ist.training.reading import load_rows

RECIPES = {
    "lora_r: 4\nseed: 1\nlora_r: 8\n": "the key lora_r is given twice",
    "config: other.yaml\n": "a recipe cannot name another one",
    "target_modules: [q_proj, --trust_remote_code, 'true']\n": "target_modules must list plain values, without flags",
    "train_file: [[a.json]]\n": "train_file must list plain values",
    "run_name: ''\n": "--run_name must not be empty",
}


@pytest.mark.parametrize("text", RECIPES)
def test_a_recipe_with_a_trap_is_refused(train, tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UsageError, match=RECIPES[text]):
        train(config=tmp_path / "recipe.yaml")


@pytest.mark.parametrize("key", ["output_dir", "train_file", "peft_config", "resume_from_checkpoint", "target_modules"])
def test_an_empty_value_is_refused(train, key):
    with pytest.raises(UsageError, match=f"--{key} must not be empty"):
        train(**{key: ""})


def test_an_empty_folder_overwrites_nothing(tmp_path):
    (tmp_path / "train.json").write_text("mine")
    command = [sys.executable, "-m", "ist.training.word_problems", "--output_dir", ""]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (
        2,
        "error: --output_dir must not be empty; leave it out for its default.\n",
    )
    assert (tmp_path / "train.json").read_text() == "mine"


@pytest.mark.parametrize("name", ["../x", "/x", "..", "a\\b"])
def test_a_name_does_not_leave_the_runs_folder(train, monkeypatch, name):
    with pytest.raises(UsageError, match="--run_name is a part of the run folder's name"):
        train(output_dir=None, run_name=name)
    monkeypatch.setenv("WANDB_RUN_ID", name)
    with pytest.raises(UsageError, match="WANDB_RUN_ID is a part of the run folder's name"):
        train()


def test_a_file_name_is_no_pattern(tmp_path):
    for name, count in (("st*r.json", 2), ("star.json", 3), ("s[t]r.json", 4), ("str.json", 1)):
        (tmp_path / name).write_text(json.dumps([{"instruction": name, "output": "x"}] * count))
    for name, count in (("st*r.json", 2), ("star.json", 3), ("s[t]r.json", 4)):
        assert load_rows("train_file", [str(tmp_path / name)])["instruction"] == [name] * count


def test_rows_replaced_in_place_are_read_again(tmp_path):
    file = tmp_path / "rows.json"
    for text in ("one", "two"):
        file.write_text(json.dumps([{"instruction": text, "output": "x"}]))
        os.utime(file, ns=(10**18, 10**18))
        assert load_rows("train_file", [str(file)])["instruction"] == [text]


def test_a_bad_line_in_the_middle_costs_that_line_alone(train, tmp_path, capsys):
    options = {"save_steps": 5, "max_steps": 10}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    cut_after(5, tmp_path / "whole", tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], '{"step": 2, "lo', *lines[2:]]) + "\n")
    assert train(**options, resume_from_checkpoint="auto") == 0
    assert f"{file}: line 2 is not a JSON object and is left out." in capsys.readouterr().err
    assert [line["step"] for line in read_lines(file)] == [1, *range(3, 11)]


@pytest.mark.parametrize(("picture", "plot"), [("importance.png", "plot_importance"), ("loss.png", "plot_loss")])
def test_a_picture_that_cannot_be_drawn_costs_no_run(train, tmp_path, monkeypatch, capsys, picture, plot):
    monkeypatch.setattr(f"ist.training.record.{plot}", lambda *_: 1 / 0)
    assert train(max_steps=1) == 0
    again = f"python -m ist.report {tmp_path / 'run'} draws it again."
    assert f"{picture} is not drawn (division by zero); {again}" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").glob("*.png")} == {"importance.png", "loss.png"} - {picture}
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"


def test_a_folder_with_dollars_is_drawn(train, tmp_path):
    run = tmp_path / "a$\\foo{$b"
    assert train(max_steps=1, output_dir=run) == 0
    assert (run / "importance.png").stat().st_size > 1000


STREAMS = {
    "head": "| head -1",
    "closed": ">&-",
    "both closed": ">&- 2>&-",
    "full": "> /dev/full",
    "errors": "2> /dev/full",
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return tmp_path_factory.mktemp("reference") / "run"


@pytest.mark.parametrize("stream", STREAMS)
def test_a_reader_that_goes_away_costs_no_run(arguments, train, tmp_path, reference, stream):
    options = {"max_steps": 6}
    if not reference.exists():
        assert train(**options, output_dir=reference) == 0
    command = " ".join(map(repr, [sys.executable, str(ROOT / "train_ist.py"), *arguments(**options)]))
    script = f"set -o pipefail; {command} {STREAMS[stream]}"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same_adapter(tmp_path / "run", Path(reference))
