"""The W&B sweeps: valid by the engine's own schema, and run by W&B's own agent, without the service."""

import copy
import json
import os
import queue
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import sweeps
import yaml
from support import ROOT, of_type, offline_records, read_lines
from support.cluster import until
from support.sweep_service import suggest
from wandb.wandb_agent import Agent

from ist.training.arguments import ARGUMENTS

FILES = ("sweep.yaml", "sweep_grid.yaml")


def load(name: str) -> dict:
    return yaml.safe_load((ROOT / "launch" / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_sweeps_are_valid(name):
    sweep = load(name)
    assert sweeps.schema_violations_from_proposed_config(copy.deepcopy(sweep)) == []
    assert sweep["metric"] == {"name": "eval/loss", "goal": "minimize"}
    known = {key.name for group in ARGUMENTS for key in fields(group)} | {"config"}
    assert sweep["parameters"].keys() <= known
    recipe = yaml.safe_load((ROOT / sweep["parameters"]["config"]["value"]).read_text())
    assert recipe["validation_size"]
    assert recipe["eval_steps"]
    assert "output_dir" not in {**recipe, **sweep["parameters"]}  # else all runs would share it
    assert sweep["parameters"]["resume_from_checkpoint"] == {"value": "auto"}
    (ROOT / sweep["command"][4]).read_text()
    del sweep["metric"]["goal"]
    sweep["early_terminate"] = {"type": "hyperband"}
    assert sweeps.schema_violations_from_proposed_config(sweep)


def test_the_search_has_its_documented_keys():
    sweep = load("sweep.yaml")
    searched = {key for key, value in sweep["parameters"].items() if "value" not in value}
    assert searched == {
        *("score_lr", "suppression", "update_interval", "trained_layers", "kept_layers", "learning_rate")
    }
    assert sweep["early_terminate"]["type"] == "hyperband"
    assert sweep["method"] == "bayes"


def losses_of(record: list[dict]) -> dict[int, float]:
    """{step: eval/loss}"""
    items = [row["item"] for row in of_type(record, "history")]
    return {item["_step"]: item["eval/loss"] for item in items if "eval/loss" in item}


class OneMachine:
    """W&B's agent with its commands given by hand; the sweep's recipe is a tiny one."""

    def __init__(self, folder: Path, name: str, recipe: Path, monkeypatch) -> None:
        monkeypatch.chdir(folder)
        for part in ("train_ist.py", "ist", "accelerate_configs"):
            (folder / part).symlink_to(ROOT / part)
        for key, value in {
            **{"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_SWEEP_ID": "local", "WANDB_DIR": str(folder)},
            **{"PROCESSES": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            **{"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        }.items():
            monkeypatch.setenv(key, value)
        monkeypatch.delenv("WANDB_RUN_ID", raising=False)
        self.folder, self.sweep = folder, load(name)
        self.sweep["parameters"]["config"]["value"] = str(recipe)
        self.agent = Agent(api=None, queue=queue.Queue(), sweep_id="local")
        self.agent._sweep_command = list(self.sweep["command"])

    def start(self, run_id: str, arguments: dict, kind: str = "run") -> subprocess.Popen:
        command = {"type": kind, "run_id": run_id, "program": self.sweep["program"], "args": arguments}
        assert "exception" not in (response := self.agent._process_command(command)), response
        return self.agent._run_processes[run_id]._popen


@pytest.fixture
def machine(tmp_path, monkeypatch, tiny, train_file):
    def make(name: str, **overrides) -> OneMachine:
        recipe = {
            **{"model_name_or_path": tiny, "train_file": train_file, "validation_size": 8, "max_steps": 12},
            **{"lora_r": 4, "warmup_steps": 2, "eval_steps": 4, "logging_steps": 1, **overrides},
        }
        (tmp_path / "tiny.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
        machine = OneMachine(tmp_path, name, tmp_path / "tiny.yaml", monkeypatch)
        for key in ("eval_steps", "save_steps"):  # the recipe's own: 40 would be beyond the end
            machine.sweep["parameters"].pop(key, None)
        return machine

    return make


@pytest.mark.slow
def test_five_suggestions_run_and_log_the_metric(machine):
    here, runs = machine("sweep.yaml"), []
    for i in range(5):
        arguments, run_id = suggest(here.sweep, runs), f"run{i}"
        process = here.start(run_id, arguments)
        flags = [f"--{key}={entry['value']}" for key, entry in arguments.items()]
        launch = ["accelerate", "launch", "--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "1"]
        assert process.args == ["/usr/bin/env", *launch, "--main_process_port", "0", "train_ist.py", *flags]
        assert process.wait(timeout=200) == 0
        folder = here.folder / f"runs/tiny-{run_id}"
        configuration = json.loads((folder / "run.json").read_text())["configuration"]
        for key in ("score_lr", "suppression", "update_interval", "learning_rate"):
            assert configuration[key] == arguments[key]["value"]
        (record,) = offline_records(folder)
        (started,) = of_type(record, "run")
        assert (started["run_id"], started["sweep_id"], started["job_type"]) == (run_id, "local", "train")
        lines = read_lines(folder / "metrics.jsonl")
        logged = losses_of(record)
        assert logged == {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
        assert list(logged) == [0, 4, 8, 12]
        finished = {"state": sweeps.RunState.finished, "summary_metrics": {"eval/loss": logged[12]}}
        history = [{"eval/loss": loss} for loss in logged.values()]
        runs.append(sweeps.SweepRun(name=run_id, config=arguments, history=history, **finished))
    assert len({run.config["score_lr"]["value"] for run in runs}) == 5
    assert len(list((here.folder / "runs").iterdir())) == 5


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["cluster", "W&B"])
def test_an_interrupted_run_goes_on_under_its_own_id(machine, number):
    here = machine("sweep_grid.yaml", max_steps=150, eval_steps=10)
    arguments, folder = suggest(here.sweep, []), here.folder / "runs/tiny-again"
    process = here.start("again", arguments)
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 10, "the run trains", 120, 0.05)
    if number == signal.SIGTERM:  # early termination: the agent signals the launcher
        here.agent._process_command({"type": "stop", "run_id": "again"})
    else:  # as in a job of launch/sweep.sbatch, where only the worker hears it
        (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(worker), number)
    assert process.wait(timeout=60) != 0
    stopped = json.loads((folder / "run.json").read_text())
    assert (stopped["status"], stopped["signal"]) == ("interrupted", number.name)
    assert here.start("again", arguments, "resume").wait(timeout=200) == 0
    resumed = json.loads((folder / "run.json").read_text())
    assert resumed["status"] == "finished"
    assert resumed["resumed_from"].endswith(f"step_{stopped['steps']:06d}")
    first, second = offline_records(folder)
    assert bool(of_type(first, "preempting")) == (number == signal.SIGUSR1)
    assert [of_type(record, "exit")[0]["exit_code"] for record in (first, second)] == [3, 0]
    lines = read_lines(metrics)
    assert losses_of(first) | losses_of(second) == {
        line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line
    }
    assert not losses_of(first).keys() & losses_of(second).keys()
