"""The PEFT methods that are tested, and the tables of ist/adapters/README.md.

python tests/support/method_table.py    makes both tables again, of launch/results/methods.json and adapters/support.py
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from accelerate import Accelerator

from ist.adapters.support import LIMITS
from ist.report import tables as report
from ist.training.command_line import markdown_table
from support import reset_accelerate

COLON = 28  # in the tokenizer of support.make_tiny
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
# As a user writes them in --peft_config; sizes fit a tiny Llama (hidden 32, MLP 64, 4 layers).
METHODS: dict[str, dict] = {
    "LoRA": LORA,
    "rsLoRA": LORA | {"use_rslora": True},
    "DoRA": LORA | {"use_dora": True},
    "PiSSA": LORA | {"init_lora_weights": "pissa"},
    "OLoRA": LORA | {"init_lora_weights": "olora"},
    "LoRA with biases": LORA | {"lora_bias": True},
    "LoRA on parameters": LORA | {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    "LoRA and lm_head whole": LORA | {"modules_to_save": ["lm_head"]},
    "aLoRA": LORA | {"alora_invocation_tokens": [COLON]},
    "AdaLoRA": {"peft_type": "ADALORA", "init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 2, "deltaT": 2},
    "Series": {"peft_type": "SERIES", "bottleneck_size": 8, "target_modules": None},
    "Parallel": {"peft_type": "PARALLEL", "bottleneck_size": 8, "target_modules": None},
    "IA3": {"peft_type": "IA3", "feedforward_modules": ["down_proj"]},
    "LoHa": {"peft_type": "LOHA", "r": 4, "alpha": 8},
    "LoKr": {"peft_type": "LOKR", "r": 4, "alpha": 8},
    "OFT": {"peft_type": "OFT", "oft_block_size": 8},
    "BOFT": {"peft_type": "BOFT", "boft_block_size": 4},
    "VeRA": {"peft_type": "VERA", "r": 8},
    "PVeRA": {"peft_type": "PVERA", "r": 8},
    "HRA": {"peft_type": "HRA", "r": 4},
    "MiSS": {"peft_type": "MISS", "r": 4},
    "MiSS bat": {"peft_type": "MISS", "r": 4, "init_weights": "bat"},
    "FourierFT": {"peft_type": "FOURIERFT", "n_frequency": 50, "scaling": 10},
    "WaveFT": {"peft_type": "WAVEFT", "n_frequency": 48},
    "RandLoRA": {"peft_type": "RANDLORA", "r": 4, "randlora_alpha": 16},
    "SHiRA": {"peft_type": "SHIRA", "r": 2},
    "C3A": {"peft_type": "C3A", "block_size": 8},
    "RoAd": {"peft_type": "ROAD", "group_size": 8},
    "VB-LoRA": {"peft_type": "VBLORA", "r": 4, "num_vectors": 16, "vector_length": 8},
    "OSF": {"peft_type": "OSF", "effective_rank": 4},
    "DeLoRA": {"peft_type": "DELORA", "r": 4, "delora_lambda": 2},
    "GraLoRA": {"peft_type": "GRALORA", "r": 4},
    "GLoRA": {"peft_type": "GLORA", "r": 4},
    "HiRA": {"peft_type": "HIRA", "r": 4},
    "Lily": {"peft_type": "LILY", "r": 4, "stride_A": 1, "num_B": 2},
    "LN tuning": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "PSOFT": {"peft_type": "PSOFT", "r": 4},
    "PEANuT": {"peft_type": "PEANUT", "r": 4},
    "FRoD": {"peft_type": "FROD"},
    "DEFT": {"peft_type": "DEFT", "r": 4},
    "DEFT qr": {"peft_type": "DEFT", "r": 4, "decomposition_method": "qr"},
    "BEFT": {"peft_type": "BEFT"},
    "SuperTuning": {"peft_type": "SUPERTUNING", "sparsity": 0.5},
    "AdaMSS": {"peft_type": "ADAMSS", "r": 8, "num_subspaces": 2},
    "UniLoRA": {"peft_type": "UNILORA", "r": 4},
    "TinyLoRA": {"peft_type": "TINYLORA", "r": 2, "u": 8},
    "Trainable tokens": {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "Prompt tuning": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "target_modules": None},
    "Prefix tuning": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4, "target_modules": None},
    "P-tuning": {"peft_type": "P_TUNING", "num_virtual_tokens": 4, "target_modules": None},
    "LLaMA-Adapter": {"peft_type": "ADAPTION_PROMPT", "adapter_len": 4, "adapter_layers": 2, "target_modules": None},
    "Shadow": {"peft_type": "SHADOW", "target_modules": None},
}
CELLS = ["suppression", "rest", "resume", "reload", "4-bit", "DDP x2", "FSDP2 x2"]


WHY = {  # the reasons of a measured "no"
    ("PVeRA", "DDP x2"): "it trains on noise, which each rank draws for its own rows",
    ("PVeRA", "FSDP2 x2"): "it trains on noise, which each rank draws for its own rows",
    ("DEFT", "DDP x2"): "its first gradients are differences of equal numbers, so rounding, which Adam scales up",
    ("DEFT", "FSDP2 x2"): "its first gradients are differences of equal numbers, so rounding, which Adam scales up",
    ("Lily", "suppression"): "its router averages over the batch, so no row has a response of its own",
    ("Lily", "4-bit"): "its router averages over the batch, so no row has a response of its own",
    ("Lily", "DDP x2"): "its router averages over the batch, and a rank sees its part of it",
}


def as_table(answers: dict[str, dict[str, str]]) -> str:
    """Markdown; reasons become numbered notes below."""
    notes: dict[str, int] = {}

    def short(answer: str) -> str:
        word, _, reason = answer.partition(": ") if answer.startswith(("no", "n/a")) else answer.partition("; ")
        if not reason:
            return answer
        return f"{word} [{notes.setdefault(reason, len(notes) + 1)}]"

    lines = [f"| method | {' | '.join(CELLS)} |", "|---|" + "---|" * len(CELLS)]
    for name, cells in answers.items():
        if "refused" in cells:
            number = notes.setdefault(cells["refused"], len(notes) + 1)
            lines.append(f"| {name} | refused [{number}] |" + " |" * (len(CELLS) - 1))
        else:
            row = []
            for key in CELLS:
                answer, reason = cells.get(key, "n/a: it did not train"), WHY.get((name, key))
                explained = reason and re.search(r" off( at step \d+)?$", answer)  # of a difference, not of an error
                row.append(short(f"{answer} ({reason})" if explained else answer))
            lines.append(f"| {' | '.join([name, *row])} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())])


def limits_table() -> str:
    """Markdown: the methods that lack something, and why (ist/adapters/support.py)."""
    rows = [[kind, lack, reason] for kind, limits in LIMITS.items() for lack, reason in limits.items()]
    return "\n".join(markdown_table(["method", "lacks", "because"], rows))


def publish(name: str, table: str, readme: Path, **result) -> None:
    """launch/results/NAME.json, and its table in `readme`."""
    reset_accelerate()
    file, command = ROOT / f"launch/results/{name}.json", f"python tests/support/{name}.py"
    report.publish(file, command, Accelerator(cpu=True), table, readme, seed=42, **result)


if __name__ == "__main__":
    page = ROOT / "ist/adapters/README.md"
    answers = json.loads((ROOT / "launch/results/methods.json").read_text())["answers"]
    report.insert_table(page, "methods", as_table(answers))
    report.insert_table(page, "limits", limits_table())
