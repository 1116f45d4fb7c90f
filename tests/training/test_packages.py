"""The lowest versions of packages: one list; what is missing is one line, where it is needed."""

import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from support import ROOT, read_lines

from ist.training import packages
from ist.training.command_line import UsageError
from ist.training.packages import PACKAGES, release, require_package

PROJECT = tomllib.loads((ROOT / "ist/pyproject.toml").read_text())
OPTIONAL = ("bitsandbytes", "wandb", "matplotlib", "scipy", "gguf", "trl")


def test_the_bounds_of_the_package_are_the_lowest_versions():
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    bounds = dict(line.split(">=") for line in lines if not line.startswith("ist["))
    assert bounds == {name: package.lowest for name, package in PACKAGES.items()}


@pytest.mark.parametrize("name", PACKAGES)
def test_the_oldest_set_has_the_lowest_versions(name):
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "tests/requirements-oldest.txt").read_text(), re.MULTILINE))
    lowest = release(PACKAGES[name].lowest)
    assert release(pinned[name])[: len(lowest)] == lowest
    assert not any(release(pinned[name])[len(lowest) :])


def test_the_package_has_every_folder_of_python_files():
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "ist").rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders


def test_a_release_and_a_vendor_s_build_of_it_are_one():
    assert release("2.8.0a0+5228986c39.nv25.06") == release("2.8.0+cpu") == (2, 8, 0)
    assert release("2.13.0") > release("2.8")
    assert release("0.18.0") >= release("0.18") > release("0.17.1")


def run(code: str, *argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


# Another answer of importlib.metadata, and then train_ist.py as `python train_ist.py` runs it.
TOO_OLD = """
import builtins, importlib.metadata, runpy, sys
version, load = importlib.metadata.version, builtins.__import__
def spied(name, *args, **kwargs):
    assert name.split(".")[0] not in ("torch", "transformers"), name
    return load(name, *args, **kwargs)
builtins.__import__ = spied
importlib.metadata.version = lambda name: {"peft": "0.17.1", "torch": "2.7.1+cu126"}.get(name) or version(name)
sys.argv = ["train_ist.py", "--model_name_or_path", "m", "--train_file", "f"]
runpy.run_path("train_ist.py", run_name="__main__")
"""


def test_versions_below_the_lowest_are_one_line_before_torch_is_imported():
    done = run(TOO_OLD)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    for text in (
        "torch 2.7.1+cu126 is installed, 2.8 or newer",
        "peft 0.17.1",
        "pip install 'torch>=2.8' 'peft>=0.18'",
    ):
        assert text in done.stderr
    assert PACKAGES["torch"].lacks in done.stderr


def test_each_node_says_its_own_once(monkeypatch, capsys):
    monkeypatch.setattr(packages, "version", lambda name: "0.1")
    for rank, lines in (("0", 1), ("3", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as stopped:
            packages.require_packages()
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == lines


WITHOUT = f"""
import runpy, sys
for name in {(*OPTIONAL, "sklearn")}:  # which transformers 5.0 imports, and which needs scipy
    sys.modules[name] = None  # an import of it fails, as if it were not installed
"""


# Imports of all commands, then several command lines in one process: {name: [arguments]} -> {name: error}.
COMMAND_LINES = (
    WITHOUT
    + """
import ist.analyze.command, ist.benchmark.command, ist.callback, ist.evaluate.command, ist.export.command, json
import ist.report.compare, train_ist
from ist.training.command_line import UsageError
from support import reset_accelerate
errors = {}
for name, argv in json.loads(sys.argv[1]).items():
    reset_accelerate()
    try:
        train_ist.main(argv)
    except UsageError as error:
        errors[name] = str(error)
print("errors", json.dumps(errors))
"""
)


def test_without_the_packages_that_only_some_keys_need(arguments, tmp_path):
    """Commands and callback are imported, a run and a plan are made, keys that need a package name it."""
    lines = {
        "plain": arguments(max_steps=9),
        "plan": arguments(plan="true"),
        "load_in_4bit": arguments(load_in_4bit="true"),
        "optim": arguments(optim="paged_adamw_8bit"),
        "report_to": arguments(report_to="wandb"),
    }
    done = run("import sys; sys.path.insert(0, 'tests')" + COMMAND_LINES, json.dumps(lines))
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout.split("errors ")[-1])
    assert errors.pop("load_in_4bit").startswith(
        "--load_in_4bit true needs bitsandbytes: bitsandbytes is not installed"
    )
    assert errors.pop("optim").startswith("--optim paged_adamw_8bit needs bitsandbytes: bitsandbytes is not installed")
    assert errors.pop("report_to") == "--report_to wandb needs a package: pip install wandb."
    assert not errors
    assert "weights and adapters" in done.stdout
    assert read_lines(tmp_path / "run/importance.jsonl")
    assert "importance.png is not drawn (a picture needs matplotlib: matplotlib is not installed" in done.stderr


def test_a_package_that_is_too_old_for_a_key_is_named_with_it(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(packages, "version", lambda name: "0.40.0" if name == "bitsandbytes" else real(name))
    with pytest.raises(UsageError, match=r"--load_in_4bit true needs bitsandbytes: bitsandbytes 0\.40\.0 is installed"):
        require_package("bitsandbytes", "--load_in_4bit true")
