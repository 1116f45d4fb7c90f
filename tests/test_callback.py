"""ISTCallback: the losses of train_ist.py in Trainer and SFTTrainer, the same layers on two ranks, exact resume."""

import json
import os
import subprocess

import pytest
import torch
import transformers
import wandb
from datasets import IterableDataset
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from support import ROOT, read_lines, reset_accelerate, warm_python
from support.callback_run import IST, arguments, in_order, lora, pad
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import train_ist
from ist import ISTCallback, ISTConfig
from ist.training import objective
from ist.training.packages import release


class InOrderBatches:
    """Instead of train_ist.py's permutations."""

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_size = n_rows, batch_size

    def rows(self, step: int) -> list[int]:
        return [(step * self.batch_size + i) % self.n_rows for i in range(self.batch_size)]


@pytest.fixture
def reference(train, tmp_path, monkeypatch):
    """(rows, metrics, updates) of 20 steps of train_ist.py on rows in their order."""
    seen, prepare = {}, train_ist.prepare_data
    monkeypatch.setattr(objective, "GlobalBatches", InOrderBatches)
    monkeypatch.setattr(train_ist, "prepare_data", lambda args: seen.setdefault("data", prepare(args)))
    assert train(**IST, lora_dropout=0, max_steps=20) == 0
    metrics = read_lines(tmp_path / "run/metrics.jsonl")
    return seen["data"].rows, metrics, read_lines(tmp_path / "run/importance.jsonl")


def make(trainer_class, output_dir, tiny, rows, batch_size=4, config=None, **options):
    reset_accelerate()
    sft = trainer_class is SFTTrainer
    if sft:
        options = {"bf16": False, "gradient_checkpointing": False, "dataset_kwargs": {"skip_prepare_dataset": True},
                   "loss_type": "nll", **options}  # fmt: skip
    return in_order(trainer_class)(
        model=lora(tiny),
        args=(SFTConfig if sft else TrainingArguments)(**arguments(output_dir, batch_size, **options)),
        train_dataset=rows,
        data_collator=pad,
        callbacks=[ISTCallback(config or ISTConfig(**IST))],
    )


@pytest.mark.parametrize("trainer_class", [Trainer, SFTTrainer])
def test_the_losses_are_those_of_train_ist(reference, tiny, tmp_path, trainer_class):
    rows, metrics, updates = reference
    trainer = make(trainer_class, tmp_path / "hf", tiny, rows)
    trainer.train()
    assert [layers for _, layers in trainer.seen] == [line["trained_layers"] for line in metrics]
    assert [loss for loss, _ in trainer.seen] == pytest.approx([line["loss"] for line in metrics], abs=1e-5)
    ours = read_lines(tmp_path / "hf/importance.jsonl")
    assert [update["step"] for update in ours] == [4, 8, 12, 16]
    for one, two in zip(ours, updates, strict=True):
        assert one["candidates"] == two["candidates"]
        assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    assert max(ours[-1]["scores"]) > 0.01
    assert (tmp_path / "hf/importance.png").stat().st_size > 10_000
    assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)


