"""PEFT's method comparison (MetaMathQA -> GSM8K) with IST, random draws and LoRA: its protocol, and its JSON.

    python -m launch.experiments.method_comparison --model_name_or_path meta-llama/Llama-3.2-3B \\
        --train_file metamathqa.json --test_file gsm8k_test.jsonl --wiki_file finewiki.jsonl --output_dir runs/methods

The protocol is that of huggingface/peft, method_comparison/MetaMathQA, at commit 5d602fd: 5,000 steps of 4 rows, AdamW
at 1e-4 with weight decay 0.1, cosine after a tenth of warm-up, LoRA of rank 32 on q_proj and v_proj, loss on questions
too, greedy answers of 300 tokens, forgetting as the rise of the loss of general text. What differs here: rows are not
sorted into buckets of like lengths; a text that ends within 768 tokens counts its EOS in forgetting; memory is the peak
of what tensors take, theirs what the allocator reserves. Runs go on where they were stopped.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ist.training.command_line import quiet_known_warnings

quiet_known_warnings()

from ist.benchmark.arms import as_argv
from ist.training.command_line import (
    UsageError,
    command,
    markdown_table,
    parse_arguments,
    require,
    run_command,
)
from ist.training.files import METRICS, read_lines, read_object, reading, write_json, write_lines, write_text
from ist.training.reading import read_rows
from ist.training.record import read_run, require_writable
from ist.training.sources import find_sources
from launch.experiments.runner import ROOT

QUERY = "Question: {} Think step by step.\nAnswer:"
CHARACTERS = 1300  # of question and answer together; longer training rows are left out
TOKENS, TEXTS = 768, 100
ARMS: dict[str, dict[str, Any]] = {
    "LoRA": {"selection": "all"},
    "random": {"selection": "random", "trained_layers": 0.25},
    "IST": {"selection": "ist", "trained_layers": 0.25, "kept_layers": 0.5},
}
ADAPTER = {"lora_r": 32, "lora_alpha": 64, "lora_dropout": 0, "target_modules": ["q_proj", "v_proj"]}
NAMES = {"query": "instruction", "question": "instruction", "response": "output", "answer": "output"}
ANSWER = re.compile(r"The (?:final )?answer is:? |#### ")


@dataclass
class ComparisonArguments:
    model_name_or_path: str = field(metadata={"help": "The base model; theirs is meta-llama/Llama-3.2-3B."})
    train_file: str = field(metadata={"help": "Rows of MetaMathQA: query and response."})
    test_file: str = field(metadata={"help": "Rows of gsm8k's test set: question and answer, which ends in #### N."})
    wiki_file: str = field(metadata={"help": "General text, a row each in the column text; the first 100 count."})
    output_dir: str = field(metadata={"help": "Where runs and results go."})
    arms: list[str] | None = field(default=None, metadata={"help": "Some of LoRA, random, IST; default: all."})
    max_steps: int = field(default=5000, metadata={"help": "Optimizer steps."})
    max_test_rows: int | None = field(default=None, metadata={"help": "Only the first test rows; default: all 1319."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the base weights: bfloat16 or float32."})
    seed: int = field(default=0, metadata={"help": "Of initialisation, data order and draws."})

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, "max_steps", "1 or more", self.max_steps)
        require(self.dtype in ("bfloat16", "float32"), "dtype", "bfloat16 or float32", self.dtype)
        if unknown := set(self.arms or ()) - ARMS.keys():
            raise UsageError(f"--arms has {unknown.pop()!r}; known are {', '.join(ARMS)}.")


def answer_of(text: str) -> float | str | None:
    """What follows the last "The answer is" or "####": a number, also of a fraction, else a text; None without it."""
    _, *said = ANSWER.split(text.strip().rstrip(".!?"))
    if not said:
        return None
    answer = said[-1].partition("\n")[0].strip(" .!?$%")
    above, slash, below = answer.partition("/")
    try:
        return float(above) / float(below) if slash else float(answer)
    except (ValueError, ZeroDivisionError):
        return answer


def write_rows(args: ComparisonArguments, folder: Path) -> dict[str, Path]:
    """{train, gsm8k, wiki: files of rows for train_ist.py and ist.evaluate}.

    Raises:
        UsageError: a file cannot be used.
    """
    files = {name: folder / f"{name}.jsonl" for name in ("train", "gsm8k", "wiki")}
    for key, name in (("train_file", "train"), ("test_file", "gsm8k")):
        rows = read_rows(key, find_sources(key, [getattr(args, key)]), NAMES)
        missing = {"instruction", "output"} - {*rows.column_names}
        if missing:
            raise UsageError(f"--{key} needs a question and a worked answer; it has {', '.join(rows.column_names)}.")
        pairs = [(row["instruction"], row["output"]) for row in rows]
        if name == "train":
            pairs = [pair for pair in pairs if len(" ".join(pair)) <= CHARACTERS]
        elif any(answer_of(answer) is None for _, answer in pairs):
            raise UsageError(f"--{key} needs answers that end in #### and a number.")
        lines = [{"instruction": QUERY.format(asked), "output": answer} for asked, answer in pairs]
        write_lines(files[name], lines[: args.max_test_rows] if name == "gsm8k" else lines)
    texts = read_rows("wiki_file", find_sources("wiki_file", [args.wiki_file]))
    if "text" not in texts.column_names:
        raise UsageError(f"--wiki_file needs the column text; it has {', '.join(texts.column_names)}.")
    write_lines(files["wiki"], ({"text": text} for text in texts["text"][:TEXTS]))
    return files


def run(argv: list[str], log: Path) -> None:
    """
    Raises:
        UsageError: it failed; the log says why.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{' '.join(argv[:2])}: see {log}", flush=True)
    with open(log, "a") as file:
        code = subprocess.run([sys.executable, *argv], cwd=ROOT, stdout=file, stderr=file, check=False).returncode
    if code:
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
        raise UsageError(f"{argv[0]} ended with exit code {code}; {log} ends: {last}")


