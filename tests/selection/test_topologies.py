"""All rules on one process, DDP and FSDP2: the same draws, the same training, exact resume."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import read_lines, rules
from transformers import AutoModelForCausalLM, AutoTokenizer

# ------------------------------------------------------------------------------------------- on each topology


def result_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return load_file(file)


def losses_of(run: Path) -> list[float]:
    return [line["loss"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def selected(run: Path) -> list[list[int]]:
    return [line["trained_layers"] for line in read_lines(run / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("name", rules.ARMS)
def test_one_process_ddp_and_fsdp2_select_and_train_the_same(work, topologies, name):
    for topology, seen in topologies.items():
        assert seen[name]["world_size"] == (1 if topology == "one" else 2)
        assert seen[name]["all_dtensors"] == (topology == "fsdp2")
        all_of_it = name in ("all, full", "lisa, full", "id3, full")
        answer = "yes; 3 tensors of no layer or of several always train" if all_of_it else "yes"
        assert seen[name]["rest"] == answer  # what rested, and the base, is bit-equal to what it was
    one = work / "one" / rules.slug(name)
    assert len(selected(one)) == 20
    for topology in ("ddp", "fsdp2"):
        run = work / topology / rules.slug(name)
        assert selected(run) == selected(one)
        losses, expected = (losses_of(r) for r in (run, one))
        assert losses == pytest.approx(expected, abs=1e-4)
        ours, theirs = result_of(run), result_of(one)
        assert ours.keys() == theirs.keys()
        difference = sum((ours[key] - theirs[key]).pow(2).sum() for key in theirs).sqrt()
        assert difference < 1e-3 * sum(theirs[key].pow(2).sum() for key in theirs).sqrt()
        updates = [read_lines(r / "importance.jsonl") for r in (run, one)]
        for ours, theirs in zip(*updates, strict=True):
            assert ours["candidates"] == theirs["candidates"]
            assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-4)
            if name == "ist, expected":
                assert ours["effects"] == pytest.approx(theirs["effects"], abs=1e-6)
                assert ours["standard_errors"] == pytest.approx(theirs["standard_errors"], abs=1e-6)
                assert max(theirs["effects"]) > 1e-5
        learns = {"placebo": 3}.get(name, 4 if "ist" in name.replace(",", "+").split("+") else 0)  # 3: then it anneals
        assert len(updates[0]) == learns
        for key, value in json.loads((one / "run.json").read_text()).get("semantic", {}).items():
            assert json.loads((run / "run.json").read_text())["semantic"][key] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("topology", ["one", "ddp", "fsdp2"])
def test_resume_is_exact(work, topologies, topology):
    for name in rules.RESUMED_ON_ONE if topology == "one" else rules.RESUMED_ON_TWO_RANKS:
        run = work / topology / rules.slug(name)
        resumed = Path(f"{run}-resumed")
        assert losses_of(resumed) == losses_of(run)[rules.HALF :]
        assert selected(resumed) == selected(run)[rules.HALF :]
        ours, theirs = result_of(resumed), result_of(run)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        for key in ("semantic", "trained_counts", "layer_counts"):
            assert json.loads((resumed / "run.json").read_text()).get(key) == json.loads(
                (run / "run.json").read_text()
            ).get(key)


def test_what_each_rule_selects(work, topologies):
    chosen = {name: selected(work / "one" / rules.slug(name)) for name in rules.ARMS}
    assert chosen["fixed"] == [[0, 2]] * 20
    assert chosen["first"] == [[0]] * 20
    assert chosen["last"] == [[2, 3]] * 20
    assert chosen["all, full"] == [[0, 1, 2, 3]] * 20
    assert len({tuple(layers) for layers in chosen["random"]}) > 1
    for name in ("semantic", "semantic+ist", "semantic, full"):
        record = json.loads((work / "one" / rules.slug(name) / "run.json").read_text())
        boundary = record["semantic"]["boundary"]
        assert record["trained_counts"][: boundary + 1] == [0] * (boundary + 1)
        above = list(range(boundary + 1, 4))
        if name == "semantic+ist":
            assert all(len(layers) == 1 and layers[0] in above for layers in chosen[name])
            updates = read_lines(work / "one" / name / "importance.jsonl")
            assert all(update["scores"][: boundary + 1] == [0.0] * (boundary + 1) for update in updates)
            assert max(map(abs, updates[-1]["scores"])) > 0.01
        else:
            assert chosen[name] == [above] * 20
        assert record["layer_counts"]["trained"] == len(chosen[name][0])


def test_the_model_that_is_left_is_stock_transformers(work, topologies):
    for topology in ("one", "fsdp2"):
        folder = work / topology / "lisa-full/model"
        model, base = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(work / "tiny")
        moved = {n for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True) if not p.equal(q)}
        assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < moved
        assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(work / "tiny"))
        assert not (work / topology / "lisa-full/adapter").exists()
        assert "base_model: " in (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(work / "one/random-full/model")
    moved = {n for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True) if not p.equal(q)}
    assert moved
    assert all(".layers." in name for name in moved)


def unmasked_at(run: Path, step: int) -> dict[str, dict[int, int]]:
    """{parameter: {position: step at which it was unmasked}} from the checkpoint after `step` steps."""
    file = load_file(run / f"checkpoints/step_{step:06d}/optimizer.safetensors")
    names = [key.removesuffix("|indices") for key in file if key.endswith("|indices")]
    return {n: dict(zip(file[f"{n}|indices"].tolist(), (step - file[f"{n}|step"]).tolist())) for n in names}


def share_of_same(one: dict[str, dict], two: dict[str, dict]) -> float:
    """The share of scalars that both unmask, at the same step."""
    there = {(name, scalar, step) for name, scalars in one.items() for scalar, step in scalars.items()}
    here = {(name, scalar, step) for name, scalars in two.items() for scalar, step in scalars.items()}
    assert len(there) == len(here) > 0
    return len(there & here) / len(there)


@pytest.mark.parametrize("name", [name for name in rules.ARMS if name.startswith("id3")])
def test_one_process_ddp_and_fsdp2_unmask_the_same(work, topologies, name):
    one = work / "one" / rules.slug(name)
    expected = unmasked_at(one, 20)
    summary = json.loads((one / "run.json").read_text())["id3"]
    assert sum(map(len, expected.values())) == summary["budget"] == summary["unmasked"]
    steps = sorted(step for parameter in expected.values() for step in parameter.values())
    due = [summary["budget"] * min(t, summary["steps"]) // summary["steps"] for t in range(21)]
    assert steps == [t for t in range(20) for _ in range(due[t + 1] - due[t])]
    for topology in ("ddp", "fsdp2"):
        run = work / topology / rules.slug(name)
        for step in (10, 20):
            # Gradients of two topologies differ by rounding, by the processor too: a scalar or two may swap at the cut.
            assert share_of_same(unmasked_at(run, step), unmasked_at(one, step)) >= 0.999
        there = json.loads((run / "run.json").read_text())["id3"]
        assert {**there, "unmasked_by_layer": None} == {**summary, "unmasked_by_layer": None}
        assert there["unmasked_by_layer"] == pytest.approx(summary["unmasked_by_layer"], rel=1e-3)
        for line, other in zip(read_lines(run / "metrics.jsonl"), read_lines(one / "metrics.jsonl"), strict=True):
            if "loss" in line:
                assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    if name == "id3, ties":  # all of B, whose gradients are not zero; then A's from the front, at equal scores of 0
        a = [(n, parameter) for n, parameter in expected.items() if "lora_A" in n]
        assert all(sorted(parameter) == list(range(len(parameter))) for _, parameter in a)
        assert {step for _, parameter in a for step in parameter.values()} == {1}


@pytest.mark.parametrize("name", ["id3", "id3, full"])
def test_a_sharded_checkpoint_in_mid_schedule_resumes_on_one_process(work, topologies, tmp_path, name):
    one, sharded = work / "one" / rules.slug(name), work / "fsdp2" / rules.slug(name)
    rules.train(work, name, tmp_path / "run", 4, resume_from_checkpoint=sharded / "checkpoints/step_000010")
    assert share_of_same(unmasked_at(tmp_path / "run", 20), unmasked_at(one, 20)) >= 0.999  # as above
    losses, expected = (
        [line["loss"] for line in read_lines(r / "metrics.jsonl") if "loss" in line] for r in (tmp_path / "run", one)
    )
    assert losses == pytest.approx(expected[10:], abs=1e-4)
