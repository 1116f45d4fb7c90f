"""Runs side by side: arms over seeds, their numbers from the files, differences in pairs, and what is missing."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.image import imread
from support import read_lines, reset_accelerate
from support.bad_files import ends_in_one_line

from ist.report.arms import read_arms, read_folder
from ist.report.compare import main
from ist.report.figures import plot_runs
from ist.report.side_by_side import side_by_side, side_by_side_tables


@pytest.fixture(scope="module")
def runs(tiny, train_file, tmp_path_factory) -> Path:
    """A folder of finished runs: all-1, all-2, ist-1, ist-2; of twelve steps, with validation."""
    import train_ist

    folder = tmp_path_factory.mktemp("runs")
    flags = {"model_name_or_path": tiny, "train_file": train_file, "report_to": "none", "warmup_steps": 2}
    flags |= {"max_steps": 12, "update_interval": 4, "lora_r": 4, "learning_rate": 5e-3, "score_lr": 100}
    flags |= {"validation_size": 8, "eval_steps": 4}
    for selection, logging_steps in (("all", 1), ("ist", 2)):
        for seed in (1, 2):
            own = {"selection": selection, "seed": seed, "output_dir": folder / f"{selection}-{seed}"}
            reset_accelerate()
            given = {**flags, **own, "logging_steps": logging_steps}
            assert train_ist.main([part for key, value in given.items() for part in (f"--{key}", str(value))]) == 0
    return folder


@pytest.fixture
def copies(runs, tmp_path):
    """Copies of runs to be edited: copies("all-1", "mine", status="failed") with other values in run.json, a
    dictionary under `configuration` in addition to what is there, and metrics.jsonl up to step `until`."""

    def copy(name: str, new: str, until: int | None = None, **values) -> Path:
        shutil.copytree(runs / name, tmp_path / new)
        record = json.loads((tmp_path / new / "run.json").read_text())
        values["configuration"] = record["configuration"] | values.get("configuration", {})
        (tmp_path / new / "run.json").write_text(json.dumps(record | values))
        if until is not None:
            lines = read_lines(tmp_path / new / "metrics.jsonl")
            kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= until]
            (tmp_path / new / "metrics.jsonl").write_text("".join(kept))
        return tmp_path / new

    return copy


def numbers(run: Path, until: float = math.inf) -> dict[str, float]:
    """What the comparison must say of a run, read anew."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["step"] <= until]
    steps = [line for line in lines if "loss" in line]
    last, seconds = steps[-1]["step"], 0.0
    for before, line in zip([{"step": 0}, *steps], steps, strict=False):
        seconds += (line["step"] - before["step"]) * line["step_seconds"]
    validated = [line["validation_loss"] for line in lines if line.get("validation_loss") and line["step"]]
    return {
        "training_loss": np.mean([line["loss"] for line in steps if line["step"] > 0.9 * last]),
        "validation_loss": validated[-1],
        "best_validation_loss": min(validated),
        "step_seconds": seconds / last,
        "tokens_per_second": steps[-1]["tokens"] / seconds,
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in steps),
    }


def compared(*folders: Path) -> dict:
    return side_by_side(read_arms(folders))


def difference(comparison: dict, arm: str, measure: str) -> dict:
    (found,) = [one for one in comparison["differences"] if (one["arm"], one["measure"]) == (arm, measure)]
    return found


def test_two_arms_of_two_seeds(runs, tmp_path, capsys, monkeypatch):
    """Of the files alone, whatever the order of seeds; the table is that of the JSON."""
    monkeypatch.chdir(tmp_path)
    names = ["all-1", "all-2", "ist-2", "ist-1"]
    assert main([str(runs / name) for name in names]) == 0
    comparison = json.loads((tmp_path / "comparison/comparison.json").read_text())
    table = (tmp_path / "comparison/comparison.md").read_text()
    assert table == side_by_side_tables(comparison) + "\n"
    printed = capsys.readouterr().out
    files = [f"comparison/comparison.{suffix}" for suffix in ("png", "md", "json")]
    assert printed == table + "\n" + "\n".join(files) + "\n"
    height, width = imread(tmp_path / "comparison/comparison.png").shape[:2]
    assert height > 800 and width > 1200

    assert comparison == json.loads(json.dumps(compared(*(runs / name for name in names))))
    assert [(row["arm"], row["finished"], row["seeds"]) for row in comparison["arms"]] == [
        ("all", 2, [1, 2]),
        ("ist", 2, [2, 1]),
    ]
    read = {name: numbers(runs / name) for name in names}
    for row in comparison["runs"]:
        own = {key: value for key, value in row["numbers"].items() if key != "effective_layers"}
        assert own == pytest.approx(read[Path(row["folder"]).name])
        counts = np.array(json.loads((Path(row["folder"]) / "run.json").read_text())["trained_counts"])
        assert row["numbers"]["effective_layers"] == pytest.approx(counts.sum() ** 2 / (counts**2).sum())
    for row in comparison["arms"]:
        for key, cell in row["numbers"].items():
            if key != "effective_layers":
                values = [read[f"{row['arm']}-{seed}"][key] for seed in (1, 2)]
                assert cell == pytest.approx({"mean": np.mean(values), "sd": np.std(values, ddof=1)})
    for measure in ("training_loss", "validation_loss", "step_seconds", "peak_memory_bytes"):
        values = [read[f"ist-{seed}"][measure] - read[f"all-{seed}"][measure] for seed in (1, 2)]
        margin = scipy.stats.t.ppf(0.975, 1) * np.std(values, ddof=1) / 2**0.5
        found = difference(comparison, "ist", measure)
        assert found["mean"] == pytest.approx(np.mean(values))
        assert found["interval"] == pytest.approx([np.mean(values) - margin, np.mean(values) + margin])
        assert (sorted(found["seeds"]), found["until"]) == ([1, 2], {})
    assert comparison["settings"] == {"selection": ["all", "ist"]}


