"""train_ist.py as a whole: equal to plain PEFT, exact on resume, safe in a crash, and clear about bad input."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_lines, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ist.loss import token_loss_sum
from ist.sampler import seeded_generator
from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.data import GlobalBatches, encode
from ist.training.model import plan_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same_adapter(run: Path, other: Path) -> None:
    one, two = adapter_of(run), adapter_of(other)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def without_times(lines: list[dict]) -> list[dict]:
    clocks = ("step_seconds", "tokens_per_second", "peak_memory_bytes", "probe_seconds")
    return [{key: value for key, value in line.items() if key not in clocks} for line in lines]


def plain_peft_loop(tiny: Path, rows: list[dict], steps: int, dropout: float) -> tuple[dict, list[float]]:
    """Plain LoRA, written without ist's loop: (adapter by name, loss of every step)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(42)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: t / 2 if t < 2 else max(0.0, (steps - t) / (steps - 2))
    )
    encoded = [encode(row, "alpaca", tokenizer, 256, False)["input_ids"] for row in rows]
    stream = GlobalBatches(len(rows), 4, 42)
    losses = []
    for step in range(steps):
        torch.manual_seed(seeded_generator(42, step, 0, "dropout").initial_seed())
        batch = [encoded[i] for i in stream.rows(step)]
        width = max(map(len, batch))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        labels = ids.masked_fill(mask == 0, -100)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        total = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        loss = total / (labels[:, 1:] != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora" in n}, losses


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_every_layer_trained_is_plain_peft_bit_for_bit(train, tiny, rows, tmp_path, dropout):
    expected, losses = plain_peft_loop(tiny, rows, 20, dropout)
    arms = {
        "all": {"selection": "all"},
        "ist": {"selection": "ist", "trained_layers": "all", "suppression": 1},
        "other": {"selection": "random"},
    }
    for name, options in arms.items():
        assert train(output_dir=tmp_path / name, lora_dropout=dropout, **options) == 0
        logged = [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        adapter = adapter_of(tmp_path / name)
        assert adapter.keys() == expected.keys()
        same = all(torch.equal(adapter[key], expected[key]) for key in expected)
        assert same == (name != "other")  # the comparison can tell
        assert (logged == losses) == (name != "other")


def test_a_run_leaves_what_the_readme_says(train, tiny, tmp_path):
    assert train(validation_size=8, eval_steps=10, save_steps=10, lora_dropout=0) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *("adapter", "checkpoints", "metrics.jsonl", "importance.jsonl", "importance.png", "run.json")
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_000010", "step_000020"}
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "validation_loss" in line] == [0, 10, 20]
    keys = {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trained_layers", "step_seconds"}
    assert keys | {"tokens_per_second", "peak_memory_bytes"} == set(lines[1])
    assert all(len(line["trained_layers"]) == 1 for line in lines if "loss" in line)
    updates = read_lines(run / "importance.jsonl")
    assert [update["step"] for update in updates] == [4, 8, 12, 16]
    scores = torch.zeros(4, dtype=torch.float64)
    for update in updates:  # Eq. 9-10, from the record alone
        likelihood = torch.exp(-torch.tensor(update["losses"], dtype=torch.float64))
        rewards = likelihood - likelihood.mean()
        assert rewards.tolist() == pytest.approx(update["rewards"])
        for kept, reward in zip(update["candidates"], rewards, strict=True):
            scores[kept] += 100 * reward
        assert update["scores"] == pytest.approx(scores.tolist())
        assert update["probabilities"] == pytest.approx(torch.sigmoid(scores).tolist())
    assert scores.abs().max() > 1e-3
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["final_validation_loss"] == lines[-1]["validation_loss"]
    assert record["final_train_loss"] == lines[-2]["loss"]
    assert record["layers"] == [f"base_model.model.model.layers.{i}" for i in range(4)]
    assert sum(record["trained_counts"]) == 20
    # The adapter is stock PEFT's: it loads, it is the trained model (same validation loss), and it merges.
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), run / "adapter").eval()
    ids = torch.randint(0, 400, (2, 9))
    logits = model(ids).logits
    assert (logits - AutoModelForCausalLM.from_pretrained(tiny)(ids).logits).abs().max() > 1e-3
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, logits, atol=1e-5, rtol=0)
    checkpoint = load_file(run / "checkpoints/step_000020/adapter.safetensors")
    for name, tensor in adapter_of(run).items():
        assert torch.equal(checkpoint[name.replace(".weight", ".default.weight")], tensor)


