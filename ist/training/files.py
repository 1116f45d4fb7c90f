"""The files of a run: their names, and how each is written so that a crash leaves the old one or the new one."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ist.config import ConfigError

METRICS, IMPORTANCE, RUN, PICTURE = "metrics.jsonl", "importance.jsonl", "run.json", "importance.png"
LOSS_PICTURE = "loss.png"
RESERVE = ".reserve"  # there while a run goes on


class ReadError(ConfigError):
    """A file that a run has left cannot be read."""


def read_text(path: Path) -> str:
    """
    Raises:
        ReadError: it is no file (a pipe would wait for a writer), or cannot be read.
        FileNotFoundError: it is not there.
    """
    try:
        if path.exists() and not path.is_file():
            raise ReadError(f"{path} cannot be read: it is not a file. Remove it.")
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}. Repair or remove it.") from error


def require_no_pipes(name: str, folder: Path) -> None:
    """`name` is the argument and its value. A library that reads a pipe in the place of a file waits for a writer.

    Raises:
        ReadError: the folder of a model, a tokenizer or an adapter holds what is no file.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ReadError(f"{name}: {path.name} is not a file. Remove it.")


def read_object(path: Path, key: str = "") -> dict[str, Any]:
    """The object of a JSON file; `key` is the argument that it comes from, for the message.

    Raises:
        ReadError: it is not there, no file, cannot be read, or holds no JSON object.
    """
    name = f"{key} {path}".strip()
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError as error:
        raise ReadError(f"{name} cannot be read: no such file. Name another one, or make it anew.") from error
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{name} is not JSON ({' '.join(str(error).split())}). Repair or remove it.") from error
    if not isinstance(value, dict):
        raise ReadError(f"{name} must hold a JSON object; got a {type(value).__name__}. Repair or remove it.")
    return value


@contextmanager
def reading(name: Any, what: str) -> Iterator[None]:
    """Around what takes values out of a file or a folder: `name`, which ought to be `what`.

    Raises:
        ReadError: a value is not there, or of another kind.
    """
    try:
        yield
    except ConfigError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        told = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise ReadError(f"{name} is not {what}: {told}. Repair or remove it, or name another one.") from error


class WriteError(Exception):
    """A file cannot be written: no space, a quota, a folder that is gone or read-only, a disk that fails."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`.

    Raises:
        WriteError: the system refused; safetensors and tokenizers say so by exceptions of their own.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        told = re.search(r"([^:]+) \(os error [0-9]+\)", str(error))
        told = told or re.search(r'Os \{ code: [0-9]+,.* message: "([^"]+)', str(error))  # safetensors 0.4
        if isinstance(error, OSError) or told:
            reason = getattr(error, "strerror", None) or (told[1].strip() if told else " ".join(str(error).split()))
            raise WriteError(f"{path} cannot be written: {reason}") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write; then it takes the name `path`. A reader finds the old file or the new one, whole.

    Raises:
        WriteError: it cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: Any) -> None:
    """A line more in a .jsonl file, whole or not at all."""
    with writing(path), open(path, "ab") as file:
        end = file.tell()
        try:
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
        except OSError:
            file.truncate(end)
            raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    """A .jsonl file, a line for each value."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file, one a line; none when it is not there.

    A last line that a crash cut short is left out; so is any other line that is no JSON object, with a message.

    Raises:
        ReadError: it is no file, or cannot be read.
    """
    try:
        content = read_text(path)
    except FileNotFoundError:
        return []
    lines = []
    texts = content.split("\n")  # not splitlines: JSON may hold other line ends inside a string
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
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


MODEL_FILES = (  # what a model and its tokenizer are loaded from, and what decides how it generates
    *("*.safetensors", "*.bin", "*.index.json", "config.json", "generation_config.json", "*.py", "*.jinja"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
)


def model_digest(path_or_name: str) -> str:
    """sha256 of the files of a model's folder, by content; of a model on the Hub, of its name and commit.

    Every byte of the weights is read, each time: a size and a date do not tell whether they were replaced in place.

    Raises:
        ReadError: a file cannot be read, or the folder has none of a model, or the Hub and its cache do not have it.
    """
    folder = Path(path_or_name)
    if not folder.exists():
        from transformers.utils.hub import cached_file, extract_commit_hash

        try:  # the cache names what it holds by commit, and the Hub's files by their content
            commit = extract_commit_hash(cached_file(path_or_name, "config.json"), None)
        except (OSError, ValueError) as error:
            told = " ".join(str(error).split())[:300]
            raise ReadError(f"{path_or_name} is no folder, and no model of the Hub or its cache: {told}") from error
        return json_digest(["hub", path_or_name, commit])
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern) if not file.is_dir()})
    if not files:
        raise ReadError(f"{folder} holds no files of a model. Name the folder of a model, or a model on the Hub.")
    try:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing leaves Python to other threads
            return json_digest([[file.name, digest] for file, digest in zip(files, pool.map(file_digest, files))])
    except OSError as error:
        raise ReadError(f"{error.filename} cannot be read: {error.strerror}. Repair or remove it.") from error


def json_digest(value: Any) -> str:
    """sha256 of a JSON-ready value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publishing(temporary: Path, final: Path) -> Iterator[None]:
    """Around what fills the folder `temporary`; then it takes the name `final`, where an older one makes room.

    Its files are on disk before its name, and get the mode that the umask gives (safetensors writes for the owner
    alone).

    Raises:
        WriteError: it cannot be written; nothing is left of it.
    """
    with writing(final):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()  # not its parents: a run folder that is gone is a fault
            yield
            _publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _publish(temporary: Path, final: Path) -> None:
    mode = os.umask(0)
    os.umask(mode)
    for file in temporary.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mode)
        _sync(file)
    _sync(temporary)
    if final.exists() or final.is_symlink():
        discard(final, temporary.parent)
    final.parent.mkdir(parents=True, exist_ok=True)
    os.rename(temporary, final)
    _sync(final.parent)


def discard(folder: Path, output_dir: Path) -> None:
    """Remove a folder so that it is gone under its own name at once, not file by file."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink()
        return
    trash = output_dir / f".discarded-{folder.name}"
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(folder, trash)
    shutil.rmtree(trash)


def sweep(output_dir: Path) -> None:
    """Remove what is left over of a process that died while saving or discarding."""
    for pattern in (".saving-*", ".discarded-*"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
