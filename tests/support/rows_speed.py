"""How fast rows are read and tokenised: rows of two turns, by one and two processes, and from the cache.

    python tests/support/rows_speed.py --rows 200000 [--loss answers] [--model M] [--output FILE]

Each measurement is a process of its own, so that its peak of memory is its own; the cache is a new one.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import suites

WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "sleeps", "hours", "near", "river", "bank"]


def write_rows(file: Path, count: int) -> None:
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    with open(file, "w") as stream:
        for _ in range(count):
            turns = [{"role": "user", "content": text(30)}, {"role": "assistant", "content": text(50)}]
            stream.write(json.dumps({"messages": turns}) + "\n")


def measure(file: Path, model: str, processes: int, masked: bool) -> dict:
    import datasets
    from transformers import AutoTokenizer

    from ist.training.encoding import encode_rows
    from ist.training.reading import load_rows

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model)
    start = time.perf_counter()
    rows = load_rows("train_file", [str(file)])
    read = time.perf_counter()
    encode_rows(rows, "train_file", "chat", tokenizer, 1024, masked, workers=processes)
    end = time.perf_counter()
    peak = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return {"read": len(rows) / (read - start), "tokenise": len(rows) / (end - read), "peak": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--model", default=str(ROOT / "models/SmolLM2-135M-Instruct"), help="whose tokenizer to take")
    parser.add_argument(
        "--loss", nargs="+", default=["answers", "all"], choices=["answers", "all"], help="on which tokens"
    )
    parser.add_argument("--output", type=Path, help="a Markdown file for the table")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        file, processes, masked = args.worker
        print(json.dumps(measure(Path(file), args.model, int(processes), masked == "True")))
        return
    table = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, args.rows)
        for processes, masked in [(count, loss == "answers") for loss in args.loss for count in (1, 2)]:
            environment = os.environ | {
                "HF_DATASETS_CACHE": f"{folder}/cache-{processes}-{masked}",
                "OMP_NUM_THREADS": "1",
            }
            for cached in (False, True):
                command = [sys.executable, __file__, "--model", args.model, "--worker", str(file), str(processes)]
                done = subprocess.run(
                    [*command, str(masked)], env=environment, capture_output=True, text=True, check=True
                )
                result = json.loads(done.stdout.splitlines()[-1])
                loss = "the answers" if masked else "all tokens"
                cells = [f"{result[key]:,.0f}" for key in ("read", "tokenise")]
                table.append([loss, str(processes), "yes" if cached else "no", *cells, f"{result['peak']:.2f}"])
                print(table[-1], flush=True)
    if args.output:
        command = f"Made by tests/support/rows_speed.py: {args.rows:,} rows of two turns, {os.cpu_count()} cores."
        header = ["loss on", "processes", "from the cache", "read, rows/s", "tokenise, rows/s", "peak memory, GB"]
        lines = [*suites.heading("Rows per second", command), *suites.markdown_table(header, table)]
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
