"""Bytes of a training step, counted for the paper's models, and measured where there is a device."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GPT2Config, LlamaConfig, PretrainedConfig

from ist.benchmark.arms import say
from ist.config import ISTConfig
from ist.training.arguments import Resolved
from ist.training.command_line import markdown_table
from ist.training.memory import SavedByLayer, StepCounter, counting, layers_that_train, make_batch, materialise
from ist.training.model import load_skeleton
from ist.training.peft_config import make_peft_config


def _llama(hidden: int, intermediate: int, layers: int, heads: int, **options: Any) -> LlamaConfig:
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    options = {"vocab_size": 32000, "max_position_embeddings": 2048} | options
    return LlamaConfig(**shape, num_attention_heads=heads, **options)


# name -> (shapes, dtype of the base). GPT-2 is in float32, as its checkpoint; the paper's 0.4 GB of weights fit that.
GEOMETRIES: dict[str, tuple[PretrainedConfig, str]] = {
    "GPT-2 small": (GPT2Config(), "float32"),
    "SmolLM2-135M": (
        _llama(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
        "bfloat16",
    ),
    "TinyLlama 1.1B": (_llama(2048, 5632, 22, 32, num_key_value_heads=4, tie_word_embeddings=False), "bfloat16"),
    "LLaMA-7B": (_llama(4096, 11008, 32, 32, tie_word_embeddings=False), "bfloat16"),
    "LLaMA-13B": (_llama(5120, 13824, 40, 40, tie_word_embeddings=False), "bfloat16"),
}
# Table 1 of the paper, LoRA, in its "GB": (weights, LoRA, LoRA + IST).
PAPER = {
    "GPT-2 small": (0.4, 2.9, 2.2),
    "TinyLlama 1.1B": (2.2, 10.5, 8.5),
    "LLaMA-7B": (14, 24, 20),
    "LLaMA-13B": (27, 42, 36),
}
TARGETS = {
    "gpt2": {"lora": ["c_attn", "c_fc", "mlp.c_proj"], "series": ["c_fc", "mlp.c_proj"], "parallel": ["c_fc"]},
    "llama": {
        "lora": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
        "series": ["up_proj", "down_proj"],
        "parallel": ["up_proj", "gate_proj"],
    },
}
FULL = "full"
METHODS = ("lora", "series", "parallel", FULL)


def memory_arguments(method: str, config: PretrainedConfig, dtype: str, **options: Any) -> Resolved:
    """The keys of train_ist.py at their defaults, but for `options`, for a model known by its configuration."""
    values = {
        "peft_method": "none" if method == FULL else method,
        "target_modules": TARGETS[config.model_type].get(method),
        "selection": "all",
        "bf16": method == FULL and dtype != "float32",
    }
    return Resolved(model_name_or_path=config.model_type, dtype=dtype, **values | options)


def selections(n_layers: int) -> dict[str, ISTConfig]:
    """The arms by name: the paper's quarter of the layers, but for `all`."""
    count = ISTConfig().counts(n_layers).trained
    above = {"semantic_budget": 0.5, "min_trained_layers": 0.25}  # the highest cost of a boundary in the upper half
    return {
        "all": ISTConfig(selection="all"),
        "ist": ISTConfig(),
        "last": ISTConfig(selection="last"),
        "semantic+ist": ISTConfig(selection="semantic+ist", trained_layers=count, kept_layers=count, **above),
    }


def memory_of(method: str, model: str, shape: tuple[int, int], measure: bool, **options: Any) -> list[dict[str, Any]]:
    """Bytes by part of a training step, a record for each arm.

    `saved_mean` and `peak_mean` are means over the draws of 1000 steps, the other numbers those of the costliest draw.
    Counted as on a GPU, but where a CPU is measured.
    """
    config, dtype = GEOMETRIES[model]
    args = memory_arguments(method, config, dtype, **options)
    peft_config = make_peft_config(args)
    n_layers = config.num_hidden_layers
    arms = selections(n_layers)
    if method == FULL:
        arms = {"all": arms["all"]}
    draws = {name: layers_that_train(arm, n_layers) for name, arm in arms.items()}
    device = Accelerator().device
    like_gpu = device.type == "cuda" or not measure
    with counting(args, peft_config, config, shape, like_gpu=like_gpu) as counter:
        steps = {name: counter.step(costliest, set().union(*drawn)) for name, (drawn, costliest) in draws.items()}
    measured = dict.fromkeys(steps)
    if measure:
        whole = materialise(load_skeleton(args, peft_config, config), device)
        for name, (drawn, costliest) in draws.items():
            counter = StepCounter(whole, args, make_batch(*shape, False, device), like_gpu)
            try:
                measured[name] = measured_peak(counter, costliest, set().union(*drawn), device)
            except torch.OutOfMemoryError:
                say(f"{model}, {method}, {name}: does not fit here")
            counter.train(range(n_layers))
            del counter
        del whole
    records = []
    for name, step in steps.items():
        saved = float(step.saved)
        if name in ("ist", "semantic+ist"):
            count = len(draws["ist"][1])
            bytes_saved = (steps[arm].saved for arm in ("all", "ist", "last"))
            by_layer = SavedByLayer.solved(*bytes_saved, n_layers, count)
            saved = sum(by_layer.saved(draw, n_layers) for draw in draws[name][0]) / len(draws[name][0])
        peak = step.peak - step.at_peak["saved"] * (1 - saved / step.saved)
        records.append(
            {
                **{"model": model, "method": method, "arm": name, "rows": shape[0], "length": shape[1], "dtype": dtype},
                **{key: getattr(args, key) for key in ("attn_implementation", "gradient_checkpointing", "bf16")},
                **step.as_json(),
                **{"saved_mean": round(saved), "peak_mean": round(peak), "measured_peak": measured[name]},
            }
        )
    return records


