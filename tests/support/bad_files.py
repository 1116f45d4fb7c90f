"""Files as crashes, editors and mistakes leave them, and what every command owes to the one who meets them."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from ist.training.command_line import run_command

# name -> makes a bad file of a good one (which may hold JSON, lines of JSON or YAML)
SPOILED: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_text(""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: max(1, file.stat().st_size // 2)]),
    "latin-1": lambda file: file.write_bytes('{"name": "modèle"}'.encode("latin-1")[:-4]),
    "no JSON": lambda file: file.write_text("none of it: [ {"),
    "a list": lambda file: file.write_text("[1, 2]"),
    "a number": lambda file: file.write_text("7"),
    "null": lambda file: file.write_text("null"),
    "no keys": lambda file: file.write_text("{}"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "binary": lambda file: file.write_bytes(bytes(range(256))),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "dangling": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "a loop": lambda file: (file.unlink(), file.symlink_to(file.name)),
    "gone": lambda file: file.unlink(),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


def ends_in_one_line(
    main: Callable, argv: list, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, codes: tuple = (1, 2)
) -> str:
    """The one line of an error that a command ends with, as a user sees it; any other exception fails the test."""
    import sys

    monkeypatch.setattr("ist.training.command_line._protect_streams", lambda: None)
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run_command(main)
    said = capsys.readouterr()
    assert left.value.code in codes, (left.value.code, said.out)
    text = re.sub(
        r"Loading weights.*?(it/s(, Materializing param=[\w.]+)?\]|\r|$)", "", said.err
    )  # a bar of transformers'
    lines = [line for line in text.splitlines() if line.strip() and not line.endswith("is left out.")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 20, said.err
    return lines[0]
