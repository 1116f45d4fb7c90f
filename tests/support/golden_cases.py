"""What golden.py records beside runs of train_ist.py: command lines that are refused, and the callback."""

import hashlib
import json
from pathlib import Path
from typing import Any

BAD_VALUES: dict[str, list[Any]] = {
    "selection": ["best"],
    "trained_layers": [5, "1.0", "many", 0],
    "kept_layers": [9, "1.0"],
    "candidates": [1],
    "update_interval": [0],
    "suppression": [2, "nan"],
    "score_lr": [-1, "inf"],
    "score_rule": ["mine"],
    "probe": ["none"],
    "probe_batch_size": [0],
    "probe_max_length": [1],
    "layer_stack": ["encoder", "both", "middle"],
    "seed": [-1],
    "lisa_interval": [4],
    "fixed_layers": ["1"],
    "semantic_rows": [4],
    "id3_budget": [0.1],
    "max_length": [0],
    "train_file": [None, "nowhere.json", "LICENSE", "rows.txt"],
    "validation_file": ["nowhere.json"],
    "validation_size": ["nan", 500, -1],
    "prompt_template": ["mine"],
    "lora_r": [0, "many"],
    "lora_alpha": [0],
    "lora_dropout": [1],
    "bottleneck_size": [0],
    "target_modules": ["lm_head", "q_proj,w_query", "all-linear,q_proj"],
    "peft_config": ["nowhere.json"],
    "per_device_train_batch_size": [0],
    "gradient_accumulation_steps": [0],
    "learning_rate": [0, "nan"],
    "num_train_epochs": [0],
    "warmup_steps": [-1],
    "weight_decay": [-1],
    "max_grad_norm": [-1],
    "max_steps": [0, "many"],
    "optim": ["sgd"],
    "lr_scheduler_type": ["steps"],
    "logging_steps": [0],
    "eval_steps": [0],
    "save_steps": [0],
    "save_total_limit": [0],
    "resume_from_checkpoint": ["nowhere"],
    "report_to": ["file"],
    "model_name_or_path": [None, "tests", "nowhere"],
    "dtype": ["float16"],
    "attn_implementation": ["nothing"],
    "output_dir": ["README.md/x"],
    "config": ["nowhere.yaml"],
    "trained_layer": [0.5],
    "bf16": ["perhaps"],
}
BAD_TOGETHER: list[dict[str, Any]] = [
    {"validation_size": None},
    {"validation_size": 4, "validation_file": "rows.json"},
    {"validation_size": None, "eval_steps": None, "load_best_model_at_end": True},
    {"eval_steps": None, "load_best_model_at_end": True},
    {"selection": "id3", "optim": "adamw_8bit"},
    {"selection": "id3", "id3_steps": 50},
    {"selection": "id3", "id3_eps": 1e-9, "id3_exponent": 5},
    {"selection": "lisa", "lisa_interval": 0},
    {"selection": "fixed", "fixed_layers": "7"},
    {"selection": "fixed", "fixed_layers": "one"},
    {"selection": "semantic", "min_trained_layers": 4},
    {"selection": "semantic", "semantic_budget": 0.1},
    {"selection": "semantic", "layer_stack": "encoder"},
    {"peft_method": "none"},
    {"peft_method": "none", "selection": "all", "load_in_4bit": True},
    {"optimizer_state": "offload", "optim": "adamw_8bit"},
    {"optimizer_state": "drop", "optim": "paged_adamw_8bit"},
    {"torch_compile": True, "gradient_checkpointing": True},
    {"torch_compile": True, "torch_compile_backend": "none"},
    {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
    {"log_adapter": True},
    {"output_dir": None, "resume_from_checkpoint": "auto"},
    {"prompt_template": "chat"},
    {"max_length": 2, "completion_only_loss": True},
]


def bad_command_lines(work: Path) -> dict[str, dict[str, Any]]:
    """{name: keys of train_ist.py that it refuses}."""
    one = {f"{key} {value}": {key: value} for key, values in BAD_VALUES.items() for value in values}
    several = {" ".join(f"{k} {v}" for k, v in keys.items()): keys for keys in BAD_TOGETHER}
    configs = {
        "not JSON": "{",
        "no type": '{"r": 4}',
        "unknown type": '{"peft_type": "lorra"}',
        "unknown key": '{"peft_type": "LORA", "rank": 4}',
        "bad value": '{"peft_type": "SERIES", "non_linearity": "rleu"}',
        "a prompt": '{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}',
        "not an int": '{"peft_type": "LORA", "r": "8"}',
        "data first": '{"peft_type": "LORA", "init_lora_weights": "eva"}',
        "no rank": '{"peft_type": "ADALORA", "init_r": 4, "target_r": 4}',
        "no module": '{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["nothere"]}',
    }
    for name, text in configs.items():
        file = work / f"bad-{name.replace(' ', '-')}.json"
        file.write_text(text)
        several[f"peft_config {name}"] = {"peft_config": file, "lora_r": None, "lora_alpha": None, "lora_dropout": None}
    rows = {
        "empty": "",
        "a list": "[1]",
        "columns": '[{"question": 1}]',
        "no answer": '[{"instruction": "a", "output": " "}]',
    }
    for name, text in rows.items():
        file = work / f"rows-{name.replace(' ', '-')}.json"
        file.write_text(text)
        several[f"rows {name}"] = {"train_file": file}
    return one | several


def callback_runs(work: Path) -> dict[str, Any]:
    """transformers.Trainer with ISTCallback on a decoder and on an encoder-decoder: its updates, losses and weights."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, Trainer, TrainingArguments

    from ist import ISTCallback, ISTConfig

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 400, (40, 12), generator=generator).tolist()
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})

    def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")}

    def t5() -> torch.nn.Module:
        shape = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 4, "vocab_size": 400}
        return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **shape))

    def llama() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(work / "tiny")

    arms = {
        "Llama": (llama, ["q_proj", "down_proj"], {}),
        "Llama, cheap probe": (llama, ["q_proj", "down_proj"], {"probe": "cheap", "probe_batch_size": 3}),
        "Llama, semantic": (llama, ["q_proj", "down_proj"], {"selection": "semantic"}),
        "T5": (t5, ["q", "wo"], {}),
        "T5, cheap probe": (t5, ["q", "wo"], {"probe": "cheap", "probe_batch_size": 3}),
    }
    record = {}
    for name, (make, targets, keys) in arms.items():
        for kind in ("run", "resumed"):
            run = work / "callback" / name.replace(", ", "-").replace(" ", "-") / kind
            torch.manual_seed(0)
            model = get_peft_model(make(), LoraConfig(r=4, target_modules=targets))
            common = {"update_interval": 4, "score_lr": 1000, "trained_layers": 1}
            if keys.get("selection") == "semantic":
                common = {}
            options = {"per_device_train_batch_size": 4, "max_steps": 20, "learning_rate": 5e-3, "logging_steps": 1}
            options |= {"report_to": [], "use_cpu": True, "save_steps": 10, "disable_tqdm": True}
            options |= {"remove_unused_columns": False}
            trainer = Trainer(
                model=model,
                args=TrainingArguments(output_dir=str(run), **options),
                train_dataset=rows,
                data_collator=collate,
                callbacks=[ISTCallback(ISTConfig(**common, **keys))],
            )
            trainer.train(resume_from_checkpoint=str(run.with_name("run") / "checkpoint-10") if kind != "run" else None)
            weights = hashlib.sha256()
            for parameter in model.parameters():
                weights.update(parameter.detach().numpy().tobytes())
            updates = [json.loads(line) for line in (run / "importance.jsonl").read_text().splitlines()]
            losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
            record[f"{name}: {kind}"] = {"updates": updates, "losses": losses, "weights": weights.hexdigest()[:16]}
    return record


CHATML = (
    "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encoded_rows(work: Path) -> dict[str, Any]:
    """{template and completion_only_loss: token ids and labels of the first rows, and how many rows were dropped}."""
    try:
        from ist.training.encoding import encode_rows
        from ist.training.reading import load_rows
    except ImportError:  # before the house
        from ist.data import encode_rows, load_rows
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work / "tiny")
    tokenizer.chat_template = CHATML
    encoded = {}
    for template in ("alpaca", "llm_adapters", "chat", "none"):
        for completion_only in (False, True):
            rows = load_rows("train_file", [str(work / "rows.json")])
            rows, dropped = encode_rows(rows, "train_file", template, tokenizer, 400, completion_only)
            encoded[f"{template}, {completion_only}"] = {"rows": rows.to_list()[:20], "dropped": dropped}
    return encoded
