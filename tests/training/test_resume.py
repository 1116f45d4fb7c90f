"""Exact resume, checkpoints that are whole or passed over, and runs that fail."""

import fcntl
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import NEEDS_8BIT_ON_CPU, ROOT, read_lines, reseal
from support.runs import adapter_of, assert_same_adapter, cut_after, without_times

from ist.training.command_line import UsageError


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stop", [8, 10])  # an update is due at 8; 10 falls between two updates
def test_resume_is_exact(train, tmp_path, stop, accumulation):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"gradient_accumulation_steps": accumulation, "lora_dropout": 0.1, "weight_decay": 0.01}
    options |= {"validation_size": 6, "eval_steps": 5, "save_steps": stop, "per_device_train_batch_size": 2}
    assert train(output_dir=whole, **options) == 0
    cut_after(stop, whole, cut)
    assert train(output_dir=cut, resume_from_checkpoint="auto", **options) == 0
    assert_same_adapter(cut, whole)
    for name, last in (("metrics.jsonl", stop), ("importance.jsonl", stop - 1)):
        expected, lines = read_lines(whole / name), read_lines(cut / name)
        # Losses, learning rates, tokens, draws, scores, each step once.
        assert without_times(lines) == without_times(expected)
        # And it is a resumed run, not one from the start: up to the stop the clocks too are the old ones.
        same = [line == old for line, old in zip(lines, expected, strict=True)]
        assert all(same[i] for i, line in enumerate(lines) if line["step"] <= last)
        assert not any(same[i] for i, line in enumerate(lines) if line["step"] > last and "validation_loss" not in line)
    assert json.loads((cut / "run.json").read_text())["resumed_from"].endswith(f"step_{stop:06d}")


@pytest.mark.parametrize("lost", ["moment", "scores"])
def test_resume_without_a_part_of_the_state_is_another_run(train, tmp_path, lost):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(output_dir=whole, save_steps=10) == 0
    cut_after(10, whole, cut)
    folder = cut / "checkpoints/step_000010"
    state = json.loads((folder / "checkpoint.json").read_text())
    if lost == "moment":
        moments = load_file(folder / "optimizer.safetensors")
        for name in moments:
            if name.endswith("|exp_avg"):
                moments[name].zero_()
        save_file(moments, folder / "optimizer.safetensors")
    else:
        state["tuner"]["scores"] = [-50.0, 50.0, -50.0, -50.0]
    reseal(folder, state)
    assert train(output_dir=cut, save_steps=10, resume_from_checkpoint="auto") == 0
    one, two = adapter_of(cut), adapter_of(whole)
    assert not all(torch.equal(one[name], two[name]) for name in one)


def test_signal_saves_and_resume_goes_on(arguments, train, tmp_path):
    options = {"max_steps": 300, "logging_steps": 1, "lora_dropout": 0.1}
    command = [sys.executable, str(ROOT / "train_ist.py"), *arguments(**options, output_dir=tmp_path / "cut")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics, deadline = tmp_path / "cut/metrics.jsonl", time.time() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 5) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 3, output
    assert "stopped by SIGTERM" in output
    record = json.loads((tmp_path / "cut/run.json").read_text())
    assert record["status"] == "interrupted"
    assert 5 < record["steps"] < 300
    with pytest.raises(UsageError, match=r"interrupted, not finished.*--resume_from_checkpoint auto"):
        train(**options, output_dir=tmp_path / "cut")
    assert train(**options, output_dir=tmp_path / "cut", resume_from_checkpoint="auto") == 0
    assert train(**options, output_dir=tmp_path / "whole") == 0
    assert_same_adapter(tmp_path / "cut", tmp_path / "whole")


def test_a_finished_run_is_not_run_again(train, tmp_path, capsys):
    assert train(max_steps=3) == 0
    before = (tmp_path / "run/run.json").read_bytes()
    capsys.readouterr()
    assert train(max_steps=3) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    assert (tmp_path / "run/run.json").read_bytes() == before
    with pytest.raises(UsageError, match=r"another run's results: learning_rate \(0.005 there, 0.1 here\)"):
        train(max_steps=3, learning_rate=0.1)


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(train, tmp_path, capsys):
    options = {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0, "save_steps": 1, "selection": "all"}
    assert train(**options) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "loss" in error
    assert "at step 2" in error
    assert "step_000001" in error
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "failed"
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000001"]
    assert all(math.isfinite(line["loss"]) for line in read_lines(tmp_path / "run/metrics.jsonl"))


