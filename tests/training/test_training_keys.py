"""Keys of TrainingArguments: each does what transformers, PEFT or torch do under that name."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import NEEDS_8BIT_ON_CPU, read_lines
from support.runs import adapter_of, assert_same_adapter, cut_after, run_on_two_ranks, without_times
from torch import nn
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, get_scheduler

from ist.training import environment, objective
from ist.training.arguments import Arguments, parse_training_arguments
from ist.training.checkpoints import Progress
from ist.training.command_line import UsageError
from ist.training.data import GlobalBatches
from ist.training.prepare import make_optimizer, make_scheduler, require_schedule_of_rates


def parsed(*flags: str) -> Arguments:
    return parse_training_arguments(["--model_name_or_path=m", "--train_file=x", "--report_to=none", *flags], "")[0]


# ------------------------------------------------------------------------------------------------------------ AdamW

ADAM = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2}
OPTIMIZERS = (
    "adamw_torch",
    "adamw_torch_fused",
    *(pytest.param(optim, marks=NEEDS_8BIT_ON_CPU) for optim in ("adamw_8bit", "paged_adamw_8bit")),
    "id3",
)


@pytest.mark.parametrize("key", ADAM)
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_takes_the_adam_keys(optim, key):
    selection = ("--selection=id3",) if optim == "id3" else (f"--optim={optim}",)
    flags = (f"--{key}={ADAM[key]}", "--learning_rate=0.1", "--weight_decay=0.1")
    start = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    ours, theirs, default = (nn.Parameter(start.clone()) for _ in range(3))
    values = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, key: ADAM[key]}
    betas, eps = (values["adam_beta1"], values["adam_beta2"]), values["adam_epsilon"]
    optimizers = {
        ours: make_optimizer(parsed(*selection, *flags), [ours]),
        theirs: torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1, betas=betas, eps=eps),
        default: torch.optim.AdamW([default], lr=0.1, weight_decay=0.1),
    }
    if optim == "id3":
        optimizers[ours].choose(ours, torch.arange(ours.numel()))
    for step in range(5):
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(step + 1))
        for parameter, optimizer in optimizers.items():
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, default, rtol=1e-3, atol=1e-4)  # the comparison can tell


def test_8bit_optimizers_on_a_cpu_need_a_newer_bitsandbytes(train, monkeypatch):
    monkeypatch.setattr(environment, "version", lambda name: "0.49.2")
    with pytest.raises(UsageError, match=r"--optim adamw_8bit on a CPU needs bitsandbytes 0.50 or newer; 0.49.2 is"):
        train(optim="adamw_8bit")


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", pytest.param("adamw_8bit", marks=NEEDS_8BIT_ON_CPU)]
)
def test_loraplus_trains_b_faster(train, tmp_path, optim):
    """AdamW's first step is the learning rate times a sign, and of A, while B is zero, nothing."""
    options = {"max_steps": 1, "warmup_steps": 0, "lora_dropout": 0, "selection": "all", "optim": optim}
    assert train(output_dir=tmp_path / "plain", **options) == 0
    for ratio in (1, 8):
        assert train(output_dir=tmp_path / str(ratio), loraplus_lr_ratio=ratio, **options) == 0
    plain, one, eight = (load_file(tmp_path / f"{name}/adapter/adapter_model.safetensors") for name in ("plain", 1, 8))
    for name, tensor in plain.items():
        assert torch.equal(one[name], tensor)
        assert torch.allclose(eight[name], tensor * (8 if "lora_B" in name else 1), rtol=1e-4, atol=0)
        assert tensor.any()


def test_loraplus_goes_on_exactly(train, tmp_path):
    """With layers that rest; on sharded ranks: test_optimizers.py."""
    options = {"loraplus_lr_ratio": 16, "max_steps": 8, "save_steps": 4, "weight_decay": 0.1}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    cut_after(4, tmp_path / "whole", tmp_path / "run")
    assert train(resume_from_checkpoint="auto", **options) == 0
    assert_same_adapter(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loraplus_lr_ratio=0.5",), r"--loraplus_lr_ratio must be a finite number, 1 or more; got 0\.5"),
        (("--loraplus_lr_ratio=16", "--peft_method=none"), "--loraplus_lr_ratio .* --peft_method none has none"),
        (("--loraplus_lr_ratio=16", "--selection=id3"), "--loraplus_lr_ratio .* --selection id3 has none"),
    ],
)
def test_loraplus_is_for_lora(flags, message):
    with pytest.raises(UsageError, match=message):
        parsed(*flags)