def cut_after(step: int, whole: Path, cut: Path) -> None:
    """A copy of a finished run as a crash after `step` would have left it, its later lines included."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "adapter")
    for later in (cut / "checkpoints").iterdir():
        if later.name > f"step_{step:06d}":
            shutil.rmtree(later)
    record = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**record, "status": "running"}))


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


def test_packing_is_proven_when_a_run_begins(train, tmp_path, monkeypatch):
    """Not when it goes on: trained weights round so far apart in bfloat16 that a proof of them would prove nothing."""
    options = {"packing": True, "dtype": "bfloat16", "save_steps": 5, "max_steps": 10}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    cut_after(5, tmp_path / "whole", tmp_path / "cut")
    monkeypatch.setattr(torch, "allclose", lambda *args, **kwargs: False)
    with pytest.raises(UsageError, match="--packing true changes this model's loss"):
        train(output_dir=tmp_path / "new", **options)
    assert train(output_dir=tmp_path / "cut", resume_from_checkpoint="auto", **options) == 0
    whole, cut = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut"))
    assert [line["loss"] for line in cut] == [line["loss"] for line in whole]


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
    (folder / "checkpoint.json").write_text(json.dumps(state))
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


def test_micro_batches_and_accumulation_are_the_same_step(train, tmp_path):
    for name, micro, accumulation in (("whole", 4, 1), ("parts", 1, 4)):
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
        assert train(output_dir=tmp_path / name, max_steps=5, lora_dropout=0, **sizes) == 0
    whole, parts = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for one, two in zip(whole, parts, strict=True):
        assert one["tokens"] == two["tokens"]
        assert one["trained_layers"] == two["trained_layers"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    assert whole[0]["loss"] == pytest.approx(parts[0]["loss"], abs=1e-6)


def test_gradients_of_micro_batches_add_up(tiny, rows):
    """The same on the gradient itself, rows of unequal length: the loss is a mean over the tokens of the batch."""
    from ist.training.data import collate

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    encoded = [encode(row, "alpaca", tokenizer, 256, True) for row in rows[:4]]
    lengths = [sum(label != -100 for label in row["labels"]) for row in encoded]
    assert len(set(lengths)) > 1

    def gradient(parts: list[list[dict]]) -> tuple[float, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(tiny_config()), LoraConfig(r=4, target_modules=TARGETS)).train()
        loss = 0.0
        for part in parts:
            batch = collate([r["input_ids"] for r in part], [r["labels"] for r in part], 0)
            micro = token_loss_sum(model, batch) / sum(lengths)
            micro.backward()
            loss += micro.item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    (loss, whole), (loss_in_parts, in_parts) = gradient([encoded]), gradient([[row] for row in encoded])
    assert loss == pytest.approx(loss_in_parts, abs=1e-6)
    assert whole.norm() > 0.01
    assert (whole - in_parts).norm() < 1e-6 * whole.norm()


def test_best_adapter_by_validation(train, tmp_path):
    # At this learning rate the validation loss rises again before the end.
    options = {"validation_size": 8, "eval_steps": 2, "learning_rate": 3, "warmup_steps": 0, "max_steps": 6}
    options["lr_scheduler_type"] = "constant"
    assert train(**options, load_best_model_at_end=True, save_steps=6, save_total_limit=1) == 0
    lines = [line for line in read_lines(tmp_path / "run/metrics.jsonl") if "validation_loss" in line]
    best = min(lines[1:], key=lambda line: line["validation_loss"])
    assert best["step"] < 6
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["best"] == {"step": best["step"], "validation_loss": best["validation_loss"]}
    saved = load_file(tmp_path / f"run/checkpoints/step_{best['step']:06d}/adapter.safetensors")
    for name, tensor in adapter_of(tmp_path / "run").items():
        assert torch.equal(saved[name.replace(".weight", ".default.weight")], tensor)
    assert len(list((tmp_path / "run/checkpoints").iterdir())) == 2  # the newest and the best


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
        ("checkpoint", "publish", 0, False),
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


def test_checkpoints_hold_no_pickles_and_are_small(train, tmp_path):
    assert train(save_steps=20, selection="all", lora_r=16) == 0
    folder = tmp_path / "run/checkpoints/step_000020"
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors", ".safetensors"]
    adapter_bytes = sum(4 * tensor.numel() for tensor in adapter_of(tmp_path / "run").values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * adapter_bytes
    import ist

    for path in Path(ist.__file__).parent.glob("*.py"):
        assert "pickle" not in path.read_text().replace("unpickling", "").replace("no pickles", "")
        assert "torch.load" not in path.read_text()


@pytest.mark.parametrize("options", [{}, {"validation_size": 4, "load_best_model_at_end": True, "eval_steps": 1}])
def test_a_last_step_that_blows_up_is_no_finished_run(train, tmp_path, options):
    options |= {"learning_rate": 1e30, "max_grad_norm": 0, "warmup_steps": 0, "max_steps": 2, "selection": "all"}
    options["lr_scheduler_type"] = "constant"
    assert train(**options) == 1
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "run/adapter").exists()


def test_code_that_comes_with_a_model_is_not_run(train, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Custom", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "was_run"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(UsageError, match="trust_remote_code"):
        train(model_name_or_path=folder)
    assert not marker.exists()
    with pytest.raises(UsageError):  # the code is no model, but now it runs
        train(model_name_or_path=folder, trust_remote_code=True)
    assert marker.exists()


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


def test_4bit_base_trains_every_layer(train, tmp_path):
    assert train(load_in_4bit=True, selection="all", validation_size=8, max_steps=10) == 0
    norms = [line["grad_norm"] for line in read_lines(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert min(norms) > 0.01
    moved = [name for name, tensor in adapter_of(tmp_path / "run").items() if "lora_B" in name and tensor.any()]
    assert len(moved) == 4 * 5  # validation forwards leave 4-bit layers trainable


def test_a_launchers_accumulation_does_not_change_the_gradient(train, tmp_path, monkeypatch):
    assert train(max_steps=2, output_dir=tmp_path / "one") == 0
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert train(max_steps=2, output_dir=tmp_path / "two") == 0
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert without_times(one) == without_times(two)


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


def test_float16_weights_are_refused_also_where_the_config_does_not_say(train, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(UsageError, match="float16"):
        train(model_name_or_path=folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    with pytest.raises(UsageError, match="float16"):
        train(model_name_or_path=folder)
    assert train(model_name_or_path=folder, dtype="float32", max_steps=2) == 0


def test_a_model_folder_that_is_not_whole(train, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UsageError, match="cannot be loaded"):
        train(model_name_or_path=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        train(model_name_or_path=folder)


def test_a_tokenizer_of_another_model_is_refused(train, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    LlamaForCausalLM(tiny_config(vocab_size=50)).save_pretrained(folder)
    with pytest.raises(UsageError, match="do not belong"):
        train(model_name_or_path=folder)


def test_bf16_gradient_checkpointing_and_chat_rows_train(train, tmp_path):
    chat = [
        {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(12)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    options = {"train_file": tmp_path / "chat.jsonl", "prompt_template": "chat", "completion_only_loss": True}
    assert train(**options, bf16=True, gradient_checkpointing=True, learning_rate=2e-2) == 0
    losses = [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_gradient_checkpointing_changes_nothing(train, tmp_path):
    for name, on in (("plain", False), ("checkpointed", True)):
        assert train(output_dir=tmp_path / name, gradient_checkpointing=on, lora_dropout=0.1, max_steps=8) == 0
    assert_same_adapter(tmp_path / "plain", tmp_path / "checkpointed")


def test_released_rule_trains_and_reports_importance(train, tmp_path):
    assert train(score_rule="released") == 0
    updates = read_lines(tmp_path / "run/importance.jsonl")
    state = json.loads((tmp_path / "run/run.json").read_text())
    assert state["status"] == "finished"
    s = torch.zeros(4, dtype=torch.float64)
    for update in updates:
        p = torch.sigmoid(s)
        move = torch.zeros(4, dtype=torch.float64)
        for kept, reward in zip(update["candidates"], update["rewards"], strict=True):
            for i in set(range(4)) - set(kept):
                move[i] += 100 * reward * p[i] * (1 - p[i])
        s += move
        assert update["scores"] == pytest.approx((-s).tolist())


BAD_INPUT = {
    "unknown key": ({"trained_layer": 0.5}, "unknown key --trained_layer. Did you mean --trained_layers"),
    "not a number": ({"max_steps": "many"}, "--max_steps must be of type int; got 'many'"),
    "not a choice": ({"selection": "best"}, "--selection: invalid choice: 'best'"),
    "count out of range": ({"trained_layers": 5}, "from 1 to 4.*got 5"),
    "ambiguous count": ({"kept_layers": "1.0"}, "--kept_layers 1.0 is ambiguous"),
    "max_length": ({"max_length": 0}, "--max_length must be 2 or more tokens; got 0"),
    "no data": ({"train_file": None}, "--train_file FILE or --dataset_name"),
    "missing file": ({"train_file": "nowhere.json"}, "--train_file nowhere.json: no such file"),
    "missing recipe": ({"config": "nowhere.yaml"}, "--config nowhere.yaml: No such file"),
    "not a model": ({"model_name_or_path": "tests"}, "--model_name_or_path tests cannot be used"),
    "no layer list": ({"target_modules": "lm_head"}, "no layer list"),
    "no such modules": ({"target_modules": "q_proj,w_query"}, "--target_modules: the model has no module w_query"),
    "output is a file": ({"output_dir": "README.md/x"}, "--output_dir README.md/x cannot be written"),
    "auto without a folder": ({"output_dir": None, "resume_from_checkpoint": "auto"}, "needs --output_dir"),
    "validation nan": ({"validation_size": "nan"}, "--validation_size must be"),
    "validation key": ({"eval_steps": 5}, "--eval_steps needs --validation_file"),
    "validation size": ({"validation_size": 60}, "--validation_size must be less than the 60 rows"),
    "not a checkpoint": ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint must be none, auto or"),
    "no encoder": ({"layer_stack": "encoder"}, "^--layer_stack encoder: the model has no encoder"),
    "bottleneck": ({"bottleneck_size": 0}, "--bottleneck_size must be 1 or more; got 0"),
    "peft_config and a key": (
        {"peft_config": "lora.json"},
        "--peft_config says it all: leave out --lora_r, --lora_alpha",
    ),
    "float16": ({"dtype": "float16"}, "--dtype: invalid choice: 'float16'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line(train, tmp_path, name):
    options, message = BAD_INPUT[name]
    with pytest.raises(UsageError, match=message) as error:
        train(**options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


BAD_PEFT_CONFIG = {
    "no file": (None, "cannot be read: No such file"),
    "not JSON": ("{", "is not a PEFT configuration in JSON"),
    "a list": ("[1]", "is not a PEFT configuration in JSON"),
    "no type": ('{"r": 4}', "peft_type must be one of ADALORA, .*; got None"),
    "unknown type": ('{"peft_type": "lorra"}', "peft_type must be one of .*; got lorra"),
    "unknown key": ('{"peft_type": "LORA", "rank": 4}', "LoraConfig has no rank"),
    "bad value": ('{"peft_type": "SERIES", "non_linearity": "rleu"}', "non_linearity must be one of"),
    "bad rank": ('{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}', "`r` should be a positive integer"),
    "no target": ('{"peft_type": "LORA", "target_modules": ["w_query"]}', "Target modules .*w_query.* not found"),
    "a prompt": ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}', "PREFIX_TUNING is not served: it learns"),
    "not an int": ('{"peft_type": "LORA", "r": "8"}', 'r must be of type int; got "8"'),
    "not a whole number": ('{"peft_type": "SERIES", "bottleneck_size": 8.5}', "bottleneck_size must be of type int"),
    "not a name": ('{"peft_type": "SERIES", "non_linearity": ["relu"]}', "non_linearity must be of type str"),
    "no number": ('{"peft_type": "PARALLEL", "scaling": NaN}', "NaN is no number"),
    "null": ('{"peft_type": "PARALLEL", "scaling": null}', "scaling must be of type float; got null"),
    "no interval": ('{"peft_type": "ADALORA", "deltaT": 0}', "deltaT 0 must be 1 or more"),
    "no mean": ('{"peft_type": "ADALORA", "beta1": 1.5}', "AssertionError|beta1 1.5 .* must be between 0 and 1"),
    "no such module": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["nothere"]}',
        "modules_to_save: the model has no module nothere",
    ),
    "data first": ('{"peft_type": "LORA", "init_lora_weights": "eva"}', "needs a pass over data"),
    "no rank to take": ('{"peft_type": "ADALORA", "init_r": 4, "target_r": 4}', "target_r 4 must be below init_r 4"),
    "schedule": (
        '{"peft_type": "ADALORA", "target_modules": ["q_proj"], "tinit": 15, "tfinal": 10}',
        "don't allow for a budgeting phase",
    ),
}


@pytest.mark.parametrize("name", BAD_PEFT_CONFIG)
def test_a_bad_peft_config_is_one_clear_line(train, tmp_path, name):
    text, message = BAD_PEFT_CONFIG[name]
    file = tmp_path / "meta/peft.json"  # a folder's name must not be taken for a word of the error
    file.parent.mkdir()
    if text:
        file.write_text(text)
    with pytest.raises(UsageError, match=f"--peft_config {file}.*({message})") as error:
        train(peft_config=file, lora_r=None, lora_alpha=None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_needs_plain_weights_is_refused_on_packed_ones(train, tmp_path):
    (tmp_path / "peft.json").write_text('{"peft_type": "LOHA", "target_modules": ["q_proj"]}')
    with pytest.raises(UsageError, match=r"LOHA is not served: .*--load_in_4bit packs"):
        train(peft_config=tmp_path / "peft.json", load_in_4bit=True, lora_r=None, lora_alpha=None)


def test_a_peft_config_with_some_layers_and_a_module_trained_whole(train, tmp_path):
    """As PEFT saved it, for inference and another base: N_L counts its layers, and what is in none always trains."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 1, 3], modules_to_save=["lm_head"])
    config.inference_mode, config.base_model_name_or_path = True, "another/model"
    config.save_pretrained(tmp_path)
    options = {"peft_config": tmp_path / "adapter_config.json", "lora_r": None, "lora_alpha": None}
    assert train(**options, trained_layers=1, save_steps=10) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["layer_counts"] == {"n_layers": 3, "trained": 1, "kept": 2}
    assert [name.rsplit(".", 1)[1] for name in record["layers"]] == ["0", "1", "3"]
    assert record["configuration"]["adapter"]["r"] == 2
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert sum("lora_" in name for name in saved) == 3 * 2
    assert any("lm_head" in name for name in saved)
    config.r = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"another configuration: adapter.r \(2 there, 3 here\)"):
        train(**options, trained_layers=1, output_dir=tmp_path / "new",
              resume_from_checkpoint=tmp_path / "run/checkpoints/step_000010")  # fmt: skip


