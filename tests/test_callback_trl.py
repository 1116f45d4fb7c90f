"""ISTCallback in TRL's trainers: layers rest, and probes measure the trainer's own loss, as its `evaluate` gives it."""

import contextlib
import copy
import json
import os
import runpy
import subprocess
import sys

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from support import ROOT, read_lines, reset_accelerate, warm_python
from support.callback_run import preference
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from ist import ISTCallback, ISTConfig
from ist.probe import probe_rows
from ist.selection import RULES

IST = {"update_interval": 4, "score_lr": 1000, "trained_layers": 1, "probe_batch_size": 5}
IST |= {"uniform_candidates": True}  # else two of three sets may be the same
BETA = 0.25
OLD = trl.__version__.startswith("0.")


def columns(kind: str, rows: list[dict]) -> Dataset:
    prompts, answers = [f"{row['instruction']} " for row in rows], [row["output"] for row in rows]
    others = answers[7:] + answers[:7]
    match kind:
        case "sft":
            return Dataset.from_dict({"prompt": prompts, "completion": answers})
        case "dpo" | "reward":
            return Dataset.from_dict({"prompt": prompts, "chosen": answers, "rejected": others})
        case "kto":
            right = [i % 3 > 0 for i in range(len(rows))]
            given = [answer if good else other for good, answer, other in zip(right, answers, others, strict=True)]
            return Dataset.from_dict({"prompt": prompts, "completion": given, "label": right})
    return Dataset.from_dict({"prompt": prompts})


TRAINERS = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "reward": (RewardTrainer, RewardConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {"beta": 0.1, "num_generations": 4, "max_completion_length": 8,
                                       "reward_funcs": lambda completions, **_: [float(len(c)) for c in completions]}),
}  # fmt: skip


def make(kind, tiny, rows, folder, callback=None, model=None, dataset=None, **options):
    """A trainer of TRL's with LoRA on the tiny model; gradient checkpointing is on, as TRL's default has it."""
    reset_accelerate()
    trainer_class, config_class, own = TRAINERS[kind]
    own = {**own, **options}
    functions = {key: own.pop(key) for key in ("reward_funcs", "peft_config") if key in own}
    arguments = {"per_device_train_batch_size": 2, "max_steps": 20, "learning_rate": 5e-3, "logging_steps": 5}
    arguments |= {"report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    if kind == "grpo":
        arguments["per_device_train_batch_size"] = 4
    if model is None:
        functions.setdefault("peft_config", peft_config())
        set_seed(42)
        if kind == "reward":
            model = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
            functions["peft_config"].task_type = "SEQ_CLS"
        else:
            model = AutoModelForCausalLM.from_pretrained(tiny)
    return trainer_class(
        model=model,
        args=config_class(output_dir=str(folder), **(arguments | own)),
        train_dataset=columns(kind, rows) if dataset is None else dataset,
        processing_class=AutoTokenizer.from_pretrained(tiny),
        callbacks=[callback] if callback else None,
        **functions,
    )


def peft_config() -> LoraConfig:
    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")


def trained_adapter(tiny) -> torch.nn.Module:
    """A PEFT model whose adapter responds: DPO's reference is then a copy of it, not the base model."""
    set_seed(42)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), peft_config())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class Watch(TrainerCallback):
    """At each step: layers with gradients, layers that changed, and layers that the callback drew."""

    def __init__(self, callback: ISTCallback) -> None:
        self.callback, self.steps = callback, []

    def _weights(self) -> list[list[torch.Tensor]]:
        return [[p.detach().clone() for p in layer] for layer in self.callback.tuner.layers.parameters]

    def on_train_begin(self, *args, **kwargs):
        self.callback.tuner.layers.blocks[0].register_forward_pre_hook(self.see)

    def see(self, layer, args):
        """The backward ends at the lowest layer that trains, and not at the embeddings."""
        assert not (torch.is_grad_enabled() and args[0].requires_grad)

    def on_step_begin(self, *args, **kwargs):
        self.before = self._weights()

    def on_pre_optimizer_step(self, *args, **kwargs):
        layers = self.callback.tuner.layers.parameters
        self.with_gradient = [i for i, layer in enumerate(layers) if any(p.grad is not None for p in layer)]

    def on_step_end(self, *args, **kwargs):
        pairs = enumerate(zip(self.before, self._weights(), strict=True))
        changed = [i for i, (old, new) in pairs if not all(map(torch.equal, old, new))]
        self.steps.append((self.with_gradient, changed, self.callback.tuner.trained))


