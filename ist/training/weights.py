"""Pretrained weights and adapters, every key of their files accounted for: what is missing is never drawn at random."""

import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig
from transformers.quantizers import AutoHfQuantizer

from ist.layers import text_decoder
from ist.training.command_line import UsageError, brief, quiet
from ist.training.continuing import require_no_adapter
from ist.training.files import require_no_pipes
from ist.training.packages import is_packed


def _listing(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def require_finite(name: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """
    Raises:
        UsageError: a tensor of floats holds NaN or an infinity; `name` is the key and the folder.
    """
    for key, tensor in tensors:
        if tensor.is_floating_point() and tensor.device.type != "meta" and not tensor.isfinite().all():
            raise UsageError(f"{name}: {key} is not finite (NaN or infinity); take another file of these weights.")


def require_quantizer(name: str, config: PretrainedConfig) -> None:
    """See that quantised weights can be loaded here: GPTQ, AWQ, ... need packages of their own.

    Raises:
        UsageError: `name` is the key and the folder.
    """
    quantization = getattr(config, "quantization_config", None)
    try:
        if quantization is not None and AutoHfQuantizer.supports_quant_method(dict(quantization)):
            AutoHfQuantizer.from_config(quantization, pre_quantized=True).validate_environment(device_map=None)
    except Exception as error:  # each method has its own: a package, a version, a GPU
        raise UsageError(f"{name} has quantised weights, which cannot be loaded here: {brief(error)}") from error


def is_quantised(name: str) -> bool:
    """Whether a model's files hold packed weights."""
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception:  # its loading says what is wrong
        return False
    return getattr(config, "quantization_config", None) is not None


def require_weight_files(name: str, folder: Path, skeleton: nn.Module) -> None:
    """See that a local model's files can be opened, and are about as large as its configuration says.

    A configuration of another model would be built whole, of random weights, before that shows.

    Raises:
        UsageError: `name` is the key and the folder.
    """
    if not folder.is_dir():
        return
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin") and path.is_file()]
    if not files:
        raise UsageError(f"{name} holds no weights (no .safetensors or .bin file).")
    there = 0
    for file in files:
        if file.suffix == ".bin" or getattr(skeleton.config, "quantization_config", None):
            return  # not to be counted: pickled, or packed
        try:
            with safe_open(file, framework="pt") as tensors:
                there += sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{name}: {file.name} cannot be read: {brief(error)}. Take another copy of it.") from error
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if there < wanted / 2:
        raise UsageError(
            f"{name} lacks most weights of its model: its files hold {there:,} numbers, config.json describes a model "
            f"of {wanted:,}. Complete the files, or correct config.json."
        )


def load_pretrained(auto_class: Any, path: str, **options: Any) -> nn.Module:
    """`auto_class.from_pretrained(path, **options)`, whose every weight comes from the files of `path`.

    transformers draws a weight that no file holds at random, with a warning.

    Raises:
        UsageError: the files cannot be read; a weight of the model is in none of them, or has another shape; they hold
            layers that the configuration does not have; a weight is not finite.
    """
    name = f"--model_name_or_path {path}"
    require_no_pipes(name, Path(path))
    require_no_adapter("--model_name_or_path", path)
    try:
        with quiet("transformers", logging.ERROR):  # its table of keys
            model, info = auto_class.from_pretrained(path, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each format raises its own errors, and all are about these files
        raise UsageError(f"{name} cannot be loaded: {brief(error)}") from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            f"{name} holds an adapter beside its weights, which was loaded with them: remove it from there."
        )
    if missing := [*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])]:
        raise UsageError(
            f"{name} lacks {len(missing)} weights of its model ({_listing(missing)}), which would be random: complete "
            "the files, or correct config.json."
        )
    unexpected = list(info["unexpected_keys"])
    if beyond := [key for key in unexpected if _is_layer_beyond(model, key)]:
        raise UsageError(
            f"{name} has weights of layers that its config.json does not have ({_listing(beyond)}): correct "
            "num_hidden_layers, or take these weights out of the files."
        )
    if unexpected:
        print(
            f"{name}: {len(unexpected)} weights of its files are not the model's, and not used: {_listing(unexpected)}"
        )
    if PartialState().is_local_main_process:  # FSDP may load on it alone; the others have the same files
        # Weights packed in 4 bits are no numbers of the type that stores them.
        require_finite(name, ((key, p) for key, p in model.named_parameters() if not is_packed(p)))
    return model


def _is_layer_beyond(model: nn.Module, key: str) -> bool:
    """Whether a weight is one of a decoder layer after the model's last one."""
    decoder = text_decoder(model)
    stacks = {name for name, module in decoder.named_children() if isinstance(module, nn.ModuleList)}
    return any(
        match[1] in stacks and int(match[2]) >= len(getattr(decoder, match[1]))
        for match in re.finditer(r"(?:^|\.)(\w+)\.(\d+)\.", key)
    )


def load_adapter(model: nn.Module, folder: str, key: str = "", **options: Any) -> PeftModel:
    """The adapter of `folder` on a base model.

    Args:
        key: the argument with its value, for messages; default --adapter and the folder.
        options: of PeftModel.from_pretrained.

    Raises:
        UsageError: it cannot be read or does not fit; its file lacks a tensor of the adapter, or holds others; a tensor
            is not finite.
    """
    name = key or f"--adapter {folder}"
    require_no_pipes(name, Path(folder))
    try:
        adapted = PeftModel.from_pretrained(model, folder, **options)
        there = load_peft_weights(folder, device="cpu")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # each PEFT method raises its own errors, and all are about this folder
        raise UsageError(f"{name} cannot be loaded: {brief(error)}") from error
    wanted = get_peft_model_state_dict(adapted)
    if missing := wanted.keys() - there.keys():
        raise UsageError(f"{name} lacks {len(missing)} tensors of its adapter ({_listing(missing)}).")
    if unknown := there.keys() - wanted.keys():
        raise UsageError(f"{name} holds {len(unknown)} tensors that its adapter does not have ({_listing(unknown)}).")
    require_finite(name, there.items())
    return adapted