ADALORA = {"peft_type": "ADALORA", "target_modules": TARGETS, "init_r": 6, "target_r": 2}


@pytest.mark.parametrize("step", [3, 12, 17])  # before the first allocation, between two, in the final phase
def test_adalora_resumes_exactly(train, tmp_path, step):
    (tmp_path / "peft.json").write_text(json.dumps({**ADALORA, "tinit": 4, "tfinal": 5, "deltaT": 5}))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "trained_layers": 2}
    assert train(**options, output_dir=tmp_path / "whole", save_steps=step) == 0
    checkpoint = tmp_path / f"whole/checkpoints/step_{step:06d}"
    assert train(**options, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint) == 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "resumed")
    one, two = (
        json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())["rank_pattern"]
        for name in ("whole", "resumed")
    )
    assert one == two
    assert 0 < sum(sum(kept) for kept in one.values()) <= 2 * len(one)  # the budget


@pytest.mark.parametrize("total_step", [None, 40])
def test_the_adalora_adapter_that_is_saved_is_the_one_that_was_validated(tiny, train, tmp_path, rows, total_step):
    """Between two allocations, and in a schedule that goes on beyond the run, pruned singular values train again."""
    config = {**ADALORA, "tinit": 2, "tfinal": 0, "deltaT": 10, "target_r": 1, "total_step": total_step}
    (tmp_path / "peft.json").write_text(json.dumps(config))
    (tmp_path / "validation.json").write_text(json.dumps(rows[:8]))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "learning_rate": 2e-2}
    options |= {"validation_file": tmp_path / "validation.json", "load_best_model_at_end": True, "eval_steps": 19}
    assert train(**options, trained_layers=2) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "run/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    loss = tokens = 0.0
    for row in rows[:8]:
        encoded = encode(row, "alpaca", tokenizer, 256, False)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        loss += cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += (labels[0, 1:] != -100).sum().item()
    assert loss / tokens == pytest.approx(record["best"]["validation_loss"], abs=1e-5)


