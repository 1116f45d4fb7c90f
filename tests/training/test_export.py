"""What a run hands on: an adapter that loads from anywhere, with its tokenizer and card; and its way to the Hub."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support import CHAT_TEMPLATE, read_lines, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

from ist.loss import token_loss_sum
from ist.training import hub
from ist.training.command_line import UsageError
from ist.training.data import collate
from ist.training.encoding import encode


def validation_loss(model, tokenizer, rows) -> float:
    encoded = [encode(row, "alpaca", tokenizer, 1024, False) for row in rows]
    batch = collate([row["input_ids"] for row in encoded], [row["labels"] for row in encoded], 0)
    with torch.no_grad():
        return token_loss_sum(model.eval(), batch).item() / (batch["labels"][:, 1:] != -100).sum().item()


def test_an_adapter_loads_from_another_folder(train, tmp_path, tiny, rows, monkeypatch):
    """By AutoPeft, load_adapter and pipeline; moved, from another working directory, its base given relative to one."""
    (tmp_path / "rows.json").write_text(json.dumps(rows[:40]))
    (tmp_path / "held.json").write_text(json.dumps(rows[40:]))
    options = {"train_file": tmp_path / "rows.json", "validation_file": tmp_path / "held.json"}
    assert train(model_name_or_path=os.path.relpath(tiny), **options) == 0
    expected = [line["validation_loss"] for line in read_lines(tmp_path / "run/metrics.jsonl") if len(line) == 3][-1]
    moved = shutil.move(tmp_path / "run/adapter", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(moved)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template
    model = AutoPeftModelForCausalLM.from_pretrained(moved)
    assert validation_loss(model, tokenizer, rows[40:]) == pytest.approx(expected, abs=1e-6)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    assert validation_loss(base, tokenizer, rows[40:]) != pytest.approx(expected, abs=1e-3)
    base.load_adapter(str(moved))
    assert validation_loss(base, tokenizer, rows[40:]) == pytest.approx(expected, abs=1e-6)
    generate = pipeline("text-generation", model=str(moved), tokenizer=str(moved))
    assert validation_loss(generate.model, tokenizer, rows[40:]) == pytest.approx(expected, abs=1e-6)


def test_the_card_says_what_was_trained_on_what(train, tmp_path):
    assert train(validation_size=8, max_steps=4, run_name="named") == 0
    card = (tmp_path / "run/adapter/README.md").read_text()
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert (tmp_path / "run/adapter/importance.png").stat().st_size > 1000
    for text in (
        "library_name: peft",
        "pipeline_tag: text-generation",
        f'AutoPeftModelForCausalLM.from_pretrained("{tmp_path / "run/adapter"}")',
        "| rows | train.json (52 rows, ",
        "| steps | 4 of 4 rows |",
        f"| validation loss at the end | {run['final_validation_loss']:.4f} |",
        f"model.layers.0 {run['trained_counts'][0]}, ",
        "![importance of each layer",
    ):
        assert text in card, text
    code = card.split("```python\n")[1].split("```")[0]
    space: dict = {}
    exec(code, space)
    assert type(space["model"]).__name__ == "PeftModelForCausalLM"


def test_generation_of_a_chat_model_ends_with_its_turns(train, tmp_path, tiny):
    """Its turns end in a token that is not the tokenizer's eos."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", "<|end|>")
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    options = {"model_name_or_path": folder, "prompt_template": "chat", "max_steps": 1}
    assert train(peft_method="none", selection="random", **options) == 0
    stops = json.loads((tmp_path / "run/model/generation_config.json").read_text())["eos_token_id"]
    assert set(stops) >= {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")}


# ------------------------------------------------------------------------------------------------------------- the Hub


class Address(SimpleNamespace):
    def __str__(self) -> str:
        return f"https://hub/{self.repo_id}"


class FakeHub:
    """In the place of HfApi: keeps what it is given."""

    def __init__(self, folder, broken=False):
        self.folder, self.broken, self.private = folder, broken, None

    def __call__(self):
        return self

    def whoami(self):
        if self.broken == "login":
            raise ValueError("Token is required")

    def create_repo(self, name, private, exist_ok):
        self.private = private
        return Address(repo_id=f"me/{name}")

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private and self.broken != "public")

    def upload_folder(self, repo_id, folder_path, commit_message):
        if self.broken == "network":
            raise ConnectionError("no network")
        shutil.copytree(folder_path, self.folder, dirs_exist_ok=True)


@pytest.mark.parametrize("method", ["lora", "none"])
def test_what_is_pushed_holds_no_path_of_this_machine(train, tmp_path, tiny, monkeypatch, capsys, method):
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", fake)
    options = {"peft_method": method, "selection": "random", "max_steps": 2, "push_to_hub": True}
    options |= {"hub_base_model": "org/base", "hub_model_id": "mine"}
    assert train(**options) == 0
    assert fake.private is True
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["hub"] == "https://hub/me/mine"
    for file in (tmp_path / "hub").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name
        assert str(tiny).encode() not in file.read_bytes(), file.name
    card = (tmp_path / "hub/README.md").read_text()
    assert 'from_pretrained("me/mine")' in card
    assert "base_model: org/base" in card
    if method == "lora":
        assert json.loads((tmp_path / "hub/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
        local = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
        assert local["base_model_name_or_path"] == str(tiny)
    capsys.readouterr()
    assert train(resume_from_checkpoint="auto", **options) == 0
    assert "It is on the Hub: https://hub/me/mine" in capsys.readouterr().out


def test_a_push_that_fails_costs_no_run(train, tmp_path, monkeypatch, capsys):
    fake = FakeHub(tmp_path / "hub", broken="network")
    monkeypatch.setattr(hub, "HfApi", fake)
    options = {"max_steps": 2, "push_to_hub": True, "hub_base_model": "org/base", "hub_private_repo": False}
    assert train(**options) == 0
    assert fake.private is False
    said = f"is not pushed (no network); the same command with --output_dir {tmp_path / 'run'} --resume_from"
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "finished"
    fake.broken = "public"
    assert train(resume_from_checkpoint="auto", **options | {"hub_private_repo": None}) == 0
    assert "me/run is there and public; --hub_private_repo false pushes to it" in capsys.readouterr().err
    fake.broken = False
    assert train(resume_from_checkpoint="auto", **options) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["hub"] == "https://hub/me/run"
    assert (tmp_path / "hub/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "the base model is a folder here .*; --hub_base_model is its name on the Hub"),
        ({"push_to_hub": True, "hub_base_model": "a/b"}, "--push_to_hub true finds no login .*hf auth login"),
        ({"hub_model_id": "a/b"}, "--hub_model_id needs --push_to_hub true"),
        ({"push_to_hub": True, "hub_model_id": "a b"}, "--hub_model_id must be a name on the Hub, .*; got a b"),
    ],
)
def test_bad_keys_of_the_hub(train, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(hub, "HfApi", FakeHub(tmp_path / "hub", broken="login"))
    with pytest.raises(UsageError, match=message):
        train(**options)
    assert not (tmp_path / "run").exists()
