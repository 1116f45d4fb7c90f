"""Helpers of the tests: a tiny Llama with a tokenizer of its own, and what reads a run's files."""

import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else importing bitsandbytes imports the compiler, in every process
os.environ.pop("WANDB_RUN_ID", None)

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ist.training.packages import release

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


NEEDS_8BIT_ON_CPU = pytest.mark.skipif(
    not torch.cuda.is_available() and release(version("bitsandbytes")) < (0, 50),
    reason="8-bit optimizers on a CPU need bitsandbytes 0.50",
)


def tiny_config(n_layers: int = 4, **options) -> LlamaConfig:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(num_hidden_layers=n_layers, **{"vocab_size": 400, "initializer_range": 0.2, **shape, **options})


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


@functools.cache
def warm_python() -> str:
    """In the place of sys.executable, for launches: an interpreter that has imported the libraries (warm.py)."""
    folder, script = Path(tempfile.mkdtemp()), Path(__file__).parent / "warm.py"
    address, interpreter = folder / "socket", folder / "python"
    subprocess.Popen([sys.executable, script, "serve", address], cwd=ROOT)  # it ends with this process
    command = shlex.join([sys.executable, "-I", "-S", str(script), "client", str(address)])
    interpreter.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    interpreter.chmod(0o755)
    for _ in range(3000):
        if address.exists():
            return str(interpreter)
        time.sleep(0.1)
    raise TimeoutError("no process with the libraries imported")


def peft_class(name: str) -> type:
    """A class of PEFT's that older versions lack, where the test is skipped."""
    if not hasattr(peft, name):
        pytest.skip(f"PEFT {peft.__version__} has no {name}")
    return getattr(peft, name)


def reset_accelerate() -> None:
    """Accelerate keeps its state in singletons: a second run in one process starts from none."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reseal(folder: Path, state: dict) -> None:
    """Write a checkpoint's state with the digests of its files as they are now."""
    names = ("adapter.safetensors", "optimizer.safetensors")
    state |= {"files": {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}}
    rest = {key: value for key, value in state.items() if key not in ("format", "digest")}
    state["digest"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    (folder / "checkpoint.json").write_text(json.dumps(state))


def offline_records(run: Path) -> list[list[dict]]:
    """The records of an offline W&B run, one for each time that it was started, as wandb reads them back.

    Accelerate 1.10 starts W&B twice when it is offline; nothing is logged to the first.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json"]
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    printed = [subprocess.run([*command, file], check=True, capture_output=True, text=True).stdout for file in files]
    records = [[json.loads(line) for line in text.splitlines()] for text in printed]
    started_twice = release(version("accelerate")) < (1, 15)
    return [record for record in records if of_type(record, "history") or not started_twice]


def of_type(record: list[dict], kind: str) -> list[dict]:
    """The entries of one type: run, history, exit, artifact, preempting ..."""
    return [entry[kind] for entry in record if entry["type"] == kind]
