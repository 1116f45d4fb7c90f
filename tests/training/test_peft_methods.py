"""Adapters of other PEFT methods in whole runs: AdaLoRA, series, parallel, modules trained whole."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from support import read_lines, tiny_config
from support.runs import TARGETS, adapter_of, assert_same_adapter
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ist.training.command_line import UsageError
from ist.training.encoding import encode


def test_a_peft_config_with_some_layers_and_a_module_trained_whole(train, tmp_path, capsys):
    """As PEFT saved it, for inference and another base: N_L counts its layers, and what is in none always trains."""
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 1, 3], modules_to_save=["lm_head"])
    config.inference_mode, config.base_model_name_or_path = True, "another/model"
    config.save_pretrained(tmp_path)
    options = {"peft_config": tmp_path / "adapter_config.json", "lora_r": None, "lora_alpha": None}
    assert train(**options, trained_layers=1, save_steps=10) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["layer_counts"] == {"n_layers": 3, "trained": 1, "kept": 2}
    assert [name.rsplit(".", 1)[1] for name in record["layers"]] == ["0", "1", "3"]
    assert record["configuration"]["adapter"]["r"] == 2
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert sum("lora_" in name for name in saved) == 3 * 2
    assert any("lm_head" in name for name in saved)
    capsys.readouterr()
    assert train(**options, trained_layers=1, save_steps=10) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    config.r = 3
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"another configuration: adapter.r \(2 there, 3 here\)"):
        train(**options, trained_layers=1, output_dir=tmp_path / "new",
              resume_from_checkpoint=tmp_path / "run/checkpoints/step_000010")  # fmt: skip


ADALORA = {"peft_type": "ADALORA", "target_modules": TARGETS, "init_r": 6, "target_r": 2}


@pytest.mark.parametrize("step", [3, 12, 17])  # before the first allocation, between two, in the final phase
def test_adalora_resumes_exactly(train, tmp_path, step):
    (tmp_path / "peft.json").write_text(json.dumps({**ADALORA, "tinit": 4, "tfinal": 5, "deltaT": 5}))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "trained_layers": 2}
    assert train(**options, output_dir=tmp_path / "whole", save_steps=step) == 0
    checkpoint = tmp_path / f"whole/checkpoints/step_{step:06d}"
    assert train(**options, output_dir=tmp_path / "resumed", resume_from_checkpoint=checkpoint) == 0
    assert_same_adapter(tmp_path / "whole", tmp_path / "resumed")
    one, two = (
        json.loads((tmp_path / name / "adapter/adapter_config.json").read_text())["rank_pattern"]
        for name in ("whole", "resumed")
    )
    assert one == two
    assert 0 < sum(sum(kept) for kept in one.values()) <= 2 * len(one)  # the budget


@pytest.mark.parametrize("total_step", [None, 40])
def test_the_adalora_adapter_that_is_saved_is_the_one_that_was_validated(tiny, train, tmp_path, rows, total_step):
    """Between two allocations, and in a schedule that goes on beyond the run, pruned singular values train again."""
    config = {**ADALORA, "tinit": 2, "tfinal": 0, "deltaT": 10, "target_r": 1, "total_step": total_step}
    (tmp_path / "peft.json").write_text(json.dumps(config))
    (tmp_path / "validation.json").write_text(json.dumps(rows[:8]))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "learning_rate": 2e-2}
    options |= {"validation_file": tmp_path / "validation.json", "load_best_model_at_end": True, "eval_steps": 19}
    assert train(**options, trained_layers=2) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path / "run/adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    loss = tokens = 0.0
    for row in rows[:8]:
        encoded = encode(row, "alpaca", tokenizer, 256, False)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor([encoded["labels"]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        loss += cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += (labels[0, 1:] != -100).sum().item()
    assert loss / tokens == pytest.approx(record["best"]["validation_loss"], abs=1e-5)


def test_what_would_train_in_bfloat16_is_refused_or_float32(train, tmp_path):
    config = {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm", "post_attention_layernorm"]}
    (tmp_path / "peft.json").write_text(json.dumps(config))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "dtype": "bfloat16"}
    with pytest.raises(UsageError, match="would train in bfloat16, where small steps are lost: pass --bf16 true"):
        train(**options)
    assert not (tmp_path / "run").exists()
    assert train(**options, bf16=True, learning_rate=1e-4) == 0
    saved = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert all((tensor != 1).any() for tensor in saved.values())  # steps of 1e-4 beside 1: bfloat16 has none


@pytest.mark.parametrize("method", ["series", "parallel"])
@pytest.mark.parametrize("bf16", [False, True])
def test_series_and_parallel_adapters_on_a_bfloat16_base(train, tmp_path, method, bf16):
    assert train(peft_method=method, bottleneck_size=8, dtype="bfloat16", bf16=bf16, learning_rate=2e-2) == 0
    losses = [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "run").values()} == {torch.float32}


def test_tied_embeddings_trained_whole_are_saved(train, tiny, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / "tied").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "tied")
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    options = {"peft_config": tmp_path / "peft.json", "lora_r": None, "lora_alpha": None, "max_steps": 6}
    assert train(**options, model_name_or_path=tmp_path / "tied", save_steps=3) == 0
    assert any("embed_tokens" in name for name in adapter_of(tmp_path / "run"))


def test_a_method_that_starts_from_the_weights_is_planned_without_them(train, tmp_path):
    (tmp_path / "peft.json").write_text('{"peft_type": "SHIRA", "r": 2, "target_modules": ["q_proj"]}')
    assert train(peft_config=tmp_path / "peft.json", lora_r=None, lora_alpha=None, max_steps=4) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["layer_counts"]["n_layers"] == 4


@pytest.mark.parametrize("method", ["series", "parallel"])
def test_series_and_parallel_adapters_by_name(train, tmp_path, method):
    import ist.adapters  # noqa: F401  as the model card says

    assert train(peft_method=method, bottleneck_size=8) == 0
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["peft_type"] == method.upper()
    assert saved["bottleneck_size"] == 8
    targets = {"series": ["down_proj", "up_proj"], "parallel": ["gate_proj", "up_proj"]}
    assert sorted(saved["target_modules"]) == targets[method]
    assert "import ist.adapters" in (tmp_path / "run/adapter/README.md").read_text()
    losses = [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert losses[-1] < losses[0]
