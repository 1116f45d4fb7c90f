"""Which decoder families train with IST: tiny random models, each trained by train_ist.py (ist/adapters/README.md).

python tests/support/families.py        writes launch/results/families.json and the table
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import transformers
from safetensors.torch import load_file

from ist.training.word_problems import arithmetic_rows
from support import make_tiny, read_lines, reset_accelerate
from support.method_table import publish

N_LAYERS = 4
_SIZES = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": N_LAYERS}
_LLAMA = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
_GPT = {"vocab_size": 400, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 512}
_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_VISION |= {"image_size": 28, "patch_size": 14}
_CLIP = {"model_type": "clip_vision_model", **_VISION}
# Family: (configuration class, its values). Four layers each; vision towers have two more, which must not count.
FAMILIES: dict[str, tuple[str, dict]] = {
    "Llama": ("LlamaConfig", _LLAMA),
    "Mistral": ("MistralConfig", _LLAMA),
    "Mixtral": ("MixtralConfig", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen2": ("Qwen2Config", _LLAMA),
    "Qwen3": ("Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "Gemma 2": ("Gemma2Config", {**_LLAMA, "head_dim": 8}),
    "Gemma 3": ("Gemma3TextConfig", {**_LLAMA, "head_dim": 8}),
    "Phi-3": ("Phi3Config", {**_LLAMA, "pad_token_id": 0}),
    "GPT-2": ("GPT2Config", _GPT),
    "GPT-J": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "GPT-NeoX": ("GPTNeoXConfig", {**_SIZES, "num_attention_heads": 4}),
    "OPT": (
        "OPTConfig",
        {"vocab_size": 400, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
         "word_embed_proj_dim": 32},
    ),
    "BLOOM": ("BloomConfig", {"vocab_size": 400, "hidden_size": 32, "n_layer": N_LAYERS, "n_head": 4}),
    "Falcon": (
        "FalconConfig",
        {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4},
    ),
    "OLMo-2": ("Olmo2Config", _LLAMA),
    "Granite": ("GraniteConfig", _LLAMA),
    "StarCoder2": ("Starcoder2Config", _LLAMA),
    "Mamba": ("MambaConfig", {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "state_size": 4}),
    "Mamba-2": (
        "Mamba2Config",
        {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "state_size": 4, "num_heads": 8,
         "head_dim": 8, "n_groups": 1},
    ),
    "DeepSeek-V3": (
        "DeepseekV3Config",
        {**_LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
         "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
         "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    ),
    "Gemma 3 with vision": (
        "Gemma3Config",
        {"text_config": {**_LLAMA, "head_dim": 8}, "vision_config": _VISION, "mm_tokens_per_image": 4,
         "image_token_index": 399, "boi_token_index": 397, "eoi_token_index": 398},
    ),
    "LLaVA (Llama with CLIP)": (
        "LlavaConfig",
        {"text_config": {"model_type": "llama", **_LLAMA}, "vision_config": _CLIP,
         "image_token_index": 399},
    ),
}  # fmt: skip


def build(name: str, folder: Path, n_layers: int = N_LAYERS) -> None:
    """A tiny random model of the family, with a tokenizer."""
    config_class, values = FAMILIES[name]
    if "text_config" in values:
        values = {**values, "text_config": {**values["text_config"], "num_hidden_layers": n_layers}}
    elif n_layers != N_LAYERS:
        values = {**values, "num_hidden_layers": n_layers}
    make_tiny(folder, arithmetic_rows(60, seed=1, held_out=False))  # its tokenizer stays
    config = getattr(transformers, config_class)(**values)
    mapping = transformers.AutoModelForCausalLM
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        mapping = transformers.AutoModelForImageTextToText
    torch.manual_seed(0)
    model = mapping.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)  # at the usual scale four tiny layers hardly do anything
    model.save_pretrained(folder)


def try_family(name: str, work: Path) -> dict[str, str]:
    """What a run of train_ist.py shows: layers found, losses, scores."""
    import train_ist

    build(name, work / "model")
    (work / "train.json").write_text(json.dumps(arithmetic_rows(60, seed=1, held_out=False)))
    values = {
        **{"model_name_or_path": work / "model", "train_file": work / "train.json", "output_dir": work / "run"},
        **{"report_to": "none", "max_steps": 30, "update_interval": 5, "warmup_steps": 2, "learning_rate": 1e-2},
        **{"lora_r": 4, "lora_dropout": 0, "score_lr": 1000, "trained_layers": 2, "logging_steps": 1},
    }
    reset_accelerate()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = train_ist.main([part for key, value in values.items() for part in (f"--{key}", str(value))])
    assert code == 0
    run = json.loads((work / "run/run.json").read_text())
    losses = [line["loss"] for line in read_lines(work / "run/metrics.jsonl")]
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    saved = load_file(work / "run/adapter/adapter_model.safetensors")
    path = run["layers"][0].rpartition(".")[0]
    assert all(name.startswith(f"{path}.") for name in saved), "an adapter outside the decoder's layers"
    scores = read_lines(work / "run/importance.jsonl")[-1]["scores"]
    path = path.removeprefix("base_model.model.")
    return {
        "layers found": f"{run['layer_counts']['n_layers']} in {path}" if len(run["layers"]) == N_LAYERS else "no",
        "adapted": ", ".join(run["configuration"]["target_modules"]),
        "trains (loss)": f"{first:.2f} → {last:.2f}" if last < first else f"no: {first:.2f} → {last:.2f}",
        "importance moves": f"{min(scores):+.2f} … {max(scores):+.2f}" if max(scores) - min(scores) > 0.01 else "no",
    }


def as_table(answers: dict[str, dict[str, str]]) -> str:
    columns = list(next(iter(answers.values())))
    lines = [f"| family | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {name} | {' | '.join(row.values())} |" for name, row in answers.items()])


def main() -> None:
    answers = {}
    for name in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            answers[name] = try_family(name, Path(folder))
            print(name, answers[name], flush=True)
    publish("families", as_table(answers), ROOT / "ist/adapters/README.md", configurations=FAMILIES, answers=answers)


if __name__ == "__main__":
    main()
