"""The rules of the house: who may import whom, where a fact lives, and how long a page may be (ist/README.md)."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import ROOT, families, id3, method_table
from support.documents import markdown_files, published

from ist.analyze.results import agreement_table
from ist.benchmark.command import published_table
from ist.training import packages
from launch.experiments.tables import table_of

METHOD = (
    *("config", "sampler", "suppression", "layers", "loss", "probe", "instruments", "tuner", "distributed"),
    *("adapters", "selection"),
)
COMMANDS = ("evaluate", "export", "analyze", "benchmark", "report")
LIBRARIES = {"torch", "peft", *sys.stdlib_module_names}
TOP_LEVEL = {
    *("README.md", "requirements.txt", "LICENSE", "train_ist.py", "ist", "accelerate_configs", "launch", "tests"),
}


def tracked(pattern: str) -> list[Path]:
    names = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in names.split()]


PYTHON = tracked("*.py")
RESULTS = ROOT / "launch/results"


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def imports(file: Path, inside_functions: bool) -> Iterator[str]:
    """Dotted names that a file imports; without `inside_functions` those that it imports when it is imported."""
    left: list[ast.AST] = [ast.parse(file.read_text())]
    while left:
        node = left.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            left += ast.iter_child_nodes(node)


def room(file: Path) -> str:
    """ist/tuner.py is of tuner, ist/training/data.py of training, train_ist.py of itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return parts[1] if parts[0] == "ist" else parts[0]


def floor(name: str) -> int:
    """1: the method; 2: training; 3: train_ist.py, the callback and the commands; 4: launch/, tests."""
    if name in (*METHOD, "__init__"):
        return 1
    if name == "training":
        return 2
    return 3 if name in (*COMMANDS, "callback", "train_ist") else 4


PACKAGE = [file for file in PYTHON if named(file).startswith("ist/") or file.name == "train_ist.py"]


@pytest.mark.parametrize("name", METHOD)
def test_the_method_imports_torch_and_peft_and_itself(name):
    files = [file for file in PACKAGE if room(file) == name]
    assert files
    allowed = LIBRARIES | ({"accelerate"} if name == "distributed" else set())
    for file in files:
        for target in imports(file, inside_functions=False):
            assert target.split(".")[0] in allowed | {"ist"}, f"{named(file)} imports {target}"


@pytest.mark.parametrize("file", PACKAGE, ids=named)
def test_no_room_imports_from_a_floor_above(file):
    for target in imports(file, inside_functions=True):
        parts = target.split(".")
        if parts[0] in ("launch", "tests", "conftest", "support"):
            assert floor(room(file)) == 4, f"{named(file)} imports {target}"
        if parts[0] == "ist" and len(parts) > 1 and parts[1] != "__init__":
            above = room(file) == "__init__" or floor(parts[1]) <= floor(room(file))
            assert above or parts[1] in ("ISTConfig",), f"{named(file)} imports {target}"
            own = parts[1] == room(file)
            assert own or "__main__" not in parts, f"{named(file)} imports {target}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ist.sampler", ("transformers", "peft", "datasets")),
        ("from ist import ISTCallback", ("matplotlib", "datasets", "trl")),
    ],
)
def test_an_import_brings_nothing_that_is_not_needed(statement, absent):
    code = f"import sys; {statement}; print([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", PACKAGE, ids=named)
def test_the_product_runs_no_tests_and_patches_no_other_room(file):
    text = file.read_text()
    assert not re.search(r"\btests/|\bconftest\b", text), "names tests/"
    assert not re.search(r"spec_from_file_location|run_path|exec\(", text), "loads a script by path"
    foreign = {target.split(".")[-1] for target in imports(file, inside_functions=True) if target.startswith("ist.")}
    for node in ast.walk(ast.parse(text)):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "setattr",
            "object",
        ):
            targets = [ast.Attribute(node.args[0])] if node.args else []
        for target in targets:
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                assert target.value.id not in foreign, f"line {node.lineno} assigns to {target.value.id}"


