"""What trackers and the picture get: read back from their own files, not from our calls."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import psutil
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from support import ROOT, of_type, offline_records, read_lines
from support.cluster import until

from ist.report.compare import compare, main, read_results
from ist.training.command_line import UsageError
from ist.training.packages import release
from ist.training.record import draw_importance


def test_offline_wandb_holds_every_number(arguments, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = arguments(report_to="wandb", run_name="trial", validation_size=8, eval_steps=10, max_steps=10)
    subprocess.run([sys.executable, str(ROOT / "train_ist.py"), *options], check=True, cwd=ROOT, timeout=240)
    *_, offline = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(offline), "--summary", "--json"]
    inspected = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    summary, config = inspected["summary"], inspected["config"]
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    for key in ("loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "peak_memory_bytes"):
        assert summary[f"train/{key}"] == lines[-2][key]
    assert summary["train/step_seconds"] == lines[-2]["step_seconds"]
    assert summary["eval/loss"] == lines[-1]["validation_loss"]
    update = read_lines(tmp_path / "run/importance.jsonl")[-1]
    assert not [key for key in summary if "/layer_" in key]
    (table,) = offline.parent.glob("files/media/table/importance/layers_8_*.table.json")
    table = json.loads(table.read_text())
    assert table["columns"] == ["layer", "score", "probability", "steps trained"]
    layers, scores, probabilities, counts = zip(*table["data"], strict=True)
    assert (list(layers), list(scores), list(probabilities)) == (
        [0, 1, 2, 3],
        update["scores"],
        update["probabilities"],
    )
    assert sum(counts) == 9  # 8 steps before the update, and the one it precedes
    assert sum(summary["importance/scores"]["values"]) == 4  # layers in the histogram
    assert summary["importance/effective_layers"] == pytest.approx(update["effective_layers"])
    for j in range(3):
        assert summary[f"probe/loss_{j}"] == pytest.approx(update["losses"][j])
        assert summary[f"probe/reward_{j}"] == pytest.approx(update["rewards"][j])
    assert 0 < summary["probe/time_share"] < 1
    assert len(list(offline.parent.glob("files/media/images/importance/heat_map_*.png"))) == 2
    assert config["lora_r"]["value"] == 4 if isinstance(config["lora_r"], dict) else config["lora_r"] == 4


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=["USR1", "TERM"])
def test_a_resumed_run_is_one_curve_and_has_every_key_of_the_readme(arguments, tmp_path, monkeypatch, number):
    """Interrupted as on a cluster: the signal goes to every process, W&B's service included. SIGUSR1 does not harm
    it; SIGTERM ends it, and all that it had not written yet is lost."""
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_JOB_TYPE": "trial"}.items():
        monkeypatch.setenv(key, value)
    options = {"selection": "semantic+ist", "validation_size": 8, "eval_steps": 10, "max_steps": 30}
    flags = arguments(
        report_to="wandb", run_name="many", log_adapter=True, log_layers=True, resume_from_checkpoint="auto", **options
    )
    command, metrics = [sys.executable, str(ROOT / "train_ist.py"), *flags], tmp_path / "run/metrics.jsonl"
    if number == signal.SIGTERM and release(accelerate.__version__) < (1, 15):
        pytest.skip("what the service lost cannot be told from the first of two starts of W&B by older Accelerates")
    process = subprocess.Popen(command, cwd=ROOT)
    until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 5, "the run trains", 120, 0.02)
    for each in [*(tree := psutil.Process(process.pid)).children(recursive=True), tree]:
        each.send_signal(number)
    assert process.wait(timeout=60) == 3
    subprocess.run(command, check=True, cwd=ROOT, timeout=240)
    first, second = offline_records(tmp_path / "run")
    assert of_type(first, "exit") or number == signal.SIGTERM  # which the service may outlive by its last write
    run = json.loads((tmp_path / "run/run.json").read_text())
    rows: dict[int, dict] = {}
    for record, code in ((first, 3), (second, 0)) if of_type(first, "exit") else ((second, 0),):
        (started,), (ended,) = of_type(record, "run"), of_type(record, "exit")
        assert started["run_id"] == run["wandb_run_id"]
        assert (started["run_group"], started["job_type"], started["display_name"]) == ("many", "trial", "many")
        assert ended.get("exit_code", 0) == code
        for row in of_type(record, "history"):
            rows.setdefault(row["item"]["_step"], {}).update(row["item"])
    losses = {step: row["train/loss"] for step, row in rows.items() if "train/loss" in row}
    assert losses == {line["step"]: line["loss"] for line in read_lines(metrics) if "loss" in line}
    assert set(losses) == set(range(1, 31))
    paragraph = next(
        part for part in (ROOT / "launch/README.md").read_text().split("\n\n") if part.startswith("W&B and Tensor")
    )
    listed = re.findall(r"`((?:train|eval|importance|probe|semantic)/\S+)`", paragraph)
    logged = {key for row in rows.values() for key in row}
    logged = {re.sub(r"\d\d$", "07", key.removesuffix("._type")) for key in logged}
    assert len(listed) == 21
    assert set(listed) <= logged
    records = (of_type(record, "artifact") for record in (first, second))
    first, second = ([one for one in record if one["type"] == "model"] for record in records)
    (artifact,) = second  # of other types are the tables of layers
    assert artifact["name"] == f"adapter-{run['wandb_run_id']}"
    files = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not first


def test_log_adapter_needs_wandb(train):
    with pytest.raises(UsageError, match="--log_adapter true needs --report_to wandb; got none"):
        train(log_adapter=True)


def test_wandb_without_a_login_stops_before_anything(train, tmp_path, monkeypatch):
    for variable in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match=r"wandb login.*WANDB_MODE=offline.*--report_to none"):
        train(report_to="wandb")


def test_report_to_none_imports_no_wandb(arguments):
    code = "import sys, train_ist; train_ist.main(sys.argv[1:]); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, *arguments(max_steps=5)], check=True, cwd=ROOT, timeout=240)


def test_importing_ist_imports_neither_trainer_nor_wandb():
    code = (
        "import sys; from ist import ISTConfig, ImportanceSampler, SparseTuner; ISTConfig()\n"
        "assert not {'wandb', 'transformers.trainer', 'matplotlib'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_tensorboard(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(report_to="tensorboard", validation_size=8, max_steps=6) == 0
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*.0")
    accumulator = EventAccumulator(str(events)).Reload()
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [e.value for e in accumulator.Scalars("train/loss")] == pytest.approx([x["loss"] for x in lines[1:7]])
    assert "importance/heat_map" in accumulator.Tags()["images"]
    assert accumulator.Scalars("importance/effective_layers")
    assert not [key for key in accumulator.Tags()["scalars"] if "/layer_" in key]


def test_the_picture_is_drawn_again_from_the_files(train, tmp_path, capsys):
    assert train() == 0
    picture = tmp_path / "run/importance.png"
    first = imread(picture)
    assert first.shape[0] > 300 < first.shape[1]
    assert len({tuple(p) for p in first.reshape(-1, 4)[::7].tolist()}) > 20  # not an empty canvas
    picture.unlink()
    capsys.readouterr()
    assert main([str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.split() == [str(picture), str(picture.with_name("loss.png"))]
    assert (imread(picture) == first).all()
    with pytest.raises(UsageError, match="holds no run"):
        draw_importance(tmp_path)


def test_runs_of_several_tasks_are_drawn_side_by_side(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (drawn.append(self), save(self, *a, **kw)))
    seen = {"maths": [[0.6, 0.2], [0.7, 0.1]], "text": [[0.4, 0.9]]}
    for name, probabilities in seen.items():
        (tmp_path / f"seed=1,{name}").mkdir()
        lines = [json.dumps({"step": 10 * (i + 1), "probabilities": p}) for i, p in enumerate(probabilities)]
        (tmp_path / f"seed=1,{name}" / "importance.jsonl").write_text("\n".join(lines) + "\n")
    runs = [f"{name}={tmp_path / f'seed=1,{name}'}" for name in seen]
    assert main(["--importance", *runs, "--output_dir", str(tmp_path / "out")]) == 0
    assert imread(tmp_path / "out/importance-panels.png").shape[1] > 600
    for axis, (name, probabilities) in zip(drawn[0].axes, seen.items()):
        assert axis.get_title() == name
        # Columns from step 0 on, where all scores are zero; rows are layers, layer 0 at the bottom.
        (image,) = axis.images
        assert image.get_array().tolist() == np.transpose([[0.5, 0.5], *probabilities]).tolist()
        assert axis.get_xlim() == (0, 10 * (len(probabilities) + 1))
        assert axis.get_ylim() == (-0.5, 1.5)
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="none has no importance updates to draw"):
        main(["--importance", str(tmp_path / "none"), "--output_dir", str(tmp_path / "out")])


def write_results(folder: Path, arm: str, seed: int, right: dict[str, list[int]], model: str = "m/llama") -> Path:
    folder.mkdir()
    settings = {"peft_method": "lora", "selection": arm, "trained_layers": 0.25, "seed": seed}
    summary = {"tasks": {task: {} for task in right}, "training": {"configuration": settings}}
    summary["arguments"] = {"model_name_or_path": model, "adapter": "x"}
    (folder / "summary.json").write_text(json.dumps(summary))
    for task, values in right.items():
        lines = [json.dumps({"row": i, "right": bool(value)}) for i, value in enumerate(values)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines))
    return folder


def test_results_are_compared_over_seeds_and_in_pairs(tmp_path, capsys):
    generator = np.random.default_rng(1)
    right = {}
    for arm, share in (("all", 0.5), ("random", 0.5), ("ist", 0.65)):
        for seed in (1, 2, 3):
            tasks = {"boolq": (generator.random(400) < share).astype(int).tolist(),
                     "piqa": (generator.random(200) < share).astype(int).tolist()}  # fmt: skip
            right[arm, seed] = tasks
            write_results(tmp_path / f"{arm}-{seed}", arm, seed, tasks)
    folders = [str(tmp_path / f"{arm}-{seed}") for arm, seed in right]
    assert main(["--results", *folders, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / "out/comparison.md").read_text().strip()
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    assert [row["arm"] for row in comparison["accuracy"]] == ["LORA", "LORA + random", "LORA + ist"]
    values = [np.mean(right["ist", seed]["boolq"]) for seed in (1, 2, 3)]
    cell = comparison["accuracy"][2]["accuracy"]["boolq"]
    assert cell == {"mean": pytest.approx(np.mean(values)), "std": pytest.approx(np.std(values, ddof=1))}
    assert comparison["accuracy"][2]["files"] == [str(tmp_path / f"ist-{seed}/summary.json") for seed in (1, 2, 3)]
    assert [row["arms"] for row in comparison["differences"]] == ["LORA + ist − LORA", "LORA + ist − LORA + random"]
    for row, other in zip(comparison["differences"], ("all", "random"), strict=True):
        per_seed = [
            np.mean([np.mean(right["ist", s][t]) - np.mean(right[other, s][t]) for t in ("boolq", "piqa")])
            for s in (1, 2, 3)
        ]
        assert row["difference"]["average"] == pytest.approx(np.mean(per_seed))
        low, high = row["interval"]
        assert 0 < low < row["difference"]["average"] < high  # 15 points, and about 1.9 of standard error
        # The interval is about 1.96 standard errors each way; independent rows, so that of a difference of shares.
        error = np.sqrt(sum(2 * 0.24 / n for n in (400, 200)) / 4 / 3)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.6)
    for line in printed.splitlines():
        assert not line.startswith("| llama") or "summary.json" in line  # every row names where it comes from


def test_no_difference_is_no_difference(tmp_path):
    same = {"boolq": [0, 1] * 50}
    folders = [write_results(tmp_path / arm, arm, 1, same) for arm in ("all", "ist")]
    (row,) = compare(folders)["differences"]
    assert row["difference"] == {"boolq": 0, "average": 0}
    assert row["interval"] == [0, 0]


def test_results_that_cannot_be_compared(tmp_path, capsys):
    one = write_results(tmp_path / "one", "all", 1, {"boolq": [1, 0]})
    two = write_results(tmp_path / "two", "ist", 1, {"boolq": [1, 0, 1]})
    other = write_results(tmp_path / "other", "ist", 1, {"piqa": [1]})
    with pytest.raises(UsageError, match="different numbers of rows of boolq"):
        compare([one, two])
    with pytest.raises(UsageError, match="no task in common"):
        compare([one, other])
    with pytest.raises(UsageError, match="holds no finished evaluation"):
        compare([tmp_path / "nowhere"])
    for argv in ([], [str(one), "--results", str(two)]):
        with pytest.raises(UsageError, match=r"give RUN \[RUN \.\.\.\], or --results"):
            main(argv)


def test_reproduce_trains_scores_and_goes_on(tiny, rows, tmp_path):
    for task in ("boolq", "piqa"):
        (tmp_path / "data/dataset" / task).mkdir(parents=True)
        labels = {"boolq": ("true", "false"), "piqa": ("solution1", "solution2")}[task]
        test = [{"instruction": f"Is it {i}?", "output": "", "answer": labels[i % 2]} for i in range(5)]
        (tmp_path / "data/dataset" / task / "test.json").write_text(json.dumps(test))
    (tmp_path / "data/commonsense_170k.json").write_text(json.dumps(rows))
    (tmp_path / "home").mkdir()
    for name in ("train_ist.py", "ist", "launch", "accelerate_configs", "tests"):
        (tmp_path / "home" / name).symlink_to(ROOT / name)
    script = tmp_path / "home/launch/reproduce.sh"
    environment = {**os.environ, "DATA": str(tmp_path / "data"), "TASKS": "boolq piqa", "ACCELERATE_USE_CPU": "true"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def run(*arguments):
        command = ["bash", str(script), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert run("--help").stdout.startswith("One row of the paper's Table 2 or 3")
    assert "no recipe llama_8b" in run("llama_8b", "ist").stderr
    assert (
        "ARM must be a selection of train_ist.py (all, random, ist, lisa, ...); got lora"
        in run("llama_7b_lora_commonsense", "lora").stderr
    )
    flags = ["--model_name_or_path", tiny, "--dtype", "float32", "--max_steps", 4, "--validation_size", 4]
    flags += ["--per_device_train_batch_size", 2, "--eval_steps", 2, "--save_steps", 2, "--report_to", "none"]
    for _ in range(2):  # the second time there is nothing left to do
        result = run("llama_7b_lora_commonsense", "ist", 7, *flags)
        assert result.returncode == 0, result.stderr[-2000:]
    folder = tmp_path / "home/results/llama_7b_lora_commonsense-ist-7"
    assert read_results(folder)["arm"] == "LORA + ist"
    assert read_results(folder)["seed"] == 7
    assert "holds this run, finished" in result.stdout
    assert set(json.loads((folder / "summary.json").read_text())["tasks"]) == {"boolq", "piqa"}
