"""Files of rows, each read by itself: the columns that are known, text as it is written; then put together."""

import csv
import gzip
import json
import math
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Value

from ist.training.command_line import UsageError, brief, require
from ist.training.files import file_digest, json_digest
from ist.training.sources import Source, find_sources

# Columns that hold text, and columns that hold lists; of a dataset that is read, lists are texts in JSON.
TEXT = ("instruction", "input", "output", "answer", "system", "prompt", "completion", "text")
LISTS = ("messages", "tools", "history", "choices", "prompt_turns", "completion_turns")
KNOWN = (*TEXT, *LISTS)
# A row holds one of these; further known columns go with it.
FORMS = (
    *(("messages",), ("instruction", "output"), ("prompt", "completion"), ("prompt_turns", "completion_turns")),
    ("text",),
)
# Other names of known columns: Dolly's, ShareGPT's, OpenAI's older one of tools.
SYNONYMS = {
    **{"context": "input", "response": "output", "conversations": "messages", "system_prompt": "system"},
    "functions": "tools",
}
# Of a turn; what else one holds is said not to be used.
TURN_KEYS = {
    *("role", "content", "from", "value", "name", "tool_calls", "tool_call_id", "function_call", "refusal"),
    *("reasoning_content", "thinking", "reasoning", "weight", "train"),
}


_SPEAKERS = ("user", "assistant", "system")  # whose `name` hardly any template shows


class _Written(float):
    """A number of a JSON file that knows how it was written."""

    text: str

    def __new__(cls, text: str) -> "_Written":
        number = super().__new__(cls, text)
        number.text = text
        return number


# ------------------------------------------------------------------------------------------------------- file by file


def _raw_rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """The rows of a source, values as its library gives them.

    Raises:
        ValueError: it is not what its name says; the text says why.
    """
    if source.kind in ("disk", "hub"):
        yield from _dataset_rows(source)
    elif source.kind in ("Parquet", "Arrow"):
        yield from _arrow_rows(_arrow_table(source))
    elif source.kind == "text":
        yield from ({"text": line.rstrip("\r\n")} for line in _lines(source) if line.strip())
    elif source.kind in ("CSV", "TSV"):
        yield from _csv_rows(_lines(source), "," if source.kind == "CSV" else "\t")
    elif source.kind == "JSON":
        yield from _json_rows("".join(_lines(source)))
    else:
        yield from _jsonl_rows(_lines(source))


def _open(source: Source) -> BinaryIO:
    return gzip.open(source.name) if source.name.endswith(".gz") else open(source.name, "rb")


def _lines(source: Source) -> Iterator[str]:
    """The lines of a text, each with its end."""
    with _open(source) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"the byte 0x{line[error.start]:02x} in line {number}"
                raise ValueError(f"is not UTF-8: {byte}. Save it as UTF-8") from error


def _json_rows(text: str) -> Iterator[Any]:
    try:
        value = _parsed(text)
    except ValueError:
        first, _, others = text.lstrip().partition("\n")
        if not (first.startswith("{") and others.strip()):
            raise
        # JSONL under the other name, which is common. Not splitlines: JSON may hold other line ends in a string.
        yield from _jsonl_rows(text.split("\n"))
        return
    if isinstance(value, dict) and any(set(form) <= value.keys() for form in FORMS):  # a single line of it
        value = [value]
    if not isinstance(value, list):
        kind = f"an object with the keys {', '.join(value)[:200]}" if isinstance(value, dict) else str(value)
        raise ValueError(f"must hold a list of rows, or a row on each line; it holds {kind[:300]}")
    yield from value


def _jsonl_rows(lines: Iterable[str]) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _parsed(line)
            except ValueError as error:
                raise ValueError(f"is not valid JSONL: line {number}: {error}") from error


def _parsed(text: str) -> Any:
    """JSON with numbers as they are written; NaN and the infinities are nothing."""
    return json.loads(text, parse_float=_Written, parse_constant=lambda name: None)


def _csv_rows(lines: Iterator[str], delimiter: str) -> Iterator[dict]:
    """Of cells between commas; or between semicolons, as a European Excel writes them, which may say so in a line."""
    csv.field_size_limit(sys.maxsize)
    first = next(lines, "")
    if first.strip().lower().removesuffix(",") in ("sep=;", "sep=,", '"sep=;"'):
        delimiter, first = first.strip().strip('"')[4], next(lines, "")
    elif delimiter not in first and ";" in first:
        delimiter = ";"
    reader = csv.DictReader(chain([first], lines), delimiter=delimiter, strict=True)
    for number, row in enumerate(reader):
        if None in row:
            raise ValueError(f"has a row {number} of more cells than its first line")
        yield row