def evaluate(args: ComparisonArguments, files: dict[str, Path], where: Path, adapter: Path | None) -> dict[str, Any]:
    """The summary of ist.evaluate: the loss of general text; with an adapter also greedy answers, in gsm8k.jsonl."""
    if not (where / "summary.json").exists():
        values = {"model_name_or_path": args.model_name_or_path, "output_dir": where.absolute(), "dtype": args.dtype}
        values |= {"loss_file": files["wiki"].absolute(), "max_length": TOKENS, "prompt_template": "none"}
        if adapter:
            values |= {"adapter": adapter.absolute(), "test_file": files["gsm8k"].absolute(), "num_beams": 1}
            values |= {"max_new_tokens": 300, "batch_size": 50}
        run(["-m", "ist.evaluate", *as_argv(values)], where.with_name(f"{where.name}.log"))
    return read_object(where / "summary.json")


def compare(args: ComparisonArguments, name: str, files: dict[str, Path], before: float) -> dict[str, Any]:
    """Train and measure an arm; its result in the form of PEFT's."""
    folder = Path(args.output_dir) / name.lower()
    config = {
        **{"model_name_or_path": args.model_name_or_path, "train_file": files["train"].absolute(), "seed": args.seed},
        **{"dtype": args.dtype, "prompt_template": "none", "max_length": TOKENS, "max_steps": args.max_steps},
        **{"per_device_train_batch_size": 4, "learning_rate": 1e-4, "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
        **{"warmup_steps": args.max_steps // 10, "report_to": "none", "save_steps": max(1, args.max_steps // 10)},
        **{"save_total_limit": 1, "resume_from_checkpoint": "auto", "output_dir": folder.absolute(), **ADAPTER},
        **ARMS[name],
    }
    record = read_run(folder)
    if record is None or record["status"] != "finished":
        run(["train_ist.py", *as_argv(config)], folder.with_name(f"{folder.name}.log"))
    summary = evaluate(args, files, folder / "evaluation", folder / "adapter")
    answers = [json.loads(line) for line in files["gsm8k"].read_text().splitlines()]
    outputs = read_lines(folder / "evaluation" / "gsm8k.jsonl")
    right = [answer_of(o["output"]) == answer_of(a["output"]) for o, a in zip(outputs, answers, strict=True)]
    record, lines = read_run(folder), [line for line in read_lines(folder / METRICS) if "loss" in line]
    steps = [0, *(line["step"] for line in lines)]
    with reading(folder, "a run of train_ist.py"):
        seconds = sum((b - a) * line["step_seconds"] for a, b, line in zip(steps, steps[1:], lines, strict=False))
        metrics = {
            **{"step": record["steps"], "test accuracy": sum(right) / len(right), "train loss": lines[-1]["loss"]},
            **{"train samples": 4 * record["steps"], "train total tokens": lines[-1]["tokens"]},
            "forgetting": summary["losses"]["wiki"]["loss"] - before,
        }
        return {
            "run_info": {
                **{"created_at": record["start"], "experiment_name": name, "commit": record["commit"]},
                "train_config": record["configuration"],
                "peft_config": read_object(folder / "adapter/adapter_config.json"),
            },
            "train_info": {
                "accelerator_memory_max": max(line["peak_memory_bytes"] for line in lines),
                **{"train_time": seconds, "file_size": (folder / "adapter/adapter_model.safetensors").stat().st_size},
                **{"status": "success", "metrics": [metrics]},
            },
            "meta_info": {"hardware": record["hardware"], "versions": record["versions"]},
        }


def as_table(results: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, result in results.items():
        train, last = result["train_info"], result["train_info"]["metrics"][-1]
        cells = [f"{last['test accuracy']:.1%}", f"{last['forgetting']:+.4f}", f"{last['train loss']:.4f}"]
        cells += [f"{train['accelerator_memory_max'] / 1e9:.2f}", f"{train['train_time']:.0f}"]
        rows.append([name, *cells, f"{train['file_size'] / 1e6:.1f}"])
    header = ["arm", "test accuracy", "forgetting", "train loss", "peak memory, GB", "seconds of training"]
    return markdown_table([*header, "adapter, MB"], rows)


@command
def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([ComparisonArguments], argv, __doc__.split("\n")[0])
    folder = Path(args.output_dir)
    require_writable(folder)
    files = write_rows(args, folder)
    before = evaluate(args, files, folder / "base", None)["losses"]["wiki"]["loss"]
    results = {}
    for name in args.arms or ARMS:
        results[name] = compare(args, name, files, before)
        write_json(folder / f"{name.lower()}.json", results[name])
    table = "\n".join(as_table(results))
    write_text(folder / "comparison.md", table + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    run_command(main)
