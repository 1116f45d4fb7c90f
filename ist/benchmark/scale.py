"""The cost of the method's bookkeeping as layers, candidates and updates grow."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ist.benchmark.arms import run_ours, silent
from ist.training.command_line import markdown_table


def make_geometry(folder: Path, n_layers: int, tokenizer: Path, **shape) -> Path:
    """A random Llama of a given shape, with the tokenizer of another folder."""
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    config = LlamaConfig(num_hidden_layers=n_layers, vocab_size=vocabulary, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    with silent():
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}


def measure_scale(flags: dict, tokenizer: Path, layers: Sequence[int], say: Callable[[str], None]) -> list[list[str]]:
    """Rows of the scale table: seconds of a step, and the share of the method's own bookkeeping.

    Bookkeeping is the method's share of a loop without its probes: draws, switching, records. One run each.
    """
    rows = []

    def row(name: str, **settings) -> None:
        result = run_ours(flags | settings, parts=True)
        total, probe, own = (result[part] for part in ("total", "probe", "bookkeeping"))
        rows.append(
            [name, f"{1e3 * total:.0f}", f"{1e3 * probe:.1f}", f"{1e3 * own:.2f}", f"{100 * own / total:.2f} %"]
        )
        say(" | ".join(rows[-1]))

    with tempfile.TemporaryDirectory() as folder:
        for n_layers in layers:
            model = make_geometry(Path(folder) / str(n_layers), n_layers, tokenizer, **SHAPE)
            row(f"{n_layers} layers", model_name_or_path=model)
        smallest = {"model_name_or_path": Path(folder) / str(layers[0])}
        for candidates in (2, 6):
            row(f"{layers[0]} layers, {candidates} candidates", candidates=candidates, **smallest)
        for interval in (2, 5):
            row(f"{layers[0]} layers, an update every {interval} steps", update_interval=interval, **smallest)
    return rows


def scale_table(rows: list[list[str]]) -> str:
    header = ["ist", "ms per step", "probes, ms per step", "bookkeeping, ms per step", "bookkeeping share"]
    return "\n".join(markdown_table(header, rows))
