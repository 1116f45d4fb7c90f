"""Going on: from an adapter of an earlier run, for more steps than a finished run had, with names that changed."""

import json
import os
import re
import shutil

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig
from safetensors.torch import load_file, save_file
from support import read_lines

from ist.training.arguments import parse_training_arguments
from ist.training.command_line import UsageError
from ist.training.record import differing_keys

VALIDATED = {"validation_size": 8, "max_steps": 10}


def losses(run) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def validated(run) -> list[float]:
    return [line["validation_loss"] for line in read_lines(run / "metrics.jsonl") if "validation_loss" in line]


def weights(run, name="adapter/adapter_model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(run / name)


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# ------------------------------------------------------------------------------------------------------ an adapter


def peft_file(folder, config) -> str:
    config.save_pretrained(folder / "config")
    return str(folder / "config/adapter_config.json")


@pytest.mark.parametrize("method", ["lora", "series", "parallel", "loha"])
def test_the_first_loss_is_the_validated_one(train, tmp_path, method, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    options = {"peft_method": method, "lora_r": None, "lora_alpha": None}
    if method == "loha":
        config = LoHaConfig(r=4, target_modules=["q_proj", "up_proj"])
        options = {"peft_config": peft_file(tmp_path, config), "lora_r": None, "lora_alpha": None}
    assert train(output_dir=first, **options, **VALIDATED) == 0
    own = {"lora_r": None, "lora_alpha": None, "adapter_name_or_path": first / "adapter"}
    assert train(output_dir=second, **own, **VALIDATED) == 0
    assert validated(second)[0] == pytest.approx(validated(first)[-1], abs=1e-6)
    assert validated(second)[-1] < validated(first)[-1]
    there, here = (json.loads((run / "adapter/adapter_config.json").read_text()) for run in (first, second))
    for key in ("target_modules", "exclude_modules"):
        there[key], here[key] = sorted(there.get(key) or []), sorted(here.get(key) or [])
    assert there == here
    assert not equal(weights(first), weights(second))
    # A resumed one goes on from its own checkpoint, and the same adapter alone.
    if method != "lora":
        return
    assert train(output_dir=second, resume_from_checkpoint="auto", **own, **VALIDATED) == 0
    assert "nothing to do" in capsys.readouterr().out
    file = first / "adapter/adapter_model.safetensors"
    save_file({key: value + 1e-3 for key, value in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="the files of the adapter that it went on from have changed"):
        train(output_dir=second, resume_from_checkpoint="auto", **own, **VALIDATED)


def test_importance_is_kept_where_it_is_wanted(train, tmp_path):
    own = {"lora_r": None, "lora_alpha": None, "adapter_name_or_path": tmp_path / "first/adapter"}
    assert train(output_dir=tmp_path / "first", max_steps=10) == 0
    scores = read_lines(tmp_path / "first/importance.jsonl")[-1]["scores"]
    assert any(scores)
    for name, keep in (("kept", True), ("anew", False)):
        options = {"save_steps": 2, "max_steps": 3, "keep_importance": keep}
        assert train(output_dir=tmp_path / name, **own, **options) == 0
        state = json.loads((tmp_path / name / "checkpoints/step_000002/checkpoint.json").read_text())
        assert state["tuner"]["scores"] == (scores if keep else [0.0] * len(scores))
    for options, message in (
        ({"selection": "random", "update_interval": None, "score_lr": None}, "is for --selection ist.*got random"),
        ({"score_rule": "released"}, "are of --score_rule paper; got released"),
    ):
        with pytest.raises(UsageError, match=f"--keep_importance true.*{message}"):
            train(output_dir=tmp_path / "bad", keep_importance=True, **own, **options)
    shutil.copytree(tmp_path / "first/adapter", tmp_path / "alone")
    with pytest.raises(UsageError, match=r"is not the folder of a run \(no run.json\)"):
        train(output_dir=tmp_path / "bad", **own | {"adapter_name_or_path": tmp_path / "alone"}, keep_importance=True)
    with pytest.raises(UsageError, match="--keep_importance true needs --adapter_name_or_path"):
        train(keep_importance=True)


def test_adapters_that_cannot_be_gone_on_from(train, tmp_path, tiny):
    plain = {"lora_r": None, "lora_alpha": None}
    assert train(output_dir=tmp_path / "first", max_steps=2) == 0
    adapter = tmp_path / "first/adapter"
    with pytest.raises(UsageError, match=f"no adapter_config.json.; take {adapter}"):
        train(adapter_name_or_path=tmp_path / "first", **plain)
    with pytest.raises(UsageError, match="--adapter_name_or_path no/such is no folder, and no adapter on the Hub"):
        train(adapter_name_or_path="no/such", **plain)
    with pytest.raises(UsageError, match="--adapter_name_or_path says it all: leave out --lora_r"):
        train(adapter_name_or_path=adapter, lora_r=8)
    # What lies beside the weights of a model would be loaded too; an adapter is no model.
    mixed = shutil.copytree(tiny, tmp_path / "mixed")
    shutil.copy(adapter / "adapter_config.json", mixed)
    with pytest.raises(UsageError, match="holds an adapter beside its weights"):
        train(model_name_or_path=mixed)
    with pytest.raises(
        UsageError, match=f"is an adapter and no model: pass --model_name_or_path .*{tiny.name}, and the adapter by"
    ):
        train(model_name_or_path=adapter)
    whole = load_file(adapter / "adapter_model.safetensors")
    save_file({key: whole[key] for key in list(whole)[1:]}, adapter / "adapter_model.safetensors")
    with pytest.raises(UsageError, match=f"--adapter_name_or_path {adapter} lacks 1 tensors of its adapter"):
        train(adapter_name_or_path=adapter, **plain)
    file = peft_file(tmp_path, AdaLoraConfig(total_step=100, tinit=1, tfinal=1, target_modules=["q_proj"]))
    assert train(output_dir=tmp_path / "adalora", peft_config=file, max_steps=4, **plain) == 0
    with pytest.raises(UsageError, match="is of AdaLoRA, which has given up ranks"):
        train(adapter_name_or_path=tmp_path / "adalora/adapter", **plain)


# --------------------------------------------------------------------------------------------------------- more steps


def test_a_finished_run_goes_on_for_more_steps(train, tmp_path, capsys):
    options = {"lr_scheduler_type": "constant_with_warmup", "save_steps": 10, "validation_size": 8}
    assert train(output_dir=tmp_path / "whole", max_steps=20, **options) == 0
    more = {"output_dir": tmp_path / "more", **options}
    assert train(max_steps=10, **more) == 0
    with pytest.raises(UsageError, match=r"another run's results: max_steps \(10 there, 20 here\)"):
        train(max_steps=20, **more)
    with pytest.raises(UsageError, match=r"max_steps \(10 there, 8 here\)"):
        train(max_steps=8, resume_from_checkpoint="auto", **more)
    assert train(max_steps=20, resume_from_checkpoint="auto", **more) == 0
    said = (
        "20 steps instead of 10: schedule constant_with_warmup over all of them, 2 of warm-up; learning rate 5.00e-03"
    )
    assert said in capsys.readouterr().out
    assert losses(tmp_path / "more") == losses(tmp_path / "whole")
    assert equal(weights(tmp_path / "more"), weights(tmp_path / "whole"))
    run = json.loads((tmp_path / "more/run.json").read_text())
    assert (run["status"], run["steps"], run["configuration"]["max_steps"]) == ("finished", 20, 20)
    assert train(max_steps=20, resume_from_checkpoint="auto", **more) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_falling_schedule_is_that_of_all_steps(train, tmp_path):
    options = {"lr_scheduler_type": "linear", "save_steps": 10, "output_dir": tmp_path / "run"}
    assert train(max_steps=10, **options) == 0
    assert train(max_steps=30, resume_from_checkpoint="auto", **options) == 0
    rates = {line["step"]: line["learning_rate"] for line in read_lines(tmp_path / "run/metrics.jsonl")}
    # Step t trains at the rate of t - 1 finished steps: 5e-3 (T - (t - 1)) / (T - 2).
    assert [rates[t] for t in (5, 10, 11, 20)] == pytest.approx(
        [5e-3 * (10 - 4) / 8, 5e-3 * (10 - 9) / 8, 5e-3 * (30 - 10) / 28, 5e-3 * (30 - 19) / 28]
    )


def test_more_epochs_and_runs_without_a_checkpoint(train, tmp_path):
    options = {"max_steps": None, "output_dir": tmp_path / "run", "per_device_train_batch_size": 12}
    assert train(num_train_epochs=1, **options) == 0
    message = r"finished after 5 steps, without a whole checkpoint .* Begin from its adapter/"
    with pytest.raises(UsageError, match=message):
        train(num_train_epochs=2, resume_from_checkpoint="auto", **options)
    options["output_dir"] = tmp_path / "saved"
    assert train(num_train_epochs=1, save_steps=3, **options) == 0
    assert train(num_train_epochs=2, resume_from_checkpoint="auto", **options) == 0
    assert [line["step"] for line in read_lines(tmp_path / "saved/metrics.jsonl")] == list(range(1, 11))
    for file in tmp_path.glob("saved/checkpoints/*/checkpoint.json"):
        file.unlink()
    before = (tmp_path / "saved/metrics.jsonl").read_bytes()
    with pytest.raises(UsageError, match="finished after 10 steps, without a whole checkpoint"):
        train(num_train_epochs=3, resume_from_checkpoint="auto", **options)
    assert (tmp_path / "saved/metrics.jsonl").read_bytes() == before


def test_an_unfinished_run_without_a_checkpoint_is_not_overwritten_by_another(train, tmp_path, rows):
    assert train(max_steps=3) == 0
    run = tmp_path / "run/run.json"
    run.write_text(run.read_text().replace('"status": "finished"', '"status": "failed"'))
    (tmp_path / "other.json").write_text(json.dumps(rows[:30]))
    with pytest.raises(UsageError, match=r"holds another run's results: .*train_file"):
        train(max_steps=3, resume_from_checkpoint="auto", train_file=tmp_path / "other.json")
    assert len(losses(tmp_path / "run")) == 3


def test_methods_with_a_schedule_of_their_own(train, tmp_path):
    rules = {"update_interval": None, "score_lr": None, "selection": "id3"}
    options = {"save_steps": 4, "output_dir": tmp_path / "run", **rules}
    assert train(max_steps=4, **options) == 0
    with pytest.raises(UsageError, match="id3 was scheduled over the run's steps; a run with --id3_steps can go on"):
        train(max_steps=8, resume_from_checkpoint="auto", **options)


# ------------------------------------------------------------------------------------------- names, speed and memory


def test_a_run_goes_on_under_other_names_and_with_what_changes_speed_alone(train, tmp_path, tiny, rows):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    os.symlink(tiny, tmp_path / "linked")
    options = {"output_dir": tmp_path / "run", "save_steps": 10, "lora_dropout": 0}
    assert train(train_file=tmp_path / "rows.json", max_steps=10, **options) == 0
    other = {
        **{"train_file": os.path.relpath(tmp_path / "rows.json"), "model_name_or_path": tmp_path / "linked"},
        **{"gradient_checkpointing": True, "optim": "adamw_torch_fused", "attn_implementation": "eager"},
        **{"optimizer_state": "offload", "preprocessing_num_workers": 1},
    }
    shutil.copytree(tmp_path / "run", tmp_path / "twin")  # goes on under the same names, with the same settings
    twin = options | {"output_dir": tmp_path / "twin", "train_file": tmp_path / "rows.json"}
    assert train(max_steps=14, resume_from_checkpoint="auto", **twin) == 0
    assert train(max_steps=14, resume_from_checkpoint="auto", **options, **other) == 0
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "twin"), abs=1e-4)
    anew = options | {"output_dir": tmp_path / "anew", "adapter_name_or_path": None}
    assert train(train_file=tmp_path / "rows.json", max_steps=14, learning_rate=1e-9, **anew) == 0
    assert losses(tmp_path / "anew")[-1] != pytest.approx(losses(tmp_path / "twin")[-1], abs=1e-2)  # what is lost shows
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:] + rows[:1]))
    with pytest.raises(UsageError, match=r"train_digest \(the encoded training rows have changed\)"):
        train(max_steps=20, resume_from_checkpoint="auto", **options, **other)


