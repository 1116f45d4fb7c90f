"""One process, DDP and FSDP2 train the same model: real launches on gloo ranks, with the configs that ship."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from support import ROOT, read_lines, warm_python

from ist.config import ConfigError
from ist.distributed import require_topology
from ist.training.command_line import UsageError
from ist.training.environment import differing_nodes, require_replicas
from ist.training.packages import release

STEPS = 30
CONFIGS = {"one": "single.yaml", "ddp": "ddp.yaml", "fsdp": "fsdp2.yaml", "hsdp": "hsdp.yaml"}
HAS_HSDP = release(accelerate.__version__) >= (1, 15)
needs_hsdp = pytest.mark.skipif(not HAS_HSDP, reason="HSDP needs accelerate 1.15")
HSDP = pytest.param("hsdp", marks=needs_hsdp)
if not HAS_HSDP:
    del CONFIGS["hsdp"]
ROWS = {"one": 4, "ddp": 2, "fsdp": 2, "hsdp": 1}  # per rank, for the same global batch of 4


two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks on GPUs need two GPUs"),
]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=two_gpus)])
def device(request) -> str:
    """The same tests on gloo ranks on CPU and, where there are two, on GPUs."""
    return request.param


def launch(
    config: str,
    flags: list[str],
    spy_dir: Path,
    topology: tuple[str, ...] = (),
    device: str = "cpu",
    **environment: str,
) -> subprocess.CompletedProcess:
    """`accelerate launch` as the README has it; `topology` overrides lines of the config."""
    spy_dir.mkdir(parents=True, exist_ok=True)
    environment["PYTHON_EXEC"] = warm_python()  # torchrun's, for the ranks
    command = [warm_python(), "-m", "accelerate.commands.launch"]
    command += ["--config_file", f"accelerate_configs/{config}", "--main_process_port", "0", *topology]
    return subprocess.run(
        [*command, "tests/support/spy.py", "train_ist.py", *flags],
        env={**os.environ, "ACCELERATE_USE_CPU": str(device == "cpu"), "SPY_DIR": str(spy_dir), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def flags_of(tiny: Path, train_file: Path, run: Path, rows: int, **overrides) -> list[str]:
    values = {
        **{"model_name_or_path": tiny, "train_file": train_file, "output_dir": run, "report_to": "none"},
        **{"max_steps": STEPS, "update_interval": 5, "score_lr": 1000, "lora_dropout": 0, "trained_layers": 1},
        **{"learning_rate": 5e-3, "warmup_steps": 2, "logging_steps": 1, "save_steps": 3, "lora_r": 8},
        **{"validation_size": 7, "eval_steps": 10, "per_device_train_batch_size": rows, **overrides},
    }
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", str(value))]


@pytest.fixture(scope="session")
def runs(tiny, train_file, tmp_path_factory, device) -> dict[str, Path]:
    """The same 30 steps, and a checkpoint every third of them, on each topology; two micro-batches on two ranks.

    HSDP is on four: two replicas of two shards.
    """
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        rows, accumulation = {"one": (4, 1), "hsdp": (1, 1)}.get(name, (1, 2))
        flags = flags_of(tiny, train_file, folders[name] / "run", rows, gradient_accumulation_steps=accumulation)
        result = launch(config, flags, folders[name], device=device)
        assert result.returncode == 0, result.stderr[-3000:]
    return folders


def spied(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def adapter_of(run: Path) -> torch.Tensor:
    tensors = load_file(run / "adapter/adapter_model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def assert_same_course(run: Path, reference: Path, after: int = 0) -> None:
    """Draws and candidates equal, scores, losses, gradient norms and adapter within rounding."""
    for one, two in zip(read_lines(run / "metrics.jsonl"), read_lines(reference / "metrics.jsonl"), strict=True):
        assert one["step"] == two["step"]
        if "loss" in one:
            assert one["trained_layers"] == two["trained_layers"]
            assert one["tokens"] == two["tokens"]
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
            assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
        else:
            assert one["validation_loss"] == pytest.approx(two["validation_loss"], abs=1e-5)
    updates, expected = (read_lines(path / "importance.jsonl") for path in (run, reference))
    assert [update["step"] for update in updates] == [5, 10, 15, 20, 25]
    for one, two in zip(updates, expected, strict=True):
        assert one["candidates"] == two["candidates"]
        spread = max(two["scores"]) - min(two["scores"])
        assert one["scores"] == pytest.approx(two["scores"], abs=1e-3 * spread)
    assert spread > 0.1
    difference = adapter_of(run) - adapter_of(reference)
    assert difference.norm() < 1e-3 * adapter_of(reference).norm()


def test_each_launch_has_its_topology(runs):
    expected = {
        "one": ("NO", 1, [1, 1]),
        "ddp": ("MULTI_CPU", 2, [2, 1]),
        "fsdp": ("FSDP", 2, [1, 2]),
        "hsdp": ("FSDP", 4, [2, 2]),
    }
    for name in CONFIGS:
        kind, world_size, mesh = expected[name]
        record = json.loads((runs[name] / "run/run.json").read_text())
        assert record["distributed_type"] in (kind, kind.replace("CPU", "GPU"))
        assert record["world_size"] == world_size == len(spied(runs[name]))
        topology = record["topology"]
        assert [topology["replicas"], topology["shards"]] == mesh
        assert [node["ranks"] for node in record["nodes"]] == [world_size]
        assert record["nodes"][0]["versions"] == record["versions"]
        for rank, seen in enumerate(spied(runs[name])):
            assert seen["mesh"] == {"fsdp": [2], "hsdp": [2, 2]}.get(name)
            assert seen["all_dtensors"] == (seen["mesh"] is not None)
            assert seen["loaded"] == (rank == 0 or not seen["all_dtensors"])  # sharded, rank 0 alone reads the weights
        if world_size > 1:
            assert record["replica_checksum"]["step"] == STEPS


@pytest.mark.parametrize("name", ["ddp", "fsdp", HSDP])
def test_ranks_train_as_one_process(runs, name):
    assert_same_course(runs[name] / "run", runs["one"] / "run")


@pytest.mark.parametrize("name", ["ddp", "fsdp", HSDP])
def test_ranks_hold_the_same_scores_bit_for_bit(runs, name):
    first, *others = spied(runs[name])
    for other in others:
        assert first["scores"] == other["scores"] != [0.0] * 4
        assert first["trained_counts"] == other["trained_counts"]


@pytest.mark.parametrize("name", ["ddp", "fsdp", HSDP])
def test_gradients_of_trained_layers_travel_and_no_others(runs, name):
    adapter_bytes = 4 * adapter_of(runs[name] / "run").numel()
    for seen in spied(runs[name]):
        assert len(seen["travelled"]) == STEPS
        for step in seen["travelled"]:
            sums = [collective for collective in sorted(step) if collective.startswith("reduce_scatter")]
            sums += ["all_reduce"] * (name != "fsdp")
            assert sorted(step) == sorted(sums)
            assert len(sums) == (2 if name == "hsdp" else 1)
            # One layer of four. Of each, a rank sums its share over the replicas.
            shares = {"all_reduce": 2 if name == "hsdp" else 1}
            for collective in sums:
                expected = adapter_bytes / 4 / shares.get(collective, 1)
                assert step[collective] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    # After 3 steps of one layer each some layer was never trained: it has no moments. 18 lies between two updates.
    ("source", "target", "step"),
    [
        *[("fsdp", "one", 3), ("fsdp", "ddp", 18), ("one", "fsdp", 18), ("ddp", "fsdp", 3)],
        *(pytest.param(*topologies, 18, marks=needs_hsdp) for topologies in (("hsdp", "ddp"), ("ddp", "hsdp"))),
    ],
)
def test_resume_on_another_topology(runs, device, tiny, train_file, tmp_path, source, target, step):
    config, rows = CONFIGS[target], ROWS[target]
    checkpoint = runs[source] / f"run/checkpoints/step_{step:06d}"
    if step == 3:
        assert 0 in json.loads((checkpoint / "checkpoint.json").read_text())["tuner"]["trained_counts"]
    options = {"resume_from_checkpoint": checkpoint, "save_steps": 100}
    flags = flags_of(tiny, train_file, tmp_path / "run", rows, **options)
    result = launch(config, flags, tmp_path, device=device, SPY_BLIND="1")
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_lines(tmp_path / "run/metrics.jsonl")
    whole = [line for line in read_lines(runs["one"] / "run/metrics.jsonl") if line["step"] > step]
    assert [line["step"] for line in metrics] == [line["step"] for line in whole]
    for one, two in zip(metrics, whole, strict=True):
        key = "loss" if "loss" in one else "validation_loss"
        assert one[key] == pytest.approx(two[key], abs=1e-5)
    difference = adapter_of(tmp_path / "run") - adapter_of(runs["one"] / "run")
    assert difference.norm() < 1e-3 * adapter_of(runs["one"] / "run").norm()


def test_a_rank_that_draws_differently_is_caught(tiny, train_file, tmp_path):
    result = launch("ddp.yaml", flags_of(tiny, train_file, tmp_path / "run", 2), tmp_path, SPY_REBEL="12")
    assert result.returncode != 0
    assert "ranks disagree on the layers of step 10" in result.stderr
    assert "rank 0:" in result.stderr
    assert "rank 1:" in result.stderr
    steps = [line["step"] for line in read_lines(tmp_path / "run/metrics.jsonl")]
    assert max(steps) == 10  # the plan of steps 10 to 14 was compared before any of it was used
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_begin_with_the_weights_of_rank_0(runs, tiny, train_file, tmp_path, name):
    flags = flags_of(tiny, train_file, tmp_path / "run", 1, gradient_accumulation_steps=2)
    result = launch(CONFIGS[name], flags, tmp_path, SPY_SEED="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert torch.equal(adapter_of(tmp_path / "run"), adapter_of(runs[name] / "run"))


def test_replicas_that_part_are_not_saved(tiny, train_file, tmp_path):
    result = launch("ddp.yaml", flags_of(tiny, train_file, tmp_path / "run", 2), tmp_path, SPY_PART="4")
    assert result.returncode != 0
    assert "ranks disagree on the weights after step 6 (rank 0: " in result.stderr
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000003"]


def test_an_error_of_another_rank_is_printed_and_ends_the_launch(tiny, train_file, tmp_path):
    start = time.monotonic()
    result = launch("ddp.yaml", flags_of(tiny, train_file, tmp_path / "run", 2), tmp_path, SPY_FAIL="4")
    assert result.returncode != 0
    assert "MemoryError: rank 1 has no memory left" in result.stderr
    assert time.monotonic() - start < 100  # not the time limit of a collective


def test_long_tokenising_meets_no_time_limit_and_rank_0_alone_looks_for_a_checkpoint(tiny, train_file, tmp_path):
    flags = flags_of(tiny, train_file, tmp_path / "run", 2, ddp_timeout=8, max_steps=3, resume_from_checkpoint="auto")
    result = launch("ddp.yaml", flags, tmp_path, SPY_SLOW="16")
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"data{rank}.json").read_text()) for rank in (0, 1))
    assert second[0] >= first[1] - 0.1  # after rank 0, which has made the cache
    assert [path.name for path in tmp_path.glob("looked*")] == ["looked0"]


def test_fsdp_reduces_gradients_in_float32(device, tiny, train_file, tmp_path):
    options = {"bf16": True, "max_steps": 2, "validation_size": None, "eval_steps": None}
    result = launch(CONFIGS["fsdp"], flags_of(tiny, train_file, tmp_path / "run", 2, **options), tmp_path, (), device)
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in spied(tmp_path):
        assert rank["all_dtensors"]
        assert {name.split()[-1] for name in rank["dtypes"] if "reduce_scatter" in name} == {"torch.float32"}


@pytest.mark.parametrize(
    ("key", "why"), [("cp_size", "not supported"), ("tp_size", "not supported"), ("dp_replicate_size", "for FSDP")]
)
def test_parallelism_of_the_launcher_is_refused(key, why):
    accelerator = SimpleNamespace(parallelism_config=SimpleNamespace(**{key: 2}), distributed_type=DistributedType.NO)
    with pytest.raises(ConfigError, match=f"{key} 2 of the launcher's parallelism is {why}"):
        require_topology(accelerator)


def test_the_best_checkpoint_is_loaded_by_the_main_process_alone(tiny, train_file, tmp_path):
    options = {"max_steps": 6, "eval_steps": 3, "load_best_model_at_end": True}
    result = launch("ddp.yaml", flags_of(tiny, train_file, tmp_path / "run", 2, **options), tmp_path, SPY_BLIND="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads((tmp_path / "run/run.json").read_text())["best"]["step"] in (3, 6)


def test_a_node_of_other_versions_is_named():
    node = {"host": "a", "ranks": 8, "versions": {"torch": "2.13.0", "peft": "0.21.2"}, "commit": "1", "hardware": {}}
    other = {**node, "host": "b", "versions": {**node["versions"], "torch": "2.12.0"}}
    assert differing_nodes([node, {**node, "host": "c"}]) == []
    warning = "warning: node b has torch 2.12.0 (not 2.13.0): results may differ between nodes."
    assert differing_nodes([node, other]) == [warning]


def test_replicas_of_shards_need_a_newer_accelerate(monkeypatch):
    config = SimpleNamespace(dp_replicate_size=2)
    accelerator = SimpleNamespace(parallelism_config=config, distributed_type=DistributedType.FSDP, num_processes=4)
    monkeypatch.setattr(accelerate, "__version__", "1.15.0")
    require_replicas(accelerator)
    monkeypatch.setattr(accelerate, "__version__", "1.14.2")
    with pytest.raises(UsageError, match=r"dp_replicate_size 2 needs accelerate 1.15 or newer; 1.14.2"):
        require_replicas(accelerator)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_others_and_resume_reaches_the_same_end(runs, device, tiny, train_file, tmp_path, name):
    config, rows = CONFIGS[name], ROWS[name]
    flags = flags_of(tiny, train_file, tmp_path / "run", rows)
    result = launch(config, flags, tmp_path, device=device, SPY_KILL="16")
    assert result.returncode != 0
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())[-1] == "step_000015"
    result = launch(config, [*flags, "--resume_from_checkpoint", "auto"], tmp_path, device=device)
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_course(tmp_path / "run", runs[name] / "run")


def test_bad_data_is_one_line_from_rank_0(tiny, tmp_path):
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": ""}]')
    result = launch("ddp.yaml", flags_of(tiny, tmp_path / "rows.json", tmp_path / "run", 2, validation_size=None,
                                         eval_steps=None), tmp_path)  # fmt: skip
    assert result.returncode != 0
    assert result.stderr.count("rows.json: row 0 has no answer") == 1
    assert not re.search(r"\[rank\d\]:", result.stderr)  # no rank died with a traceback of its own


def test_fsdp_that_is_not_on_stops_the_run(tiny, train_file, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/fsdp2.yaml"]
    flags = flags_of(tiny, train_file, tmp_path / "run", 2)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(
        [*command, "train_ist.py", *flags], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert "error: FSDP was asked for, but Accelerate runs" in result.stderr
    assert result.stderr.count("error: FSDP was asked for") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bf16_fsdp_with_layers_frozen_from_the_first_step(device, tiny, train_file, tmp_path):
    losses = {}
    for name in ("ddp", "fsdp"):
        options = {"bf16": True, "dtype": "bfloat16", "validation_size": 0, "eval_steps": None, "save_steps": None}
        flags = flags_of(tiny, train_file, tmp_path / name, 2, **options)
        result = launch(CONFIGS[name], flags, tmp_path / f"spy-{name}", device=device)
        assert result.returncode == 0, result.stderr[-3000:]
        metrics = read_lines(tmp_path / name / "metrics.jsonl")
        assert len(metrics[0]["trained_layers"]) == 1  # the others were frozen at the first step
        assert all(count for count in spied(tmp_path / f"spy-{name}")[0]["trained_counts"])
        losses[name] = [line["loss"] for line in metrics]
    assert all(seen["all_dtensors"] for seen in spied(tmp_path / "spy-fsdp"))
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=0.01)
    assert losses["fsdp"][-1] < losses["fsdp"][0]


def test_another_number_of_ranks_cuts_the_same_global_batch(runs, tiny, train_file, tmp_path):
    from support import reset_accelerate

    import train_ist

    checkpoint = runs["ddp"] / "run/checkpoints/step_000018"
    reset_accelerate()
    flags = flags_of(tiny, train_file, tmp_path / "run", 2, resume_from_checkpoint=checkpoint)
    assert train_ist.main(flags) == 0  # 2 ranks x 2 rows become 1 rank x 2 rows x 2 micro-batches
    reset_accelerate()
    with pytest.raises(UsageError, match="the run to resume 4 is not whole micro-batches"):
        train_ist.main(flags_of(tiny, train_file, tmp_path / "new", 3, resume_from_checkpoint=checkpoint))


@pytest.mark.slow
def test_qlora_on_two_ranks_trains_saves_and_resumes(device, tiny, train_file, tmp_path):
    courses = {}
    for name in ("ddp", "fsdp2"):
        options = {"load_in_4bit": True, "max_steps": 12, "save_steps": 6, "eval_steps": 6}
        flags = flags_of(tiny, train_file, tmp_path / name, 2, **options)
        result = launch(f"{name}.yaml", flags, tmp_path / f"spy-{name}", device=device)
        assert result.returncode == 0, result.stderr[-3000:]
        assert all(seen["linear_4bit"] == 4 * 7 for seen in spied(tmp_path / f"spy-{name}"))
        courses[name] = [line["loss"] for line in read_lines(tmp_path / name / "metrics.jsonl") if "loss" in line]
    assert all(seen["all_dtensors"] for seen in spied(tmp_path / "spy-fsdp2"))
    assert courses["ddp"] == pytest.approx(courses["fsdp2"], abs=1e-5)
    assert courses["ddp"][-1] < courses["ddp"][0]
    again = flags_of(tiny, train_file, tmp_path / "again", 2, **options)
    checkpoint = tmp_path / "ddp/checkpoints/step_000006"
    result = launch(
        "ddp.yaml", [*again, "--resume_from_checkpoint", str(checkpoint)], tmp_path / "spy-again", device=device
    )
    assert result.returncode == 0, result.stderr[-3000:]
    difference = adapter_of(tmp_path / "again") - adapter_of(tmp_path / "ddp")
    assert difference.norm() < 1e-6 * adapter_of(tmp_path / "ddp").norm()


@pytest.mark.slow
def test_every_rank_loads_the_weights_and_layers_are_recomputed(runs, device, tiny, train_file, tmp_path):
    flags = flags_of(tiny, train_file, tmp_path / "run", 2, gradient_checkpointing=True)
    result = launch("fsdp2.yaml", flags, tmp_path, ("--fsdp_cpu_ram_efficient_loading", "false"), device)
    assert result.returncode == 0, result.stderr[-3000:]
    assert all(seen["loaded"] for seen in spied(tmp_path))
    assert_same_course(tmp_path / "run", runs["fsdp"] / "run")


FSDP1 = ("--fsdp_version", "1", "--fsdp_reshard_after_forward", "FULL_SHARD")


@pytest.mark.parametrize(
    ("topology", "options", "message"),
    [
        (FSDP1, {}, "fsdp_version 1 cannot train a different set of layers at each step: launch with"),
        ((), {"optim": "adamw_8bit"}, "--optim adamw_8bit cannot update sharded parameters"),
        (("--fsdp_offload_params", "true"), {}, "fsdp_offload_params is not supported"),
    ],
    ids=["fsdp1", "8bit", "offload"],
)
def test_what_cannot_be_served_is_refused(tiny, train_file, tmp_path, topology, options, message):
    result = launch("fsdp2.yaml", flags_of(tiny, train_file, tmp_path / "run", 2, **options), tmp_path, topology)
    assert result.returncode != 0
    assert result.stderr.count(f"error: {message}") == 1
    assert not (tmp_path / "run").exists()


def test_deepspeed_is_refused(train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match=r"DeepSpeed cannot train.*accelerate_configs/fsdp2.yaml"):
        train()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_nodes(runs, tiny, train_file, tmp_path, two_hosts, kind):
    prefixes, address, interface = two_hosts
    flags = flags_of(tiny, train_file, tmp_path / "run", 2)
    agents = []
    for node, prefix in enumerate(prefixes):
        command = [*prefix, sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", f"accelerate_configs/multi_node_{kind}.yaml", "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", str(node), "--main_process_ip", address]
        command += ["tests/support/spy.py", "train_ist.py", *flags]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "SPY_DIR": str(tmp_path)}
        environment["GLOO_SOCKET_IFNAME"] = interface
        with open(tmp_path / f"node{node}.log", "w") as log:
            agents.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
    codes = [agent.wait(timeout=300) for agent in agents]
    assert codes == [0, 0], (tmp_path / "node0.log").read_text()[-3000:]
    assert json.loads((tmp_path / "run/run.json").read_text())["world_size"] == 2
    assert_same_course(tmp_path / "run", runs["fsdp" if kind == "fsdp2" else "ddp"] / "run")
