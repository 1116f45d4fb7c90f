"""From the adapter keys, or a file of PEFT's, to a PEFT configuration; refused where a method is not served."""

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

from ist.adapters import ParallelConfig, SeriesConfig
from ist.adapters.support import refusal
from ist.training.arguments import Arguments, Resolved
from ist.training.command_line import UsageError, brief
from ist.training.continuing import CONFIG, adapter_folder
from ist.training.files import ReadError, read_text


def config_key(args: Arguments) -> str:
    """The argument that names a PEFT configuration, for messages; empty where the adapter's own keys describe it."""
    key = next((key for key in ("peft_config", "adapter_name_or_path") if getattr(args, key)), None)
    return f"--{key} {getattr(args, key)}" if key else ""


def _read_peft_config(args: Arguments, total_steps: int) -> PeftConfig:
    """The PEFT configuration of args.peft_config, or of the adapter to go on from.

    Raises:
        UsageError: not such a file, or a method that training by layers cannot serve.
    """
    key = config_key(args)
    file = Path(args.peft_config) if args.peft_config else adapter_folder(args.adapter_name_or_path) / CONFIG
    try:
        values = json.loads(read_text(file), parse_constant=_no_constant)
        config_class = PEFT_TYPE_TO_CONFIG_MAPPING[str(values["peft_type"]).upper()]
    except FileNotFoundError as error:
        raise UsageError(f"{key} cannot be read: {error.strerror}.") from error
    except ReadError as error:
        raise UsageError(f"{key.split()[0]} {error}") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{key} is not a PEFT configuration in JSON: {brief(error)}") from error
    except KeyError as error:
        known = ", ".join(sorted(PEFT_TYPE_TO_CONFIG_MAPPING))
        raise UsageError(f"{key}: peft_type must be one of {known}; got {values.get('peft_type')}.") from error
    # As adapter_config.json has them, for an adapter that was saved: neither is meant here.
    values |= {"task_type": "CAUSAL_LM", "inference_mode": False, "base_model_name_or_path": None}
    if args.adapter_name_or_path and values.get("init_lora_weights") == "eva":
        values["init_lora_weights"] = True  # its weights are in the file
    unknown = values.keys() - {field.name for field in fields(config_class)}
    if unknown:
        raise UsageError(f"{key}: {config_class.__name__} has no {', '.join(sorted(unknown))}.")
    if issubclass(config_class, AdaLoraConfig) and args.adapter_name_or_path:
        raise UsageError(f"{key} is of AdaLoRA, which has given up ranks for good: begin anew with --peft_config.")
    if issubclass(config_class, AdaLoraConfig):
        values |= {"total_step": values.get("total_step") or total_steps, "rank_pattern": None}
    hints = get_type_hints(config_class)
    for name, value in values.items():
        if name != "peft_type" and not _fits(value, hints[name]):
            raise UsageError(f"{key}: {name} must be of type {_type_name(hints[name])}; got {json.dumps(value)}.")
    _require_in_range(values, config_class, key)
    try:
        config = config_class(**values)
    except Exception as error:  # whatever a configuration raises here, it is about its values
        raise UsageError(f"{key}: {brief(error)}") from error
    return config


# What PEFT takes without a word: an adapter without an effect, or with one of the other sign.
_ABOVE_ZERO = re.compile(r"r|alpha|scaling|\w+_alpha|(init|target|mini)_r|n_frequency|num_vectors|vector_length|topk")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _require_in_range(values: dict, config_class: type[PeftConfig], key: str) -> None:
    """
    Raises:
        UsageError: a rank or a scaling that is not above zero, or a dropout outside [0, 1).
    """
    defaults = {field.name: field.default for field in fields(config_class)}
    patterns = {name: values.get(name) or {} for name in _PATTERNS}
    numbers = [(f"{name}: {module}", value) for name in _PATTERNS for module, value in patterns[name].items()]
    for name, value in numbers:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UsageError(f"{key}: {name} must be a number above 0; got {json.dumps(value)}.")
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value == defaults[name]:
            continue
        if "dropout" in name and not 0 <= value < 1:
            raise UsageError(f"{key}: {name} must be in [0, 1); got {value}.")
        if _ABOVE_ZERO.fullmatch(name) and value <= 0:
            raise UsageError(f"{key}: {name} must be above 0; got {value}.")


