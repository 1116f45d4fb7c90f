"""A tiny Llama with a tokenizer of its own, word problems as rows, and train_ist.py as a function and as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("WANDB_RUN_ID", None)

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ist.training.word_problems import arithmetic_rows

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def hf_cache(tmp_path_factory):
    """No test reads or fills the user's caches."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    os.environ["HF_DATASETS_CACHE"] = str(datasets.config.HF_DATASETS_CACHE)
    datasets.disable_progress_bars()


def tiny_config(n_layers: int = 4, **options) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(num_hidden_layers=n_layers, **{"vocab_size": 400, "initializer_range": 0.2, **shape, **options})


@pytest.fixture(scope="session")
def rows() -> list[dict]:
    return arithmetic_rows(60, seed=1, held_out=False)


def make_tiny(folder: Path, rows: list[dict]) -> Path:
    """A folder with a 4-layer random Llama and a BPE tokenizer trained on the rows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([row["instruction"] + row["output"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, rows) -> Path:
    return make_tiny(tmp_path_factory.mktemp("tiny"), rows)


@pytest.fixture(scope="session")
def train_file(tmp_path_factory, rows) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.json"
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture
def arguments(tiny, train_file, tmp_path):
    """The command line of a short run in tmp_path/run, with overrides: arguments(max_steps=20) -> list of strings."""

    def make(**overrides) -> list[str]:
        values = {
            **{"model_name_or_path": tiny, "train_file": train_file, "output_dir": tmp_path / "run"},
            **{"report_to": "none", "warmup_steps": 2, "max_steps": 20, "update_interval": 4, "logging_steps": 1},
            **{"lora_r": 4, "lora_alpha": 8, "learning_rate": 5e-3, "score_lr": 100},
            **overrides,
        }
        return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]

    return make


def reset_accelerate() -> None:
    """Accelerate keeps its state in singletons: a second run in one process starts from none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def train(arguments):
    """Run train_ist.py's main in this process: train(max_steps=20) -> exit code."""
    import train_ist

    def run(**overrides) -> int:
        reset_accelerate()
        return train_ist.main(arguments(**overrides))

    return run


@pytest.fixture
def train_process(arguments):
    """Run `python train_ist.py` as a process of its own."""

    def run(**overrides) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "train_ist.py"), *arguments(**overrides)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)

    return run


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="session")
def work(tmp_path_factory, rows) -> Path:
    """Where the launches of rules.py find their model and rows, and leave their runs."""
    folder = tmp_path_factory.mktemp("rules")
    make_tiny(folder / "tiny", rows)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="session")
def topologies(work) -> dict[str, dict]:
    """All rules, trained on each topology; a worker makes it once."""
    import rules

    return {topology: rules.launch(topology, work) for topology in ("one", "ddp", "fsdp2")}


def offline_records(run: Path) -> list[list[dict]]:
    """The records of an offline W&B run, one for each time that it was started, as wandb reads them back."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    printed = [subprocess.run([*command, file], check=True, capture_output=True, text=True).stdout for file in files]
    return [[json.loads(line) for line in text.splitlines()] for text in printed]


def of_type(record: list[dict], kind: str) -> list[dict]:
    """The entries of one type: run, history, exit, artifact, preempting ..."""
    return [entry[kind] for entry in record if entry["type"] == kind]
