"""A whole experiment on tiny models: tuning, runs, results, tables; and nothing is run twice."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import reset_accelerate
from support.experiments import FILE, arguments, commonsense_row, saved_by_hooks

from ist.training.command_line import UsageError
from launch.experiments import design, rows, run, runner, tables
from launch.experiments.results import read_results


@pytest.fixture
def whole(tiny, many_rows, write, tmp_path, capsys, few_processes):
    """(command line, folder, printed lines) of an experiment of three arms and two seeds."""
    folder = tmp_path / "out"
    argv = arguments(model_name_or_path=tiny, train_file=many_rows, output_dir=folder, experiment=write(), jobs=2)
    argv += [*arguments(publish=tmp_path / "published"), "--arms", "LoRA", "IST", "fixed"]
    assert run.main(argv) == 0
    return argv, folder, capsys.readouterr().out


def check_tuning(result: dict) -> None:
    """The learning rates, then mu at the best one, on the tuning rows and seed; the lowest loss is taken."""
    trials = result["trials"]
    assert [(t["arm"], t["key"], t["values"][t["key"]]) for t in trials] == [
        *(("LoRA", "learning_rate", 2e-2), ("IST", "learning_rate", 1e-3), ("IST", "learning_rate", 2e-2)),
        *(("IST", "score_lr", 10), ("IST", "score_lr", 100)),
    ]
    assert len({t["values"]["learning_rate"] for t in trials[3:]}) == 1
    for turn in (trials[1:3], trials[3:]):
        best = min(turn, key=lambda t: t["loss"])["values"]
        assert trials[3]["values"]["learning_rate"] == best["learning_rate"]
    assert result["arms"]["IST"]["tuned"] == best
    assert result["arms"]["fixed"]["tuned"] == result["arms"]["LoRA"]["tuned"] == {"learning_rate": 2e-2}


def check_runs(result: dict, runs: dict[Path, dict], folder: Path) -> None:
    """Every number is that of the runs' own files."""
    for name, arm in result["arms"].items():
        for one in arm["runs"]:
            (path,) = (
                path
                for path, record in runs.items()
                if path.parent.name == name
                and record["configuration"]["seed"] == one["seed"]
                and record["configuration"]["learning_rate"] == arm["tuned"]["learning_rate"]
            )
            assert one["validation"][-1][1] == runs[path]["final_validation_loss"]
            assert one["trained_counts"] == runs[path]["trained_counts"]
            assert one["configuration"]["learning_rate"] == arm["tuned"]["learning_rate"]
            assert runs[path]["configuration"]["validation_file"] == [str(folder / "data/test.json")]
            assert one["exact"] == json.loads((path / "evaluation/summary.json").read_text())["average"]
    parts = {name: json.loads((folder / f"data/{name}.json").read_text()) for name in ("train", "tuning", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 64, "tuning": 6, "test": 10}


def check_fixed_layers(result: dict, folder: Path) -> None:
    """The fixed layers are those that the tuned run of IST found the most important."""
    tuned = design.slug(result["arms"]["IST"]["tuned"])
    lines = (folder / f"runs/IST/{tuned}-seed=100/importance.jsonl").read_text().splitlines()
    top = sorted(torch.tensor(json.loads(lines[-1])["scores"]).topk(2).indices.tolist())
    assert result["arms"]["fixed"]["settings"]["fixed_layers"] == top
    steps = [6 if i in top else 0 for i in range(4)]
    assert all(one["trained_counts"] == steps for one in result["arms"]["fixed"]["runs"])


def check_bytes(result: dict, runs: dict[Path, dict], tiny: Path) -> None:
    """As hooks count them on the model itself, all layers trained."""
    configuration = next(record["configuration"] for record in runs.values())
    tokens = round(configuration["train_tokens"] / configuration["train_rows"])
    adapter = next(path for path, r in runs.items() if r["configuration"]["selection"] == "all") / "adapter"
    n_rows = configuration["per_device_train_batch_size"]
    saved = {name: arm["bytes"]["saved"] for name, arm in result["arms"].items()}
    trained = sum(p.numel() for p in load_file(adapter / "adapter_model.safetensors").values())
    assert result["arms"]["LoRA"]["bytes"]["gradients"] == 4 * trained
    assert result["arms"]["LoRA"]["bytes"]["optimizer"] == pytest.approx(8 * trained, rel=0.02)  # and step numbers
    assert result["arms"]["IST"]["bytes"]["gradients"] == 4 * trained / 2
    assert saved["LoRA"] == pytest.approx(saved_by_hooks(tiny, adapter, n_rows, tokens), rel=0.01)
    assert saved["IST"] < saved["LoRA"]


def test_a_whole_experiment(whole, tiny, tmp_path, few_processes):
    argv, folder, printed = whole
    result = read_results(folder / "results")
    runs = {path.parent: json.loads(path.read_text()) for path in folder.glob("runs/*/*/run.json")}
    assert len(few_processes) == len(runs) + 7
    assert len(runs) == 4 + 6  # IST's run at its best mu is one of its learning rates' runs
    check_tuning(result)
    check_runs(result, runs, folder)
    check_fixed_layers(result, folder)
    check_bytes(result, runs, tiny)

    table = printed[printed.index("| arm |") : printed.index("| paired")]
    losses = [one["validation"][-1][1] for one in result["arms"]["IST"]["runs"]]
    assert f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}" in table
    assert table in (folder / "results.md").read_text()
    trials = (folder / "tuning.md").read_text().splitlines()[2:]
    assert len(trials) == len(result["trials"]) and sum("best" in line for line in trials) >= 2
    # Seconds are relative to the first arm; arms whose steps are alike are timed once, and none again.
    assert [arm["step_seconds"] for arm in result["arms"].values()] == [2, 3, 2]
    assert "| 3.00 | 1.50 (1.50 … 1.50) |" in table and "of LoRA's" in table
    assert len((folder / "seconds.jsonl").read_text().splitlines()) == 2

    # One file for each run, and one for the rest; published as they are.
    names = [f"{arm}-{seed}.json" for arm in ("fixed", "ist", "lora") for seed in (1, 2)]
    for results in (folder / "results", tmp_path / "published"):
        assert sorted(path.name for path in results.glob("*.json")) == ["experiment.json", *names]
        assert (results / "curves.png").stat().st_size > 10_000
        assert tables.experiment_table(results) in printed

    # Again: nothing is run, and the same comes out.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    reset_accelerate()
    assert run.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()} == before
    assert read_results(folder / "results") == result

    # What is published is not dropped.
    reset_accelerate()
    with pytest.raises(UsageError, match=r"has the arm 'IST', which this command does not run"):
        run.main([*argv[: argv.index("--arms")], "--arms", "LoRA"])
    assert (tmp_path / "published/ist-1.json").exists()


