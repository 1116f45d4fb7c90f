"""From arguments to a model that trains, and its optimizer; a bad value is refused before weights are loaded."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
)
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from ist.adapters.targets import ATTENTION, default_target_modules
from ist.config import ConfigError
from ist.layers import LayerMap, drop_input_grad_hooks, outside_decoder, text_decoder
from ist.selection.semantic import require_comparable
from ist.training.arguments import Arguments, Resolved
from ist.training.command_line import UsageError, as_usage_error, brief
from ist.training.continuing import adapter_folder, require_no_adapter
from ist.training.data import Data
from ist.training.files import require_no_pipes
from ist.training.packages import is_packed
from ist.training.peft_config import config_key, has_module, make_peft_config, require_known_names, require_served
from ist.training.weights import load_adapter, load_pretrained, require_quantizer, require_weight_files


def free_base_weights(model: nn.Module, args: Arguments) -> LayerMap:
    """peft_method none: let the text decoder's layers train; embeddings and head too where all layers train.

    LISA's description has embeddings and head trained at every step, ID3's has candidates all over the model. For the
    other rules the layers are the choice, and trained embeddings would bring the backward down through the layers that
    rest.

    Raises:
        UsageError: no list of layers was found.
    """
    head = model.get_output_embeddings()
    text = [text_decoder(model)] + ([head] if head is not None else [])
    trains = {id(parameter) for module in text for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trains)
    layers = LayerMap(model, args.layer_stack)
    if args.selection in ("all", "lisa", "id3"):
        return layers
    for name in layers.outside:
        model.get_parameter(name).requires_grad_(False)
    return LayerMap(model, args.layer_stack)


def resolve_targets(args: Arguments, model: nn.Module) -> Resolved:
    """Name the modules to adapt where target_modules has its default, and see that each name fits a module.

    Raises:
        UsageError: there is no default for this model, or a name fits no module.
    """
    if config_key(args):
        return Resolved.of(args)
    decoder = text_decoder(model)
    targets = args.target_modules or default_target_modules(decoder, args.peft_method)
    if not targets:
        raise UsageError("--target_modules has no default for this architecture: name the modules to adapt.")
    # Text alone trains here: adapters in a vision tower, or between it and the decoder, would learn nothing.
    exclude = None
    if outside_decoder(model):
        (path,) = (path for path, module in model.named_modules() if module is decoder)
        exclude = rf"(?!{re.escape(path)}\.|lm_head).*"
    for target in targets:
        if target != "all-linear" and not has_module(model, target):
            raise UsageError(f"--target_modules: the model has no module {target}.")
    if "all-linear" in targets and len(targets) > 1:
        raise UsageError("--target_modules all-linear stands alone.")
    return Resolved.of(args, target_modules=targets, exclude_modules=exclude)


def auto_class(config: PretrainedConfig) -> type:
    """A causal language model, or one inside a vision-language model, which takes text alone as well."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def _skeleton(args: Arguments, config: PretrainedConfig, **options) -> nn.Module:
    """The model without weights: shapes and types on the meta device."""
    options |= {"attn_implementation": args.attn_implementation, "trust_remote_code": args.trust_remote_code}
    with torch.device("meta"):
        return auto_class(config).from_config(config, **options)


class ModelPlan(NamedTuple):
    """A model as it will train, known before its weights are loaded.

    Attributes:
        args: with the dtype, attention and target modules of this model.
        layers: those that will carry adapters.
        vocabulary: rows of the embedding.
    """

    args: Resolved
    layers: LayerMap
    config: PretrainedConfig
    vocabulary: int


def plan_layers(args: Arguments, sharded: bool) -> ModelPlan:
    """Resolve the arguments by a skeleton without weights: a model or an adapter that is unfit shows here.

    Raises:
        UsageError: not a model, not a causal language model, no such target modules, no list of layers, a PEFT method
            that training by layers cannot serve (on a model that is `sharded`).
    """
    args, config, skeleton = _read_skeleton(args)
    vocabulary = skeleton.get_input_embeddings().num_embeddings
    if args.selection.startswith("semantic"):
        require_comparable(skeleton.get_output_embeddings(), config.get_text_config().hidden_size)
    if args.peft_method == "none":
        return ModelPlan(args, _plan_base_weights(args, skeleton), config, vocabulary)
    return ModelPlan(*_plan_adapter(args, config, skeleton, sharded), config, vocabulary)