def _arrow_table(source: Source) -> pa.Table:
    buffer = None
    if source.name.endswith(".gz"):
        with _open(source) as stream:
            buffer = pa.py_buffer(stream.read())
    if source.kind == "Parquet":
        return pq.ParquetFile(buffer or source.name).read()
    with pa.memory_map(source.name) if buffer is None else pa.BufferReader(buffer) as stream:
        try:
            return pa.ipc.open_stream(stream).read_all()
        except pa.ArrowInvalid:
            stream.seek(0)
            return pa.ipc.open_file(stream).read_all()


def _arrow_rows(table: pa.Table) -> Iterator[dict]:
    whole = [name for name in table.column_names if _is_whole_with_holes(table.column(name))]
    for batch in table.to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            for name in whole:
                row[name] = None if row[name] is None or math.isnan(row[name]) else int(row[name])
            yield row


def _is_whole_with_holes(column: pa.ChunkedArray) -> bool:
    """Whether a column of floats is one of integers: pandas has no other place for integers with holes."""
    if not pa.types.is_floating(column.type):
        return False
    values = [value for chunk in column.chunks for value in chunk.to_pylist()]
    there = [value for value in values if value is not None and not math.isnan(value)]
    return len(there) < len(values) and all(value.is_integer() for value in there)


def _dataset_rows(source: Source) -> Iterator[dict]:
    if source.kind == "disk":
        rows = datasets.load_from_disk(source.name)
    else:
        rows = datasets.load_dataset(source.name, source.config, split=source.split)
    if isinstance(rows, datasets.DatasetDict):
        if source.split not in rows:
            raise ValueError(f"has no split {source.split}, only {', '.join(rows)}; --dataset_split names one")
        rows = rows[source.split]
    yield from _arrow_rows(rows.with_format("arrow")[:])


# ----------------------------------------------------------------------------------------------------- row after row