def test_a_table_is_made_of_its_folder_alone(whole, tmp_path):
    _, folder, _ = whole
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    table = tables.experiment_table(folder / "results")
    (folder / "results/curves.png").unlink()
    assert tables.main([str(folder / "results"), "--readme", str(readme)]) == 0
    assert readme.read_text() == f"before\n<!-- results -->\n{table}\n<!-- /results -->\nafter\n"
    assert (folder / "results/curves.png").exists()
    # Another loss in the file of one run is another mean.
    file = folder / "results/lora-1.json"
    one = json.loads(file.read_text())
    one["validation"][-1][1] += 1
    file.write_text(json.dumps(one))
    assert tables.experiment_table(folder / "results") != table
    file.unlink()
    with pytest.raises(UsageError, match="holds no whole results"):
        tables.experiment_table(folder / "results")


def test_a_finished_run_of_another_configuration_is_not_taken(tiny, many_rows, write, tmp_path, few_processes):
    def argv(**changes) -> list[str]:
        values = {"train_file": many_rows, "output_dir": tmp_path / "out", "model_name_or_path": tiny, "jobs": 2}
        return [*arguments(**values, experiment=write(**changes)), "--arms", "LoRA"]

    assert run.main(argv(evaluate=None)) == 0
    reset_accelerate()
    with pytest.raises(UsageError, match=r"another configuration: lora_alpha \(8 there, 16 here\)"):
        run.main(argv(evaluate=None, recipe=FILE["recipe"] | {"lora_alpha": 16}))