def test_accumulation_is_one_step(reference, tiny, tmp_path):
    rows, metrics, _ = reference
    trainer = make(Trainer, tmp_path / "hf", tiny, rows, batch_size=2, gradient_accumulation_steps=2)
    trainer.train()
    layers = [layers for _, layers in trainer.seen]
    assert layers[0::2] == layers[1::2] == [line["trained_layers"] for line in metrics]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_trainer_continues_the_scores(reference, tiny, tmp_path, restore):
    rows, _, _ = reference
    options = {"save_strategy": "steps", "save_steps": 10, "restore_callback_states_from_checkpoint": restore}
    whole = make(Trainer, tmp_path / "whole", tiny, rows, **options)
    whole.train()
    # As a crash after step 13 leaves it: a later update stands in the file.
    resumed = make(Trainer, tmp_path / "resumed", tiny, rows, **options)
    resumed.train()
    checkpoint = tmp_path / "resumed/checkpoint-10"
    resumed = make(Trainer, tmp_path / "resumed", tiny, rows, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(resumed.seen) == 10
    assert [layers for _, layers in resumed.seen] == [layers for _, layers in whole.seen[10:]]
    one, two = (read_lines(tmp_path / name / "importance.jsonl") for name in ("whole", "resumed"))
    assert [line["step"] for line in two] == [4, 8, 12, 16]
    assert [line["scores"] for line in one] == [line["scores"] for line in two]
    parameters = dict(whole.model.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in resumed.model.named_parameters())


def test_two_ranks_train_the_same_layers_and_resume(reference, tiny, tmp_path):
    rows, metrics, updates = reference
    os.symlink(tiny, tmp_path / "tiny")
    (tmp_path / "rows.json").write_text(json.dumps(rows.to_list()))
    command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/ddp.yaml", "tests/support/callback_run.py", str(tmp_path)]
    launches = [[], [str(tmp_path / "run/checkpoint-10")]]
    if release(transformers.__version__)[:2] == (5, 0):
        del launches[1]  # its Trainer cannot load what it saves of ranks on a CPU
    for arguments_ in launches:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": warm_python()}
        result = subprocess.run(
            [*command, *arguments_], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        assert result.returncode == 0, result.stderr[-3000:]
        first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
        assert first["world_size"] == 2
        assert first["wrapped"] == "DistributedDataParallel"
        assert (
            first["trained"]
            == second["trained"]
            == [line["trained_layers"] for line in metrics][-len(first["trained"]) :]
        )
        assert first["scores"] == second["scores"]
        ours = read_lines(tmp_path / "run/importance.jsonl")
        for one, two in zip(ours, updates, strict=True):
            assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
    assert len(first["trained"]) == (10 if len(launches) == 2 else 20)


class CountedStream(torch.utils.data.IterableDataset):
    """PyTorch's class has a __getitem__, which raises; some have a length as well."""

    def __len__(self):
        return 8

    def __iter__(self):
        yield {"input_ids": [1, 2], "labels": [1, 2]}


def test_what_cannot_rest_is_refused(reference, tiny, tmp_path):
    rows, _, _ = reference
    trainer = make(Trainer, tmp_path / "a", tiny, rows, torch_compile=True)
    with pytest.raises(ValueError, match="torch_compile must be false"):
        trainer.train()
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="use_reentrant"):
        make(Trainer, tmp_path / "b", tiny, rows, **reentrant).train()
    stream = IterableDataset.from_generator(lambda: iter(rows.to_list()))
    with pytest.raises(ValueError, match="train_dataset must have a length"):
        make(Trainer, tmp_path / "c", tiny, stream).train()
    with pytest.raises(ValueError, match="train_dataset must have a length"):
        make(Trainer, tmp_path / "c", tiny, CountedStream()).train()
    trainer = make(Trainer, tmp_path / "e", tiny, rows)
    trainer.data_collator = lambda batch: {key: value for key, value in pad(batch).items() if key != "labels"}
    with pytest.raises(ValueError, match=r"gives no labels \[B, T\]: trainer\.add_callback"):
        trainer.train()
    with pytest.raises(ValueError, match="id3 needs an optimizer of its own"):
        make(Trainer, tmp_path / "g", tiny, rows, config=ISTConfig(selection="id3")).train()
    trainer = make(Trainer, tmp_path / "f", tiny, rows)
    trainer.model.peft_config["default"] = AdaLoraConfig(total_step=20, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"AdaLoRA's budget needs steps of its own"):
        trainer.train()
    trainer = make(Trainer, tmp_path / "g", tiny, rows)

    def unfreeze(*_):
        for name, parameter in trainer.model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    for layer in trainer.model.get_base_model().model.layers:  # in the module, after the callback has chosen
        layer.self_attn.q_proj.lora_A["default"].register_forward_pre_hook(unfreeze)
    with pytest.raises(RuntimeError, match="a resting layer has a gradient"):
        trainer.train()
    trainer = make(Trainer, tmp_path / "d", tiny, rows)
    for name, parameter in trainer.model.named_parameters():
        if ".layers.2." in name:
            parameter.requires_grad_(False)
    trainer.create_optimizer()
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
    with pytest.raises(ValueError, match="optimizer lacks adapter parameters"):
        trainer.train()


def test_gradient_checkpointing_changes_nothing(reference, tiny, tmp_path):
    rows, metrics, _ = reference
    trainer = make(Trainer, tmp_path / "hf", tiny, rows, gradient_checkpointing=True)
    trainer.train()
    assert [loss for loss, _ in trainer.seen] == pytest.approx([line["loss"] for line in metrics], abs=1e-5)
    hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
    assert not any("make_inputs_require_grad" in getattr(hook, "__name__", "") for hook in hooks)


def test_wandb_gets_scores_and_probes(reference, tiny, tmp_path, monkeypatch):
    rows, _, updates = reference
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(key, value)
    wandb.teardown()  # of a test before this one, which may have asked for a login
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(wandb.Run, "log", lambda run, values, **kwargs: logged.append(values) or log(run, values))
    trainer = make(Trainer, tmp_path / "hf", tiny, rows, report_to=["wandb"])
    trainer.train()
    wandb.finish()
    ours = [values for values in logged if "probe/loss_0" in values]
    assert [values["train/global_step"] for values in ours] == [update["step"] for update in updates]
    for values, update in zip(ours, updates, strict=True):
        assert [values[f"importance/score/layer_{i:02d}"] for i in range(4)] == pytest.approx(
            update["scores"], abs=0.05
        )
        assert [values[f"probe/loss_{j}"] for j in range(3)] == pytest.approx(update["losses"], abs=1e-5)


def test_tensorboard_gets_scores_and_probes(reference, tiny, tmp_path, monkeypatch):
    """Through the Trainer's own callback, in its file."""
    rows, _, updates = reference
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make(Trainer, tmp_path / "hf", tiny, rows, report_to=["tensorboard"]).train()
    (file,) = (tmp_path / "board").rglob("events*")
    events = EventAccumulator(str(file.parent)).Reload()
    for i in range(4):
        found = events.Scalars(f"train/importance/score/layer_{i:02d}")
        assert [event.step for event in found] == [update["step"] for update in updates]
        assert [event.value for event in found] == pytest.approx([update["scores"][i] for update in updates], abs=0.05)
    assert events.Scalars("train/loss")


@pytest.mark.parametrize(("rule", "count"), [("paper", 4), ("released", 16)])
def test_as_many_probe_rows_as_train_ist_takes(reference, tiny, tmp_path, rule, count):
    rows, _, _ = reference
    seen = []
    config = ISTConfig(**{**IST, "probe_batch_size": None, "score_rule": rule, "candidates": 2})
    trainer = make(Trainer, tmp_path / "hf", tiny, rows, batch_size=2, config=config, gradient_accumulation_steps=2,
                   max_steps=5)  # fmt: skip
    trainer.data_collator = lambda batch: seen.append(len(batch)) or pad(batch)
    trainer.train()
    # one row to look at, five steps of two micro-batches (and what the loader fetches ahead), one update of two sets
    assert 1 + 5 * 4 + 2 * count <= sum(seen) <= 1 + 6 * 4 + 2 * count


def test_noise_on_the_embeddings_is_not_in_the_probes(reference, tiny, tmp_path):
    rows, _, _ = reference
    trainer = make(Trainer, tmp_path / "hf", tiny, rows, neftune_noise_alpha=5, learning_rate=1e-12, max_steps=5)
    trainer.train()
    (noisy,) = read_lines(tmp_path / "hf/importance.jsonl")
    trainer = make(Trainer, tmp_path / "plain", tiny, rows, learning_rate=1e-12, max_steps=5)
    trainer.train()
    (plain,) = read_lines(tmp_path / "plain/importance.jsonl")
    assert noisy["losses"] == pytest.approx(plain["losses"], abs=1e-6)


def test_a_checkpoint_of_another_configuration_and_one_without(reference, tiny, tmp_path, capsys):
    rows, _, _ = reference
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    make(Trainer, tmp_path / "hf", tiny, rows, **options).train()
    other = make(Trainer, tmp_path / "hf", tiny, rows, config=ISTConfig(**{**IST, "update_interval": 3, "seed": 7}))
    with pytest.raises(ValueError, match="made with another update_interval, seed: resume with its ISTConfig"):
        other.train(resume_from_checkpoint=str(tmp_path / "hf/checkpoint-5"))
    plain = make(Trainer, tmp_path / "without", tiny, rows, **options)
    plain.remove_callback(ISTCallback)
    plain.training_step = lambda *args, **kwargs: Trainer.training_step(plain, *args, **kwargs)
    plain.train()
    resumed = make(Trainer, tmp_path / "without", tiny, rows, **{**options, "max_steps": 10})
    resumed.train(resume_from_checkpoint=str(tmp_path / "without/checkpoint-5"))
    assert "made without ISTCallback, so scores start from zero" in capsys.readouterr().out
    assert (tmp_path / "without/checkpoint-10").exists()


@pytest.mark.parametrize(("stack", "n_layers"), [("decoder", 3), ("encoder", 2), ("both", 5)])
def test_an_encoder_decoder(tmp_path, rows, stack, n_layers):
    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_ff=64, num_layers=2, num_decoder_layers=3, num_heads=4, d_kv=8,
                      dropout_rate=0.0, decoder_start_token_id=0)  # fmt: skip
    model = get_peft_model(T5ForConditionalGeneration(config), LoraConfig(r=4, target_modules=["q", "v", "wi", "wo"]))
    data = [{"input_ids": [5 + i % 7, 9, 1], "labels": [20 + i % 7, 21, 1]} for i in range(12)]
    reset_accelerate()
    callback = ISTCallback({"update_interval": 4, "score_lr": 1000, "trained_layers": 1, "layer_stack": stack})
    trainer = in_order(Trainer)(
        model=model,
        args=TrainingArguments(**arguments(tmp_path, 4, max_steps=40, learning_rate=2e-2)),
        train_dataset=data,
        data_collator=lambda batch: {k: torch.tensor([row[k] for row in batch]) for k in ("input_ids", "labels")},
        callbacks=[callback],
    )
    trainer.train()
    assert callback.tuner.layers.n_layers == n_layers
    places = {name.split(".")[2] for name in callback.tuner.layers.names}
    assert places == ({"decoder", "encoder"} if stack == "both" else {stack})
    assert bool(callback.tuner.layers.outside) == (stack != "both")
    losses = [loss for loss, _ in trainer.seen]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert max(map(abs, callback.tuner.rule.scores.tolist())) > 0.01


