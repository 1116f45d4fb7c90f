"""What to read rows from: files, folders, patterns, datasets that were saved to disk, and those on the Hub."""

import glob
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from ist.training.command_line import UsageError, brief, quiet
from ist.training.files import file_digest, json_digest, read_object

KINDS = {
    **{".json": "JSON", ".jsonl": "JSONL", ".ndjson": "JSONL", ".csv": "CSV", ".tsv": "TSV", ".txt": "text"},
    **{".parquet": "Parquet", ".arrow": "Arrow"},
}


class Source(NamedTuple):
    """What to read: a file, a dataset that was saved to disk, or one on the Hub."""

    name: str
    kind: str  # of KINDS, "disk" or "hub"
    digest: str  # of its content
    config: str | None = None
    split: str = "train"


def find_sources(key: str, paths: Sequence[str], split: str = "train", preferred: str | None = None) -> list[Source]:
    """The files that names, folders and patterns stand for, in their order; `key` is the argument, for the messages.

    A name that is a file is never taken as a pattern. Of a folder, all files of a known kind and of the split are read,
    but for one that `save_to_disk` has written, whose split is.

    Args:
        preferred: the split to take where there is one of this name.

    Raises:
        UsageError: there is no such file, or it is of no known kind, or empty.
    """
    sources = []
    for path in paths:
        try:
            sources += _sources_of(key, path, split, preferred)
        except OSError as error:  # a name too long, a folder that may not be read
            raise UsageError(f"--{key} {path} cannot be read: {error.strerror}.") from error
    return sources


def _sources_of(key: str, path: str, split: str, preferred: str | None) -> list[Source]:
    if Path(path).is_dir():
        if any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            digests = [file_digest(file) for file in sorted(Path(path).rglob("*.arrow"))]
            several = Path(path) / "dataset_dict.json"
            there = read_object(several).get("splits", []) if several.is_file() else []
            return [Source(path, "disk", json_digest(digests), split=preferred if preferred in there else split)]
        found = _files_of_folder(key, path, split, preferred)
    elif Path(path).exists() or not glob.has_magic(path):
        found = [path]
    elif not (found := sorted(glob.glob(path, recursive=True))):
        raise UsageError(f"--{key} {path}: no such file.")
    return [_source(key, file) for file in found]


def _files_of_folder(key: str, path: str, split: str, preferred: str | None) -> list[str]:
    """The files of a folder that are of a split, as datasets tells splits by names; not hidden ones, nor a page about
    the dataset. Where no name tells a split, all of them."""
    try:
        splits = DataFilesDict.from_patterns(get_data_patterns(path), base_path=path)
    except (FileNotFoundError, EmptyDatasetError):
        splits = {}
    named = {str(name): [file for file in files if _kind(Path(file))] for name, files in splits.items()}
    named = {name: sorted(files) for name, files in named.items() if files}
    if not named:
        raise UsageError(f"--{key} {path} holds no files of rows ({', '.join(KINDS)}, each also .gz).")
    if preferred in named:
        return named[preferred]
    if split not in named and len(named) > 1:
        raise UsageError(f"--{key} {path} has no split {split}, only {', '.join(named)}; --dataset_split names one.")
    return named.get(split) or next(iter(named.values()))


def hub_source(key: str, name: str, config: str | None, split: str) -> Source:
    """A dataset on the Hub, or a folder that `datasets.load_dataset` reads.

    Raises:
        UsageError: it cannot be loaded, or has no such configuration or split.
    """
    if Path(name).is_dir() and config is None:
        found = find_sources(key, [name], split)
        if found[0].kind == "disk":
            return found[0]
    try:
        with quiet("datasets", logging.CRITICAL):  # the error below says in one line what it logs
            rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # datasets wraps whatever the readers raise; the innermost says what is wrong
        while error.__cause__ is not None:
            error = error.__cause__
        hint = (
            "; --dataset_config and --dataset_split name its parts"
            if "onfig" in str(error) or "split" in str(error)
            else ""
        )
        raise UsageError(f"--{key} {name} cannot be loaded ({brief(error)}){hint}.") from error
    return Source(name, "hub", rows._fingerprint, config, split)


def _kind(file: Path) -> str | None:
    return KINDS.get(Path(file.stem if file.suffix == ".gz" else file.name).suffix.lower())


def _source(key: str, name: str) -> Source:
    file = Path(name)
    if (kind := _kind(file)) is None:
        known = ", ".join(KINDS)
        raise UsageError(f"--{key} must end in {known}, or in one of these and .gz; got {name}.")
    if not file.is_file():
        raise UsageError(f"--{key} {name}: no such file.")
    if not file.stat().st_size:
        raise UsageError(f"--{key} {name} is empty.")
    try:
        return Source(name, kind, file_digest(file))
    except OSError as error:
        raise UsageError(f"--{key} {name} cannot be read: {error.strerror}.") from error
