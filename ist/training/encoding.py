"""From rows to token ids and labels: prompts, chat templates, and the mask of what is learnt."""

import importlib.util
import json
from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, Sequence, Value
from datasets.fingerprint import Hasher
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ist.loss import IGNORE, count_predicted
from ist.training import chat, reading
from ist.training.chat import ChatTemplate
from ist.training.command_line import UsageError, brief
from ist.training.conversation import conversation, question_and_answer, turns_in
from ist.training.files import ReadError, file_digest, read_text, require_no_pipes

_INTRO = "Below is an instruction that describes a task"
_WITH_INPUT = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request."
_PAD = " " * 16  # LLM-Adapters' prompt stands indented in its source, and the indentation is in the prompt

# template -> (prompt without input, prompt with input). llm_adapters is LLM-Adapters' training prompt to the byte;
# ist_repository differs from it in empty lines, which have no blanks. Both evaluate with slightly different prompts.
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
    "ist_repository": (
        f"{_INTRO}{_REQUEST}  \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n{_PAD}### Response:\n{_PAD}",
        f"{_INTRO}{_WITH_INPUT}{_REQUEST} \n\n{_PAD}### Instruction:\n{_PAD}{{instruction}}\n\n"
        f"{_PAD}### Input:\n{_PAD}{{input}}\n\n{_PAD}### Response:\n{_PAD}",
    ),
    "none": ("{instruction}", "{instruction}{input}"),
}


