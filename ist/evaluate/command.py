"""Accuracy of a model, with or without an adapter, on the paper's tasks in the LLM-Adapters protocol; perplexity.

    python -m ist.evaluate --model_name_or_path M --adapter runs/X/adapter --test_file boolq/test.json --output_dir O
    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 8 -m ist.evaluate ...  (shared out)

Leaves O/<task>.jsonl, a line per row, and O/summary.json. A stopped run goes on from its files.
"""

import json
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from accelerate import PartialState
from datasets import Dataset

from ist.evaluate.answers import Answers, answers_of, choices, question, task_name
from ist.evaluate.row_losses import losses_of, read_loss_rows
from ist.evaluate.scorer import (
    Scorer,
    ScorerArguments,
    claim_folder,
    deciding,
    digests_of,
    load_scorer,
    progress,
    read_text,
    shards,
    start,
    tokenizer_of,
)
from ist.report.statistics import wilson
from ist.training.chat import ChatTemplate
from ist.training.command_line import UsageError, command, parse_arguments, require
from ist.training.encoding import as_lists, make_prompt
from ist.training.export import stop_ids
from ist.training.files import json_digest, read_lines, write_json, write_lines, writing
from ist.training.reading import column_mapping, read_rows
from ist.training.sources import find_sources


@dataclass
class EvaluateArguments(ScorerArguments):
    free_keys = ("output_dir", "batch_size", "test_file", "perplexity_file", "loss_file", "column_mapping")

    test_file: list[str] = field(
        default_factory=list,
        metadata={"help": "Rows with a question and an answer; the file's stem or folder is the task's name."},
    )
    column_mapping: list[str] | None = field(
        default=None, metadata={"help": "Other names of columns, THEIRS=OURS: question=instruction."}
    )
    perplexity_file: list[str] = field(default_factory=list, metadata={"help": "Plain text to take the perplexity of."})
    loss_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rows as train_ist.py takes them, to take the loss of each answer of; O/<stem>.losses.jsonl."
        },
    )
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
        if not self.test_file and not self.perplexity_file and not self.loss_file:
            raise UsageError(
                "give --test_file FILE [FILE ...], --perplexity_file FILE [FILE ...] or --loss_file FILE [FILE ...]."
            )
        stems = Counter(Path(file).stem for file in self.loss_file)
        if repeated := [stem for stem, count in stems.items() if count > 1]:
            raise UsageError(f"--loss_file has more than one file named {repeated[0]}: evaluate one at a time.")
        names = Counter(task_name(file) for file in self.test_file)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise UsageError(f"--test_file has more than one file of the task {repeated[0]}: evaluate one at a time.")


class Task(NamedTuple):
    name: str
    rows: Dataset
    answers: Answers
    prompts: list[str]  # as the model gets them

    def digest(self) -> str:
        """sha256 of all that an answer and its mark depend on, but for the model and the arguments."""
        listed = [as_lists(row)["choices"] for row in self.rows] if self.answers.kind == "text" else None
        return json_digest(
            [self.prompts, self.answers.kind, self.answers.gold, self.answers.labels, listed and [*listed]]
        )


def load_tasks(args: EvaluateArguments) -> list[Task]:
    """
    Raises:
        UsageError: a file or a row that cannot be used.
    """
    tasks, chat = [], None
    if args.test_file and args.prompt_template == "chat":
        chat = ChatTemplate(tokenizer_of(args))
    for file in args.test_file:
        rows = read_rows(
            "test_file", find_sources("test_file", [file]), column_mapping(args.column_mapping), form=False
        )
        if args.max_rows:
            rows = rows.select(range(min(args.max_rows, len(rows))))
        answers = answers_of(rows, file)
        if args.scoring == "likelihood" and answers.kind == "number":
            raise UsageError(f"--scoring likelihood needs choices; the answers of {file} are numbers.")
        prompts = []
        for i, row in enumerate(rows):
            try:
                prompts.append(make_prompt(row, args.prompt_template, chat))
            except UsageError as error:
                raise UsageError(f"--test_file {file}: row {i} {error}.") from error
        tasks.append(Task(task_name(file), rows, answers, prompts))
    return tasks


def gather(output_dir: Path, task: str) -> dict[int, dict]:
    """Scored rows by number, from the shards that ranks wrote, of this run and of those before."""
    return {line["row"]: line for file in shards(output_dir, task) for line in read_lines(file) if "row" in line}


