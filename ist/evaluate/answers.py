"""The answers of the paper's tasks, as LLM-Adapters' scripts read them from a model's output."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ist.training.command_line import UsageError
from ist.training.conversation import conversation
from ist.training.encoding import as_lists


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
    """The format of a task's answers: how to read one from an output, the right ones, and the choices."""

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
    """The format of the answers, by the rows' `answer`, or by what they would train on; of rows with `choices` they are
    texts among these.

    Raises:
        UsageError: no question or answer, or not one of the formats of the paper's tasks.
    """
    answers = _answers(rows)
    if answers is None or not {"instruction", "prompt", "messages", "prompt_turns"} & {*rows.column_names}:
        there = [name for name in rows.column_names if name not in ("file", "row", "unused", "renamed")]
        raise UsageError(
            f"--test_file {file} needs a question (instruction, prompt or messages) and an answer (answer, output, "
            f"completion or messages); it has {', '.join(there)}. --column_mapping THEIRS=OURS renames columns."
        )
    if "choices" in rows.column_names:
        for i, row in enumerate(map(as_lists, rows)):
            if not isinstance(row["choices"], list) or answers[i] not in row["choices"] or "" in row["choices"]:
                raise UsageError(
                    f"--test_file {file}, row {i}: answer must be one of choices, texts as a model would write them; "
                    f"got {answers[i]!r} and {row['choices']!r}."
                )
        return Answers("text", str.strip, [str(answer).strip() for answer in answers])
    gold = [str(answer).strip() for answer in answers]
    if "answer" not in rows.column_names:
        gold = _worded(gold) or gold
    for labels in LABELS:
        if set(gold) <= set(labels):
            return Answers("label", extract_label(labels), gold, labels)
    if all(re.fullmatch("[A-E]", answer) for answer in gold):
        return Answers("letter", extract_letter, gold, tuple("ABCDE"))
    try:
        numbers = [float(answer.replace(",", "")) for answer in gold]
        if not all(map(math.isfinite, numbers)):
            raise ValueError
        return Answers("number", extract_number, numbers)
    except ValueError:
        listed = "; ".join("/".join(labels) for labels in LABELS)
        seen = ", ".join(sorted(set(gold))[:4])
        raise UsageError(
            f"--test_file {file}: its answers are of no known task: {listed}; A to E; or numbers; got {seen}."
        ) from None


def _answers(rows: Dataset) -> list | None:
    """The answer of each row, in the column that holds it; None where there is none."""
    for column in ("answer", "output", "completion"):
        if column in rows.column_names:
            return rows[column]
    if {"messages", "completion_turns"} & {*rows.column_names}:
        return [conversation(row)[0][-1].get("content", "") for row in rows]
    return None


def _worded(gold: list[str]) -> list[str] | None:
    """The labels, or the last numbers, that worded answers end in ("the correct answer is true"); None: other texts."""
    for labels in LABELS:
        found = [re.findall("|".join(rf"\b{label}\b" for label in labels), text) for text in gold]
        if all(found):
            return [one[-1] for one in found]
    numbers = [re.findall(r"-?\d+\.?\d*", text.replace(",", "")) for text in gold]
    if all(re.search(r"\d\W*$", text) for text in gold):
        return [one[-1].removesuffix(".") for one in numbers]
    letters = [re.findall(r"\b[A-E]\b", text) for text in gold]
    if all(letters):
        return [one[-1] for one in letters]
    return [one[-1].removesuffix(".") for one in numbers] if all(numbers) else None


def task_name(file: str) -> str:
    """boolq of boolq.json, and of boolq/test.json."""
    path = Path(file)
    return path.parent.resolve().name if path.stem in ("test", "validation", "train") else path.stem


def question(row: dict) -> str:
    """The text of a row that asks."""
    if row.get("messages"):
        asked = [turn["content"] for turn in conversation(row)[0] if turn["role"] == "user"][-1]
        return asked if isinstance(asked, str) else "".join(part["text"] for part in asked)
    return row.get("instruction") or row.get("prompt") or ""


def choices(instruction: str, answers: Answers) -> list[str]:
    """The answers that an instruction lists: those of its answer format, or its (A) (B) …; else all of the task's."""
    if answers.kind == "letter":
        listed = re.findall(r"\(([A-E])\)", instruction)
    else:
        _, marker, form = instruction.rpartition("Answer format:")
        listed = [label for label in answers.labels if marker and re.search(rf"\b{label}\b", form)]
    return list(dict.fromkeys(listed)) or list(answers.labels)
