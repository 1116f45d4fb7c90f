"""The forms in which keys are written: as transformers' parser takes them, as W&B's sweeps write them, with `~`."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from support import ROOT
from transformers import HfArgumentParser
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from ist.analyze.command import AnalyzeArguments
from ist.benchmark.command import make_parser
from ist.config import ConfigError, parse_count
from ist.evaluate.command import EvaluateArguments
from ist.export.command import main as export
from ist.report.compare import main as report
from ist.training.arguments import ARGUMENTS, parse_training_arguments
from ist.training.command_line import UsageError, expand_home, parse_arguments
from ist.training.keys import form_of

KEYS = {key.name: key for group in ARGUMENTS for key in fields(group)}
BASE = {"model_name_or_path": ["m"], "train_file": ["a.json"]}
RULES = {"lisa_interval": "lisa", "fixed_layers": "fixed", "min_trained_layers": "semantic"}
RULES |= {"semantic_budget": "semantic", "semantic_rows": "semantic", "oracle_scores": "oracle"}
RULES |= {"gradient_norm_decay": "gradient_norm"}
RULES |= dict.fromkeys(("id3_budget", "id3_steps", "id3_exponent", "id3_eps"), "id3")
NEEDS = {key: {"selection": [rule]} for key, rule in RULES.items()}
NEEDS |= {"shrink": {"score_rule": ["expected"]}}
NEEDS |= {key: {"push_to_hub": ["true"]} for key in ("hub_model_id", "hub_private_repo", "hub_base_model")}
NEEDS |= {"chat_template": {"prompt_template": ["chat"]}, "keep_importance": {"adapter_name_or_path": ["x"]}}
NEEDS |= {"dataset_config": {"dataset_name": ["d"], "train_file": []}, "dataset_name": {"train_file": []}}
NEEDS |= {"early_stopping_threshold": {"early_stopping_patience": ["2"]}}
VALUES = {
    "lr_scheduler_kwargs": ['{"a": 1}'],
    "loraplus_lr_ratio": ["16"],
    "optim": ["sgd"],
    **{"trained_layers": ["0.3"], "kept_layers": ["3"], "min_trained_layers": ["2"], "fixed_layers": ["1", "2"]},
    **{"id3_budget": ["all"], "report_to": ["tensorboard", "mlflow"], "torch_compile": ["false"]},
}


def values_of(name: str) -> list[str]:
    form = form_of(KEYS[name])
    one = form.choices[-1] if form.choices else {bool: "true", int: "5", float: "5e-1", str: "x"}[form.kind]
    return VALUES.get(name, [one, one] if form.many else [one])


def as_transformers_reads(argv: list[str]) -> tuple:
    """HfArgumentParser's dataclasses. It takes `| None` out of the types of their fields, which are put back."""
    types = {name: key.type for name, key in KEYS.items()}
    try:
        return HfArgumentParser(list(ARGUMENTS)).parse_args_into_dataclasses(argv, look_for_args_file=False)
    finally:
        for name, key in KEYS.items():
            key.type = types[name]


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_read_as_transformers_reads_it(name, tmp_path):
    given = {**BASE, **NEEDS.get(name, {}), name: values_of(name)}
    given = {key: values for key, values in given.items() if values}
    flags = {"--a_b v": [part for key, values in given.items() for part in (f"--{key}", *values)]}
    flags["--a-b v"] = [part.replace("_", "-") if part[:2] == "--" else part for part in flags["--a_b v"]]
    if not form_of(KEYS[name]).many:
        flags["--a_b=v"] = [f"--{key}={values[0]}" for key, values in given.items()]
    if given[name] == ["true"] and not form_of(KEYS[name]).optional:
        flags["--a_b"] = [part for part in flags["--a_b v"] if part != "true"]
    theirs = {form: as_transformers_reads(part) for form, part in flags.items()}
    for form, part in flags.items():
        *ours, _ = parse_arguments(ARGUMENTS, part, "")
        assert tuple(ours) == theirs[form], form
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                key: values if key == "lr_scheduler_kwargs" else [*map(yaml.safe_load, values)]
                for key, values in given.items()
            }
        )
    )
    *ours, _ = parse_arguments(ARGUMENTS, ["--config", str(recipe)], "")
    assert tuple(ours) == theirs["--a_b v"]


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("launch/recipes/*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_read_as_transformers_reads_it(recipe):
    values = yaml.safe_load(recipe.read_text())
    more = ["--dataset_name", "other/rows"] if "dataset_name" in values else ["--train_file", "a.json"]
    more += ["--seed", "3"]
    flags = []
    for key, value in values.items():
        flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    theirs = as_transformers_reads(flags + more)
    *ours, named = parse_arguments(ARGUMENTS, ["--config", str(recipe), *more], "")
    assert tuple(ours) == theirs
    assert named == str(recipe)


# What a sweep's YAML holds -> what the run must get.
SWEPT = {
    "target_modules": (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
    "train_file": (["~/a.json", "b.json"], [f"{Path.home()}/a.json", "b.json"]),
    "train_weights": ([1, 0.5], [1.0, 0.5]),
    "per_device_train_batch_size": (8.0, 8),  # of the distribution q_uniform
    "max_length": (256.0, 256),
    "trained_layers": (8.0, 8),
    "save_steps": (None, None),
    "output_dir": (None, None),
    "peft_config": (None, None),  # and may stand beside lora_r
    "lora_r": (16, 16),
    "bf16": (None, False),  # as the launcher says
    "gradient_checkpointing": (True, True),
    "packing": (False, False),
    "learning_rate": (1e-05, 1e-5),
    "max_steps": (-1, -1),
}


@pytest.mark.parametrize("form", ["args", "args_no_equals", "args_no_boolean_flags"])
def test_a_sweeps_values_are_taken_as_wandb_writes_them(form):
    swept = {"model_name_or_path": "m", **{key: value for key, (value, _) in SWEPT.items()}}
    flags = create_sweep_command_args({"args": {key: {"value": value} for key, value in swept.items()}})[form]
    args, config, _ = parse_training_arguments(flags, "")
    got = {key: getattr(config if key == "trained_layers" else args, key) for key in SWEPT}
    assert got == {key: value for key, (_, value) in SWEPT.items()}
    assert isinstance(got["max_length"], int)
    assert isinstance(got["trained_layers"], int)


@pytest.mark.parametrize("text", ["['q_proj', 'v_proj']", '["q_proj", "v_proj"]', "[q_proj, v_proj]"])
def test_lists_are_python_json_or_yaml(text):
    args, *_ = parse_training_arguments([f"--target_modules={text}", "--model_name_or_path=m", "--train_file=a"], "")
    assert args.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--max_length=256.5", "--max_length must be an integer; got 256.5"),
        ("--max_length=None", "--max_length must be an integer; got None"),
        ("--packing=None", "--packing must be true or false; got None"),
        ("--learning_rate=[1e-4]", r"--learning_rate must be a number; got \[1e-4\]"),
        ("--target_modules=[]", "--target_modules needs a value"),
        ("--lora_r", "--lora_r needs a value"),
        ("--trained_layers=8.5", "--trained_layers must be a fraction"),
    ],
)
def test_other_values_are_refused(flag, message):
    with pytest.raises(UsageError, match=message):
        parse_training_arguments(["--model_name_or_path=m", "--train_file=a", flag], "")


