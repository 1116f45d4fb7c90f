"""Bad input: one clear line before a model is loaded."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from support import ROOT, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.encoding import encode
from ist.training.model import plan_layers


def test_code_that_comes_with_a_model_is_not_run(train, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "custom", "auto_map": {"AutoConfig": "code.Custom", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    marker = tmp_path / "was_run"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(UsageError, match="trust_remote_code"):
        train(model_name_or_path=folder)
    assert not marker.exists()
    with pytest.raises(UsageError):  # the code is no model, but now it runs
        train(model_name_or_path=folder, trust_remote_code=True)
    assert marker.exists()


def test_float16_weights_are_refused_also_where_the_config_does_not_say(train, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(UsageError, match="float16"):
        train(model_name_or_path=folder)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    with pytest.raises(UsageError, match="float16"):
        train(model_name_or_path=folder)
    assert train(model_name_or_path=folder, dtype="float32", max_steps=2) == 0


def test_a_model_folder_that_is_not_whole(train, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(UsageError, match=r"model.safetensors cannot be read: .* Take another copy"):
        train(model_name_or_path=folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="holds no weights"):
        train(model_name_or_path=folder)


def test_a_tokenizer_of_another_model_is_refused(train, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    LlamaForCausalLM(tiny_config(vocab_size=50)).save_pretrained(folder)
    with pytest.raises(UsageError, match="do not belong together"):
        train(model_name_or_path=folder)
    # Of the validation rows alone.
    plain, rare = ({"instruction": text, "output": "a"} for text in ("a", "add 1 and 1"))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokens = [max(encode(row, "none", tokenizer, 99, False)["input_ids"]) for row in (plain, rare)]
    LlamaForCausalLM(tiny_config(vocab_size=tokens[0] + 1)).save_pretrained(folder)
    for name, row in (("train", plain), ("validation", rare)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row] * 4))
    files = {f"{name}_file": tmp_path / f"{name}.json" for name in ("train", "validation")}
    assert tokens[0] < tokens[1]
    with pytest.raises(UsageError, match=f"gives token {tokens[1]}, the model's embedding has {tokens[0] + 1} rows"):
        train(model_name_or_path=folder, prompt_template="none", **files)


@pytest.mark.parametrize(
    ("method", "message"),
    [("gptq", "optimum"), ("awq", "gptqmodel"), ("hqq", "HQQ"), (None, "no `quant_method`")],
)
def test_quantised_weights_need_their_package_before_a_folder_is_made(train, tiny, tmp_path, method, message):
    folder = shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"bits": 4, "group_size": 16} | ({"quant_method": method} if method else {})
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"--model_name_or_path {folder} has quantised weights, .*{message}") as error:
        train(model_name_or_path=folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_methods_that_cannot_have_packed_or_replaced_weights(train, tiny, tmp_path):
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=packed, device_map={"": "cpu"})
    model.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "packed")
    file = tmp_path / "peft.json"
    options = {"model_name_or_path": tmp_path / "packed", "peft_config": file, "lora_r": None, "lora_alpha": None}
    file.write_text(json.dumps({"peft_type": "LOHA", "r": 4, "target_modules": ["q_proj"]}))
    with pytest.raises(
        UsageError, match="LOHA is not served: it computes with the base weights themselves, which are pack"
    ):
        train(**options)
    loftq = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}
    file.write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], **loftq}))
    with pytest.raises(
        UsageError, match="init_lora_weights loftq replaces the base weights, which adapter/ does not hold"
    ):
        train(**options | {"model_name_or_path": tiny})
    assert not (tmp_path / "run").exists()


BAD_INPUT = {
    "unknown key": ({"trained_layer": 0.5}, "unknown key --trained_layer. Did you mean --trained_layers"),
    "not a number": ({"max_steps": "many"}, "--max_steps must be an integer; got many"),
    "not a choice": ({"selection": "best"}, "--selection must be one of ist, random, .*; got best"),
    "count out of range": ({"trained_layers": 5}, "from 1 to 4.*got 5"),
    "ambiguous count": ({"kept_layers": "1.0"}, "--kept_layers 1.0 is ambiguous"),
    "max_length": ({"max_length": 0}, "--max_length must be 2 or more tokens; got 0"),
    "no data": ({"train_file": None}, "--train_file FILE or --dataset_name"),
    "missing file": ({"train_file": "nowhere.json"}, "--train_file nowhere.json: no such file"),
    "missing recipe": ({"config": "nowhere.yaml"}, "--config nowhere.yaml: No such file"),
    "not a model": ({"model_name_or_path": "tests"}, "--model_name_or_path tests cannot be used"),
    "no layer list": ({"target_modules": "lm_head"}, "no layer list"),
    "no such modules": ({"target_modules": "q_proj,w_query"}, "--target_modules: the model has no module w_query"),
    "output is a file": ({"output_dir": "README.md/x"}, "--output_dir README.md/x cannot be written"),
    "auto without a folder": ({"output_dir": None, "resume_from_checkpoint": "auto"}, "needs --output_dir"),
    "validation nan": ({"validation_size": "nan"}, "--validation_size must be"),
    "validation key": ({"eval_steps": 5}, "--eval_steps needs --validation_file"),
    "validation size": ({"validation_size": 60}, "--validation_size must be less than the 60 rows"),
    "not a checkpoint": ({"resume_from_checkpoint": "nowhere"}, "--resume_from_checkpoint must be none, auto or"),
    "no encoder": ({"layer_stack": "encoder"}, "^--layer_stack encoder: the model has no encoder"),
    "bottleneck": ({"bottleneck_size": 0}, "--bottleneck_size must be 1 or more; got 0"),
    "peft_config and a key": (
        {"peft_config": "lora.json"},
        "--peft_config says it all: leave out --lora_r, --lora_alpha",
    ),
    "float16": ({"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16; got float16"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_clear_line(train, tmp_path, name):
    options, message = BAD_INPUT[name]
    with pytest.raises(UsageError, match=message) as error:
        train(**options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


BAD_PEFT_CONFIG = {
    "no file": (None, "cannot be read: No such file"),
    "not JSON": ("{", "is not a PEFT configuration in JSON"),
    "a list": ("[1]", "is not a PEFT configuration in JSON"),
    "no type": ('{"r": 4}', "peft_type must be one of ADALORA, .*; got None"),
    "unknown type": ('{"peft_type": "lorra"}', "peft_type must be one of .*; got lorra"),
    "unknown key": ('{"peft_type": "LORA", "rank": 4}', "LoraConfig has no rank"),
    "bad value": ('{"peft_type": "SERIES", "non_linearity": "rleu"}', "non_linearity must be one of"),
    "bad rank": ('{"peft_type": "LORA", "r": 0, "target_modules": ["q_proj"]}', "r must be above 0; got 0"),
    "no target": (
        '{"peft_type": "LORA", "target_modules": ["w_query"]}',
        "target_modules: the model has no module w_query",
    ),
    "a prompt": ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}', "PREFIX_TUNING is not served: it learns"),
    "not an int": ('{"peft_type": "LORA", "r": "8"}', 'r must be of type int; got "8"'),
    "not a whole number": ('{"peft_type": "SERIES", "bottleneck_size": 8.5}', "bottleneck_size must be of type int"),
    "not a name": ('{"peft_type": "SERIES", "non_linearity": ["relu"]}', "non_linearity must be of type str"),
    "no number": ('{"peft_type": "PARALLEL", "scaling": NaN}', "NaN is no number"),
    "null": ('{"peft_type": "PARALLEL", "scaling": null}', "scaling must be of type float; got null"),
    "no interval": ('{"peft_type": "ADALORA", "deltaT": 0}', "deltaT 0 must be 1 or more"),
    "no mean": ('{"peft_type": "ADALORA", "beta1": 1.5}', "AssertionError|beta1 1.5 .* must be between 0 and 1"),
    "no such module": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "modules_to_save": ["nothere"]}',
        "modules_to_save: the model has no module nothere",
    ),
    "no response": (
        '{"peft_type": "LORA", "lora_alpha": 0, "target_modules": ["q_proj"]}',
        "lora_alpha must be above 0",
    ),
    "other sign": ('{"peft_type": "LOHA", "alpha": -8, "target_modules": ["q_proj"]}', "alpha must be above 0; got -8"),
    "dropout": (
        '{"peft_type": "LORA", "lora_dropout": -1, "target_modules": ["q_proj"]}',
        r"must be in \[0, 1\); got -1",
    ),
    "one target of two": ('{"peft_type": "LORA", "target_modules": ["q_proj", "w"]}', "target_modules: .* no module w"),
    "parameter": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "target_parameters": ["w.weight"]}',
        "target_parameters: the model has no parameter w.weight",
    ),
    "pattern": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"w": 4}}',
        "rank_pattern: the model has no module w",
    ),
    "rank of a pattern": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 0}}',
        "rank_pattern: q_proj must be a number above 0; got 0",
    ),
    "layer": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "layers_to_transform": [0, 99]}',
        "layers_to_transform: the model has no layer 99",
    ),
    "token": (
        '{"peft_type": "LORA", "target_modules": ["q_proj"], "trainable_token_indices": [400]}',
        "trainable_token_indices: the model has no token 400",
    ),
    "data first": ('{"peft_type": "LORA", "init_lora_weights": "eva"}', "needs a pass over data"),
    "no rank to take": ('{"peft_type": "ADALORA", "init_r": 4, "target_r": 4}', "target_r 4 must be below init_r 4"),
    "schedule": (
        '{"peft_type": "ADALORA", "target_modules": ["q_proj"], "tinit": 15, "tfinal": 10}',
        "don't allow for a budgeting phase",
    ),
}


@pytest.mark.parametrize("name", BAD_PEFT_CONFIG)
def test_a_bad_peft_config_is_one_clear_line(train, tmp_path, name):
    text, message = BAD_PEFT_CONFIG[name]
    file = tmp_path / "meta/peft.json"  # a folder's name must not be taken for a word of the error
    file.parent.mkdir()
    if text:
        file.write_text(text)
    with pytest.raises(UsageError, match=f"--peft_config {file}.*({message})") as error:
        train(peft_config=file, lora_r=None, lora_alpha=None)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_method_that_needs_plain_weights_is_refused_on_packed_ones(train, tmp_path):
    (tmp_path / "peft.json").write_text('{"peft_type": "LOHA", "target_modules": ["q_proj"]}')
    with pytest.raises(UsageError, match=r"LOHA is not served: .* weights themselves, which are packed"):
        train(peft_config=tmp_path / "peft.json", load_in_4bit=True, lora_r=None, lora_alpha=None)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "VBLORA", "num_vectors": 8, "vector_length": 8}, "layers share trainable parameters"),
        ({"peft_type": "OSF", "effective_rank": 4}, "projects gradients by hooks"),
    ],
)
def test_what_cannot_be_sharded_is_refused(tiny, tmp_path, config, message):
    (tmp_path / "peft.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    flags = ["--model_name_or_path", str(tiny), "--train_file", "x", "--peft_config", str(tmp_path / "peft.json")]
    args, _, _ = parse_training_arguments(flags, "")
    assert plan_layers(args, sharded=False).layers.n_layers == 4
    with pytest.raises(UsageError, match=message):
        plan_layers(args, sharded=True)


@pytest.mark.parametrize(
    ("options", "text", "message"),
    [
        ({"trained_layers": 5}, None, "got 5"),
        ({"suppression": 2}, None, "--suppression must be in [0, 1]"),
        ({}, "[{", "is not valid JSON"),
        ({}, "null", "must hold a list of rows"),
        ({}, '[{"question": 1}]', "needs the columns instruction and output"),
        ({}, '[{"instruction": "a", "output": "b"}, {"instruction": "a", "output": " "}]', "row 1 has no answer"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(train_process, tmp_path, options, text, message):
    if text:
        (tmp_path / "rows.json").write_text(text)
        options = {**options, "train_file": tmp_path / "rows.json"}
    result = train_process(**options)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert not result.stdout.strip()


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, {}, "WORLD_SIZE is set, but not MASTER_ADDR"),
        ({"PYTHONOPTIMIZE": "2"}, {}, "PYTHONOPTIMIZE=2 removes docstrings"),
        ({}, {"output_dir": "x" * 260}, f"--output_dir {'x' * 260} cannot be written: File name too long"),
        (
            {},
            {"train_file": "x" * 260 + ".json"},
            "--train_file " + "x" * 260 + ".json cannot be read: File name too long",
        ),
    ],
)
def test_what_a_reader_found(arguments, tmp_path, environment, options, message):
    """Attacks by a reader who knew the README and --help alone (launch/results/attacks.md)."""
    command = [sys.executable, str(ROOT / "train_ist.py"), *arguments(**options)]
    result = subprocess.run(
        command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_files_of_others_are_not_overwritten(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("mine")
    with pytest.raises(UsageError, match=r"holds results but no run\.json"):
        train()
    assert (tmp_path / "run/metrics.jsonl").read_text() == "mine"


def test_a_terminal_without_these_letters_costs_no_run(arguments, tmp_path):
    command = [sys.executable, str(ROOT / "train_ist.py"), *arguments(output_dir=tmp_path / "é日", max_steps=2)]
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        command, env=os.environ | ascii_alone, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "é日/adapter/README.md").is_file()
