"""Results as JSON that says where they come from, and their tables in a README."""

import errno
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState

from ist.training.command_line import UsageError
from ist.training.environment import environment
from ist.training.files import read_text, write_text, writing


def listed(values: Iterable) -> str:
    """Each value once; of values that are such lists themselves, each of theirs."""
    return ", ".join(sorted({one for value in values for one in str(value).split(", ")}))


def joined(heads: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """{date, commit, versions, hardware} of results that were made apart, each listing what differs."""
    facts: dict[str, Any] = {key: listed(head[key] or "none" for head in heads) for key in ("date", "commit")}
    for name in ("versions", "hardware"):
        facts[name] = {key: listed(head[name][key] for head in heads) for key in heads[0][name]}
    return facts


def require_place(readme: str | Path, name: str) -> None:
    """Raises UsageError unless the file has a place for the table `name`, before anything is run."""
    if not Path(readme).is_file():
        raise UsageError(f"--readme {readme}: no such file.")
    places = re.findall(f"<!-- {re.escape(name)} -->\n|\n<!-- /{re.escape(name)} -->\n", read_text(Path(readme)))
    if [place.strip() for place in places] != [f"<!-- {name} -->", f"<!-- /{name} -->"]:
        raise UsageError(f"--readme {readme} has no place <!-- {name} --> to <!-- /{name} --> for the tables.")


def require_publishing(publish: str | None, readme: str | None) -> None:
    """Raises UsageError where `publish` below would have no place for the table, before anything is run."""
    if readme and not publish:
        raise UsageError("--readme needs --publish, whose name is that of the markers.")
    if readme:
        require_place(readme, Path(publish).stem)


def require_writable_file(file: Path) -> None:
    """Raises UsageError unless the file can be written, before anything is run."""
    try:
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise UsageError(f"--output {file} cannot be written: {error.strerror}. Name another file.") from error


def table_in(text: str, name: str) -> str:
    """The table between <!-- NAME --> and <!-- /NAME --> of a Markdown text."""
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def insert_table(readme: Path, name: str, table: str) -> None:
    """Write a table into a Markdown file, between <!-- NAME --> and <!-- /NAME -->."""
    before, rest = readme.read_text().split(f"<!-- {name} -->\n")
    after = rest.split(f"<!-- /{name} -->\n")[1]
    write_text(readme, f"{before}<!-- {name} -->\n{table}\n<!-- /{name} -->\n{after}")


def _as_text(result: dict[str, Any]) -> str:
    """JSON with a line for each key, and for each record of a list of records."""

    def value(one: Any) -> str:
        if isinstance(one, list) and one and all(isinstance(record, dict) for record in one):
            return "[\n  " + ",\n  ".join(json.dumps(record, allow_nan=False) for record in one) + "\n ]"
        return json.dumps(one, allow_nan=False)

    return "{\n " + ",\n ".join(f"{json.dumps(key)}: {value(one)}" for key, one in result.items()) + "\n}\n"


def publish(
    file: Path,
    command: str,
    accelerator: Accelerator | PartialState,
    table: str,
    readme: Path | None = None,
    **result: Any,
) -> dict[str, Any]:
    """Write a result as JSON, with command, date, versions, commit and hardware, and its table into a README.

    There the table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being that of the file, whose content is
    returned.
    """
    facts = environment(accelerator)
    head = {"command": command, "date": datetime.now(UTC).date().isoformat()}
    head |= {key: facts[key] for key in ("versions", "commit", "hardware")}
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    whole = head | result
    write_text(file, _as_text(whole))
    if readme:
        insert_table(readme, file.stem, table)
    return whole
