"""An error under a launcher: said once, at the end of what the launcher prints, by whichever rank had it."""

import os
import subprocess
import sys

import pytest
from support import ROOT

ACCELERATE = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
LAUNCHERS = {
    "accelerate": [*ACCELERATE, "accelerate_configs/ddp.yaml", "--num_processes", "2"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def stderr_of(launcher: list[str], *arguments: str, **environment: str) -> list[str]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    command = [sys.executable, *launcher, *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    return result.stderr.splitlines()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_refused_key_is_named_once_and_last(launcher):
    lines = stderr_of(LAUNCHERS[launcher], "train_ist.py", "--model_name_or_path=m", "--train_file=x", "--lora_r=0")
    (place,) = [i for i, line in enumerate(lines) if "--lora_r must be 1 or more" in line]
    assert lines[place] == "  traceback : error: --lora_r must be 1 or more; got 0."
    assert len(lines) - place <= 3  # the launcher's last border


def test_refused_rows_are_named_once_and_last(tiny, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": ""}]')
    flags = (f"--model_name_or_path={tiny}", f"--train_file={tmp_path}/rows.json", f"--output_dir={tmp_path}/run")
    lines = stderr_of(LAUNCHERS["torchrun"], "train_ist.py", *flags, "--report_to=none")
    (place,) = [i for i, line in enumerate(lines) if "rows.json: row 0 has no answer" in line]
    assert lines[place].startswith("  traceback : error: --train_file")
    assert len(lines) - place <= 3


def test_what_another_rank_raises_is_the_root_cause(arguments, tmp_path):
    flags = arguments(per_device_train_batch_size=2)
    spied = ("tests/support/spy.py", "train_ist.py", *flags)
    lines = stderr_of(LAUNCHERS["accelerate"], *spied, SPY_FAIL="4", SPY_DIR=str(tmp_path))
    assert lines[-2:-1] == ["  traceback : MemoryError: rank 1 has no memory left"]
    assert any(line.endswith("MemoryError: rank 1 has no memory left") for line in lines[:-2])  # Python's traceback


def test_one_process_prints_the_error_alone():
    launcher = [*ACCELERATE, "accelerate_configs/single.yaml", "--quiet"]
    lines = stderr_of(launcher, "train_ist.py", "--model_name_or_path=m", "--train_file=x", "--lora_r=0")
    assert lines[-1:] == ["error: --lora_r must be 1 or more; got 0."]
