"""Faults of the machine around a run: a disk that becomes full, signals, and readers of its output that go away.

    python tests/support/faults.py [--disks 15] [--seed 1] [--output FILE]

A run on a disk of random size (a tmpfs, so as root) must end with one line and status failed, leave only whole
checkpoints and nothing half-written, and, given room, go on to the adapter of a run that was never disturbed. SIGHUP
and SIGXCPU must save; a closed stdout or stderr must cost nothing.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from safetensors.torch import load_file

import train_ist
from ist.training.checkpoint import checkpoint_steps, find_checkpoint
from ist.training.command_line import run_command
from ist.training.word_problems import arithmetic_rows
from support import make_tiny, read_lines, reset_accelerate
from support.suites import write_results

STEPS = 12


class Bench:
    """A tiny model, its rows, and the adapter of an undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder, rows = folder, arithmetic_rows(64, 0, held_out=False)
        make_tiny(folder / "model", rows)
        (folder / "rows.json").write_text(json.dumps(rows))
        code, stderr = self.run(folder / "whole")
        assert code == 0, stderr
        self.bytes = sum(file.stat().st_size for file in (folder / "whole").rglob("*") if file.is_file())

    def command(self, run: Path, **options) -> list[str]:
        values = {
            **{"model_name_or_path": self.folder / "model", "train_file": self.folder / "rows.json", "output_dir": run},
            **{"report_to": "none", "max_steps": STEPS, "save_steps": 2, "logging_steps": 1, "lora_r": 4},
            **{"update_interval": 4, "trained_layers": 2, "max_length": 64, "validation_size": 4, "eval_steps": 4},
            **options,
        }
        return [sys.executable, str(ROOT / "train_ist.py"), *(f"--{key}={value}" for key, value in values.items())]

    def run(self, run: Path, **options) -> tuple[int, str]:
        """(exit code, stderr) of a command in this process, which has imported everything."""
        reset_accelerate()
        stderr, argv, streams = io.StringIO(), sys.argv, (sys.stdout, sys.stderr)
        sys.argv = self.command(run, **options)[1:]
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(stderr):
                run_command(train_ist.main)
        except SystemExit as end:
            return end.code, stderr.getvalue()
        except BaseException:
            return 1, stderr.getvalue() + traceback.format_exc()
        finally:
            sys.argv, (sys.stdout, sys.stderr) = argv, streams
        raise AssertionError("a command ends by SystemExit")

    def environment(self) -> dict[str, str]:
        return os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(self.folder / "cache")}

    def equals_whole(self, run: Path) -> bool:
        one, two = (load_file(path / "adapter/adapter_model.safetensors") for path in (run, self.folder / "whole"))
        return one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of its own with `size` bytes.

    Raises:
        PermissionError: only root can have one.
    """
    if os.geteuid() != 0:
        raise PermissionError("a disk of a size is a tmpfs, which only root can mount")
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()


def error_lines(stderr: str) -> list[str]:
    """What a user would take for an error."""
    return [
        line for line in stderr.splitlines() if re.search("error|Traceback|Exception|cannot be", line, re.IGNORECASE)
    ]


def full_disk(bench: Bench, size: int) -> dict:
    """A run on a disk of `size` bytes, and again with room; raises AssertionError where a rule is broken."""
    with disk(bench.folder / "disk", size) as folder:
        run = folder / "run"
        outcome = {"bytes": size} | judge(bench, run, *bench.run(run), "No space left")
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        return outcome | resumed(bench, run)


def judge(bench: Bench, run: Path, code: int, stderr: str, reason: str) -> dict:
    """What a run has left whose disk failed; raises AssertionError where a rule is broken."""
    lines, steps = error_lines(stderr), checkpoint_steps(run)
    status = json.loads((run / "run.json").read_text())["status"] if (run / "run.json").exists() else "none"
    outcome = {"code": code, "status": status, "checkpoints": len(steps)}
    if code == 0:
        assert status == "finished", stderr
        return outcome
    assert code in (1, 2), stderr
    assert len(lines) == 1, stderr
    assert re.search(reason, lines[0]), stderr
    assert status == "failed" or not steps, (status, steps)
    for step in steps:
        assert find_checkpoint(run, str(run / f"checkpoints/step_{step:06d}"))
    if steps:
        assert f"step_{max(steps):06d}" in lines[0], lines
    left = [str(path.relative_to(run)) for path in run.rglob(".*")]
    assert not left, left
    return outcome | {"line": lines[0].replace(str(bench.folder), "")}


def resumed(bench: Bench, run: Path) -> dict:
    code, stderr = bench.run(run, resume_from_checkpoint="auto")
    assert code == 0, stderr
    assert [line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] == list(range(1, STEPS + 1))
    return {"end": "equal" if bench.equals_whole(run) else "another"}


def begun(bench: Bench, run: Path, **options) -> subprocess.Popen:
    """A run that has logged three steps, and is held by SIGSTOP until it gets SIGCONT."""
    for _ in range(4):
        process = _held(bench, run, **options)
        if len(read_lines(run / "metrics.jsonl")) < STEPS // 2:
            return process
        process.send_signal(signal.SIGCONT)  # it was faster than its observer, who had to wait for a core
        process.communicate()
        shutil.rmtree(run)
    raise AssertionError("the run was faster than its observer, four times")


def _held(bench: Bench, run: Path, **options) -> subprocess.Popen:
    process = subprocess.Popen(
        bench.command(run, **options),
        env=bench.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (run / "metrics.jsonl").exists() or len(read_lines(run / "metrics.jsonl")) < 3:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    return process


def failing_disk(bench: Bench, how: str) -> dict:
    """The disk becomes full, or the run folder goes away, while the run is held; later both are as before."""
    with disk(bench.folder / "disk", 64 << 20) as folder:
        run, filler = folder / "run", folder / "filler"
        process = begun(bench, run)
        if how == "filled":
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(b"\0" * 4096):
                    pass
        else:
            run.rename(folder / "away")
        process.send_signal(signal.SIGCONT)
        _, stderr = process.communicate(timeout=120)
        filler.unlink(missing_ok=True)
        if how == "gone":
            assert not run.exists(), list(run.iterdir())
            assert process.returncode == 1, stderr
            assert len(error_lines(stderr)) == 1, stderr
            (folder / "away").rename(run)
            return {"code": process.returncode} | resumed(bench, run)
        outcome = judge(bench, run, process.returncode, stderr, "No space left")
        return outcome | resumed(bench, run)


def stopped(bench: Bench, name: str, number: signal.Signals) -> dict:
    """A run that gets a signal after its first lines: it saves, says so, and goes on to the same end."""
    run, ours = bench.folder / name, signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP would be ignored
    process = begun(bench, run)
    signal.signal(number, ours)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 3, stderr
    return {"signal": number.name, "code": process.returncode} | resumed(bench, run)


PIPES = {
    "stdout to head -1": "{command} | head -1",
    "stderr to head -1": "{command} 2> >(head -1)",
    "stdout closed": "{command} >&-",
    "stderr closed": "{command} 2>&-",
    "both closed": "{command} >&- 2>&-",
    "stdout on a full disk": "{command} > /dev/full",
    "stderr on a full disk": "{command} 2> /dev/full",
    "no stdin": "{command} <&-",
}


def piped(bench: Bench, name: str) -> dict:
    """A run whose streams go away: it finishes."""
    run = bench.folder / name.replace(" ", "-")
    script = PIPES[name].format(command=" ".join(bench.command(run)))
    subprocess.run(["bash", "-c", script], env=bench.environment(), capture_output=True, text=True, timeout=120)
    deadline = time.monotonic() + 60  # bash does not wait for what a process substitution reads from
    while (status := json.loads((run / "run.json").read_text())["status"]) == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    return {"stream": name, "status": status, "end": "equal" if bench.equals_whole(run) else "another"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--disks", type=int, default=15, help="Amounts of disk to try.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="A Markdown file for the table.")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    results = []
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(Path(work))
        attempts = [(full_disk, int(bench.bytes * generator.uniform(0.02, 1.0))) for _ in range(options.disks)]
        attempts += [(failing_disk, how) for how in ("filled", "gone")]
        attempts += [(stopped, number.name, number) for number in (signal.SIGHUP, signal.SIGXCPU, signal.SIGTERM)]
        attempts += [(piped, name) for name in PIPES]
        for attempt, *arguments in attempts:
            try:
                outcome = attempt(bench, *arguments)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                outcome = {"fault": " ".join(str(error).split())[-400:]}
            print(attempt.__name__, *arguments, outcome, flush=True)
            result = {"topology": "one", "number": len(results), "what": str(arguments[0])}
            result |= {"kind": attempt.__name__ + ("" if attempt is full_disk else f", {arguments[0]}")}
            result["outcome"] = "fault" if "fault" in outcome else outcome["end"]
            if result["outcome"] != "equal":
                result["fault"] = outcome.get("fault", "another adapter")
            results.append(result)
    if options.output:
        command = f"Made by tests/support/faults.py: seed {options.seed}, {options.disks} sizes of disk."
        write_results(options.output, "Faults of the machine", command, ("equal", "another", "fault"), results)
    sys.exit(any("fault" in result for result in results))


if __name__ == "__main__":
    main()