@pytest.mark.parametrize("rule", ["lisa", "semantic+ist", "last"])
def test_other_rules_choose_as_in_train_ist(train, tiny, tmp_path, monkeypatch, rule):
    seen, prepare = {}, train_ist.prepare_data
    monkeypatch.setattr(objective, "GlobalBatches", InOrderBatches)
    monkeypatch.setattr(train_ist, "prepare_data", lambda args: seen.setdefault("data", prepare(args)))
    assert train(**IST, selection=rule, lora_dropout=0, max_steps=20) == 0
    metrics = read_lines(tmp_path / "run/metrics.jsonl")
    trainer = make(Trainer, tmp_path / "hf", tiny, seen["data"].rows, config=ISTConfig(**IST, selection=rule))
    trainer.train()
    assert [layers for _, layers in trainer.seen] == [line["trained_layers"] for line in metrics]
    assert [loss for loss, _ in trainer.seen] == pytest.approx([line["loss"] for line in metrics], abs=1e-5)
    if rule == "semantic+ist":
        theirs = json.loads((tmp_path / "run/run.json").read_text())["semantic"]
        ours = json.loads((tmp_path / "hf/semantic.json").read_text())
        assert ours["deviations"] == pytest.approx(theirs["deviations"])
        assert ours["boundary"] == theirs["boundary"]