def test_loraplus_is_not_for_other_methods(train):
    with pytest.raises(UsageError, match=r"--loraplus_lr_ratio 16 is for .* SERIES has others"):
        train(loraplus_lr_ratio=16, peft_method="series")


@pytest.mark.parametrize("flag", ["adam_beta1=1", "adam_beta1=-0.1", "adam_beta2=nan", "adam_epsilon=0"])
def test_adam_keys_out_of_range(flag):
    with pytest.raises(UsageError, match=f"--{flag.split('=')[0]} must be .*; got {flag.split('=')[1]}"):
        parsed(f"--{flag}")


def test_a_run_goes_on_with_its_own_adam_keys_alone(train, tmp_path):
    assert train(max_steps=2, save_steps=2, **ADAM) == 0
    with pytest.raises(UsageError, match=r"adam_beta2 \(0\.9 there, 0\.999 here\), adam_epsilon \(0\.01 there, 1e-08"):
        train(max_steps=4, resume_from_checkpoint="auto", adam_beta1=0.5)
    assert train(max_steps=4, resume_from_checkpoint="auto", **ADAM) == 0


# ------------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("packing", [False, True])
def test_the_validation_loss_does_not_depend_on_its_batch(train, tmp_path, monkeypatch, packing):
    sizes, plain = set(), objective.micro_batches
    monkeypatch.setattr(objective, "micro_batches", lambda *args: sizes.add(args[2]) or plain(*args))
    options = {"validation_size": 10, "eval_steps": 2, "max_steps": 4, "save_steps": 2, "packing": packing}
    lines = {}
    for size in (None, 3, 16):
        sizes.clear()
        assert train(output_dir=tmp_path / str(size), per_device_eval_batch_size=size, **options) == 0
        assert sizes == {4, size or 4}
        lines[size] = read_lines(tmp_path / str(size) / "metrics.jsonl")
    for size in (3, 16):
        for line, default in zip(lines[size], lines[None], strict=True):
            assert line.get("loss") == default.get("loss")
            assert line.get("validation_loss", 0) == pytest.approx(default.get("validation_loss", 0), rel=1e-6)
    cut_after(2, tmp_path / "3", tmp_path / "cut")
    again = {"output_dir": tmp_path / "cut", "resume_from_checkpoint": "auto"}
    assert train(**again, per_device_eval_batch_size=16, **options) == 0
    assert_same_adapter(tmp_path / "cut", tmp_path / "16")


# ---------------------------------------------------------------------------------------------------- learning rates

SCHEDULES = {
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "warmup_stable_decay": {"num_decay_steps": 3, "decay_type": "linear", "min_lr_ratio": 0.1},
    "polynomial": {"power": 2, "lr_end": 1e-3},
    "inverse_sqrt": {"timescale": 4},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_those_of_transformers(name):
    flags = (f"--lr_scheduler_type={name}", f"--lr_scheduler_kwargs={json.dumps(SCHEDULES[name])}", "--warmup_steps=2")
    args = parsed(*flags, "--learning_rate=5e-3")
    require_schedule_of_rates(args, 10)
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-3) for _ in range(3)]
    ours = make_scheduler(args, optimizers[0], 10)
    theirs = get_scheduler(name, optimizers[1], 2, 10, SCHEDULES[name])
    linear = get_scheduler("linear", optimizers[2], 2, 10)
    rates = [[], [], []]
    for _ in range(10):
        for schedule, seen in zip((ours, theirs, linear), rates, strict=True):
            seen += schedule.get_last_lr()
            schedule.optimizer.step()
            schedule.step()
    assert rates[0] == rates[1] != rates[2]


