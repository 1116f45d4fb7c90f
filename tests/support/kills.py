"""Real launches, killed by SIGKILL at random moments: resumed, each must reach the undisturbed end.

    python tests/support/kills.py --times 30 [--seed 1] [--topologies one ddp fsdp2] [--output FILE]

A kill is of one rank (then the launch must end by itself) or of the launch's whole process group, at a moment drawn
uniformly from an undisturbed launch after its imports. The resumed launch is killed again a third of the time. Exit
code 1: something was not as it must be.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil

from support import suites

KINDS = ("one rank", "whole group")
OUTCOMES = ("equal", "ended before the kill", "changed", "other error", "hang")
LIMIT_SECONDS, ENDING_SECONDS = 300, 60
BEFORE_SECONDS = 0.5  # between the imports and the run's folder: arguments and rows are read


class Suite(NamedTuple):
    """A topology, the folder for its runs, how long they are, and whether one process too has a launcher."""

    topology: str
    work: Path
    seed: int
    steps: int
    launcher: bool

    def begin(self, run: Path) -> subprocess.Popen:
        """A launch of train_ist.py, watched by spy.py: it tells whether FSDP was on, which it turns on for CPU."""
        options = {"max_steps": self.steps, "save_steps": 3, "eval_steps": 10, "save_total_limit": 3}
        flags = suites.flags(self.work, run, self.topology, **options, resume_from_checkpoint="auto")
        spy = self.work / f"{run.name}-spy"
        spy.mkdir(exist_ok=True)
        script, output = ["tests/support/spy.py", "train_ist.py", *flags], self.work / f"{run.name}.txt"
        return suites.start(self.topology, self.work, script, output, self.launcher, SPY_DIR=str(spy))


class Times(NamedTuple):
    """Seconds after the start of a launch: its folder is there, its result is."""

    folder: float
    end: float


def ranks_of(launch: subprocess.Popen) -> list[psutil.Process]:
    """The processes of its ranks: all that run spy.py, but the launcher."""
    found = []
    with contextlib.suppress(psutil.Error):  # it is ending
        here = psutil.Process(launch.pid)
        for each in (here, *here.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                command = each.cmdline()
                if "tests/support/spy.py" in command and "accelerate.commands.launch" not in command:
                    found.append(each)
    return found


def end_group(launch: subprocess.Popen) -> None:
    """SIGKILL to all processes of a launch; torchrun's ranks are in groups of their own."""
    for process in ranks_of(launch):
        process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launch.pid, signal.SIGKILL)
    launch.wait()


def measure(suite: Suite) -> Times:
    """Make the undisturbed run, work/whole; when it was where."""
    run = suite.work / "whole"
    began, folder = time.time(), 0.0
    launch = suite.begin(run)
    while launch.poll() is None:
        if not folder and (run / "run.json").exists():
            folder = time.time() - began
        time.sleep(0.02)
    assert launch.returncode == 0, (suite.work / "whole.txt").read_text()[-3000:]
    return Times(folder, (run / "run.json").stat().st_mtime - began)


def written(run: Path) -> float:
    """When run.json was last written; 0.0 before there is one."""
    return (run / "run.json").stat().st_mtime if (run / "run.json").exists() else 0.0