def has_module(model: nn.Module, name: str) -> bool:
    """Whether a module has this name, or this end of a path."""
    return any(f".{path}".endswith(f".{name}") for path, _ in model.named_modules())


def require_known_names(config: PeftConfig, model: nn.Module, key: str) -> None:
    """PEFT adapts what it finds of the names in a configuration, and leaves out the others without an error.

    Raises:
        UsageError: a module, a parameter, a layer or a token that the model does not have.
    """
    for name, kind, unknown in _unknown_names(config, model):
        raise UsageError(f"{key}: {name}: the model has no {kind} {unknown}.")


def _unknown_names(config: PeftConfig, model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """(key, kind of the name, name) for each name in a configuration that the model does not have."""

    def listed(name: str) -> list:
        value = getattr(config, name, None)
        if isinstance(value, dict):
            return [one for values in value.values() for one in values]
        return [] if value is None or isinstance(value, str) else [value] if isinstance(value, int) else list(value)

    paths = [path for path, _ in model.named_modules()]
    for name in ("target_modules", "feedforward_modules", "exclude_modules", "modules_to_save"):
        yield from ((name, "module", one) for one in listed(name) if not has_module(model, one))
    for name in _PATTERNS:  # as PEFT matches them
        patterns = getattr(config, name, None) or ()
        yield from (
            (name, "module", p) for p in patterns if not any(re.match(rf"(.*\.)?({p})$", path) for path in paths)
        )
    parameters = [f".{path}" for path, _ in model.named_parameters()]
    for one in listed("target_parameters"):
        if not any(path.endswith(f".{one}") for path in parameters):
            yield "target_parameters", "parameter", one
    for layer in listed("layers_to_transform"):
        if not any(f".{layer}." in path for path in paths):
            yield "layers_to_transform", "layer", layer
    vocabulary = model.get_input_embeddings().num_embeddings
    for name in ("trainable_token_indices", "token_indices"):
        yield from ((name, "token", one) for one in listed(name) if not 0 <= one < vocabulary)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file can be of the annotated type; the class checks types beyond JSON."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    plain = {
        bool: bool,
        int: int,
        float: (int, float),
        str: str,
        list: list,
        set: list,
        dict: dict,
        type(None): type(None),
    }
    kind = plain.get(origin or hint)
    return kind is None or (isinstance(value, kind) and (hint is bool or not isinstance(value, bool)))


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def require_served(config: PeftConfig, args: Arguments, sharded: bool, packed: bool) -> None:
    """
    Args:
        packed: the base weights are, by load_in_4bit or in their files.

    Raises:
        UsageError: training by layers cannot serve the method; naming it and the reason (adapters/support.py).
    """
    if reason := refusal(config, packed, sharded, args.selection):
        raise UsageError(f"{config_key(args)}: {config.peft_type.value} is not served: {reason}.")
    if args.loraplus_lr_ratio and config.peft_type != PeftType.LORA:
        raise UsageError(
            f"--loraplus_lr_ratio {args.loraplus_lr_ratio:g} is for the matrices A and B of LoRA; "
            f"{config.peft_type.value} has others: leave it out."
        )


def make_peft_config(args: Arguments, total_steps: int = 10**9) -> PeftConfig | None:
    """The adapter that the arguments describe, if any; `total_steps` is for methods with a schedule (AdaLoRA).

    Raises:
        UsageError: --peft_config names no usable configuration.
    """
    if config_key(args):
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