def test_one_seed_has_no_interval_and_other_seeds_no_pairs(runs):
    one = compared(runs / "all-1", runs / "all-2", runs / "ist-2")
    found = difference(one, "ist", "training_loss")
    assert (found["seeds"], found["interval"]) == ([2], None)
    expected = numbers(runs / "ist-2")["training_loss"] - numbers(runs / "all-2")["training_loss"]
    assert found["mean"] == pytest.approx(expected)
    assert "one seed: no interval" in side_by_side_tables(one)
    none = compared(runs / "all-1", runs / "ist-2")
    assert none["differences"] == []
    assert "ist and all have no seed in common: no differences in pairs." in none["notes"]
    seeds = compared(runs / "ist-1", runs / "ist-2")
    assert [row["arm"] for row in seeds["arms"]] == ["ist"]
    assert any(note.startswith("One arm:") for note in seeds["notes"])
    assert "Differences" not in side_by_side_tables(seeds)


def arm_names(*folders: Path) -> list[str]:
    return [arm.name for arm in read_arms(folders)]


def test_arms_are_named_by_what_they_differ_in(runs, copies):
    ist, every = runs / "ist-1", runs / "all-1"
    elsewhere = {"output_dir": "x", "run_name": "y", "logging_steps": 5, "save_steps": 3, "seed": 7}
    assert arm_names(ist, copies("ist-1", "more", configuration=elsewhere)) == ["ist"]
    faster = copies("ist-1", "faster", configuration={"score_lr": 300.0})
    assert arm_names(ist, faster) == ["score_lr 100", "score_lr 300"]
    assert arm_names(every, ist, faster) == ["all", "ist, score_lr 100", "ist, score_lr 300"]
    moved = copies("ist-1", "moved", configuration={"model_name_or_path": "/elsewhere/tiny", "seed": 3})
    assert arm_names(ist, moved) == ["ist"]  # the same files
    assert compared(every, moved)["settings"] == {"selection": ["all", "ist"]}
    other = copies("ist-1", "other", configuration={"model_name_or_path": "/m/big", "model_digest": "ab" * 32})
    assert arm_names(ist, other) == [Path(read_folder(ist).settings["model_name_or_path"]).name, "big"]
    (note,) = [note for note in compared(ist, other)["notes"] if "model_digest" in note]
    assert note == "Arms differ in the base model's files (model_digest): their losses are not of the same task."


def test_a_seed_twice_is_told_apart_by_commit_else_by_folder(runs, copies):
    ist = runs / "ist-1"
    commit = json.loads((ist / "run.json").read_text())["commit"]
    later = copies("ist-1", "later", commit="abc")
    assert arm_names(ist, runs / "ist-2", later) == [f"commit {commit}", "commit abc"]
    again = copies("ist-1", "again")
    assert arm_names(ist, again) == [f"folder {ist}", f"folder {again}"]
    assert difference(compared(ist, again), f"folder {again}", "training_loss")["mean"] == 0


