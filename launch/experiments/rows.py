"""The rows of an experiment: read, answers turned into words if wanted, cut into train, tuning and test parts."""

import hashlib
import json
import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from ist.evaluate.answers import task_name
from ist.training.command_line import UsageError, brief
from ist.training.encoding import as_lists
from ist.training.files import write_text
from ist.training.reading import KNOWN, load_rows

PIECE = 1200  # characters of a row made of plain text: more than max_length, so that none ends in the middle of a text
LISTED = re.compile(r"\s*\b(?:Answer|Solution|Ending|Option)\d: *")  # LLM-Adapters' choices in an instruction


def in_words(row: dict, where: str) -> dict:
    """A commonsense row of LLM-Adapters with its answer in words: {instruction, output, choices, answer}.

    A small model that is trained on "the correct answer is answer2" learns that format in the first hundreds of steps
    and nothing else. Here it is asked for the text of the answer, out of the texts of all.

    Raises:
        UsageError: not such a row.
    """
    asked, _, form = row["instruction"].rpartition("Answer format:")
    labels = form.strip().split("/")
    question, *texts = LISTED.split(asked.strip())
    outputs = [f" {text}" for text in texts or labels]  # true/false are words already
    if len(outputs) != len(labels) or row.get("answer") not in labels:
        raise UsageError(f"--{where}: answer_texts needs rows that list their answers; got {row['instruction']!r}.")
    answer = outputs[labels.index(row["answer"])]
    prompt = f"Question: {question.partition('question: ')[2] or question}\nAnswer:"
    return {"instruction": prompt, "input": "", "output": answer, "choices": outputs, "answer": answer}


def rows_of(key: str, files: Sequence[str], answer_texts: bool = False) -> list[dict]:
    """Rows of JSON or Parquet files; or plain text cut at white space into rows of an output.

    Raises:
        UsageError: as load_rows and in_words.
    """
    if not any(file.endswith(".txt") for file in files):
        rows = load_rows(key, files)
        if "instruction" not in rows.column_names:
            raise UsageError(f"--{key} needs the columns instruction and output; got {', '.join(rows.column_names)}.")
        known = [{name: value for name, value in as_lists(row).items() if name in KNOWN} for row in rows]
        return [in_words(row, f"{key} row {i}") if answer_texts else row for i, row in enumerate(known)]
    if answer_texts or not all(file.endswith(".txt") for file in files):
        rows_wanted = "needs rows, for answer_texts" if answer_texts else "must not mix plain text with rows"
        raise UsageError(f"--{key} {rows_wanted}; got {', '.join(files)}.")
    rows = []
    for file in files:
        try:
            words = Path(file).read_text(encoding="utf-8").split(" ")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--{key} {file} cannot be read: {brief(error)}.") from error
        piece = ""
        for word in words:
            piece += word + " "
            if len(piece) >= PIECE:
                rows.append({"instruction": "", "output": piece})
                piece = ""
    return rows


def _question(row: dict) -> str:
    """The question of a row without its spaces, points and capitals; of plain text, all of it."""
    asked = f"{row['instruction']} {row.get('input') or ''}" if row["instruction"] else row["output"]
    return re.sub(r"\W+", " ", asked.casefold()).strip()


def write_parts(
    train_file: Sequence[str],
    test_file: Sequence[str] | None,
    split: dict[str, int],
    folder: Path,
    answer_texts: bool = False,
) -> dict[str, Path]:
    """Cut the rows into train, tuning and test; {name: file}. Of several test files each gives the same number of rows,
    and each is a part "test/<task>" too. No question stands in two parts, or twice in one.

    Raises:
        UsageError: there are not enough.
    """

    def shuffled(key: str, files: Sequence[str]) -> list[dict]:
        """Each question once, sorted by a hash of the row, so that every machine has the same."""
        rows = rows_of(key, files, answer_texts)
        rows.sort(key=lambda row: hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest())
        return list({_question(row): row for row in reversed(rows)}.values())[::-1]

    rows = shuffled("train_file", train_file)
    parts: dict[str, list[dict]] = {}
    wanted = dict(split)
    if test_file:
        share = split["test"] // len(test_file)
        tasks = {f"test/{task_name(file)}": shuffled("test_file", [file])[:share] for file in test_file}
        parts["test"] = list(chain.from_iterable(tasks.values()))
        parts |= tasks if len(test_file) > 1 else {}
        wanted |= {"test": share * len(test_file)} | dict.fromkeys(tasks, share)
        seen = set(map(_question, parts["test"]))
        rows = [row for row in rows if _question(row) not in seen]
    else:
        parts["test"], rows = rows[: split["test"]], rows[split["test"] :]
    parts["tuning"], parts["train"] = rows[: split["tuning"]], rows[split["tuning"] :]
    for name, part in parts.items():
        if len(part) < wanted.get(name, 1):
            raise UsageError(f"the files leave too few rows for the part {name}: {len(part)} of {wanted.get(name, 1)}.")
    files = {name: folder / f"{name}.json" for name in parts}
    for name, part in parts.items():
        files[name].parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(part)
        if files[name].exists() and files[name].read_text() != text:
            raise UsageError(f"{files[name]} holds other rows: choose another --output_dir.")
        write_text(files[name], text)
    return files
