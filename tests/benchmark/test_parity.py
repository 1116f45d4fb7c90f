"""What `ist.benchmark parity` compares, and the whole of it on two gloo ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ist.benchmark import command, parity
from ist.benchmark.command import main
from ist.training.command_line import UsageError


@pytest.fixture
def run(train, tmp_path):
    """A run of train_ist.py."""
    assert train(max_steps=6, logging_steps=1, update_interval=2, validation_size=4, output_dir=tmp_path / "run") == 0
    return tmp_path / "run"


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_differs_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    other = tmp_path / "other"
    assert parity.differences(other, run) == ("", 0.0, 0.0)
    for file, key, changed, named in (
        ("metrics.jsonl", "trained_layers", [99], "other steps, or other layers in them"),
        ("importance.jsonl", "candidates", [[99]], "other candidates"),
    ):
        before = (other / file).read_text()
        lines = lines_of(other / file)
        lines[-2 if file == "metrics.jsonl" else -1][key] = changed
        (other / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert parity.differences(other, run)[0] == named
        (other / file).write_text("\n".join(before.splitlines()[:-1]) + "\n")  # a step is missing
        assert parity.differences(other, run)[0]
        (other / file).write_text(before)


def test_distances_of_losses_and_adapters(run, tmp_path):
    shutil.copytree(run, tmp_path / "other")
    other = tmp_path / "other"
    lines = lines_of(other / "metrics.jsonl")
    lines[3]["loss" if "loss" in lines[3] else "validation_loss"] += 0.25
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = other / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    norm = torch.cat([tensor.flatten() for tensor in tensors.values()]).norm().item()
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 0.5 * norm
    save_file(tensors, file)
    wrong, loss, adapter = parity.differences(other, run)
    assert (wrong, loss) == ("", pytest.approx(0.25))
    assert adapter == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("equal", [True, False])
def test_the_table_is_written_and_the_exit_code_says_whether_all_are_equal(monkeypatch, tmp_path, capsys, equal):
    rows = [["2 GPUs", "to one process"], ["ddp", "equal" if equal else "too far apart"]]
    monkeypatch.setattr(command, "check", lambda *_: (rows, equal))
    assert main(["parity", "--output", str(tmp_path / "parity.json")]) == (0 if equal else 1)
    assert json.loads((tmp_path / "parity.json").read_text())["rows"] == rows
    assert f"| ddp | {rows[1][1]} |" in capsys.readouterr().out


@pytest.mark.slow
def test_all_topologies_on_two_ranks(tmp_path, capsys):
    assert main(["parity", "--ranks", "2", "--folder", str(tmp_path / "runs")]) == 0
    table = capsys.readouterr().out
    for name in ("ddp", "fsdp2", "ddp to fsdp2", "a killed rank, resumed"):
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
        assert line.endswith("| equal |")
    with pytest.raises(UsageError, match=r"--folder .*runs is not empty: name another"):
        main(["parity", "--ranks", "2", "--folder", str(tmp_path / "runs")])
