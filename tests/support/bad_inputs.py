"""Kinds of bad input to train_ist.py, each drawn anew at every call: {name: kind(folder, draw) -> BadInput}.

Those of models, tokenizers and adapters are in bad_models.py.

`folder` holds a good model (tiny/), good rows (train.json) and nothing else; a kind may change them.
"""

import csv
import gzip
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from support.bad_files import SPOILED


@dataclass
class BadInput:
    """What a command line is given.

    Attributes:
        what: was done, for the table.
        flags: in addition to those of a good run, or (None) taken from them.
        names: what the message must name, as a regular expression.
        environment: variables in addition.
        may_pass: it is not always bad: a run that finishes is as good as a message.
    """

    what: str
    flags: dict[str, Any] = field(default_factory=dict)
    names: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    may_pass: bool = False


Kind = Callable[[Path, random.Random], BadInput]
KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    def register(function: Kind) -> Kind:
        KINDS[name] = function
        return function

    return register


# --------------------------------------------------------------------------------------------------- the command line

_COUNTS = ("0", "-1", "-10000000000")
_NUMBERS = ("nan", "inf", "-inf", "-1", "-1e-9")
OUT_OF_RANGE = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size", "logging_steps"), _COUNTS
    ),
    **dict.fromkeys(("save_steps", "save_total_limit", "lora_r", "lora_alpha", "update_interval"), _COUNTS),
    **dict.fromkeys(("probe_batch_size", "candidates", "ddp_timeout", "max_length"), _COUNTS),
    **dict.fromkeys(("per_device_eval_batch_size", "early_stopping_patience"), _COUNTS),
    "early_stopping_threshold": _NUMBERS,
    "max_steps": ("0", "-2"),
    **dict.fromkeys(("learning_rate", "num_train_epochs", "adam_epsilon", "neftune_noise_alpha"), (*_NUMBERS, "0")),
    "loraplus_lr_ratio": (*_NUMBERS, "0.5"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (*_NUMBERS, "1", "1.5")),
    **dict.fromkeys(("warmup_steps", "weight_decay", "max_grad_norm"), _NUMBERS),
    "lora_dropout": (*_NUMBERS, "1", "1.5"),
    "suppression": (*_NUMBERS, "1.01", "2"),
    "score_lr": ("nan", "inf", "-inf", "-1"),
    "trained_layers": ("0", "-1", "5", "99", "1.5", "nan"),
    "validation_size": (*_NUMBERS, "1.5", "60", "10000000000"),
    "seed": ("-1", "99999999999999999999999", "18446744073709551616"),
}
TYPED = {
    **dict.fromkeys(("max_steps", "lora_r", "save_steps", "seed", "max_length"), ("many", "1.5", "1e3", "0x10", "1,5")),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps"), ("1e", "1,5", "0x1p", "one", "[1]", "--1")),
    **dict.fromkeys(("packing", "load_in_4bit", "completion_only_loss"), ("maybe", "2", "None", "truee")),
    "bf16": ("maybe", "2", "[true]", "truee"),
    **dict.fromkeys(
        ("selection", "optim", "dtype", "prompt_template", "report_to"), ("none-such", "{}", "NONE", "ist ")
    ),
    **dict.fromkeys(("eval_strategy", "save_strategy"), ("best", "epochs", "0")),
    "train_sampling_strategy": ("sequential", "true", "0"),
    **dict.fromkeys(("lr_scheduler_type", "optimizer_state", "peft_method"), ("best", "LORA", "0")),
    "lr_scheduler_kwargs": ("none-such", "[1]", "{", "1", '{"min_lr": 0}', '{"a": [1]}'),
    "attn_implementation": ("none-such", "flash", "0"),
    "trained_layers": ("some", "half", "1e", "[2]"),
}
EXCLUSIVE = (
    {"validation_file": "train.json", "validation_size": "4"},
    {"dataset_name": "some/rows"},
    {"load_best_model_at_end": "true"},
    {"eval_steps": "3"},
    {"eval_strategy": "epoch"},
    {"eval_strategy": "steps", "validation_size": "4"},
    {"early_stopping_patience": "2"},
    {"early_stopping_threshold": "0.1"},
    {"save_strategy": "epoch", "save_steps": "3"},
    {"log_adapter": "true"},
    {"selection": "id3", "optim": "adamw_8bit"},
    {"optim": "adamw_8bit", "optimizer_state": "offload"},
    {"optim": "paged_adamw_8bit", "optimizer_state": "drop"},
    {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": '{"num_cycles": 2}'},
    {"lr_scheduler_type": "warmup_stable_decay"},
    {"packing": "true", "neftune_noise_alpha": "5"},
    {"torch_compile": "true", "gradient_checkpointing": "true"},
    {"selection": "ist", "peft_method": "none"},
    {"peft_method": "none", "load_in_4bit": "true", "selection": "random"},
    {"dtype": "bfloat16", "peft_method": "none", "selection": "random"},
    {"selection": "lisa", "fixed_layers": "1"},
    {"target_modules": "all-linear,q_proj"},
)


@kind("key: of another type")
def _(folder: Path, draw: random.Random) -> BadInput:
    key = draw.choice(sorted(TYPED))
    value = draw.choice(TYPED[key])
    return BadInput(f"--{key}={value}", {key: value}, key)


@kind("key: out of range")
def _(folder: Path, draw: random.Random) -> BadInput:
    key = draw.choice(sorted(OUT_OF_RANGE))
    value = draw.choice(OUT_OF_RANGE[key])
    return BadInput(f"--{key}={value}", {key: value}, key)


@kind("key: empty or misspelt")
def _(folder: Path, draw: random.Random) -> BadInput:
    key = draw.choice(sorted({**OUT_OF_RANGE, **TYPED, "output_dir": 0, "train_file": 0, "run_name": 0}))
    if draw.random() < 0.4:
        return BadInput(f"--{key}=", {key: ""}, key)
    place = draw.randrange(len(key))
    misspelt = key[:place] + draw.choice(["", "x", key[place] * 2, "é", "--"]) + key[place + 1 :]
    if misspelt.replace("-", "_") == key:
        misspelt += "s"
    return BadInput(f"--{misspelt}", {misspelt: "1"}, re.escape(misspelt))


@kind("keys that do not go together")
def _(folder: Path, draw: random.Random) -> BadInput:
    flags = dict(draw.choice(EXCLUSIVE))
    return BadInput(" ".join(flags), flags, "|".join(flags))


@kind("a path that is not what it ought to be")
def _(folder: Path, draw: random.Random) -> BadInput:
    key = draw.choice(["model_name_or_path", "train_file", "validation_file", "peft_config", "config", "output_dir"])
    key = draw.choice([key, "resume_from_checkpoint"])
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe.json")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "no.json").symlink_to("nowhere.json")
    places = ["empty", "pipe.json", "loop.json", "no.json", "nowhere/at all", "train.json/x", "x" * 300, "a\nb.json"]
    if key == "output_dir":
        places = ["pipe.json", "loop.json", "train.json", "train.json/x", "x" * 300]
    place = draw.choice(places)
    flags = {key: str(folder / place)} | ({"lora_r": None, "lora_alpha": None} if key == "peft_config" else {})
    return BadInput(f"--{key} {place[:20]!r}", flags, key)


@kind("recipe")
def _(folder: Path, draw: random.Random) -> BadInput:
    recipe = folder / "recipe.yaml"
    texts = {
        "a key twice": "max_steps: 3\nlora_r: 4\nmax_steps: 2\n",
        "a recipe in a recipe": "config: other.yaml\n",
        "a mapping": "lora_r: {value: 4}\n",
        "a list of lists": "target_modules: [[q_proj]]\n",
        "a flag in a list": "target_modules: [q_proj, --trust_remote_code, 'true']\n",
        "a list": "- max_steps\n- 3\n",
        "a text": "max_steps 3\n",
        "tabs": "max_steps:\t3\n\tlora_r: 4\n",
        "no end": "target_modules: [q_proj\n",
        "python": "max_steps: !!python/object/apply:os.system ['true']\n",
        "two documents": "max_steps: 3\n---\nmax_steps: 4\n",
        "an alias": "max_steps: *there\n",
        "a date": "max_steps: 2020-01-01\n",
        "a number as key": "3: max_steps\n",
        "no key of ours": "trained_layer: 2\n",
        "a key of a mapping": "? {a: 1}\n: 2\n",
    }
    if draw.random() < 0.4:
        recipe.write_text(yaml.safe_dump({"max_steps": 3, "lora_r": 4, "lora_alpha": 8}))
        name = draw.choice(sorted(SPOILED.keys() - {"null", "no keys", "empty", "cut"}))
        SPOILED[name](recipe)
        return BadInput(name, {"config": recipe}, "recipe.yaml|config")
    name = draw.choice(sorted(texts))
    recipe.write_text(texts[name])
    return BadInput(name, {"config": recipe}, "recipe.yaml|--")


# --------------------------------------------------------------------------------------------------------------- rows


@kind("rows: a spoiled file")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / draw.choice(["train.json", "rows.jsonl", "rows.parquet", "rows.csv", "rows.json.gz", "rows.arrow"])
    _write_rows(file, _rows(folder))
    name = draw.choice(sorted(SPOILED))
    SPOILED[name](file)
    return BadInput(f"{file.suffix}: {name}", {"train_file": file}, "train_file")


@kind("rows: a byte or a piece of the file")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / draw.choice(["train.json", "rows.jsonl", "rows.parquet", "rows.csv", "rows.json.gz", "rows.arrow"])
    _write_rows(file, _rows(folder))
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    what = draw.choice(["Latin-1", "NUL", "cut", "doubled", "swapped"])
    if what == "Latin-1":
        content[place : place + 1] = b"\xe9"
    elif what == "NUL":
        content[place : place + 1] = b"\0"
    elif what == "cut":
        content = content[:place]
    elif what == "doubled":
        content += content[place:]
    else:
        content = content[place:] + content[:place]
    file.write_bytes(content)
    return BadInput(f"{file.suffix}: {what} at {place}", {"train_file": file}, "train_file", may_pass=True)


_STRANGE = [None, 7, -1.5, True, "", " ", [], {}, [1], {"a": 1}, [["a"]], "\ud800", "x" * 100_000, "\0"]


@kind("rows: a strange value")
def _(folder: Path, draw: random.Random) -> BadInput:
    rows, file = _rows(folder), folder / draw.choice(["train.json", "rows.jsonl"])
    column = draw.choice(
        ["instruction", "output", "input", "system", "history", "tools", "text", "messages", "choices"]
    )
    value = draw.choice(_STRANGE)
    for row in rows if draw.random() < 0.5 else [draw.choice(rows)]:
        row[column] = value
    _write_rows(file, rows)
    return BadInput(f"{column} {str(value)[:20]!r}", {"train_file": file}, "train_file", may_pass=True)


@kind("rows: none, or not these columns")
def _(folder: Path, draw: random.Random) -> BadInput:
    file, rows = folder / "rows.json", _rows(folder)
    texts = {
        "no rows": [],
        "objects without keys": [{}, {}],
        "texts": ["a", "b"],
        "other columns": [{"question": row["instruction"], "answer": row["output"]} for row in rows],
        "two turns in text": [{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}] * 3,
        "no choice of text": [{"text": ["a"]}] * 3,
        "a history of texts": [{"instruction": "a", "output": "b", "history": ["c"]}] * 3,
        "a column less": [{"instruction": row["instruction"]} for row in rows],
        "in capitals": [{key.upper(): value for key, value in row.items()} for row in rows],
        "under a key": {"data": rows},
        "by columns": {"instruction": [row["instruction"] for row in rows], "output": [row["output"] for row in rows]},
        "answers of space": [{"instruction": row["instruction"], "output": "  "} for row in rows],
    }
    name = draw.choice(sorted(texts))
    file.write_text(json.dumps(texts[name]))
    return BadInput(name, {"train_file": file}, "train_file")


@kind("rows: strange messages")
def _(folder: Path, draw: random.Random) -> BadInput:
    turns: list[Any] = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    values = {
        "no list": "hello",
        "no turns": [],
        "texts": ["1 + 1?", "2"],
        "no role": [{"content": "1 + 1?"}, turns[1]],
        "no content": [turns[0], {"role": "assistant"}],
        "null content": [turns[0], {"role": "assistant", "content": None}],
        "parts": [turns[0], {"role": "assistant", "content": [{"type": "image", "text": "2"}]}],
        "a user alone": turns[:1],
        "an empty answer": [turns[0], {"role": "assistant", "content": " "}],
        "a number as role": [turns[0], {"role": 3, "content": "2"}],
        "turns of turns": [turns],
    }
    name = draw.choice(sorted(values))
    rows = [{"messages": turns} for _ in range(6)]
    if name in ("no turns", "a user alone", "an empty answer", "null content", "no content") and draw.random() < 0.5:
        rows[draw.randrange(6)] = {"messages": values[name]}
    else:
        rows = [{"messages": values[name]} for _ in rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    flags = {"train_file": folder / "rows.json", "prompt_template": "chat"}
    return BadInput(name, flags, "train_file")


@kind("rows: several files that do not go together")
def _(folder: Path, draw: random.Random) -> BadInput:
    (folder / "messages.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "a"}]}] * 3))
    (folder / "numbers.json").write_text(json.dumps([{"instruction": [1], "output": {"a": 2}}] * 3))
    other = draw.choice(["messages.json", "numbers.json", "nowhere.json"])
    return BadInput(other, {"train_file": [folder / "train.json", folder / other]}, "train_file")


# --------------------------------------------------------------------------------------------------- what is around it


@kind("environment")
def _(folder: Path, draw: random.Random) -> BadInput:
    (folder / "file").touch()
    names = {
        "a cache that is a file": ({"HF_DATASETS_CACHE": str(folder / "file")}, {}, "cache|train_file"),
        "DeepSpeed": ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "DeepSpeed"),
        "FSDP1": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "fsdp_version"),
        "FSDP without GPUs": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {}, "FSDP"),
        "a W&B id that is a path": ({"WANDB_RUN_ID": "../../x"}, {"output_dir": None}, "WANDB_RUN_ID"),
        "a name that is a path": ({}, {"run_name": "../../x", "output_dir": None}, "run_name"),
        "no W&B login": ({"WANDB_API_KEY": "", "HOME": str(folder)}, {"report_to": "wandb"}, "report_to"),
        "a W&B key that is none": ({"WANDB_API_KEY": "abc", "HOME": str(folder)}, {"report_to": "wandb"}, "report_to"),
    }
    what = draw.choice(sorted(names))
    environment, flags, named = names[what]
    return BadInput(what, flags, named, environment)


# ------------------------------------------------------------------------------------------------------------- helpers


def _rows(folder: Path) -> list[dict]:
    return json.loads((folder / "train.json").read_text())


def _write_rows(file: Path, rows: list[dict]) -> None:
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    elif file.suffix == ".csv":
        with open(file, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), errors="surrogatepass")
    else:
        file.write_text(json.dumps(rows))


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copy_good(good: Path, folder: Path) -> None:
    shutil.copytree(good / "tiny", folder / "tiny")
    shutil.copy(good / "train.json", folder)