def test_what_may_change(arguments):
    """Without digests, as older runs have none, names count."""
    there = vars(parse_training_arguments(arguments(), "")[0]) | {"global_batch_size": 4, "train_rows": 60}
    for key, value, free in (
        ("optim", "adamw_torch_fused", True),
        ("optim", "adamw_8bit", False),
        ("optimizer_state", "offload", True),
        ("optimizer_state", "drop", False),
        ("torch_compile", True, True),
        ("report_to", "tensorboard", True),
        ("train_file", ["other.json"], False),
        ("learning_rate", 1.0, False),
    ):
        found = differing_keys(there, there | {key: value})
        assert (found == "") == free, (key, found)
        if not free:
            assert re.match(rf"{key} \(", found)


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("launched", "given", "result"),
    [
        ("no", None, False),
        ("bf16", None, True),
        ("bf16", True, True),
        ("no", True, True),
        ("no", False, False),
        ("bf16", False, "--bf16 false, and accelerate's mixed_precision is bf16: leave out --bf16"),
        ("fp16", True, "--bf16 true, and accelerate's mixed_precision is fp16"),
        ("fp16", None, "accelerate's mixed_precision is fp16: gradients of suppressed layers are too small for it"),
    ],
)
def test_the_launchers_precision(arguments, monkeypatch, capsys, launched, given, result):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    argv = arguments(bf16=given)
    if isinstance(result, str):
        with pytest.raises(UsageError, match=result):
            parse_training_arguments(argv, "")
        return
    args, _, _ = parse_training_arguments(argv, "")
    assert args.bf16 is result
    said = "Mixed precision bf16, as accelerate's mixed_precision says." in capsys.readouterr().out
    assert said == (launched == "bf16" and given is None)
