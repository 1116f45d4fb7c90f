"""Moments of resting layers; layers compiled one by one."""

import pytest
import torch
from safetensors.torch import load_file
from support import read_lines

from ist.training import extensions
from ist.training.command_line import UsageError
from ist.training.packages import release

NEEDS_COMPILER = pytest.mark.skipif(release(torch.__version__) < (2, 13), reason="torch_compile needs torch 2.13")


def adapter(run):
    return load_file(run / "adapter/adapter_model.safetensors")


def moments(run, step):
    names = load_file(run / f"checkpoints/step_{step:06d}/optimizer.safetensors").keys()
    return {int(name.split(".layers.")[1].split(".")[0]) for name in names}


def test_offloaded_moments_train_as_kept_ones(train, tmp_path):
    options = {"selection": "random", "trained_layers": 2, "save_steps": 10}
    assert train(output_dir=tmp_path / "keep", **options) == 0
    assert train(output_dir=tmp_path / "offload", optimizer_state="offload", **options) == 0
    one, two = adapter(tmp_path / "keep"), adapter(tmp_path / "offload")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert moments(tmp_path / "offload", 10) == moments(tmp_path / "keep", 10) == {0, 1, 2, 3}
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": tmp_path / "offload/checkpoints/step_000010"}
    assert train(**again, optimizer_state="offload", **options) == 0
    three = adapter(tmp_path / "again")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_moments_are_on_the_cpu_or_gone_while_a_layer_rests(train, tmp_path, monkeypatch):
    seen = []

    class Watched(extensions.RestingState):
        def switch(self, trained):
            super().switch(trained)
            with_state = {
                i for i, ps in enumerate(self.layers.parameters) if any(p in self.optimizer.state for p in ps)
            }
            seen.append((set(trained), with_state, set(self._away)))

    monkeypatch.setattr(extensions, "RestingState", Watched)
    for policy in ("drop", "offload"):
        seen.clear()
        assert train(selection="random", optimizer_state=policy, output_dir=tmp_path / policy) == 0
        trained_before: set[int] = set()
        for trained, with_state, away in seen:
            assert with_state == trained & trained_before if policy == "offload" else with_state <= trained
            assert away == (trained_before - trained if policy == "offload" else set())
            trained_before |= trained
        assert trained_before == {0, 1, 2, 3}


def test_dropped_moments_start_anew(train, tmp_path):
    options = {"selection": "lisa", "lisa_interval": 3, "trained_layers": 1, "lora_dropout": 0, "save_steps": 5}
    assert train(output_dir=tmp_path / "drop", optimizer_state="drop", **options) == 0
    assert train(output_dir=tmp_path / "keep", **options) == 0
    drawn = [line["trained_layers"] for line in read_lines(tmp_path / "drop/metrics.jsonl")]
    assert drawn == [line["trained_layers"] for line in read_lines(tmp_path / "keep/metrics.jsonl")]
    for step in (5, 10, 15, 20):
        assert moments(tmp_path / "drop", step) == set(drawn[step - 1])
    counts = load_file(tmp_path / "drop/checkpoints/step_000020/optimizer.safetensors")
    since = next(n for n in range(1, 20) if drawn[-n - 1] != drawn[-1])
    assert {int(value) for name, value in counts.items() if name.endswith("|step")} == {since}
    one, two = adapter(tmp_path / "drop"), adapter(tmp_path / "keep")
    assert not all(torch.equal(one[name], two[name]) for name in one)
    again = {"output_dir": tmp_path / "again", "resume_from_checkpoint": tmp_path / "drop/checkpoints/step_000010"}
    assert train(**again, optimizer_state="drop", **options) == 0
    three = adapter(tmp_path / "again")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_fused_adamw_is_adamw(train, tmp_path):
    for optim in ("adamw_torch", "adamw_torch_fused"):
        assert train(output_dir=tmp_path / optim, optim=optim, weight_decay=0.01) == 0
    one, two = adapter(tmp_path / "adamw_torch"), adapter(tmp_path / "adamw_torch_fused")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_compiled_layers_have_four_graphs_at_most_and_probes_are_seen(train, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    options = {"score_lr": 1000, "lora_dropout": 0, "max_steps": 30, "validation_size": 5, "trained_layers": 2}
    assert train(output_dir=tmp_path / "eager", **options) == 0
    torch._dynamo.reset()
    counters.clear()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    assert train(output_dir=tmp_path / "compiled", **compiled, **options) == 0
    assert 2 <= counters["stats"]["unique_graphs"] <= 4  # of all layers together: their code is the same
    assert not counters["graph_break"]
    lines, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("compiled", "eager"))
    assert len({tuple(line["trained_layers"]) for line in lines if "loss" in line}) > 3
    for one, two in zip(lines, expected, strict=True):
        key = "loss" if "loss" in one else "validation_loss"
        assert one[key] == pytest.approx(two[key], abs=1e-4)
    updates, expected = (read_lines(tmp_path / name / "importance.jsonl") for name in ("compiled", "eager"))
    for one, two in zip(updates, expected, strict=True):
        assert one["losses"] == pytest.approx(two["losses"], abs=1e-4)
        assert len(set(one["losses"])) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer_state": "offload", "optim": "adamw_8bit"}, "--optimizer_state offload cannot move the state of"),
        ({"optimizer_state": "drop", "optim": "paged_adamw_8bit"}, "--optimizer_state drop cannot free the pages of"),
        pytest.param(
            *(
                {"torch_compile": True, "torch_compile_backend": "x"},
                "--torch_compile_backend must be one of .*; got x",
            ),
            marks=NEEDS_COMPILER,
        ),
        pytest.param(
            {"torch_compile": True, "gradient_checkpointing": True},
            "--torch_compile true cannot be had with",
            marks=NEEDS_COMPILER,
        ),
    ],
)
def test_bad_input(train, options, message):
    with pytest.raises(UsageError, match=message):
        train(**options)
