"""The tables between markers in the Markdown files."""

import subprocess

from ist.report.tables import table_in
from support import ROOT


def markdown_files() -> list:
    names = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split()]


def published(name: str) -> str:
    """The table <!-- name -->, which one Markdown file has."""
    (text,) = (text for file in markdown_files() if f"<!-- {name} -->" in (text := file.read_text()))
    return table_in(text, name)
