"""A model that is measured, not trained: its arguments, its texts, likelihoods and perplexity, and its folder."""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import ist.adapters  # noqa: F401  its methods become known to PEFT
from ist.distributed import from_main, reduce_sum
from ist.training.command_line import UsageError, brief, require
from ist.training.continuing import CONFIG, adapter_digest
from ist.training.data import collate
from ist.training.encoding import TEMPLATES, load_tokenizer
from ist.training.export import stop_ids
from ist.training.files import model_digest, read_object, write_json
from ist.training.model import nf4
from ist.training.packages import is_packed, require_package
from ist.training.record import require_writable
from ist.training.weights import is_quantised, load_adapter, load_pretrained


class Scorer:
    """A model and its tokenizer: generated texts, likelihoods, perplexity."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, args: "ScorerArguments") -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.device = next(model.parameters()).device
        self.special = args.prompt_template != "chat"  # a chat template writes its own
        self.stops = stop_ids(tokenizer, args.prompt_template or "alpaca", model.generation_config)

    @torch.inference_mode()
    def generate(self, prompts: list[str], max_new_tokens: int) -> list[str]:
        """The text that follows each prompt. Padded on the left and masked: a row does not depend on its batch."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=self.special)
        tokens = self.model.generate(
            **inputs.to(self.device),
            max_new_tokens=max_new_tokens,
            num_beams=self.args.num_beams,
            do_sample=False,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.stops or None,
        )
        answers = [
            list(takewhile(lambda token: token not in self.stops, answer))
            for answer in tokens[:, inputs["input_ids"].shape[1] :].tolist()
        ]
        return self.tokenizer.batch_decode(answers, skip_special_tokens=True)

    @torch.inference_mode()
    def log_likelihoods(self, pairs: list[tuple[str, str]]) -> list[float]:
        """log p(continuation | prompt), summed over the continuation's tokens, for each (prompt, continuation)."""
        rows, starts = [], []
        for prompt, continuation in pairs:
            before = self.tokenizer(prompt, add_special_tokens=self.special)["input_ids"]
            whole = self.tokenizer(prompt + continuation, add_special_tokens=self.special)["input_ids"]
            if self.special and whole[-1] == self.tokenizer.eos_token_id:
                whole = whole[:-1]
            same = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
            rows.append(whole)
            starts.append(max(same, 1))
        batch = collate(rows, rows, self.tokenizer.pad_token_id)
        ids, mask = batch["input_ids"].to(self.device), batch["attention_mask"].to(self.device)
        losses = self._token_losses(ids, mask)  # [B, width - 1]: of token t + 1
        return [-losses[i, start - 1 : len(row) - 1].sum().item() for i, (row, start) in enumerate(zip(rows, starts))]

    def _token_losses(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()

    @torch.inference_mode()
    def perplexity(self, text: str, max_length: int, state: PartialState) -> dict[str, float]:
        """exp of the mean loss of a text's tokens, in windows of `max_length` end to end, shared out over ranks."""
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        mine = windows(self.tokenizer, text, max_length)[state.process_index :: state.num_processes]
        for window in progress(mine, "window", state):
            batch = torch.tensor([window], device=self.device)
            losses = self._token_losses(batch, torch.ones_like(batch))
            total += torch.tensor([losses.sum().item(), losses.numel()], dtype=torch.float64, device=self.device)
        loss_sum, tokens = reduce_sum(total).tolist()
        return {"perplexity": math.exp(loss_sum / tokens), "loss": loss_sum / tokens, "tokens": int(tokens)}


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, max_length: int, max_tokens: int | None = None
) -> list[list[int]]:
    """The first `max_tokens` tokens of a text, `max_length` at a time; the first of a window is not predicted.

    Where the tokenizer begins a text with BOS each window does, and all tokens of its own are predicted: without BOS
    Gemma 3 270M has two and a half times its perplexity (144 for 56 on wikitext-2).
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    begin = tokenizer("a")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    own = max_length - len(begin)
    cut = [[*begin, *ids[start : start + own]] for start in range(0, len(ids), own)]
    return [window for window in cut if len(window) > 1]


def progress(items: Sequence, unit: str, state: PartialState) -> Iterator:
    """A bar on a terminal, ten lines elsewhere; rank 0 only."""
    if sys.stderr.isatty():
        yield from tqdm(items, unit=unit, disable=not state.is_main_process)
        return
    for i, item in enumerate(items):
        yield item
        if state.is_main_process and ((i + 1) * 10 // len(items) > i * 10 // len(items)):
            print(f"{unit} {i + 1} of {len(items)}", flush=True)


@dataclass
class ScorerArguments:
    """The keys of a model that is measured: of `python -m ist.evaluate` and `python -m ist.analyze`."""

    free_keys: ClassVar[tuple[str, ...]] = ("output_dir",)

    model_name_or_path: str = field(metadata={"help": "The base model."})
    output_dir: str = field(metadata={"help": "Where the results go."})
    adapter: str | None = field(default=None, metadata={"help": "Folder of a PEFT adapter; default: the base alone."})
    any_base: bool = field(default=False, metadata={"help": "Take an adapter that names another base model."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "Of the base weights."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Base weights as 4-bit NF4 (bitsandbytes), as a QLoRA run trained on them."}
    )
    prompt_template: Literal["alpaca", "llm_adapters", "ist_repository", "chat", "none"] | None = field(
        default=None, metadata={"help": "Default: that of the run that made the adapter (its run.json), else alpaca."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "In the place of the tokenizer's; default: that of the adapter, or of its run."},
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of a window of plain text."})
    batch_size: int = field(default=16, metadata={"help": "Rows at a time."})

    def __post_init__(self) -> None:
        require_package("scipy", "an evaluation")
        if self.load_in_4bit:
            require_package("bitsandbytes", "--load_in_4bit true")
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.max_length >= 2, "max_length", "2 or more tokens", self.max_length)


def require_base(args: ScorerArguments) -> None:
    """Raises UsageError if the folder holds no adapter, or one whose configuration names another base model."""
    if not args.adapter:
        return
    base = adapter_config(args.adapter).base_model_name_or_path
    if base and Path(base).name.lower() != Path(args.model_name_or_path).name.lower() and not args.any_base:
        raise UsageError(
            f"--adapter {args.adapter} belongs to {base}, not to {args.model_name_or_path}; --any_base true takes it."
        )


def adapter_config(folder: str) -> PeftConfig:
    """
    Raises:
        UsageError: the folder holds no adapter, or its configuration is none of PEFT's.
    """
    file = Path(folder) / CONFIG
    if not file.exists():
        raise UsageError(f"--adapter {folder} is not a folder with an adapter (no {CONFIG}).")
    values = read_object(file, "--adapter")
    try:
        if not isinstance(values.get("base_model_name_or_path") or "", str):
            raise TypeError(f"base_model_name_or_path must be a name; got {values['base_model_name_or_path']}")
        return PeftConfig.from_pretrained(folder)
    except Exception as error:  # whatever PEFT raises here, it is about this file
        told = f"it has no {error}" if isinstance(error, KeyError) else brief(error)
        raise UsageError(f"--adapter {file} is no configuration of PEFT's: {told}. Repair it.") from error


def digests_of(args: "ScorerArguments", training: dict | None) -> dict[str, str | None]:
    """{model_digest, adapter_digest} by content, read by the main process alone.

    Raises:
        UsageError: the base model's files are no longer those that the adapter was trained on.
    """

    def read() -> dict[str, str | None]:
        base = model_digest(args.model_name_or_path)
        there = training["configuration"] if training and args.adapter and not args.any_base else {}
        same_name = there.get("model_name_or_path") == args.model_name_or_path
        if same_name and there.get("model_digest", base) != base:
            raise UsageError(
                f"--model_name_or_path {args.model_name_or_path}: its files have changed since the adapter was trained "
                "on them; --any_base true takes them."
            )
        return {"model_digest": base, "adapter_digest": adapter_digest(args.adapter)}

    return from_main(read, UsageError)


def read_text(key: str, file: str) -> str:
    """Raises UsageError when it cannot be read, or is empty."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--{key} {file} cannot be read: {brief(error)}.") from error
    if not text.strip():
        raise UsageError(f"--{key} {file} is empty.")
    return text


