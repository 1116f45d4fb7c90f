"""The launches of the README, on the real model where it is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, read_lines
from transformers import AutoConfig, AutoModelForCausalLM

MODEL = ROOT / "models/SmolLM2-135M-Instruct"
needs_model = pytest.mark.skipif(not MODEL.exists(), reason="the demo's model is not there: launch/setup.sh --model")


@needs_model
def test_the_demo_model_is_the_real_one():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert AutoConfig.from_pretrained(MODEL).num_hidden_layers == 30
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])


@needs_model
@pytest.mark.slow
def test_the_demo_leaves_its_files_and_runs_twice(tmp_path):
    run = tmp_path / "demo"
    short = ["--max_steps", "6", "--update_interval", "2", "--save_steps", "3", "--logging_steps", "1"]
    environment = {**os.environ, "DEMO_DIR": str(run), "OMP_NUM_THREADS": "2"}
    # Fewer rows than the demo writes: it keeps those that it finds.
    rows = [sys.executable, "-m", "ist.training.word_problems", "--output_dir", str(run / "data")]
    subprocess.run([*rows, "--validation_rows", "16", "--test_rows", "8"], cwd=ROOT, check=True, timeout=120)
    command = [str(ROOT / "launch/demo.sh"), *short]
    subprocess.run(command, check=True, env=environment, timeout=2400)
    demo = json.loads((tmp_path / "demo.json").read_text())
    assert {"exact_before", "exact_after", "validation_loss_before", "validation_loss_after"} <= demo.keys()
    assert demo["validation_loss_after"] < demo["validation_loss_before"]
    assert json.loads((run / "run.json").read_text())["layer_counts"] == {"n_layers": 30, "trained": 8, "kept": 15}
    updates = read_lines(run / "importance.jsonl")
    assert [update["step"] for update in updates] == [2, 4]
    assert torch.tensor(updates[-1]["scores"]).std() > 0
    for name in (
        "adapter/adapter_model.safetensors",
        "importance.png",
        "before/held_out.jsonl",
        "after/held_out.jsonl",
    ):
        assert (run / name).exists()

    def stamps():
        return {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.name != "demo.json"}

    before = stamps()
    again = subprocess.run(command, check=True, env=environment, timeout=900, capture_output=True, text=True)
    assert "nothing to do" in again.stdout
    assert stamps() == before


def test_a_fresh_clone_has_the_files_of_the_readme():
    names = {Path(name) for name in ("README.md", "LICENSE", "requirements.txt", "train_ist.py", "launch/demo.sh")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert names <= {Path(name) for name in tracked}