def test_a_failed_run_is_compared_up_to_its_last_step_or_left_to_finished_ones(runs, copies):
    error = {"status": "failed", "error": "loss nan | at step 9"}
    failed = copies("ist-1", "failed", until=8, **error)
    found = compared(runs / "all-1", failed)
    assert found["runs"][1] | {"status": "failed", "step": 8, "max_steps": 12, "counted": True} == found["runs"][1]
    ours, base = numbers(failed), numbers(runs / "all-1", until=8)
    for measure in ("training_loss", "validation_loss", "step_seconds"):
        one = difference(found, "ist", measure)
        assert one["mean"] == pytest.approx(ours[measure] - base[measure])
        assert one["until"] == {"1": 8}
    assert "ist: no run is finished; its numbers are those of its last steps so far." in found["notes"]
    assert "| failed: loss nan \\| at step 9 | 8 of 12 |" in side_by_side_tables(found)
    found = compared(runs / "all-1", runs / "all-2", failed, runs / "ist-2")
    assert (found["arms"][1]["finished"], found["arms"][1]["seeds"]) == (1, [2])
    early = compared(runs / "all-1", copies("ist-1", "early", until=2, **error))
    assert early["runs"][1]["numbers"]["validation_loss"] is None  # that of step 0 is the base model's
    assert difference(found, "ist", "training_loss")["seeds"] == [2]
    assert "ist: 1 of 2 runs unfinished or without a logged step, and not in its numbers." in found["notes"]


def test_what_is_missing_is_said(runs, copies, tmp_path, capsys):
    bare = copies("all-1", "bare", trained_counts=[0, 0, 0, 0], configuration={"lora_r": 8})
    kept = [line for line in read_lines(bare / "metrics.jsonl") if "loss" in line]
    for line in kept:
        del line["step_seconds"], line["peak_memory_bytes"]
    (bare / "metrics.jsonl").write_text("not JSON\n" + "".join(json.dumps(line) + "\n" for line in kept) + '{"step": 1')
    (bare / "importance.jsonl").unlink()
    empty = copies("ist-1", "empty", until=-1, status="running")
    (empty / "importance.jsonl").write_text("")
    assert main([str(runs / "all-1"), str(bare), str(empty), "--output", str(tmp_path / "out")]) == 0
    assert f"{bare}/metrics.jsonl: line 1 is not a JSON object and is left out." in capsys.readouterr().err
    comparison = json.loads((tmp_path / "out/comparison.json").read_text())
    names = [row["arm"] for row in comparison["arms"]]
    assert names == ["all, lora_r 4", "all, lora_r 8", "ist"]
    assert comparison["notes"] == [
        "ist: no run has a logged step.",
        "No validation losses after step 0 in all, lora_r 8; ist.",
        "No importance updates in any run.",
        "No seconds in all, lora_r 8; ist.",
        "No peak memory in all, lora_r 8; ist.",
        f"{bare}: lines of metrics.jsonl left out, as they are damaged or not whole (2).",
    ]
    assert (
        comparison["runs"][2]["numbers"] | {"training_loss": None, "step_seconds": None}
        == comparison["runs"][2]["numbers"]
    )
    assert (tmp_path / "out/comparison.png").stat().st_size > 10_000
    (gone := copies("ist-1", "gone") / "metrics.jsonl").unlink()
    found = compared(gone.parent, runs / "ist-2", runs / "all-1")
    assert found["arms"][0]["seeds"] == [2]
    assert "ist: 1 of 2 runs unfinished or without a logged step, and not in its numbers." in found["notes"]
    nothing = [copies("all-1", name, until=-1, configuration={"seed": i}) for i, name in enumerate(("no-1", "no-2"))]
    assert main([*map(str, nothing), "--output", str(tmp_path / "nothing")]) == 0
    assert (tmp_path / "nothing/comparison.png").stat().st_size > 10_000


def test_a_control_is_marked(runs, copies):
    control = copies("ist-1", "control", control="a control: no information", configuration={"selection": "placebo"})
    comparison = compared(runs / "ist-1", control)
    assert "| placebo (control) | 1 of 1 |" in side_by_side_tables(comparison)
    assert "placebo: a control: no information." in comparison["notes"]
    assert [arm.label for arm in read_arms([runs / "ist-1", control])] == ["ist", "placebo (control)"]


