"""Rows in, token ids and labels out; and the one stream of global batches that depends on the seed alone."""

import glob
import hashlib
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ist.loss import IGNORE, count_predicted
from ist.sampler import seeded_generator
from ist.training.arguments import Arguments
from ist.training.command_line import UsageError, brief, require
from ist.training.files import file_digest, model_digest, require_no_pipes

_INTRO = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."
_PAD = " " * 16  # LLM-Adapters' prompt stands indented in its source, and the indentation is in the prompt

# template -> (prompt without input, prompt with input). llm_adapters is LLM-Adapters' training prompt to the byte.
TEMPLATES = {
    "alpaca": (
        _INTRO + _REQUEST + "\n\n### Instruction:\n{instruction}\n\n### Response:\n",
        _INTRO
        + _WITH_INPUT
        + _REQUEST
        + "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    ),
    "llm_adapters": (
        f"{_INTRO}{_REQUEST}  \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n{_PAD}### Response:\n{_PAD}",
        f"{_INTRO}{_WITH_INPUT}{_REQUEST} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n{_PAD}\n"
        f"{_PAD}### Input:\n{_PAD}{{input}}\n{_PAD}\n{_PAD}### Response:\n{_PAD}",
    ),
    "none": ("{instruction}", "{instruction}{input}"),
}


KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def _require_readable(key: str, file: str) -> None:
    """Raises UsageError for a file that is missing, empty, or not of the kind that its name says."""
    suffix = Path(file).suffix
    if suffix not in KINDS:
        raise UsageError(f"--{key} must end in .json, .jsonl or .parquet; got {file}.")
    if not Path(file).is_file():
        raise UsageError(f"--{key} {file}: no such file.")
    with open(file, "rb") as stream:
        start = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise UsageError(f"--{key} {file} is empty.")
    if KINDS[suffix] != "json":
        return
    if start[:1] not in (b"[", b"{"):
        raise UsageError(f"--{key} {file} is not valid {suffix[1:].upper()}: it starts with {start[:20]}.")
    with open(file, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"the byte 0x{line[error.start]:02x} in line {number}"
                raise UsageError(f"--{key} {file} is not UTF-8: {byte}. Save it as UTF-8.") from error


def load_rows(key: str, files: Sequence[str] = (), dataset_name: str | None = None) -> Dataset:
    """Rows of JSON, JSONL or Parquet files (one kind), or of the train split of a dataset on the Hub or on disk.

    Args:
        key: the argument the files came from, for the error messages.

    Raises:
        UsageError: a file is missing, empty or of another kind than its name says; no rows; columns other than
            {instruction, output, input (optional)} or {messages}.
    """
    source = dataset_name or ", ".join(map(str, files))
    for file in files:
        _require_readable(key, file)
    if len({KINDS[Path(file).suffix] for file in files}) > 1:
        raise UsageError(f"--{key} must not mix JSON and Parquet; got {source}.")
    paths = [glob.escape(str(file)) for file in files]  # datasets takes a name with * or [ for a pattern
    # Its cache knows a file by path and time; as the configuration's name the content counts.
    digest = hashlib.sha256("".join(map(file_digest, map(Path, files))).encode()).hexdigest()[:32]
    logger = logging.getLogger("datasets")  # the error below says in one line what it logs
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        if dataset_name:
            rows = datasets.load_dataset(dataset_name, split="train")
        else:
            rows = datasets.load_dataset(KINDS[Path(files[0]).suffix], data_files=paths, name=digest, split="train")
    except Exception as error:  # datasets wraps whatever the readers raise; the innermost says what is wrong
        while error.__cause__ is not None:
            error = error.__cause__
        kind = "cannot be loaded" if dataset_name else f"is not valid {Path(files[0]).suffix[1:].upper()}"
        if isinstance(error, OSError) and error.strerror and error.filename:
            kind = (
                f"cannot be read, or its cache {datasets.config.HF_DATASETS_CACHE} written; HF_DATASETS_CACHE sets it"
            )
        raise UsageError(f"--{key} {source} {kind} ({brief(error)}).") from error
    finally:
        logger.setLevel(level)
    if len(rows) == 0:
        raise UsageError(f"--{key} {source} holds no rows.")
    columns = set(rows.column_names)
    if not ({"instruction", "output"} <= columns or "messages" in columns):
        raise UsageError(
            f"--{key} {source} needs the columns instruction and output (input is optional), or messages; "
            f"it has {', '.join(rows.column_names)}."
        )
    return rows


def _text(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, (str, int, float)):
        raise UsageError(f"has a {type(value).__name__} in {column}, where text is wanted")
    return str(value)


def _user_turn(row: dict) -> dict:
    instruction, extra = _text(row, "instruction"), _text(row, "input")
    return {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}


def _render(tokenizer, messages: list[dict], **options) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates raise what they like: no system turn, turns that do not alternate
        raise UsageError(f"does not suit the model's chat template: {brief(error)}") from error


def make_prompt(row: dict, template: str, tokenizer) -> str:
    """The text before the answer of an instruction row, as the model sees it in training and in generation."""
    if template == "chat":
        return _render(tokenizer, [_user_turn(row)], add_generation_prompt=True)
    instruction, extra = _text(row, "instruction"), _text(row, "input")
    return TEMPLATES[template][bool(extra)].format(instruction=instruction, input=extra)


def _turns(row: dict, template: str) -> list[dict]:
    """A row as chat turns.

    Raises:
        UsageError: the row has no answer, no instruction, or messages that this template cannot render.
    """
    if row.get("messages") is None:
        answer = _text(row, "output")
        if not answer.strip():
            raise UsageError("has no answer: output is empty")
        if not _text(row, "instruction").strip() and template != "none":
            raise UsageError("has no instruction")
        return [_user_turn(row), {"role": "assistant", "content": answer}]
    messages = row["messages"]
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise UsageError('must hold messages as a list of {"role": text, "content": text}')
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise UsageError("has no answer: no assistant turn with content")
    if template != "chat":
        raise UsageError(f"holds messages, which need --prompt_template chat; got {template}")
    return messages


def _segments(row: dict, template: str, tokenizer) -> list[tuple[str, bool]]:
    """A row as [(text, whether the model is to learn it)]: prompt and answer, or every turn of a chat."""
    turns = _turns(row, template)
    if template != "chat":
        return [(make_prompt(row, template, tokenizer), False), (turns[-1]["content"], True)]
    # Where each turn stands in the whole text: by rendering the conversation up to it.
    text = _render(tokenizer, turns)
    segments, end = [], 0
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            if i == 0:  # no template renders an empty conversation
                before = text[: text.find(turn["content"].strip())]
            else:
                before = _render(tokenizer, turns[:i], add_generation_prompt=True)
            after = _render(tokenizer, turns[: i + 1]).rstrip()
            if not (text.startswith(after) and after.startswith(before)):
                raise UsageError("cannot be split into turns: the chat template rewrites earlier turns")
            segments += [(text[end : len(before)], False), (text[len(before) : len(after)], True)]
            end = len(after)
    return [*segments, (text[end:], False)]


def encode(row: dict, template: str, tokenizer, max_length: int, completion_only_loss: bool) -> dict:
    """Token ids and labels of one row; {"input_ids": list, "labels": list}, at most `max_length` long.

    The text is tokenised whole, as LLM-Adapters does; a token that spans prompt and answer belongs to the answer. EOS
    follows if it fits (chat templates write their own).

    Raises:
        UsageError: the row has no answer, or does not suit the template.
    """
    segments = _segments(row, template, tokenizer)
    text = "".join(part for part, _ in segments)
    encoded = tokenizer(text, add_special_tokens=template != "chat", return_offsets_mapping=completion_only_loss)
    ids = labels = encoded["input_ids"]
    if not ids:
        raise UsageError("has no tokens: the tokenizer makes none of its text")
    if completion_only_loss:
        learn = np.repeat([is_answer for _, is_answer in segments], [len(part) for part, _ in segments])
        spans = encoded["offset_mapping"]  # (start, end) in the text; special tokens that were added are (x, x)
        labels = [token if learn[start:end].any() else IGNORE for token, (start, end) in zip(ids, spans)]
    eos = tokenizer.eos_token_id
    if template != "chat" and eos is not None:
        written = ids[-1] == eos  # by a tokenizer that adds it itself
        ids, labels = (ids, [*labels[:-1], eos]) if written else ([*ids, eos], [*labels, eos])
    return {"input_ids": ids[:max_length], "labels": labels[:max_length]}


def encode_rows(
    rows: Dataset, key: str, template: str, tokenizer, max_length: int, completion_only_loss: bool
) -> tuple[Dataset, int]:
    """(encoded rows with the columns input_ids, labels; how many were dropped as nothing of their answer fits).

    Raises:
        UsageError: naming the row (counted from 0) that cannot be used, or when none is left.
    """
    if completion_only_loss and not tokenizer.is_fast:
        raise UsageError("--completion_only_loss needs a fast tokenizer (tokenizer.json); this model has a slow one.")

    def encode_one(row: dict, index: int) -> dict:
        try:
            return encode(row, template, tokenizer, max_length, completion_only_loss)
        except UsageError as error:
            raise UsageError(f"--{key}: row {index} {error}.") from error

    # datasets fingerprints a function by its name, not by its code: name everything that matters.
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    specials = (tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.chat_template)
    settings = (template, specials, max_length, completion_only_loss, Path(__file__).read_text())
    encoded = rows.map(
        encode_one,
        with_indices=True,
        remove_columns=rows.column_names,
        new_fingerprint=Hasher.hash((rows._fingerprint, backend, settings)),
        desc=f"tokenising {key}",
    )
    fits = [i for i, labels in enumerate(encoded["labels"]) if count_predicted(labels)]
    if not fits:
        raise UsageError(f"--{key}: no row has an answer left within --max_length {max_length}. Raise --max_length.")
    dropped = len(encoded) - len(fits)
    return (encoded.select(fits) if dropped else encoded), dropped


class Data(NamedTuple):
    rows: Dataset  # columns input_ids, labels
    validation: Dataset | None
    dropped: int  # training rows with nothing of their answer within max_length
    pad_token_id: int


def load_tokenizer(key: str, name: str, template: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained(name, **options)`; `key` is the argument that names it, for the messages.

    Raises:
        UsageError: there is none, or `template` is chat and it has no chat template.
    """
    require_no_pipes(f"--{key} {name}", Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        raise UsageError(f"--{key} {name} has no tokenizer: {brief(error)}") from error
    if template == "chat" and not tokenizer.chat_template:
        raise UsageError("--prompt_template chat: the model's tokenizer has no chat template; use another template.")
    return tokenizer


def prepare_data(args: Arguments) -> Data:
    """Rows read, split and tokenised.

    Raises:
        UsageError: a file, a row, a split or a tokenizer that cannot be used.
    """
    name, trust = args.model_name_or_path, args.trust_remote_code
    tokenizer = load_tokenizer("model_name_or_path", name, args.prompt_template, trust_remote_code=trust)
    key = "train_file" if args.train_file else "dataset_name"
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    rows, validation = load_rows(key, args.train_file or (), args.dataset_name), None
    if args.validation_file:
        validation = load_rows("validation_file", args.validation_file)
    elif args.validation_size:
        size = args.validation_size if args.validation_size < 1 else int(args.validation_size)
        taken = math.ceil(size * len(rows)) if size < 1 else size
        require(taken < len(rows), "validation_size", f"less than the {len(rows)} rows there are", size)
        parts = rows.train_test_split(test_size=taken, seed=42)
        rows, validation = parts["train"], parts["test"]
    encoding = (args.prompt_template, tokenizer, args.max_length, args.completion_only_loss)
    rows, dropped = encode_rows(rows, key, *encoding)
    if validation is not None:
        validation, _ = encode_rows(validation, "validation_file" if args.validation_file else key, *encoding)
    pad_token_id = next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)
    return Data(rows, validation, dropped, pad_token_id)


def rows_digest(rows: Dataset) -> str:
    """sha256 of encoded rows in their order: of every token and label, and of where each row ends."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(["input_ids", "labels"]).with_format("arrow").iter(1000):
        for column in ("input_ids", "labels"):
            lists = batch[column].combine_chunks()
            for values in (lists.value_lengths(), lists.flatten()):
                digest.update(values.to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def content_digests(model_name_or_path: str, data: Data) -> dict[str, str]:
    """What a run is made from, by content and not by name, for its configuration: it resumes on the same alone.

    Raises:
        ReadError: the model's files cannot be read.
    """
    digests = {"model_digest": model_digest(model_name_or_path), "train_digest": rows_digest(data.rows)}
    if data.validation is not None:
        digests["validation_digest"] = rows_digest(data.validation)
    return digests


class GlobalBatches:
    """The stream of row indices: one permutation of the rows per epoch, end to end, cut into full global batches.

    It depends on (n_rows, batch_size, seed) alone, never on the number of ranks: batch `step` is stream[step * B :
    (step + 1) * B] and may span two epochs.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int) -> None:
        self.n_rows, self.batch_size, self.seed = n_rows, batch_size, seed
        self._permutations: dict[int, list[int]] = {}

    def rows(self, step: int) -> list[int]:
        """The [B] row indices of the global batch of `step`."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._permutation(place // self.n_rows)[place % self.n_rows] for place in places]

    def _permutation(self, epoch: int) -> list[int]:
        if epoch not in self._permutations:
            generator = seeded_generator(self.seed, epoch, "data")
            self._permutations = {e: p for e, p in self._permutations.items() if e >= epoch - 1}
            self._permutations[epoch] = torch.randperm(self.n_rows, generator=generator).tolist()
        return self._permutations[epoch]


def micro_batches(
    rows: Dataset,
    indices: Sequence[int],
    size: int,
    rank: int,
    world_size: int,
    pad_token_id: int,
    last_tokens: int | None = None,
    packing: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """This rank's share of `indices` as padded batches of `size` rows: input_ids, attention_mask, labels, all [B, S].

    Every rank gets the same number of batches (sharded forwards need it); where rows run out, a masked one stands. Of
    each row the `last_tokens` up to its last predicted one are taken. With `packing`, see `pack`.
    """
    for start in range(0, len(indices), size * world_size):
        share = indices[start + rank * size : start + (rank + 1) * size]
        batch = rows[list(share)] if share else {"input_ids": [[pad_token_id] * 2], "labels": [[IGNORE] * 2]}
        input_ids, labels = batch["input_ids"], batch["labels"]
        if last_tokens is not None:
            ends = [max((i for i, label in enumerate(row) if label != IGNORE), default=1) + 1 for row in labels]
            input_ids, labels = (
                [row[max(0, end - last_tokens) : end] for row, end in zip(rows_of, ends, strict=True)]
                for rows_of in (input_ids, labels)
            )
        yield pack(input_ids, labels) if packing else collate(input_ids, labels, pad_token_id)


def pack(input_ids: list[list[int]], labels: list[list[int]]) -> dict[str, Tensor]:
    """Rows end to end in one, without padding: input_ids, position_ids, labels, int64 [1, S].

    Positions begin anew with each row; transformers makes block-diagonal attention of that where there is no
    attention_mask. No row predicts the first token of the next.
    """
    return {
        "input_ids": torch.tensor([[token for ids in input_ids for token in ids]]),
        "position_ids": torch.tensor([[position for ids in input_ids for position in range(len(ids))]]),
        "labels": torch.tensor([[label for ids in labels for label in (IGNORE, *ids[1:])]]),
    }


def collate(input_ids: list[list[int]], labels: list[list[int]], pad_token_id: int) -> dict[str, Tensor]:
    """Rows padded on the right to the longest: input_ids, attention_mask and labels, int64 [B, S]."""
    width = max(map(len, input_ids))
    return {
        "input_ids": torch.tensor([ids + [pad_token_id] * (width - len(ids)) for ids in input_ids]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in input_ids]),
        "labels": torch.tensor([row + [IGNORE] * (width - len(row)) for row in labels]),
    }
