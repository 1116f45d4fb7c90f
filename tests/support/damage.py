"""A stopped run whose files were damaged at random, resumed: it must refuse in one line, or reach the undisturbed end.

    python tests/support/damage.py --times 200 [--seed 1] [--topologies one ddp fsdp2] [--output FILE]
    python tests/support/damage.py --times 50 --kinds "FIFO in place of a file" "run.json: replaced"

Runs are train_ist.py's own main, many in one launch per topology; a launch that a run ends or hangs is started again
with the next one. The kinds are in damages.py, each about as often as any other. Exit code 1: something was not as it
must be.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor

import ist.distributed
import train_ist
from ist.training.command_line import UsageError, print_error
from ist.training.files import WriteError
from ist.tuner import SparseTuner
from support import read_lines, reset_accelerate, suites
from support.damages import CHECKPOINT, RECORDS, RUN

STEPS, SAVE_STEPS = 14, 4
KINDS = CHECKPOINT | RUN
OUTCOMES = ("refused", "fell back, equal", "equal", "changed", "other error", "hang")
LIMIT_SECONDS, MEETING_SECONDS, START_SECONDS = 40, 15, 60  # an attempt takes 3 s, the start of a launch 10 to 20
RANK = int(os.environ.get("RANK", "0"))
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
os.environ.pop("TORCHELASTIC_ERROR_FILE", None)  # errors go to stderr: each is one of many in this launch


# ---------------------------------------------------------------------------------------------------- damaged folders


def stop_after(step: int, whole: Path, run: Path) -> None:
    """A copy of a finished run as if it was stopped after `step`: by a signal where it saved, else killed."""
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    for name, last in zip(RECORDS, (step, step - 1), strict=True):
        lines = [line for line in read_lines(run / name) if line["step"] <= last]
        (run / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = json.loads((run / "run.json").read_text())
    status = "running" if step % SAVE_STEPS else "interrupted"
    (run / "run.json").write_text(json.dumps({**record, "status": status, "steps": step}, indent=1))


def readable_lines(file: Path) -> list[dict]:
    """The objects that a damaged record still has."""
    lines = []
    for text in file.read_text(errors="replace").split("\n") if file.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def damage_runs(work: Path, times: int, seed: str, kinds: list[str]) -> None:
    """work/000 and so on: each with a damaged run/, and plan.json, which says what was done to it."""
    order: list[str] = []
    for i in range(times):
        if not order:
            order = random.Random(f"{seed} from {i}").sample(kinds, len(kinds))
        kind = order.pop()
        draw = random.Random(f"{seed} {i} {kind}")
        step = draw.choice((8, 8, 10, 12))
        folder = work / f"{i:03d}"
        run = folder / "run"
        stop_after(STEPS if kind == "finished without an adapter" else step, work / "whole", run)
        checkpoints = sorted((run / "checkpoints").iterdir())
        newest, resume = checkpoints[-1], "auto"
        if kind in RUN:
            damaged, what = [], RUN[kind](run, draw)
        else:
            damaged = draw.choice(([newest], [newest], [newest], checkpoints[:1], checkpoints))
            what = "; ".join(f"{path.name}: {CHECKPOINT[kind](path, draw)}" for path in damaged)
        if draw.random() < 0.35:
            resume = str(draw.choice(damaged or [newest]))
        plan = {"kind": kind, "what": f"stopped after {step}; {what}", "resume": resume, "newest": str(newest)}
        plan["records"] = [line for name in RECORDS for line in readable_lines(run / name)]
        (folder / "plan.json").write_text(json.dumps(plan))


# ------------------------------------------------------------------------------------------------- one rank of a launch


def meet(name: str) -> bool:
    """Whether all ranks come here; not by a collective, which one of them may be waiting in."""
    if RANKS == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    store.set(f"{name}/{RANK}", "here")
    try:
        store.wait([f"{name}/{rank}" for rank in range(RANKS)], timedelta(seconds=MEETING_SECONDS))
    except Exception:  # torch has several for a time that is over
        return False
    return True


class Left(BaseException):
    """In place of os._exit, by which a rank of several leaves."""


def leave(code: int) -> None:
    raise Left(code)


def attempt(work: Path, run: Path, topology: str, resume: str, name: str) -> dict:
    """Run main; what became of it, with all that it wrote to stderr."""
    errors, output = work / f"{name}.stderr{RANK}", io.StringIO()
    # As run_command prints it; the store of this launch remembers the errors of earlier runs.
    first_to_say = first_of_launch
    ist.distributed.is_first_to_say = lambda text: first_to_say(f"{name} {text}")
    launchers, descriptor = os.dup(2), os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 2)
    reset_accelerate()
    options = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "eval_steps": 4, "resume_from_checkpoint": resume}
    code = None
    try:
        with contextlib.redirect_stdout(output):
            code = train_ist.main(suites.flags(work, run, topology, **options))
    except (UsageError, WriteError) as error:
        print_error(error)
        code = 2 if isinstance(error, UsageError) else 1
    except Left as left:
        code = left.args[0]
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os.dup2(launchers, 2)
    os.close(launchers)
    os.close(descriptor)
    return {"code": code, "stderr": errors.read_text(errors="replace"), "stdout": output.getvalue()}


first_of_launch = ist.distributed.is_first_to_say


def worker(args: argparse.Namespace) -> None:
    """The undisturbed run and the damaged folders, where there are none yet; then the attempts from `first` on."""
    PartialState.destroy_process_group = lambda *_: None  # main ends with it; the next run goes on with the group
    train_ist.os._exit = leave
    work = args.work
    if args.worker == "fsdp2":
        from ist.benchmark.fsdp_on_cpu import turn_on_fsdp

        turn_on_fsdp()
        original = SparseTuner.__init__

        def checked(self, model, *others, **options):
            original(self, model, *others, **options)
            assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "FSDP is not on"

        SparseTuner.__init__ = checked
    PartialState()
    if not (work / "damaged").exists():
        whole = attempt(work, work / "whole", args.worker, "none", "whole")
        if whole["code"] != 0:
            raise SystemExit(whole["stderr"])
        if RANK == 0:
            damage_runs(work, args.times[0], f"{args.worker} {args.seed}", args.kinds)
            (work / "damaged").touch()
        assert meet("damaged")
    for i in range(args.first, args.times[0]):
        folder = work / f"{i:03d}"
        plan = json.loads((folder / "plan.json").read_text())
        seen = attempt(work, folder / "run", args.worker, plan["resume"], folder.name)
        alone = not meet(f"{i}")
        temporary = folder / f"seen{RANK}.tmp"
        temporary.write_text(json.dumps(seen | {"alone": alone}))
        temporary.rename(folder / f"seen{RANK}.json")
        if alone:  # as its process would have; the launcher ends the others
            os.kill(os.getpid(), signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------- judgement


def judge(folder: Path, whole: Path) -> dict:
    """The result of one attempt, from what its ranks have seen (none: it hung, or died)."""
    plan = json.loads((folder / "plan.json").read_text())
    result = {"kind": plan["kind"], "number": int(folder.name), "what": f"{plan['what']}; {plan['resume']}"}
    result["what"] = result["what"].replace(str(folder) + "/", "")
    seen = [json.loads(file.read_text()) for file in sorted(folder.glob("seen*.json"))]
    seen = [each for each in seen if each["alone"]] or seen
    codes = {each["code"] for each in seen}
    errors = [line for each in seen for line in each["stderr"].splitlines() if line.strip()]
    if codes == {2}:
        expected = ("Loading weights", "is left out.")  # transformers' bar, and lines of a record
        said = [line for line in errors if not any(part in line for part in expected)]
        if len(said) == 1 and "error: " in said[0]:
            return result | {"outcome": "refused", "said": said[0]}
        return result | {"outcome": "other error", "fault": f"{len(said)} lines: {' / '.join(said)[:300]}"}
    if codes != {0}:
        last = errors[-1] if errors else "no output"
        where = [line.strip() for line in errors if line.startswith("  File") and "/ist/" in line]
        return result | {"outcome": "other error", "fault": f"code {codes}: {last[:200]} {where[-1:]}"}
    record_damaged = None
    if plan["kind"].startswith("record:"):
        record_damaged = plan["records"]
    different = suites.differences(folder / "run", whole, record_damaged)
    if different:
        return result | {"outcome": "changed", "fault": f"another {', '.join(different)}"[:300]}
    resumed = json.loads((folder / "run/run.json").read_text())["resumed_from"]
    return result | {"outcome": "equal" if resumed == plan["newest"] else "fell back, equal"}


def wait_for(folder: Path, ranks: int, process: subprocess.Popen, seconds: float) -> str:
    """done, ended (the launch) or hang."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        seen = [folder / f"seen{rank}.json" for rank in range(ranks)]
        if all(file.exists() for file in seen):
            return "ended" if any(json.loads(file.read_text())["alone"] for file in seen) else "done"
        if ended:
            return "ended"
        time.sleep(0.05)
    return "hang"


