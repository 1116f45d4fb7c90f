"""A fixed sample of `python tests/support/methods.py`, which tests all; AdaLoRA against PEFT's own loop."""

import json

import peft
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from support import make_tiny, method_table, methods, read_lines, tiny_config
from support.documents import published
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ist.adapters.adalora import AdaLoraAllocation
from ist.training.data import GlobalBatches, micro_batches

SAMPLE = ["LoRA", "DoRA", "AdaLoRA", "OFT", "Series", "Parallel"]
ON_TWO_RANKS = ["AdaLoRA", "Series"]
ONE_PROCESS = ["suppression", "rest", "resume", "reload", "4-bit"]


@pytest.fixture(scope="module")
def work(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("methods")
    make_tiny(folder / "tiny", rows)
    (folder / "train.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("name", SAMPLE)
def test_one_process(work, name):
    cells = methods.one_process(work, name)
    assert set(cells) == set(ONE_PROCESS)
    for key in ONE_PROCESS:
        assert cells[key].startswith("yes"), f"{key}: {cells[key]}"


@pytest.mark.parametrize("topology", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one_process(work, topology):
    for name in ON_TWO_RANKS:
        if not (work / "one" / methods.slug(name) / "run/adapter").exists():
            methods.one_process(work, name)
    answers = methods.launch(topology, work, ON_TWO_RANKS, timeout=240)
    assert answers == {name: {topology: "yes"} for name in ON_TWO_RANKS}


@pytest.mark.parametrize("name", ["Prompt tuning", "Prefix tuning", "P-tuning", "LLaMA-Adapter", "Shadow", "UniLoRA"])
def test_methods_without_a_response_per_layer_are_refused_in_one_line(work, name):
    if method_table.METHODS[name].get("peft_type", "") not in peft.PeftType.__members__:
        pytest.skip(f"this version of PEFT has no {name}")
    refusal = methods.one_process(work, name)["refused"]
    assert "\n" not in refusal
    assert "no layer" in refusal


def test_the_committed_table_is_of_all_methods():
    result = json.loads((methods.ROOT / "launch/results/methods.json").read_text())
    assert result["configurations"] == method_table.METHODS
    assert method_table.as_table(result["answers"]) == published("methods")


ADALORA = {"init_r": 6, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 2, "orth_reg_weight": 0.5}


def test_adalora_with_all_layers_is_pefts_own_loop(tiny, train, train_file, tmp_path, monkeypatch):
    """PEFT's way: labels in the forward, so that its model adds the orthogonality term; then update_and_allocate."""
    import train_ist

    (tmp_path / "peft.json").write_text(
        json.dumps({"peft_type": "ADALORA", "target_modules": method_table.TARGETS, **ADALORA})
    )
    seen = {}
    prepare = train_ist.prepare_data
    monkeypatch.setattr(train_ist, "prepare_data", lambda args: seen.setdefault("data", prepare(args)))
    options = {"peft_config": tmp_path / "peft.json", "selection": "all", "lora_r": None, "lora_alpha": None}
    assert train(**options, warmup_steps=0, lr_scheduler_type="constant", max_grad_norm=0) == 0
    steps = 20

    torch.manual_seed(42)
    config = AdaLoraConfig(target_modules=method_table.TARGETS, total_step=steps, task_type="CAUSAL_LM", **ADALORA)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    data = seen["data"]
    stream, losses = GlobalBatches(len(data.rows), 4, 42), []
    for step in range(steps):
        (batch,) = micro_batches(data.rows, stream.rows(step), 4, 0, 1, data.pad_token_id)
        loss = model(**batch).loss
        loss.backward()
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            labels = batch["labels"][:, 1:].flatten()
            losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels).item())
        optimizer.step()
        model.base_model.update_and_allocate(step + 1)
        optimizer.zero_grad()

    ours = [line["loss"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert ours == pytest.approx(losses, abs=2e-4)
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["rank_pattern"]
    expected = {key.replace(".default", ""): pattern for key, pattern in config.rank_pattern.items()}
    kept = sum(sum(pattern) for pattern in expected.values())
    assert kept == 3 * len(expected)  # the budget: target_r for each module
    assert sum(a != b for key in expected for a, b in zip(saved[key], expected[key], strict=True)) <= 0.02 * 6 * len(
        expected
    )


def test_a_layer_that_trained_rarely_is_not_judged_by_that():
    """Two layers of equal sensitivity, one trained in a fourth of the steps."""
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=90, task_type="CAUSAL_LM", **ADALORA)
    model = get_peft_model(LlamaForCausalLM(tiny_config(2)), config)
    allocator = AdaLoraAllocation(model).allocator
    inner, scores = model.base_model.model, {}
    for step in range(4):
        for name, parameter in inner.named_parameters():
            if "lora_" in name:
                rests = ".layers.1." in name and step
                parameter.data.fill_(1)
                parameter.grad = None if rests else torch.ones_like(parameter)
        allocator.update_ipt(inner)
    for i in (0, 1):
        name = f"model.layers.{i}.self_attn.q_proj.lora_E.default"
        assert allocator.updates[name] == (4, 1)[i]
        scores[i] = (allocator._element_score(name).mean() / allocator.exp_avg_unc[name].mean()).item()
    assert scores[0] == pytest.approx(scores[1]) == pytest.approx(1)  # the sensitivity |w g|, at its true value


def test_adalora_keeps_the_statistics_of_layers_that_rest():
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=20, task_type="CAUSAL_LM", **ADALORA)
    model = get_peft_model(LlamaForCausalLM(tiny_config()), config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            torch.nn.init.normal_(parameter)
    stock = model.base_model.rankallocator
    allocation = AdaLoraAllocation(model)
    ids = torch.randint(0, 400, (2, 9))
    for step in (1, 2):
        for name, parameter in model.named_parameters():
            if "lora_" in name and "ranknum" not in name:
                parameter.requires_grad_(step == 1 or ".layers.2." in name)
                parameter.grad = None
        model(input_ids=ids, labels=ids).loss.backward()
        if step == 1:
            stock.update_ipt(model.base_model.model)  # all layers train: PEFT's own is the reference
        before = {name: value.clone() for name, value in allocation.allocator.exp_avg_ipt.items()}
        allocation.step(step)
        after = allocation.allocator.exp_avg_ipt
        if step == 1:
            assert all(torch.equal(after[name], value) for name, value in stock.exp_avg_ipt.items())
        else:
            assert {name for name in after if not torch.equal(after[name], before[name])} == {
                f"model.layers.2.self_attn.q_proj.lora_{letter}.default" for letter in "ABE"
            }