@pytest.mark.parametrize("file", PACKAGE, ids=named)
def test_ranks_talk_in_three_files_alone(file):
    if named(file) in ("ist/distributed.py", "ist/training/checkpoint.py", "ist/selection/shards.py"):
        return
    names = list(imports(file, inside_functions=True))
    assert not any(name.startswith("torch.distributed") or name.endswith(".DTensor") for name in names), names


@pytest.mark.parametrize("file", PYTHON, ids=named)
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 100 if (named(file), node.name) == ("train_ist.py", "train") else 80
            assert node.end_lineno - node.lineno < limit, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


def test_the_readme_is_one_screen_and_doors():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_files_that_are_no_pictures_are_small():
    for file in tracked("*"):
        if file.suffix != ".png":
            assert file.stat().st_size <= 100_000, named(file)


def test_nothing_else_is_at_the_top_level():
    names = {named(file).split("/")[0] for file in tracked("*")}
    assert {name for name in names if not name.startswith(".")} == TOP_LEVEL


def answers(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())["answers"]


def experiment(name: str) -> str:
    folder = ROOT / "launch/experiments/results" / name
    return table_of(folder) if folder.exists() else f"not run: `launch/evidence.sh DATA {name}`"


TABLES = {
    "methods": lambda: method_table.as_table(answers("methods")),
    "families": lambda: families.as_table(answers("families")),
    "id3": lambda: id3.as_table(answers("id3")),
    **{
        name: lambda name=name: published_table(RESULTS / f"{name}.json")
        for name in ("speed", "probe", "communication", "scale", "memory")
    },
    **{
        name: lambda name=name: agreement_table(json.loads((RESULTS / f"{name}.json").read_text()))
        for name in ("layers-arithmetic", "layers-wikitext-2")
    },
    **{
        name: lambda name=name: experiment(name)
        for name in (path.stem for path in (ROOT / "launch/experiments").glob("*.yaml"))
    },
    "limits": method_table.limits_table,
    "packages": packages.as_table,
}


def test_every_marked_table_has_its_function():
    marked = [name for file in markdown_files() for name in re.findall(r"<!-- ([\w-]+) -->", file.read_text())]
    assert sorted(marked) == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_that_of_its_files(name):
    assert published(name) == TABLES[name]()


# Keys of other programs, and of scripts, that the READMEs name.
FOREIGN = {
    *(
        "config_file",
        "num_processes",
        "num_machines",
        "quiet",
        "machine_rank",
        "main_process_ip",
        "mixed_precision",
        "parallelism_config_dp_replicate_size",
        "parallelism_config_dp_shard_size",
    ),  # accelerate
    *(
        "enable-lora",
        "max-lora-rank",
        "lora-modules",
        "tasks",
        "model_args",
        "cyclic_stride",
    ),  # vLLM, lm_eval, an example
    *("gpus-per-node", "nodes", "array", "signal", "accelerate_config", "vary"),  # sbatch, launch/train.sbatch
    *("revision", "local-dir"),  # hf download
    *(
        "help",
        "all",
        "tests",
        "model",
        "gemma",
        "once",
        "no-deps",
        "target",
        "repo",
        "old",
        "oldest",
        "oldest-but-torch",
        "durations",
        "dist",
    ),  # scripts, pip, pytest
}


def keys_of(*command: str) -> set[str]:
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {key.replace("-", "_") for key in re.findall(r"--([\w-]+)", done.stdout)}


def test_every_key_is_in_a_readme_and_every_key_in_a_readme_exists():
    text = "\n".join(file.read_text() for file in markdown_files())
    ours = keys_of("train_ist.py")
    missing = {key for key in ours if not re.search(rf"`{key}[`=]|--{key}\b", text)} - {"help", "key"}
    assert not missing
    known = (
        ours | FOREIGN | {"parity", "readme", "train_file", "max_steps", "rows_per_step", "validation_size", "publish"}
    )
    for module in (
        "ist.evaluate",
        "ist.export",
        "ist.analyze",
        "ist.report",
        "launch.experiments.run",
        "launch.experiments.tables",
        "launch.experiments.method_comparison",
    ):
        known |= keys_of("-m", module)
    for what in ("memory", "speed", "probe", "communication", "scale", "parity"):
        known |= keys_of("-m", "ist.benchmark", what)
    assert {key for key in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)} - known == {"known"}  # gone, in CHANGES.md
