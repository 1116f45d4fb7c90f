"""Fixtures: word problems as rows, a tiny model, and train_ist.py as a function and as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from support import ROOT, make_tiny, reset_accelerate, warm_python

from ist.training.word_problems import arithmetic_rows

# The files that take longest, by minutes: begun first, so that the other worker has the rest in the meantime.
LONGEST = ("test_cluster.py", "test_topologies.py", "test_demo.py", "test_sweep.py", "test_distributed.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def hf_cache(tmp_path_factory):
    """No test reads or fills the user's caches."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def environment():
    """Variables that a test, or a library in it (W&B names its run), sets are those of this test alone."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return arithmetic_rows(60, seed=1, held_out=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, rows) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), rows)


@pytest.fixture(scope="session")
def train_file(tmp_path_factory, rows) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def arguments(tiny, train_file, tmp_path):
    """The command line of a short run in tmp_path/run, with overrides: arguments(max_steps=20) -> list of strings."""

    def make(**overrides) -> list[str]:
        values = {
            **{"model_name_or_path": tiny, "train_file": train_file, "output_dir": tmp_path / "run"},
            **{"report_to": "none", "warmup_steps": 2, "max_steps": 20, "update_interval": 4, "logging_steps": 1},
            **{"lora_r": 4, "lora_alpha": 8, "learning_rate": 5e-3, "score_lr": 100},
            **overrides,
        }
        return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]

    return make


@pytest.fixture
def train(arguments):
    """Run train_ist.py's main in this process: train(max_steps=20) -> exit code."""
    import train_ist

    def run(**overrides) -> int:
        reset_accelerate()
        return train_ist.main(arguments(**overrides))

    return run


@pytest.fixture
def train_process(arguments):
    """Run `python train_ist.py` as a process of its own."""

    def run(**overrides) -> subprocess.CompletedProcess:
        command = [warm_python(), str(ROOT / "train_ist.py"), *arguments(**overrides)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    return run


@pytest.fixture(scope="session")
def work(tmp_path_factory, rows) -> Path:
    """Where the launches of rules.py find their model and rows, and leave their runs."""
    folder = tmp_path_factory.mktemp("rules")
    make_tiny(folder / "tiny", rows)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def topologies(work) -> dict[str, dict]:
    """All rules, trained on each topology; a worker makes it once."""
    from support import rules

    return {topology: rules.launch(topology, work) for topology in ("one", "ddp", "fsdp2")}


@pytest.fixture
def two_hosts():
    """Commands that run something on either of two hosts, and the first one's address: network namespaces with a
    cable between them; where those are refused, two agents on loopback."""
    names = [f"ist{os.getpid()}{side}" for side in "ab"]
    setup = [f"ip netns add {name}" for name in names]
    setup += [f"ip link add veth{os.getpid()} netns {names[0]} type veth peer name veth1 netns {names[1]}"]
    setup += [f"ip -n {names[0]} link set veth{os.getpid()} name veth1"]
    for i, name in enumerate(names):
        setup += [f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev veth1", f"ip -n {name} link set veth1 up"]
        setup += [f"ip -n {name} link set lo up"]
    try:
        for line in setup:
            subprocess.run(line.split(), check=True, capture_output=True)
        yield [["ip", "netns", "exec", name] for name in names], "10.77.0.1", "veth1"
    except (OSError, subprocess.CalledProcessError):
        yield [[], []], "127.0.0.1", "lo"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