def test_a_schedule_with_arguments_resumes_exactly(train, tmp_path):
    recipe = tmp_path / "recipe.yaml"  # YAML reads 5e-4 as a text
    recipe.write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 5e-4}\n")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"config": recipe, "max_steps": 6, "save_steps": 3}
    assert train(output_dir=whole, **options) == 0
    lines = read_lines(whole / "metrics.jsonl")
    schedule = get_scheduler(
        "cosine_with_min_lr", torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-3), 2, 6, {"min_lr": 5e-4}
    )
    assert [line["learning_rate"] for line in lines] == [5e-3 * schedule.lr_lambdas[0](step) for step in range(6)]
    cut_after(3, whole, cut)
    with pytest.raises(UsageError, match=r'lr_scheduler_kwargs \({"min_lr": 0\.0005} there, {"min_lr_rate": 0\.1}'):
        train(output_dir=cut, resume_from_checkpoint="auto", lr_scheduler_kwargs='{"min_lr_rate": 0.1}', **options)
    assert train(output_dir=cut, resume_from_checkpoint="auto", **options) == 0
    assert_same_adapter(cut, whole)
    assert [line["learning_rate"] for line in read_lines(cut / "metrics.jsonl")] == [
        line["learning_rate"] for line in lines
    ]


BAD_SCHEDULES = (
    ("linear", '{"min_lr": 1e-5}', "cannot be used: .*min_lr"),
    ("constant", '{"num_cycles": 2}', "takes no arguments"),
    ("warmup_stable_decay", None, "cannot be used: .*num_decay_steps"),
    ("warmup_stable_decay", '{"num_decay_steps": "many"}', "cannot be used"),
    ("cosine_with_min_lr", '{"min_lr": 1}', "learning rate after .* steps is .* from 0 to --learning_rate 0.005"),
    ("cosine_with_min_lr", '{"min_lr_rate": NaN}', "must be a JSON object of finite numbers"),
    ("polynomial", '{"power": -1}', "cannot be used|learning rate after"),
    ("cosine", "[1]", "must be a JSON object"),
    ("cosine", "{", "must be a JSON object"),
)


@pytest.mark.parametrize(("name", "kwargs", "message"), BAD_SCHEDULES)
def test_a_schedule_that_cannot_be_is_refused(train, tmp_path, monkeypatch, name, kwargs, message):
    monkeypatch.setattr("train_ist.prepare", None)
    with pytest.raises(UsageError, match=message) as error:
        train(lr_scheduler_type=name, lr_scheduler_kwargs=kwargs)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------- validations and saves


@pytest.mark.parametrize(("n_rows", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1), (7, 5)])
def test_an_epoch_ends_where_its_last_row_is(n_rows, batch_size):
    stream, places = GlobalBatches(n_rows, batch_size, 1), []
    for step in range(20):
        before = len(places) // n_rows
        places += stream.rows(step)
        whole = len(places) // n_rows
        assert all({*places[i * n_rows : (i + 1) * n_rows]} == {*range(n_rows)} for i in range(whole))
        assert stream.ends_epoch(step + 1) == (whole > before)


def test_validations_and_saves_at_the_ends_of_epochs(train, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"validation_size": 10, "per_device_train_batch_size": 16, "num_train_epochs": 2.5, "max_steps": -1}
    options |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    assert train(output_dir=whole, **options) == 0
    # 50 rows in batches of 16: 64, 112 and (the run's end) 128 of them.
    validated = [line["step"] for line in read_lines(whole / "metrics.jsonl") if "validation_loss" in line]
    assert validated == [0, 4, 7, 8]
    saved = sorted(int(path.name.removeprefix("step_")) for path in (whole / "checkpoints").iterdir())
    assert saved == [4, 7, 8]
    cut_after(4, whole, cut)
    (cut / "recipe.yaml").write_text("save_strategy: no\n")  # where and how a run saves is free; YAML's no is false
    recipe = {"config": cut / "recipe.yaml", "resume_from_checkpoint": "auto"}
    assert train(output_dir=cut, **recipe, **{k: v for k, v in options.items() if k != "save_strategy"}) == 0
    assert_same_adapter(cut, whole)
    assert without_times(read_lines(cut / "metrics.jsonl")) == without_times(read_lines(whole / "metrics.jsonl"))


