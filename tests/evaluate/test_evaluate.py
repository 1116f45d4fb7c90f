"""Evaluation: extraction on a table of outputs, batches and ranks that change nothing, runs that go on, bad input."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from support import ROOT, make_tiny, read_lines, tiny_config, warm_python
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from ist.evaluate.answers import LABELS, answers_of, choices, extract_label, extract_letter, extract_number
from ist.evaluate.answers import task_name as name_of
from ist.evaluate.command import main
from ist.evaluate.scorer import windows
from ist.report.statistics import wilson
from ist.training.command_line import UsageError
from ist.training.encoding import make_prompt
from ist.training.word_problems import arithmetic_rows

BOOLS, SOLUTIONS, ANSWERS, ENDINGS, OPTIONS = LABELS
OUTPUTS = [  # (labels, or letter or number; output; answer that LLM-Adapters' scripts read from it)
    (BOOLS, "the correct answer is true", "true"),
    (BOOLS, "the correct answer is false", "false"),
    (BOOLS, "true", "true"),
    (BOOLS, "false.", "false"),
    (BOOLS, "it is true, not false", "true"),
    (BOOLS, "not false but true", "false"),
    (BOOLS, "True", None),
    (BOOLS, "FALSE", None),
    (BOOLS, "untrue", "true"),
    (BOOLS, "yes", None),
    (BOOLS, "", None),
    (BOOLS, "the correct answer is", None),
    (BOOLS, "\n\nfalse\n\n### Instruction:\ntrue", "false"),
    (SOLUTIONS, "the correct answer is solution1", "solution1"),
    (SOLUTIONS, "solution2", "solution2"),
    (SOLUTIONS, "solution2 or solution1", "solution2"),
    (SOLUTIONS, "solution 1", None),
    (SOLUTIONS, "Solution1", None),
    (SOLUTIONS, "solution3", None),
    (SOLUTIONS, "resolution1", "solution1"),
    (SOLUTIONS, "solution12", "solution1"),
    (ANSWERS, "the correct answer is answer1", "answer1"),
    (ANSWERS, "the correct answer is answer5.", "answer5"),
    (ANSWERS, "answer4answer2", "answer4"),
    (ANSWERS, "answer", None),
    (ANSWERS, "answer 3", None),
    (ANSWERS, "Answer3", None),
    (ANSWERS, "the answer is 3", None),
    (ANSWERS, "myanswer1word", "answer1"),
    (ANSWERS, "answer10", "answer1"),
    (ANSWERS, "answer6", None),
    (ANSWERS, "answer0, then answer2", "answer2"),
    (ANSWERS, "'answer2'", "answer2"),
    (ENDINGS, "the correct answer is ending4", "ending4"),
    (ENDINGS, "ending1\nending2", "ending1"),
    (ENDINGS, "bending2", "ending2"),
    (ENDINGS, "ending5", None),
    (ENDINGS, "Ending3", None),
    (OPTIONS, "the correct answer is option1", "option1"),
    (OPTIONS, "option2option1", "option2"),
    (OPTIONS, "adoption1", "option1"),
    (OPTIONS, "options", None),
    ("letter", "The answer is (C).", "C"),
    ("letter", "B", "B"),
    ("letter", "answer: d", None),
    ("letter", "A: the distance is 5 km. The answer is (D).", "A"),
    ("letter", "Because 3 > 2, E", "B"),
    ("letter", "the answer is f, F or G", None),
    ("letter", "", None),
    ("number", "2 + 3 = 5. The answer is 5.", 5),
    ("number", "The answer is -12", -12),
    ("number", "The answer is -12.50 dollars", -12.5),
    ("number", "That makes 1,250 eggs.", 1250),
    ("number", "1,234,567.89", 1234567.89),
    ("number", "3.50 dollars", 3.5),
    ("number", "$7", 7),
    ("number", "50%", 50),
    ("number", "5 apples and 7 pears", 7),
    ("number", "10-4", -4),
    ("number", "x = .5", 5),
    ("number", "5.", 5),
    ("number", "3/4", 4),
    ("number", "1e3", 3),
    ("number", "the answer is 12 km/h in 2 hours", 2),
    ("number", "seven", None),
    ("number", "no idea", None),
    ("number", "", None),
]


@pytest.mark.parametrize(("kind", "output", "expected"), OUTPUTS)
def test_extraction(kind, output, expected):
    extract = {"letter": extract_letter, "number": extract_number}.get(kind) or extract_label(kind)
    assert extract(output) == expected


def test_there_are_enough_outputs():
    assert len(OUTPUTS) >= 60


def rows_of(*answers, instruction="Choose. Answer format: answer1/answer2/answer3") -> Dataset:
    return Dataset.from_list([{"instruction": instruction, "answer": answer} for answer in answers])


def test_the_format_follows_from_the_rows():
    assert answers_of(rows_of("true", "false"), "f").labels == BOOLS
    assert answers_of(rows_of("answer1", "answer3"), "f").labels == ANSWERS
    assert answers_of(rows_of("A", "E"), "f").kind == "letter"
    numbers = answers_of(rows_of("-3", "1,250.5"), "f")
    assert numbers.gold == [-3, 1250.5]
    assert numbers.right(1250.5005, 1)
    assert not numbers.right(1250.502, 1)
    assert not numbers.right(None, 0)
    with pytest.raises(UsageError, match=r"answers are of no known task.* got perhaps, true"):
        answers_of(rows_of("true", "perhaps"), "f")
    with pytest.raises(UsageError, match=r"needs a question .* and an answer"):
        answers_of(Dataset.from_list([{"question": "?"}]), "f")
    assert (name_of("a/boolq/test.json"), name_of("a/boolq.json"), name_of("x/gsm8k.jsonl")) == (
        "boolq",
        "boolq",
        "gsm8k",
    )


def test_the_choices_are_those_that_an_instruction_lists():
    three = answers_of(rows_of("answer1"), "f")
    assert choices("Choose. Answer format: answer1/answer2/answer3", three) == ["answer1", "answer2", "answer3"]
    assert choices("answer1 is a word here", three) == list(ANSWERS)
    letters = answers_of(rows_of("A"), "f")
    assert choices("Answer Choices: (A) 1 (B) 2 (C) 3", letters) == ["A", "B", "C"]


@pytest.mark.parametrize(  # Newcombe 1998, table I: the score method without continuity correction
    ("right", "rows", "low", "high"), [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]
)
def test_the_interval_is_wilsons(right, rows, low, high):
    assert wilson(right, rows) == pytest.approx((low, high), abs=5e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, rows):
    """A tiny model, an adapter for it, and the files of three tasks."""
    from support import reset_accelerate

    import train_ist

    folder = tmp_path_factory.mktemp("evaluation")
    tiny = make_tiny(folder / "tiny", rows)
    held_out = arithmetic_rows(13, 0, held_out=True)
    (folder / "sums.json").write_text(json.dumps(held_out))
    form = "Answer format: answer1/answer2/answer3"
    choose = [{"instruction": f"{row['instruction']} {form}", "output": f"the correct answer is answer{i % 3 + 1}",
               "answer": f"answer{i % 3 + 1}"} for i, row in enumerate(held_out)]  # fmt: skip
    (folder / "choose").mkdir()
    (folder / "choose/test.json").write_text(json.dumps(choose))
    (folder / "train.json").write_text(json.dumps(choose + rows))
    (folder / "text.txt").write_text(" ".join(row["instruction"] for row in rows))
    reset_accelerate()
    flags = ["--model_name_or_path", str(tiny), "--train_file", str(folder / "train.json"), "--report_to", "none"]
    flags += ["--output_dir", str(folder / "run"), "--max_steps", "60", "--learning_rate", "0.03", "--lora_r", "8"]
    assert train_ist.main([*flags, "--warmup_steps", "5", "--trained_layers", "all"]) == 0
    return folder


def flags_of(folder, output_dir, *more, adapter=True) -> list[str]:
    flags = ["--model_name_or_path", str(folder / "tiny"), "--output_dir", str(output_dir), "--max_new_tokens", "8"]
    flags += ["--num_beams", "2", "--test_file", str(folder / "sums.json"), str(folder / "choose/test.json")]
    return [*flags, *(["--adapter", str(folder / "run/adapter")] if adapter else []), *map(str, more)]


def results(output_dir) -> dict[str, list[dict]]:
    assert sorted(path.name for path in output_dir.iterdir()) == [
        *("arguments.json", "choose.jsonl", "summary.json", "sums.jsonl")
    ]  # no shards
    return {name: read_lines(output_dir / f"{name}.jsonl") for name in ("choose", "sums")}


def test_batches_and_ranks_change_nothing_and_the_adapter_does(folder, tmp_path):
    assert main(flags_of(folder, tmp_path / "one", "--batch_size", 1)) == 0
    assert main(flags_of(folder, tmp_path / "all", "--batch_size", 16)) == 0
    assert main(flags_of(folder, tmp_path / "base", adapter=False)) == 0
    command = [warm_python(), "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", "accelerate_configs/ddp.yaml", "-m", "ist.evaluate"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHON_EXEC": warm_python()}
    result = subprocess.run([*command, *flags_of(folder, tmp_path / "two", "--batch_size", 4)], cwd=ROOT, check=False,
                            env=environment, capture_output=True, text=True, timeout=240)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    one = results(tmp_path / "one")
    assert one == results(tmp_path / "all") == results(tmp_path / "two")
    assert [line["row"] for line in one["sums"]] == list(range(13))
    assert one["sums"] != results(tmp_path / "base")["sums"]
    gold = [float(row["answer"]) for row in json.loads((folder / "sums.json").read_text())]
    assert [line["gold"] for line in one["sums"]] == gold
    lengths = {len(line["prompt"]) for line in one["sums"]}
    assert len(lengths) > 5  # so there is padding to get wrong
    summary, other = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert summary["tasks"] == other["tasks"]
    for name, lines in one.items():
        right = sum(line["right"] for line in lines)
        assert summary["tasks"][name]["accuracy"] == right / 13
        assert summary["tasks"][name]["interval"] == pytest.approx(wilson(right, 13))
    assert summary["average"] == pytest.approx(sum(task["accuracy"] for task in summary["tasks"].values()) / 2)
    assert summary["training"]["configuration"]["learning_rate"] == 0.03


def test_the_prompt_is_that_of_the_training_run(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder / "run/adapter", run / "adapter")
    record = json.loads((folder / "run/run.json").read_text())
    record["configuration"]["prompt_template"] = "llm_adapters"
    (run / "run.json").write_text(json.dumps(record))
    flags = [*flags_of(folder, tmp_path / "out", adapter=False), "--adapter", str(run / "adapter"), "--max_rows", "2"]
    assert main(flags) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    rows = json.loads((folder / "sums.json").read_text())[:2]
    lines = read_lines(tmp_path / "out/sums.jsonl")
    assert [line["prompt"] for line in lines] == [make_prompt(row, "llm_adapters", tokenizer) for row in rows]


def test_a_killed_evaluation_goes_on(folder, tmp_path, capsys):
    assert main(flags_of(folder, tmp_path / "whole")) == 0
    # The first task comes to its end; the second is killed between two rows, and in the middle of a line.
    process = subprocess.Popen([sys.executable, "-m", "ist.evaluate", *flags_of(folder, tmp_path / "cut",
                               "--batch_size", 1)], cwd=ROOT, stdout=subprocess.PIPE)  # fmt: skip
    deadline = time.time() + 120
    while not any(path.read_text().count("\n") > 2 for path in (tmp_path / "cut").glob(".choose.*.jsonl")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (shard,) = (tmp_path / "cut").glob(".choose.*.jsonl")
    assert not (tmp_path / "cut/choose.jsonl").exists()
    finished = (tmp_path / "cut/sums.jsonl").stat().st_mtime_ns
    with open(shard, "a") as file:
        file.write('{"row": 12, "prom')
    capsys.readouterr()
    assert main(flags_of(folder, tmp_path / "cut")) == 0
    assert "going on after" in capsys.readouterr().out
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert (tmp_path / "cut/sums.jsonl").stat().st_mtime_ns == finished
    with pytest.raises(UsageError, match=r"holds results of another num_beams\. Choose another folder"):
        main(flags_of(folder, tmp_path / "cut", "--num_beams", 3))


@torch.no_grad()
def test_likelihood_is_the_models_own_loss(folder, tmp_path):
    flags = flags_of(folder, tmp_path / "out", "--scoring", "likelihood")
    flags.remove(str(folder / "sums.json"))
    assert main(flags) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    model = PeftModel.from_pretrained(model, folder / "run/adapter").eval()
    rows = json.loads((folder / "choose/test.json").read_text())
    lines = read_lines(tmp_path / "out/choose.jsonl")
    for line in lines:
        prompt, expected = make_prompt(rows[line["row"]], "alpaca", tokenizer), {}
        for choice in ("answer1", "answer2", "answer3"):
            ids = tokenizer(f"{prompt}the correct answer is {choice}", return_tensors="pt")["input_ids"]
            labels = ids.clone()
            labels[0, : len(tokenizer(prompt)["input_ids"])] = -100
            count = (labels != -100).sum().item()
            expected[choice] = -model(input_ids=ids, labels=labels).loss.item() * count
        assert json.loads(line["output"]) == pytest.approx(expected, abs=1e-3)
        assert line["extracted"] == max(expected, key=expected.get)
    assert len(lines) == 13


@torch.no_grad()
def test_texts_are_ranked_by_likelihood_per_character(folder, tmp_path):
    answers = {"output": " no", "answer": " no"}
    asked = [f"Question: {i} and {i}?\nAnswer:" for i in range(5)]
    rows = [{"instruction": asked[i], "choices": [" no", f" it is {2 * i}", " no"], **answers} for i in range(5)]
    (tmp_path / "words.json").write_text(json.dumps(rows))
    flags = ["--model_name_or_path", folder / "tiny", "--output_dir", tmp_path / "out", "--scoring", "likelihood"]
    flags += ["--test_file", tmp_path / "words.json", "--prompt_template", "none", "--batch_size", "3"]
    assert main(list(map(str, flags))) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    lines = read_lines(tmp_path / "out/words.jsonl")
    for line in lines:
        row, expected = rows[line["row"]], {}
        for choice in row["choices"]:
            ids = tokenizer(row["instruction"] + choice, return_tensors="pt")["input_ids"]
            start = len(tokenizer(row["instruction"])["input_ids"])
            logs = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
            expected[choice] = logs.gather(1, ids[0, start:, None]).sum().item() / len(choice)
        assert json.loads(line["output"]) == pytest.approx(expected, abs=1e-4)
        assert line["extracted"] == max(expected, key=expected.get).strip()
        assert line["right"] == (line["extracted"] == "no")
    assert len(lines) == 5
    (tmp_path / "words.json").write_text(json.dumps([rows[0] | {"answer": " perhaps"}]))
    flags[3] = tmp_path / "other"
    with pytest.raises(UsageError, match=r"words.json, row 0: answer must be one of choices"):
        main(list(map(str, flags)))


@torch.no_grad()
def test_perplexity_is_that_of_the_text(folder, tmp_path):
    flags = ["--model_name_or_path", str(folder / "tiny"), "--output_dir", str(tmp_path / "out")]
    assert main([*flags, "--perplexity_file", str(folder / "text.txt"), "--max_length", "64"]) == 0
    found = json.loads((tmp_path / "out/summary.json").read_text())["perplexity"]["text"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    ids = tokenizer((folder / "text.txt").read_text(), return_tensors="pt")["input_ids"][0]
    loss = tokens = 0
    for window in ids.split(64):
        if len(window) > 1:
            loss += model(input_ids=window[None], labels=window[None]).loss.item() * (len(window) - 1)
            tokens += len(window) - 1
    assert found["tokens"] == tokens
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_windows_begin_as_texts_of_the_model_do(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny")
    text = " ".join(f"word {i}" for i in range(40))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    plain = windows(tokenizer, text, 16)
    assert list(chain(*plain)) == ids and {len(window) for window in plain[:-1]} == {16}
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(begin)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
    )
    assert tokenizer("a")["input_ids"][0] == begin  # as Llama's, Gemma's and Mistral's do
    found = windows(tokenizer, text, 16)
    assert all(window[0] == begin and len(window) <= 16 for window in found)
    assert list(chain(*(window[1:] for window in found))) == ids


def test_bad_input_is_one_clear_line(folder, tmp_path, monkeypatch):
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "odd.json").write_text('[{"instruction": "a", "output": "", "answer": "perhaps"}]')
    (tmp_path / "column.json").write_text('[{"instruction": "a", "input": "b"}]')
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config(hidden_size=64)).save_pretrained(tmp_path / "other/tiny")
    AutoTokenizer.from_pretrained(folder / "tiny").save_pretrained(tmp_path / "other/tiny")
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "another")
    model = str(folder / "tiny")

    def run(*flags, model=model):
        main(["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), *map(str, flags)])

    for flags, message in (
        (("--test_file", tmp_path / "column.json"), "needs a question .* and an answer .*; it has"),
        (("--test_file", tmp_path / "odd.json"), "its answers are of no known task"),
        (("--test_file", tmp_path / "empty.json"), "empty"),
        (("--test_file", tmp_path / "nowhere.json"), "no such file"),
        (("--perplexity_file", tmp_path / "nowhere.txt"), "cannot be read"),
        (("--test_file", folder / "sums.json", "--adapter", tmp_path), "no adapter_config.json"),
        (("--test_file", folder / "sums.json", "--scoring", "likelihood"), "likelihood needs choices"),
        (("--test_file", folder / "sums.json", tmp_path / "x/sums.json"), "more than one file of the task sums"),
        ((), "give --test_file FILE"),
    ):
        with pytest.raises(UsageError, match=message) as error:
            run(*flags)
        assert "\n" not in str(error.value)
    adapter = ("--test_file", folder / "sums.json", "--adapter", folder / "run/adapter")
    with pytest.raises(UsageError, match=r"belongs to .*tiny, not to .*another; --any_base true"):
        run(*adapter, model=str(tmp_path / "another"))
    with pytest.raises(UsageError, match=r"cannot be loaded: .*size mismatch"):
        run(*adapter, model=str(tmp_path / "other/tiny"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"whole model on each device: launch with accelerate_configs/ddp.yaml"):
        run("--test_file", folder / "sums.json")
