"""What IST costs and saves, against plain PEFT: each subcommand prints a Markdown table and writes JSON.

    python -m ist.benchmark memory --output launch/results/memory.json --readme ist/benchmark/README.md

`memory` counts bytes by part for the paper's models at their true shapes; nothing is allocated, so any machine will do.
With --measure it also runs the steps on random weights, on the GPU if there is one, and adds the measured peak.

    python -m ist.benchmark speed --model_name_or_path models/SmolLM2-135M-Instruct --output launch/results/speed.json
    python -m ist.benchmark probe --model_name_or_path models/SmolLM2-135M-Instruct
    python -m ist.benchmark communication --model_name_or_path models/SmolLM2-135M-Instruct
    python -m ist.benchmark scale --model_name_or_path models/SmolLM2-135M-Instruct

These train, on word problems made for it: `speed` runs arms in turn, step by step (plain PEFT in a bare loop,
transformers.Trainer, and train_ist.py by several rules), `probe` compares cheaper probes with the full one on the same
candidates, `communication` counts what travels between ranks, `scale` what the method's own bookkeeping costs as
things grow.
"""

import argparse
import json
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ist.benchmark.arms import ARMS, WINDOW, run_arm, say
from ist.benchmark.memory import GEOMETRIES, METHODS, memory_of, memory_settings, memory_table
from ist.benchmark.probes import probe_agreement, rank_correlation
from ist.benchmark.scale import measure_scale
from ist.benchmark.speed import count_flops, matmul_rate, measure_speed, speed_table
from ist.benchmark.traffic import communicate, communication_row, measure_communication
from ist.report.tables import publish
from ist.training.command_line import UsageError, command, markdown_table, require
from ist.training.word_problems import arithmetic_rows


def memory(options: Namespace, command: str) -> None:
    records = []
    for model, method, settings in memory_settings(options.models, options.methods):
        of_one = memory_of(method, model, (options.rows, options.length), options.measure, **settings)
        print(memory_table(of_one).split("\n")[2], file=sys.stderr, flush=True)
        records += of_one
    finish(options, command, records=records)


def memory_markdown(options: Namespace, result: dict[str, Any]) -> str:
    return memory_table(result["records"])


