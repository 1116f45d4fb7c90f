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
candidates, `communication` counts the traffic between ranks, `scale` measures the cost of the method's bookkeeping as
layers, ranks and candidates grow.

    python -m ist.benchmark parity --ranks 2

Launches one process, DDP, FSDP2 and, from four ranks on, HSDP; resumes across them, kills a rank; and compares.
"""

import argparse
import json
import shlex
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ist.benchmark.arms import ARMS, WINDOW, run_arm, say
from ist.benchmark.memory import GEOMETRIES, METHODS, memory_of, memory_settings, memory_table
from ist.benchmark.parity import check
from ist.benchmark.probes import probe_agreement, probe_table
from ist.benchmark.scale import measure_scale, scale_table
from ist.benchmark.speed import count_flops, matmul_rate, measure_speed, speed_table
from ist.benchmark.traffic import communicate, communication_row, communication_table, measure_communication
from ist.report.tables import publish, require_publishing, require_writable_file
from ist.training.command_line import PlainParser, UsageError, command, markdown_table, require
from ist.training.word_problems import arithmetic_rows


def memory(options: Namespace) -> dict[str, Any]:
    records = []
    for model, method, settings in memory_settings(options.models, options.methods):
        of_one = memory_of(method, model, (options.rows, options.length), options.measure, **settings)
        say(memory_table(of_one).split("\n")[2])
        records += of_one
    return {"records": records}


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


def speed(options: Namespace) -> dict[str, Any]:
    with training_flags(options) as flags:
        together = options.together or (1 if torch.cuda.is_available() else 0)
        results = measure_speed(flags, options.arms, options.rounds, together, say)
        flops = count_flops(flags)
    dtype = torch.bfloat16 if options.bf16 or options.dtype == "bfloat16" else torch.float32
    return {"results": results, "flops": flops, "matmul_flops_per_second": matmul_rate(dtype)}


def probe(options: Namespace) -> dict[str, Any]:
    with training_flags(options) as flags:
        flags |= {"learning_rate": 5e-4, "score_lr": 100, "update_interval": 5, "logging_steps": 5}
        return {"updates": probe_agreement(flags, say)}


def communication(options: Namespace) -> dict[str, Any]:
    result = {}
    with training_flags(options) as flags:
        for topology, selection in product(("ddp", "fsdp2"), ("all", "ist")):
            name = f"{topology}, {selection}"
            result[name], _ = measure_communication(flags | {"selection": selection}, topology, options.ranks)
            say(" | ".join(communication_row(name, result[name])))
    return {"steps": result}


def scale(options: Namespace) -> dict[str, Any]:
    with training_flags(options) as flags:
        rows = measure_scale(flags, Path(options.model_name_or_path), options.layers, say)
        for ranks in options.rank_counts:
            _, seconds = measure_communication(flags, "ddp", ranks)
            rows.append([f"the model itself, {ranks} rank{'s' * (ranks > 1)}", f"{1e3 * seconds:.0f}", "", "", ""])
            say(" | ".join(rows[-1]))
    return {"rows": rows}


def parity(options: Namespace) -> dict[str, Any]:
    require(options.ranks >= 2, "ranks", "2 or more", options.ranks)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.folder or made)
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"--folder {folder} is not empty: name another.")
        folder.mkdir(parents=True, exist_ok=True)
        rows, equal = check(folder.absolute(), options.ranks, say)
    return {"rows": rows, "equal": equal}


def rank(options: Namespace) -> None:
    """One rank of a launch of `communication`."""
    communicate(json.loads(options.flags))


def arm(options: Namespace) -> None:
    """One arm of `speed`, in a process of its own."""
    run_arm(options.name, json.loads(options.flags), options.stride, options.parts)


# Functions of the options and of the JSON file, whose command has the options.
TABLES: dict[Callable, Callable[[Namespace, dict[str, Any]], str]] = {
    memory: lambda options, result: memory_table(result["records"]),
    speed: lambda options, result: speed_table(result, options.rows, options.length, options.rounds),
    probe: lambda options, result: probe_table(result["updates"]),
    communication: lambda options, result: communication_table(result["steps"], options.ranks),
    scale: lambda options, result: scale_table(result["rows"]),
    parity: lambda options, result: "\n".join(markdown_table(result["rows"][0], result["rows"][1:])),
}


def published_table(file: Path) -> str:
    """The table of a file that --output wrote."""
    result = json.loads(file.read_text())
    options = make_parser().parse_args(shlex.split(result["command"])[3:])
    return TABLES[options.run](options, result)


def make_parser() -> argparse.ArgumentParser:
    parser = PlainParser(prog="python -m ist.benchmark", description=__doc__.split("\n")[0])
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
        (scale, "the method's bookkeeping as layers, ranks, candidates grow"),
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
    text = "whether all topologies train the same; exit code 1: they do not"
    sub = subcommands.add_parser("parity", parents=[shared], help=text)
    sub.add_argument("--ranks", type=int, default=max(2, torch.cuda.device_count()), help="GPUs, or CPU processes")
    sub.add_argument("--folder", metavar="DIR", help="keep the runs and their logs there")
    sub.set_defaults(run=parity)
    sub = subcommands.add_parser("rank", help=argparse.SUPPRESS)
    sub.add_argument("--flags")
    sub.set_defaults(run=rank, output=None, readme=None)
    sub = subcommands.add_parser("arm", help=argparse.SUPPRESS)
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
    for key in ("rows", "length", "rounds", "ranks", "layers", "rank_counts"):
        for value in numbers if isinstance(numbers := getattr(options, key, 1), list) else [numbers]:
            require(value >= 1, key, "1 or more", value)
    require(getattr(options, "together", 0) >= 0, "together", "0 (all) or more", getattr(options, "together", 0))
    if options.output:
        require_publishing(str(options.output), options.readme and str(options.readme))
        require_writable_file(options.output)
    result = options.run(options)
    if options.run in TABLES:
        table = TABLES[options.run](options, result)
        print(table)
        if options.output:
            command = "python -m ist.benchmark " + shlex.join(argv)
            publish(options.output, command, Accelerator(), table, options.readme, **result)
    return 1 if options.run is parity and not result["equal"] else 0
