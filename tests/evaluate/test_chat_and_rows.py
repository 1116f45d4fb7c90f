"""Evaluation of chat models, of rows under any names, and of 4-bit bases."""

import json
import shutil

import pytest
from support import read_lines, reset_accelerate, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from ist.evaluate.answers import answers_of
from ist.evaluate.command import main
from ist.training.reading import load_rows

# Every turn ends in a token that is not eos, and something follows it, as in the templates of several families.
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% if m.role == 'assistant' %}77 {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def evaluate(**options) -> dict:
    reset_accelerate()
    values = {"num_beams": 1, "max_new_tokens": 8, **options}
    assert main([part for key, value in values.items() for part in (f"--{key}", str(value))]) == 0
    folder = options["output_dir"]
    return json.loads((folder / "summary.json").read_text())["tasks"]


def test_an_answer_ends_where_the_chat_template_ends_a_turn(train, tmp_path, tiny):
    folder = shutil.copytree(tiny, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    rows = [{"instruction": f"Number {i}?", "output": f"{i}", "answer": str(i)} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {
        **{"model_name_or_path": folder, "train_file": tmp_path / "rows.json", "prompt_template": "chat"},
        **{"peft_method": "none", "selection": "all", "per_device_train_batch_size": 12, "max_steps": 150},
        **{"lr_scheduler_type": "constant", "learning_rate": 1e-2, "logging_steps": 150},
    }
    assert train(**options) == 0
    result = evaluate(
        model_name_or_path=tmp_path / "run/model", test_file=tmp_path / "rows.json", output_dir=tmp_path / "out"
    )
    assert result["rows"]["right"] == 12, read_lines(tmp_path / "out/rows.jsonl")


ASKED, SAID = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "(C)"}]


@pytest.mark.parametrize(
    ("row", "kind", "gold"),
    [
        ({"instruction": "a", "output": "the correct answer is true"}, "label", "true"),
        ({"prompt": "a", "completion": "so 1,234.5. The answer is 72."}, "number", 72.0),
        ({"prompt": ASKED, "completion": SAID}, "letter", "C"),
        ({"messages": ASKED + SAID}, "letter", "C"),
        ({"instruction": "a", "output": "b", "choices": ["b", "c"]}, "text", "b"),
        ({"instruction": "a", "output": "It is 5", "answer": "6"}, "number", 6.0),
    ],
)
def test_answers_under_any_name(tmp_path, row, kind, gold):
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    answers = answers_of(load_rows("test_file", [str(tmp_path / "rows.json")], form=False), "rows.json")
    assert (answers.kind, answers.gold) == (kind, [gold])


def test_a_4_bit_base_and_other_names_of_columns(train, tmp_path, tiny, rows):
    renamed = [{"ask": row["instruction"], "reply": row["answer"]} for row in rows[:4]]
    (tmp_path / "rows.json").write_text(json.dumps(renamed))
    assert train(load_in_4bit=True, max_steps=2) == 0
    options = {
        **{"model_name_or_path": tiny, "adapter": tmp_path / "run/adapter", "test_file": tmp_path / "rows.json"},
        **{"load_in_4bit": True, "output_dir": tmp_path / "out"},
    }
    reset_accelerate()
    flags = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    assert main([*flags, "--column_mapping", "ask=instruction", "reply=answer", "--max_new_tokens", "4"]) == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["tasks"]["rows"]["rows"] == 4
    # A base that was saved in 4 bits needs no key.
    packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(tiny, quantization_config=packed, device_map={"": "cpu"}).save_pretrained(
        tmp_path / "packed"
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path / "packed")
    (tmp_path / "rows.json").write_text(json.dumps(rows[:2]))
    result = evaluate(
        model_name_or_path=tmp_path / "packed", test_file=tmp_path / "rows.json", output_dir=tmp_path / "again"
    )
    assert result["rows"]["rows"] == 2