def train_watched(trainer, callback) -> list[list[int]]:
    """The layers of each step, having seen that they alone had gradients and changed."""
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train()
    watched = callback.tuner.layers.blocks[0]
    assert not any(module._forward_pre_hooks for module in trainer.model.modules() if module is not watched)
    for with_gradient, changed, drawn in watch.steps:
        assert with_gradient == changed == drawn
    return [drawn for *_, drawn in watch.steps]


@contextlib.contextmanager
def scaled(model, gates: list[float]):
    """The responses of each layer's adapter "default" times its gate, by LoRA's own scaling."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    before = [module.scaling["default"] for _, module in modules]
    for (name, module), scaling in zip(modules, before, strict=True):
        module.scaling["default"] = scaling * gates[int(name.split(".layers.")[1].split(".")[0])]
    yield
    for (_, module), scaling in zip(modules, before, strict=True):
        module.scaling["default"] = scaling


def own_loss(trainer, indices: list[int], gates: list[float]) -> float:
    """`eval_loss` of Trainer.evaluate on these rows of the training set, as TRL has prepared them."""
    with scaled(trainer.model, gates):
        return Trainer.evaluate(trainer, trainer.train_dataset.select(indices))["eval_loss"]


def metrics(trainer) -> dict:
    """A copy of what TRL collects for the next line of the log: by these names in all its versions."""
    names = ("_metrics", "_stored_metrics", "_total_train_tokens")
    return copy.deepcopy({name: value for name, value in vars(trainer).items() if name in names})


CASES = {
    "nll": ("sft", {"per_device_eval_batch_size": 6}),
    "dft": ("sft", {"loss_type": "dft", "per_device_eval_batch_size": 6}),
    "smoothed": ("sft", {"label_smoothing_factor": 0.2, "per_device_eval_batch_size": 6}),
    "dpo": ("dpo", {"per_device_eval_batch_size": 3}),
    "dpo, accumulated": ("dpo", {"gradient_accumulation_steps": 2, "max_steps": 8, "gradient_checkpointing": False}),
    "dpo of an adapter": ("dpo", {"max_steps": 8, "learning_rate": 1e-3}),
    "dpo, computed before": ("dpo", {"precompute_ref_log_probs": True, "max_steps": 5}),
    "kto": ("kto", {"per_device_eval_batch_size": 2}),
    "reward": ("reward", {"max_steps": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_probes_measure_the_trainers_own_loss(tiny, rows, tmp_path, case):
    kind, options = CASES[case]
    if OLD and "precompute_ref_log_probs" in options:
        pytest.skip(f"TRL {trl.__version__} cannot evaluate rows whose reference was computed before")
    model = trained_adapter(tiny) if case == "dpo of an adapter" else None
    trainer = make(kind, tiny, rows, tmp_path, model=model, **options)
    callback = ISTCallback(ISTConfig(**IST), trainer=trainer)
    trainer.add_callback(callback)
    assert len({layer for (layer,) in train_watched(trainer, callback)}) > 1
    updates = read_lines(tmp_path / "importance.jsonl")
    assert [update["step"] for update in updates] == list(range(4, trainer.args.max_steps, 4))
    assert max(map(abs, updates[-1]["scores"])) > 1e-3
    assert OLD or ("ref" in trainer.model.peft_config) == (case == "dpo of an adapter")

    logged = metrics(trainer)
    update = callback.tuner.update_importance(20)
    assert metrics(trainer) == logged
    indices = probe_rows(len(rows), 5, 42, 20)
    for kept, loss in zip(update["candidates"], update["losses"], strict=True):
        gates = [1.0 if i in kept else BETA for i in range(4)]
        assert loss == pytest.approx(own_loss(trainer, indices, gates), abs=1e-5)
    assert max(update["losses"]) - min(update["losses"]) > 1e-4  # 1e-5 tells them apart
    callback.tuner.config.suppression = 1.0  # everything is kept
    whole = callback.tuner.update_importance(20)["losses"]
    assert whole == pytest.approx([own_loss(trainer, indices, [1.0] * 4)] * 3, abs=1e-5)


def test_effects_are_derivatives_of_the_trainers_own_loss(tiny, rows, tmp_path):
    """score_rule expected, whose backward through checkpoints comes after DPO's reference has let all layers train."""
    trainer = make("dpo", tiny, rows, tmp_path, max_steps=8)
    callback = ISTCallback({**IST, "score_rule": "expected", "score_lr": None}, trainer=trainer)
    trainer.add_callback(callback)
    train_watched(trainer, callback)
    assert max(map(abs, callback.tuner.rule.scores.tolist())) > 0
    update = callback.tuner.update_importance(20)
    indices, gate, difference = probe_rows(len(rows), 5, 42, 20), 0.5 + 0.5 * BETA, 0.02
    loss = own_loss(trainer, indices, [gate] * 4)
    assert update["losses"] == pytest.approx([loss], abs=1e-5)
    slopes = []
    for layer in range(4):
        up, down = (
            own_loss(trainer, indices, [gate + sign * difference * (i == layer) for i in range(4)]) for sign in (1, -1)
        )
        slopes.append((up - down) / (2 * difference))
    worth = torch.exp(torch.tensor(-loss)) * (1 - BETA) * -torch.tensor(slopes)
    assert update["effects"] == pytest.approx((worth - worth.mean()).tolist(), abs=1e-4)
    assert max(map(abs, update["effects"])) > 1e-3
    assert all(error > 0 for error in update["standard_errors"])


