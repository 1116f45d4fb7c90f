"""What is damaged, missing or of another kind is one line, of each command that only reads files."""

import json
import os
import shutil
import subprocess

import pytest
from support.bad_files import SPOILED, ends_in_one_line

from ist.benchmark.command import main as benchmark
from ist.report.compare import main as report
from launch.experiments import tables
from launch.experiments.results import write_results

LINE = {"step": 4, "scores": [0.5, -0.5], "probabilities": [0.6, 0.4]}


@pytest.fixture
def files(tmp_path):
    """A finished run, an evaluation of it and results of an experiment, in a folder with an accent."""
    folder = tmp_path / "modèle"
    run = folder / "run"
    run.mkdir(parents=True)
    settings = {"peft_method": "lora", "selection": "ist", "trained_layers": 0.25, "seed": 1}
    settings["model_name_or_path"] = "m"
    record = {"status": "finished", "start": "now", "trained_counts": [3, 2], "steps": 5, "configuration": settings}
    (run / "run.json").write_text(json.dumps(record))
    (run / "importance.jsonl").write_text(json.dumps(LINE) + "\n")
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    shutil.copytree(run, folder / "other")
    out = folder / "results"
    out.mkdir()
    summary = {"tasks": {"boolq": {}}, "training": {"configuration": settings}}
    summary["arguments"] = {"model_name_or_path": "m", "adapter": "x"}
    (out / "summary.json").write_text(json.dumps(summary))
    (out / "boolq.jsonl").write_text('{"row": 0, "right": true}\n')
    one = {"arm": "a", "seed": 1, "date": "d", "commit": "c", "versions": {"python": "3"}, "hardware": {"device": "x"}}
    one |= {"validation": [[0, 2.0], [5, 1.0]], "updates": [LINE]}
    arm = {"tuned_as": None, "tuned": {}, "step_seconds": 1.0, "ratio": 1, "interval": [1, 1]}
    arm["bytes"] = {"weights": 1, "optimizer": 1, "gradients": 1, "saved": 1}
    whole = {"seeds": [1], "arms": {"a": arm}, "pairs": [], "base": {"validation": 2.0}, "text": False}
    write_results(folder / "experiment", whole | {"scoring": "generation", "test_rows": 1, "tuning_commit": ""}, [one])
    return folder


def commands(files) -> dict[str, tuple]:
    return {
        "run.json": (report, [files / "run"], files / "run/run.json"),
        "run's importance": (report, [files / "run"], files / "run/importance.jsonl"),
        "one of two runs": (
            report,
            [files / "run", files / "other", "--output", files / "out"],
            files / "other/run.json",
        ),
        "importance.jsonl": (
            *(report, ["--importance", files / "run", "--output_dir", files / "out"]),
            files / "run/importance.jsonl",
        ),
        "summary.json": (report, ["--results", files / "results"], files / "results/summary.json"),
        "answers": (report, ["--results", files / "results"], files / "results/boolq.jsonl"),
        "experiment.json": (tables.main, [files / "experiment"], files / "experiment/experiment.json"),
        "a run's results": (tables.main, [files / "experiment"], files / "experiment/a-1.json"),
    }


KINDS = [
    "run.json",
    "one of two runs",
    "run's importance",
    "importance.jsonl",
    "summary.json",
    "answers",
    "experiment.json",
]
KINDS += ["a run's results"]
# A run without (whole) updates of importance has a picture without them.
WITHOUT = {"empty", "cut", "latin-1", "no JSON", "a list", "a number", "null", "deep", "binary", "dangling", "gone"}


def test_whole_files_are_read(files):
    for main, argv, _ in commands(files).values():
        assert main([*map(str, argv)]) == 0


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_file_is_one_line(files, kind, spoiled, capsys, monkeypatch):
    main, argv, file = commands(files)[kind]
    SPOILED[spoiled](file)
    if kind == "run's importance" and spoiled in WITHOUT:
        assert main([*map(str, argv)]) == 0
        return
    line = ends_in_one_line(main, argv, capsys, monkeypatch)
    assert str(file.parent) in line


