"""The keys of a command, from the fields of its dataclasses: the form of their values, and the text of --help."""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, get_args, get_origin

WIDTH = 100
INDENT = 36  # of the phrases in the short help: the longest key and its default stand before


def option(default: Any, help: str) -> Any:
    """A key with its default; the first sentence of `help` is its phrase in --help."""
    return field(default=default, metadata={"help": help})


class Form(NamedTuple):
    """What values a key takes.

    Attributes:
        kind: bool, int, float or str; of each element where there are many.
        optional: None is a value too, that of a key which is left out.
    """

    kind: type
    choices: tuple[str, ...]
    many: bool
    optional: bool

    def metavar(self, key: Field) -> str:
        if self.choices:
            name = "{" + ",".join(self.choices) + "}"
        elif self.kind is bool:
            name = "{true,false}"
        else:
            name = key.metadata.get("metavar") or {int: "N", float: "X", str: "TEXT"}[self.kind]
        return f"{name} [{name} ...]" if self.many else name


def form_of(key: Field) -> Form:
    """Of the types `kind`, `Literal[...]`, `list[kind]`, and any of them `| None`."""
    kinds = [kind for kind in get_args(key.type) if kind is not NoneType]
    optional = get_origin(key.type) is UnionType or NoneType in get_args(key.type)
    (kind,) = kinds if optional else [key.type]
    if get_origin(kind) is Literal:
        return Form(str, get_args(kind), False, optional)
    many = get_origin(kind) is list
    return Form(get_args(kind)[0] if many else kind, (), many, optional)


def is_required(key: Field) -> bool:
    return key.default is MISSING and key.default_factory is MISSING


def group_name(group: type) -> str | None:
    """Its name in --help; None where a command has no groups."""
    return getattr(group, "_argument_group_name", None)


def _short_name(group: type) -> str:
    return re.split(r"\W", group_name(group) or "")[0]


def _default(key: Field) -> str:
    """As it is typed; nothing where it is none, or depends on other keys."""
    if is_required(key):
        return ""
    value = key.default_factory() if key.default is MISSING else key.default
    value = key.metadata.get("default", value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)


def _line(key: Field) -> str:
    """The key, its default, and the first sentence of its help."""
    start = f"  --{key.name} {_default(key)}".rstrip()
    phrase = re.split(r"\.(?= |$)", key.metadata["help"], maxsplit=1)[0]
    needed = "(required) " if is_required(key) else ""
    room = WIDTH - max(INDENT, len(start) + 2)
    return f"{start:<{INDENT - 2}}  {textwrap.shorten(needed + phrase, room, placeholder=' ...')}"


def _whole(key: Field) -> Iterator[str]:
    """The key, its values and its default; its whole help."""
    default = f" (default {_default(key)})" if _default(key) else " (required)" if is_required(key) else ""
    yield f"  --{key.name} {form_of(key).metavar(key)}{default}"
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)
    yield from wrapper.wrap(key.metadata["help"])


def _program() -> str:
    program = Path(sys.argv[0])
    return f"python -m ist.{program.parent.name}" if program.name == "__main__.py" else program.name


def help_text(groups: Sequence[type], description: str, topics: Sequence[str]) -> str | None:
    """--help; with names of groups or keys as `topics` their whole text. None where a topic is neither.

    A command without groups has few keys: the whole text of all.
    """
    names = {_short_name(group): group for group in groups if group_name(group)}
    keys: dict[str, Any] = {key.name: key for group in groups for key in fields(group)}
    lines: list[str] = []
    for topic in topics:
        if topic in names:
            lines += [f"{group_name(names[topic])}", *(line for key in fields(names[topic]) for line in _whole(key))]
        elif topic.lstrip("-").replace("-", "_") in keys:
            lines += _whole(keys[topic.lstrip("-").replace("-", "_")])
        else:
            return None
    if topics:
        return "\n".join(lines)
    lines = [f"usage: {_program()} [--config FILE.yaml] [--key value ...]", *textwrap.wrap(description, WIDTH)]
    lines += ["FILE has `key: value` lines; the command line overrides them. A key's default stands behind it."]
    if not names:
        return "\n".join([*lines, "", *(line for key in keys.values() for line in _whole(key))])
    *others, last = names
    lines += [f"--help KEY and --help GROUP say more; groups are {', '.join(others)} and {last}."]
    for group in groups:
        lines += [f"{group_name(group)}:", *map(_line, fields(group))]  # no empty line: --help is a page
    return "\n".join(lines)