def evaluate_task(
    task: Task, scorer: Callable[[], Scorer], args: EvaluateArguments, state: PartialState
) -> dict[str, Any]:
    """Score the rows that no earlier run has scored, and write O/<task>.jsonl; the task's entry in the summary."""
    output_dir, name, rows = Path(args.output_dir), task.name, len(task.rows)
    final = output_dir / f"{name}.jsonl"
    if not final.exists():
        done = gather(output_dir, name)
        state.wait_for_everyone()  # nobody writes before everybody has read
        left = sorted(set(range(rows)) - done.keys())
        if done:
            state.print(f"{name}: going on after {len(done)} of {rows} rows")
        if left:
            _score(task, scorer(), left[state.process_index :: state.num_processes], args, state)
        state.wait_for_everyone()
        if state.is_main_process:
            lines = gather(output_dir, name)
            if lines.keys() != set(range(rows)):
                raise RuntimeError(f"{name}: {len(lines)} of {rows} rows were scored")
            write_lines(final, (lines[i] for i in range(rows)))
            for shard in shards(output_dir, name):
                shard.unlink()
        state.wait_for_everyone()
    right = [line.get("right") for line in read_lines(final)]
    if len(right) != rows or not all(isinstance(one, bool) for one in right):
        raise UsageError(
            f"--output_dir: {final} does not hold {rows} whole answers. Remove it, or choose another folder."
        )
    interval = list(wilson(sum(right), rows))
    return {"rows": rows, "right": sum(right), "accuracy": sum(right) / rows, "interval": interval}


def _score(task: Task, scorer: Scorer, mine: list[int], args: EvaluateArguments, state: PartialState) -> None:
    """Write a line for each row of `mine` to a shard of this process's own."""
    answers, prompts = task.answers, task.prompts
    mine = sorted(mine, key=lambda i: len(prompts[i]), reverse=True)  # the batch that needs most memory comes first
    batches = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
    state.print(f"{task.name}: {len(task.rows)} rows")
    with open(Path(args.output_dir) / f".{task.name}.{uuid.uuid4().hex}.jsonl", "w") as file:
        for batch in progress(batches, "batch", state):
            if args.scoring == "generation":
                tokens = args.max_new_tokens or (32 if answers.kind in ("label", "text") else 256)
                outputs = scorer.generate([prompts[i] for i in batch], tokens)
                found = [(output, answers.extract(output)) for output in outputs]
            else:
                found = [_most_likely(scorer, prompts[i], as_lists(task.rows[i]), answers) for i in batch]
            with writing(Path(file.name)):
                for i, (output, extracted) in zip(batch, found, strict=True):
                    line = {"row": i, "prompt": prompts[i], "output": output, "extracted": extracted}
                    line |= {"gold": answers.gold[i], "right": answers.right(extracted, i)}
                    file.write(json.dumps(line) + "\n")
                file.flush()


def _most_likely(scorer: Scorer, prompt: str, row: dict, answers: Answers) -> tuple[str, str]:
    """(log-likelihoods as JSON, the best choice): of labels worded as in the training rows; of texts per character, so
    that length does not decide (acc_norm of lm-evaluation-harness)."""
    listed = list(dict.fromkeys(row["choices"])) if answers.kind == "text" else choices(question(row), answers)
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
    for name, loss in summary["losses"].items():
        lines.append(f"{name}: loss {loss['loss']:.4f} over {loss['tokens']} tokens of {loss['rows']} answers")
    for name, text in summary["perplexity"].items():
        lines.append(f"{name}: perplexity {text['perplexity']:.3f} over {text['tokens']} tokens")
    return "\n".join(lines if summary["tasks"] else lines[2:])


@command
def main(argv: Sequence[str]) -> int:
    args, _ = parse_arguments([EvaluateArguments], argv, __doc__.split("\n")[0])
    state, training = start(args)
    tasks = load_tasks(args)
    texts = {Path(file).stem: read_text("perplexity_file", file) for file in args.perplexity_file}
    given = read_loss_rows(args, args.loss_file, column_mapping(args.column_mapping))
    output_dir = Path(args.output_dir)
    digests = digests_of(args, training)
    # Before, answers of chats went on after the end of a turn: not to be mixed with those of now.
    ends = {"stops": stop_ids(tokenizer_of(args), "chat")} if args.test_file and args.prompt_template == "chat" else {}
    answered = {task.name: task.digest() for task in tasks} | {rows.stem: rows.digest() for rows in given}
    claim_folder(output_dir, deciding(args) | digests | ends, state, answered)
    scorer = cache(partial(load_scorer, args, state.device))  # a finished evaluation loads no model
    results = {task.name: evaluate_task(task, scorer, args, state) for task in tasks}
    perplexity = {name: scorer().perplexity(text, args.max_length, state) for name, text in texts.items()}
    losses = {rows.name: losses_of(rows, scorer, args, state) for rows in given}
    accuracies = [result["accuracy"] for result in results.values()]
    summary = {
        "tasks": results,
        "average": sum(accuracies) / len(accuracies) if accuracies else None,  # unweighted, as in the paper
        "perplexity": perplexity,
        "losses": losses,
        "arguments": asdict(args) | digests,
        "training": training,
    }
    if state.is_main_process:
        write_json(output_dir / "summary.json", summary)
        print(as_table(summary), flush=True)
    state.wait_for_everyone()
    state.destroy_process_group()
    return 0
