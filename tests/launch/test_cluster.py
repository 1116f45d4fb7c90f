"""The batch scripts on a real Slurm of two nodes: training, pre-emption, requeueing, arrays, evaluation, sweeps."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT, of_type, offline_records, read_lines
from support.cluster import MISSING, Cluster, until
from support.preemption import distance
from support.sweep_service import SweepService

REQUIRED = "REQUIRE_CLUSTER" in os.environ  # on CI nothing is skipped
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=f"no {', '.join(MISSING)}: apt install slurm-wlm munge"),
    pytest.mark.skipif(os.geteuid() != 0 and not REQUIRED, reason="the daemons of a Slurm run as root"),
]
STEPS = 80


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    running = Cluster(tmp_path_factory.mktemp("slurm"))
    running.environment |= {
        **{"PYTHON": sys.executable, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **{"HF_DATASETS_CACHE": os.environ["HF_DATASETS_CACHE"], "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    }
    running.start()
    yield running
    running.stop()


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny, train_file) -> Path:
    """A copy of the project's folder to submit from, with a recipe `tiny`."""
    folder = tmp_path_factory.mktemp("home")
    for name in ("train_ist.py", "ist", "launch", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    recipe = {
        **{"model_name_or_path": tiny, "train_file": train_file, "report_to": "none", "max_steps": STEPS},
        **{"learning_rate": 5e-3, "warmup_steps": 2, "update_interval": 4, "score_lr": 1000, "lora_dropout": 0.1},
        **{"logging_steps": 1, "save_steps": 20, "save_total_limit": 2, "validation_size": 8, "eval_steps": 25},
        **{"per_device_train_batch_size": 2},
    }
    (folder / "tiny.yaml").write_text("".join(f"{key}: {value}\n" for key, value in recipe.items()))
    return folder


def submit(cluster: Cluster, home: Path, *arguments: object, options: tuple = (), **environment: str) -> str:
    return cluster.submit(*options, "launch/train.sbatch", *arguments, cwd=home, **environment)


def log_of(home: Path, job: str, name: str = "ist") -> str:
    return (home / f"slurm-{name}-{job}.out").read_text()


def until_step(run: Path, step: int) -> None:
    """Wait until a run has logged this step."""
    metrics = run / "metrics.jsonl"
    until(lambda: metrics.exists() and len(read_lines_so_far(metrics)) >= step, f"{run} is at step {step}", 180, 0.05)


def read_lines_so_far(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def record_of(run: Path) -> dict:
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(cluster, home) -> list[Path]:
    """The runs of one process and of two nodes that nothing happens to."""
    jobs = [submit(cluster, home, "tiny.yaml", options=("--nodes", nodes)) for nodes in (1, 2)]
    for job in jobs:
        assert cluster.until_ended(job) == "COMPLETED", log_of(home, job)
    return [home / f"runs/tiny-{job}" for job in jobs]


@pytest.fixture(scope="module")
def one(undisturbed) -> Path:
    return undisturbed[0]


@pytest.fixture(scope="module")
def two(undisturbed) -> Path:
    return undisturbed[1]


def test_two_nodes_train(two):
    record = record_of(two)
    assert (record["status"], record["steps"], record["world_size"]) == ("finished", STEPS, 2)
    losses = [line["loss"] for line in read_lines(two / "metrics.jsonl") if "loss" in line]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 1


def test_near_its_time_limit_a_job_saves_requeues_itself_and_ends_alike(cluster, home, one):
    # `scancel --batch --signal=USR1` is what --signal=B:USR1@300 does, but at this moment.
    job = submit(cluster, home, "tiny.yaml")
    run = home / f"runs/tiny-{job}"
    until_step(run, 10)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until_requeued(job)
    record = record_of(run)
    assert record["status"] == "interrupted"
    assert 10 <= record["steps"] < STEPS
    assert cluster.until_ended(job) == "COMPLETED", log_of(home, job)
    assert cluster.job(job)["Restarts"] == "1"
    assert f"{run.relative_to(home)} was stopped and has saved; requeued (restart 1)" in log_of(home, job)
    assert record_of(run)["resumed_from"].endswith(f"step_{record['steps']:06d}")
    assert distance(run, one) == {"adapter": 0, "loss": 0, "scores": 0}


def test_a_signal_to_two_nodes_and_a_second_one(cluster, home, two):
    job = submit(cluster, home, "tiny.yaml", options=("--nodes", 2))
    run = home / f"runs/tiny-{job}"
    until_step(run, 10)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.until_requeued(job)
    record = record_of(run)
    assert record["status"] == "interrupted"
    assert 10 <= record["steps"] < STEPS
    assert cluster.until_ended(job) == "COMPLETED", log_of(home, job)
    assert record_of(run)["resumed_from"].endswith(f"step_{record['steps']:06d}")
    assert max(distance(run, two).values()) < 1e-5


def test_a_killed_node_fails_the_job_and_a_requeued_one_goes_on(cluster, home, two):
    job = submit(cluster, home, "tiny.yaml", options=("--nodes", 2))
    run = home / f"runs/tiny-{job}"
    until_step(run, 45)
    step = f"SLURM_JOB_ID={job}\0".encode()
    killed = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment, command = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        if step in environment and b"SLURM_NODEID=1\0" in environment and b"train_ist.py" in command:
            killed.append(int(process.name))
    assert len(killed) == 2  # launcher and worker
    for pid in killed:
        os.kill(pid, 9)
    assert cluster.until_ended(job) == "FAILED"
    assert cluster.job(job)["Restarts"] == "0"
    last = log_of(home, job).strip().splitlines()[-1]
    assert f"{run.relative_to(home)} failed: status" in last
    assert f"go on by: scontrol requeue {job}" in last
    cluster.run("scontrol", "requeue", job)
    cluster.until_requeued(job)
    assert cluster.until_ended(job) == "COMPLETED", log_of(home, job)
    assert record_of(run)["resumed_from"].endswith("step_000040")
    assert max(distance(run, two).values()) < 1e-5


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, home):
    job = submit(cluster, home, "tiny.yaml")
    run = home / f"runs/tiny-{job}"
    until_step(run, 5)
    cluster.run("scancel", job)
    assert cluster.until_ended(job) == "CANCELLED"
    until(lambda: record_of(run)["status"] == "interrupted", "the run has saved", 20)
    assert cluster.job(job)["Restarts"] == "0"


def test_an_array_of_seeds_of_which_one_is_requeued(cluster, home, one):
    job = submit(cluster, home, "tiny.yaml", options=("--array", "41-43"))
    runs = [home / f"runs/tiny-{job}_{seed}" for seed in (41, 42, 43)]
    until_step(runs[2], 10)
    assert cluster.job(f"{job}_43")["JobId"] == job  # the last task has the number of the whole array
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_43")
    cluster.until_requeued(f"{job}_43")
    for seed in (41, 42, 43):
        assert cluster.until_ended(f"{job}_{seed}") == "COMPLETED"
        assert cluster.job(f"{job}_{seed}")["Restarts"] == ("1" if seed == 43 else "0")
    assert [record_of(run)["configuration"]["seed"] for run in runs] == [41, 42, 43]
    assert [record_of(run)["status"] for run in runs] == ["finished"] * 3
    assert distance(runs[1], one) == {"adapter": 0, "loss": 0, "scores": 0}  # 42 is the default
    assert all(distance(run, one)["adapter"] > 0 for run in (runs[0], runs[2]))


def test_arms_finished_runs_and_bad_input(cluster, home, one):
    finished = one.name.removeprefix("tiny-")
    before = (one / "run.json").read_bytes()
    cluster.run("scontrol", "requeue", finished)
    bad = submit(cluster, home, "tiny.yaml", "--lora_r", "0")
    same = submit(cluster, home, "tiny.yaml", "--output_dir", "runs/same", options=("--array", "0"))
    vary = ("--vary", "selection=all,random", "tiny.yaml", "--max_steps", "5", "--output_dir", "runs/arm-{run_id}")
    arms = submit(cluster, home, *vary, options=("--array", "0-1"))
    for task, arm in enumerate(("all", "random")):
        assert cluster.until_ended(f"{arms}_{task}") == "COMPLETED"
        assert record_of(home / f"runs/arm-{arms}_{task}")["configuration"]["selection"] == arm
    assert cluster.until_ended(f"{same}_0") == "FAILED"
    assert "runs/same is the same for all tasks of the array" in log_of(home, same)
    assert cluster.until_ended(bad) == "FAILED"
    assert cluster.job(bad)["Restarts"] == "0"
    assert "error: --lora_r must be 1 or more; got 0." in log_of(home, bad)
    assert "failed: status none" in log_of(home, bad).strip().splitlines()[-1]
    cluster.until_requeued(finished)
    assert cluster.until_ended(finished) == "COMPLETED"
    assert "finished; nothing to do" in log_of(home, finished)
    assert (one / "run.json").read_bytes() == before


def test_an_evaluation_is_stopped_and_goes_on(cluster, home, one, rows):
    (home / "asked.json").write_text(json.dumps(rows))
    run = one.name.replace("tiny-1", "tiny-%a")
    flags = ("--test_file", "asked.json", "--num_beams", "1", "--max_new_tokens", "16", "--batch_size", "1")
    job = cluster.submit("--array", "1", "--nodes", "2", "launch/evaluate.sbatch", f"runs/{run}", *flags, cwd=home)
    results = home / f"results/{one.name}"

    def scored() -> list[dict]:
        return [line for shard in results.glob(".asked.*.jsonl") for line in read_lines_so_far(shard)]

    until(lambda: len(scored()) > 3, "the first answers", 120, 0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    cluster.until_requeued(f"{job}_1")
    first = scored()
    assert 3 < len(first) < 60
    assert cluster.until_ended(f"{job}_1") == "COMPLETED", log_of(home, job, "ist-evaluate")
    lines = read_lines(results / "asked.jsonl")
    assert [line["row"] for line in lines] == list(range(60))
    # Nothing is said where the last rows were still answered before the job ended.
    kept = set(re.findall(r"asked: going on after (\d+) of 60 rows", log_of(home, job, "ist-evaluate")))
    assert all(int(count) >= len(first) for count in kept)
    assert all(line in lines for line in first)
    assert json.loads((results / "summary.json").read_text())["tasks"]["asked"]["rows"] == 60


def test_a_run_of_a_sweep_is_stopped_and_goes_on_under_its_own_id(cluster, home):
    sweep = yaml.safe_load((ROOT / "launch/sweep.yaml").read_text())
    sweep["parameters"] |= {
        "config": {"value": "tiny.yaml"},
        "report_to": {"value": "wandb"},
        "eval_steps": {"value": 5},
    }
    service = SweepService(sweep, "swept")
    run = home / "runs/tiny-swept"
    options = ("--array", "1", "--gpus-per-node", "2")
    job = cluster.submit(*options, "launch/sweep.sbatch", "team/ist/search", cwd=home, **service.environment) + "_1"
    until_step(run, 10)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until_requeued(job)
    stopped = record_of(run)
    assert (stopped["status"], stopped["signal"], stopped["world_size"]) == ("interrupted", "SIGUSR1", 2)
    assert cluster.until_ended(job) == "COMPLETED", log_of(home, job, "ist-sweep")
    service.stop()
    assert (service.agents, service.handed_out) == (2, 2)
    record = record_of(run)
    assert (record["status"], record["slurm_job"]) == ("finished", job.removesuffix("_1"))
    assert record["resumed_from"].endswith(f"step_{stopped['steps']:06d}")
    assert record["configuration"]["score_lr"] == stopped["configuration"]["score_lr"] != 1000
    first, second = offline_records(run)
    for part in (first, second):
        (started,) = of_type(part, "run")
        assert (started["run_id"], started["sweep_id"]) == ("swept", "search")
    assert of_type(first, "preempting")
    losses = [row["item"] for part in (first, second) for row in of_type(part, "history")]
    losses = {item["_step"]: item["eval/loss"] for item in losses if "eval/loss" in item}
    lines = read_lines(run / "metrics.jsonl")
    assert losses == {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
