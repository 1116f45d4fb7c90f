"""Arms beside each other: what is tuned, what is compared, and that nothing is run twice."""

import copy
import json
import math
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, reset_accelerate
from peft import PeftModel
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForCausalLM

import train_ist
from ist import experiment
from ist.evaluate import command as evaluate
from ist.loss import token_loss_sum
from ist.training.command_line import UsageError
from ist.training.data import collate
from ist.training.word_problems import arithmetic_rows

FILE = {
    "recipe": {
        **{"max_steps": 6, "eval_steps": 2, "warmup_steps": 1, "prompt_template": "none"},
        **{"completion_only_loss": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0, "update_interval": 2},
    },
    "split": {"test": 10, "tuning": 6},
    "tuning": {"seed": 100, "grid": {"learning_rate": [2e-2]}},
    "seeds": [1, 2],
    "arms": {
        "LoRA": {"selection": "all"},
        "short": {"selection": "all", "max_steps": 2, "tuned_as": "LoRA"},
        "IST": {
            **{"selection": "ist", "trained_layers": 2, "kept_layers": 2},
            "tune": {"learning_rate": [1e-3, 2e-2], "score_lr": [10, 100]},
        },
        "fixed": {"selection": "fixed", "trained_layers": 2, "tuned_as": "LoRA", "top_of": "IST"},
    },
    "pairs": [["IST", "LoRA"], ["fixed", "IST"]],
    "evaluate": {"num_beams": 1, "max_new_tokens": 4},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes) -> str:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(FILE | changes, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def many_rows(tmp_path) -> Path:
    file = tmp_path / "many.json"
    file.write_text(json.dumps(arithmetic_rows(80, seed=1, held_out=False)))
    return file


def arguments(**values) -> list[str]:
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


def saved_by_hooks(folder: Path, adapter: Path, rows: int, tokens: int) -> int:
    """Bytes that a forward of a loaded model with a trained adapter really saves, weights apart."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter, is_trainable=True)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    ids = torch.ones(rows, tokens, dtype=torch.long)
    batch = collate(ids.tolist(), ids.tolist(), 0)
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()
        token_loss_sum(model, batch)
    batch_own = {t.untyped_storage().data_ptr() for t in batch.values()}
    return sum(storage.nbytes() for pointer, storage in seen.items() if pointer not in own | batch_own)


class Inline:
    """An executor that runs what it is given at once, in this thread: signals are for the main one."""

    def __init__(self, jobs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, function, *args) -> Future:
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def few_processes(monkeypatch):
    """The first run is a process of its own, as for users; the others are run in this one, without its start."""
    real, started = experiment.Runner._process, []

    def process(runner, argv, where, **options):
        started.append(argv)
        if len(started) == 1:
            return real(runner, argv, where, **options)
        reset_accelerate()
        main = train_ist.main if argv[0] == "train_ist.py" else evaluate.main
        assert main([part for part in argv if part not in ("train_ist.py", "-m", "ist.evaluate")]) == 0
        reset_accelerate()

    def take_turns(arms, steps, parts, say):
        """IST's steps take 3 seconds, those of the others 2."""
        took = {name: 3.0 if flags["selection"] == "ist" else 2.0 for name, flags in arms.items()}
        assert steps == 30 and not parts and not any("output_dir" in flags for flags in arms.values())
        return {name: {"total": took[name], "turns": [took[name]] * 20, "stride": 1} for name in arms}

    monkeypatch.setattr(experiment, "take_turns", take_turns)
    monkeypatch.setattr(experiment.Runner, "_process", process)
    monkeypatch.setattr(experiment, "ThreadPoolExecutor", Inline)
    return started


def test_a_whole_experiment(tiny, many_rows, write, tmp_path, capsys, few_processes):
    folder = tmp_path / "out"
    argv = arguments(model_name_or_path=tiny, train_file=many_rows, output_dir=folder, experiment=write(), jobs=2)
    argv += [*arguments(publish=tmp_path / "published.json"), "--arms", "LoRA", "IST", "fixed"]
    assert experiment.main(argv) == 0
    printed = capsys.readouterr().out
    result = json.loads((folder / "experiment.json").read_text())

    # Tuning: the learning rate, then mu at the best one, on the tuning rows and seed; the lowest loss is taken.
    trials = result["trials"]
    assert [(t["arm"], t["key"], t["values"][t["key"]]) for t in trials] == [
        *(("LoRA", "learning_rate", 2e-2), ("IST", "learning_rate", 2e-2), ("IST", "learning_rate", 1e-3)),
        *(("IST", "score_lr", 100), ("IST", "score_lr", 10)),
    ]
    assert len({t["values"]["learning_rate"] for t in trials[3:]}) == 1
    for turn in (trials[1:3], trials[3:]):
        best = min(turn, key=lambda t: t["loss"])["values"]
        assert trials[3]["values"]["learning_rate"] == best["learning_rate"]
    assert result["arms"]["IST"]["tuned"] == best
    assert result["arms"]["fixed"]["tuned"] == result["arms"]["LoRA"]["tuned"] == {"learning_rate": 2e-2}

    # Every number is that of the runs' own files.
    runs = {path.parent: json.loads(path.read_text()) for path in folder.glob("runs/*/*/run.json")}
    assert len(few_processes) == len(runs) + 7
    assert len(runs) == 4 + 6  # the run of IST's first mu is that of its best learning rate
    for name, arm in result["arms"].items():
        for one in arm["runs"]:
            (path,) = (
                path
                for path, run in runs.items()
                if path.parent.name == name
                and run["configuration"]["seed"] == one["seed"]
                and run["configuration"]["learning_rate"] == arm["tuned"]["learning_rate"]
            )
            assert one["validation"][-1][1] == runs[path]["final_validation_loss"]
            assert one["trained_counts"] == runs[path]["trained_counts"]
            assert runs[path]["configuration"]["validation_file"] == [str(folder / "data/test.json")]
            assert one["exact"] == json.loads((path / "evaluation/summary.json").read_text())["average"]
    parts = {name: json.loads((folder / f"data/{name}.json").read_text()) for name in ("train", "tuning", "test")}
    assert {name: len(part) for name, part in parts.items()} == {"train": 64, "tuning": 6, "test": 10}

    # The fixed layers are those that the tuned run of IST found the most important.
    tuned = experiment.slug(result["arms"]["IST"]["tuned"])
    lines = (folder / f"runs/IST/{tuned}-seed=100/importance.jsonl").read_text().splitlines()
    scores = json.loads(lines[-1])["scores"]
    top = sorted(torch.tensor(scores).topk(2).indices.tolist())
    assert result["arms"]["fixed"]["settings"]["fixed_layers"] == top
    steps = [6 if i in top else 0 for i in range(4)]
    assert all(run["trained_counts"] == steps for run in result["arms"]["fixed"]["runs"])

    # Bytes: as hooks count them on the model itself, all layers trained.
    configuration = next(run["configuration"] for run in runs.values())
    tokens = round(configuration["train_tokens"] / configuration["train_rows"])
    adapter = next(path for path, run in runs.items() if run["configuration"]["selection"] == "all") / "adapter"
    rows = configuration["per_device_train_batch_size"]
    saved = {name: arm["bytes"]["saved"] for name, arm in result["arms"].items()}
    trained = sum(p.numel() for p in load_file(adapter / "adapter_model.safetensors").values())
    assert result["arms"]["LoRA"]["bytes"]["gradients"] == 4 * trained
    assert result["arms"]["LoRA"]["bytes"]["optimizer"] == pytest.approx(8 * trained, rel=0.02)  # and step numbers
    assert result["arms"]["IST"]["bytes"]["gradients"] == 4 * trained / 2
    assert saved["LoRA"] == pytest.approx(saved_by_hooks(tiny, adapter, rows, tokens), rel=0.01)
    assert saved["IST"] < saved["LoRA"]

    table = printed[printed.index("| arm |") : printed.index("| paired")]
    losses = [run["validation"][-1][1] for run in result["arms"]["IST"]["runs"]]
    assert f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}" in table
    assert table in (folder / "results.md").read_text()
    trials = (folder / "tuning.md").read_text().splitlines()[2:]
    assert len(trials) == len(result["trials"]) and sum("best" in line for line in trials) >= 2
    # Seconds are beside the first arm; arms whose steps are alike are timed once, and none again.
    assert [arm["step_seconds"] for arm in result["arms"].values()] == [2, 3, 2]
    assert "| 3.00 | 1.50 (1.50 … 1.50) |" in table and "of LoRA's" in table
    assert len((folder / "seconds.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "published-curves.png").stat().st_size > 10_000

    # Again: nothing is run, and the same comes out.
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()}
    reset_accelerate()
    assert experiment.main(argv) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/**/*") if path.is_file()} == before
    assert json.loads((folder / "experiment.json").read_text())["arms"] == result["arms"]

    # Somewhere else, with the results of all arms but one: that one is run, and what it needs, and the same comes out.
    def elsewhere(known: dict, *only: str, **changes) -> dict:
        reset_accelerate()
        few_processes[1:] = []
        file, other = tmp_path / "known.json", tmp_path / "elsewhere"
        file.write_text(json.dumps(known))
        values = {"model_name_or_path": tiny, "train_file": many_rows, "output_dir": other, "known": file}
        assert experiment.main([*arguments(**values, experiment=write(**changes)), *only]) == 0
        return json.loads((other / "experiment.json").read_text())

    known = result | {"arms": {name: arm for name, arm in result["arms"].items() if name != "fixed"}}
    known["arms"] |= {
        "IST": known["arms"]["IST"] | {"step_seconds": 30.0},
        "LoRA": known["arms"]["LoRA"] | {"step_seconds": 20.0},
    }
    joined = elsewhere(known, "--arms", "fixed")
    published = copy.deepcopy(joined)
    assert len(few_processes) == 1 + 1 + 2 * 2  # the tuning run that names the layers, two runs and their answers
    assert [arm.pop("step_seconds") for arm in joined["arms"].values()] == [20, 30, 20]
    for arm in chain(joined["arms"].values(), result["arms"].values()):
        arm.pop("step_seconds", None)
        for run in arm["runs"]:
            del run["folder"]
    differing = {key for key in result if joined[key] != result[key]}
    assert differing <= {"command", "date"}  # around midnight
    assert joined["earlier_commands"] == [result["command"]]
    assert list(joined["arms"]) == list(result["arms"])

    # What cannot stand beside what is run here is refused; what runs alone can tell, once they are there.
    arms, other_seed = known["arms"], {**known["arms"]["IST"], "runs": known["arms"]["IST"]["runs"][:1]}
    for wrong, changes, message in (
        (known | {"recipe": {}}, {}, "of another experiment; they differ in recipe"),
        (known | {"model": "other"}, {}, "they differ in model"),
        (known | {"tuning_seed": 7}, {}, "they differ in tuning_seed"),
        (known | {"base": {"validation": 1.02 * known["base"]["validation"]}}, {}, "is of another model: its loss is"),
        (known | {"hardware": known["hardware"] | {"cpu_cores": 3}}, {}, "seconds of other hardware"),
        (known | {"data": known["data"] | {"test": "0"}}, {}, "they differ in data"),
        (known, {"evaluate": None}, "they differ in evaluate"),
        (known | {"arms": arms | {"IST": other_seed}}, {}, "its IST has other keys or seeds"),
        (known | {"trials": known["trials"][:-1]}, {}, "its IST is tuned over other values of score_lr"),
        (known | {"arms": {"IST": arms["IST"]}}, {}, "has no LoRA, beside which"),
        (known | {"arms": arms | {"old": arms["IST"]}}, {}, "has no arm 'old'; it has LoRA, short"),
        (known | {"arms": {**arms, "fixed": {**published["arms"]["fixed"], "top_of": ""}}}, {}, "its fixed has other"),
        (known | {"arms": {**arms, "LoRA": {**arms["LoRA"], "tuned": {}}}}, {}, "its LoRA has other keys or seeds"),
        ([], {}, "is not an experiment.json"),
    ):
        with pytest.raises(UsageError, match=message):
            elsewhere(wrong, "--arms", "fixed", **changes)
        assert len(few_processes) == 1
    with pytest.raises(UsageError, match="has an arm 'IST' that is not in the experiment's file"):
        elsewhere(known, arms={"LoRA": FILE["arms"]["LoRA"]}, pairs=[])
    # With all arms there, tables and pictures are made anew, here of other pairs.
    again = elsewhere(published, "--arms", "fixed", pairs=FILE["pairs"][:1])
    assert len(few_processes) == 1 and again["pairs"] == [["IST", "LoRA"]] and again["arms"] == published["arms"]
    assert again["earlier_commands"] == [result["command"], published["command"]]


def test_a_finished_run_of_another_configuration_is_not_taken(tiny, many_rows, write, tmp_path, few_processes):
    def argv(**changes) -> list[str]:
        values = {"train_file": many_rows, "output_dir": tmp_path / "out", "model_name_or_path": tiny, "jobs": 2}
        return [*arguments(**values, experiment=write(**changes)), "--arms", "LoRA"]

    assert experiment.main(argv(evaluate=None)) == 0
    reset_accelerate()
    with pytest.raises(UsageError, match=r"another configuration: lora_alpha \(8 there, 16 here\)"):
        experiment.main(argv(evaluate=None, recipe=FILE["recipe"] | {"lora_alpha": 16}))


def commonsense_row(i: int) -> dict:
    texts = f"Answer1: {i} apples Answer2: a pear.  Answer3: Answer keys"
    instruction = f"Please choose the correct answer to the question: How many has {i}?\n\n{texts}\n\n"
    return {"instruction": instruction + "Answer format: answer1/answer2/answer3", "answer": f"answer{i % 3 + 1}"}


def test_answers_in_words(tiny, write, tmp_path, capsys, few_processes):
    outputs = [" 4 apples", " a pear.", " Answer keys"]
    row = {"instruction": "Question: How many has 4?\nAnswer:", "input": "", "output": " a pear.", "choices": outputs}
    assert experiment.in_words(commonsense_row(4), "f") == row | {"answer": " a pear."}
    asked = "Please answer the following question with true or false, question: is it so?\n\nAnswer format: true/false"
    yes = experiment.in_words({"instruction": asked, "answer": "true"}, "f")
    assert (yes["instruction"], yes["choices"]) == ("Question: is it so?\nAnswer:", [" true", " false"])
    with pytest.raises(UsageError, match="--train_file row 3: answer_texts needs rows that list their answers"):
        experiment.in_words({"instruction": "Why?", "answer": "4"}, "train_file row 3")

    file = tmp_path / "choose.json"
    file.write_text(json.dumps([commonsense_row(i) | {"output": "the correct answer is it"} for i in range(40)]))
    scoring = {"scoring": "likelihood", "batch_size": 4}
    values = {"train_file": file, "output_dir": tmp_path / "out", "model_name_or_path": tiny, "jobs": 1}
    values["experiment"] = write(answer_texts=True, evaluate=scoring, seeds=[1])
    assert experiment.main([*arguments(**values), "--arms", "LoRA"]) == 0
    result = json.loads((tmp_path / "out/experiment.json").read_text())
    (run,) = result["arms"]["LoRA"]["runs"]
    lines = [json.loads(line) for line in (Path(run["folder"]) / "evaluation/data.jsonl").read_text().splitlines()]
    chosen = {line["row"]: line["extracted"] for line in lines}
    test = json.loads((tmp_path / "out/data/test.json").read_text())
    assert all(f" {chosen[i]}" in test[i]["choices"] for i in range(10)) and len(test) == 10
    assert run["exact"] == sum(f" {chosen[i]}" == test[i]["output"] for i in range(10)) / 10
    assert "right answers, %" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch/experiments").glob("*.yaml")))
def test_the_readmes_tables_are_those_of_their_files(name):
    readme = (ROOT / "README.md").read_text()
    table = readme.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]
    file = ROOT / f"launch/results/{name}.json"
    if file.exists():
        assert table == experiment.tables(json.loads(file.read_text()))
    else:
        assert table.startswith("not run")