def _as_text(value: Any, column: str) -> str:
    """A value as text, as it is written; null, NaN and what is not there are empty."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, _Written):
        return value.text
    if isinstance(value, (list, dict, bytes)):
        kind = {dict: "an object", list: "a list"}.get(type(value), "bytes")
        raise UsageError(f"has {kind} in {column}, where text is wanted")
    text = str(value)
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UsageError(f"has half of a character (a lone surrogate) in {column}")
    return text


def _as_json(value: Any, column: str, unused: set[str]) -> str | None:
    """A list of a row as JSON; of a text that is JSON already, that. Keys of turns that are not known are added to
    `unused`."""
    if value is None or value == "":
        return None
    if isinstance(value, str) and column in ("messages", "tools", "history"):
        try:
            value = _parsed(value)
        except (ValueError, RecursionError):
            raise UsageError(f"has a text in {column} that is not JSON, where a list is wanted") from None
    if not isinstance(value, list):
        if column == "choices":
            return json.dumps(value)
        raise UsageError(f"must hold {column} as a list; got {json.dumps(value, default=str)[:40]}")
    if column in ("messages", "prompt", "completion"):
        turns = [turn for turn in value if isinstance(turn, Mapping)]
        unknown = {
            key
            for turn in turns
            for key, one in turn.items()
            if one not in (None, "") and (key not in TURN_KEYS or (key == "name" and turn.get("role") in _SPEAKERS))
        }
        unused |= {f"{column}[].{key}" for key in unknown}
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
        text.encode()
    except (ValueError, RecursionError) as error:
        raise UsageError(f"has {column} that cannot be read: {brief(error)}") from None
    return text


def _normal(row: Any, mapping: Mapping[str, str], unused: set[str]) -> dict[str, str | None]:
    """A row by the names of KNOWN; columns that are not among them are added to `unused`."""
    if not isinstance(row, Mapping):
        raise UsageError(f"is not an object with columns, but {json.dumps(row, default=str)[:40]}")
    named: dict[str, Any] = {}
    for column, value in row.items():
        name = mapping.get(column, column)
        theirs = column not in mapping and SYNONYMS.get(name) not in (None, *row)
        if theirs and (name not in ("context", "response") or "instruction" in row):
            name = SYNONYMS[name]
        if not name:  # mapped to nothing
            continue
        if name in KNOWN and name not in named:
            named[name] = value
        else:
            unused.add(column)
    values: dict[str, str | None] = {}
    for name, value in named.items():
        if name in ("prompt", "completion") and isinstance(value, list):
            values[f"{name}_turns"] = _as_json(value, name, unused)
        else:
            values[name] = _as_json(value, name, unused) if name in LISTS else _as_text(value, name)
    return values


def _require_form(columns: Iterable[str], values: Iterable[str]) -> None:
    there = list(columns)
    for one, other in (("prompt", "completion"), ("completion", "prompt")):
        if one in values and f"{other}_turns" in values:
            raise UsageError(f"has {one} as text and {other} as turns: give both as text, or both as turns")
    if not any(set(form) <= set(there) for form in FORMS):
        raise UsageError(
            "needs the columns instruction and output (input is optional), or messages, or prompt and completion, or "
            f"text; it has {', '.join(map(str, there)) or 'none'}. --column_mapping THEIRS=OURS renames columns"
        )


def _generate(key: str, sources: list[Source], mapping: dict[str, str], form: bool) -> Iterator[dict]:
    """The rows of all sources, with where each comes from: `file` and `row`, counted from 0 in the file."""
    for source in sources:
        count = 0
        try:
            for count, raw in enumerate(_raw_rows(source), 1):
                unused: set[str] = set()
                try:
                    values = _normal(raw, mapping, unused)
                    if form and not any(set(one) <= values.keys() for one in FORMS):
                        _require_form(raw, values)
                except UsageError as error:
                    raise UsageError(f"--{key} {source.name}: row {count - 1} {error}.") from error
                left = ", ".join(sorted(map(str, unused))) or None
                renamed = ", ".join(sorted(mapping.keys() & raw.keys())) or None
                place = {"file": source.name, "row": count - 1, "unused": left, "renamed": renamed}
                yield {**place, **dict.fromkeys(KNOWN), **values}
        except UsageError:
            raise
        except (OSError, EOFError, zlib.error) as error:
            told = error.strerror if isinstance(error, OSError) and error.strerror else brief(error)
            raise UsageError(f"--{key} {source.name} cannot be read: {told}.") from error
        except Exception as error:  # each format's library has errors of its own
            text = brief(error)
            said = (
                f"cannot be loaded ({text})"
                if source.kind in ("disk", "hub")
                else f"is not valid {source.kind} ({text})"
            )
            said = text if isinstance(error, ValueError) and text.startswith(("is ", "has ", "must ")) else said
            raise UsageError(f"--{key} {source.name} {said}.") from error
        if not count:
            raise UsageError(f"--{key} {source.name} holds no rows.")


_FEATURES = {
    "file": Value("string"),
    "row": Value("int64"),
    "unused": Value("string"),
    "renamed": Value("string"),
    **dict.fromkeys(KNOWN, Value("large_string")),
}


def read_rows(key: str, sources: list[Source], mapping: Mapping[str, str] | None = None, form: bool = True) -> Dataset:
    """The rows of all sources, one after the other, with the columns of KNOWN that any has, `file` and `row`.

    What was read is kept in datasets' cache, by content: a second run, and the other ranks, read it from there.

    Args:
        key: the argument that names the sources, for the messages.
        mapping: {column of a file: name of KNOWN}.
        form: every row must hold one of FORMS.

    Raises:
        UsageError: a file or a row cannot be used; it names both.
    """
    values = {"key": key, "sources": sources, "mapping": dict(mapping or {}), "form": form}
    fingerprint = json_digest([values, file_digest(Path(__file__))])[:32]
    cache = str(datasets.config.HF_DATASETS_CACHE)
    try:
        rows = Dataset.from_generator(
            _generate, features=Features(_FEATURES), cache_dir=cache, gen_kwargs=values, fingerprint=fingerprint
        )
    except Exception as error:
        while error.__cause__ is not None and not isinstance(error, UsageError):
            error = error.__cause__
        if isinstance(error, UsageError):
            raise error from None
        listed = ", ".join(source.name for source in sources)
        if isinstance(error, OSError) and (error.filename or error.errno):
            why = f"its cache {cache} cannot be written ({brief(error)}); HF_DATASETS_CACHE names another place"
            raise UsageError(f"--{key} {listed}: {why}.") from error
        raise UsageError(f"--{key} {listed} cannot be loaded ({brief(error)}).") from error
    empty = [name for name in KNOWN if rows.data.column(name).null_count == len(rows)]
    return rows.remove_columns(empty)


def unused_columns(rows: Dataset) -> list[str]:
    """A line for each file of `read_rows` that says which of its columns are not used."""
    found: dict[str, set[str]] = {}
    for pair in rows.data.table.select(["file", "unused"]).group_by(["file", "unused"]).aggregate([]).to_pylist():
        found.setdefault(pair["file"], set()).update((pair["unused"] or "").split(", "))
    return [
        f"{file}: columns that are not used: {', '.join(sorted(names - {''}))}"
        for file, names in found.items()
        if names - {""}
    ]


def column_mapping(pairs: Sequence[str] | None) -> dict[str, str]:
    """["question=instruction"] as {"question": "instruction"}; "tools=" leaves a column out.

    Raises:
        UsageError: a pair without =, or a name that is none of ours.
    """
    mapping = {}
    for pair in pairs or ():
        theirs, _, ours = pair.partition("=")
        fits = bool(theirs) and "=" in pair and ours in ("", *KNOWN)
        require(fits, "column_mapping", f"THEIRS=OURS, ours one of {', '.join(KNOWN)}, or nothing", pair)
        mapping[theirs] = ours
    return mapping


def load_rows(key: str, files: Sequence[str], form: bool = True) -> Dataset:
    """The rows of files, as `read_rows` gives them; `key` is the argument that names them.

    Raises:
        UsageError: a file or a row cannot be used; it names both.
    """
    return read_rows(key, find_sources(key, files), form=form)
