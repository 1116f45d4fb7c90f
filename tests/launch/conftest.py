"""Fixtures of the experiments' tests."""

import json
from pathlib import Path

import pytest
import yaml
from support import reset_accelerate
from support.experiments import FILE, Inline

import train_ist
from ist.evaluate import command as evaluate
from ist.training.word_problems import arithmetic_rows
from launch.experiments import results, runner


@pytest.fixture
def write(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def many_rows(tmp_path) -> Path:
    file = tmp_path / "many.json"
    file.write_text(json.dumps(arithmetic_rows(80, seed=1, held_out=False)))
    return file


@pytest.fixture
def few_processes(monkeypatch):
    """The first run is a process of its own, as for users; the others are run in this one, without its start."""
    real, started = runner.Runner._process, []

    def process(self, argv, where, **options):
        started.append(argv)
        if len(started) == 1:
            return real(self, argv, where, **options)
        reset_accelerate()
        main = train_ist.main if argv[0] == "train_ist.py" else evaluate.main
        assert main([part for part in argv if part not in ("train_ist.py", "-m", "ist.evaluate")]) == 0
        reset_accelerate()

    def take_turns(arms, steps, parts, say):
        """IST's steps take 3 seconds, those of the others 2."""
        took = {name: 3.0 if flags["selection"] == "ist" else 2.0 for name, flags in arms.items()}
        assert steps == 30 and not parts and not any("output_dir" in flags for flags in arms.values())
        return {name: {"total": took[name], "turns": [took[name]] * 20, "stride": 1} for name in arms}

    monkeypatch.setattr(results, "take_turns", take_turns)
    monkeypatch.setattr(runner.Runner, "_process", process)
    monkeypatch.setattr(runner, "ThreadPoolExecutor", Inline)
    return started
