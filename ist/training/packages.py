"""The packages that are needed: the lowest versions that work, and which of them only some keys need."""

import re
import sys
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from ist.training.command_line import UsageError, markdown_table, print_error


class Package(NamedTuple):
    """
    Attributes:
        lowest: the lowest version that works; the oldest set of the tests has it.
        lacks: what a lower one lacks.
        needed_by: keys and commands; empty for everything.
    """

    lowest: str
    lacks: str
    needed_by: str = ""


PACKAGES = {
    "torch": Package("2.8", "older ones have not been tried"),
    "transformers": Package("5.0", "4.57 has no quantizers.base.get_keys_to_not_convert, and wants huggingface_hub 0"),
    "peft": Package("0.18", "0.17 imports HybridCache, which transformers 5 has not"),
    "accelerate": Package("1.10", "1.9 has no Accelerator.parallelism_config"),
    "datasets": Package("4.3", "4.2 has no fingerprint in Dataset.from_generator"),
    "safetensors": Package("0.4.3", "transformers 5.0 refuses 0.4.2"),
    "bitsandbytes": Package(
        "0.49", "0.47 on a CPU crashes where all weights are zero", "`load_in_4bit`, its own `optim`"
    ),
    "matplotlib": Package("3.7", "3.6 puts no legend outside of the axes", "pictures"),
    "scipy": Package(
        "1.10", "1.9 has no confidence interval of a paired t-test", "`ist.evaluate`, `ist.analyze`, `ist.report`"
    ),
    "wandb": Package("0.31", "older ones have not been tried", "`report_to=wandb`"),
}


def release(text: str) -> tuple[int, ...]:
    """(2, 8, 0) of 2.8.0a0+vendor: a vendor's build counts as the release that it is made of."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def installed(name: str) -> str | None:
    """The version of a package; None where it cannot be imported. Does not import it."""
    return version(name) if find_spec(name) else None


def shortcomings(names: Iterable[str]) -> str:
    """What is missing or too old of the packages `names`, and the command that brings it; empty if all is well."""
    told, wanted = [], []
    for name in names:
        package, found = PACKAGES[name], installed(name)
        if found is None:
            told.append(f"{name} is not installed")
        elif release(found) < release(package.lowest):
            told.append(f"{name} {found} is installed, {package.lowest} or newer is needed ({package.lacks})")
        else:
            continue
        wanted.append(f"'{name}>={package.lowest}'")
    return f"{'; '.join(told)}: pip install {' '.join(wanted)}" if told else ""


def require_packages() -> None:
    """Call before torch is imported, as older versions lack what we import: one line, exit code 2."""
    if problem := shortcomings(name for name, package in PACKAGES.items() if not package.needed_by):
        print_error(UsageError(f"{problem}."))  # once on each node, whose versions may differ
        sys.exit(2)


def require_package(name: str, what: str) -> None:
    """
    Args:
        what: the key with its value, or the command, that needs the package.

    Raises:
        UsageError: it is not installed, or too old.
    """
    if problem := shortcomings([name]):
        raise UsageError(f"{what} needs {name}: {problem}.")


def is_packed(tensor: Any) -> bool:
    """Whether a parameter is one of bitsandbytes' 4-bit weights, which is not imported to ask."""
    return type(tensor).__name__ == "Params4bit"


def as_table() -> str:
    """Markdown: what launch/README.md says of versions."""
    rows = ([name, package.lowest, package.lacks, package.needed_by or "all"] for name, package in PACKAGES.items())
    return "\n".join(markdown_table(["package", "lowest version", "a lower one", "needed by"], rows))