VALUES = {
    "NaN": [LINE | {"probabilities": [float("nan"), "x"]}],
    "other layers": [LINE, LINE | {"step": 8, "probabilities": [0.5]}],
    "no numbers": [LINE | {"probabilities": "half"}],
    "no probabilities": [{"step": 4}],
    "no step": [{"probabilities": [0.5, 0.5]}],
    "layers of none": [LINE | {"probabilities": []}],
}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("panels", [True, False])
def test_values_of_another_kind_are_one_line(files, values, panels, capsys, monkeypatch):
    (files / "run/importance.jsonl").write_text("".join(json.dumps(line) + "\n" for line in VALUES[values]))
    argv = ["--importance", files / "run", "--output_dir", files / "out"] if panels else [files / "run"]
    line = ends_in_one_line(report, argv, capsys, monkeypatch)
    assert str(files / "run") in line


RECORDS = [{"trained_counts": None}, {"trained_counts": []}, {"trained_counts": ["a"]}, {"steps": None}]
RECORDS += [{"semantic": 3}, {"status": None}, {"configuration": None}]


@pytest.mark.parametrize("changes", RECORDS, ids=str)
def test_a_run_with_other_values_is_one_line(files, changes, capsys, monkeypatch):
    file = files / "run/run.json"
    record = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))
    ends_in_one_line(report, [files / "run"], capsys, monkeypatch)


SUMMARIES = [{"tasks": 3}, {"tasks": None}, {"training": 7}, {"arguments": []}]
SUMMARIES += [{"training": {"configuration": {"peft_method": 3}}}, {"training": None, "arguments": {}}]


@pytest.mark.parametrize("changes", SUMMARIES, ids=str)
def test_a_summary_with_other_values_is_one_line(files, changes, capsys, monkeypatch):
    file = files / "results/summary.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert str(file) in ends_in_one_line(report, ["--results", files / "results"], capsys, monkeypatch)


OPTIONS = {
    "nothing": (report, [], "give RUN [RUN ...]"),
    "no such key": (report, ["--nowhere", "x"], "unrecognized arguments: --nowhere"),
    "a file for a run": (report, ["RUN/run.json"], "run.json"),
    "panels without a place": (report, ["--importance", "RUN"], "--importance needs --output_dir"),
    "no such experiment": (tables.main, ["RUN"], "no experiment.json"),
    "no readme": (tables.main, ["RUN", "--readme", "nowhere.md"], "no such file"),
    "no subcommand": (benchmark, [], "WHAT"),
    "another subcommand": (benchmark, ["sped"], "sped"),
    "no rows": (benchmark, ["memory", "--rows", "0"], "--rows must be 1 or more; got 0"),
    "negative": (benchmark, ["memory", "--length=-5"], "--length must be 1 or more; got -5"),
    "no such model": (benchmark, ["memory", "--models", "x"], "--models"),
    "readme alone": (benchmark, ["memory", "--readme", "a.md"], "--readme needs --output"),
    "a folder to write": (benchmark, ["memory", "--output", "RUN"], "cannot be written"),
    "under a file": (benchmark, ["memory", "--output", "RUN/run.json/a.json"], "cannot be written"),
    "no place": (benchmark, ["memory", "--output", "x.json", "--readme", "RUN/run.json"], "has no place <!-- x -->"),
    "no rounds": (benchmark, ["speed", "--model_name_or_path", "m", "--rounds", "0"], "--rounds must be 1 or more"),
    "no ranks": (benchmark, ["communication", "--model_name_or_path", "m", "--ranks", "-1"], "--ranks must be 1"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bad_options_are_one_line(files, name, capsys, monkeypatch):
    main, argv, said = OPTIONS[name]
    argv = [part.replace("RUN", str(files / "run")) for part in argv]
    assert said in ends_in_one_line(main, argv, capsys, monkeypatch, (2,))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("options", ["size=4k", "ro"])
def test_a_full_and_a_read_only_disk_are_one_line(files, options, capsys, monkeypatch):
    disk = files / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], capture_output=True).returncode:
        pytest.skip("no mounts here")
    try:
        if options != "ro":
            (disk / "filled").write_bytes(b"x" * 4096)
        runs = [files / "run", files / "other"]
        for argv in (["--results", files / "results"], ["--importance", files / "run"], runs):
            line = ends_in_one_line(report, [*argv, "--output_dir", disk], capsys, monkeypatch)
            assert str(disk) in line and ("No space left" in line or "Read-only" in line)
        assert {path.name for path in disk.iterdir()} <= {"filled"}
    finally:
        subprocess.run(["umount", disk], check=True)
        shutil.rmtree(disk)