def test_one_point_nought_layers_stay_ambiguous():
    assert parse_count("trained_layers", "8.0") == 8
    with pytest.raises(ConfigError, match="ambiguous"):
        parse_count("trained_layers", "1.0")


# --------------------------------------------------------------------------------------------------------------- ~

PATHS = ("model_name_or_path", "train_file", "dataset_name", "validation_file", "chat_template", "peft_config")
PATHS += ("adapter_name_or_path", "output_dir", "resume_from_checkpoint")


@pytest.mark.parametrize("name", PATHS)
def test_home_is_meant_by_a_tilde(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {**BASE, **NEEDS.get(name, {}), name: ["~/x"]}
    given = {key: values[0] for key, values in given.items() if values}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(given))
    for flags in (
        [f"--{key}={value}" for key, value in given.items()],
        ["--config", "~/recipe.yaml"],
        ["--config=~/recipe.yaml"],
    ):
        args, *_ = parse_training_arguments(flags, "")
        value = getattr(args, name)
        assert (value[0] if isinstance(value, list) else value) == f"{tmp_path}/x"


def test_only_a_tilde_at_the_start_is_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~") == "/home/me"
    assert expand_home("--importance=text=~/run") == "--importance=text=/home/me/run"
    for text in ("a~/b", "x=a~/b", "~nobody-of-this-name/x", "100 ~ 200", ""):
        assert expand_home(text) == text


def test_the_commands_know_home_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shared = ["--model_name_or_path=~/m", "--adapter=~/a", "--output_dir=~/o"]
    args, _ = parse_arguments([EvaluateArguments], [*shared, "--test_file=~/t.json"], "")
    assert [args.model_name_or_path, args.adapter, args.output_dir, *args.test_file] == [
        f"{tmp_path}/{name}" for name in ("m", "a", "o", "t.json")
    ]
    args, _ = parse_arguments([AnalyzeArguments], [*shared, "--text_file=~/t.txt", "--lines", "full=~/f"], "")
    assert [args.text_file, *args.lines] == [f"{tmp_path}/t.txt", f"full={tmp_path}/f"]
    assert make_parser().parse_args(["memory", "--output=~/m.json"]).output == tmp_path / "m.json"
    with pytest.raises(UsageError, match=f"{tmp_path}/nowhere is not the folder of a finished run"):
        export(["~/nowhere", "--merged=~/merged"])
    with pytest.raises(UsageError, match=f"{tmp_path}/nowhere has no importance updates"):
        report(["--importance=text=~/nowhere", "--output_dir=~/o"])