def launch(topology: str, work: Path, times: int, seed: int = 1, kinds: list[str] | None = None) -> Iterator[dict]:
    """Yields the result of each attempt; `work` gets all runs, and the launch's own output in launch.txt."""
    suites.prepare(work)
    i = 0
    while i < times:
        script = [__file__, "--worker", topology, "--work", str(work), "--times", str(times), "--seed", str(seed)]
        script += ["--first", str(i), "--kinds", *(kinds or KINDS)]
        process = suites.start(topology, work, script, work / "launch.txt", launcher=topology != "one")
        seconds = START_SECONDS + LIMIT_SECONDS
        try:
            state = "done"
            while i < times and state == "done":
                folder = work / f"{i:03d}"
                state = wait_for(folder, suites.RANKS[topology], process, seconds)
                if not (work / "damaged").exists():
                    raise RuntimeError(f"the launch did not begin: {(work / 'launch.txt').read_text()[-3000:]}")
                result = {"topology": topology, **judge(folder, work / "whole")}
                yield result | ({"outcome": "hang", "fault": f"{seconds} s"} if state == "hang" else {})
                i, seconds = i + 1, LIMIT_SECONDS
            if state == "done":
                process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, nargs="+", default=[200], help="of all topologies, or one number for each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--topologies", nargs="+", default=["one"], choices=suites.TOPOLOGIES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="see damages.py")
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    for hidden, kind in (("--worker", str), ("--work", Path), ("--first", int)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return 0
    times = args.times * len(args.topologies) if len(args.times) == 1 else args.times
    results = []
    with tempfile.TemporaryDirectory() as work:
        for topology, count in zip(args.topologies, times, strict=True):
            (Path(work) / topology).mkdir()
            for result in launch(topology, Path(work) / topology, count, args.seed, args.kinds):
                results.append(result)
                fault = f": {result['fault']} ({result['what']})" if "fault" in result else ""
                print(f"{topology} {result['number']}: {result['kind']}: {result['outcome']}{fault}", flush=True)
    faults = sum("fault" in result for result in results)
    print(f"{len(results)} damaged runs, {faults} of them not as they must be")
    if args.output:
        parts = ", ".join(f"{count} on {name}" for name, count in zip(args.topologies, times, strict=True))
        command = f"Made by tests/support/damage.py: {parts}, seed {args.seed}."
        suites.write_results(args.output, "Damaged checkpoints", command, OUTCOMES, results)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
