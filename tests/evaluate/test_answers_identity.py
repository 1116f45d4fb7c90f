"""Answers are taken from an earlier run only where rows, adapter and base weights are the same, by content."""

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import make_tiny, read_lines, reset_accelerate
from transformers import AutoModelForCausalLM

from ist.evaluate.command import main
from ist.evaluate.scorer import shards
from ist.training.command_line import UsageError
from ist.training.files import model_digest
from ist.training.word_problems import arithmetic_rows

SHARD = "0123456789abcdef" * 2


@pytest.fixture
def folder(tmp_path, rows):
    """A tiny model with an adapter, and five sums."""
    make_tiny(tmp_path / "tiny", rows)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    (tmp_path / "sums.json").write_text(json.dumps(arithmetic_rows(5, 0, held_out=True)))
    return tmp_path


def run(folder: Path, *files: str, output_dir: str = "out") -> None:
    reset_accelerate()
    flags = ["--model_name_or_path", folder / "tiny", "--adapter", folder / "adapter", "--num_beams", "1"]
    flags += ["--max_new_tokens", "2", "--output_dir", folder / output_dir, "--test_file"]
    assert main([*map(str, flags), *(str(folder / file) for file in files or ["sums.json"])]) == 0


def in_place(file: Path, write) -> None:
    """Replace a file; its size and its time stay."""
    stat = file.stat()
    write()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def other_rows(folder: Path) -> None:
    file = folder / "sums.json"
    in_place(file, lambda: file.write_text(json.dumps(arithmetic_rows(10, 0, held_out=True)[5:])))


def other_reference(folder: Path) -> None:
    file = folder / "sums.json"
    rows = json.loads(file.read_text())
    rows[3]["answer"] = "77"
    in_place(file, lambda: file.write_text(json.dumps(rows)))


def other_base(folder: Path) -> None:
    file = folder / "tiny/model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    in_place(file, lambda: save_file(tensors, file, metadata={"format": "pt"}))


def other_tokenizer(folder: Path) -> None:
    file = folder / "tiny/tokenizer.json"
    in_place(file, lambda: file.write_text(file.read_text() + " "))


def other_adapter(folder: Path) -> None:
    file = folder / "adapter/adapter_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    in_place(file, lambda: save_file(tensors, file, metadata={"format": "pt"}))


CHANGES = {
    other_rows: r"sums \(the rows of --test_file\)",
    other_reference: r"sums \(the rows of --test_file\)",
    other_base: r"model_digest \(the files of --model_name_or_path\)",
    other_tokenizer: r"model_digest \(the files of --model_name_or_path\)",
    other_adapter: r"adapter_digest \(the files of --adapter\)",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("finished", [True, False])
def test_answers_to_something_else_are_refused(folder, change, finished):
    run(folder)
    if not finished:
        (folder / "out/sums.jsonl").rename(folder / f"out/.sums.{SHARD}.jsonl")
    change(folder)
    with pytest.raises(UsageError, match=rf"holds results of another {CHANGES[change]}\. Choose another folder"):
        run(folder)


def test_the_same_content_elsewhere_is_the_same(folder):
    run(folder)
    before = (folder / "out/sums.jsonl").stat().st_mtime_ns
    file = folder / "sums.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=2))  # other bytes, the same rows
    shutil.copytree(folder / "tiny", folder / "copy")
    shutil.rmtree(folder / "tiny")
    (folder / "copy").rename(folder / "tiny")
    run(folder)
    assert (folder / "out/sums.jsonl").stat().st_mtime_ns == before


def test_a_task_more_leaves_the_others_and_their_rows_are_still_known(folder):
    run(folder)
    shutil.copy(folder / "sums.json", folder / "more.json")
    run(folder, "more.json")
    other_rows(folder)
    with pytest.raises(UsageError, match=r"another sums \(the rows"):
        run(folder)
    (folder / "out/sums.jsonl").unlink()  # the answers are gone, so there is nothing to take by mistake
    run(folder)


def test_answers_of_before_there_were_digests_are_refused(folder):
    run(folder)
    file = folder / "out/arguments.json"
    old = json.loads(file.read_text())
    del old["rows"], old["model_digest"]
    file.write_text(json.dumps(old))
    with pytest.raises(UsageError, match=r"another model_digest .*, sums \(the rows"):
        run(folder)


@pytest.mark.parametrize("pair", [("a", "a.b"), ("a[1]", "a1"), ("a*", "ab"), ("?", "c")])
def test_a_task_takes_its_own_shards_alone(folder, pair):
    one, other = pair
    for name in pair:
        shutil.copy(folder / "sums.json", folder / f"{name}.json")
    run(folder, f"{one}.json", f"{other}.json")
    out = folder / "out"
    lines = read_lines(out / f"{one}.jsonl")
    for name in pair:
        (out / f"{name}.jsonl").unlink()
    # What two stopped evaluations left: of `one` nothing, of `other` wrong answers that must not become those of `one`.
    wrong = [line | {"output": "wrong"} for line in lines]
    shard = out / f".{other}.{SHARD}.jsonl"
    shard.write_text("".join(json.dumps(line) + "\n" for line in wrong))
    run(folder, f"{one}.json")
    assert read_lines(out / f"{one}.jsonl") == lines
    assert shard.exists() and shards(out, other) == [shard] and shards(out, one) == []
    (out / f"{one}.jsonl").rename(out / f".{one}.{SHARD}.jsonl")  # its own shard it does find
    assert [path.name for path in shards(out, one)] == [f".{one}.{SHARD}.jsonl"]


def test_the_digest_of_a_model_is_of_what_is_loaded(folder, monkeypatch):
    before = model_digest(str(folder / "tiny"))
    (folder / "tiny/README.md").write_text("a model")
    (folder / "tiny/checkpoints").mkdir()
    assert model_digest(str(folder / "tiny")) == before == model_digest(str(folder / "tiny") + "/")
    for change in (other_base, other_tokenizer):
        change(folder)
        assert model_digest(str(folder / "tiny")) != before
        before = model_digest(str(folder / "tiny"))


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    from transformers.utils import hub

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commits = ["0" * 40, "1" * 40]
    for commit in commits:
        (tmp_path / f"models--a--b/snapshots/{commit}").mkdir(parents=True)
        (tmp_path / f"models--a--b/snapshots/{commit}/config.json").write_text("{}")
    (tmp_path / "models--a--b/refs").mkdir()
    found = []
    for commit in commits:
        (tmp_path / "models--a--b/refs/main").write_text(commit)
        found.append(model_digest("a/b"))
    assert found[0] != found[1]
    from ist.training.files import ReadError

    with pytest.raises(ReadError, match="a/c is no folder, and no model of the Hub or its cache"):
        model_digest("a/c")


def test_a_base_that_has_changed_since_training_is_refused(folder):
    """The run that made the adapter has a digest of its base, by whose name another one is there now."""
    (folder / "run").mkdir()
    (folder / "adapter").rename(folder / "run/adapter")
    (folder / "adapter").symlink_to(folder / "run/adapter")
    configuration = {"model_name_or_path": str(folder / "tiny"), "model_digest": model_digest(str(folder / "tiny"))}
    (folder / "run/run.json").write_text(json.dumps({"configuration": {**configuration, "prompt_template": "alpaca"}}))
    run(folder)
    other_base(folder)
    with pytest.raises(UsageError, match="its files have changed since the adapter was trained"):
        run(folder, output_dir="new")
