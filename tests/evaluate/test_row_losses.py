"""ist.evaluate --loss_file: the loss of each answer, against transformers' own and a validation of train_ist.py."""

import json
import os
import subprocess

import pytest
import torch
from peft import PeftModel
from support import ROOT, read_lines, reset_accelerate, warm_python
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_ist
from ist.evaluate.command import main
from ist.training.command_line import UsageError
from ist.training.encoding import encode
from ist.training.word_problems import arithmetic_rows

ROWS = arithmetic_rows(13, seed=5, held_out=True)


@pytest.fixture
def trained(arguments, tmp_path):
    """(run, file of rows that it validated on): one step, so that the adapter says something."""
    file = tmp_path / "held.json"
    file.write_text(json.dumps(ROWS))
    given = {"validation_file": file, "completion_only_loss": True, "max_steps": 3, "eval_steps": 3}
    reset_accelerate()
    assert train_ist.main(arguments(**given)) == 0
    reset_accelerate()
    return tmp_path / "run", file


def flags_of(tiny, run, file, out, *more) -> list[str]:
    given = {"model_name_or_path": tiny, "adapter": run / "adapter", "loss_file": file, "output_dir": out}
    return [str(part) for key, value in given.items() for part in (f"--{key}", value)] + list(map(str, more))


@torch.no_grad()
def test_the_loss_of_each_answer(trained, tiny, tmp_path):
    run, file = trained
    assert main(flags_of(tiny, run, file, tmp_path / "one", "--batch_size", 4)) == 0
    lines = read_lines(tmp_path / "one/held.losses.jsonl")
    assert [line["row"] for line in lines] == list(range(13))

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), run / "adapter").eval()
    for row, line in zip(ROWS, lines, strict=True):
        one = {key: torch.tensor([ids]) for key, ids in encode(row, "alpaca", tokenizer, 1024, True).items()}
        tokens = int((one["labels"][:, 1:] != -100).sum())
        assert line["tokens"] == tokens
        assert line["loss"] == pytest.approx(tokens * model(**one).loss.item(), rel=1e-5)

    summary = json.loads((tmp_path / "one/summary.json").read_text())["losses"]["held"]
    assert summary["rows"] == 13 and summary["tokens"] == sum(line["tokens"] for line in lines)
    validated = json.loads((run / "run.json").read_text())["final_validation_loss"]
    assert summary["loss"] == pytest.approx(validated, rel=1e-6)


def test_ranks_and_batches_change_nothing_and_it_goes_on(trained, tiny, tmp_path):
    run, file = trained
    assert main(flags_of(tiny, run, file, tmp_path / "one")) == 0
    command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/ddp.yaml", "-m", "ist.evaluate"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": warm_python()}
    flags = flags_of(tiny, run, file, tmp_path / "two", "--batch_size", 3)
    result = subprocess.run([*command, *flags], cwd=ROOT, check=False, env=environment, capture_output=True, text=True,
                            timeout=240)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (read_lines(tmp_path / name / "held.losses.jsonl") for name in ("one", "two"))
    assert [line["tokens"] for line in one] == [line["tokens"] for line in two]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)

    there = tmp_path / "one/held.losses.jsonl"
    before = there.stat().st_mtime_ns
    reset_accelerate()
    assert main(flags_of(tiny, run, file, tmp_path / "one")) == 0  # nothing is measured again
    assert there.stat().st_mtime_ns == before
    file.write_text(json.dumps(ROWS[:5]))
    reset_accelerate()
    with pytest.raises(UsageError, match=r"holds results of another held.losses"):
        main(flags_of(tiny, run, file, tmp_path / "one"))
    file.write_text(json.dumps(ROWS))
    there.write_text("\n".join(there.read_text().splitlines()[:4]) + "\n")
    reset_accelerate()
    with pytest.raises(UsageError, match=r"held.losses.jsonl does not hold 13 whole rows. Remove it"):
        main(flags_of(tiny, run, file, tmp_path / "one"))


def test_rows_that_cannot_be_measured(trained, tiny, tmp_path):
    run, file = trained
    (tmp_path / "other").mkdir()
    (tmp_path / "other/held.json").write_text(json.dumps(ROWS))
    (tmp_path / "long.json").write_text(json.dumps([*ROWS, {"instruction": "why " * 500, "output": "So."}]))
    (tmp_path / "question.json").write_text('[{"instruction": "Why?"}]')
    for given, more, message in (
        (
            file,
            ["--max_length", "40"],
            r"--loss_file .*held.json: 13 rows have nothing|no row has an answer left within",
        ),
        (tmp_path / "nowhere.json", [], "--loss_file .*nowhere.json: no such file"),
        (tmp_path / "question.json", [], "--loss_file .*question.json"),
        (file, ["--loss_file", file, tmp_path / "other/held.json"], "more than one file named held"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            main(flags_of(tiny, run, given, tmp_path / "out", *more))
        assert "\n" not in str(error.value)
        reset_accelerate()
