"""What train_ist.py answers to the keys of other programs.

    python tests/support/synonyms.py [--output launch/results/synonyms.md]

The keys are those that people set most, from the programs' own documentation: TRL's SFTConfig, ModelConfig and
ScriptArguments (1.16, and names of earlier versions), Axolotl's configuration reference, LLaMA-Factory's arguments, and
transformers.TrainingArguments (5, and names of 4).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from ist.training.arguments import read_arguments
from ist.training.command_line import UsageError, markdown_table

KEYS = {
    "TRL": (
        *("model_name_or_path", "model_revision", "torch_dtype", "dtype", "attn_implementation", "trust_remote_code"),
        *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
        *("lora_modules_to_save", "lora_task_type", "use_rslora", "use_dora", "load_in_8bit", "load_in_4bit"),
        *("bnb_4bit_quant_type", "use_bnb_nested_quant", "dataset_name", "dataset_config", "dataset_train_split"),
        *("dataset_test_split", "dataset_streaming", "dataset_text_field", "dataset_num_proc", "max_seq_length"),
        *("max_length", "truncation_mode", "packing", "padding_free", "completion_only_loss", "assistant_only_loss"),
        *("chat_template_path", "shuffle_dataset", "project", "eos_token", "loss_type"),
    ),
    "Axolotl": (
        *("base_model", "model_type", "tokenizer_type", "adapter", "lora_model_dir", "lora_target_linear"),
        *("peft_use_dora", "peft_use_rslora", "peft_init_lora_weights", "datasets", "test_datasets", "val_set_size"),
        *("dataset_processes", "chat_template", "sequence_len", "sample_packing", "pad_to_sequence_len"),
        *("train_on_inputs", "micro_batch_size", "num_epochs", "optimizer", "lr_scheduler", "flash_attention"),
        *("saves_per_epoch", "evals_per_epoch", "early_stopping_patience", "lisa_n_layers", "lisa_step_interval"),
        *("wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_mode", "wandb_log_model"),
        *("auto_resume_from_checkpoints", "hub_strategy", "excess_length_strategy"),
    ),
    "LLaMA-Factory": (
        *("stage", "finetuning_type", "adapter_name_or_path", "lora_rank", "lora_target", "additional_target"),
        *("loraplus_lr_ratio", "pissa_init", "freeze_trainable_layers", "quantization_bit", "flash_attn"),
        *("use_unsloth", "enable_liger_kernel", "dataset", "dataset_dir", "eval_dataset", "template", "cutoff_len"),
        *("train_on_prompt", "mask_history", "max_samples", "val_size", "neat_packing", "interleave_probs"),
        *("overwrite_cache", "preprocessing_num_workers"),
    ),
    "TrainingArguments": (
        *("output_dir", "overwrite_output_dir", "do_train", "do_eval", "evaluation_strategy", "eval_strategy"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("learning_rate", "weight_decay", "adam_beta1", "max_grad_norm", "num_train_epochs", "max_steps"),
        *("lr_scheduler_type", "warmup_ratio", "warmup_steps", "logging_dir", "logging_strategy", "logging_steps"),
        *("save_strategy", "save_steps", "save_total_limit", "save_safetensors", "use_cpu", "seed", "data_seed"),
        *("bf16", "fp16", "tf32", "local_rank", "dataloader_num_workers", "run_name", "label_smoothing_factor"),
        *("load_best_model_at_end", "metric_for_best_model", "fsdp", "deepspeed", "optim", "group_by_length"),
        *("train_sampling_strategy", "report_to", "ddp_find_unused_parameters", "ddp_timeout", "push_to_hub"),
        *("resume_from_checkpoint", "hub_model_id", "hub_token", "hub_private_repo", "gradient_checkpointing"),
        *("gradient_checkpointing_kwargs", "activation_checkpointing", "torch_compile", "neftune_noise_alpha"),
        *("use_liger_kernel",),
    ),
    "guesses": (
        *("lr", "epochs", "batch_size", "max_train_samples", "init_lora_weights", "gradient_clipping", "rank", "qlora"),
        *("num_gpus", "device", "model", "resume", "use_wandb"),
    ),
}


def answer(key: str) -> str:
    """What the command line says to `--key`."""
    try:
        read_arguments([f"--{key}=x"], "")
    except UsageError as error:
        told = str(error)
    if not told.startswith("unknown key"):
        return "is a key here"
    return told.removeprefix(f"unknown key --{key}").lstrip(":. ").replace("|", r"\|")


def page() -> str:
    lines = [
        "# Keys of other programs",
        "",
        "Made by tests/support/synonyms.py, whose docstring names the sources.",
        "",
    ]
    rows = [(f"`{key}`", source, answer(key)) for source, keys in KEYS.items() for key in keys]
    return "\n".join([*lines, *markdown_table(["key", "of", "answer of train_ist.py"], rows)]) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "launch/results/synonyms.md")
    parser.parse_args().output.write_text(page())