@pytest.mark.parametrize("rule", ["random", "gradient_norm"])
def test_layers_rest_in_grpo(tiny, rows, tmp_path, rule):
    callback = ISTCallback({"selection": rule, "trained_layers": 1})
    trainer = make("grpo", tiny, rows, tmp_path, callback)
    assert len({layer for (layer,) in train_watched(trainer, callback)}) > 1


def test_grpo_is_refused_by_name_where_the_rule_measures_losses(tiny, rows, tmp_path):
    with pytest.raises(ValueError, match=r"selection=ist measures .* the loss of GRPOConfig is one of texts"):
        make("grpo", tiny, rows, tmp_path, ISTCallback(IST)).train()
    trainer = make("grpo", tiny, rows, tmp_path)
    trainer.add_callback(ISTCallback(IST, trainer=trainer))
    for collator in (trainer.data_collator, lambda rows: {"prompt": [row["prompt"] for row in rows]}):  # as GOLD's
        trainer.data_collator = collator
        match = r"the loss of GRPOTrainer is one of .*: choose a rule that measures no losses"
        with pytest.raises(ValueError, match=match):
            trainer.train()


MEASURING = {"ist", "placebo", "semantic", "semantic+ist"}


@pytest.mark.parametrize("rule", sorted(RULES.keys() - MEASURING - {"id3"}))
def test_a_rule_that_measures_nothing_runs_in_dpo_and_on_a_stream(tiny, rows, tmp_path, rule):
    config = {"selection": rule} | ({"trained_layers": 1} if rule != "fixed" else {})
    if rule == "fixed":
        config["fixed_layers"] = [0, 2]
    if rule == "oracle":
        (tmp_path / "scores.json").write_text("[0, 1, 2, 3]")
        config["oracle_scores"] = str(tmp_path / "scores.json")
    callback = ISTCallback(config)
    drawn = train_watched(make("dpo", tiny, rows, tmp_path / "dpo", callback, max_steps=3), callback)
    callback = ISTCallback(config)
    stream = columns("sft", rows).to_iterable_dataset()
    trainer = make("sft", tiny, rows, tmp_path / "sft", callback, dataset=stream, max_steps=3)
    streamed = train_watched(trainer, callback)
    assert streamed[0] == drawn[0]
    assert rule == "gradient_norm" or streamed == drawn


def test_what_cannot_be_measured_is_refused_before_the_first_step(tiny, rows, tmp_path):
    def refused(kind, match, config=IST, by_trainer=False, **options):
        trainer = make(kind, tiny, rows, tmp_path, **options)
        trainer.add_callback(ISTCallback(config, trainer=trainer if by_trainer else None))
        with pytest.raises(ValueError, match=match):
            trainer.train()
        assert trainer.state.global_step == 0

    remedy = r"trainer\.add_callback\(ISTCallback\(config, trainer=trainer\)\) measures the Trainer's own loss"
    refused("sft", "trains by loss_type=dft: " + remedy, loss_type="dft")
    refused("sft", "trains by label_smoothing_factor=0.1: " + remedy, label_smoothing_factor=0.1)
    refused("dpo", r"trains by loss_type=(\['sigmoid'\]|sigmoid): " + remedy)
    refused("kto", "trains by loss_type=kto: " + remedy)
    stream = columns("dpo", rows).to_iterable_dataset()
    for by_trainer in (False, True):
        refused("dpo", "train_dataset must have a length .* load it whole, or choose a rule that measures no losses",
                by_trainer=by_trainer, dataset=stream)  # fmt: skip
    semantic = {"selection": "semantic"}
    refused("dpo", r"give labels \[B, T\]: selection=semantic compares", semantic, by_trainer=True)
    other = make("dpo", tiny, rows, tmp_path)
    trainer = make("dpo", tiny, rows, tmp_path)
    trainer.add_callback(ISTCallback(IST, trainer=other))
    with pytest.raises(ValueError, match="was added to another Trainer"):
        trainer.train()


