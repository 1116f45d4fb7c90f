"""Calls and bytes of each collective, in a launch of train_ist.py."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ist.benchmark.arms import train
from ist.distributed import CollectiveCounter
from ist.training.command_line import UsageError, markdown_table
from ist.training.files import read_lines
from ist.training.observer import Observer
from ist.tuner import SparseTuner


class Traffic(Observer):
    """Calls and bytes of each step's collectives, and the layers and bytes of the adapter that train in it."""

    def __init__(self, counter: CollectiveCounter) -> None:
        self.steps = counter.steps

    def ready(self, tuner: SparseTuner, optimizer: torch.optim.Optimizer) -> None:
        self.tuner = tuner

    def before_step(self, step: int) -> None:
        self.finish_step()
        self.steps.append({})

    def finish_step(self) -> None:
        if self.steps:
            trained, layers = self.tuner.trained_parameters(), self.tuner.layers
            everything = [parameter for layer in layers.parameters for parameter in layer]
            for name, count, parameters in (
                ("trained layers", len(self.tuner.trained), trained),
                ("all layers", layers.n_layers, everything),
            ):
                self.steps[-1][name] = [count, sum(p.numel() * p.element_size() for p in parameters)]


def communicate(flags: dict) -> None:
    """On each rank of a launch: train, and rank 0 prints {collective: [calls, bytes] per step} as one line of JSON."""
    with CollectiveCounter() as counter:
        traffic = Traffic(counter)
        with contextlib.redirect_stdout(sys.stderr):
            train(flags, traffic)
        traffic.finish_step()
    if os.environ.get("RANK", "0") == "0":
        print("traffic: " + json.dumps(counter.steps))


def measure_communication(flags: dict, topology: str, ranks: int) -> tuple[list[dict], float]:
    """(calls and bytes of each step of train_ist.py on `ranks` processes, seconds per step), from a launch."""
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(root / f"accelerate_configs/{topology}.yaml"), "--num_processes", str(ranks)]
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if torch.cuda.device_count() < ranks:  # processes on the CPU; FSDP is on there by our own means only
        command += [str(Path(__file__).parent / "fsdp_on_cpu.py")]
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    else:
        command += ["-m"]
    with tempfile.TemporaryDirectory() as folder:
        values = flags | {"output_dir": f"{folder}/run", "report_to": "none"}
        command += ["ist.benchmark", "rank", "--flags", json.dumps({key: str(value) for key, value in values.items()})]
        done = subprocess.run(command, env=os.environ | environment, cwd=root, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            raise UsageError(f"the launch ended with {done.returncode}; its error is above.")
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("traffic: "))
        seconds = [line["step_seconds"] for line in read_lines(Path(folder) / "run/metrics.jsonl")][-1]
    return json.loads(line.removeprefix("traffic: ")), seconds


def communication_row(name: str, steps: list[dict]) -> list[str]:
    """A row of the table: calls and bytes of each collective per step, and gradients' share of the adapter's bytes."""
    gradients = [
        sum(step.get(c, [0, 0])[1] for c in ("all_reduce", "reduce_scatter_tensor", "reduce_scatter_single"))
        for step in steps
    ]
    ratio = [one / step["all layers"][1] for one, step in zip(gradients, steps)]
    trained = [step["trained layers"][0] / step["all layers"][0] for step in steps]
    names = sorted({key for step in steps for key in step} - {"trained layers", "all layers"})
    counted = (
        f"{c}: {statistics.mean(step.get(c, [0, 0])[0] for step in steps):.1f} calls, "
        f"{statistics.mean(step.get(c, [0, 0])[1] for step in steps) / 1e3:.1f} kB"
        for c in names
    )
    return [name, "; ".join(counted), f"{statistics.mean(ratio):.4f}", f"{statistics.mean(trained):.4f}"]


def communication_table(steps: dict[str, list[dict]], ranks: int) -> str:
    header = [f"{ranks} ranks", "per step", "gradient bytes / adapter bytes", "trained share of the layers"]
    return "\n".join(markdown_table(header, [communication_row(name, taken) for name, taken in steps.items()]))