def last_step(run: Path) -> int:
    return max((int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")), default=0)


def kill(suite: Suite, run: Path, kind: str, rank: int, moment: float, times: Times) -> str:
    """Launch, and kill at `moment` seconds; of them those after `times.folder` are counted from its first word on.

    A launch that goes on after some steps has the time of the others, and one that is faster than the undisturbed one
    was is killed when it has done the same part of them. Returns killed, hang (the rest of the launch went on) or ended
    (before).
    """
    earlier, first = written(run), last_step(run)
    launch, began = suite.begin(run), time.monotonic()
    while launch.poll() is None and written(run) == earlier:
        if moment <= times.folder and time.monotonic() - began >= moment:
            break
        time.sleep(0.005)
    if moment > times.folder:
        part = (moment - times.folder) / (times.end - times.folder)
        seconds = part * (times.end - times.folder) * (suite.steps - first) / suite.steps
        step, began = first + part * (suite.steps - first), time.monotonic()
        while time.monotonic() - began < seconds and last_step(run) < step and launch.poll() is None:
            time.sleep(0.002)
        time.sleep(moment % 0.1)  # not always just after a checkpoint
    ranks = ranks_of(launch)
    if launch.poll() is not None or not ranks:
        launch.wait()
        return "ended"
    if kind == "whole group":
        end_group(launch)
        return "killed"
    victims = [each for each in ranks if each.environ().get("RANK", "0") == str(rank)] or ranks
    victims[0].kill()
    try:
        launch.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        end_group(launch)
        return "hang"
    return "killed"


def attempt(suite: Suite, number: int, times: Times) -> dict:
    draw = random.Random(f"{suite.topology} {suite.seed} {number}")
    run, kind = suite.work / f"{number:03d}", KINDS[number % 2]
    result = {"topology": suite.topology, "kind": kind, "number": number, "what": "", "kills": 0}
    again = True
    while again:
        rank, moment = (
            draw.randrange(suites.RANKS[suite.topology]),
            draw.uniform(times.folder - BEFORE_SECONDS, times.end),
        )
        state = kill(suite, run, kind, rank, moment, times)
        result["what"] += f"rank {rank} at {moment:.2f} s: {state}, step {last_step(run)} there; "
        if state == "hang":
            return result | {"outcome": "hang", "fault": f"the launch went on for {ENDING_SECONDS} s"}
        result["kills"] += state == "killed"
        again = draw.random() < 1 / 3
    launch = suite.begin(run)
    try:
        code = launch.wait(LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        end_group(launch)
        return result | {"outcome": "hang", "fault": f"the resumed launch went on for {LIMIT_SECONDS} s"}
    if code != 0:
        return result | {"outcome": "other error", "fault": (suite.work / f"{run.name}.txt").read_text()[-300:]}
    different = suites.differences(run, suite.work / "whole")
    left = [str(path.relative_to(run)) for path in run.rglob("*")]
    left = [name for name in left if Path(name).name.startswith(".") or name.endswith(".tmp")]
    different += [f"{name} is left" for name in left]
    different += [] if sharded(suite.work / f"{run.name}-spy", suite.topology) else ["no DTensors"]
    if different:
        return result | {"outcome": "changed", "fault": ", ".join(different)[:300]}
    return result | {"outcome": "equal" if result["kills"] else "ended before the kill"}


def sharded(spy: Path, topology: str) -> bool:
    """Whether each rank had all parameters as DTensors under FSDP2 (a run that was finished already had no model)."""
    files = list(spy.glob("rank*.json"))
    return topology != "fsdp2" or all(json.loads(file.read_text())["all_dtensors"] for file in files)


def launch_all(
    topology: str, work: Path, times: int, seed: int = 1, steps: int = 100, launcher: bool = True
) -> Iterator[dict]:
    """Yields the result of each attempt; `work` gets all runs and the output of their launches."""
    suites.prepare(work)
    suite = Suite(topology, work, seed, steps, launcher)
    measured = measure(suite)
    print(f"{topology}: its folder and its result after {', '.join(f'{each:.1f}' for each in measured)} s", flush=True)
    ranks = list((work / "whole-spy").glob("rank*.json"))
    assert len(ranks) == suites.RANKS[topology]
    assert sharded(work / "whole-spy", topology)
    for number in range(times):
        yield attempt(suite, number, measured)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="runs on each topology")
    parser.add_argument("--steps", type=int, default=100, help="of each run; a checkpoint every third of them")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--topologies", nargs="+", default=["one"], choices=suites.TOPOLOGIES)
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as work:
        for topology in args.topologies:
            (Path(work) / topology).mkdir()
            for result in launch_all(topology, Path(work) / topology, args.times, args.seed, args.steps):
                results.append(result)
                fault = f": {result['fault']}" if "fault" in result else ""
                kinds = f"{topology} {result['number']}: {result['kind']}: {result['what']}"
                print(f"{kinds}{result['outcome']}{fault}", flush=True)
    faults = sum("fault" in result for result in results)
    kills = sum(result["kills"] for result in results)
    print(f"{len(results)} runs, killed {kills} times, {faults} of them not as they must be")
    if args.output:
        command = f"Made by tests/support/kills.py: {args.times} runs on each of {', '.join(args.topologies)}"
        command += f", {kills} kills in all, seed {args.seed}."
        suites.write_results(args.output, "Killed runs", command, OUTCOMES, results)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
