"""What IST costs and saves, against plain PEFT: each subcommand prints a Markdown table and writes JSON.

    python -m ist.benchmark memory --output launch/results/memory.json --readme README.md

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from ist.benchmark.arms import ARMS, WINDOW, run_arm
from ist.benchmark.probes import probe_agreement, rank_correlation
from ist.benchmark.scale import measure_scale
from ist.benchmark.speed import count_flops, matmul_rate, measure_speed, speed_table
from ist.benchmark.traffic import communicate, communication_row, measure_communication
from ist.config import ISTConfig
from ist.report.tables import publish
from ist.training.arguments import Resolved
from ist.training.command_line import UsageError, command, markdown_table, require
from ist.training.memory import SavedByLayer, StepCounter, counting, layers_that_train, make_batch, materialise
from ist.training.model import load_skeleton
from ist.training.peft_config import make_peft_config
from ist.training.word_problems import arithmetic_rows


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **options: Any) -> LlamaConfig:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    options = {"vocab_size": 32000, "max_position_embeddings": 2048} | options
    return LlamaConfig(**shape, num_attention_heads=heads, **options)


# name -> (shapes, dtype of the base). GPT-2 is in float32, as its checkpoint; the paper's 0.4 GB of weights fit that.
GEOMETRIES: dict[str, tuple[PretrainedConfig, str]] = {
    "GPT-2 small": (GPT2Config(), "float32"),
    "SmolLM2-135M": (
        _llama(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
        "bfloat16",
    ),
    "TinyLlama 1.1B": (_llama(2048, 5632, 22, 32, num_key_value_heads=4, tie_word_embeddings=False), "bfloat16"),
    "LLaMA-7B": (_llama(4096, 11008, 32, 32, tie_word_embeddings=False), "bfloat16"),
    "LLaMA-13B": (_llama(5120, 13824, 40, 40, tie_word_embeddings=False), "bfloat16"),
}
# Table 1 of the paper, LoRA, in its "GB": (weights, LoRA, LoRA + IST).
PAPER = {
    "GPT-2 small": (0.4, 2.9, 2.2),
    "TinyLlama 1.1B": (2.2, 10.5, 8.5),
    "LLaMA-7B": (14, 24, 20),
    "LLaMA-13B": (27, 42, 36),
}
TARGETS = {
    "gpt2": {"lora": ["c_attn", "c_fc", "mlp.c_proj"], "series": ["c_fc", "mlp.c_proj"], "parallel": ["c_fc"]},
    "llama": {
        "lora": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "series": ["up_proj", "down_proj"],
        "parallel": ["up_proj", "gate_proj"],
    },
}
FULL = "full"
METHODS = ("lora", "series", "parallel", FULL)


def memory_arguments(method: str, config: PretrainedConfig, dtype: str, **options: Any) -> Resolved:
    """The keys of train_ist.py at their defaults, but for `options`, for a model known by its configuration."""
    values = {
        "peft_method": "none" if method == FULL else method,
        "target_modules": TARGETS[config.model_type].get(method),
        "selection": "all",
        "bf16": method == FULL and dtype != "float32",
    }
    return Resolved(model_name_or_path=config.model_type, dtype=dtype, **values | options)


def selections(n_layers: int) -> dict[str, ISTConfig]:
    """The arms by name: the paper's quarter of the layers, but for `all`."""
    count = ISTConfig().counts(n_layers).trained
    above = {"semantic_budget": 0.5, "min_trained_layers": 0.25}  # the highest cost of a boundary in the upper half
    return {
        "all": ISTConfig(selection="all"),
        "ist": ISTConfig(),
        "last": ISTConfig(selection="last"),
        "semantic+ist": ISTConfig(selection="semantic+ist", trained_layers=count, kept_layers=count, **above),
    }


