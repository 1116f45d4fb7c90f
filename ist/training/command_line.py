"""The one way all commands read their arguments: YAML first, flags override.

Bad input is a `UsageError`: one line that names the key, the value and the remedy, printed
once, exit code 2.
"""

import argparse
import difflib
import errno
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from ist.config import ConfigError
from ist.distributed import is_first_to_say
from ist.training.files import WriteError

if sys.flags.optimize > 1:  # before the models of transformers are imported, which fails in many lines
    print(
        "error: PYTHONOPTIMIZE=2 removes docstrings that transformers reads: set it to 1, or unset it.", file=sys.stderr
    )
    sys.exit(2)


class UsageError(Exception):
    """Bad arguments, bad data, a wrong folder. Its text is the one line that a user sees."""


def as_usage_error(error: ConfigError) -> UsageError:
    """The same with the command line's dashes: `key=value` is --key value there."""
    return UsageError(re.sub(r"`(\w+)(?:=([^`]*))?`", lambda m: f"--{m[1]}" + (f" {m[2]}" if m[2] else ""), str(error)))


def command(main: Callable[..., int]) -> Callable[..., int]:
    """A command's main, whose ConfigErrors become UsageErrors."""

    @functools.wraps(main)
    def call(*args, **options) -> int:
        try:
            return main(*args, **options)
        except ConfigError as error:
            raise as_usage_error(error) from error

    return call


def require(ok: bool, key: str, allowed: str, value: Any) -> None:
    """Raise a UsageError naming `key`, what is `allowed` and the `value` that was given, unless `ok`."""
    if not ok:
        raise UsageError(f"--{key} must be {allowed}; got {value}.")


def quiet_known_warnings() -> None:
    """Call before PEFT is imported: bitsandbytes warns of an absent CPU kernel then, and PEFT of a renamed property.

    torch warns of a pickled file's protocol before it refuses the file.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|gradient_checkpointing_enable).*deprecated")
    warnings.filterwarnings("ignore", message="Detected pickle protocol")


@contextmanager
def quiet(logger: str, level: int) -> Iterator[None]:
    """A library's logger says nothing below `level`: what matters of it is said in one line of ours."""
    log = logging.getLogger(logger)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


def brief(error: BaseException) -> str:
    """An error's text on one line, cut to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class _OneLine:
    """Of a parser: an error is a UsageError, without the usage above it."""

    def error(self, message: str) -> None:
        message = re.sub(r"argument (--\w+)\S*: invalid (\w+) value: (.*)", r"\1 must be of type \2; got \3", message)
        message = re.sub(r"argument (--\w+)\S*:", r"\1:", message)
        raise UsageError(message.rstrip(".") + ". See --help.")


class _Parser(_OneLine, HfArgumentParser):
    pass


class PlainParser(_OneLine, argparse.ArgumentParser):
    """argparse's parser, for commands with subcommands or without keys for all that they take."""


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with a key twice: YAML's loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} is given twice: leave one out")
        return super().construct_mapping(node, deep)


def _yaml_as_flags(path: str) -> list[str]:
    """The keys of a flat YAML file as command line flags, so that both go through the same type checks."""
    try:
        if Path(path).is_fifo() and not path.startswith("/dev/"):  # <(...) of a shell has a writer
            raise UsageError(f"--config {path} is not a file: a pipe would wait for a writer.")
        with open(path) as file:
            values = yaml.load(file, _UniqueKeys) or {}
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"--config {path}: not YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold `key: value` lines; got a {type(values).__name__}.")
    flags = []
    for key, value in values.items():
        if key == "config":
            raise UsageError(f"--config {path}: a recipe cannot name another one; leave config out.")
        for element in value if isinstance(value, list) else []:
            if isinstance(element, (dict, list)) or str(element).startswith("-"):
                raise UsageError(f"--config {path}: {key} must list plain values, without flags; got {element}.")
        if isinstance(value, dict):
            raise UsageError(f"--config {path}: {key} must be a single value or a list; got a mapping.")
        if isinstance(value, list):
            flags += [f"--{key}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def parse_arguments(
    groups: Sequence[type], argv: Sequence[str], description: str, alone: Mapping[str, Sequence[str]] | None = None
) -> tuple:
    """Read `argv` (and the YAML file named by its --config) into one instance of each dataclass in `groups`.

    `alone` has keys, and those that must not be given along with each.

    Raises:
        UsageError: unknown key, bad value, unreadable YAML. The dataclasses' own checks raise it too.
    """
    known = [f.name for group in groups for f in fields(group)]
    parser = _Parser(list(groups), description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE.yaml", help="A recipe: `key: value` lines; flags override them.")
    argv = list(argv)
    recipe, flags = None, []
    while argv:
        flag = argv.pop(0)
        if flag == "--config" and argv:
            recipe = argv.pop(0)
        elif flag.startswith("--config="):
            recipe = flag.removeprefix("--config=")
        else:
            flags.append(flag)
    flags = (_yaml_as_flags(recipe) if recipe else []) + flags
    given = []
    for flag in flags:
        if flag.startswith("--"):
            key = flag[2:].split("=")[0].replace("-", "_")
            given.append(key)
            if key not in [*known, "help", "config"]:
                close = difflib.get_close_matches(key, known, n=1)
                raise UsageError(
                    f"unknown key {flag.split('=')[0]}." + (f" Did you mean --{close[0]}?" if close else " See --help.")
                )
    for i, flag in enumerate(flags):
        if flag == "" or (flag.startswith("--") and flag.endswith("=")):
            key = next((f for f in reversed(flags[: i + 1]) if f.startswith("--")), "--").split("=")[0]
            raise UsageError(f"{key} must not be empty; leave it out for its default.")
    for whole, excluded in (alone or {}).items():
        if whole in given and (others := [f"--{key}" for key in given if key in excluded]):
            raise UsageError(f"--{whole} says it all: leave out {', '.join(others)}.")
    *parsed, _, rest = parser.parse_args_into_dataclasses(
        flags, return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        raise UsageError(f"unexpected argument {rest[0]}. Arguments are `--key value`; see --help.")
    return (*parsed, recipe)


class _LossyStream:
    """stdout or stderr whose reader may go away (`| head -1`, an ssh that drops, a full disk): that costs no run.

    From the first text that cannot be written on, everything goes to the null device.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _tolerant(self, call: Callable, *args: Any) -> Any:
        try:
            return call(*args)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            return None

    def write(self, text: str) -> int:
        self._tolerant(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._tolerant(self._stream.flush)


def _protect_streams() -> None:
    for name in ("stdout", "stderr"):
        # Python has None for a stream that was closed.
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)
        if hasattr(stream, "reconfigure"):  # a name that the terminal's encoding does not have costs no run
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _LossyStream(stream))


# What the system refuses, whatever is written or read: nobody's bug.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command and exit with its code: a UsageError becomes one line and code 2, a WriteError one and code 1."""
    _protect_streams()
    try:
        code = main(sys.argv[1:])
    except (UsageError, WriteError) as error:
        print_error(error)
        code = 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print_error(OSError(f"{where}{error.strerror}. Free space, or choose another place, and run it again."))
        code = 1
    sys.exit(code)


def print_error(error: Exception) -> None:
    """One line, once: ranks that have the same error leave it to the first of them."""
    if is_first_to_say(str(error)):
        rank = os.environ.get("RANK", "0")
        told = " ".join(str(error).splitlines())  # a name may hold a line end
        print(f"{'' if rank == '0' else f'[rank {rank}] '}error: {told}", file=sys.stderr, flush=True)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
