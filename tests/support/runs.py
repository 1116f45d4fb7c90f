"""A run's results, compared; a run on two ranks."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from support import ROOT, warm_python

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(run: Path, other: Path) -> None:
    one, two = adapter_of(run), adapter_of(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def without_times(lines: list[dict]) -> list[dict]:
    clocks = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "probe_seconds")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def cut_after(step: int, whole: Path, cut: Path) -> None:
    """A copy of a finished run as a crash after `step` would have left it, its later lines included."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "adapter")
    for later in (cut / "checkpoints").iterdir():
        if later.name > f"step_{step:06d}":
            shutil.rmtree(later)
    record = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**record, "status": "running"}))


def run_on_two_ranks(topology: str, flags: list[str], spy_dir: Path) -> None:
    """train_ist.py under accelerate launch with a file of accelerate_configs, on two gloo ranks."""
    command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [f"accelerate_configs/{topology}.yaml", "tests/support/spy.py", "train_ist.py", *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": warm_python(), "SPY_DIR": str(spy_dir)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=240)
    assert json.loads((spy_dir / "rank1.json").read_text())["all_dtensors"] == (topology == "fsdp2")
