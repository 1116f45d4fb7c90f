"""The one way all commands read their arguments: YAML first, flags override.

Bad input is a `UsageError`: one line that names the key, the value and the remedy, printed
once, exit code 2. Nothing here imports torch or transformers: --help and a refused command line take no seconds.
"""

import argparse
import difflib
import errno
import functools
import json
import logging
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ist.config import ConfigError
from ist.training.files import WriteError
from ist.training.keys import Form, form_of, help_text, is_required

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


class PlainParser(argparse.ArgumentParser):
    """argparse's parser, for commands with subcommands or without keys for all that they take."""

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:
        return super().parse_args([expand_home(text) for text in args], namespace)

    def error(self, message: str) -> NoReturn:
        """An error is a UsageError, without the usage above it."""
        message = re.sub(r"argument (--\w+)\S*: invalid (\w+) value: (.*)", r"\1 must be of type \2; got \3", message)
        message = re.sub(r"argument (--\w+)\S*:", r"\1:", message)
        raise UsageError(message.rstrip(".") + ". See --help.")


def expand_home(text: str) -> str:
    """`~` at the start of a value: the shell leaves it in --key=~/x and in NAME=~/x, Python in a recipe."""
    start, home, rest = re.fullmatch(r"((?:[^=~]*=)*)(~[^/]*)?(.*)", text, re.DOTALL).groups()
    return start + os.path.expanduser(home) + rest if home else text


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a mapping with a key twice: YAML's loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key} is given twice: leave one out")
        return super().construct_mapping(node, deep)


def _recipe(path: str) -> dict[str, Any]:
    """The keys of a flat YAML file; what has no value is left out."""
    path = expand_home(path)
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
    if "config" in values:
        raise UsageError(f"--config {path}: a recipe cannot name another one; leave config out.")
    return {str(key): value for key, value in values.items() if value is not None}


def _recipe_texts(path: str, key: str, value: Any) -> list[str]:
    """A value of a recipe as the command line has it."""
    for element in value if isinstance(value, list) else []:
        if isinstance(element, (dict, list)) or str(element).startswith("-"):
            raise UsageError(f"--config {path}: {key} must list plain values, without flags; got {element}.")
    if isinstance(value, dict):
        raise UsageError(f"--config {path}: {key} must be a single value or a list; got a mapping.")
    if isinstance(value, list):
        return [str(element) for element in value]
    return [str(value).lower() if isinstance(value, bool) else str(value)]


def _known_key(name: str, known: Collection[str], synonyms: Mapping[str, str]) -> str:
    """The key that a command line or a recipe names.

    Raises:
        UsageError: it is none; with what other programs call so, or the key that is spelt nearly so.
    """
    key = name.replace("-", "_")
    if key in known:
        return key
    said = f"unknown key --{name}"
    if answer := synonyms.get(key.lower()):
        raise UsageError(f"{said}: it is --{answer} here." if answer in known else f"{said}: {answer}.")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    raise UsageError(f"{said}. Did you mean --{close[0]}?" if close else f"{said}. See --help.")


_NUMBER = re.compile(r"-(\.?\d.*|inf|nan)", re.IGNORECASE)


def _given(argv: Sequence[str], known: Collection[str], synonyms: Mapping[str, str]) -> dict[str, list[str]]:
    """{key: its values}; the last time that a key is given counts."""
    given: dict[str, list[str]] = {}
    values: list[str] | None = None  # of the key before, which may have more; None after --key=value
    for text in argv:
        if text.startswith("--"):
            name, equals, value = text[2:].partition("=")
            key = _known_key(name, known, synonyms)
            given[key] = [value] if equals else []
            values = None if equals else given[key]
        elif values is None or (text.startswith("-") and not _NUMBER.fullmatch(text)):
            recipe = f"a recipe is --config {text}" if text.endswith((".yaml", ".yml")) else "see --help"
            raise UsageError(f"unexpected argument {text}. Arguments are `--key value`; {recipe}.")
        else:
            values.append(text)
    return given


