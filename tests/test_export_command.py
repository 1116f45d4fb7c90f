"""`python -m ist.export`: a merged model is the base model with its adapter, or is refused."""

import json
import re
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from ist.export.command import main
from ist.training.command_line import UsageError


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None]).logits


def test_a_merged_model_is_the_base_with_its_adapter(train, tmp_path, tiny, monkeypatch):
    assert train(max_steps=6, learning_rate=0.05, warmup_steps=0, validation_size=4) == 0
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "ist.export", "run", "--merged", "out/merged"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert f"LORA adapter run/adapter merged into {tiny}: out/merged" in done.stdout
    merged = AutoModelForCausalLM.from_pretrained("out/merged")
    adapted = AutoPeftModelForCausalLM.from_pretrained("run/adapter")
    assert torch.allclose(logits(merged), logits(adapted), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(AutoModelForCausalLM.from_pretrained(tiny)), atol=1e-2)
    assert AutoTokenizer.from_pretrained("out/merged").chat_template
    card = (tmp_path / "out/merged/README.md").read_text()
    assert "library_name: transformers" in card
    space: dict = {}
    exec(card.split("```python\n")[1].split("```")[0], space)
    assert type(space["model"]).__name__ == "LlamaForCausalLM"
    assert main(["run", "--merged", "half", "--dtype", "bfloat16"]) == 0
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


def test_snippets_of_the_readme(train, tmp_path, monkeypatch, capsys):
    assert train(max_steps=2, output_dir=tmp_path / "runs/first") == 0
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text().split("## Use the adapter")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet, {})
        assert "### Instruction:\nIs the sentence positive?" in capsys.readouterr().out
    (command,) = re.findall(r"`python -m ist.export (.*?)`", page)
    assert main(command.split()) == 0
    AutoModelForCausalLM.from_pretrained("merged")
    (flag,) = re.findall(r"`(--adapter_name_or_path .*?)`", page)
    key, value = flag.split()
    assert train(max_steps=1, lora_r=None, lora_alpha=None, **{key[2:]: value}) == 0


@pytest.mark.parametrize("method", ["series", "ia3"])
def test_what_merges_and_what_does_not(train, tmp_path, method):
    IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]).save_pretrained(tmp_path)
    options = {"peft_method": "series"} if method == "series" else {"peft_config": tmp_path / "adapter_config.json"}
    assert train(max_steps=3, lora_r=None, lora_alpha=None, **options) == 0
    if method == "series":
        with pytest.raises(UsageError, match="a SERIES adapter cannot be merged: "):
            main([str(tmp_path / "run"), "--merged", str(tmp_path / "merged")])
        assert not (tmp_path / "merged").exists()
        return
    assert main([str(tmp_path / "run/adapter"), "--merged", str(tmp_path / "merged")]) == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/adapter")
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(adapted), atol=1e-5)


def test_bad_input(train, tmp_path, tiny):
    assert train(max_steps=1) == 0
    run = str(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for argv, message in (
        ([str(tiny), "--merged", "x"], r"is not the folder of a finished run \(no adapter/adapter_config.json\)"),
        ([run, "--merged", str(tmp_path / "full")], "is there already, and not empty"),
        ([run], "--merged. See --help"),
    ):
        with pytest.raises(UsageError, match=message):
            main(argv)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.lm_head.weight += 1
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(UsageError, match="is not the model that the adapter was trained on: its files have changed"):
        main([run, "--merged", str(tmp_path / "merged"), "--model_name_or_path", str(tmp_path / "other")])
    assert train(peft_method="none", selection="random", output_dir=tmp_path / "whole", max_steps=1) == 0
    with pytest.raises(UsageError, match="holds a whole model already"):
        main([str(tmp_path / "whole"), "--merged", str(tmp_path / "merged")])