def tokenizer_of(args: ScorerArguments, **options: Any) -> PreTrainedTokenizerBase:
    """The adapter's, which has the chat template that it was trained with; else the model's."""
    own = args.adapter and (Path(args.adapter) / "tokenizer_config.json").exists()
    named = ("adapter", args.adapter) if own else ("model_name_or_path", args.model_name_or_path)
    return load_tokenizer(*named, args.prompt_template, args.chat_template, **options)


def load_scorer(args: ScorerArguments, device: torch.device) -> Scorer:
    tokenizer = tokenizer_of(args, padding_side="left")
    options: dict[str, Any] = {"dtype": args.dtype}
    if args.load_in_4bit:
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
        options = {"quantization_config": nf4(dtype), "dtype": dtype}
    if args.load_in_4bit or is_quantised(args.model_name_or_path):
        options["device_map"] = {"": device}  # packed weights stay where they were packed
    model = load_pretrained(AutoModelForCausalLM, args.model_name_or_path, **options)
    if args.adapter:
        model = load_adapter(model, args.adapter)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if "device_map" not in options:
        model = model.to(device)
    for module in model.modules():
        if is_packed(getattr(module, "weight", None)) and not _is_in_whole_blocks(module.weight):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes cannot pack such weights for it
    return Scorer(model.eval(), tokenizer, args)


