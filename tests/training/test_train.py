"""train_ist.py as a whole: equal to plain PEFT, exact on resume, safe in a crash, and clear about bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import read_lines, tiny_config
from support.runs import TARGETS, adapter_of, assert_same_adapter, cut_after, without_times
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ist.loss import token_loss_sum
from ist.sampler import seeded_generator
from ist.training.command_line import UsageError
from ist.training.data import GlobalBatches
from ist.training.encoding import encode
from ist.training.objective import neftune_post_forward_hook  # transformers' own, wherever it stands there


def plain_peft_loop(
    tiny: Path, rows: list[dict], steps: int, dropout: float, neftune: float | None
) -> tuple[dict, list[float]]:
    """Plain LoRA, written without ist's loop: (adapter by name, loss of every step)."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(42)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    if neftune:
        model.get_input_embeddings().neftune_noise_alpha = neftune
        model.get_input_embeddings().register_forward_hook(neftune_post_forward_hook)
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


@pytest.mark.parametrize(("dropout", "neftune"), [(0.0, None), (0.1, None), (0.1, 5)])
def test_every_layer_trained_is_plain_peft_bit_for_bit(train, tiny, rows, tmp_path, dropout, neftune):
    expected, losses = plain_peft_loop(tiny, rows, 20, dropout, neftune)
    arms = {
        "all": {"selection": "all"},
        "ist": {"selection": "ist", "trained_layers": "all", "suppression": 1},
        "other": {"selection": "random"} if neftune is None else {"selection": "all", "neftune_noise_alpha": 4},
    }
    for name, options in arms.items():
        options = {"lora_dropout": dropout, "neftune_noise_alpha": neftune, **options}
        assert train(output_dir=tmp_path / name, **options) == 0
        logged = [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl")]
        adapter = adapter_of(tmp_path / name)
        assert adapter.keys() == expected.keys()
        same = all(torch.equal(adapter[key], expected[key]) for key in expected)
        assert same == (name != "other")  # the comparison can tell
        assert (logged == losses) == (name != "other")


def test_a_run_leaves_the_files_of_the_readme(train, tiny, tmp_path):
    assert train(validation_size=8, eval_steps=10, save_steps=10, lora_dropout=0) == 0
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *("adapter", "checkpoints", "metrics.jsonl", "importance.jsonl", "importance.png", "loss.png", "run.json")
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
        # Of the steps before the update, from the layers that metrics.jsonl has for them.
        layers = [line["trained_layers"] for line in lines if "loss" in line and line["step"] <= update["step"]]
        shares = np.bincount(np.concatenate(layers), minlength=4) / update["step"]
        assert update["effective_layers"] == pytest.approx(1 / (shares**2).sum())
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
    assert (whole - in_parts).norm() < 1e-5 * whole.norm()  # float32: another order of sums


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
