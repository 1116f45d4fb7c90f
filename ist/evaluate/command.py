"""Accuracy of a model, with or without an adapter, on the paper's tasks in the LLM-Adapters protocol; perplexity.

    python -m ist.evaluate --model_name_or_path M --adapter runs/X/adapter --test_file boolq/test.json --output_dir O
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 -m ist.evaluate ...  (shared out)

Leaves O/<task>.jsonl, a line per row, and O/summary.json. A run that was stopped goes on from what it has written.
"""

import hashlib
import json
import math
import os
import re
import sys
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ist.training.command_line import quiet_known_warnings

quiet_known_warnings()

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import ist.adapters  # noqa: F401  its methods become known to PEFT
from ist.distributed import reduce_sum
from ist.training.command_line import UsageError, brief, command, parse_arguments, require
from ist.training.data import load_rows, make_prompt
from ist.training.files import read_lines, write_json, write_lines
from ist.training.record import require_writable

# ------------------------------------------------------------------------------------------------------------- answers


def extract_label(labels: Sequence[str]) -> Callable[[str], str | None]:
    """The first of `labels` in a text, as LLM-Adapters' scripts have it: anywhere, lower case; None: none, so wrong."""
    pattern = re.compile("|".join(labels))

    def extract(text: str) -> str | None:
        found = pattern.search(text)
        return found.group() if found else None

    return extract


def extract_letter(text: str) -> str | None:
    """The first capital A to E of a text (AQuA)."""
    found = re.search("[A-E]", text)
    return found.group() if found else None


def extract_number(text: str) -> float | None:
    """The last number of a text, thousands separators dropped; None when there is none."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


@dataclass
class Answers:
    """How a task's answers look: what is read from an output, when it is right, and what can be chosen from."""

    kind: Literal["label", "letter", "number", "text"]
    extract: Callable[[str], Any]
    gold: list[Any]
    labels: tuple[str, ...] = ()

    def right(self, extracted: Any, i: int) -> bool:
        if self.kind == "number":
            return extracted is not None and abs(extracted - self.gold[i]) < 1e-3
        return extracted == self.gold[i]


# As the scripts list them: they look for answer5 in every task with answers, for ending4 in every one with endings.
LABELS = (
    ("true", "false"),
    ("solution1", "solution2"),
    ("answer1", "answer2", "answer3", "answer4", "answer5"),
    ("ending1", "ending2", "ending3", "ending4"),
    ("option1", "option2"),
)


def answers_of(rows: Dataset, file: str) -> Answers:
    """The format of the answers, told from the rows' `answer`; those of rows with `choices` are texts among these.

    Raises:
        UsageError: no such column, or not one of the formats of the paper's tasks.
    """
    if "answer" not in rows.column_names or "instruction" not in rows.column_names:
        raise UsageError(f"--test_file {file} needs the columns instruction and answer; got {rows.column_names}.")
    if "choices" in rows.column_names:
        for i, row in enumerate(rows):
            if not isinstance(row["choices"], list) or row["answer"] not in row["choices"] or "" in row["choices"]:
                raise UsageError(
                    f"--test_file {file}, row {i}: answer must be one of choices, texts as a model would write them; "
                    f"got {row['answer']!r} and {row['choices']!r}."
                )
        return Answers("text", str.strip, [answer.strip() for answer in rows["answer"]])
    gold = [str(answer).strip() for answer in rows["answer"]]
    for labels in LABELS:
        if set(gold) <= set(labels):
            return Answers("label", extract_label(labels), gold, labels)
    if all(re.fullmatch("[A-E]", answer) for answer in gold):
        return Answers("letter", extract_letter, gold, tuple("ABCDE"))
    try:
        return Answers("number", extract_number, [float(answer.replace(",", "")) for answer in gold])
    except ValueError:
        listed = "; ".join("/".join(labels) for labels in LABELS)
        seen = ", ".join(sorted(set(gold))[:4])
        raise UsageError(
            f"--test_file {file}: its task cannot be told from its answers: {listed}; A to E; or numbers; got {seen}."
        ) from None