def load_tokenizer(
    key: str, name: str, template: str | None = None, chat_template: str | None = None, **options: Any
) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained(name, **options)`; `key` is the argument that names it, for the messages.

    Args:
        chat_template: a file, or the name of one of trl's training templates, in the place of the tokenizer's own.

    Raises:
        UsageError: there is none, or `template` is chat and it has no chat template.
    """
    require_no_pipes(f"--{key} {name}", Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        ids = tokenizer("The answer is 12.", add_special_tokens=False)["input_ids"]
    except Exception as error:
        raise UsageError(f"--{key} {name} has no tokenizer: {brief(error)}") from error
    if {*ids} <= {*tokenizer.all_special_ids}:  # transformers 5.0 makes one from nothing
        raise UsageError(f"--{key} {name} has no tokenizer: it has no token for any text.")
    if chat_template:
        tokenizer.chat_template = _read_chat_template(chat_template)
    if template == "chat" and not tokenizer.chat_template:
        raise UsageError(
            "--prompt_template chat: the model's tokenizer has no chat template; use another template, or give one by "
            "--chat_template."
        )
    return tokenizer


def _read_chat_template(name: str) -> str:
    if not Path(name).exists() and "/" not in name and not name.endswith(".jinja"):
        spec = importlib.util.find_spec("trl")
        folder = Path(spec.origin).parent / "chat_templates" if spec and spec.origin else None
        if folder is None or not folder.is_dir():
            state = "not installed" if folder is None else "too old (1.0 has some)"
            raise UsageError(f"--chat_template {name}: no such file, and trl, which has templates by name, is {state}.")
        found = [file for file in (folder / f"{name}_training.jinja", folder / f"{name}.jinja") if file.is_file()]
        if not found:
            known = sorted({file.stem.removesuffix("_training") for file in folder.glob("*.jinja")})
            raise UsageError(f"--chat_template must be a file, or one of trl's: {', '.join(known)}; got {name}.")
        name = str(found[0])
    try:
        return read_text(Path(name))
    except FileNotFoundError as error:
        raise UsageError(f"--chat_template {name}: no such file.") from error
    except ReadError as error:
        raise UsageError(f"--chat_template {error}") from error


def make_prompt(row: dict, template: str, chat_template: ChatTemplate | None = None) -> str:
    """The text before the answer of a row, as the model sees it in training and in generation.

    Raises:
        UsageError: the row does not suit the template.
    """
    if template != "chat":
        _require_plain(row, template)
        if row.get("instruction") is None and row.get("prompt") is not None:
            return row["prompt"]
        instruction, extra = row.get("instruction") or "", row.get("input") or ""
        return TEMPLATES[template][bool(extra)].format(instruction=instruction, input=extra)
    assert chat_template is not None
    if row.get("messages") or turns_in(row, "prompt"):
        turns, tools, _ = conversation(row)
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        return chat_template.prompt(turns[:last], tools)
    turns, tools, _ = conversation(
        {**row, "output": row.get("output") or "-", "completion": row.get("completion") or "-"}
    )
    return chat_template.prompt(turns[:-1], tools)


def _require_plain(row: dict, template: str) -> None:
    """Raises UsageError for what only a chat template has a place for."""
    for column in ("messages", "tools", "system", "history"):
        if row.get(column):
            raise UsageError(f"holds {column}, which need --prompt_template chat; got {template}")
    if turns_in(row, "prompt"):
        raise UsageError(f"holds turns in prompt, which need --prompt_template chat; got {template}")


class _Text(NamedTuple):
    """A row as text: `learnt` are [start, end) in it, None for all of it; `written`: whether it has its own tokens of
    begin and end; `stops`: whether its learnt parts end in a stop token."""

    text: str
    learnt: list[tuple[int, int]] | None
    written: bool
    stops: bool


def _as_text(row: dict, template: str, chat_template: ChatTemplate | None, masked: bool) -> _Text:
    if row.get("text") is not None and not any(row.get(form[0]) for form in reading.FORMS[:-1]):
        if masked:
            raise UsageError("is text without an answer: --completion_only_loss true has nothing to learn in it")
        if not row["text"].strip():
            raise UsageError("is empty: text holds nothing")
        return _Text(row["text"], None, False, True)
    if chat_template is not None:
        turns, tools, learn = conversation(row)
        if not masked and not all(learn[i] for i, turn in enumerate(turns) if turn["role"] == "assistant"):
            raise UsageError(
                "has turns that are not to be learnt (weight, train), which need --completion_only_loss true"
            )
        rendered = chat_template.render(turns, tools, learn if masked else None)
        return _Text(rendered.text, rendered.learnt if masked else None, True, rendered.stops)
    prompt = make_prompt(row, template)
    _, answer = question_and_answer(row, may_be_empty=template == "none")
    return _Text(prompt + answer, [(len(prompt), len(prompt) + len(answer))] if masked else None, False, True)


def encode(
    row: dict, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only_loss: bool
) -> dict[str, list[int]]:
    """Token ids and labels of one row; {"input_ids": list, "labels": list}, at most `max_length` long.

    The text is tokenised whole, as LLM-Adapters does; a token that spans prompt and answer belongs to the answer. EOS
    follows if it fits (chat templates write their own).

    Raises:
        UsageError: the row has no answer, or does not suit the template.
    """
    encoder = Encoder(template, tokenizer, max_length, completion_only_loss)
    (encoded,) = encoder.encode([encoder.text(row)])
    return {"input_ids": encoded["input_ids"], "labels": encoded["labels"]}


class Encoder:
    """Texts of rows to tokens, in batches.

    Raises:
        UsageError: a mask is asked for, and the tokenizer does not say which text a token has.
    """

    def __init__(
        self, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int, completion_only_loss: bool
    ) -> None:
        if completion_only_loss and not tokenizer.is_fast:
            raise UsageError(
                "--completion_only_loss needs a fast tokenizer (tokenizer.json); this model has a slow one."
            )
        self.template, self.max_length, self.masked = template, max_length, completion_only_loss
        self.tokenizer = _with_whole_offsets(tokenizer) if completion_only_loss else tokenizer
        self.chat = ChatTemplate(tokenizer) if template == "chat" else None

    def text(self, row: dict) -> _Text:
        return _as_text(row, self.template, self.chat, self.masked)

    def encode(self, texts: Iterable[_Text]) -> list[dict[str, Any]]:
        """[{input_ids, labels, length (before it was cut), predicted (tokens with a loss), stops}]."""
        texts = list(texts)
        encoded: list[dict[str, Any]] = [{}] * len(texts)
        for written in {text.written for text in texts}:
            places = [i for i, text in enumerate(texts) if text.written == written]
            tokens = self.tokenizer(
                [texts[i].text for i in places], add_special_tokens=not written, return_offsets_mapping=self.masked
            )
            for n, i in enumerate(places):
                spans = tokens["offset_mapping"][n] if self.masked else None
                encoded[i] = self._one(texts[i], tokens["input_ids"][n], spans)
        return encoded

    def _one(self, text: _Text, ids: list[int], spans: list[tuple[int, int]] | None) -> dict[str, Any]:
        if not ids:
            raise UsageError("has no tokens: the tokenizer makes none of its text")
        labels, eos, stops = ids, self.tokenizer.eos_token_id, text.stops
        if text.learnt is not None and spans is not None:
            learnt = np.zeros(len(text.text) + 1, dtype=np.int64)
            for start, end in text.learnt:
                learnt[start + 1 : end + 1] = 1
            before = learnt.cumsum()
            labels = [
                token if before[end] > before[start] else IGNORE for token, (start, end) in zip(ids, spans, strict=True)
            ]
        if not text.written:
            stops = eos is not None
            if eos is not None:
                written = ids[-1] == eos  # by a tokenizer that adds it itself
                ids, labels = (ids, [*labels[:-1], eos]) if written else ([*ids, eos], [*labels, eos])
        cut = self.max_length
        ids, labels, length = ids[:cut], labels[:cut], len(ids)
        return {
            "input_ids": ids,
            "labels": labels,
            "length": length,
            "predicted": count_predicted(labels),
            "stops": stops,
        }


def _with_whole_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokens, with offsets that have the white space of each: some tokenizers trim it off, and a token of
    white space has no place in the text then."""
    state = tokenizer.backend_tokenizer.to_str()
    if '"trim_offsets":true' not in state:
        return tokenizer
    tokenizer = copy(tokenizer)
    tokenizer._tokenizer = Tokenizer.from_str(state.replace('"trim_offsets":true', '"trim_offsets":false'))
    return tokenizer


class Lengths(NamedTuple):
    """What became of the rows of a set.

    Attributes:
        dropped: rows left out, as nothing of their answer is within max_length, or by overlong drop.
        cut: rows whose end is cut off.
        longest: tokens of the longest row, before it was cut.
        unstopped: rows with a learnt turn that ends in no stop token.
    """

    dropped: int
    cut: int
    longest: int
    unstopped: int


def encode_rows(
    rows: Dataset,
    key: str,
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    completion_only_loss: bool,
    overlong: str = "truncate",
    workers: int | None = None,
) -> tuple[Dataset, Lengths]:
    """(encoded rows with the columns input_ids, labels; what became of those that are too long).

    Kept in datasets' cache by the content of the rows, the tokenizer and all settings.

    Args:
        rows: of `read_rows`.
        overlong: truncate, drop or error.
        workers: processes that tokenise.

    Raises:
        UsageError: naming file and row (counted from 0 in the file) that cannot be used, or when none is left.
    """
    encoder = Encoder(template, tokenizer, max_length, completion_only_loss)
    ids, count = Sequence(Value("int32")), Value("int64")
    features = Features({"input_ids": ids, "labels": ids, "length": count, "predicted": count, "stops": Value("bool")})

    def encode_batch(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        texts = []
        records = [{"row": n, **{name: values[i] for name, values in batch.items()}} for i, n in enumerate(indices)]
        for record in records:
            texts.append(_named(key, record, lambda record=record: encoder.text(record)))
        try:
            encoded = encoder.encode(texts)
        except UsageError:  # of one of them: which one?
            encoded = [
                _named(key, record, lambda t=t: encoder.encode([t])[0])
                for record, t in zip(records, texts, strict=True)
            ]
        for record, one in zip(records, encoded, strict=True):
            if overlong == "error" and one["length"] > max_length:
                raise UsageError(
                    f"--{key} {_place(record)} has {one['length']} tokens, more than --max_length {max_length}: "
                    "raise it, or choose --overlong truncate or drop."
                )
        return {name: [one[name] for one in encoded] for name in features}

    # datasets fingerprints a function by its name, not by its code: name everything that matters.
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    specials = (tokenizer.special_tokens_map, tokenizer.eos_token_id, tokenizer.chat_template)
    code = [
        file_digest(Path(file)) for file in (__file__, chat.__file__, Path(chat.__file__).with_name("conversation.py"))
    ]
    settings = (template, specials, max_length, completion_only_loss, overlong == "error", code)
    encoded = rows.map(
        encode_batch,
        with_indices=True,
        batched=True,
        batch_size=500,
        num_proc=workers if workers and workers > 1 and len(rows) > 1000 else None,
        remove_columns=rows.column_names,
        features=features,
        new_fingerprint=Hasher.hash((rows._fingerprint, backend, settings)),
        desc=f"tokenising {key}",
    )
    table = encoded.select_columns(["length", "predicted", "stops"]).with_format("arrow")[:]
    lengths, predicted, stops = (table[name].to_numpy() for name in ("length", "predicted", "stops"))
    kept = np.flatnonzero((predicted > 0) & ((overlong != "drop") | (lengths <= max_length)))
    if not len(kept):
        if overlong != "drop" and lengths.max() <= max_length:
            raise UsageError(f"--{key}: no row has anything to learn: weight 0, or train false, in all answers.")
        raise UsageError(f"--{key}: no row has an answer left within --max_length {max_length}. Raise --max_length.")
    summary = Lengths(
        dropped=len(encoded) - len(kept),
        cut=int((lengths[kept] > max_length).sum()),
        longest=int(lengths.max()),
        unstopped=len(kept) - int(stops[kept].sum()),
    )
    encoded = encoded.select_columns(["input_ids", "labels"])
    return (encoded.select(kept) if summary.dropped else encoded), summary


def _place(record: dict) -> str:
    return f"{record['file']}: row {record['row']}" if "file" in record else f"row {record['row']}"


def _named(key: str, record: dict, work: Any) -> Any:
    try:
        return work()
    except UsageError as error:
        if str(error).startswith("--"):
            raise
        raise UsageError(f"--{key} {_place(record)} {error}.") from error


def as_lists(record: dict) -> dict:
    """A row of `read_rows` with its lists as lists."""
    return {
        name: json.loads(value) if name in reading.LISTS and isinstance(value, str) else value
        for name, value in record.items()
    }