KILLED_WHILE_SAVING = """
import os, sys
sys.path.insert(0, {root!r})
import ist.training.checkpoint as checkpoint
import ist.training.files as files
import train_ist
real, calls = getattr({module}, {function!r}), []
def deadly(*args, **kwargs):
    if "step_000010" in str(args[{path_argument}]):
        if {partial}:
            open(args[1], "wb").write(b"half")
        os.kill(os.getpid(), 9)
    return real(*args, **kwargs)
setattr({module}, {function!r}, deadly)
train_ist.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("module", "function", "path_argument", "partial"),
    [
        ("checkpoint", "save_file", 1, True),
        ("checkpoint", "write_json", 0, False),
        ("files", "_publish", 0, False),
        ("os", "rename", 0, False),
    ],
)
def test_killed_while_saving(arguments, train, tmp_path, module, function, path_argument, partial):
    script = KILLED_WHILE_SAVING.format(
        root=str(ROOT), module=module, function=function, path_argument=path_argument, partial=partial
    )
    options = {"save_steps": 5, "max_steps": 12}
    killed = subprocess.run(
        [sys.executable, "-c", script, *arguments(**options)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000005"]
    (run / ".saving-step_000099").mkdir()
    (run / ".discarded-step_000001").mkdir()
    assert train(**options, resume_from_checkpoint="auto") == 0
    assert json.loads((run / "run.json").read_text())["resumed_from"].endswith("step_000005")
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert train(**options, output_dir=tmp_path / "whole") == 0
    assert_same_adapter(run, tmp_path / "whole")


def test_a_checkpoint_cut_short_is_passed_over(train, tmp_path, capsys):
    assert train(save_steps=5, max_steps=11) == 0
    run = tmp_path / "run"
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "status": "running"}))
    file = run / "checkpoints/step_000010/optimizer.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    with pytest.raises(UsageError, match="whole checkpoint"):
        train(save_steps=5, max_steps=11, resume_from_checkpoint=run / "checkpoints/step_000010")
    assert train(save_steps=5, max_steps=11, resume_from_checkpoint="auto") == 0
    assert json.loads((run / "run.json").read_text())["resumed_from"].endswith("step_000005")


def _flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def _not_finite(folder: Path) -> None:
    tensors = load_file(folder / "optimizer.safetensors")
    next(iter(tensors.values())).fill_(math.inf)
    save_file(tensors, folder / "optimizer.safetensors")
    reseal(folder, json.loads((folder / "checkpoint.json").read_text()))


def _edit_state(folder: Path, **values) -> None:
    state = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps(state | values))


DAMAGES = {
    "a bit of the adapter": lambda folder: _flip_bit(folder / "adapter.safetensors"),
    "a bit of the moments": lambda folder: _flip_bit(folder / "optimizer.safetensors"),
    "another step's adapter": lambda folder: shutil.copy(folder.parent / "step_000005/adapter.safetensors", folder),
    "no moments": lambda folder: save_file({}, folder / "optimizer.safetensors"),
    "infinite moments": _not_finite,
    "another step": lambda folder: _edit_state(folder, step=99),
    "other tokens": lambda folder: _edit_state(folder, tokens=1),
    "older format": lambda folder: _edit_state(folder, format=1),
    "unknown format": lambda folder: _edit_state(folder, format="2"),
    "no object": lambda folder: (folder / "checkpoint.json").write_text("[]"),
    "not UTF-8": lambda folder: (folder / "checkpoint.json").write_bytes(b'{"step": "\xe8"}'),
    "a file that is gone": lambda folder: (folder / "adapter.safetensors").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_or_refused(train, tmp_path, capsys, damage):
    options = {"save_steps": 5, "max_steps": 12, "lora_dropout": 0.1}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    cut_after(10, tmp_path / "whole", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step_000010"
    DAMAGES[damage](newest)
    with pytest.raises(UsageError, match=r"whole checkpoint folder; got .*step_000010: \w"):
        train(**options, resume_from_checkpoint=newest)
    capsys.readouterr()
    assert train(**options, resume_from_checkpoint="auto") == 0
    assert f"{newest} is not used: " in capsys.readouterr().out
    assert json.loads((tmp_path / "run/run.json").read_text())["resumed_from"].endswith("step_000005")
    assert_same_adapter(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [{}, {"format": 1}])  # the first had none
def test_a_checkpoint_without_digests_is_resumed_with_a_line(train, tmp_path, capsys, number):
    options = {"save_steps": 5, "max_steps": 12}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    cut_after(10, tmp_path / "whole", tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step_000010"
    state = json.loads((folder / "checkpoint.json").read_text())
    sizes = {name: (folder / name).stat().st_size for name in state["files"]}
    del state["digest"], state["format"]
    (folder / "checkpoint.json").write_text(json.dumps(state | number | {"files": sizes}))
    assert train(**options, resume_from_checkpoint="auto") == 0
    assert f"{folder} was written without digests" in capsys.readouterr().out
    assert_same_adapter(tmp_path / "run", tmp_path / "whole")


def test_files_have_the_mode_of_the_umask(train, tmp_path):
    before = os.umask(0o027)
    try:
        assert train(save_steps=2, max_steps=2) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def test_checkpoints_hold_no_pickles_and_are_small(train, tmp_path):
    assert train(save_steps=20, selection="all", lora_r=16) == 0
    folder = tmp_path / "run/checkpoints/step_000020"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors", ".safetensors"]
    adapter_bytes = sum(4 * tensor.numel() for tensor in adapter_of(tmp_path / "run").values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * adapter_bytes
    sources = [*(ROOT / "ist").rglob("*.py"), ROOT / "train_ist.py"]
    assert ROOT / "ist/training/checkpoint.py" in sources  # checkpoints are written in a folder of ist/
    for path in sources:
        assert not re.search(r"(import|from) c?pickle|pickle\.|torch\.(load|save)\b", path.read_text())


@pytest.mark.parametrize("options", [{}, {"validation_size": 4, "load_best_model_at_end": True, "eval_steps": 1}])
def test_a_last_step_that_blows_up_is_no_finished_run(train, tmp_path, options):
    options |= {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0, "max_steps": 2, "selection": "all"}
    options["lr_scheduler_type"] = "constant"
    assert train(**options) == 1
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run/adapter").exists()


@NEEDS_8BIT_ON_CPU
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8bit_optimizers_train_and_resume_exactly(train, tmp_path, optim):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {
        "optim": optim,
        "lora_r": 128,
        "max_steps": 12,
        "save_steps": 6,
    }  # bitsandbytes: 8 bits from 4096 entries
    assert train(output_dir=whole, **options) == 0
    moments = load_file(whole / "checkpoints/step_000006/optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for name, tensor in moments.items() if name.endswith("|state1"))
    cut_after(6, whole, cut)
    assert train(output_dir=cut, resume_from_checkpoint="auto", **options) == 0
    assert_same_adapter(cut, whole)


def test_results_of_unknown_origin_are_not_overwritten(train, tmp_path):
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/adapter_model.safetensors").write_text("precious")
    with pytest.raises(UsageError, match=r"holds results but no run.json"):
        train()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_text() == "precious"


def test_two_processes_do_not_write_one_folder(train, tmp_path):
    (tmp_path / "run").mkdir()
    descriptor = os.open(tmp_path / "run", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match="being written by another process"):
        train()
    os.close(descriptor)
    assert train(max_steps=2) == 0


def test_a_checkpoint_of_another_configuration_names_the_keys(train, tmp_path):
    assert train(max_steps=5, save_steps=5) == 0
    checkpoint = tmp_path / "run/checkpoints/step_000005"
    with pytest.raises(
        UsageError, match=r"another configuration: lora_r \(4 there, 8 here\), seed \(42 there, 1 here\)"
    ):
        train(max_steps=5, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint, seed=1, lora_r=8)
    with pytest.raises(UsageError, match=r"run to resume 4 is not whole micro-batches: .* 3 on 1 process are 3"):
        train(max_steps=5, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint,
              per_device_train_batch_size=3)  # fmt: skip


def _reorder(folder: Path) -> None:
    rows = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps(rows[::-1]))


def _reword(folder: Path) -> None:
    text = (folder / "held_out.json").read_text()
    (folder / "held_out.json").write_text(text.replace("7", "8"))


def _other_weights(folder: Path) -> None:
    file = folder / "model/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_reorder, r"train_digest \(the encoded training rows have changed\)"),
        (_reword, r"validation_digest \(the encoded validation rows have changed\)"),
        (_other_weights, r"model_digest \(the base model's files have changed\)"),
    ],
)
def test_a_run_goes_on_with_the_same_rows_and_weights_alone(train, tiny, rows, tmp_path, capsys, change, named):
    """Files that were replaced under the same names, with as many rows and tokens."""
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "rows.json").write_text(json.dumps(rows[:40]))
    (tmp_path / "held_out.json").write_text(json.dumps(rows[40:]))
    options = {"model_name_or_path": tmp_path / "model", "train_file": tmp_path / "rows.json", "max_steps": 4}
    options |= {"validation_file": tmp_path / "held_out.json", "save_steps": 2, "resume_from_checkpoint": "auto"}
    assert train(**options) == 0
    assert train(**options) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    change(tmp_path)
    with pytest.raises(UsageError, match=f"another run's results: {named}. Choose"):
        train(**options)
    cut_after(2, tmp_path / "run", tmp_path / "cut")
    with pytest.raises(UsageError, match=f"another run's results: {named}. Choose"):
        train(**options | {"output_dir": tmp_path / "cut"})


def test_a_checkpoint_of_a_later_format_is_refused(train, tmp_path):
    assert train(max_steps=4, save_steps=2) == 0
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    state = json.loads((checkpoint / "checkpoint.json").read_text())
    assert state["format"] == 2
    (checkpoint / "checkpoint.json").write_text(json.dumps(state | {"format": 3}))
    with pytest.raises(UsageError, match="has format 3, this version reads up to 2"):
        train(max_steps=4, save_steps=2, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint)