def memory_of(method: str, model: str, shape: tuple[int, int], measure: bool, **options: Any) -> list[dict[str, Any]]:
    """Bytes by part of a training step, a record for each arm.

    `saved_mean` and `peak_mean` are means over the draws of 1000 steps, the other numbers those of the costliest draw.
    Counted as on a GPU, but where a CPU is measured.
    """
    config, dtype = GEOMETRIES[model]
    args = memory_arguments(method, config, dtype, **options)
    peft_config = make_peft_config(args)
    n_layers = config.num_hidden_layers
    arms = selections(n_layers)
    if method == FULL:
        arms = {"all": arms["all"]}
    draws = {name: layers_that_train(arm, n_layers) for name, arm in arms.items()}
    device = Accelerator().device
    like_gpu = device.type == "cuda" or not measure
    with counting(args, peft_config, config, shape, like_gpu=like_gpu) as counter:
        steps = {name: counter.step(costliest, set().union(*drawn)) for name, (drawn, costliest) in draws.items()}
    measured = dict.fromkeys(steps)
    if measure:
        whole = materialise(load_skeleton(args, peft_config, config), device)
        for name, (drawn, costliest) in draws.items():
            counter = StepCounter(whole, args, make_batch(*shape, False, device), like_gpu)
            try:
                measured[name] = measured_peak(counter, costliest, set().union(*drawn), device)
            except torch.OutOfMemoryError:
                say(f"{model}, {method}, {name}: does not fit here")
            counter.train(range(n_layers))
            del counter
        del whole
    records = []
    for name, step in steps.items():
        saved = float(step.saved)
        if name in ("ist", "semantic+ist"):
            count = len(draws["ist"][1])
            bytes_saved = (steps[arm].saved for arm in ("all", "ist", "last"))
            by_layer = SavedByLayer.solved(*bytes_saved, n_layers, count)
            saved = sum(by_layer.saved(draw, n_layers) for draw in draws[name][0]) / len(draws[name][0])
        peak = step.peak - step.at_peak["saved"] * (1 - saved / step.saved)
        records.append(
            {
                **{"model": model, "method": method, "arm": name, "rows": shape[0], "length": shape[1], "dtype": dtype},
                **{key: getattr(args, key) for key in ("attn_implementation", "gradient_checkpointing", "bf16")},
                **step.as_json(),
                **{"saved_mean": round(saved), "peak_mean": round(peak), "measured_peak": measured[name]},
            }
        )
    return records


def measured_peak(counter: StepCounter, trained: Sequence[int], ever: Iterable[int], device: torch.device) -> int:
    """Peak bytes of a real step: as CUDA's allocator has them, or on a CPU as the operations' storages count.

    Optimizer state is there for the layers that `ever` train.
    """
    kept = set(map(id, counter.with_state(counter.train(trained), ever)))
    for parameter in counter.trainable:
        if counter.optimizer and id(parameter) not in kept:
            counter.optimizer.state.pop(parameter, None)
    if device.type != "cuda":
        return counter.step(trained, ever).peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    counter.step(trained)
    return torch.cuda.max_memory_allocated(device)


def without_weights(record: dict[str, Any], key: str) -> int:
    """Bytes of a peak that are not the model's or the adapter's weights."""
    return record[key] - record["weights"]


def memory_table(records: list[dict[str, Any]]) -> str:
    """Markdown, in decimal GB: peaks without the weights, with the share of plain PEFT's; totals by the paper's."""
    groups: dict[tuple, dict[str, dict]] = {}
    for record in records:
        keys = ("model", "method", "attn_implementation", "gradient_checkpointing", "bf16")
        groups.setdefault(tuple(record[key] for key in keys), {})[record["arm"]] = record

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f}"

    rows = []
    for (model, method, attention, checkpointing, bf16), arms in groups.items():
        every = arms["all"]
        whole = without_weights(every, "peak")

        def cell(arm: str, key: str, arms=arms, whole=whole) -> str:
            if arm not in arms:
                return ""
            size = without_weights(arms[arm], key)
            return f"{gb(size)} ({size / whole:.2f})"

        setting = f"{attention}{', checkpointing' if checkpointing else ''}{', bf16' if bf16 else ''}"
        paper = PAPER.get(model, ())[1:] if method == "lora" and not checkpointing else ()
        row = [model, method, setting, gb(every["weights"]), gb(whole)]
        row += [cell("ist", "peak"), cell("ist", "peak_mean"), cell("last", "peak"), cell("semantic+ist", "peak")]
        totals = [every["peak"]] + ([arms["ist"]["peak"], arms["ist"]["peak_mean"]] if "ist" in arms else [])
        rows.append([*row, " / ".join(map(gb, totals)), " / ".join(map(str, paper))])
    header = ["model", "method", "setting", "weights", "all layers", "IST, peak", "IST, mean", "last quarter"]
    header += ["semantic+ist", "total: all / IST peak / mean", "paper: all / IST"]
    measured = [record for record in records if record["measured_peak"]]
    lines = markdown_table(header, rows)
    if measured:
        ratios = [record["peak"] / record["measured_peak"] for record in measured]
        lines += ["", f"counted peak / measured peak: {min(ratios):.3f} to {max(ratios):.3f}"]
    return "\n".join(lines)