def _read_skeleton(args: Arguments) -> tuple[Resolved, PretrainedConfig, nn.Module]:
    """The arguments with the dtype and attention of the model, its configuration, and its skeleton in that dtype."""
    name = f"--model_name_or_path {args.model_name_or_path}"
    require_no_pipes(name, Path(args.model_name_or_path))
    require_no_adapter("--model_name_or_path", args.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        try:
            model = _skeleton(args, config)
        except ValueError as error:
            if args.attn_implementation != "sdpa" or "does not support an attention implementation" not in str(error):
                raise
            args = Resolved.of(args, attn_implementation="eager")  # Gemma 2, GPT-J, BLOOM have no other
            model = _skeleton(args, config)
    except Exception as error:  # whatever transformers raises here, it is about the model that was named
        if "trust_remote_code" in str(error):
            raise UsageError(f"{name} comes with code of its own; --trust_remote_code true runs it.") from error
        raise UsageError(f"{name} cannot be used: {brief(error)}") from error
    require_quantizer(name, config)
    require_weight_files(name, Path(args.model_name_or_path), model)
    dtype = args.dtype
    if dtype == "auto" and config.dtype == torch.float16:
        raise UsageError(f"{name} has float16 weights, which cannot be trained on: pass --dtype bfloat16 or float32.")
    if dtype == "auto" and config.dtype is not None:
        dtype = str(config.dtype).removeprefix("torch.")
    if dtype != "auto":
        model = model.to(getattr(torch, dtype))
    return Resolved.of(args, dtype=dtype), config, model


def _plan_adapter(
    args: Resolved, config: PretrainedConfig, skeleton: nn.Module, sharded: bool
) -> tuple[Resolved, LayerMap]:
    """The arguments with their target modules, and the layers of the skeleton with its adapter."""
    defaults = not args.target_modules and args.peft_method == "lora"
    args = resolve_targets(args, skeleton)
    peft_config = make_peft_config(args)
    packed = args.load_in_4bit or getattr(config, "quantization_config", None) is not None
    require_served(peft_config, args, sharded, packed)
    if config_key(args):
        require_known_names(peft_config, skeleton, config_key(args))
    stands_in = False
    try:
        with _adapter_errors(args):
            model = get_peft_model(skeleton, peft_config, low_cpu_mem_usage=True)
    except UsageError as error:
        if defaults and "fused into" in str(error.__cause__):  # experts, whose matrices LoRA takes by parameter only
            attention = [target for target in args.target_modules if target in ATTENTION]
            if attention:
                args, _, skeleton = _read_skeleton(Resolved.of(args, target_modules=attention))
                return _plan_adapter(args, config, skeleton, sharded)
        if "meta" not in str(error.__cause__):
            raise
        # A method that starts from the base weights (SHiRA, FRoD): LoRA on the same modules stands in for it here.
        stands_in = True
        keys = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
        like = LoraConfig(r=1, **{key: getattr(peft_config, key) for key in keys if hasattr(peft_config, key)})
        with _adapter_errors(args):
            model = get_peft_model(_skeleton(args, config), like, low_cpu_mem_usage=True)
    with _adapter_errors(args):
        layers = LayerMap(model, args.layer_stack)
        layers.n_scalars = None if stands_in else layers.n_scalars
        _require_fine(args, model)
        if sharded and layers.shared:
            raise UsageError(
                "layers share trainable parameters, which cannot be sharded layer by layer; use "
                "accelerate_configs/ddp.yaml."
            )
    return args, layers


def _plan_base_weights(args: Arguments, model: nn.Module) -> LayerMap:
    """The layers of a skeleton whose own weights train.

    Raises:
        UsageError: the selection, or 4-bit weights, do not go with that; or there is no list of layers.
    """
    if args.selection in ("ist", "semantic+ist", "placebo"):
        raise UsageError(
            f"--selection {args.selection} suppresses the response of adapters, and --peft_method none has none: "
            "choose another selection (all, lisa, random, ...)."
        )
    if args.load_in_4bit or getattr(model.config, "quantization_config", None):
        packed = "--load_in_4bit packs: leave one out" if args.load_in_4bit else "this model has packed: take another"
        raise UsageError(f"--peft_method none trains the base weights, which {packed}.")
    layers = free_base_weights(model, args)
    _require_fine(args, model)
    return layers


def _require_fine(args: Arguments, model: nn.Module) -> None:
    """Refuse to train in a type in which small steps are lost in silence."""
    coarse = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if coarse and not args.bf16:
        raise UsageError(
            f"{coarse[0]} and {len(coarse) - 1} more would train in {args.dtype}, where small steps are lost: pass "
            "--bf16 true (they are float32 then) or --dtype float32."
        )


@contextmanager
def _adapter_errors(args: Arguments) -> Iterator[None]:
    """Each PEFT method has its own ways to say that a model or a value does not suit it: one line, naming the key."""
    key = config_key(args) or "--target_modules"
    try:
        yield
    except Exception as error:
        if isinstance(error, UsageError) and str(error).startswith("--"):
            raise  # it names its key
        if isinstance(error, ConfigError):
            error = as_usage_error(error)
            if str(error).startswith("--"):
                raise error from None
        raise UsageError(f"{key}: {brief(error)}") from error


def require_fitting(data: Data, config: PretrainedConfig, vocabulary: int) -> None:
    """Stop now, not with an index error in mid-run, when the model cannot take the rows.

    Raises:
        UsageError: a token beyond the embedding, or a row longer than the positions that the model has.
    """
    for rows in (data.rows, data.validation):
        if rows is not None:
            _require_fitting(rows["input_ids"], config, vocabulary)


def _require_fitting(rows: Sequence[list[int]], config: PretrainedConfig, vocabulary: int) -> None:
    if (token := max(map(max, rows))) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives token {token}, the model's embedding has {vocabulary} rows: they do not belong "
            "together. Put the model's own tokenizer into its folder."
        )
    longest, positions = max(map(len, rows)), getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and longest > positions:
        raise UsageError(
            f"--max_length leaves rows of {longest} tokens, the model has {positions} positions. Lower it."
        )


