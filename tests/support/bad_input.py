"""Bad input of random kinds: each must be refused by one line that names it, and none may hang or run foreign code.

    python tests/support/bad_input.py --times 300 [--seed 1] [--kinds "recipe" "rows: a strange value"] [--output FILE]

The kinds are in bad_inputs.py and bad_models.py, each about as often as any other. A command runs in a fork of this
process, so that torch is loaded once. Exit code 1: something was not as it must be.
"""

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import train_ist
from ist.training.command_line import run_command
from support import bad_models, reset_accelerate, suites
from support.bad_inputs import KINDS, BadInput, copy_good

OUTCOMES = ("refused", "ran", "other error", "hang")
LIMIT_SECONDS = 60
assert bad_models  # which adds its kinds


def command_line(folder: Path, bad: BadInput) -> list[str]:
    values = {
        **{"model_name_or_path": folder / "tiny", "train_file": folder / "train.json", "output_dir": folder / "run"},
        **{"report_to": "none", "max_steps": 2, "update_interval": 1, "lora_r": 4, "lora_alpha": 8, "warmup_steps": 1},
        **{"prompt_template": "alpaca", **bad.flags},
    }
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={value}")
    return flags


def attempt(folder: Path, bad: BadInput) -> int | None:
    """The exit code of a fork that runs the command, which writes to folder/stdout and stderr; None: it hung."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o644), number)
            os.environ.update(suites.ENVIRONMENT | {"HF_DATASETS_CACHE": str(folder / "cache")} | bad.environment)
            import datasets

            datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
            os.chdir(folder)
            reset_accelerate()
            sys.argv = ["train_ist.py", *command_line(folder, bad)]
            run_command(train_ist.main)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def judge(folder: Path, bad: BadInput, code: int | None) -> dict:
    errors = (folder / "stderr").read_text(errors="replace") if (folder / "stderr").exists() else ""
    errors = re.sub(r"Loading weights[^\n\r]*[\n\r]|\r[^\n]*", "", errors)
    errors = re.sub(r"[^\n]*Warning: [^\n]*\n  [^\n]*\n", "", errors)  # of a library, and the line that made it
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("[transformers]")]
    if (folder / "foreign code ran").exists():
        return {"outcome": "other error", "fault": "foreign code ran"}
    if code is None:
        return {"outcome": "hang", "fault": f"{LIMIT_SECONDS} s; {' / '.join(lines)[:200]}"}
    if code == 0:
        return {"outcome": "ran"} | ({} if bad.may_pass else {"fault": "it was accepted"})
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return {"outcome": "other error", "fault": f"code {code}, {len(lines)} lines: {' / '.join(lines[-3:])[:300]}"}
    if code != 2 and not (code == 1 and bad.names == "tiny|weight|loss"):  # what the loss alone shows is no bad input
        return {"outcome": "other error", "fault": f"code {code}: {lines[0][:300]}"}
    if not re.search(bad.names, lines[0]) or len(lines[0]) < 25:
        return {"outcome": "other error", "fault": f"does not name {bad.names}: {lines[0][:300]}"}
    return {"outcome": "refused", "said": lines[0]}


def attempts(work: Path, times: int, seed: int = 1, kinds: list[str] | None = None) -> Iterator[dict]:
    """Yields the result of each bad input; its folder is removed again."""
    good, order = work / "good", []
    good.mkdir()
    suites.prepare(good)
    for i in range(times):
        if not order:
            order = random.Random(f"{seed} from {i}").sample(kinds or list(KINDS), len(kinds or KINDS))
        name = order.pop()
        with tempfile.TemporaryDirectory(dir=work) as place:
            folder = Path(place)
            copy_good(good, folder)
            bad = KINDS[name](folder, random.Random(f"{seed} {i} {name}"))
            result = judge(folder, bad, attempt(folder, bad))
        what = " ".join(bad.what.split())
        yield {"topology": "one", "number": i, "kind": name, "what": what, **result}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, metavar="KIND", help="see bad_inputs.py"
    )
    parser.add_argument("--output", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--verbose", action="store_true", help="print the messages too")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as work:
        for result in attempts(Path(work), args.times, args.seed, args.kinds):
            results.append(result)
            told = f": {result['fault']} ({result['what']})" if "fault" in result else ""
            if args.verbose and not told:
                told = f" ({result['what']}): {result.get('said', '')}"
            print(f"{result['number']}: {result['kind']}: {result['outcome']}{told}", flush=True)
    faults = sum("fault" in result for result in results)
    print(f"{len(results)} bad inputs, {faults} of them not as they must be")
    if args.output:
        command = f"Made by tests/support/bad_input.py: {args.times} bad inputs, seed {args.seed}."
        suites.write_results(args.output, "Bad input", command, OUTCOMES, results)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
