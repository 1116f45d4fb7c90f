"""Whether every topology trains the same: one process, DDP, FSDP2 and HSDP, a resume across them, and a killed rank."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ist.training.files import read_lines
from ist.training.word_problems import arithmetic_rows

ROOT = Path(__file__).parents[2]
STEPS, SAVE, BATCH = 20, 10, 8
LOSS, ADAPTER = 1e-4, 1e-3  # largest difference allowed: of a loss; of the adapter, relative to its norm
SECONDS = 300  # of one launch


def write_inputs(folder: Path) -> None:
    """A Llama of four layers with a tokenizer of bytes, and word problems."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokens, **special).save_pretrained(folder / "model")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, **sizes)).save_pretrained(folder / "model")
    (folder / "rows.json").write_text(json.dumps(arithmetic_rows(64, seed=1, held_out=False)))


class Launches:
    """Launches of train_ist.py in a folder, on GPUs or, where there are too few, as gloo ranks on the CPU."""

    def __init__(self, folder: Path, gpus: bool) -> None:
        self.folder, self.gpus = folder, gpus

    def start(self, name: str, topology: str, ranks: int, **keys: Any) -> tuple[subprocess.Popen, str]:
        """The process, and a mark in the environment of all that it starts."""
        values = {
            **{"model_name_or_path": self.folder / "model", "train_file": self.folder / "rows.json"},
            **{"output_dir": self.folder / name, "report_to": "none", "max_steps": STEPS, "save_steps": SAVE},
            **{"per_device_train_batch_size": BATCH // ranks, "update_interval": 5, "score_lr": 1000, "lora_r": 8},
            **{"lora_dropout": 0, "learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 1, "validation_size": 8},
            **{"trained_layers": 1, "resume_from_checkpoint": "auto", **keys},
        }
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
        command += ["--config_file", f"accelerate_configs/{topology}.yaml", "--num_processes", str(ranks)]
        if topology == "hsdp":
            command += ["--parallelism_config_dp_replicate_size", "2"]
            command += ["--parallelism_config_dp_shard_size", str(ranks // 2)]
        script = ["train_ist.py"] if self.gpus else ["ist/benchmark/fsdp_on_cpu.py", "train_ist"]
        mark = uuid.uuid4().hex
        environment = os.environ | {"IST_PARITY": mark, "TOKENIZERS_PARALLELISM": "false"}
        if not self.gpus:
            environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        flags = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        log = open(self.folder / f"{name}.log", "a")  # noqa: SIM115 - the child's
        options = {"stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen([*command, *script, *flags], cwd=ROOT, env=environment, **options), mark

    def wait(self, process: subprocess.Popen) -> int | None:
        """Its exit code; None where it had to be ended."""
        try:
            return process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None

    def whole(self, name: str, topology: str, ranks: int, **keys: Any) -> str | None:
        """Why a launch did not do what it should; None if it did."""
        code = self.wait(self.start(name, topology, ranks, **keys)[0])
        run = self.folder / name / "run.json"
        if code != 0 or not run.exists() or json.loads(run.read_text())["status"] != "finished":
            return f"ended with {code}, see {self.folder / name}.log"
        kind = json.loads(run.read_text())["distributed_type"]
        return f"ran as {kind}" if (kind == "FSDP") != (topology in ("fsdp2", "hsdp")) else None

    def killed(self, name: str, topology: str, ranks: int) -> str | None:
        """Kill rank 1 between the first save and the end; the others must end, and not well."""
        process, mark = self.start(name, topology, ranks)
        metrics, deadline = self.folder / name / "metrics.jsonl", time.monotonic() + SECONDS
        while not (metrics.exists() and any(line["step"] > SAVE + 1 for line in read_lines(metrics))):
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                return "ended, or did not get so far, before it could be killed"
            time.sleep(0.01)
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = entry.read_bytes().split(b"\0")
            except OSError:
                continue
            if f"IST_PARITY={mark}".encode() in variables and b"RANK=1" in variables:
                os.kill(int(entry.parent.name), signal.SIGKILL)
        code = self.wait(process)
        return None if code else f"the launch of a killed rank ended with {code}"


def _course(run: Path) -> tuple[list[dict], list[dict], dict[str, torch.Tensor]]:
    files = (read_lines(run / "metrics.jsonl"), read_lines(run / "importance.jsonl"))
    return *files, load_file(run / "adapter/adapter_model.safetensors")


def differences(run: Path, reference: Path) -> tuple[str, float, float]:
    """(what differs that may not, largest difference of a loss, of the adapter relative to its norm), in the run's
    steps; it may have begun at a checkpoint."""
    (lines, updates, adapter), (expected, known, weights) = _course(run), _course(reference)
    begin = min((line["step"] for line in lines), default=0)
    expected = [line for line in expected if line["step"] >= begin]
    known = [update for update in known if update["step"] >= begin - 1]
    wrong = []
    if [line.get("trained_layers") for line in lines] != [line.get("trained_layers") for line in expected]:
        wrong.append("other steps, or other layers in them")
    if [update["candidates"] for update in updates] != [update["candidates"] for update in known]:
        wrong.append("other candidates")
    if wrong or adapter.keys() != weights.keys():
        return ", ".join(wrong) or "another adapter", math.nan, math.nan
    pairs = [(one, other, "loss" if "loss" in one else "validation_loss") for one, other in zip(lines, expected)]
    norm = sum(float(weights[name].double().square().sum()) for name in weights) ** 0.5
    apart = sum(float((adapter[name].double() - weights[name].double()).square().sum()) for name in weights) ** 0.5
    return "", max(abs(one[key] - other[key]) for one, other, key in pairs), apart / norm


def check(folder: Path, ranks: int, say: Callable[[str], None]) -> tuple[list[list[str]], bool]:
    """(header and rows of the table, whether all are equal) of `ranks` processes; HSDP where they are 4, 6, 8, ..."""
    gpus = torch.cuda.device_count() >= ranks
    write_inputs(folder)
    launches, rows, equal = Launches(folder, gpus), [], True
    steps: list[tuple[str, Callable[[str], str | None]]] = [("one process", lambda n: launches.whole(n, "single", 1))]
    sharded = ["fsdp2", *(["hsdp"] if ranks >= 4 and ranks % 2 == 0 else [])]
    for topology in ("ddp", *sharded):
        steps.append((topology, lambda n, topology=topology: launches.whole(n, topology, ranks)))
    checkpoint = folder / f"ddp/checkpoints/step_{SAVE:06d}"
    resumed = {"resume_from_checkpoint": checkpoint}
    steps.append(("ddp to fsdp2", lambda n: launches.whole(n, "fsdp2", ranks, **resumed)))
    again = "a killed rank, resumed"
    steps.append((again, lambda n: launches.killed(n, "fsdp2", ranks) or launches.whole(n, "fsdp2", ranks)))
    for title, launch in steps:
        name, start = title.split(",")[0].replace(" ", "-"), time.monotonic()
        wrong, loss, adapter = launch(name) or "", math.nan, math.nan
        if not wrong:
            wrong, loss, adapter = differences(folder / name, folder / "one-process")
        fine = not wrong and loss <= LOSS and adapter <= ADAPTER
        equal = equal and fine
        verdict = "equal" if fine else wrong or "too far apart"
        rows.append([title, f"{loss:.1e}", f"{adapter:.1e}", f"{time.monotonic() - start:.0f}", verdict])
        say(" | ".join(rows[-1]))
    header = [f"{ranks} {'GPUs' if gpus else 'gloo ranks on the CPU'}", "loss", "adapter", "seconds", "to one process"]
    return [header, *rows], equal
