"""How many descriptors and how much time the agreement on a stop takes: `--ranks 64` processes of a toy.

    python tests/support/stop_agreement.py [--ranks 64] [--told 17] [--output launch/results/stop_agreement.md]

Each rank all-reduces a number in each of 30 steps, on gloo; one is told to stop before step 5. The table has the step
before which each stopped, descriptors before and after the agreement was made, and its time in each step.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import torch.distributed as dist

from ist.distributed import StopAgreement
from ist.training.command_line import markdown_table
from support.suites import heading

TOLD_AT, STEPS = 5, 30


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def one_rank(rank: int, ranks: int, told: Sequence[int], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    dist.init_process_group("gloo")
    dist.all_reduce(torch.ones(1))
    before, seconds, step = descriptors(), 0.0, 0
    stop = StopAgreement(torch.device("cpu"))
    after = descriptors()
    while step < STEPS:
        start = time.perf_counter()
        stopped = stop(step, rank in told and step >= TOLD_AT)
        seconds += time.perf_counter() - start
        if stopped:
            break
        dist.all_reduce(torch.ones(1))
        step += 1
    line = {"step": step, "before": before, "after": after, "seconds": seconds / (step + 1)}
    (folder / f"{rank}.json").write_text(json.dumps(line))
    dist.barrier()


def measure(ranks: int, told: Sequence[int]) -> list[dict]:
    """Each rank's {step, before, after, seconds}."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(free.getsockname()[1])
        children = []
        for rank in range(ranks):
            if not (child := os.fork()):
                try:
                    one_rank(rank, ranks, told, folder)
                except BaseException as error:
                    print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--told", type=int, default=17, help="the rank that is told")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    seen = measure(args.ranks, [args.told])
    rows = {
        "stopped before step": [one["step"] for one in seen],
        "descriptors that the agreement took": [one["after"] - one["before"] for one in seen],
        "descriptors of the process group": [one["before"] for one in seen],
        "milliseconds in a step": [round(1000 * one["seconds"], 2) for one in seen],
    }
    made_by = f"Made by tests/support/stop_agreement.py: {args.ranks} gloo ranks; {args.told} is told before step 5."
    table = markdown_table(("", "least", "most"), [(name, str(min(v)), str(max(v))) for name, v in rows.items()])
    text = "\n".join([*heading("The agreement on a stop", made_by), *table, ""])
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
