"""The scripts in launch/: help with nothing installed, what they refuse, shellcheck; signals that are blocked."""

import itertools
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support import ROOT

SCRIPTS = sorted({*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")} - {ROOT / "launch/slurm.sh"})
WITH_HELP = [*SCRIPTS, ROOT / "tests/run.sh", ROOT / ".ci/run"]
JOBS = [script for script in SCRIPTS if script.suffix == ".sbatch"]


def run_bare(*command: object) -> subprocess.CompletedProcess:
    """With no environment but the system's programs, as on a login node before anything is set up."""
    environment = {"PATH": "/usr/bin:/bin"}
    return subprocess.run(
        list(map(str, command)), env=environment, cwd="/", capture_output=True, text=True, timeout=20, check=False
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_help_needs_nothing(script):
    for flag in ("--help", "-h"):
        result = run_bare("bash", script, flag)
        assert result.returncode == 0, result.stderr
        assert f"launch/{script.name}" in result.stdout
        assert len(result.stdout.splitlines()) >= 4
        assert "set -euo" not in result.stdout
        assert not result.stderr


@pytest.mark.parametrize("script", WITH_HELP, ids=lambda script: script.name)
def test_help_is_the_comment_at_the_top_and_nothing_else(script):
    lines = [line for line in script.read_text().splitlines()[1:] if not line.startswith("#SBATCH")]
    head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    for where, name in ((ROOT, script.relative_to(ROOT)), (script.parent, script.name)):
        done = subprocess.run(["bash", str(name), "--help"], cwd=where, capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == [line[2:] for line in head]


def test_there_are_scripts():
    assert len(JOBS) == 3
    assert len(SCRIPTS) >= 6


@pytest.mark.parametrize("script", JOBS, ids=lambda script: script.name)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "2", "x"], "unknown option --nodes"),
        ([], "see --help"),
        (["x"], "not a Slurm job; submit it: sbatch"),
    ],
)
def test_jobs_refuse(script, arguments, message):
    result = run_bare("bash", script, *arguments)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.skipif(
    not shutil.which("shellcheck") and "REQUIRE_CLUSTER" not in os.environ, reason="no shellcheck: apt install it"
)
def test_scripts_are_clean():
    scripts = [*SCRIPTS, ROOT / "launch/slurm.sh", ROOT / "tests/run.sh", ROOT / ".ci/run"]
    result = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


BLOCKED = """
import os, signal
from train_ist import StopRequest
os.kill(os.getpid(), signal.SIGTERM)  # before anything is ready: it waits
stop = StopRequest()
assert stop.signal == signal.SIGTERM
os.kill(os.getpid(), signal.SIGUSR1)  # now it is received at once
assert stop.signal == signal.SIGUSR1
stop.restore()
print(*sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())))
"""


def test_signals_are_blocked_until_they_can_be_handled():
    command = [sys.executable, ROOT / "launch/block_signals.py", "TERM,USR1,USR2", "-c", BLOCKED]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(int(each)) for each in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