def test_lines_of_the_picture(runs, copies, tmp_path, monkeypatch):
    """One seed: the values of metrics.jsonl. Several: their mean, its range a band; an unfinished one is thin."""
    failed = copies("ist-1", "failed", until=8, status="failed", configuration={"seed": 3})
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (drawn.append(self), save(self, *a, **kw)))
    arms = read_arms([runs / "all-1", runs / "ist-1", runs / "ist-2", failed])
    plot_runs(tmp_path / "runs.png", arms)
    by_step, by_time, memory, validation = drawn[0].axes[0], drawn[0].axes[1], drawn[0].axes[2], drawn[0].axes[3]
    assert [axis.get_title() for axis in (by_step, memory, validation)] == [
        *("Training loss", "Peak memory (largest run)", "Validation loss"),
    ]
    lines = {
        name: [x for x in read_lines(runs / name / "metrics.jsonl") if "loss" in x]
        for name in ("all-1", "ist-1", "ist-2")
    }
    one, mean, thin = by_step.lines
    assert one.get_xydata().tolist() == [[line["step"], line["loss"]] for line in lines["all-1"]]
    losses = [[line["loss"] for line in lines[name]] for name in ("ist-1", "ist-2")]
    assert mean.get_xdata().tolist() == [line["step"] for line in lines["ist-1"]]
    assert mean.get_ydata() == pytest.approx(np.mean(losses, axis=0))
    (band,) = by_step.collections
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert (low, high) == pytest.approx((np.min(losses), np.max(losses)))
    assert thin.get_xdata().tolist() == [2, 4, 6, 8] and thin.get_linewidth() < one.get_linewidth()
    seconds = np.cumsum([line["step_seconds"] for line in lines["all-1"]])
    assert by_time.lines[0].get_xdata() == pytest.approx(seconds)
    peaks = [
        max(line["peak_memory_bytes"] for name in names for line in lines[name]) / 1e6
        for names in (["all-1"], ["ist-1", "ist-2"])
    ]
    assert [bar.get_width() for bar in memory.patches] == pytest.approx(peaks)
    assert [label.get_text() for label in memory.get_yticklabels()] == ["all", "ist"]


BAD = {
    "no folder": (["RUNS/all-1", "RUNS/nowhere"], "nowhere is not there"),
    "a file": (["RUNS/all-1", "RUNS/all-1/run.json"], "run.json is no folder"),
    "no run": (["RUNS/all-1", "RUNS/all-1/adapter"], "adapter holds no run (no run.json)"),
    "twice": (["RUNS/all-1", "RUNS/ist-1", "RUNS/all-1/"], "all-1 is given twice. Name each run once."),
    "a link": (["RUNS/all-1", "HERE/link"], "link is given twice (as RUNS/all-1 too)"),
    "no number": (["RUNS/all-1", "HERE/text"], "loss of step 2 must be a number; got low"),
    "not finite": (["RUNS/all-1", "HERE/nan"], "loss of step 2 is not finite"),
    "again": (["RUNS/all-1", "HERE/again"], "the steps of loss do not increase after step 12"),
    "importance": (["RUNS/all-1", "HERE/importance"], "probabilities of step 4 must be 4 numbers from 0 to 1"),
    "counts": (["RUNS/all-1", "HERE/counts"], "counts is not a run that can be compared"),
    "seed": (["RUNS/all-1", "HERE/seed"], "seed must be an integer; got [1]"),
    "rate": (["RUNS/all-1", "HERE/rate"], "rate is not a run that can be compared: Out of range float values"),
    "no status": (["RUNS/all-1", "HERE/status"], "run.json is not that of a run: it has no status"),
    "a single run": (["RUNS/all-1", "--output_dir", "HERE/out"], "a single run is drawn in its own folder"),
    "both": (["RUNS/all-1", "RUNS/ist-1", "--results", "HERE"], "give RUN [RUN ...], or --results"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(runs, copies, tmp_path, name, capsys, monkeypatch):
    (tmp_path / "link").symlink_to(runs / "all-1")
    argv, said = BAD[name]
    if argv[1].startswith("HERE/") and name != "a link":
        file = copies("ist-1", argv[1].removeprefix("HERE/")) / "metrics.jsonl"
        first = file.read_text().split("\n")[1]
        spoiled = {"no number": '{"step": 2, "loss": "low"}', "not finite": '{"step": 2, "loss": NaN}', "again": first}
        if name == "importance":
            (file.parent / "importance.jsonl").write_text('{"step": 4, "scores": [0], "probabilities": [0, 0, 0, 2]}\n')
        elif name == "no status":
            (file.parent / "run.json").write_text("{}")
        elif name in ("counts", "seed", "rate"):
            record = json.loads((file.parent / "run.json").read_text())
            record |= {"trained_counts": 3} if name == "counts" else {}
            record["configuration"] |= {"seed": [1]} if name == "seed" else {}
            record["configuration"] |= {"learning_rate": math.nan} if name == "rate" else {}
            (file.parent / "run.json").write_text(json.dumps(record))
        elif name == "again":
            file.write_text(file.read_text() + first + "\n")
        else:
            file.write_text(spoiled[name] + "\n")
    argv = [part.replace("RUNS", str(runs)).replace("HERE", str(tmp_path)) for part in argv]
    monkeypatch.chdir(tmp_path)
    line = ends_in_one_line(main, argv, capsys, monkeypatch, (2,))
    assert said.replace("RUNS", str(runs)) in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "comparison").exists()


def test_flags_stand_anywhere_and_the_folder_is_made(runs, tmp_path):
    assert main([str(runs / "all-1"), "--output", str(tmp_path / "a/b"), str(runs / "ist-1")]) == 0
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == [
        *("comparison.json", "comparison.md", "comparison.png"),
    ]
