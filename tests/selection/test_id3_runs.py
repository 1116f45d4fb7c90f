"""ID3 in runs of train_ist.py: masks, topologies, resume, refusals."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import read_lines, reseal
from support.unmasking import masks_of, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from ist import ISTConfig, SparseTuner
from ist.selection import StepwiseUnmasking
from ist.selection.packed_adamw import PackedAdamW
from ist.training import prepare as training_model
from ist.training.command_line import UsageError

# ------------------------------------------------------------------------------------------------ in train_ist.py


@pytest.mark.parametrize("peft_method", ["lora", "series", "parallel", "none"])
def test_masked_scalars_stay_and_the_norm_is_of_unmasked_ones(train, tiny, tmp_path, monkeypatch, peft_method):
    attach, unmask = StepwiseUnmasking.attach, StepwiseUnmasking.unmask
    seen = {"norm": [], "step": []}

    def attached(rule, parameters, *args):
        seen.update(rule=rule, start={name: p.detach().clone() for name, p in parameters.items()}, names=parameters)
        attach(rule, parameters, *args)

    def unmasked(rule, step):
        gradients = [p.grad.flatten().clone() for p in rule.parameters]
        number = unmask(rule, step)
        kept = [g[mask].double().square().sum() for g, mask in zip(gradients, masks_of(rule), strict=True)]
        seen["norm"].append(sum(kept).sqrt().item())
        assert sum(p.grad.count_nonzero() for p in rule.parameters) <= number
        return number

    monkeypatch.setattr(StepwiseUnmasking, "attach", attached)
    monkeypatch.setattr(StepwiseUnmasking, "unmask", unmasked)
    options = {"peft_method": peft_method, "weight_decay": 0.1, "id3_budget": 777, "bottleneck_size": 4}
    assert train(selection="id3", lora_dropout=0.1, save_steps=20, **options) == 0
    rule = seen["rule"]
    for (name, start), mask in zip(seen["start"].items(), masks_of(rule), strict=True):
        now = seen["names"][name].flatten()
        assert torch.equal(now[~mask], start.flatten()[~mask])
        assert (now[mask] != start.flatten()[mask]).float().mean() > 0.99 or not mask.any()
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [line["unmasked_scalars"] for line in lines] == [777 * t // 20 for t in range(1, 21)]
    assert [line["grad_norm"] for line in lines] == pytest.approx(seen["norm"], rel=1e-5)
    assert all(line["trained_layers"] == [0, 1, 2, 3] for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    summary = json.loads((tmp_path / "run/run.json").read_text())["id3"]
    assert summary["unmasked"] == summary["budget"] == 777
    in_layers = sum(summary["unmasked_by_layer"])  # without adapters, embeddings and head are candidates too
    assert 0 < in_layers < 777 if peft_method == "none" else in_layers == 777
    file = load_file(tmp_path / "run/checkpoints/step_000020/optimizer.safetensors")
    assert sum(len(tensor) for key, tensor in file.items() if key.endswith("|indices")) == 777
    if peft_method == "none":
        assert (tmp_path / "run/model").exists()
        return
    base = AutoModelForCausalLM.from_pretrained(tiny)
    saved = dict(PeftModel.from_pretrained(base, tmp_path / "run/adapter").named_parameters())
    assert all(torch.equal(saved[name], seen["names"][name]) for name in seen["names"])


def test_all_unmasked_at_once_is_plain_lora_bit_for_bit(train, tmp_path):
    options = {"lora_dropout": 0.1, "weight_decay": 0.1}
    assert train(selection="all", output_dir=tmp_path / "plain", **options) == 0
    assert train(selection="id3", id3_budget="all", id3_steps=1, output_dir=tmp_path / "id3", **options) == 0
    one, two = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("plain", "id3"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_resume_is_exact_and_needs_the_moments(train, tmp_path):
    options = {"selection": "id3", "id3_budget": 0.3, "id3_steps": 15, "save_steps": 7, "weight_decay": 0.1}
    assert train(output_dir=tmp_path / "whole", **options) == 0
    checkpoint = tmp_path / "whole/checkpoints/step_000007"
    whole = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    for lost in (None, "exp_avg", "step"):
        if lost:
            file = load_file(checkpoint / "optimizer.safetensors")
            changed = {key: torch.ones_like(t) if key.endswith(f"|{lost}") else t for key, t in file.items()}
            save_file(changed, checkpoint / "optimizer.safetensors")
            reseal(checkpoint, json.loads((checkpoint / "checkpoint.json").read_text()))
        run = tmp_path / f"without-{lost}"
        assert train(output_dir=run, resume_from_checkpoint=checkpoint, **options) == 0
        assert [line["unmasked_scalars"] for line in read_lines(run / "metrics.jsonl")] == [
            line["unmasked_scalars"] for line in read_lines(tmp_path / "whole/metrics.jsonl")[7:]
        ]
        again = load_file(run / "adapter/adapter_model.safetensors")
        assert all(torch.equal(whole[key], again[key]) for key in whole) == (lost is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id3_budget": 0}, r"--id3_budget must be a fraction in \(0, 1\), a count of 1 or more, or all; got 0"),
        ({"id3_budget": 1.0}, "--id3_budget 1.0 is ambiguous"),
        (
            {"id3_budget": 5633},
            r"--id3_budget must be .* from 1 to 5632 \(the scalars that may train\), or all; got 5633",
        ),
        ({"id3_steps": 21}, "--id3_steps 21 is more than the run's 20 steps"),
        ({"id3_steps": 0}, "--id3_steps must be 1 or more; got 0"),
        ({"id3_exponent": -1}, "--id3_exponent must be a finite number, 0 or more; got -1"),
        ({"id3_eps": 0}, "--id3_eps must be a finite number above 0; got 0"),
        ({"id3_eps": 1e-8, "id3_exponent": 4}, "--id3_eps must be large enough for its power 4.0 .*; got 1e-08"),
        ({"selection": "all", "id3_budget": 0.5}, "--id3_budget must be left out with --selection all"),
        ({"optim": "adamw_8bit"}, "--optim adamw_8bit keeps moments of masked"),
        ({"optim": "paged_adamw_8bit"}, "--optim paged_adamw_8bit keeps moments of masked"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(train, tmp_path, monkeypatch, options, message):

    monkeypatch.setattr(training_model, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UsageError, match=message) as error:
        train(**{"selection": "id3", **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_adalora_is_refused(train, tmp_path):
    (tmp_path / "peft.json").write_text(json.dumps({"peft_type": "ADALORA", "init_r": 6, "target_r": 3}))
    only = dict.fromkeys(("lora_r", "lora_alpha"))
    with pytest.raises(UsageError, match="ADALORA is not served: its budget prunes what id3 keeps masked"):
        train(selection="id3", peft_config=tmp_path / "peft.json", **only)


def test_without_its_optimizer_it_trains_nothing():
    tuner = SparseTuner(tiny_model(), ISTConfig(selection="id3"))
    with pytest.raises(RuntimeError, match="attach the rule to a PackedAdamW"):
        tuner.begin_step(0)
    optimizer = PackedAdamW([nn.Parameter(torch.ones(3))])
    state = {"state": {0: {"step": torch.ones(1)}}, "param_groups": optimizer.state_dict()["param_groups"]}
    with pytest.raises(ValueError, match="load_whole_state"):
        optimizer.load_state_dict(state)