VALIDATED = "--validation_size=4"
STRATEGIES = (
    (("--eval_strategy=epoch",), "--eval_strategy epoch needs --validation_file"),
    (("--eval_strategy=steps", VALIDATED), "--eval_strategy steps needs --eval_steps N"),
    (("--eval_strategy=epoch", "--eval_steps=4", VALIDATED), "epoch and --eval_steps 4 are both given"),
    (("--eval_strategy=no", "--eval_steps=4", VALIDATED), "no and --eval_steps 4 are both given"),
    (("--save_strategy=steps",), "--save_strategy steps needs --save_steps N"),
    (("--save_strategy=epoch", "--save_steps=4"), "epoch and --save_steps 4 are both given"),
    (("--save_strategy=best",), "must be one of no, steps, epoch; got best"),
    (("--load_best_model_at_end=true", VALIDATED), "needs --eval_steps, or --eval_strategy epoch"),
)


@pytest.mark.parametrize(("flags", "message"), STRATEGIES)
def test_strategies_that_do_not_go_together(flags, message):
    with pytest.raises(UsageError, match=message):
        parsed(*flags)


def test_steps_are_the_strategy_where_they_are_given():
    args = parsed("--eval_steps=4", VALIDATED)
    assert (args.eval_strategy, args.save_strategy) == ("steps", "no")


# ----------------------------------------------------------------------------------------------------- early stopping


def early_stop(losses: list[float], patience: int, threshold: float) -> int | None:
    """After how many validations transformers' callback stops; the Trainer notes the best loss after each."""
    callback, state, control = EarlyStoppingCallback(patience, threshold), TrainerState(), TrainerControl()
    args = SimpleNamespace(greater_is_better=False, metric_for_best_model="loss")
    for i, loss in enumerate(losses, 1):
        callback.on_evaluate(args, state, control, {"eval_loss": loss})
        state.best_metric = loss if state.best_metric is None else min(loss, state.best_metric)
        if control.should_training_stop:
            return i
    return None