def measured_peak(counter: StepCounter, trained: Sequence[int], ever: Iterable[int], device: torch.device) -> int:
    """Peak bytes of a real step: as CUDA's allocator has them, or on a CPU as the operations' storages count.

    Optimizer state is there for the layers that `ever` train.
    """
    kept = set(map(id, counter.with_state(counter.train(trained), ever)))
    for parameter in counter.trainable:
        if counter.optimizer and id(parameter) not in kept:
            counter.optimizer.state.pop(parameter, None)
    if device.type != "cuda":
        return counter.step(trained, ever).peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    counter.step(trained)
    return torch.cuda.max_memory_allocated(device)


def without_weights(record: dict[str, Any], key: str) -> int:
    """Bytes of a peak that are not the model's or the adapter's weights."""
    return record[key] - record["weights"]


def memory_table(records: list[dict[str, Any]]) -> str:
    """Markdown, in decimal GB: peaks without the weights, with the share of plain PEFT's; totals by the paper's."""
    groups: dict[tuple, dict[str, dict]] = {}
    for record in records:
        keys = ("model", "method", "attn_implementation", "gradient_checkpointing", "bf16")
        groups.setdefault(tuple(record[key] for key in keys), {})[record["arm"]] = record

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f}"

    rows = []
    for (model, method, attention, checkpointing, bf16), arms in groups.items():
        every = arms["all"]
        whole = without_weights(every, "peak")

        def cell(arm: str, key: str, arms=arms, whole=whole) -> str:
            if arm not in arms:
                return ""
            size = without_weights(arms[arm], key)
            return f"{gb(size)} ({size / whole:.2f})"

        setting = f"{attention}{', checkpointing' if checkpointing else ''}{', bf16' if bf16 else ''}"
        paper = PAPER.get(model, ())[1:] if method == "lora" and not checkpointing else ()
        row = [model, method, setting, gb(every["weights"]), gb(whole)]
        row += [cell("ist", "peak"), cell("ist", "peak_mean"), cell("last", "peak"), cell("semantic+ist", "peak")]
        totals = [every["peak"]] + ([arms["ist"]["peak"], arms["ist"]["peak_mean"]] if "ist" in arms else [])
        rows.append([*row, " / ".join(map(gb, totals)), " / ".join(map(str, paper))])
    header = ["model", "method", "setting", "weights", "all layers", "IST, peak", "IST, mean", "last quarter"]
    header += ["semantic+ist", "total: all / IST peak / mean", "paper: all / IST"]
    measured = [record for record in records if record["measured_peak"]]
    lines = markdown_table(header, rows)
    if measured:
        ratios = [record["peak"] / record["measured_peak"] for record in measured]
        lines += ["", f"counted peak / measured peak: {min(ratios):.3f} to {max(ratios):.3f}"]
    return "\n".join(lines)


def memory_settings(models: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(model, method, options) of `memory`: LoRA on every model; on LLaMA-7B also the other methods and autocast."""
    for model in models:
        for method in methods:
            if method != "lora" and model != "LLaMA-7B":
                continue
            for checkpointing in (False, True):
                for attention in ("eager", "sdpa"):
                    yield model, method, {"attn_implementation": attention, "gradient_checkpointing": checkpointing}
            if method == "lora" and model == "LLaMA-7B":
                for attention in ("eager", "sdpa"):
                    yield model, method, {"attn_implementation": attention, "bf16": True}