def _quantization(args: Arguments) -> BitsAndBytesConfig:
    """NF4, computed in args.dtype, or in bfloat16 under mixed precision."""
    return nf4(torch.bfloat16 if args.bf16 or args.dtype == "bfloat16" else torch.float32)


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NF4 with double quantisation, computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # a float type: FSDP2 shards nothing else
    )


def load_model(
    args: Arguments, peft_config: PeftConfig | None, device: torch.device, straight: bool = False
) -> nn.Module:
    """The model with its adapter, or with its own weights to train; in train mode, trainable parameters in float32.

    Args:
        straight: load to `device` at once, not to the CPU.
    """
    options = {"dtype": args.dtype}
    if straight and device.type != "cpu":
        options["device_map"] = {"": device}
    if args.load_in_4bit:
        quantization = _quantization(args)
        dtype = quantization.bnb_4bit_compute_dtype
        options = {"quantization_config": quantization, "device_map": {"": device}, "dtype": dtype}
    config = AutoConfig.from_pretrained(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    base = load_pretrained(
        auto_class(config),
        args.model_name_or_path,
        **options,
        attn_implementation=args.attn_implementation,
        trust_remote_code=args.trust_remote_code,
    )
    if any(parameter.dtype == torch.float16 for parameter in base.parameters()):
        raise UsageError("the model has float16 weights, which cannot be trained on: pass --dtype bfloat16 or float32.")
    set_seed(args.seed)
    return _made_to_train(base, args, peft_config)


def load_skeleton(args: Arguments, peft_config: PeftConfig | None, config: PretrainedConfig) -> nn.Module:
    """The model of `load_model`, on the meta device. Its 4-bit weights have their unpacked shapes.

    Raises:
        UsageError: the method makes its adapters from the base weights, which are not there.
    """
    if args.load_in_4bit:
        quantization = _quantization(args)
        dtype = quantization.bnb_4bit_compute_dtype
        base = _skeleton(args, config, dtype=dtype)
        replace_with_bnb_linear(base, get_keys_to_not_convert(base), quantization)
        for parameter in base.parameters():
            parameter.data = parameter.data.to(dtype)
        base.is_loaded_in_4bit = True  # as transformers marks it for PEFT
    else:
        base = _skeleton(args, config, **({} if args.dtype == "auto" else {"dtype": getattr(torch, args.dtype)}))
    return _made_to_train(base, args, deepcopy(peft_config), low_cpu_mem_usage=True)


def _made_to_train(base: nn.Module, args: Arguments, peft_config: PeftConfig | None, **options) -> nn.Module:
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with _adapter_errors(args):
        if peft_config is None:
            model = base
            free_base_weights(model, args)
        elif args.adapter_name_or_path and not options:
            folder = str(adapter_folder(args.adapter_name_or_path))
            model = load_adapter(base, folder, config_key(args), is_trainable=True)
        else:
            model = get_peft_model(base, peft_config, **options)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and is_packed(parameter):
                raise UsageError(f"{name} would train, but its weights are packed in 4 bits.")
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    drop_input_grad_hooks(model)
    return model.train()