def test_what_would_train_in_bfloat16_is_refused_or_float32(train, tmp_path):
    config = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm"]}
    (tmp_path / "peft.json").write_text(json.dumps(config))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "dtype": "bfloat16"}
    with pytest.raises(UsageError, match="would train in bfloat16, where small steps are lost: pass --bf16 true"):
        train(**options)
    assert not (tmp_path / "run").exists()
    assert train(**options, bf16=True, learning_rate=1e-4) == 0
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all((tensor != 1).any() for tensor in saved.values())  # steps of 1e-4 beside 1: bfloat16 has none


@pytest.mark.parametrize("method", ["series", "parallel"])
@pytest.mark.parametrize("bf16", [False, True])
def test_series_and_parallel_adapters_on_a_bfloat16_base(train, tmp_path, method, bf16):
    assert train(peft_method=method, bottleneck_size=8, dtype="bfloat16", bf16=bf16, learning_rate=2e-2) == 0
    losses = [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "run").values()} == {torch.float32}


def test_tied_embeddings_trained_whole_are_saved(train, tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / "tied").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "tied")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "max_steps": 6}
    assert train(**options, model_name_or_path=tmp_path / "tied", save_steps=3) == 0
    assert any("embed_tokens" in name for name in adapter_of(tmp_path / "run"))


