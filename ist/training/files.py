"""The files of a run: their names, and how each is written so that a crash leaves the old one or the new one."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

METRICS, IMPORTANCE, RUN, PICTURE = "metrics.jsonl", "importance.jsonl", "run.json", "importance.png"


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """A .jsonl file, a line for each value."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, one a line; none when it is not there.

    A last line that a crash cut short is left out; so is any other line that is no JSON object, with a message.
    """
    if not path.exists():
        return []
    lines = []
    content = path.read_text(encoding="utf-8", errors="replace")
    texts = content.split("\n")  # not splitlines: JSON may hold other line ends inside a string
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict):
            lines.append(line)
        elif number < len(texts):
            print(f"{path}: line {number} is not a JSON object and is left out.", file=sys.stderr)
    return lines


def keep_lines(path: Path, keep: Callable[[dict], bool]) -> None:
    """Leave only the lines of a .jsonl file that are to be kept; a file that is not there becomes an empty one."""
    write_lines(path, (line for line in read_lines(path) if keep(line)))


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """sha256 of a JSON-ready value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Rename a finished folder into place, its files on disk before its name; an older `final` makes room first.

    Its files get the mode that the umask gives (safetensors writes for the owner alone).
    """
    mode = os.umask(0)
    os.umask(mode)
    for file in temporary.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mode)
        _sync(file)
    _sync(temporary)
    if final.exists():
        discard(final, temporary.parent)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(temporary, final)
    _sync(final.parent)


def discard(folder: Path, output_dir: Path) -> None:
    """Remove a folder so that it is gone under its own name at once, not file by file."""
    trash = output_dir / f".discarded-{folder.name}"
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def sweep(output_dir: Path) -> None:
    """Remove temporary folders of a process that died while saving or discarding."""
    for pattern in (".saving-*", ".discarded-*"):
        for folder in output_dir.glob(pattern):
            shutil.rmtree(folder)