def memory_settings(models: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model, method, options) of `memory`: LoRA on every model; on LLaMA-7B also the other methods and autocast."""
    for model in models:
        for method in methods:
            if method != "lora" and model != "LLaMA-7B":
                continue
            for checkpointing in (False, True):
                for attention in ("eager", "sdpa"):
                    yield model, method, {"attn_implementation": attention, "gradient_checkpointing": checkpointing}
            if method == "lora" and model == "LLaMA-7B":
                for attention in ("eager", "sdpa"):
                    yield model, method, {"attn_implementation": attention, "bf16": True}


def memory(options: Namespace, command: str) -> None:
    records = []
    for model, method, settings in memory_settings(options.models, options.methods):
        of_one = memory_of(method, model, (options.rows, options.length), options.measure, **settings)
        print(memory_table(of_one).split("\n")[2], file=sys.stderr, flush=True)
        records += of_one
    finish(options, command, memory_table(records), records=records)


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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def speed(options: Namespace, command: str) -> None:
    with training_flags(options) as flags:
        together = options.together or (1 if torch.cuda.is_available() else 0)
        results = measure_speed(flags, options.arms, options.rounds, together, say)
        flops = count_flops(flags)
    dtype = torch.bfloat16 if options.bf16 or options.dtype == "bfloat16" else torch.float32
    rate = matmul_rate(dtype)
    header = ["arm", "forward", "backward", "optimizer", "probe", "bookkeeping", "total (range of windows)"]
    header += ["tokens/s", "/ bare loop (95 % interval)"]
    floor = {key: 100 * flops[key] / rate for key in ("forward", "backward")}
    rows = speed_table(results, flops["tokens"])
    rows.append(["floor of `all`: FLOPs / rate of matrix products"] + [f"{floor[key]:.3g}" for key in floor])
    rows[-1] += ["", "", "", f"{sum(floor.values()):.3g}", f"{100 * flops['tokens'] / sum(floor.values()):.0f}", ""]
    shape = f"seconds per 100 steps, {options.rows} x {options.length} tokens, seeds: {options.rounds}"
    table = "\n".join([shape, "", *markdown_table(header, rows)])
    finish(options, command, table, results=results, flops=flops, matmul_flops_per_second=rate)


def probe(options: Namespace, command: str) -> None:
    with training_flags(options) as flags:
        flags |= {"learning_rate": 5e-4, "score_lr": 100, "update_interval": 5, "logging_steps": 5}
        seen = probe_agreement(flags, say)
    rows = []
    full = sum(one["seconds"]["full"] for one in seen)
    for name in ("cheap", "gradient"):
        rho, (low, high) = rank_correlation(seen, name)
        share = sum(one["seconds"][name] for one in seen) / full
        rows.append([name, f"{rho:.2f}", f"{low:.2f} … {high:.2f}", f"{share:.3f}"])
    header = ["probe", f"Spearman's rho, mean of {len(seen)} updates", "95 % interval", "seconds / full probe's"]
    finish(options, command, "\n".join(markdown_table(header, rows)), updates=seen)


def communication(options: Namespace, command: str) -> None:
    rows, result = [], {}
    with training_flags(options) as flags:
        for topology in ("ddp", "fsdp2"):
            for selection in ("all", "ist"):
                name = f"{topology}, {selection}"
                steps, _ = measure_communication(flags | {"selection": selection}, topology, options.ranks)
                result[name] = steps
                rows.append(communication_row(name, steps))
                say(" | ".join(rows[-1]))
    header = [f"{options.ranks} ranks", "per step", "gradient bytes / adapter bytes", "trained share of the layers"]
    finish(options, command, "\n".join(markdown_table(header, rows)), steps=result)


def scale(options: Namespace, command: str) -> None:
    with training_flags(options) as flags:
        rows = measure_scale(flags, Path(options.model_name_or_path), options.layers, say)
        for ranks in options.rank_counts:
            _, seconds = measure_communication(flags, "ddp", ranks)
            rows.append([f"the model itself, {ranks} rank{'s' * (ranks > 1)}", f"{1e3 * seconds:.0f}", "", "", ""])
            say(" | ".join(rows[-1]))
    header = ["ist", "ms per step", "probes, ms per step", "bookkeeping, ms per step", "bookkeeping share"]
    finish(options, command, "\n".join(markdown_table(header, rows)), rows=rows)


def rank(options: Namespace, command: str) -> None:
    communicate(json.loads(options.flags))


def arm(options: Namespace, command: str) -> None:
    run_arm(options.name, json.loads(options.flags), options.stride, options.parts)


def finish(options: Namespace, command: str, table: str, **result: Any) -> None:
    """Print a subcommand's table; write JSON to --output, and the table into --readme."""
    print(table)
    if options.output:
        publish(options.output, command, Accelerator(), table, options.readme, **result)


@command
def main(argv: Sequence[str]) -> int:
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
    options = parser.parse_args(argv)
    if options.readme and not options.output:
        parser.error("--readme needs --output, whose name is that of the markers")
    options.run(options, "python -m ist.benchmark " + shlex.join(argv))
    return 0
