"""From the adapter keys, or a file of PEFT's, to a PEFT configuration; which methods are refused, and why."""

import json
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ist.adapters import ParallelConfig, SeriesConfig
from ist.training.arguments import Arguments, Resolved
from ist.training.command_line import UsageError, brief

NO_LAYER_RESPONSE = {
    PeftType.ADAPTION_PROMPT: "it adds prompts inside attention",
    PeftType.POLY: "it routes whole tasks to adapters, and there are no tasks here",
    PeftType.SHADOW: "it runs a second model beside the layers",
    PeftType.XLORA: "it mixes adapters that were trained before",
}


# These compute with the base weights as they lie in memory. Packed ones look like floats, and give errors or nonsense.
_FROM_WEIGHTS = ("pissa", "olora")


NEEDS_PLAIN_WEIGHTS = {
    *(PeftType.ADAMSS, PeftType.DEFT, PeftType.DELORA, PeftType.FROD, PeftType.GLORA, PeftType.HRA, PeftType.LOHA),
    *(PeftType.LOKR, PeftType.OSF, PeftType.PEANUT, PeftType.PSOFT, PeftType.SUPERTUNING),
}


def _read_peft_config(args: Arguments, total_steps: int) -> PeftConfig:
    """The PEFT configuration of args.peft_config.

    Raises:
        UsageError: not such a file, or a method that training by layers cannot serve.
    """
    key = f"--peft_config {args.peft_config}"
    try:
        values = json.loads(Path(args.peft_config).read_text(), parse_constant=_no_constant)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[str(values["peft_type"]).upper()]
    except OSError as error:
        raise UsageError(f"{key} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError) as error:
        raise UsageError(f"{key} is not a PEFT configuration in JSON: {brief(error)}") from error
    except KeyError as error:
        known = ", ".join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))
        raise UsageError(f"{key}: peft_type must be one of {known}; got {values.get('peft_type')}.") from error
    # As adapter_config.json has them, for an adapter that was saved: neither is meant here.
    values |= {"task_type": "CAUSAL_LM", "inference_mode": False, "base_model_name_or_path": None}
    unknown = values.keys() - {field.name for field in fields(config_class)}
    if unknown:
        raise UsageError(f"{key}: {config_class.__name__} has no {', '.join(sorted(unknown))}.")
    if issubclass(config_class, AdaLoraConfig):
        values |= {"total_step": values.get("total_step") or total_steps, "rank_pattern": None}
    hints = get_type_hints(config_class)
    for name, value in values.items():
        if name != "peft_type" and not _fits(value, hints[name]):
            raise UsageError(f"{key}: {name} must be of type {_type_name(hints[name])}; got {json.dumps(value)}.")
    try:
        config = config_class(**values)
    except Exception as error:  # whatever a configuration raises here, it is about its values
        raise UsageError(f"{key}: {brief(error)}") from error
    return config


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file can be of the annotated type; what is not plain is left to the configuration."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    plain = {bool: bool, int: int, float: (int, float), str: str, list: list, set: list, type(None): type(None)}
    kind = plain.get(origin or hint)
    return kind is None or (isinstance(value, kind) and (hint is bool or not isinstance(value, bool)))


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def require_served(config: PeftConfig, args: Arguments, sharded: bool) -> None:
    """Refuse methods without a response per layer, and those that would train otherwise than their papers say.

    Raises:
        UsageError: naming the method and the reason.
    """
    initialisation = str(getattr(config, "init_lora_weights", ""))
    if config.is_prompt_learning:
        reason = "it learns a prompt, so no layer has a response of its own that can be suppressed"
    elif config.peft_type in NO_LAYER_RESPONSE:
        reason = f"{NO_LAYER_RESPONSE[config.peft_type]}, so no layer has a response of its own that can be suppressed"
    elif isinstance(config, AdaLoraConfig) and config.target_r >= config.init_r:
        reason = f"target_r {config.target_r} must be below init_r {config.init_r}, or there is no rank to take away"
    elif isinstance(config, AdaLoraConfig) and config.deltaT < 1:
        reason = f"deltaT {config.deltaT} must be 1 or more"
    elif isinstance(config, AdaLoraConfig) and not (0 < config.beta1 < 1 and 0 < config.beta2 < 1):
        reason = f"beta1 {config.beta1} and beta2 {config.beta2} must be between 0 and 1"
    elif isinstance(config, AdaLoraConfig) and args.selection == "id3":
        reason = "its budget prunes what id3 keeps masked; choose another --selection"
    elif getattr(config, "use_asa", False):
        reason = "use_asa chooses itself what trains; set it to false"
    elif initialisation in ("eva", "corda", "lora_ga"):
        reason = f"init_lora_weights {initialisation} needs a pass over data first, which is not made here"
    elif getattr(config, "monteclora_config", None) or getattr(config, "kasa_config", None):
        reason = "its training loss has a term of its own, which is not added here"
    elif args.load_in_4bit and (config.peft_type in NEEDS_PLAIN_WEIGHTS or initialisation.startswith(_FROM_WEIGHTS)):
        what = f"init_lora_weights {initialisation}" if initialisation.startswith(_FROM_WEIGHTS) else "it"
        reason = f"{what} computes with the base weights themselves, which --load_in_4bit packs"
    elif sharded and config.peft_type == PeftType.OSF:
        reason = "it projects gradients by hooks on parameters, which FSDP does not run: use DDP"
    else:
        return
    raise UsageError(f"--peft_config {args.peft_config}: {config.peft_type.value} is not served: {reason}.")


def make_peft_config(args: Arguments, total_steps: int = 10**9) -> PeftConfig | None:
    """The adapter that the arguments describe, if any; `total_steps` is for methods with a schedule (AdaLoRA).

    Raises:
        UsageError: --peft_config names no usable configuration.
    """
    if args.peft_config:
        return _read_peft_config(args, total_steps)
    if args.peft_method == "none":
        return None
    if args.peft_method in ("series", "parallel"):
        config_class = {"series": SeriesConfig, "parallel": ParallelConfig}[args.peft_method]
        options = {"bottleneck_size": args.bottleneck_size}
    else:
        config_class = LoraConfig
        options = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout}
    targets = "all-linear" if args.target_modules == ["all-linear"] else args.target_modules
    excluded = args.exclude_modules if isinstance(args, Resolved) else None
    return config_class(**options, target_modules=targets, exclude_modules=excluded, task_type="CAUSAL_LM")


def as_json(config: PeftConfig) -> dict:
    """A PEFT configuration as run.json holds it."""
    return json.loads(
        json.dumps(config.to_dict(), default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    )