def test_a_method_that_starts_from_the_weights_is_planned_without_them(train, tmp_path):
    (tmp_path / "peft.json").write_text('{"peft_type": "SHIRA", "r": 2, "target_modules": ["q_proj"]}')
    assert train(peft_config=tmp_path / "peft.json", lora_r=None, lora_alpha=None, max_steps=4) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["layer_counts"]["n_layers"] == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VBLORA", "num_vectors": 8, "vector_length": 8}, "layers share trainable parameters"),
        ({"peft_type": "OSF", "effective_rank": 4}, "projects gradients by hooks"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny, tmp_path, config, message):
    (tmp_path / "peft.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    flags = ["--model_name_or_path", str(tiny), "--train_file", "x", "--peft_config", str(tmp_path / "peft.json")]
    args, _, _ = parse_training_arguments(flags, "")
    assert plan_layers(args, sharded=False).layers.n_layers == 4
    with pytest.raises(UsageError, match=message):
        plan_layers(args, sharded=True)


@pytest.mark.parametrize("method", ["series", "parallel"])
def test_series_and_parallel_adapters_by_name(train, tmp_path, method):
    import ist.adapters  # noqa: F401  as the model card says

    assert train(peft_method=method, bottleneck_size=8) == 0
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["peft_type"] == method.upper()
    assert saved["bottleneck_size"] == 8
    targets = {"series": ["down_proj", "up_proj"], "parallel": ["gate_proj", "up_proj"]}
    assert sorted(saved["target_modules"]) == targets[method]
    assert "import ist.adapters" in (tmp_path / "run/adapter/README.md").read_text()
    losses = [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"trained_layers": 5}, None, "got 5"),
        ({"suppression": 2}, None, "--suppression must be in [0, 1]"),
        ({}, "[{", "is not valid JSON"),
        ({}, "null", "is not valid JSON"),
        ({}, '[{"question": 1}]', "needs the columns instruction and output"),
        ({}, '[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}]', "row 1 has no answer"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(train_process, tmp_path, options, text, message):
    if text:
        (tmp_path / "rows.json").write_text(text)
        options = {**options, "train_file": tmp_path / "rows.json"}
    result = train_process(**options)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not result.stdout.strip()


def test_a_checkpoint_of_another_configuration_names_the_keys(train, tmp_path):
    assert train(max_steps=5, save_steps=5) == 0
    checkpoint = tmp_path / "run/checkpoints/step_000005"
    with pytest.raises(
        UsageError, match=r"another configuration: lora_r \(4 there, 8 here\), seed \(42 there, 1 here\)"
    ):
        train(max_steps=5, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint, seed=1, lora_r=8)
    with pytest.raises(UsageError, match=r"per_device_train_batch_size 3 cannot make up the run's global batch of 4"):
        train(max_steps=5, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint,
              per_device_train_batch_size=3)  # fmt: skip


def test_a_checkpoint_of_a_later_format_is_refused_and_one_without_a_number_is_read(train, tmp_path):
    assert train(max_steps=4, save_steps=2) == 0
    checkpoint = tmp_path / "run/checkpoints/step_000002"
    state = json.loads((checkpoint / "checkpoint.json").read_text())
    assert state.pop("format") == 1
    (checkpoint / "checkpoint.json").write_text(json.dumps(state | {"format": 2}))
    with pytest.raises(UsageError, match="has format 2, this version reads up to 1"):
        train(max_steps=4, save_steps=2, output_dir=tmp_path / "new", resume_from_checkpoint=checkpoint)
    (checkpoint / "checkpoint.json").write_text(json.dumps(state))
    options = {"output_dir": tmp_path / "new", "resume_from_checkpoint": checkpoint}
    assert train(max_steps=4, save_steps=2, **options) == 0
    assert_same_adapter(tmp_path / "new", tmp_path / "run")


def test_recipe_first_then_flags(train, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "learning_rate: 1e-3\nlora_r: 2\nlora_dropout: 0.0\nbf16: false\nlora_alpha: null\n"
    )
    assert train(config=tmp_path / "r.yaml", lora_r=3, learning_rate=None, max_steps=2, run_name=None) == 0
    configuration = json.loads((tmp_path / "run/run.json").read_text())["configuration"]
    assert configuration["learning_rate"] == 1e-3
    assert configuration["lora_r"] == 3
    assert configuration["lora_dropout"] == 0.0
    assert configuration["run_name"] == "r"
    (tmp_path / "r.yaml").write_text("learning_rates: 1e-3\n")
    with pytest.raises(UsageError, match=r"unknown key --learning_rates\. Did you mean --learning_rate"):
        train(config=tmp_path / "r.yaml")


def test_run_id_and_seed_are_filled_in(train, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert train(max_steps=2, seed=7, output_dir=tmp_path / "{seed}-{run_id}") == 0
    assert (tmp_path / "7-abc123/adapter/adapter_config.json").exists()
