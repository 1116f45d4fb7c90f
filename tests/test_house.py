"""Who may import whom: the method stands on torch and PEFT alone, and what trains stands on the method."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

METHOD = (
    "config",
    "sampler",
    "suppression",
    "layers",
    "loss",
    "probe",
    "tuner",
    "distributed",
    "adapters",
    "selection",
)
LIBRARIES = {"torch", "peft", *sys.stdlib_module_names}
TOP_LEVEL = {
    *("README.md", "requirements.txt", "LICENSE", "train_ist.py", "ist", "accelerate_configs", "launch", "tests"),
}


def imported(file) -> set[str]:
    """Dotted names of what a file imports when it is imported itself, not inside its functions."""
    names, inside = set(), [ast.parse(file.read_text())]
    while inside:
        node = inside.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside += ast.iter_child_nodes(node)
    return names


def files_of(*rooms: str) -> list:
    return [file for room in rooms for file in ([ROOT / f"ist/{room}.py"] if (ROOT / f"ist/{room}.py").exists() else
                                               sorted((ROOT / "ist" / room).rglob("*.py")))]  # fmt: skip


@pytest.mark.parametrize("room", METHOD)
def test_the_method_imports_torch_and_peft_and_itself(room):
    files = files_of(room)
    assert files
    for file in files:
        allowed = LIBRARIES | ({"accelerate"} if room == "distributed" else set())
        for name in imported(file):
            parts = name.split(".")
            if parts[0] == "ist":
                assert parts[1] in METHOD, f"{file.name} imports {name}"
            else:
                assert parts[0] in allowed, f"{file.name} imports {name}"


@pytest.mark.parametrize(("statement", "absent"), [("import ist.sampler", ("transformers", "peft", "datasets"))])
def test_an_import_brings_nothing_that_is_not_needed(statement, absent):
    code = f"import sys; {statement}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_of_the_package_imports_its_tests():
    for file in (ROOT / "ist").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(file)} & {"tests", "conftest"}, file


def test_nothing_else_stands_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert {name.split("/")[0] for name in tracked if not name.startswith(".")} == TOP_LEVEL
