"""Kinds of models, tokenizers and adapter configurations that cannot be used, added to bad_inputs.KINDS."""

import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from support.bad_files import SPOILED
from support.bad_inputs import BadInput, edit, kind


@kind("model: a spoiled file")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / "tiny" / draw.choice(["config.json", "model.safetensors", "tokenizer.json"])
    name = draw.choice(sorted(SPOILED))
    SPOILED[name](file)
    return BadInput(f"{file.name}: {name}", names="tiny")


@kind("model: the optional files")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / "tiny" / draw.choice(["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
    file.touch()
    name = draw.choice(sorted(SPOILED))
    SPOILED[name](file)
    return BadInput(f"{file.name}: {name}", {"prompt_template": "chat"}, "tiny|template|train_file", may_pass=True)


@kind("model: a key of config.json")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / "tiny/config.json"
    config = json.loads(file.read_text())
    key = draw.choice(sorted(config))
    value = draw.choice([None, -1, 0, 7, 10**12, "none-such", [], {}, 0.5, True])
    if draw.random() < 0.2:
        del config[key]
        value = "dropped"
    else:
        config[key] = value
    file.write_text(json.dumps(config))
    return BadInput(f"{key}: {value!r}", names="tiny|model|trust_remote_code", may_pass=True)


@kind("model: quantised as it cannot be read here")
def _(folder: Path, draw: random.Random) -> BadInput:
    methods = ("gptq", "awq", "fp8", "aqlm", "hqq", "none-such", "bitsandbytes", "compressed-tensors", "mxfp4", "")
    method = draw.choice(methods)
    quantization: Any = {"quant_method": method, "bits": 4, "group_size": 32}
    if draw.random() < 0.2:
        quantization = draw.choice([{}, [], "4bit", 4, {"bits": 4}])
    edit(folder / "tiny/config.json", quantization_config=quantization)
    # transformers passes some over with a warning; the weights of this model are not packed, so that is right.
    return BadInput(f"{quantization}", names="tiny|model", may_pass=True)


@kind("model: weights that are not those of the configuration")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / "tiny/model.safetensors"
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    what = draw.choice(["dropped", "renamed", "cut", "integers", "not finite", "of another width", "no tensors"])
    if what == "dropped":
        del tensors[name]
    elif what == "renamed":
        tensors[name.replace("weight", "wieght")] = tensors.pop(name)
    elif what == "cut":
        tensors[name] = tensors[name][:-1].clone()
    elif what == "integers":
        tensors[name] = tensors[name].to(draw.choice([torch.int8, torch.int64, torch.bool]))
    elif what == "not finite":
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = draw.choice([float("nan"), float("inf")])
    elif what == "of another width":
        tensors[name] = torch.zeros(*tensors[name].shape, 2)
    else:
        tensors = {}
    save_file(tensors, file, metadata={"format": "pt"})
    return BadInput(f"{name} {what}", names="tiny|weight|loss", may_pass=what == "integers")


@kind("model: weights in several files, or pickled")
def _(folder: Path, draw: random.Random) -> BadInput:
    whole = folder / "tiny/model.safetensors"
    index: Any = {"metadata": {}, "weight_map": dict.fromkeys(load_file(whole), "model-1.safetensors")}
    what = draw.choice(["index", "index", "pickle"])
    if what == "pickle":
        whole.unlink()
        file = folder / "tiny/pytorch_model.bin"
        what = draw.choice(["foreign code", "a pickled list", "zeros", "empty", "a text"])
        content = {
            "zeros": bytes(1000),
            "empty": b"",
            "a text": b"<html>404</html>",
            "a pickled list": pickle.dumps([1]),
        }
        file.write_bytes(content.get(what, b"") or (pickle.dumps(_Foreign(folder)) if what == "foreign code" else b""))
        return BadInput(f"pytorch_model.bin: {what}", names="tiny|model")
    whole.rename(folder / "tiny/model-1.safetensors")
    what = draw.choice(
        ["empty map", "no map", "a list", "file is gone", "a key less", "outside", "a number", "spoiled"]
    )
    if what == "empty map":
        index["weight_map"] = {}
    elif what == "no map":
        del index["weight_map"]
    elif what == "a list":
        index["weight_map"] = list(index["weight_map"])
    elif what == "file is gone":
        index["weight_map"] = dict.fromkeys(index["weight_map"], "model-2.safetensors")
    elif what == "a key less":
        index["weight_map"].pop(draw.choice(sorted(index["weight_map"])))
    elif what == "outside":
        index["weight_map"] = dict.fromkeys(index["weight_map"], "../../outside.safetensors")
    elif what == "a number":
        index["weight_map"] = dict.fromkeys(index["weight_map"], 7)
    file = folder / "tiny/model.safetensors.index.json"
    file.write_text(json.dumps(index))
    if what == "spoiled":
        what = draw.choice(sorted(SPOILED))
        SPOILED[what](file)
    # transformers looks into every file that the index names, whatever keys it lists.
    return BadInput(f"index: {what}", names="tiny|model", may_pass=what == "a key less")


class _Foreign:
    """Pickled: makes a file where it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.folder / "foreign code ran"),))


@kind("tokenizer: a part of tokenizer.json")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / "tiny/tokenizer.json"
    content = json.loads(file.read_text())
    what = draw.choice(
        ["no vocabulary", "empty vocabulary", "no model", "another model", "ids", "normalizer", "merges"]
    )
    if what == "no vocabulary":
        del content["model"]["vocab"]
    elif what == "empty vocabulary":
        content["model"] |= {"vocab": {}, "merges": []}
    elif what == "no model":
        del content["model"]
    elif what == "another model":
        content["model"]["type"] = "none-such"
    elif what == "ids":
        content["model"]["vocab"] = {token: 10**6 + i for token, i in content["model"]["vocab"].items()}
    elif what == "normalizer":
        content["normalizer"] = {"type": "none-such"}
    else:
        content["model"]["merges"] = [["none", "such"]]
    file.write_text(json.dumps(content))
    return BadInput(what, names="tiny|token|vocabulary")


@kind("model: gone, or of another task")
def _(folder: Path, draw: random.Random) -> BadInput:
    what = draw.choice(["t5", "bert", "clip", "none-such", "llava", "no weights", "no tokenizer", "no config", "code"])
    tiny = folder / "tiny"
    if what == "no weights":
        (tiny / "model.safetensors").unlink()
    elif what == "no tokenizer":
        for file in tiny.glob("tokenizer*"):
            file.unlink()
    elif what == "no config":
        (tiny / "config.json").unlink()
    elif what == "code":
        auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        edit(tiny / "config.json", auto_map=auto_map, model_type="foreign")
        (tiny / "code.py").write_text(f"open({str(folder / 'foreign code ran')!r}, 'w')\n")
    else:
        edit(tiny / "config.json", model_type=what, architectures=[what])
    return BadInput(what, names="tiny|model")


# --------------------------------------------------------------------------------------------------------- peft_config

GOOD_PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
BAD_PEFT = (
    *({"lora_alpha": value} for value in (0, -8, "16", None, True)),
    *({"r": value} for value in (0, -1, 4.5, "4", None)),
    *({"lora_dropout": value} for value in (-1, -0.1, 1, 1.5, "0.1")),
    *({"target_modules": value} for value in ([], "(", ["none"], "none.*", 3, ["q_proj", "none"], {"q_proj": 1})),
    *({"target_parameters": value} for value in (["none.weight"], "q_proj.weight", [3])),
    *({"rank_pattern": value} for value in ({"none": 4}, {"q_proj": 0}, {"q_proj": -2}, {"q_proj": "4"}, [4])),
    *({"alpha_pattern": value} for value in ({"none": 4}, {"q_proj": 0}, {"q_proj": -2}, {"q_proj": None})),
    *({"modules_to_save": value} for value in (["none"], "lm_head", [1])),
    *({"layers_to_transform": value} for value in ([99], [0, 99], [-1], "0")),
    *({"exclude_modules": value} for value in (["none"], "(")),
    *({"bias": value} for value in ("some", 3, None)),
    *({"init_lora_weights": value} for value in ("none-such", "eva", 3)),
    *({"peft_type": value} for value in ("none", 3, None, "PROMPT_TUNING", "XLORA", ["LORA"])),
    {"layers_pattern": "none", "layers_to_transform": [0]},
    {"trainable_token_indices": [10**6]},
    {"trainable_token_indices": [-1]},
    {"no_such_key": 1},
    {"layer_replication": [[0, 99]]},
)
BAD_METHODS = (
    {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": ["none"]},
    {"peft_type": "LOHA", "r": 4, "alpha": 0, "target_modules": ["q_proj"]},
    {"peft_type": "LOHA", "r": 4, "alpha": -8, "rank_dropout": 2, "target_modules": ["q_proj"]},
    {"peft_type": "LOKR", "r": 4, "alpha": 8, "module_dropout": -1, "target_modules": ["q_proj"]},
    {"peft_type": "ADALORA", "init_r": 0, "target_r": 2, "target_modules": ["q_proj"]},
    {"peft_type": "ADALORA", "init_r": 6, "target_r": -2, "target_modules": ["q_proj"]},
    {"peft_type": "ADALORA", "init_r": 6, "target_r": 2, "lora_alpha": -1, "target_modules": ["q_proj"]},
    {"peft_type": "SERIES", "bottleneck_size": 0},
    {"peft_type": "SERIES", "dropout": 1},
    {"peft_type": "PARALLEL", "scaling": 0},
    {"peft_type": "VERA", "r": 0, "target_modules": ["q_proj"]},
    {"peft_type": "OFT", "r": 0, "oft_block_size": 0, "target_modules": ["q_proj"]},
    {"peft_type": "FOURIERFT", "n_frequency": 10**9, "target_modules": ["q_proj"]},
    {"peft_type": "FOURIERFT", "n_frequency": 0, "target_modules": ["q_proj"]},
    {"peft_type": "HRA", "r": 0, "target_modules": ["q_proj"]},
    {"peft_type": "BOFT", "boft_block_size": 7, "target_modules": ["q_proj"]},
    {"peft_type": "SHIRA", "r": 0, "target_modules": ["q_proj"]},
)


@kind("peft_config")
def _(folder: Path, draw: random.Random) -> BadInput:
    change = draw.choice(BAD_PEFT) if draw.random() < 0.7 else None
    values = {**GOOD_PEFT, **change} if change else draw.choice(BAD_METHODS)
    (folder / "peft.json").write_text(json.dumps(values))
    flags = {"peft_config": folder / "peft.json", "lora_r": None, "lora_alpha": None}
    return BadInput(json.dumps(change or values), flags, "peft_config")


@kind("peft_config: a spoiled file")
def _(folder: Path, draw: random.Random) -> BadInput:
    file = folder / "peft.json"
    file.write_text(json.dumps(GOOD_PEFT))
    name = draw.choice(sorted(SPOILED))
    SPOILED[name](file)
    flags = {"peft_config": file, "lora_r": None, "lora_alpha": None}
    return BadInput(name, flags, "peft_config")
