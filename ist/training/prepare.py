"""The model and its optimizer as Accelerate prepares them; sharded, one rank reads the weights."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from peft import PeftConfig
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import AutoConfig, get_scheduler

from ist.distributed import broadcast_from_main, from_main, of_all_ranks, require_sharded
from ist.selection.packed_adamw import PackedAdamW
from ist.training.arguments import Arguments
from ist.training.command_line import UsageError, brief
from ist.training.files import json_digest
from ist.training.model import load_model, load_skeleton


def make_optimizer(
    args: Arguments, parameters: list[nn.Parameter], model: nn.Module | None = None
) -> torch.optim.Optimizer:
    """
    Args:
        model: whose parameters they are; LoRA+ knows them by their modules.
    """
    kind, options = _kind_of_optimizer(args)
    if args.loraplus_lr_ratio and model is not None:
        options |= {"loraplus_lr_ratio": args.loraplus_lr_ratio, "loraplus_weight_decay": args.weight_decay}
        return create_loraplus_optimizer(model, kind, **options)
    return kind(parameters, weight_decay=args.weight_decay, **options)


def _kind_of_optimizer(args: Arguments) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The class and its arguments, by transformers' own factory but for AdamW of torch."""
    if args.optim.startswith("adamw_torch"):
        options = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        options |= {"fused": True} if args.optim == "adamw_torch_fused" else {}
        return (PackedAdamW if args.selection == "id3" else torch.optim.AdamW), options
    from transformers import Trainer  # which imports much
    from transformers.training_args import OptimizerNames

    # Not TrainingArguments, which would set up the processes anew.
    keys = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon")
    asked = SimpleNamespace(
        **{key: getattr(args, key) for key in keys}, optim=OptimizerNames(args.optim), optim_args=None
    )
    return Trainer.get_optimizer_cls_and_kwargs(asked)


def warmup_steps(args: Arguments, max_steps: int) -> int:
    """Steps of linear warm-up; below 1, warmup_steps is a share of all steps."""
    return int(args.warmup_steps) if args.warmup_steps >= 1 else math.ceil(args.warmup_steps * max_steps)


def make_scheduler(args: Arguments, optimizer: torch.optim.Optimizer, max_steps: int) -> LRScheduler:
    kwargs = json.loads(args.lr_scheduler_kwargs or "{}")
    return get_scheduler(args.lr_scheduler_type, optimizer, warmup_steps(args, max_steps), max_steps, kwargs)


def require_schedule_of_rates(args: Arguments, max_steps: int) -> None:
    """Before a model is there to be trained.

    Raises:
        UsageError: the schedule does not take these lr_scheduler_kwargs, or a learning rate is out of range.
    """
    given = f"--lr_scheduler_type {args.lr_scheduler_type}"
    if args.lr_scheduler_kwargs:
        given += f" --lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        if args.lr_scheduler_type in ("constant", "constant_with_warmup"):  # which transformers would not tell
            raise UsageError(f"{given}: the schedule takes no arguments; leave out --lr_scheduler_kwargs.")
    try:
        scheduler = make_scheduler(args, torch.optim.SGD([nn.Parameter(torch.zeros(1))], args.learning_rate), max_steps)
        # Rounding may take the peak a little above 1.
        steps = range(0, max_steps + 1, max(1, max_steps // 100_000))
        wrong = [step for step in steps if not 0 <= scheduler.lr_lambdas[0](step) <= 1 + 1e-9]
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{given} cannot be used: {brief(error)}. See transformers.get_scheduler.") from error
    if wrong:
        rate = args.learning_rate * scheduler.lr_lambdas[0](wrong[0])
        raise UsageError(
            f"{given}: the learning rate after {wrong[0]} steps is {rate:g}; it must be from 0 to --learning_rate "
            f"{args.learning_rate:g}."
        )


def _load_on_main(args: Arguments, peft_config: PeftConfig | None, accelerator: Accelerator) -> nn.Module:
    """The model on the main process; on the others its shapes, whose contents come from there as Accelerate shards it.

    Every rank loads it whole where packed weights are (each to its own device), or an adapter begins from the weights,
    or PEFT makes it otherwise without them (AdaLoRA).
    """
    plugin, skeleton = accelerator.state.fsdp_plugin, None
    config = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    packed = args.load_in_4bit or getattr(config, "quantization_config", None) is not None
    if plugin.cpu_ram_efficient_loading and not packed:
        with suppress(UsageError):
            skeleton = load_skeleton(args, peft_config, config)
    shapes = None if skeleton is None or _has_other_tensors(skeleton) else skeleton
    main_alone = accelerator.is_main_process or shapes is None
    model = load_model(args, peft_config, accelerator.device) if main_alone else shapes
    from_main(lambda: None, UsageError)  # where the others wait without a time limit
    if shapes is None or len(set(of_all_ranks(_listing(model)))) > 1:
        plugin.cpu_ram_efficient_loading = False
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # where transformers looks
        return model if main_alone else load_model(args, peft_config, accelerator.device)
    for module in model.modules():
        # The optimizer knows its parameters by their addresses, and Accelerate sends no buffers.
        own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad and p.is_meta}
        for name, parameter in own.items():
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    for _, buffer in model.named_buffers(remove_duplicate=False):
        broadcast_from_main([buffer], accelerator.device)
    return model


def _listing(model: nn.Module) -> str:
    """A digest of names, types, shapes, and what trains."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return json_digest([(name, str(t.dtype), list(t.shape), t.requires_grad) for name, t in named])


def _has_other_tensors(skeleton: nn.Module) -> bool:
    """Whether a module has tensors that are neither parameters nor buffers, which no rank would get from another."""
    return any(isinstance(value, Tensor) for module in skeleton.modules() for value in vars(module).values())


@contextmanager
def _buffers_left_out(model: nn.Module) -> Iterator[None]:
    """Buffers are not in the state_dict meanwhile: of which Accelerate takes every tensor for a sharded one."""
    changed = []
    for module in model.modules():
        names = module._buffers.keys() - module._non_persistent_buffers_set
        module._non_persistent_buffers_set |= names
        changed.append((module, names))
    yield
    for module, names in changed:
        module._non_persistent_buffers_set -= names


def prepare(
    args: Arguments, peft_config: PeftConfig | None, accelerator: Accelerator
) -> tuple[nn.Module, nn.Module, AcceleratedOptimizer]:
    """(model as Accelerate prepares it, the same unwrapped, optimizer over all that ever trains).

    Raises:
        RuntimeError: FSDP is on and has not sharded the model.
    """
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded:
        model = _load_on_main(args, peft_config, accelerator)
    else:
        model = load_model(args, peft_config, accelerator.device, straight=True)
    optimizer = make_optimizer(args, [p for p in model.parameters() if p.requires_grad], model)
    if sharded:
        if not accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
            broadcast_from_main((p for p in model.parameters() if p.requires_grad), accelerator.device)
        with _buffers_left_out(model):
            model, optimizer = accelerator.prepare(model, optimizer)
    else:  # in evaluation mode Accelerate leaves out DistributedDataParallel: GradientReducer stands in for it
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(optimizer)
        tensors = [*model.state_dict(keep_vars=True).values(), *model.buffers()]
        broadcast_from_main((t for t in tensors if isinstance(t, torch.Tensor)), accelerator.device)
    peft_model = accelerator.unwrap_model(model)
    # Without Accelerate's own wrapper, which makes float32 of all logits: autocast stands around the forwards instead.
    if vars(peft_model).pop("_original_forward", None) is not None:
        del peft_model.forward
    if sharded:
        require_sharded(peft_model)
    return model, peft_model, optimizer