def _is_in_whole_blocks(weight: nn.Parameter) -> bool:
    rows, columns = weight.quant_state.shape
    return rows % 32 == 0 and columns % weight.quant_state.blocksize == 0


def training_run(folder: str) -> dict | None:
    """Configuration, commit, best and steps of the run that made the adapter or model, if its run.json is there.

    Raises:
        UsageError: it cannot be read, or is broken: the prompts would be other ones than in training.
    """
    file = Path(folder) / "../run.json"
    if not file.exists():
        return None
    run = read_object(file)
    configuration = run.get("configuration")
    if not isinstance(configuration, dict):  # of something else
        return None
    return {"configuration": configuration, **{key: run.get(key) for key in ("commit", "best", "steps")}}


def start(args: ScorerArguments) -> tuple[PartialState, dict | None]:
    """(the processes, the training run or None); args.prompt_template gets the training run's where it has its default.

    Raises:
        UsageError: the launcher shards models, or the adapter belongs to another base model.
    """
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise UsageError("evaluation puts a whole model on each device: launch with accelerate_configs/ddp.yaml.")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    training = training_run(args.adapter or args.model_name_or_path)
    if args.prompt_template is None:
        template = training["configuration"].get("prompt_template", "alpaca") if training else "alpaca"
        if template not in (*TEMPLATES, "chat"):
            file = Path(args.adapter or args.model_name_or_path) / "../run.json"
            raise UsageError(f"{file} has the prompt_template {template}, which is none: give --prompt_template.")
        args.prompt_template = template
    has_own = args.adapter and (Path(args.adapter) / "tokenizer_config.json").exists()
    if args.chat_template is None and args.prompt_template == "chat" and training and not has_own:
        args.chat_template = training["configuration"].get("chat_template")
    require_base(args)
    return state, training


def deciding(args: ScorerArguments) -> dict[str, Any]:
    """The arguments that decide the results; the others, `free_keys`, a run that goes on may change."""
    return {key: value for key, value in asdict(args).items() if key not in args.free_keys}


WHAT_DIFFERS = {  # digests, in the words of the command line
    "model_digest": "model_digest (the files of --model_name_or_path)",
    "adapter_digest": "adapter_digest (the files of --adapter)",
}


def claim_folder(
    output_dir: Path,
    settings: dict,
    state: PartialState,
    answered: dict[str, str] | None = None,
    results: Sequence[str] = (),
) -> None:
    """Write the settings that decide the results into their folder, as arguments.json.

    Args:
        answered: {task: digest of its rows} of the tasks that the folder may hold answers of. Other tasks of the folder
            stay as they are.
        results: names of files that depend on the settings.

    Raises:
        UsageError: the folder cannot be written, or holds the results of others: other settings, or other rows of a
            task.
    """
    require_writable(output_dir)
    file = output_dir / "arguments.json"
    earlier = read_object(file, "--output_dir") if file.exists() else None
    rows = (earlier or {}).pop("rows", {})
    rows = rows if isinstance(rows, dict) else {}
    differing = []
    if earlier is not None:
        # A folder of an earlier version has no value of a newer key, which was its default.
        earlier = {key.name: key.default for key in fields(ScorerArguments)} | earlier
        keys = [key for key in settings if key not in earlier or settings[key] != earlier[key]]
        differing = [WHAT_DIFFERS.get(key, key) for key in keys]
    elif any((output_dir / name).exists() for name in results):
        raise UsageError(
            f"--output_dir {output_dir} holds results of unknown arguments (no {file.name}). Choose another folder."
        )
    for task, digest in (answered or {}).items():
        if rows.get(task) != digest and (shards(output_dir, task) or (output_dir / f"{task}.jsonl").exists()):
            differing.append(f"{task} (the rows of --test_file)")
    if differing:
        raise UsageError(
            f"--output_dir {output_dir} holds results of another {', '.join(differing)}. Choose another folder."
        )
    state.wait_for_everyone()
    if state.is_main_process:
        write_json(file, settings | ({"rows": rows | answered} if answered is not None else {}))


def shards(output_dir: Path, task: str) -> list[Path]:
    """The files of answers to a task that ranks have written, of this run and of those before: .TASK.UUID.jsonl."""
    name = re.compile(rf"\.{re.escape(task)}\.[0-9a-f]{{32}}\.jsonl")
    return sorted(path for path in output_dir.iterdir() if name.fullmatch(path.name))
