"""Adapters, models, rows and folders that are damaged: ist.evaluate and ist.analyze end in one line."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from support import make_tiny, reset_accelerate
from support.bad_files import SPOILED, ends_in_one_line
from transformers import AutoModelForCausalLM

from ist.analyze.command import main as analyze
from ist.evaluate.command import main as evaluate
from ist.training.word_problems import arithmetic_rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("whole") / "modèle"
    make_tiny(folder / "tiny", rows)
    base = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder / "run/adapter")
    (folder / "run/run.json").write_text(json.dumps({"configuration": {"prompt_template": "alpaca"}}))
    (folder / "sums.json").write_text(json.dumps(arithmetic_rows(2, 0, held_out=True)))
    (folder / "text.txt").write_text(" ".join(row["instruction"] for row in rows[:9]))
    (folder / "importance.jsonl").write_text('{"step": 1, "scores": [1, 2, 3, 4]}\n')
    for main in (evaluate, analyze):
        reset_accelerate()
        assert main(flags(folder, main)) == 0
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "modèle")
    reset_accelerate()
    for file in (tmp_path / "modèle").glob("*/arguments.json"):
        text = json.dumps(json.loads(file.read_text()), ensure_ascii=False)
        file.write_text(text.replace(str(whole), str(tmp_path / "modèle")))
    return tmp_path / "modèle"


def flags(folder, main) -> list[str]:
    common = ["--model_name_or_path", folder / "tiny", "--adapter", folder / "run/adapter"]
    if main is evaluate:
        own = ["--test_file", folder / "sums.json", "--output_dir", folder / "answers", "--num_beams", 1]
        own += ["--max_new_tokens", 2]
    else:
        own = ["--text_file", folder / "text.txt", "--output_dir", folder / "layers", "--max_tokens", 30]
        own += ["--importance", folder / "importance.jsonl", "--directions", "least"]
    return [*map(str, [*common, *own])]


FILES = {
    "run/adapter/adapter_config.json": evaluate,
    "run/adapter/adapter_model.safetensors": evaluate,
    "run/run.json": evaluate,
    "tiny/config.json": evaluate,
    "tiny/model.safetensors": evaluate,
    "tiny/tokenizer.json": evaluate,
    "sums.json": evaluate,
    "answers/arguments.json": evaluate,
    "answers/sums.jsonl": evaluate,
    "text.txt": analyze,
    "importance.jsonl": analyze,
    "layers/arguments.json": analyze,
    "layers/analysis.json": analyze,
}
# run.json is none of ours without a configuration; what is gone is made anew; numbers are a text as well.
FINE = {
    "run/run.json": {"no keys", "gone", "dangling", "a loop"},
    "answers/arguments.json": set(),
    "answers/sums.jsonl": {"gone", "dangling", "a loop"},
    "layers/analysis.json": {"no keys", "gone", "dangling", "a loop"},
}


@pytest.mark.parametrize("spoiled", [name for name in SPOILED if name != "a pipe"])  # libraries wait for its writer
@pytest.mark.parametrize("name", FILES)
def test_a_spoiled_file_is_one_line(folder, name, spoiled, capsys, monkeypatch):
    main, file = FILES[name], folder / name
    SPOILED[spoiled](file)
    if spoiled in FINE.get(name, ()):
        assert main(flags(folder, main)) == 0
        return
    line = ends_in_one_line(main, flags(folder, main), capsys, monkeypatch)
    assert "/modèle" in line or file.name in line


CONFIGS = [{"peft_type": "NONE"}, {"peft_type": 3}, {"r": "x"}, {"target_modules": 7}, {"base_model_name_or_path": [1]}]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
@pytest.mark.parametrize("main", [evaluate, analyze])
def test_nonsense_in_an_adapters_configuration_is_one_line(folder, changes, main, capsys, monkeypatch):
    file = folder / "run/adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    shutil.rmtree(folder / "answers")
    shutil.rmtree(folder / "layers")
    assert "--adapter" in ends_in_one_line(main, flags(folder, main), capsys, monkeypatch, (2,))


SCORES = ["[1, 2, 3]", "[NaN, 1, 2, 3]", '["a", 1, 2, 3]', "7", "[]", "[[1], 2, 3, 4]", "[true, 1, 2, 3]"]


@pytest.mark.parametrize("scores", SCORES)
def test_scores_of_another_kind_are_one_line(folder, scores, capsys, monkeypatch):
    (folder / "importance.jsonl").write_text(f'{{"step": 1, "scores": {scores}}}\n')
    assert "--importance" in ends_in_one_line(analyze, flags(folder, analyze), capsys, monkeypatch, (2,))


ROWS = [{"instruction": ["a"]}, {"instruction": {"a": 1}}, {"answer": "NaN"}, {"answer": None}, {"choices": []}]


@pytest.mark.parametrize("changes", ROWS, ids=str)
def test_rows_of_another_kind_are_one_line(folder, changes, capsys, monkeypatch):
    rows = json.loads((folder / "sums.json").read_text())
    (folder / "sums.json").write_text(json.dumps([row | changes for row in rows]))
    assert "--test_file" in ends_in_one_line(evaluate, flags(folder, evaluate), capsys, monkeypatch, (2,))


@pytest.mark.parametrize("main", [evaluate, analyze])
@pytest.mark.parametrize("where", ["sums.json", "sums.json/x", "/proc/x", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_one_line(folder, main, where, capsys, monkeypatch):
    line = ends_in_one_line(main, [*flags(folder, main), "--output_dir", folder / where], capsys, monkeypatch)
    assert "--output_dir" in line and "cannot be written" in line