@contextmanager
def training_flags(options: Namespace) -> Iterator[dict[str, Any]]:
    """The keys of train_ist.py of a short run on word problems, several to a row so that all have --length tokens."""
    if not (Path(options.model_name_or_path) / "config.json").exists():
        raise UsageError(f"--model_name_or_path must be a folder with a model; got {options.model_name_or_path}.")
    whole = options.steps >= 2 * WINDOW and options.steps % WINDOW == 0
    require(whole, "steps", f"a multiple of {WINDOW}, {2 * WINDOW} or more", options.steps)
    problems = arithmetic_rows(4096, seed=1, held_out=False)
    # A token is some four characters of such text; more of them than needed are cut.
    count = max(1, 6 * options.length // len(problems[0]["instruction"] + problems[0]["output"]) + 1)
    rows = [problems[i : i + count] for i in range(0, len(problems), count)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        joined = ("\n".join(f"{problem['instruction']} {problem['output']}" for problem in row) for row in rows)
        file.write_text(json.dumps([{"instruction": "Go on.", "output": text} for text in joined]))
        yield {
            **{"model_name_or_path": options.model_name_or_path, "train_file": file, "max_length": options.length},
            **{"per_device_train_batch_size": options.rows, "max_steps": options.steps, "warmup_steps": 0},
            **{"dtype": options.dtype, "bf16": options.bf16, "gradient_checkpointing": options.gradient_checkpointing},
        }


def speed(options: Namespace, command: str) -> None:
    with training_flags(options) as flags:
        together = options.together or (1 if torch.cuda.is_available() else 0)
        results = measure_speed(flags, options.arms, options.rounds, together, say)
        flops = count_flops(flags)
    dtype = torch.bfloat16 if options.bf16 or options.dtype == "bfloat16" else torch.float32
    finish(options, command, results=results, flops=flops, matmul_flops_per_second=matmul_rate(dtype))


def speed_markdown(options: Namespace, result: dict[str, Any]) -> str:
    header = ["arm", "forward", "backward", "optimizer", "probe", "bookkeeping", "total (range of windows)"]
    header += ["tokens/s", "/ bare loop (95 % interval)"]
    flops, rate = result["flops"], result["matmul_flops_per_second"]
    floor = {key: 100 * flops[key] / rate for key in ("forward", "backward")}
    rows = speed_table(result["results"], flops["tokens"])
    rows.append(["floor of `all`: FLOPs / rate of matrix products"] + [f"{floor[key]:.3g}" for key in floor])
    rows[-1] += ["", "", "", f"{sum(floor.values()):.3g}", f"{100 * flops['tokens'] / sum(floor.values()):.0f}", ""]
    shape = f"seconds per 100 steps, {options.rows} x {options.length} tokens, {options.rounds} rounds"
    return "\n".join([shape, "", *markdown_table(header, rows)])


def probe(options: Namespace, command: str) -> None:
    with training_flags(options) as flags:
        flags |= {"learning_rate": 5e-4, "score_lr": 100, "update_interval": 5, "logging_steps": 5}
        finish(options, command, updates=probe_agreement(flags, say))


def probe_markdown(options: Namespace, result: dict[str, Any]) -> str:
    rows, seen = [], result["updates"]
    full = sum(one["seconds"]["full"] for one in seen)
    for name in ("cheap", "gradient"):
        rho, (low, high) = rank_correlation(seen, name)
        share = sum(one["seconds"][name] for one in seen) / full
        rows.append([name, f"{rho:.2f}", f"{low:.2f} … {high:.2f}", f"{share:.3f}"])
    header = ["probe", f"Spearman's rho, mean of {len(seen)} updates", "95 % interval", "seconds / full probe's"]
    return "\n".join(markdown_table(header, rows))


def communication(options: Namespace, command: str) -> None:
    result = {}
    with training_flags(options) as flags:
        for topology in ("ddp", "fsdp2"):
            for selection in ("all", "ist"):
                name = f"{topology}, {selection}"
                result[name], _ = measure_communication(flags | {"selection": selection}, topology, options.ranks)
                say(" | ".join(communication_row(name, result[name])))
    finish(options, command, steps=result)


def communication_markdown(options: Namespace, result: dict[str, Any]) -> str:
    header = [f"{options.ranks} ranks", "per step", "gradient bytes / adapter bytes", "trained share of the layers"]
    return "\n".join(
        markdown_table(header, [communication_row(name, steps) for name, steps in result["steps"].items()])
    )


def scale(options: Namespace, command: str) -> None:
    with training_flags(options) as flags:
        rows = measure_scale(flags, Path(options.model_name_or_path), options.layers, say)
        for ranks in options.rank_counts:
            _, seconds = measure_communication(flags, "ddp", ranks)
            rows.append([f"the model itself, {ranks} rank{'s' * (ranks > 1)}", f"{1e3 * seconds:.0f}", "", "", ""])
            say(" | ".join(rows[-1]))
    finish(options, command, rows=rows)


def scale_markdown(options: Namespace, result: dict[str, Any]) -> str:
    header = ["ist", "ms per step", "probes, ms per step", "bookkeeping, ms per step", "bookkeeping share"]
    return "\n".join(markdown_table(header, result["rows"]))


def rank(options: Namespace, command: str) -> None:
    communicate(json.loads(options.flags))


def arm(options: Namespace, command: str) -> None:
    run_arm(options.name, json.loads(options.flags), options.stride, options.parts)


MARKDOWN = {
    memory: memory_markdown,
    speed: speed_markdown,
    probe: probe_markdown,
    communication: communication_markdown,
    scale: scale_markdown,
}


def finish(options: Namespace, command: str, **result: Any) -> None:
    """Print a subcommand's table; write JSON to --output, and the table into --readme."""
    table = MARKDOWN[options.run](options, result)
    print(table)
    if options.output:
        publish(options.output, command, Accelerator(), table, options.readme, **result)


def published_table(file: Path) -> str:
    """The table of a file that --output wrote; its command has the rows, tokens and ranks."""
    result = json.loads(file.read_text())
    options = make_parser().parse_args(shlex.split(result["command"])[3:])
    return MARKDOWN[options.run](options, result)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ist.benchmark", description=__doc__.split("\n")[0])
    subcommands = parser.add_subparsers(required=True, metavar="WHAT")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, metavar="FILE.json", help="write results, versions, hardware, commit")
    shared.add_argument("--readme", type=Path, metavar="FILE.md", help="and the table, between <!-- NAME --> markers")
    sub = subcommands.add_parser("memory", parents=[shared], help="bytes by part of a training step")
    sub.set_defaults(run=memory)
    sub.add_argument("--models", nargs="+", choices=GEOMETRIES, default=list(GEOMETRIES), metavar="NAME")
    sub.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    sub.add_argument("--rows", type=int, default=1, help="rows of a micro-batch")
    sub.add_argument("--length", type=int, default=1024, help="tokens of a row")
    sub.add_argument("--measure", action="store_true", help="also run the steps, on the GPU if there is one")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--model_name_or_path", required=True, metavar="DIR", help="of the model to train")
    training.add_argument("--rows", type=int, default=8, help="rows of a batch")
    training.add_argument("--length", type=int, default=64, help="tokens of a row")
    training.add_argument("--steps", type=int, default=20, help="of each run; the first ten are not counted")
    training.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the base")
    training.add_argument("--bf16", action="store_true", help="mixed precision")
    training.add_argument("--gradient_checkpointing", action="store_true")
    for function, text in (
        (speed, "seconds by part of training steps, arms in turn"),
        (probe, "how well cheaper probes agree with the full one"),
        (communication, "bytes and calls of each collective"),
        (scale, "what grows with layers, ranks, candidates"),
    ):
        sub = subcommands.add_parser(function.__name__, parents=[shared, training], help=text)
        sub.set_defaults(run=function)
        if function is speed:
            sub.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
            sub.add_argument("--rounds", type=int, default=3, help="runs of every arm, each with another seed")
            text = "arms in memory at a time, not counting the bare loop; default: all on a CPU, 1 on a GPU"
            sub.add_argument("--together", type=int, default=0, metavar="ARMS", help=text)
        if function is communication:
            sub.add_argument("--ranks", type=int, default=2)
        if function is scale:
            sub.add_argument("--layers", nargs="+", type=int, default=[8, 16, 32, 64])
            sub.add_argument("--rank_counts", nargs="*", type=int, default=[1, 2, 4], metavar="RANKS")
    sub = subcommands.add_parser("rank", help=argparse.SUPPRESS)  # one rank of what `communication` launches
    sub.add_argument("--flags")
    sub.set_defaults(run=rank, output=None, readme=None)
    sub = subcommands.add_parser("arm", help=argparse.SUPPRESS)  # one arm of what `speed` starts
    sub.add_argument("--name")
    sub.add_argument("--flags")
    sub.add_argument("--stride", type=int)
    sub.add_argument("--parts", action="store_true")
    sub.set_defaults(run=arm, output=None, readme=None)
    return parser


@command
def main(argv: Sequence[str]) -> int:
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.readme and not options.output:
        parser.error("--readme needs --output, whose name is that of the markers")
    options.run(options, "python -m ist.benchmark " + shlex.join(argv))
    return 0
