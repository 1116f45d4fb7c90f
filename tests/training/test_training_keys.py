"""Keys of TrainingArguments: each does what transformers, PEFT or torch do under that name."""

import pytest
import torch
from support import read_lines
from support.runs import assert_same_adapter, cut_after
from torch import nn

from ist.training import objective
from ist.training.arguments import Arguments, parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.prepare import make_optimizer


def parsed(*flags: str) -> Arguments:
    return parse_training_arguments(["--model_name_or_path=m", "--train_file=x", "--report_to=none", *flags], "")[0]


# ------------------------------------------------------------------------------------------------------------ AdamW

ADAM = {"adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2}
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "id3")


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
