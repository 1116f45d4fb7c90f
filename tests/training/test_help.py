"""--help of train_ist.py, and what it says of keys that it does not have."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from accelerate.utils import LoggerType
from support import ROOT, synonyms

from ist.config import ISTConfig
from ist.selection import RULES
from ist.training.arguments import ARGUMENTS, TRACKERS, read_arguments
from ist.training.command_line import UsageError
from ist.training.keys import help_text
from ist.training.synonyms import SYNONYMS

KEYS = {key.name: key for group in ARGUMENTS for key in fields(group)}
HEAVY = ("torch", "transformers", "peft", "datasets", "bitsandbytes", "accelerate", "numpy")


def run_script(*argv: str) -> subprocess.CompletedProcess:
    """train_ist.py as `python train_ist.py` runs it; the last line of stderr lists what it has imported of HEAVY."""
    code = (
        f"import runpy, sys; sys.argv = ['train_ist.py', *{argv!r}]\n"
        "try:\n    runpy.run_path('train_ist.py', run_name='__main__')\n"
        f"finally:\n    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("argv", [("--help",), ("-h",), ("--help", "data"), ("--config", "x.yaml", "--help")], ids=str)
def test_help_imports_nothing_that_takes_seconds(argv):
    done = run_script(*argv)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert len(done.stdout.splitlines()) > 20


@pytest.mark.parametrize(
    "argv",
    [
        ("--learning_rates=1",),
        ("--lr", "1e-4"),
        ("--config", "nowhere.yaml"),
        ("--model_name_or_path=m",),
        ("--model_name_or_path=m", "--train_file=x", "--lora_r=many"),
        ("--model_name_or_path=m", "--train_file=x", "--selection=lisa", "--lisa_interval=0"),
        ("--model_name_or_path=m", "--train_file=x", "--selection=id3", "--optim=adamw_8bit"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_before_anything_is_imported(argv):
    done = run_script(*argv)
    error, imported = done.stderr.splitlines()
    assert done.returncode == 2
    assert error.startswith("error: ")
    assert imported == ""


def test_help_is_a_page_with_each_key_once_and_its_default():
    text = help_text(ARGUMENTS, "Fine-tune.", [])
    lines = text.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 100
    assert not re.search(r" \.\.\.$", text, re.MULTILINE)  # no phrase is cut
    shown = dict(re.findall(r"^  --(\w+) ?(\S*)  ", text, re.MULTILINE))
    assert list(shown) == list(KEYS)
    assert len(re.findall(r"^  --", text, re.MULTILINE)) == len(KEYS)
    assert "None" not in text
    assert "-name-or-path" not in text
    assert "(required) " in next(line for line in lines if "--model_name_or_path" in line)
    real = {name: key.default for name, key in KEYS.items()}
    resolved = {key.name for key in fields(ISTConfig) if key.default is None}  # by other keys; the help says how
    for rule in RULES:
        found = vars(ISTConfig(selection=rule, **({"oracle_scores": "scores.json"} if rule == "oracle" else {})))
        real |= {name: value for name, value in found.items() if name not in resolved}
    real |= {"report_to": "wandb", "model_name_or_path": None, "selection": "ist", "oracle_scores": ""}
    for name, value in real.items():
        if isinstance(value, bool):
            assert shown[name] == str(value).lower()
        elif isinstance(value, (int, float)):
            assert float(shown[name]) == value
        else:
            assert shown[name] == (value or "")


@pytest.mark.parametrize("group", ARGUMENTS, ids=lambda group: group.__name__)
def test_help_of_a_group_has_the_whole_text_of_its_keys(group):
    name = re.split(r"\W", group._argument_group_name)[0]
    assert f" {name}" in help_text(ARGUMENTS, "", []).split("groups are")[1].split("\n")[0]
    text = " ".join(help_text(ARGUMENTS, "", [name]).split())
    for key in fields(group):
        assert f"--{key.name} " in text
        assert key.metadata["help"] in text


def test_help_of_something_else_is_refused(capsys):
    with pytest.raises(UsageError, match="--help must be followed by nothing, a group or a key; got optimiser"):
        read_arguments(["--help", "optimiser"], "")
    with pytest.raises(SystemExit) as left:
        read_arguments(["--help", "lora-r", "data"], "")
    assert left.value.code == 0
    assert "--train_file" in capsys.readouterr().out


def test_the_trackers_are_those_of_accelerate():
    assert {*TRACKERS} == {str(kind) for kind in LoggerType} - {"all"}


# --------------------------------------------------------------------------------------------------------- synonyms

SEEN = {  # which had a misleading hint, or none
    **{"torch_dtype": "it is --dtype here", "max_train_samples": "it is --max_samples here"},
    **{"lr": "it is --learning_rate here", "epochs": "it is --num_train_epochs here"},
    "deepspeed": "accelerate_configs/fsdp2.yaml",
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "adapter": "--peft_method.*--load_in_4bit true.*--adapter_name_or_path",
    "use_dora": 'give --peft_config FILE.json with "use_dora": true; see ist/adapters/README.md',
    "init_lora_weights": "give --peft_config FILE.json with .init_lora_weights",
}


@pytest.mark.parametrize("name", SEEN)
@pytest.mark.parametrize("flag", ["--{}=x", "--{} x"])
def test_a_key_of_another_program_is_answered(name, flag, tmp_path):
    with pytest.raises(UsageError, match=f"^unknown key --{name}: .*{SEEN[name]}"):
        read_arguments(flag.format(name).split(), "")
    with pytest.raises(UsageError, match=SEEN[name]):
        read_arguments(flag.format(name.replace("_", "-")).split(), "")
    (tmp_path / "recipe.yaml").write_text(f"{name}: {{x: 1}}\n")
    with pytest.raises(UsageError, match=SEEN[name]):
        read_arguments(["--config", str(tmp_path / "recipe.yaml")], "")


def test_synonyms_name_keys_that_there_are():
    assert len(SYNONYMS) >= 60
    assert not KEYS.keys() & SYNONYMS.keys()
    for name, answer in SYNONYMS.items():
        assert name == name.lower()
        if answer not in KEYS:
            assert " " in answer
            launcher = {"config_file", "num_processes", "revision", "local"}
            assert {*re.findall(r"--(\w+)", answer)} <= KEYS.keys() | launcher, answer


@pytest.mark.parametrize(
    ("name", "answer"),
    [("max_lenght", "Did you mean --max_length"), ("lora-ranks", "See --help"), ("something", "See --help")],
)
def test_only_near_misses_are_guessed(name, answer):
    with pytest.raises(UsageError, match=answer):
        read_arguments([f"--{name}=1"], "")


def test_the_page_of_other_programs_keys_is_that_of_its_script():
    assert (ROOT / "launch/results/synonyms.md").read_text() == synonyms.page()
    assert sum(key not in KEYS for keys in synonyms.KEYS.values() for key in keys) >= 80
    assert synonyms.page().count("See --help") == 0


def test_a_recipe_without_its_flag_is_told_its_flag():
    for before in ([], ["--train_file=a.json"]):
        with pytest.raises(UsageError, match=r"unexpected argument demo\.yaml.*a recipe is --config demo\.yaml"):
            read_arguments([*before, "demo.yaml"], "")
