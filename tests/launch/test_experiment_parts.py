"""The parts of an experiment: its file, its rows, its runner, its statistics, and the published results."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import SimpleNamespace

import pytest
from support import ROOT
from support.documents import published
from support.experiments import FILE, arguments

from ist.benchmark.arms import arguments_of
from ist.report.statistics import paired
from ist.training.command_line import UsageError
from ist.training.word_problems import arithmetic_rows
from launch.experiments import results, run, runner, tables
from launch.experiments.design import Arm, Experiment
from launch.experiments.rows import PIECE, rows_of, write_parts

EXPERIMENTS = sorted(path.stem for path in (ROOT / "launch/experiments").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_published_tables_are_those_of_their_results(name):
    folder = ROOT / "launch/experiments/results" / name
    if folder.exists():
        assert published(name) == tables.table_of(folder)


def test_the_arms_that_train_an_orders_ends_train_those_of_the_published_one():
    published = json.loads((ROOT / "launch/results/layers-arithmetic.json").read_text())
    order = published["directions"]["least"]["order"]  # as taken away: the ones that are missed least come first
    arms = Experiment.read(str(ROOT / "launch/experiments/arithmetic.yaml"), None).arms
    for name, layers in (("greedy 8 most", order[-8:]), ("greedy 8 least", order[:8])):
        assert arms[name].settings["fixed_layers"] == ",".join(map(str, sorted(layers)))


def test_stepwise_unmasking_keeps_the_activations_of_all_layers(tiny, rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"model_name_or_path": tiny, "train_file": tmp_path / "rows.json", "output_dir": tmp_path / "out"}
    flags |= {"lora_dropout": 0, "report_to": "none"}
    ours, usual = (
        results.bytes_by_part(flags | more, [range(4)] * 2, 20)
        for more in ({"selection": "id3", "id3_budget": 0.1}, {"selection": "all"})
    )
    assert ours.pop("optimizer") == 0 < usual.pop("optimizer")  # of a real run it is told by the run
    assert ours == usual and min(usual.values()) > 0


def test_a_best_value_at_an_end_of_the_grid_is_marked():
    def trial(arm: str, rate: float, loss: float) -> dict:
        return {"arm": arm, "key": "learning_rate", "values": {"learning_rate": rate}, "loss": loss}

    trials = [
        trial("a", 1e-3, 3.0),
        trial("a", 1e-2, 2.0),
        trial("a", 1e-1, 2.5),
        trial("b", 1, 2.0),
        trial("b", 2, 1.0),
    ]
    marks = [line.split(" | ")[-1].strip(" |") for line in tables.tuning_table(trials).splitlines()[2:]]
    assert marks == ["", "best", "", "", "best, at an end of the grid"]


def test_an_arms_own_settings_win_over_values_taken_over(tmp_path):
    ours, done = object.__new__(runner.Runner), []
    ours.experiment = SimpleNamespace(tuning_seed=100, measure="validation", arms={})
    ours.folder, ours.base = tmp_path, {"max_steps": 6}
    ours.files = {"tuning": "tuning.json", "test": "test.json"}
    ours.run = lambda flags, label: (
        done.append(flags) or {**{"final_validation_loss": abs(flags["score_lr"] - 10), "commit": None}}
    )
    arms = {
        "IST": Arm("IST", {"selection": "ist"}, {"learning_rate": [1e-3], "score_lr": [1, 10, 100]}),
        "mu 1000": Arm("mu 1000", {"selection": "ist", "score_lr": 1000}, {}, "IST"),
    }
    tuned, _ = runner.train_all(ours, arms, [1, 2])
    assert tuned == {"IST": {"learning_rate": 1e-3, "score_lr": 10}, "mu 1000": {"learning_rate": 1e-3}}
    for name, score_lr in (("IST", 10), ("mu_1000", 1000)):
        runs = [flags for flags in done if flags["output_dir"].parent.name == name and flags["seed"] != 100]
        assert [(run["score_lr"], run["learning_rate"]) for run in runs] == [(score_lr, 1e-3)] * 2


def test_differences_are_paired_and_their_interval_is_students():
    found = paired([0.5, 0.7, 0.6], [0.4, 0.65, 0.52])
    assert found["seeds"] == 3
    assert found["mean"] == pytest.approx((0.1 + 0.05 + 0.08) / 3)
    half = 4.302653 * found["sd"] / math.sqrt(3)  # Student's t with 2 degrees of freedom, from a table
    assert found["interval"] == pytest.approx([found["mean"] - half, found["mean"] + half])
    assert paired([1.0], [0.5])["interval"] is None


def test_parts_do_not_overlap_and_are_the_same_whatever_the_order(tmp_path):
    rows = arithmetic_rows(50, seed=1, held_out=False)
    seen = []
    for name, given in (("a", rows), ("b", rows[::-1] + rows[:5])):
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        train_file = [str(tmp_path / f"{name}.json")]
        files = write_parts(train_file, None, {"test": 9, "tuning": 7}, tmp_path / name)
        parts = {part: [row["instruction"] for row in json.loads(file.read_text())] for part, file in files.items()}
        assert sorted(chain(*parts.values())) == sorted(row["instruction"] for row in rows)
        assert (len(parts["test"]), len(parts["tuning"])) == (9, 7)
        seen.append(parts)
    assert seen[0] == seen[1]
    for row in rows[:3]:  # that stand in the test file are not trained on
        assert row["instruction"] in chain(*seen[0].values())
    (tmp_path / "test.json").write_text(json.dumps(rows[:3]))
    files = write_parts(train_file, [str(tmp_path / "test.json")], {"test": 3, "tuning": 7}, tmp_path / "d")
    parts = {part: [row["instruction"] for row in json.loads(file.read_text())] for part, file in files.items()}
    assert len(parts["test"]) == 3 and len(parts["tuning"]) == 7 and len(parts["train"]) == 40
    assert not set(parts["test"]) & {*parts["tuning"], *parts["train"]}
    # Of several test files each gives its share, and is a file of its own.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(arithmetic_rows(8, seed=len(name), held_out=True)))
    test_file = [str(tmp_path / name / "test.json") for name in ("one", "two")]
    files = write_parts(train_file, test_file, {"test": 9, "tuning": 7}, tmp_path / "e")
    one, two, test = (json.loads(files[name].read_text()) for name in ("test/one", "test/two", "test"))
    assert (len(one), len(two)) == (4, 4) and test == one + two
    with pytest.raises(UsageError, match="too few rows"):
        write_parts(train_file, None, {"test": 9, "tuning": 41}, tmp_path / "c")
    with pytest.raises(UsageError, match="other rows"):
        write_parts(train_file, None, {"test": 8, "tuning": 7}, tmp_path / "b")


def test_a_question_with_other_spaces_is_in_one_part_only(tmp_path):
    def row(i: int, words: str) -> dict:
        return {"instruction": words.format(i), "output": str(i)}

    wordings = ("A drawer holds {} pens . How many ?", "a drawer  holds {} pens. How many?")
    (tmp_path / "rows.json").write_text(json.dumps([row(i, words) for words in wordings for i in range(30)]))
    files = write_parts([str(tmp_path / "rows.json")], None, {"test": 10, "tuning": 10}, tmp_path / "out")
    answers = [row["output"] for file in files.values() for row in json.loads(file.read_text())]
    assert sorted(answers) == sorted(map(str, range(30)))


def test_when_it_is_stopped_it_stops_its_runs(tiny, many_rows, write, tmp_path):
    ours = runner.Runner(
        runner.Where(str(tiny), tmp_path / "out", jobs=1), Experiment.read(write(), None), {"train": many_rows}
    )
    with ThreadPoolExecutor(2) as pool:
        argv = ["-c", "import time; time.sleep(600)"]
        runs = [pool.submit(ours._process, argv, tmp_path / "a" / name) for name in "bc"]
        while not ours.processes:
            time.sleep(0.01)
        ours.stop()
        for run in runs:  # the one that was running, and the one that waited for its place
            with pytest.raises(UsageError, match="stopped; the same command goes on from here"):
                run.result(timeout=60)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_plain_text_is_cut_into_rows_and_nothing_of_it_is_lost(tmp_path):
    text = " ".join(f"word{i}" for i in range(500))
    (tmp_path / "text.txt").write_text(text)
    rows = rows_of("train_file", [str(tmp_path / "text.txt")])
    joined = "".join(row["output"] for row in rows)
    assert text.startswith(joined.rstrip())
    assert len(text) - len(joined) < PIECE
    assert all(PIECE <= len(row["output"]) < PIECE + 10 for row in rows)
    with pytest.raises(UsageError, match="--train_file needs rows, for answer_texts; got"):
        rows_of("train_file", [str(tmp_path / "text.txt")], answer_texts=True)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"arms": {"a": {"tuned_as": "b"}}, "pairs": []}, {}, "no arm 'b'; it has a"),
        ({}, {"arms": "LORA"}, "no arm 'LORA'; it has LoRA, short, IST, fixed"),
        ({"pairs": [["IST", "Lora"]]}, {}, "pairs has no arm 'Lora'; it has LoRA, short, IST, fixed"),
        ({"seeds": [1, 100]}, {}, "seeds must be a list of numbers without that of tuning; got [1, 100]"),
        ({"seeds": 1}, {}, "seeds must be"),
        ({"split": {"test": 3}}, {}, "split must name test and tuning rows"),
        ({"arms": {"a": {"tune": {"learning_rate": ["2e-4"]}}}, "pairs": []}, {}, "2e-4 is text in YAML: write 2.0e-4"),
        (
            {"arms": {"a": {"tune": {"score_rule": ["paper"]}}}, "pairs": []},
            {},
            "tune score_rule over a list of n",
        ),
        (
            {"arms": {"a": {"tune": {"learning_rate": 1.0}}}, "pairs": []},
            {},
            "tune learning_rate over a list of n",
        ),
        (
            {"arms": FILE["arms"] | {"b": {"tuned_as": "short"}}},
            {},
            "b cannot be tuned_as short, which takes from another",
        ),
        ({"arms": FILE["arms"] | {"b": {"learning_rate": 1e-3}}}, {}, "b sets learning_rate and tunes it"),
        (
            {"arms": FILE["arms"] | {"b": {"lisa_interval": 3}}},
            {"model_name_or_path": "TINY"},
            "b: --lisa_interval must be",
        ),
        (
            {"arms": FILE["arms"] | {"r": {"selection": "random"}, "b": {"tuned_as": "r", "top_of": "r"}}},
            {},
            "b cannot be top_of r, which learns no importance",
        ),
        *(
            (
                {"arms": {name: {}}, "pairs": []},
                {},
                f"it must be a text without / and \\, and not empty or ..; got {name!r}",
            )
            for name in ("../x", "/x", "..", ".", "", " ", "a/b", "a\\b", 3, None)
        ),
        (
            {"arms": {"IST 8": {}, "ist-8": {}}, "pairs": []},
            {},
            "the arms 'IST 8' and 'ist-8' would have the same file",
        ),
        ({"recipe": None}, {}, "recipe must hold `key: value` lines; got None"),
        ({"evaluate": [1]}, {}, "evaluate must hold `key: value` lines; got [1]"),
        ({"split": {"test": -3, "tuning": 6}}, {}, "split must name test and tuning rows"),
        ({"split": 7}, {}, "is not like the files of launch/experiments/"),
        ({"pairs": [["IST"]]}, {}, "is not like the files of launch/experiments/"),
        ({"pairs": 3}, {}, "is not like the files of launch/experiments/"),
        ({"arms": [1]}, {}, "is not like the files of launch/experiments/"),
        ({"tuning": {"seed": 1, "grid": 3}}, {}, "is not like the files of launch/experiments/"),
        ({"tuning": None}, {}, "is not like the files of launch/experiments/"),
        ({}, {"experiment": "none.yaml"}, "none.yaml: No such file"),
        ({}, {"readme": ROOT / "README.md"}, "--readme needs --publish"),
        ({}, {"jobs": -1}, "jobs must be"),
        ({}, {"train_file": "none.json"}, "--train_file none.json: no such file"),
    ],
)
def test_bad_input_is_one_line(tiny, many_rows, write, tmp_path, monkeypatch, changes, options, message):
    monkeypatch.setattr(runner.Runner, "_process", lambda *args: pytest.fail("a run was started"))
    values = {"train_file": many_rows, "output_dir": tmp_path / "out", "experiment": write(**changes)} | options
    values["model_name_or_path"] = tiny if "model_name_or_path" in values else "none"
    with pytest.raises(UsageError) as refusal:
        run.main(arguments(**values))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_some_arms_come_with_those_they_depend_on(write):
    chosen = Experiment.read(write(), ["fixed", "short"])
    assert list(chosen.arms) == ["LoRA", "short", "IST", "fixed"]
    assert list(Experiment.read(write(), ["IST"]).arms) == ["IST"]
    assert Experiment.read(write(), ["IST"]).pairs == []


@pytest.mark.parametrize("file", sorted((ROOT / "launch/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_experiments(file):
    read = Experiment.read(str(file), None)
    assert read.arms
    for arm in read.arms.values():
        flags = read.recipe | arm.settings | {key: values[0] for key, values in arm.tune.items()}
        flags |= {"model_name_or_path": "m", "train_file": "f", "report_to": "none"}
        if arm.scores_of:  # a file that another arm's run makes
            flags["oracle_scores"] = "scores.json"
        arguments_of(flags)
