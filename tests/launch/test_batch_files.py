"""What the batch scripts read of a run and of a recipe, with a launcher that only says what it was asked for."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from support import ROOT

NAMES = ["modèle/é ü", "模型", 'a"b\\c', "a # b", "\U0001f600", "o'x $HOME"]


@pytest.fixture
def submit(tmp_path):
    """Start a batch script as Slurm would: submit(script, *arguments) -> (what it launched, the whole process)."""
    for name in ("train_ist.py", "ist", "launch", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin/srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > launched\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{srun.parent}:/usr/bin:/bin", "PYTHON": sys.executable, "LC_ALL": "C"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": str(tmp_path)}

    def start(script: str, *arguments: str) -> tuple[list[str], subprocess.CompletedProcess]:
        command = ["bash", str(ROOT / "launch" / script), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        file = tmp_path / "launched"
        return [os.fsdecode(part) for part in file.read_bytes().split(b"\0")] if file.exists() else [], done

    return start


def value_of(launched: list[str], key: str) -> str:
    return launched[launched.index(key) + 1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indent", [1, None])
def test_an_evaluation_is_of_the_runs_model(submit, tmp_path, name, indent):
    (tmp_path / "runs/x").mkdir(parents=True)
    record = {"status": "finished", "configuration": {"seed": 1, "model_name_or_path": name}}
    (tmp_path / "runs/x/run.json").write_text(json.dumps(record, indent=indent))  # as it is written: ASCII, escaped
    launched, done = submit("evaluate.sbatch", "runs/x", "--test_file", "a.json")
    assert done.returncode == 0, done.stderr
    assert value_of(launched, "--model_name_or_path") == name


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"configuration": 3}'])
def test_a_run_without_a_model_is_refused(submit, tmp_path, text):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/run.json").write_text(text)
    launched, done = submit("evaluate.sbatch", "runs/x", "--test_file", "a.json")
    assert (done.returncode, launched) == (2, [])
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: runs/x/run.json ")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("style", [{}, {"allow_unicode": True}, {"default_style": "'"}, {"default_flow_style": True}])
def test_a_run_has_the_folder_of_its_recipe(submit, tmp_path, name, style):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"seed": 5, "output_dir": f"runs/{name}-{{seed}}"}, **style))
    launched, done = submit("train.sbatch", "r.yaml")
    assert value_of(launched, "--output_dir") == f"runs/{name}-5"
    assert "status none" in done.stdout + done.stderr  # nothing was run
    run = tmp_path / f"runs/{name}-5"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"status": "finished"}))
    _, done = submit("train.sbatch", "r.yaml")
    assert done.returncode == 0 and "is finished" in done.stdout


def test_a_flag_wins_and_a_bad_recipe_is_one_line(submit, tmp_path):
    (tmp_path / "r.yaml").write_text("output_dir: runs/a # why\nresume_from_checkpoint: none\n")
    launched, _ = submit("train.sbatch", "r.yaml", "--output_dir=runs/b")
    assert value_of(launched, "--output_dir") == "runs/b"
    assert value_of(launched, "--resume_from_checkpoint") == "none"
    (tmp_path / "launched").unlink()
    (tmp_path / "r.yaml").write_text("a: [1\nb: 2\n")
    launched, done = submit("train.sbatch", "r.yaml")
    assert (done.returncode, launched) == (2, [])
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: r.yaml is not YAML")
