"""Optimizers by the names of transformers: as its Trainer makes them, resumed exactly, sharded or refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import NEEDS_8BIT_ON_CPU, reset_accelerate, tiny_config
from support.runs import adapter_of, assert_same_adapter, cut_after, run_on_two_ranks
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.memory import _bitsandbytes_state_bytes, storage_bytes
from ist.training.prepare import make_optimizer
from ist.training.train_arguments import (
    BITSANDBYTES_OPTIMIZERS,
    REFUSED_OPTIMIZERS,
    TORCH_OPTIMIZERS,
)

OF_BITSANDBYTES = [pytest.param(name, marks=NEEDS_8BIT_ON_CPU) for name in BITSANDBYTES_OPTIMIZERS]
SERVED = [*TORCH_OPTIMIZERS, *OF_BITSANDBYTES]


def parsed(*flags: str):
    return parse_training_arguments(["--model_name_or_path=m", "--train_file=x", "--report_to=none", *flags], "")[0]


def test_every_name_of_transformers_is_served_or_refused_with_a_reason():
    served = {*TORCH_OPTIMIZERS, *BITSANDBYTES_OPTIMIZERS}
    assert served | REFUSED_OPTIMIZERS.keys() >= {name.value for name in OptimizerNames}
    assert not served & REFUSED_OPTIMIZERS.keys()


@pytest.mark.parametrize("optim", SERVED)
def test_it_is_the_one_that_trainer_makes(optim, tmp_path):
    keys = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    model = get_peft_model(LlamaForCausalLM(tiny_config()), LoraConfig(r=4, target_modules=["q_proj"]))
    reset_accelerate()
    arguments = TrainingArguments(str(tmp_path), optim=optim, use_cpu=True, report_to=[], **keys)
    theirs = Trainer(model, arguments).create_optimizer()
    flags = [f"--{key}={value}" for key, value in keys.items()]
    ours = make_optimizer(parsed(f"--optim={optim}", *flags), [p for p in model.parameters() if p.requires_grad])
    assert type(ours) is type(theirs)
    one, two = ({k: v for k, v in each.param_groups[0].items() if k != "params"} for each in (ours, theirs))
    assert one == two


@pytest.mark.parametrize("optim", SERVED)
def test_a_run_trains_and_goes_on_exactly(train, tmp_path, optim):
    options = {"optim": optim, "max_steps": 6, "save_steps": 3, "lora_r": 128, "score_lr": 1000, "update_interval": 2}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    cut_after(3, tmp_path / "whole", tmp_path / "run")
    assert train(resume_from_checkpoint="auto", **options) == 0
    assert_same_adapter(tmp_path / "run", tmp_path / "whole")
    assert any(tensor.any() for name, tensor in adapter_of(tmp_path / "run").items() if "lora_B" in name)


@pytest.mark.parametrize("optim", ["sgd", "adagrad", "adafactor", "lion_8bit"])
def test_a_plan_is_made(train, optim, capsys):
    assert train(optim=optim, plan=True) == 0
    assert "optimizer state" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"optim": "sgd"}, {"optim": "rmsprop"}, {"loraplus_lr_ratio": 16}], ids=str)
def test_two_sharded_ranks_go_on_as_one_process(train, arguments, tmp_path, keys):
    options = {**keys, "max_steps": 8, "save_steps": 4, "lora_dropout": 0}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    checkpoint = tmp_path / "whole/checkpoints/step_000004"
    options |= {"per_device_train_batch_size": 2, "resume_from_checkpoint": checkpoint, "output_dir": tmp_path / "two"}
    run_on_two_ranks("fsdp2", arguments(**options), tmp_path)
    # Of B, which was zero: how far it has come, by either way; and by the first four steps alone.
    one, two, half = (
        torch.cat([tensor.flatten() for name, tensor in sorted(load_file(file).items()) if "lora_B" in name])
        for file in (
            *(tmp_path / name / "adapter/adapter_model.safetensors" for name in ("whole", "two")),
            checkpoint / "adapter.safetensors",
        )
    )
    assert (one - two).norm() < 1e-3 * (one - half).norm()


@pytest.mark.parametrize("optim", OF_BITSANDBYTES)
def test_a_plan_counts_the_state_of_bitsandbytes(optim):
    parameters = [torch.nn.Parameter(torch.randn(size)) for size in (100, 5000, 8192)]
    optimizer = make_optimizer(parsed(f"--optim={optim}"), parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = {id(v): v for own in optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor)}
    counted = sum(_bitsandbytes_state_bytes(optim, parameter) for parameter in parameters)
    assert counted == pytest.approx(storage_bytes(state.values()), abs=2 * 256 * 4)  # the tables that all share


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optim=lomo",), "--optim lomo is not served: it needs a training loop of its own"),
        (("--optim=adamw",), "--optim must be one of adamw_torch, .*; got adamw"),
        (("--optim=lion_8bit", "--optimizer_state=offload"), "cannot move the state of --optim lion_8bit"),
        (("--optim=paged_lion_32bit", "--optimizer_state=drop"), "cannot free the pages of --optim paged_lion_32bit"),
        (("--optim=adagrad", "--optimizer_state=drop"), "adagrad makes its state once"),
        (("--optim=sgd", "--selection=id3"), "--optim sgd keeps moments of masked weights"),
    ],
)
def test_what_does_not_go_together(flags, message):
    with pytest.raises(UsageError, match=message):
        parsed(*flags)
