"""PEFT's method comparison with IST, on a tiny model."""

import json

import pytest
from support import reset_accelerate

import train_ist
from ist.evaluate.command import main as evaluate
from ist.training.command_line import UsageError
from ist.training.word_problems import arithmetic_rows
from launch.experiments import method_comparison


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Half of 8 is 4.\n#### 4", 4.0),
        ("So it is $4^2$. The answer is: 16", 16.0),
        ("The answer is 3. No: The final answer is 20/14.", 20 / 14),
        ("The answer is 50%.\nThat is all.", 50.0),
        ("The answer is: 1/0", "1/0"),
        ("The answer is blue!", "blue"),
        ("It is 4", None),
    ],
)
def test_answers_as_the_protocol_reads_them(text, answer):
    assert method_comparison.answer_of(text) == answer


@pytest.fixture
def argv(tiny, tmp_path, monkeypatch):
    """A command line of small files; its processes are run in this one."""
    started = []

    def run(argv, log):
        started.append(argv)
        reset_accelerate()
        main = train_ist.main if argv[0] == "train_ist.py" else evaluate
        assert main([part for part in argv if part not in ("train_ist.py", "-m", "ist.evaluate")]) == 0
        reset_accelerate()

    monkeypatch.setattr(method_comparison, "run", run)
    rows = [(row["instruction"], f"{row['output']}\n#### {row['answer']}") for row in arithmetic_rows(40, 1, False)]
    train = [{"query": asked, "response": answer, "type": "x"} for asked, answer in rows[:30]]
    train.append({"query": "long " * 300, "response": "#### 1"})
    test = [{"question": asked, "answer": answer} for asked, answer in rows[30:]]
    for name, lines in (("train", train), ("test", test), ("wiki", [{"text": "Some words. " * 9}] * 3)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {f"{name}_file": tmp_path / f"{name}.jsonl" for name in ("train", "test", "wiki")}
    given |= {"model_name_or_path": tiny, "output_dir": tmp_path / "out", "max_steps": 4, "dtype": "float32"}
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)], started


def test_the_comparison_is_that_of_its_runs(argv, tmp_path, capsys):
    flags, started = argv
    assert method_comparison.main([*flags, "--max_test_rows", "6"]) == 0
    table, out = capsys.readouterr().out, tmp_path / "out"
    assert len(started) == 1 + 2 * 3 and len((out / "train.jsonl").read_text().splitlines()) == 30
    base = json.loads((out / "base/summary.json").read_text())["losses"]["wiki"]["loss"]
    for name in ("LoRA", "random", "IST"):
        result = json.loads((out / f"{name.lower()}.json").read_text())
        run = json.loads((out / name.lower() / "run.json").read_text())
        settings, last = result["run_info"]["train_config"], result["train_info"]["metrics"][-1]
        assert settings["weight_decay"] == 0.1 and settings["lr_scheduler_type"] == "cosine"
        assert sorted(result["run_info"]["peft_config"]["target_modules"]) == ["q_proj", "v_proj"]
        assert not settings["completion_only_loss"] and settings["selection"] == {"LoRA": "all"}.get(name, name.lower())
        after = json.loads((out / name.lower() / "evaluation/summary.json").read_text())["losses"]["wiki"]["loss"]
        assert last["forgetting"] == pytest.approx(after - base) and last["step"] == run["steps"] == 4
        assert 0 <= last["test accuracy"] <= 1 and result["train_info"]["train_time"] > 0
        assert f"| {name} |" in table
    assert (out / "comparison.md").read_text().strip() in table
    # Again: nothing is run.
    assert method_comparison.main([*flags, "--max_test_rows", "6"]) == 0
    assert len(started) == 7


def test_files_that_do_not_suit(argv, tmp_path):
    flags, started = argv
    for more, message in (
        (["--test_file", tmp_path / "wiki.jsonl"], "--test_file needs a question and a worked answer"),
        (["--wiki_file", tmp_path / "test.jsonl"], "--wiki_file .*test.jsonl: row 0 needs .* text; it has question"),
        (["--wiki_file", tmp_path / "train.jsonl"], "--wiki_file .*row 0 needs .* text; it has"),
        (["--arms", "LISA"], "--arms has 'LISA'; known are LoRA, random, IST"),
        (["--max_steps", "0"], "--max_steps must be 1 or more"),
    ):
        with pytest.raises(UsageError, match=message):
            method_comparison.main([*flags, *map(str, more)])
    assert not started