def _listed(text: str) -> list[str]:
    """The elements of a list as Python, JSON and W&B's sweeps write it; other text is the one element."""
    if text.startswith("[") and text.endswith("]"):
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError:
            return [text]
        if isinstance(values, list) and not any(isinstance(value, (dict, list)) for value in values):
            return [str(value) for value in values]
    return [text]


_TRUTH = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}


def _element(name: str, form: Form, text: str) -> Any:
    """
    Raises:
        UsageError: it is not of the key's kind, or none of its choices.
    """
    if form.choices:
        text = "no" if text == "false" and "no" in form.choices else text  # YAML reads no as false
        require(text in form.choices, name, "one of " + ", ".join(form.choices), text)
    if form.kind is bool:
        require(text.lower() in _TRUTH, name, "true or false", text)
        return _TRUTH[text.lower()]
    if form.kind is str:
        return expand_home(text)
    if form.kind is int:
        text = re.sub(r"(?<=\d)\.0*$", "", text)  # 256.0: a whole number of a sweep
    try:
        return form.kind(text)
    except ValueError as error:
        allowed = "an integer" if form.kind is int else "a number"
        raise UsageError(f"--{name} must be {allowed}; got {text}.") from error


def _value(key: Field, texts: list[str]) -> Any:
    """The texts that a key is given as its value.

    Raises:
        UsageError: they are not of its form.
    """
    name, form = key.name, form_of(key)
    if form.many and len(texts) == 1:
        texts = _listed(texts[0])
    if "" in texts:
        raise UsageError(f"--{name} must not be empty; leave it out for its default.")
    if form.optional and texts in (["None"], ["null"]):
        return None
    if not texts and form.kind is bool:
        return True
    if not texts:
        raise UsageError(f"--{name} needs a value. See --help.")
    if len(texts) > 1 and not form.many:
        raise UsageError(f"unexpected argument {texts[1]}: --{name} takes one value. See --help.")
    values = [_element(name, form, text) for text in texts]
    return values if form.many else values[0]


def _without_recipe(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """(the other arguments, the FILE of --config FILE)."""
    others, recipe, left = [], None, list(argv)
    while left:
        flag = left.pop(0)
        if flag == "--config":
            if not left or left[0].startswith("--"):
                raise UsageError("--config needs a value: a YAML file. See --help.")
            recipe = left.pop(0)
        elif flag.startswith("--config="):
            recipe = flag.removeprefix("--config=")
        else:
            others.append(flag)
    if recipe == "":
        raise UsageError("--config must not be empty; leave it out for its default.")
    return others, recipe


def _print_help(groups: Sequence[type], argv: Sequence[str], description: str) -> NoReturn:
    """--help, or --help GROUP; what stands before does not count."""
    at = next(i for i, flag in enumerate(argv) if flag in ("-h", "--help"))
    topics = [*takewhile(lambda text: not text.startswith("--"), argv[at + 1 :])]
    text = help_text(groups, description, topics)
    if text is None:
        raise UsageError(f"--help must be followed by nothing, a group or a key; got {' '.join(topics)}. See --help.")
    print(text)
    sys.exit(0)


def parse_arguments(
    groups: Sequence[type],
    argv: Sequence[str],
    description: str,
    alone: Mapping[str, Sequence[str]] | None = None,
    synonyms: Mapping[str, str] | None = None,
) -> tuple:
    """Read `argv` (and the YAML file named by its --config) into one instance of each dataclass in `groups`.

    `alone` has keys, and those that must not be given along with each; `synonyms` has names that other programs use,
    with the key's name here, or what is to be done.

    Raises:
        UsageError: unknown key, bad value, unreadable YAML. The dataclasses' own checks raise it too.
    """
    if {"-h", "--help"} & {*argv}:
        _print_help(groups, argv, description)
    known = {key.name: key for group in groups for key in fields(group)}
    flags, recipe = _without_recipe(argv)
    texts = {}
    for name, value in _recipe(recipe).items() if recipe else ():
        key = _known_key(name, known, synonyms or {})
        if isinstance(value, dict) and known[key].metadata.get("metavar") == "JSON":
            value = json.dumps(value)
        texts[key] = _recipe_texts(recipe, name, value)
    texts |= _given(flags, known, synonyms or {})
    values = {name: _value(known[name], written) for name, written in texts.items()}
    given = [name for name, value in values.items() if value is not None]
    for whole, excluded in (alone or {}).items():
        if whole in given and (others := [f"--{key}" for key in given if key in excluded]):
            raise UsageError(f"--{whole} says it all: leave out {', '.join(others)}.")
    if missing := [f"--{name}" for name, key in known.items() if is_required(key) and name not in given]:
        raise UsageError(f"the following arguments are required: {', '.join(missing)}. See --help.")
    parsed = [group(**{key.name: values[key.name] for key in fields(group) if key.name in values}) for group in groups]
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
        if not isinstance(stream, _LossyStream):
            setattr(sys, name, _LossyStream(stream))


# What the system refuses, whatever is written or read: nobody's bug.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EFBIG, errno.ESTALE, errno.EMFILE, errno.ENFILE),
}


