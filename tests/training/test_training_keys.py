"""Keys of TrainingArguments: each does what transformers, PEFT or torch do under that name."""

import pytest
import torch
from torch import nn

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
