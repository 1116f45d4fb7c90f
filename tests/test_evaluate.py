"""Exact answers: extraction, padding that changes nothing, and the adapter that is really used."""

import json

import pytest
from conftest import read_lines

from ist.config import UsageError
from ist.data import arithmetic_rows
from ist.evaluate import extract_number, main


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 3 = 5. The answer is 5.", 5),
        ("The answer is -12", -12),
        ("That makes 1,250 eggs.", 1250),
        ("3.50 dollars", 3.5),
        ("5 apples and 7 pears", 7),
        ("no idea", None),
        ("", None),
    ],
)
def test_extract_number(text, number):
    assert extract_number(text) == number


def test_batches_change_nothing_and_the_adapter_does(tiny, train, tmp_path):
    rows = arithmetic_rows(7, 0, held_out=True)
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert train(max_steps=30, learning_rate=0.05) == 0
    outputs = {}
    for name, batch_size, adapter in (("one", 1, True), ("all", 7, True), ("base", 7, False)):
        flags = ["--adapter", str(tmp_path / "run/adapter")] if adapter else []
        flags += ["--batch_size", str(batch_size), "--max_new_tokens", "12", "--num_beams", "2"]
        flags += ["--model_name_or_path", str(tiny), "--test_file", str(tmp_path / "test.json")]
        assert main([*flags, "--output_dir", str(tmp_path / name)]) == 0
        lines = read_lines(tmp_path / name / "test.jsonl")
        assert [line["gold"] for line in lines] == [float(row["answer"]) for row in rows]
        outputs[name] = [line["output"] for line in lines]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert summary["right"] == sum(line["right"] for line in lines)
    assert outputs["one"] == outputs["all"]
    assert outputs["base"] != outputs["all"]


def test_rows_without_a_number_are_refused(tiny, tmp_path):
    (tmp_path / "t.json").write_text(json.dumps([{"instruction": "a", "output": "b", "answer": "answer1"}]))
    with pytest.raises(UsageError, match="a number in every row"):
        main(["--model_name_or_path", str(tiny), "--test_file", str(tmp_path / "t.json"), "--output_dir", "x"])