@pytest.mark.parametrize("threshold", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("patience", [1, 2, 5])
def test_early_stopping_counts_as_transformers_does(patience, threshold):
    draw = random.Random(0)
    for _ in range(50):
        losses = [draw.randrange(12) / 4 for _ in range(12)]  # with ties, and steps of just the threshold
        progress, stopped = Progress(), None
        for i, loss in enumerate(losses, 1):
            progress.validation_loss = loss
            progress.count_improvement(threshold)
            if stopped is None and progress.stops_early(patience):
                stopped = i
        assert stopped == early_stop(losses, patience, threshold)
        assert not progress.stops_early(None)


def test_a_run_that_stops_early_is_finished_and_resumes_exactly(train, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"validation_size": 10, "eval_steps": 1, "early_stopping_patience": 3, "load_best_model_at_end": True}
    options |= {"learning_rate": 0.5, "lr_scheduler_type": "constant", "save_steps": 1}
    assert train(output_dir=whole, **options) == 0
    run = json.loads((whole / "run.json").read_text())
    losses = [line["validation_loss"] for line in read_lines(whole / "metrics.jsonl") if "validation_loss" in line]
    stopped = early_stop(losses[1:], 3, 0.0)
    assert (run["status"], run["stopped_early"], run["steps"]) == ("finished", stopped, stopped)
    assert len(losses) == 1 + stopped < 20
    best = run["best"]["step"]
    assert losses[best] == min(losses[1:])
    saved = load_file(whole / f"checkpoints/step_{best:06d}/adapter.safetensors")
    saved, adapter = {name.replace(".default", ""): tensor for name, tensor in saved.items()}, adapter_of(whole)
    assert adapter.keys() == saved.keys()
    assert all(torch.equal(adapter[name], saved[name]) for name in adapter)
    for step in (stopped - 1, stopped):  # two of the three are counted in the checkpoint; all of them, and none is left
        cut_after(step, whole, cut)
        assert train(output_dir=cut, resume_from_checkpoint="auto", **options) == 0
        again = json.loads((cut / "run.json").read_text())
        assert (again["status"], again["stopped_early"], again["best"]) == ("finished", stopped, run["best"])
        assert without_times(read_lines(cut / "metrics.jsonl")) == without_times(read_lines(whole / "metrics.jsonl"))
        assert_same_adapter(cut, whole)
        shutil.rmtree(cut)


@pytest.mark.slow
def test_two_sharded_ranks_stop_early_as_one_process(train, arguments, tmp_path):
    options = {"validation_size": 10, "eval_steps": 1, "early_stopping_patience": 2, "load_best_model_at_end": True}
    options |= {"learning_rate": 0.1, "lr_scheduler_type": "constant", "save_steps": 1, "lora_dropout": 0}
    assert train(output_dir=tmp_path / "one", **options) == 0
    two = {"output_dir": tmp_path / "two", "per_device_train_batch_size": 2}
    run_on_two_ranks("fsdp2", arguments(**options, **two), tmp_path)
    one, two = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two"))
    assert one["stopped_early"] == two["stopped_early"] == one["steps"] < 20
    assert one["best"]["step"] == two["best"]["step"]


EARLY = (
    ({"early_stopping_patience": 0, "validation_size": 4, "eval_steps": 1}, "must be 1 or more; got 0"),
    ({"early_stopping_patience": 2}, "--early_stopping_patience needs --validation_file"),
    ({"early_stopping_patience": 2, "validation_size": 4}, "needs --eval_steps, or --eval_strategy epoch"),
    ({"early_stopping_threshold": 0.1}, "--early_stopping_threshold needs --early_stopping_patience"),
    ({"early_stopping_threshold": "nan"}, "must be a finite number, 0 or more; got nan"),
)


@pytest.mark.parametrize(("keys", "message"), EARLY)
def test_early_stopping_needs_validations(keys, message):
    with pytest.raises(UsageError, match=message):
        parsed(*(f"--{key}={value}" for key, value in keys.items()))


# ----------------------------------------------------------------------------------------------------------- NEFTune


def test_noise_is_of_training_alone_and_the_same_on_resume(train, tmp_path):
    plain, noisy, cut = (tmp_path / name for name in ("plain", "noisy", "cut"))
    # The first step's learning rate is 0: the losses at step 1 are those of the weights to begin with.
    options = {"validation_size": 6, "eval_steps": 1, "max_steps": 4, "update_interval": 1, "save_steps": 2}
    assert train(output_dir=plain, **options) == 0
    options["neftune_noise_alpha"] = 5
    assert train(output_dir=noisy, **options) == 0
    (ours, theirs) = ([line for line in read_lines(run / "metrics.jsonl")] for run in (noisy, plain))
    key = "validation_loss"
    assert [line[key] for line in ours if key in line][:2] == [line[key] for line in theirs if key in line][:2]
    assert ours[1]["loss"] != theirs[1]["loss"]
    probed = [read_lines(run / "importance.jsonl")[0] for run in (noisy, plain)]
    assert probed[0]["step"] == 1
    assert probed[0]["losses"] == probed[1]["losses"]
    cut_after(2, noisy, cut)
    assert train(output_dir=cut, resume_from_checkpoint="auto", **options) == 0
    assert_same_adapter(cut, noisy)
    assert without_times(read_lines(cut / "metrics.jsonl")) == without_times(ours)


@pytest.mark.slow
def test_noise_on_two_ranks_is_the_same_on_resume(arguments, tmp_path):
    options = {"neftune_noise_alpha": 5, "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2}
    run_on_two_ranks("ddp", arguments(output_dir=tmp_path / "whole", **options), tmp_path)
    cut_after(2, tmp_path / "whole", tmp_path / "cut")
    run_on_two_ranks("ddp", arguments(output_dir=tmp_path / "cut", resume_from_checkpoint="auto", **options), tmp_path)
    assert_same_adapter(tmp_path / "cut", tmp_path / "whole")
    options["neftune_noise_alpha"] = None
    run_on_two_ranks("ddp", arguments(output_dir=tmp_path / "plain", **options), tmp_path)
    noisy, plain = (read_lines(tmp_path / name / "metrics.jsonl")[0] for name in ("whole", "plain"))
    assert noisy["loss"] != plain["loss"]


@pytest.mark.parametrize("flags", [("--neftune_noise_alpha=0",), ("--neftune_noise_alpha=5", "--packing=true")])
def test_noise_that_cannot_be(flags):
    with pytest.raises(UsageError, match=r"--neftune_noise_alpha (must be|scales its noise)"):
        parsed(*flags)