def task_name(file: str) -> str:
    """boolq of boolq.json, and of boolq/test.json."""
    path = Path(file)
    return path.parent.resolve().name if path.stem in ("test", "validation", "train") else path.stem


def choices(instruction: str, answers: Answers) -> list[str]:
    """The answers that an instruction lists: those of its answer format, or its (A) (B) …; else all of the task's."""
    if answers.kind == "letter":
        listed = re.findall(r"\(([A-E])\)", instruction)
    else:
        _, marker, form = instruction.rpartition("Answer format:")
        listed = [label for label in answers.labels if marker and re.search(rf"\b{label}\b", form)]
    return list(dict.fromkeys(listed)) or list(answers.labels)


def wilson(right: int, rows: int) -> tuple[float, float]:
    """95 % interval of an accuracy (Wilson's score interval)."""
    z, p = 1.959964, right / rows
    centre, spread = p + z * z / (2 * rows), z * math.sqrt(p * (1 - p) / rows + z * z / (4 * rows * rows))
    return (centre - spread) / (1 + z * z / rows), (centre + spread) / (1 + z * z / rows)


# ----------------------------------------------------------------------------------------------------------- the model


class Scorer:
    """A model and its tokenizer, and the three things that are asked of them."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: "ScorerArguments") -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.device = next(model.parameters()).device
        self.special = args.prompt_template != "chat"  # a chat template writes its own

    @torch.inference_mode()
    def generate(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """What follows each prompt. Padded on the left and masked, so that a row does not depend on its batch."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=self.special)
        tokens = self.model.generate(
            **inputs.to(self.device),
            max_new_tokens=max_new_tokens,
            num_beams=self.args.num_beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    @torch.inference_mode()
    def log_likelihoods(self, pairs: list[tuple[str, str]]) -> list[float]:
        """log p(continuation | prompt), summed over the continuation's tokens, for each (prompt, continuation)."""
        rows, starts = [], []
        for prompt, continuation in pairs:
            before = self.tokenizer(prompt, add_special_tokens=self.special)["input_ids"]
            whole = self.tokenizer(prompt + continuation, add_special_tokens=self.special)["input_ids"]
            if self.special and whole[-1] == self.tokenizer.eos_token_id:
                whole = whole[:-1]
            same = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
            rows.append(whole)
            starts.append(max(same, 1))
        width = max(map(len, rows))
        ids = torch.tensor([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        ids, mask = ids.to(self.device), mask.to(self.device)
        losses = self._token_losses(ids, mask)  # [B, width - 1]: of token t + 1
        return [-losses[i, start - 1 : len(row) - 1].sum().item() for i, (row, start) in enumerate(zip(rows, starts))]

    def _token_losses(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()

    @torch.inference_mode()
    def perplexity(self, text: str, max_length: int, state: PartialState) -> dict[str, float]:
        """exp of the mean loss of a text's tokens, in windows of `max_length` side by side, shared out over ranks."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        windows = [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
        windows = [window for window in windows if len(window) > 1]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        mine = windows[state.process_index :: state.num_processes]
        for window in progress(mine, "window", state):
            batch = torch.tensor([window], device=self.device)
            losses = self._token_losses(batch, torch.ones_like(batch))
            total += torch.tensor([losses.sum().item(), losses.numel()], dtype=torch.float64, device=self.device)
        loss_sum, tokens = reduce_sum(total).tolist()
        return {"perplexity": math.exp(loss_sum / tokens), "loss": loss_sum / tokens, "tokens": int(tokens)}


def progress(items: Sequence, unit: str, state: PartialState) -> Iterator:
    """A bar on a terminal, ten lines elsewhere; rank 0 only."""
    if sys.stderr.isatty():
        yield from tqdm(items, unit=unit, disable=not state.is_main_process)
        return
    for i, item in enumerate(items):
        yield item
        if state.is_main_process and ((i + 1) * 10 // len(items) > i * 10 // len(items)):
            print(f"{unit} {i + 1} of {len(items)}", flush=True)


# --------------------------------------------------------------------------------------------------------- the command


@dataclass
class ScorerArguments:
    """The keys of a model that is measured, not trained: of this command and of `python -m ist.analyze`."""

    model_name_or_path: str = field(metadata={"help": "The base model."})
    output_dir: str = field(metadata={"help": "Where the results go."})
    adapter: str | None = field(default=None, metadata={"help": "Folder of a PEFT adapter; default: the base alone."})
    any_base: bool = field(default=False, metadata={"help": "Take an adapter that names another base model."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "Of the base weights."})
    prompt_template: Literal["alpaca", "llm_adapters", "chat", "none"] | None = field(
        default=None, metadata={"help": "Default: that of the run that made the adapter (its run.json), else alpaca."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of a window of plain text."})
    batch_size: int = field(default=16, metadata={"help": "Rows at a time."})

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.max_length >= 2, "max_length", "2 or more tokens", self.max_length)


@dataclass
class EvaluateArguments(ScorerArguments):
    test_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Rows with instruction and answer; the file's stem or folder is the task's name."},
    )
    perplexity_file: list[str] = field(default_factory=list, metadata={"help": "Plain text to take the perplexity of."})
    scoring: Literal["generation", "likelihood"] = field(
        default="generation",
        metadata={"help": "likelihood: which of the choices, listed or in the column choices, is the most likely."},
    )
    num_beams: int = field(default=4, metadata={"help": "Beams of the search; 1 is greedy."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of an answer at most; default 32, and 256 where it is worked out."}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Only the first rows of each file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_beams", "max_new_tokens", "max_rows"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, "1 or more", value)
        if not self.test_file and not self.perplexity_file:
            raise UsageError("give --test_file FILE [FILE ...] or --perplexity_file FILE [FILE ...].")
        names = Counter(task_name(file) for file in self.test_file)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise UsageError(f"--test_file has more than one file of the task {repeated[0]}: evaluate them apart.")


# What may change between a run and the one that goes on with it.
FREE_KEYS = ("output_dir", "batch_size", "test_file", "perplexity_file")


def load_tasks(args: EvaluateArguments) -> dict[str, tuple[Dataset, Answers]]:
    tasks = {}
    for file in args.test_file:
        rows = load_rows("test_file", [file])
        if args.max_rows:
            rows = rows.select(range(min(args.max_rows, len(rows))))
        answers = answers_of(rows, file)
        if args.scoring == "likelihood" and answers.kind == "number":
            raise UsageError(f"--scoring likelihood needs choices; the answers of {file} are numbers.")
        tasks[task_name(file)] = rows, answers
    return tasks


def require_base(args: ScorerArguments) -> None:
    """Raises UsageError when the adapter says that it belongs to another model, or is none."""
    if not args.adapter:
        return
    if not (Path(args.adapter) / "adapter_config.json").exists():
        raise UsageError(f"--adapter {args.adapter} is not a folder with an adapter (no adapter_config.json).")
    base = PeftConfig.from_pretrained(args.adapter).base_model_name_or_path
    if base and Path(base).name.lower() != Path(args.model_name_or_path).name.lower() and not args.any_base:
        raise UsageError(
            f"--adapter {args.adapter} belongs to {base}, not to {args.model_name_or_path}; --any_base true takes it."
        )


def files_digest(files: Iterable[Path]) -> str:
    """Tells files from others that stood in the same places before."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def adapter_digest(folder: str | None) -> str | None:
    """Tells an adapter that was trained anew in the same folder from the one before, but for what is chance: the order
    of module names, which are a set to PEFT."""
    if folder is None:
        return None
    file = Path(folder) / "adapter_config.json"
    listed = {key: sorted(map(str, v)) if isinstance(v, list) else v for key, v in json.loads(file.read_text()).items()}
    weights = files_digest(path for path in sorted(Path(folder).glob("adapter_*")) if path != file)
    return hashlib.sha256((json.dumps(listed, sort_keys=True) + weights).encode()).hexdigest()[:16]


def read_text(key: str, file: str) -> str:
    """Raises UsageError when it cannot be read, or is empty."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{key} {file} cannot be read: {brief(error)}.") from error
    if not text.strip():
        raise UsageError(f"--{key} {file} is empty.")
    return text


def load_scorer(args: ScorerArguments, device: torch.device) -> Scorer:
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
        if args.adapter:
            model = PeftModel.from_pretrained(model, args.adapter)
    except Exception as error:
        raise UsageError(f"{args.adapter or args.model_name_or_path} cannot be loaded: {brief(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if args.prompt_template == "chat" and not tokenizer.chat_template:
        raise UsageError("--prompt_template chat: the model's tokenizer has no chat template; use another template.")
    return Scorer(model.to(device).eval(), tokenizer, args)


def _whole_lines(file: Path) -> Iterator[dict]:
    """The lines of a shard, without one that a kill cut short."""
    for line in file.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def gather(output_dir: Path, task: str) -> dict[int, dict]:
    """Rows that are done, by number, from the shards that ranks wrote, of this run and of those before."""
    lines = (line for file in sorted(output_dir.glob(f".{task}.*.jsonl")) for line in _whole_lines(file))
    return {line["row"]: line for line in lines}


def evaluate_task(
    scorer: Callable[[], Scorer],
    name: str,
    rows: Dataset,
    answers: Answers,
    args: EvaluateArguments,
    state: PartialState,
) -> dict | None:
    """Score the rows that no earlier run has scored, and write O/<task>.jsonl; the task's line of the summary."""
    output_dir = Path(args.output_dir)
    final = output_dir / f"{name}.jsonl"
    if not final.exists():
        done = gather(output_dir, name)
        state.wait_for_everyone()  # nobody writes before everybody has read
        left = sorted(set(range(len(rows))) - done.keys())
        if done:
            state.print(f"{name}: going on after {len(done)} of {len(rows)} rows")
        if left:
            _score(scorer(), name, rows, answers, left[state.process_index :: state.num_processes], args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            lines = gather(output_dir, name)
            if lines.keys() != set(range(len(rows))):
                raise RuntimeError(f"{name}: {len(lines)} of {len(rows)} rows were scored")
            write_lines(final, (lines[i] for i in range(len(rows))))
            for shard in output_dir.glob(f".{name}.*.jsonl"):
                shard.unlink()
        state.wait_for_everyone()
    right = [line["right"] for line in read_lines(final)]
    if len(right) != len(rows):
        raise UsageError(
            f"--output_dir: {final} has {len(right)} rows, the test file {len(rows)}. Choose another folder."
        )
    low, high = wilson(sum(right), len(right))
    return {"rows": len(right), "right": sum(right), "accuracy": sum(right) / len(right), "interval": [low, high]}


def _score(
    scorer: Scorer,
    name: str,
    rows: Dataset,
    answers: Answers,
    mine: list[int],
    args: EvaluateArguments,
    state: PartialState,
) -> None:
    """Write a line for each row of `mine` to a shard of this process's own."""
    prompts = {i: make_prompt(rows[i], args.prompt_template, scorer.tokenizer) for i in mine}
    mine = sorted(mine, key=lambda i: len(prompts[i]), reverse=True)  # what needs most memory comes first
    batches = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    state.print(f"{name}: {len(rows)} rows")
    with open(Path(args.output_dir) / f".{name}.{uuid.uuid4().hex}.jsonl", "w") as file:
        for batch in progress(batches, "batch", state):
            if args.scoring == "generation":
                tokens = args.max_new_tokens or (32 if answers.kind in ("label", "text") else 256)
                outputs = scorer.generate([prompts[i] for i in batch], tokens)
                found = [(output, answers.extract(output)) for output in outputs]
            else:
                found = [_most_likely(scorer, prompts[i], rows[i], answers) for i in batch]
            for i, (output, extracted) in zip(batch, found, strict=True):
                line = {"row": i, "prompt": prompts[i], "output": output, "extracted": extracted}
                line |= {"gold": answers.gold[i], "right": answers.right(extracted, i)}
                file.write(json.dumps(line) + "\n")
            file.flush()


def _most_likely(scorer: Scorer, prompt: str, row: dict, answers: Answers) -> tuple[str, str]:
    """(log-likelihoods as JSON, the best choice): of labels worded as in the training rows; of texts per character, so
    that length does not decide (acc_norm of lm-evaluation-harness)."""
    listed = list(dict.fromkeys(row["choices"])) if answers.kind == "text" else choices(row["instruction"], answers)
    wordings = {"letter": "The answer is ({}).", "text": "{}"}
    wording = wordings.get(answers.kind, "the correct answer is {}")
    values = scorer.log_likelihoods([(prompt, wording.format(choice)) for choice in listed])
    if answers.kind == "text":
        values = [value / len(choice) for choice, value in zip(listed, values, strict=True)]
    scores = dict(zip(listed, values, strict=True))
    return json.dumps(scores), max(scores, key=scores.get).strip()


def as_table(summary: dict) -> str:
    lines = [f"| {'task':<14} |  rows | accuracy | 95 % interval |", f"|{'-' * 16}|-------|----------|---------------|"]
    for name, task in summary["tasks"].items():
        low, high = task["interval"]
        lines.append(f"| {name:<14} | {task['rows']:5} | {task['accuracy']:8.1%} | {low:5.1%} – {high:5.1%} |")
    if summary["tasks"]:
        lines.append(f"| {'average':<14} |       | {summary['average']:8.1%} |               |")
    for name, text in summary["perplexity"].items():
        lines.append(f"{name}: perplexity {text['perplexity']:.3f} over {text['tokens']} tokens")
    return "\n".join(lines if summary["tasks"] else lines[2:])


def training_run(folder: str) -> dict | None:
    """What the run that made the adapter, or the model, says of itself, where its run.json stands beside."""
    try:
        run = json.loads((Path(folder) / "../run.json").read_text())
        return {"configuration": run["configuration"], **{key: run.get(key) for key in ("commit", "best", "steps")}}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def start(args: ScorerArguments) -> tuple[PartialState, dict | None]:
    """(the processes, what the training run says of itself), and args.prompt_template by that where it has its default.

    Raises:
        UsageError: the launcher shards models, or the adapter belongs to another base model.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UsageError("evaluation puts a whole model on each device: launch with accelerate_configs/ddp.yaml.")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    training = training_run(args.adapter or args.model_name_or_path)
    if args.prompt_template is None:
        args.prompt_template = training["configuration"]["prompt_template"] if training else "alpaca"
    require_base(args)
    return state, training


def claim_folder(output_dir: Path, settings: dict, state: PartialState) -> None:
    """Write the settings that decide the results beside them, as arguments.json.

    Raises:
        UsageError: the folder cannot be written, or holds the results of others.
    """
    require_writable(output_dir)
    file = output_dir / "arguments.json"
    if file.exists() and (earlier := json.loads(file.read_text())) != settings:
        differing = ", ".join(key for key in settings if settings[key] != earlier.get(key))
        raise UsageError(f"--output_dir {output_dir} holds results of another {differing}. Choose another folder.")
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(file, settings)


@command
def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([EvaluateArguments], argv, __doc__.split("\n")[0])
    state, training = start(args)
    tasks = load_tasks(args)
    texts = {Path(file).stem: read_text("perplexity_file", file) for file in args.perplexity_file}
    output_dir = Path(args.output_dir)
    settings = {key: value for key, value in asdict(args).items() if key not in FREE_KEYS}
    settings["adapter_digest"] = adapter_digest(args.adapter)
    claim_folder(output_dir, settings, state)

    loaded: list[Scorer] = []

    def scorer() -> Scorer:
        """Loaded when the first row needs it: a finished evaluation needs none."""
        if not loaded:
            loaded.append(load_scorer(args, state.device))
        return loaded[0]

    results = {name: evaluate_task(scorer, name, *task, args, state) for name, task in tasks.items()}
    perplexity = {name: scorer().perplexity(text, args.max_length, state) for name, text in texts.items()}
    accuracies = [result["accuracy"] for result in results.values()]
    summary = {
        "tasks": results,
        "average": sum(accuracies) / len(accuracies) if accuracies else None,  # unweighted, as in the paper
        "perplexity": perplexity,
        "arguments": asdict(args) | {"adapter_digest": settings["adapter_digest"]},
        "training": training,
    }
    if state.is_main_process:
        write_json(output_dir / "summary.json", summary)
        print(as_table(summary), flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    return 0