class Online(Trainer):
    """As TRL's OnlineDPOTrainer: its rows are prompts, and all else happens in the step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        raise AssertionError("begun")


def test_a_trainer_whose_steps_generate_is_refused(tiny, rows, tmp_path):
    reset_accelerate()
    trainer = Online(
        model=trained_adapter(tiny),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], remove_unused_columns=False),
        train_dataset=[{"input_ids": [1, 2, 3]}] * 8,
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    )
    trainer.add_callback(ISTCallback(IST, trainer=trainer))
    with pytest.raises(ValueError, match="the loss of Online is one of texts that are generated in training"):
        trainer.train()


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_trainer_goes_on_by_its_own_loss(tiny, rows, tmp_path, restore):
    options = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}

    def run(folder, checkpoint=None):
        trainer = make("dpo", tiny, rows, tmp_path / folder, restore_callback_states_from_checkpoint=restore, **options)
        trainer.add_callback(ISTCallback(ISTConfig(**IST), trainer=trainer))
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, read_lines(tmp_path / folder / "importance.jsonl")

    whole, updates = run("whole")
    run("resumed")
    resumed, again = run("resumed", str(tmp_path / "resumed/checkpoint-6"))
    for one, two in zip(updates, again, strict=True):
        assert (one["step"], one["losses"], one["scores"]) == (two["step"], two["losses"], two["scores"])
    parameters = dict(whole.model.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in resumed.model.named_parameters())
    saved = (tmp_path / "resumed/checkpoint-12/trainer_state.json").read_text()
    assert "DPOTrainer" not in saved and '"by_trainer": true' in saved


def test_a_checkpoint_of_the_trainers_own_loss_is_not_resumed_by_labels(tiny, rows, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer = make("sft", tiny, rows, tmp_path, **options)
    trainer.add_callback(ISTCallback(IST, trainer=trainer))
    trainer.train()
    trainer = make("sft", tiny, rows, tmp_path, ISTCallback(IST), **options)
    with pytest.raises(ValueError, match=r"made with ISTCallback\(config, trainer=trainer\): resume with it"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(("name", "more"), [("sft", []), ("sft", ["dft"]), ("dpo", [])])
def test_the_examples(tiny, rows, tmp_path, monkeypatch, capsys, name, more):
    (tmp_path / "rows.json").write_text(json.dumps(columns(name, rows).to_list()))
    script = str(ROOT / f"launch/examples/{name}.py")
    monkeypatch.setattr(
        sys, "argv", [script, str(tiny), str(tmp_path / "rows.json"), str(tmp_path / "run"), "12", *more]
    )
    reset_accelerate()
    runpy.run_path(script, run_name="__main__")
    (update,) = read_lines(tmp_path / "run/importance.jsonl")
    assert update["step"] == 10 and max(map(abs, update["scores"])) > 0
    assert (tmp_path / "run/adapter/adapter_model.safetensors").exists()
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    capsys.readouterr()
    runpy.run_path(script, run_name="__main__")
    assert f"python {name}.py MODEL" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [script, "MODEL"])
    with pytest.raises(SystemExit, match=f"python {name}.py MODEL"):
        runpy.run_path(script, run_name="__main__")


def test_two_ranks_of_dpo_are_one_process(tiny, rows, tmp_path):
    (tmp_path / "one").mkdir()
    for folder in (tmp_path, tmp_path / "one"):
        (folder / "tiny").symlink_to(tiny)
        (folder / "rows.json").write_text(json.dumps(columns("dpo", rows).to_list()))
    reset_accelerate()
    reference, _ = preference(tmp_path / "one", 4, probe_batch_size=6)
    reference.train()
    command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += ["accelerate_configs/ddp.yaml", "tests/support/callback_run.py", str(tmp_path), "dpo"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": warm_python()}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (first["world_size"], first["wrapped"]) == (2, "DistributedDataParallel")
    assert first["trained"] == second["trained"] == [layers for _, layers in reference.seen]
    assert first["scores"] == second["scores"]
    ours, theirs = (read_lines(folder / "run/importance.jsonl") for folder in (tmp_path, tmp_path / "one"))
    assert [update["step"] for update in ours] == [4, 8, 12, 16]
    for one, two in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(two["losses"], abs=1e-5)
