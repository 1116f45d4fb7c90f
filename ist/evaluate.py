"""Exact-answer score of a model, with or without an adapter, on rows whose answer is a number.

    python -m ist.evaluate --model_name_or_path M --adapter runs/demo/adapter --test_file test.json --output_dir O

Leaves O/<name of the test file>.jsonl, a line per row, and O/summary.json.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ist.config import quiet_known_warnings

quiet_known_warnings()

import datasets
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import ist.adapters  # noqa: F401  its methods become known to PEFT
from ist.checkpoint import write_json
from ist.config import UsageError, brief, parse_arguments, require, run_command
from ist.data import load_rows, make_prompt


@dataclass
class EvaluateArguments:
    model_name_or_path: str = field(metadata={"help": "The base model."})
    test_file: str = field(metadata={"help": "Rows with instruction, output and a numeric answer."})
    output_dir: str = field(metadata={"help": "Where the answers and the summary go."})
    adapter: str | None = field(default=None, metadata={"help": "Folder of a PEFT adapter; default: the base alone."})
    prompt_template: Literal["alpaca", "llm_adapters", "chat", "none"] = field(
        default="alpaca", metadata={"help": "As in training."}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "Of the base weights."})
    batch_size: int = field(default=16, metadata={"help": "Rows generated at a time."})
    num_beams: int = field(default=4, metadata={"help": "Beams of the search; 1 is greedy."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens of an answer at most."})

    def __post_init__(self) -> None:
        for key in ("batch_size", "num_beams", "max_new_tokens"):
            require(getattr(self, key) >= 1, key, "1 or more", getattr(self, key))


def extract_number(text: str) -> float | None:
    """The last number of a text, thousands separators dropped; None when there is none."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([EvaluateArguments], argv, __doc__.split("\n")[0])
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    rows = load_rows("test_file", [args.test_file])
    try:
        gold = [float(str(row["answer"]).replace(",", "")) for row in rows]
    except (KeyError, ValueError, AttributeError) as error:
        raise UsageError(f"--test_file {args.test_file} needs a column answer with a number in every row.") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
        if args.adapter:
            model = PeftModel.from_pretrained(model, args.adapter)
    except Exception as error:
        raise UsageError(f"{args.adapter or args.model_name_or_path} cannot be loaded: {brief(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()
    if args.prompt_template == "chat" and not tokenizer.chat_template:
        raise UsageError("--prompt_template chat: the model's tokenizer has no chat template; use another template.")

    prompts = [make_prompt(row, args.prompt_template, tokenizer) for row in rows]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    right = 0
    with open(output_dir / f"{Path(args.test_file).stem}.jsonl", "w") as file:
        for start in tqdm(range(0, len(rows), args.batch_size), unit="batch", disable=not sys.stderr.isatty()):
            batch = prompts[start : start + args.batch_size]
            special = args.prompt_template != "chat"
            inputs = tokenizer(batch, return_tensors="pt", padding=True, add_special_tokens=special).to(device)
            with torch.inference_mode():
                tokens = model.generate(
                    **inputs,
                    max_new_tokens=args.max_new_tokens,
                    num_beams=args.num_beams,
                    do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )
            answers = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, answer in enumerate(answers, start):
                extracted = extract_number(answer)
                correct = extracted is not None and abs(extracted - gold[i]) < 1e-3
                right += correct
                line = {"prompt": prompts[i], "output": answer, "extracted": extracted, "gold": gold[i]}
                file.write(json.dumps({**line, "right": correct}) + "\n")
            done = min(start + args.batch_size, len(rows))
            print(f"{done}/{len(rows)} rows, {right} right ({right / done:.1%})", flush=True)
    summary = {"rows": len(rows), "right": right, "accuracy": right / len(rows), "arguments": vars(args)}
    write_json(output_dir / "summary.json", summary)
    return 0


if __name__ == "__main__":
    run_command(main)