def run_command(main: Callable[[Sequence[str]], int]) -> None:
    """Run a command and exit with its code: a UsageError becomes one line and code 2, a WriteError one and code 1."""
    sys.exit(_code_of(main))


def check_command_line(parse: Callable[[Sequence[str]], Any]) -> None:
    """Exit where `parse` refuses the command line, or prints the help."""

    def parsed(argv: Sequence[str]) -> int:
        parse(argv)
        return 0

    if code := _code_of(parsed):
        sys.exit(code)


def _code_of(main: Callable[[Sequence[str]], int]) -> int:
    _protect_streams()
    try:
        return _result_of(main)
    except Exception as error:
        print_traceback(error)
        return 1


def _result_of(main: Callable[[Sequence[str]], int]) -> int:
    try:
        return main(sys.argv[1:])
    except (UsageError, WriteError) as error:
        print_error(error)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print_error(OSError(f"{where}{error.strerror}. Free space, or choose another place, and run it again."))
        return 1


def _is_first_to_say(text: str) -> bool:
    if "ist.distributed" in sys.modules:
        from ist.distributed import is_first_to_say

        return is_first_to_say(text)
    return os.environ.get("LOCAL_RANK", "0") == "0"  # no process group yet: as it says then


def print_error(error: Exception) -> None:
    """One line, once: ranks that have the same error leave it to the first of them."""
    if _is_first_to_say(str(error)):
        rank = os.environ.get("RANK", "0")
        line = f"{'' if rank == '0' else f'[rank {rank}] '}error: {' '.join(str(error).splitlines())}"
        if not _tell_launcher(line):
            print(line, file=sys.stderr, flush=True)
    elif "TORCHELASTIC_ERROR_FILE" in os.environ:
        time.sleep(5)  # a launcher repeats the words of the ranks that end first, and ends the others at once


def print_traceback(error: Exception) -> None:
    """Of what nobody expects; a launcher repeats its last line."""
    traceback.print_exception(error)
    _tell_launcher(f"{type(error).__name__}: {brief(error)}")


def _tell_launcher(line: str) -> bool:
    """Have torchrun, or accelerate launch with several processes, say it last; whether there is such a launcher.

    They read a file as torch's ErrorHandler writes it, which would need torch and a traceback.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return False
    # The first failure counts: ranks that end because of this one may be seen within the same second.
    extra = {"py_callstack": line, "timestamp": str(int(time.time()) - 1)}
    try:
        Path(file).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}))
    except OSError:
        return False
    return True


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