def test_answers_in_words(tiny, write, tmp_path, capsys, few_processes):
    outputs = [" 4 apples", " a pear.", " Answer keys"]
    row = {"instruction": "Question: How many has 4?\nAnswer:", "input": "", "output": " a pear.", "choices": outputs}
    assert rows.in_words(commonsense_row(4), "f") == row | {"answer": " a pear."}
    asked = "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false"
    yes = rows.in_words({"instruction": asked, "answer": "true"}, "f")
    assert (yes["instruction"], yes["choices"]) == ("Question: is it so?\nAnswer:", [" true", " false"])
    with pytest.raises(UsageError, match="--train_file row 3: answer_texts needs rows that list their answers"):
        rows.in_words({"instruction": "Why?", "answer": "4"}, "train_file row 3")

    file = tmp_path / "choose.json"
    file.write_text(json.dumps([commonsense_row(i) | {"output": "the correct answer is it"} for i in range(40)]))
    scoring = {"scoring": "likelihood", "batch_size": 4}
    values = {"train_file": file, "output_dir": tmp_path / "out", "model_name_or_path": tiny, "jobs": 1}
    values["experiment"] = write(answer_texts=True, evaluate=scoring, seeds=[1])
    assert run.main([*arguments(**values), "--arms", "LoRA"]) == 0
    (found,) = read_results(tmp_path / "out/results")["arms"]["LoRA"]["runs"]
    lines = [json.loads(line) for line in (Path(found["folder"]) / "evaluation/data.jsonl").read_text().splitlines()]
    chosen = {line["row"]: line["extracted"] for line in lines}
    test = json.loads((tmp_path / "out/data/test.json").read_text())
    assert all(f" {chosen[i]}" in test[i]["choices"] for i in range(10)) and len(test) == 10
    assert found["exact"] == sum(f" {chosen[i]}" == test[i]["output"] for i in range(10)) / 10
    assert "right answers, %" in capsys.readouterr().out


def test_a_run_that_fails_names_its_log(tiny, many_rows, write, tmp_path):
    path = write(recipe=FILE["recipe"] | {"max_length": 2})
    argv = arguments(model_name_or_path=tiny, train_file=many_rows, output_dir=tmp_path / "out", experiment=path)
    with pytest.raises(UsageError, match=r"exit code 2; .*\.log ends: error: .*"):
        run.main([*argv, "--jobs", "1"])
    assert len(list(tmp_path.glob("out/runs/*/*.log"))) == 1  # no other run was begun


def test_a_trial_that_diverges_is_the_worst(tiny, many_rows, write, tmp_path, few_processes):
    assert runner.lowest({2: math.inf, 1: math.inf, 3: 0.5}) == 3
    table = tables.tuning_table(
        [
            {"arm": "a", "key": "learning_rate", "values": {"learning_rate": 1.0}, "loss": 0.5},
            {"arm": "a", "key": "learning_rate", "values": {"learning_rate": 2.0}, "loss": None},
        ]
    )
    assert "| 1.0" not in table and "diverged" in table.splitlines()[3] and "best" in table.splitlines()[2]
    values = {"train_file": many_rows, "output_dir": tmp_path / "out", "model_name_or_path": tiny, "jobs": 1}
    values["experiment"] = write(evaluate=None, tuning={"seed": 100, "grid": {"learning_rate": [1e30]}})
    for _ in range(2):  # and is not run again
        with pytest.raises(UsageError, match=r"LoRA diverges at every learning_rate of the grid: 1e\+30"):
            run.main([*arguments(**values), "--arms", "LoRA"])
        reset_accelerate()
    assert len(few_processes) == 1
