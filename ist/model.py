"""From arguments to a PEFT model and its optimizer; what is wrong with them shows before any weight is loaded."""

from argparse import Namespace
from pathlib import Path

import bitsandbytes
import torch
from accelerate.utils import set_seed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig

from ist.config import UsageError, brief
from ist.data import Data
from ist.layers import LayerMap, default_target_modules, drop_input_grad_hooks


def make_peft_config(args: Namespace) -> LoraConfig:
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.target_modules == ["all-linear"] else args.target_modules,
        task_type="CAUSAL_LM",
    )


def resolve_targets(args: Namespace, model: nn.Module) -> None:
    """Set args.target_modules where it has its default, and see that each of them names something.

    Raises:
        UsageError: there is no default for this model, or a name fits no module.
    """
    args.target_modules = args.target_modules or default_target_modules(model)
    if not args.target_modules:
        raise UsageError("--target_modules has no default for this architecture: name the modules to adapt.")
    names = [f".{name}" for name, _ in model.named_modules()]
    for target in args.target_modules:
        if target != "all-linear" and not any(name.endswith(f".{target}") for name in names):
            raise UsageError(f"--target_modules: the model has no module {target}.")
    if "all-linear" in args.target_modules and len(args.target_modules) > 1:
        raise UsageError("--target_modules all-linear stands alone.")


def plan_layers(args: Namespace) -> tuple[LayerMap, PretrainedConfig, int]:
    """(layers that will carry adapters, model config, rows of the embedding), from a skeleton without weights.

    What is wrong with a model shows here, before its weights are loaded; args.dtype and args.target_modules get what
    their defaults mean for it.

    Raises:
        UsageError: not a model, not a causal language model, no such target modules, no list of layers.
    """
    name = f"--model_name_or_path {args.model_name_or_path}"
    options = {"trust_remote_code": args.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(args.model_name_or_path, **options)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, attn_implementation=args.attn_implementation, **options)
    except Exception as error:  # whatever transformers raises here, it is about the model that was named
        if "trust_remote_code" in str(error):
            raise UsageError(f"{name} comes with code of its own; --trust_remote_code true runs it.") from error
        raise UsageError(f"{name} cannot be used: {brief(error)}") from error
    folder = Path(args.model_name_or_path)
    if folder.is_dir() and not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):
        raise UsageError(f"{name} holds no weights (no .safetensors or .bin file).")
    if args.dtype == "auto" and config.dtype == torch.float16:
        raise UsageError(f"{name} has float16 weights, which cannot be trained on: pass --dtype bfloat16 or float32.")
    if args.dtype == "auto" and config.dtype is not None:
        args.dtype = str(config.dtype).removeprefix("torch.")
    vocabulary = skeleton.get_input_embeddings().num_embeddings
    resolve_targets(args, skeleton)
    try:
        layers = LayerMap(get_peft_model(skeleton, make_peft_config(args), low_cpu_mem_usage=True))
    except ValueError as error:
        raise UsageError(f"--target_modules: {brief(error)}") from error
    return layers, config, vocabulary


def require_fitting(data: Data, config: PretrainedConfig, vocabulary: int) -> None:
    """Stop now, not with an index error in mid-run, when the model cannot take the rows."""
    rows = data.rows["input_ids"]
    if (token := max(map(max, rows))) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives token {token}, the model's embedding has {vocabulary}: they do not belong."
        )
    longest, positions = max(map(len, rows)), getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise UsageError(
            f"--max_length leaves rows of {longest} tokens, the model has {positions} positions. Lower it."
        )


def load_model(args: Namespace, device: torch.device) -> PeftModel:
    if args.load_in_4bit:
        dtype = torch.bfloat16 if args.bf16 or args.dtype == "bfloat16" else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,  # a float type: FSDP2 shards nothing else
        )
        options = {"quantization_config": quantization, "device_map": {"": device}, "dtype": dtype}
    else:
        options = {"dtype": args.dtype}
    try:
        base = AutoModelForCausalLM.from_pretrained(
            args.model_name_or_path,
            **options,
            attn_implementation=args.attn_implementation,
            trust_remote_code=args.trust_remote_code,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {args.model_name_or_path} cannot be loaded: {brief(error)}") from error
    if any(parameter.dtype == torch.float16 for parameter in base.parameters()):
        raise UsageError("the model has float16 weights, which cannot be trained on: pass --dtype bfloat16 or float32.")
    if args.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    set_seed(args.seed)
    model = get_peft_model(base, make_peft_config(args))
    drop_input_grad_hooks(model)
    return model.train()


def make_optimizer(args: Namespace, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    kinds = {
        "adamw_torch": torch.optim.AdamW,
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }
    return kinds[args.optim](parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