def test_the_arms_that_train_an_orders_ends_train_those_of_the_published_one():
    published = json.loads((ROOT / "launch/results/layers-arithmetic.json").read_text())
    order = published["directions"]["least"]["order"]  # as taken away: the ones that are missed least come first
    arms = experiment.Experiment.read(str(ROOT / "launch/experiments/arithmetic.yaml"), None).arms
    for name, layers in (("greedy 8 most", order[-8:]), ("greedy 8 least", order[:8])):
        assert arms[name].settings["fixed_layers"] == ",".join(map(str, sorted(layers)))


def test_stepwise_unmasking_saves_what_all_layers_save(tiny, rows, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags = {"model_name_or_path": tiny, "train_file": tmp_path / "rows.json", "output_dir": tmp_path / "out"}
    flags |= {"lora_dropout": 0, "report_to": "none"}
    ours, usual = (
        experiment.bytes_by_part(flags | more, [range(4)] * 2, 20)
        for more in ({"selection": "id3", "id3_budget": 0.1}, {"selection": "all"})
    )
    assert ours.pop("optimizer") == 0 < usual.pop("optimizer")  # of a real run it is told by the run
    assert ours == usual and min(usual.values()) > 0


def test_tuning_finds_the_lowest_of_a_valley():
    for count in range(1, 7):
        for lowest in range(count):
            values, tried = [10.0**i for i in range(count)], {}
            losses = {value: abs(i - lowest) + 0.1 * (i > lowest) for i, value in enumerate(values)}
            while (value := experiment.next_value(values[::-1], tried)) is not None:
                assert value not in tried
                tried[value] = losses[value]
            assert min(tried, key=tried.get) == values[lowest]
            beside = {values[i] for i in (lowest - 1, lowest + 1) if 0 <= i < count}
            assert beside <= set(tried)
            assert len(tried) <= abs(lowest - count // 2) + 3


def test_a_best_value_at_an_end_of_what_was_tried_is_marked():
    def trial(arm: str, rate: float, loss: float) -> dict:
        return {"arm": arm, "key": "learning_rate", "values": {"learning_rate": rate}, "loss": loss}

    trials = [
        trial("a", 1e-3, 3.0),
        trial("a", 1e-2, 2.0),
        trial("a", 1e-1, 2.5),
        trial("b", 1, 2.0),
        trial("b", 2, 1.0),
    ]
    marks = [line.split(" | ")[-1].strip(" |") for line in experiment.tuning_table(trials).splitlines()[2:]]
    assert marks == ["", "best", "", "", "best, at an end of what was tried"]


def test_what_an_arm_sets_itself_it_does_not_take_over(tmp_path):
    runner, done = object.__new__(experiment.Runner), []
    runner.experiment, runner.folder, runner.base = SimpleNamespace(tuning_seed=100), tmp_path, {"max_steps": 6}
    runner.files = {"tuning": "tuning.json", "test": "test.json"}
    runner.run = lambda flags, what: done.append(flags) or {"final_validation_loss": abs(flags["score_lr"] - 10)}
    arms = {
        "IST": experiment.Arm("IST", {"selection": "ist"}, {"learning_rate": [1e-3], "score_lr": [1, 10, 100]}),
        "mu 1000": experiment.Arm("mu 1000", {"selection": "ist", "score_lr": 1000}, {}, "IST"),
    }
    tuned, _ = experiment.train_all(runner, arms, [1, 2], {})
    assert tuned == {"IST": {"learning_rate": 1e-3, "score_lr": 10}, "mu 1000": {"learning_rate": 1e-3}}
    for name, score_lr in (("IST", 10), ("mu_1000", 1000)):
        runs = [flags for flags in done if flags["output_dir"].parent.name == name and flags["seed"] != 100]
        assert [(run["score_lr"], run["learning_rate"]) for run in runs] == [(score_lr, 1e-3)] * 2


def test_differences_are_paired_and_their_interval_is_students():
    one, two = {1: 0.5, 2: 0.7, 3: 0.6, 4: 9.0}, {1: 0.4, 2: 0.65, 3: 0.52}
    found = experiment.paired(one, two)
    test = stats.ttest_rel([0.5, 0.7, 0.6], [0.4, 0.65, 0.52])
    assert found["seeds"] == 3
    assert found["mean"] == pytest.approx((0.1 + 0.05 + 0.08) / 3)
    assert found["interval"] == pytest.approx([*test.confidence_interval()])
    assert experiment.paired({1: 1.0}, {1: 0.5})["interval"] is None


def test_parts_do_not_overlap_and_are_the_same_whatever_the_order(tmp_path):
    rows = arithmetic_rows(50, seed=1, held_out=False)
    seen = []
    for name, given in (("a", rows), ("b", rows[::-1] + rows[:5])):
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        args = experiment.ExperimentArguments("", "", [str(tmp_path / f"{name}.json")], str(tmp_path / name))
        files = experiment.write_parts(args, {"test": 9, "tuning": 7}, tmp_path / name)
        parts = {part: [row["instruction"] for row in json.loads(file.read_text())] for part, file in files.items()}
        assert sorted(chain(*parts.values())) == sorted(row["instruction"] for row in rows)
        assert (len(parts["test"]), len(parts["tuning"])) == (9, 7)
        seen.append(parts)
    assert seen[0] == seen[1]
    for row in rows[:3]:  # that stand in the test file are not trained on
        assert row["instruction"] in chain(*seen[0].values())
    (tmp_path / "test.json").write_text(json.dumps(rows[:3]))
    args.test_file = [str(tmp_path / "test.json")]
    files = experiment.write_parts(args, {"test": 3, "tuning": 7}, tmp_path / "d")
    parts = {part: [row["instruction"] for row in json.loads(file.read_text())] for part, file in files.items()}
    assert len(parts["test"]) == 3 and len(parts["tuning"]) == 7 and len(parts["train"]) == 40
    assert not set(parts["test"]) & {*parts["tuning"], *parts["train"]}
    # Of several test files each gives its share, and is a file of its own.
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.json").write_text(json.dumps(arithmetic_rows(8, seed=len(name), held_out=True)))
    args.test_file = [str(tmp_path / name / "test.json") for name in ("one", "two")]
    files = experiment.write_parts(args, {"test": 9, "tuning": 7}, tmp_path / "e")
    one, two, test = (json.loads(files[name].read_text()) for name in ("test/one", "test/two", "test"))
    assert (len(one), len(two)) == (4, 4) and test == one + two
    args.test_file = None
    with pytest.raises(UsageError, match="too few rows"):
        experiment.write_parts(args, {"test": 9, "tuning": 41}, tmp_path / "c")
    with pytest.raises(UsageError, match="other rows"):
        experiment.write_parts(args, {"test": 8, "tuning": 7}, tmp_path / "b")


def test_a_question_with_other_spaces_stands_in_one_part_only(tmp_path):
    def row(i: int, words: str) -> dict:
        return {"instruction": words.format(i), "output": str(i)}

    wordings = ("A drawer holds {} pens . How many ?", "a drawer  holds {} pens. How many?")
    (tmp_path / "rows.json").write_text(json.dumps([row(i, words) for words in wordings for i in range(30)]))
    args = experiment.ExperimentArguments("", "", [str(tmp_path / "rows.json")], str(tmp_path / "out"))
    files = experiment.write_parts(args, {"test": 10, "tuning": 10}, tmp_path / "out")
    answers = [row["output"] for file in files.values() for row in json.loads(file.read_text())]
    assert sorted(answers) == sorted(map(str, range(30)))


def test_a_trial_that_diverges_is_the_worst(tiny, many_rows, write, tmp_path, few_processes):
    assert experiment.next_value([1, 2, 3], {2: math.inf, 3: math.inf}) == 1
    assert experiment.next_value([1, 2, 3], {2: 0.5, 3: math.inf}) == 1
    assert experiment.lowest({2: math.inf, 1: math.inf, 3: 0.5}) == 3
    table = experiment.tuning_table(
        [
            {"arm": "a", "key": "learning_rate", "values": {"learning_rate": 1.0}, "loss": 0.5},
            {"arm": "a", "key": "learning_rate", "values": {"learning_rate": 2.0}, "loss": None},
        ]
    )
    assert "| 1.0" not in table and "diverged" in table.splitlines()[3] and "best" in table.splitlines()[2]
    values = {"train_file": many_rows, "output_dir": tmp_path / "out", "model_name_or_path": tiny, "jobs": 1}
    values["experiment"] = write(evaluate=None, tuning={"seed": 100, "grid": {"learning_rate": [1e30]}})
    for _ in range(2):  # and is not run again
        with pytest.raises(UsageError, match=r"LoRA diverges at every learning_rate that was tried: 1e\+30"):
            experiment.main([*arguments(**values), "--arms", "LoRA"])
        reset_accelerate()
    assert len(few_processes) == 1


def test_when_it_is_stopped_it_stops_its_runs(tiny, many_rows, write, tmp_path):
    args = experiment.ExperimentArguments(write(), str(tiny), [str(many_rows)], str(tmp_path / "out"), jobs=1)
    runner = experiment.Runner(args, experiment.Experiment.read(write(), None), {"train": many_rows})
    with ThreadPoolExecutor(2) as pool:
        argv = ["-c", "import time; time.sleep(600)"]
        runs = [pool.submit(runner._process, argv, tmp_path / "a" / name) for name in "bc"]
        while not runner.processes:
            time.sleep(0.01)
        runner.stop()
        for run in runs:  # the one that was running, and the one that waited for its place
            with pytest.raises(UsageError, match="stopped; the same command goes on from here"):
                run.result(timeout=60)
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_plain_text_is_cut_into_rows_and_nothing_of_it_is_lost(tmp_path):
    text = " ".join(f"word{i}" for i in range(500))
    (tmp_path / "text.txt").write_text(text)
    rows = experiment.rows_of("train_file", [str(tmp_path / "text.txt")])
    joined = "".join(row["output"] for row in rows)
    assert text.startswith(joined.rstrip())
    assert len(text) - len(joined) < experiment.PIECE
    assert all(experiment.PIECE <= len(row["output"]) < experiment.PIECE + 10 for row in rows)
    with pytest.raises(UsageError, match="--train_file needs rows, for answer_texts; got"):
        experiment.rows_of("train_file", [str(tmp_path / "text.txt")], answer_texts=True)


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
        ({"tuning": None}, {}, "is not like the files of launch/experiments/"),
        ({}, {"experiment": "none.yaml"}, "none.yaml: No such file"),
        ({}, {"readme": ROOT / "README.md"}, "--readme needs --publish"),
        ({}, {"jobs": -1}, "jobs must be"),
        ({}, {"train_file": "none.json"}, "--train_file none.json: no such file"),
    ],
)
def test_bad_input_is_one_line(tiny, many_rows, write, tmp_path, monkeypatch, changes, options, message):
    monkeypatch.setattr(experiment.Runner, "_process", lambda *args: pytest.fail("a run was started"))
    values = {"train_file": many_rows, "output_dir": tmp_path / "out", "experiment": write(**changes)} | options
    values["model_name_or_path"] = tiny if "model_name_or_path" in values else "none"
    with pytest.raises(UsageError) as refusal:
        experiment.main(arguments(**values))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_some_arms_come_with_what_they_take_over(write):
    chosen = experiment.Experiment.read(write(), ["fixed", "short"])
    assert list(chosen.arms) == ["LoRA", "short", "IST", "fixed"]
    assert list(experiment.Experiment.read(write(), ["IST"]).arms) == ["IST"]
    assert experiment.Experiment.read(write(), ["IST"]).pairs == []


def test_a_run_that_fails_is_told_with_its_log(tiny, many_rows, write, tmp_path):
    path = write(recipe=FILE["recipe"] | {"max_length": 2})
    argv = arguments(model_name_or_path=tiny, train_file=many_rows, output_dir=tmp_path / "out", experiment=path)
    with pytest.raises(UsageError, match=r"exit code 2; .*\.log ends: error: .*"):
        experiment.main([*argv, "--jobs", "1"])
    assert len(list(tmp_path.glob("out/runs/*/*.log"))) == 1  # no other run was begun


@pytest.mark.parametrize("file", sorted((ROOT / "launch/experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_experiments(file):
    read = experiment.Experiment.read(str(file), None)
    assert read.arms
    for arm in read.arms.values():
        flags = read.recipe | arm.settings | {key: values[0] for key, values in arm.tune.items()}
        flags |= {"model_name_or_path": "m", "train_file": "f", "report_to": "none"}
        experiment.arguments_of(flags)
