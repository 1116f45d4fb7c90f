"""What is learnt of a row: all that it says, the answers alone where that is asked for, and where to stop."""

import hashlib
import json
import os
import re

import pytest
from datasets import Dataset
from support import CHAT_TEMPLATE, chat_templates, reset_accelerate
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ist.training.command_line import UsageError
from ist.training.data import IGNORE
from ist.training.encoding import Encoder, encode, encode_rows, load_tokenizer, make_prompt
from ist.training.reading import load_rows
from ist.training.word_problems import arithmetic_rows

USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "It is 2."}


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def learnt(tokenizer, row: dict, template: str = "chat") -> list[str]:
    """The parts of a row that carry loss, as text."""
    parts, part = [], []
    for label in [*encode(row, template, tokenizer, 4096, True)["labels"], IGNORE]:
        if label != IGNORE:
            part.append(label)
        elif part:
            parts.append(tokenizer.decode(part))
            part = []
    return parts


# sha256 of ids and labels as they were before rows were read file by file (commit 9678518ef9cf).
BEFORE = {
    ("alpaca", False): "7c08f565edda5f4e",
    ("alpaca", True): "ac13b43be69626ab",
    ("llm_adapters", False): "57fba90b5ae4602c",
    ("llm_adapters", True): "15e41a8076c82fab",
    ("chat", False): "8c1f72cd435f54a6",
    ("chat", True): "1d6046dc3de9556b",
    ("none", False): "495a939254539446",
    ("none", True): "da24e06486fbe393",
}


@pytest.mark.parametrize(("template", "masked"), BEFORE)
def test_old_rows_give_the_tokens_that_they_gave(tokenizer, tmp_path, template, masked):
    rows = arithmetic_rows(200, seed=3, held_out=False)
    for i, row in enumerate(rows):
        row["input"] = "In decimal." if i % 5 == 0 else ""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    read = load_rows("train_file", [str(tmp_path / "rows.json")])
    encoded, _ = encode_rows(read, "train_file", template, tokenizer, 260, masked)
    content = json.dumps([encoded["input_ids"][:], encoded["labels"][:]])
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == BEFORE[template, masked]


TEMPLATES = ["gptoss", "qwen3", "qwen3_training", "phi3", "idefics3", "deepseekv3", "glm4moe", "gemma"]


NEEDS_TEMPLATES = pytest.mark.skipif(
    not chat_templates.FOLDER.is_dir(), reason="this version of trl has no folder of chat templates"
)


@NEEDS_TEMPLATES
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_trl(tokenizer, name):
    """A sample of `python tests/support/chat_templates.py`."""
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    results = list(chat_templates.outcomes(name, tokenizer))
    assert not [result for result in results if "fault" in result]
    assert {result["topology"]: result["outcome"] for result in results}["several"] in ("exact", "no stop token")


def test_text_that_the_template_leaves_out_is_refused(tokenizer):
    call = {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    calls = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    for row, message in (
        ({"messages": calls}, r"leaves out: tool call weather of turn 1 \(assistant\)"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "So."}]}, 'leaves out: reasoning_content "So." of turn 1'),
        ({"messages": [USER, ANSWER], "tools": [{"name": "weather"}]}, 'leaves out: the name "weather" of tools'),
    ):
        for masked in (True, False):
            with pytest.raises(UsageError, match=message):
                encode(row, "chat", tokenizer, 4096, masked)


def test_tools_and_calls_reach_the_template(tokenizer):
    tokenizer.chat_template = (
        "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2.5}'}}
    turns = [USER, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "sun"}, ANSWER]
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells the weather."}}
    row = {"messages": turns, "tools": [tool]}
    assert learnt(tokenizer, row) == ['weather{"city": "Paris", "days": 2.5}</s>', "It is 2.</s>"]
    text = tokenizer.decode(encode(row, "chat", tokenizer, 4096, False)["input_ids"])
    assert "Tells the weather." in text
    prompt = make_prompt(row, "chat", Encoder("chat", tokenizer, 4096, False).chat)
    assert prompt.endswith("sun</s><|assistant|>")


def test_content_in_parts_and_templates_that_want_parts(tokenizer):
    parts = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "2."}]},
    ]
    assert learnt(tokenizer, {"messages": parts}) == ["It is 2.</s>"]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
        "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    assert learnt(tokenizer, {"messages": [USER, ANSWER]}) == ["It is 2.</s>"]
    image = [{"role": "user", "content": [{"type": "image"}]}, ANSWER]
    with pytest.raises(UsageError, match="has a part of type image in turn 0: parts of type text are served"):
        encode({"messages": image}, "chat", tokenizer, 4096, True)


def test_a_short_first_answer_is_not_found_in_the_system_prompt(tokenizer):
    tokenizer.chat_template = "<|system|>\nYou are a helpful assistant</s>\n" + CHAT_TEMPLATE
    assert learnt(tokenizer, {"messages": [{"role": "assistant", "content": "a"}, USER, ANSWER]}) == [
        "a</s>",
        "It is 2.</s>",
    ]


def test_turns_that_are_not_to_be_learnt(tokenizer):
    turns = [
        USER,
        {**ANSWER, "weight": 0},
        USER,
        {**ANSWER, "train": False},
        USER,
        {"role": "assistant", "content": "x"},
    ]
    assert learnt(tokenizer, {"messages": turns}) == ["x</s>"]
    with pytest.raises(UsageError, match=r"turns that are not to be learnt .* need --completion_only_loss true"):
        encode({"messages": turns}, "chat", tokenizer, 4096, False)
    with pytest.raises(UsageError, match=r"a turn of weight 0.5: 0 and 1 are served"):
        encode({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "chat", tokenizer, 4096, True)


def test_prompt_and_completion(tokenizer):
    row = {"prompt": "1 + 1 =", "completion": " 2"}
    for template in ("alpaca", "none"):
        whole = encode(row, template, tokenizer, 99, False)
        assert tokenizer.decode(whole["input_ids"]).strip() == "1 + 1 = 2</s>"
        assert whole["labels"] == whole["input_ids"]
        assert learnt(tokenizer, row, template) == [" 2</s>"]
    assert learnt(tokenizer, row) == [" 2</s>"]
    turns = {"prompt": [USER, {"role": "assistant", "content": "no"}, USER], "completion": [ANSWER]}
    assert learnt(tokenizer, turns) == ["It is 2.</s>"]


def test_a_text_that_looks_like_turns_is_text(tokenizer, tmp_path):
    row = {"prompt": '[{"a": 1}] is', "completion": '[{"role": "user"}]'}
    (tmp_path / "rows.json").write_text(json.dumps([row, row]))
    (read, _) = load_rows("train_file", [str(tmp_path / "rows.json")]).to_list()
    assert learnt(tokenizer, read, "none") == ['[{"role": "user"}]</s>']
    turns = {"prompt": [USER], "completion": [ANSWER]}
    (tmp_path / "turns.json").write_text(json.dumps([turns, turns]))
    (read, _) = load_rows("train_file", [str(tmp_path / "turns.json")]).to_list()
    assert learnt(tokenizer, read) == ["It is 2.</s>"]


def test_history_and_system(tokenizer):
    row = {"instruction": "And now?", "output": "b", "system": "Be brief.", "history": [["1?", "a"]]}
    assert learnt(tokenizer, row) == ["a</s>", "b</s>"]
    text = tokenizer.decode(encode(row, "chat", tokenizer, 4096, False)["input_ids"])
    assert text.lstrip().startswith("<|system|>\nBe brief.</s>")
    with pytest.raises(UsageError, match="holds system, which need --prompt_template chat; got alpaca"):
        encode(row, "alpaca", tokenizer, 99, False)


def test_documents(tokenizer):
    assert tokenizer.decode(encode({"text": "Once."}, "alpaca", tokenizer, 99, False)["labels"]).strip() == "Once.</s>"
    with pytest.raises(UsageError, match="is text without an answer: --completion_only_loss true has nothing to learn"):
        encode({"text": "Once."}, "alpaca", tokenizer, 99, True)


@NEEDS_TEMPLATES
@pytest.mark.parametrize("name", ["qwen3", "gptoss", "phi3", "deepseekv3", "idefics3"])
def test_without_a_mask_nothing_is_split(tiny, name):
    """A template that rewrites earlier turns, or shows reasoning in the last one alone, is rendered as it is."""
    tokenizer = load_tokenizer("model_name_or_path", str(tiny), "chat", name)
    reasoned = {"role": "assistant", "content": "<think>\nWell.\n</think>\n\nIt is 2."}
    turns = [USER, ANSWER, USER, ANSWER if name in ("gptoss", "deepseekv3") else reasoned]
    as_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    expected = tokenizer.apply_chat_template(as_parts if name == "idefics3" else turns, tokenize=False)
    encoded = encode({"messages": [*turns]}, "chat", tokenizer, 4096, False)
    assert encoded["input_ids"] == encoded["labels"] == tokenizer(expected, add_special_tokens=False)["input_ids"]


def test_offsets_without_their_white_space_cost_no_label(tokenizer):
    row = {"instruction": "a", "output": "b   c\n\n\n d"}
    expected = learnt(tokenizer, row, "alpaca")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    assert learnt(tokenizer, row, "alpaca") == expected == ["b   c\n\n\n d</s>"]


def test_rows_without_a_stop_are_counted(tokenizer):
    rows = Dataset.from_list([{"messages": json.dumps([USER, ANSWER])}])
    assert encode_rows(rows, "train_file", "chat", tokenizer, 99, True)[1].unstopped == 0
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", "")
    assert encode_rows(rows, "train_file", "chat", tokenizer, 99, True)[1].unstopped == 1
    tokenizer.eos_token = None
    rows = Dataset.from_list([{"instruction": "a", "output": "b"}])
    assert encode_rows(rows, "train_file", "alpaca", tokenizer, 99, False)[1].unstopped == 1


@pytest.mark.parametrize(("overlong", "left", "dropped", "cut"), [("truncate", 4, 0, 2), ("drop", 2, 2, 0)])
def test_overlong_rows(tokenizer, overlong, left, dropped, cut):
    rows = Dataset.from_list([{"text": "word " * n} for n in (2, 50, 3, 60)])
    encoded, lengths = encode_rows(rows, "train_file", "none", tokenizer, 30, False, overlong)
    assert (len(encoded), lengths.dropped, lengths.cut) == (left, dropped, cut)
    assert lengths.longest == len(tokenizer("word " * 60)["input_ids"]) + 1
    with pytest.raises(UsageError, match=r"--train_file row 1 has \d+ tokens, more than --max_length 30"):
        encode_rows(rows, "train_file", "none", tokenizer, 30, False, "error")


def test_processes_make_no_difference(tokenizer, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(arithmetic_rows(1200, seed=5, held_out=False)))
    rows = load_rows("train_file", [str(tmp_path / "rows.json")])
    one = encode_rows(rows, "train_file", "chat", tokenizer, 99, True)[0].to_list()
    rows._fingerprint += "two"  # not from the cache
    assert encode_rows(rows, "train_file", "chat", tokenizer, 99, True, workers=2)[0].to_list() == one


@NEEDS_TEMPLATES
def test_chat_templates_by_file_and_by_name(tiny, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}")
    read = load_tokenizer("model_name_or_path", str(tiny), "chat", str(tmp_path / "mine.jinja"))
    assert read.chat_template == "{{ messages[0].content }}"
    assert "generation" in load_tokenizer("model_name_or_path", str(tiny), "chat", "qwen3").chat_template
    with pytest.raises(UsageError, match=r"--chat_template must be a file, or one of trl's: cohere, .*; got nothere"):
        load_tokenizer("model_name_or_path", str(tiny), "chat", "nothere")


def test_a_tokenizer_without_tokens_is_none(tmp_path):
    empty = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=empty, unk_token="<unk>").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"--model_name_or_path .* has no tokenizer: it has no token for any text\."):
        load_tokenizer("model_name_or_path", str(tmp_path))


def test_a_run_on_rows_of_many_kinds(arguments, tmp_path, capsys):
    """Weights, a mapping, a split, rows that are cut: what was done with the rows is said, and is in run.json."""
    import train_ist

    long = {"question": "Say it. " * 60, "reply": "No. " * 200}
    (tmp_path / "a.json").write_text(json.dumps([{"question": f"{i}?", "reply": f"{i}."} for i in range(20)] + [long]))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": f"Line {i}."}) for i in range(10)))
    flags = ["--train_file", str(tmp_path / "a.json"), str(tmp_path / "b.jsonl"), "--train_weights", "0.5", "2"]
    flags += ["--column_mapping", "question=instruction", "reply=output", "--validation_size", "6"]
    reset_accelerate()
    assert train_ist.main([*arguments(max_length=128, max_steps=4), *flags]) == 0
    record = json.loads((tmp_path / "run/run.json").read_text())
    # 4 of 21 rows and 2 of 10 are for validation; half of the 17 and twice the 8 are an epoch.
    assert record["configuration"]["train_rows"] == 8 + 16
    assert record["cut_rows"] + record["validation_cut_rows"] == 1
    assert max(record["longest_row"], record["validation_longest_row"]) > 128
    assert re.search(r"1 (training|validation) rows are cut to --max_length 128", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column_mapping": "question=ask"}, "--column_mapping must be THEIRS=OURS, ours one of instruction, .*; got"),
        ({"column_mapping": "none=instruction"}, "--column_mapping none=instruction: no file has a column none"),
        ({"train_weights": "1,2"}, "--train_weights"),
        ({"train_weights": 0}, "--train_weights must be finite numbers above 0; got 0.0"),
        ({"max_samples": 0}, "--max_samples must be 1 or more; got 0"),
        ({"overlong": "cut"}, "--overlong must be one of truncate, drop, error; got cut"),
        ({"chat_template": "x.jinja"}, "--chat_template needs --prompt_template chat; got alpaca"),
        ({"dataset_config": "main"}, "--dataset_config needs --dataset_name"),
        ({"preprocessing_num_workers": 0}, "--preprocessing_num_workers must be 1 or more; got 0"),
    ],
)
def test_keys_about_rows(train, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        train(**options)
    assert not os.path.exists(tmp_path / "run")


def test_a_bad_validation_row_is_named_after_the_split_too(train, tmp_path):
    rows = arithmetic_rows(12, seed=1, held_out=False)
    rows[5]["output"] = " "
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(UsageError, match=r"rows.json: row 5 has no answer: output is empty"):
        train(train_file=tmp_path / "rows.json", validation_size=4)


def test_max_samples(train, tmp_path):
    assert train(max_samples=10, max_steps=2) == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["configuration"]["train_rows"] == 10


def test_older_names_of_calls_and_roles(tokenizer):
    """OpenAI's function_call and refusal, roles of logs; roles that nobody knows are refused, not written as text."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"name": "weather", "arguments": '{"city": "Paris"}'}
    for content in ("", None):
        turns = [USER, {"role": "assistant", "content": content, "function_call": call}]
        turns += [{"role": "function", "name": "weather", "content": "sun"}, ANSWER]
        assert learnt(tokenizer, {"messages": turns}) == ['weather{"city": "Paris"}</s>', "It is 2.</s>"]
    refused = [USER, {"role": "assistant", "content": None, "refusal": "I will not."}]
    assert learnt(tokenizer, {"messages": refused}) == ["I will not.</s>"]
    named = [{"role": "Prompter", "content": "1?"}, {"role": "ChatGPT", "content": "2"}]
    assert learnt(tokenizer, {"messages": named}) == ["2</s>"]
    with pytest.raises(
        UsageError, match="has the role critic in turn 2, which the chat template does not name: rename"
    ):
        encode({"messages": [USER, ANSWER, {"role": "critic", "content": "No."}]}, "chat", tokenizer, 4096, True)
    with pytest.raises(UsageError, match=r"no assistant turn with content \(roles: user, critic\)"):
        encode({"messages": [USER, {"role": "critic", "content": "No."}]}, "chat", tokenizer, 4096, True)


@pytest.mark.parametrize(
    ("assistant", "prompt", "expected"),
    [
        ("", "", '[CALL] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'),
        ("<|assistant|>", "<|assistant|>\n", '[CALL] [{"name": "weather", "arguments": {"city": "Paris"}}]</s>'),
    ],
)
def test_a_call_is_learnt_from_its_opening_on(tokenizer, assistant, prompt, expected):
    """Where the template writes no header of an assistant turn, or not the one of its generation prompt."""
    call = '[CALL] [{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]'
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %}ASSISTANT{% for c in "
        "m.tool_calls or [] %}CALL{% endfor %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}PROMPT{% endif %}"
    )
    for name, text in (("ASSISTANT", assistant), ("CALL", call), ("PROMPT", prompt)):
        tokenizer.chat_template = tokenizer.chat_template.replace(name, text)
    call = {"function": {"name": "weather", "arguments": {"city": "Paris"}}}
    turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, USER, ANSWER]
    assert learnt(tokenizer, {"messages": turns})[0].strip() == expected


def test_tools_may_be_written_in_the_turn_of_the_system(tokenizer):
    tool = {"type": "function", "function": {"name": "weather", "description": "Tells the weather."}}
    system = {"role": "system", "content": f"You may call: {json.dumps(tool)}"}
    row = {"messages": [system, USER, ANSWER], "tools": [tool]}
    assert learnt(tokenizer, row) == ["It is 2.</s>"]
    with pytest.raises(UsageError, match="of tools; --column_mapping tools= leaves the column out"):
        encode({**row, "messages": [USER, ANSWER]}, "chat", tokenizer, 4096, True)


def test_a_row_of_weight_0_is_said_to_have_nothing_to_learn(train, tmp_path, capsys):
    turns = [USER, ANSWER]
    rows = [{"messages": turns}] * 5 + [{"messages": [USER, {**ANSWER, "weight": 0}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = {"prompt_template": "chat", "completion_only_loss": True, "max_steps": 1}
    assert train(train_file=tmp_path / "rows.json", **options) == 0
    assert (
        "1 training rows are dropped: nothing to learn (weight 0), or nothing of it within" in capsys.readouterr().out
    )


def test_rows_are_shown_with_what_is_learnt(train, tmp_path, capsys):
    (tmp_path / "rows.json").write_text(json.dumps([{"messages": [USER, ANSWER], "id": 1}] * 3))
    options = {"prompt_template": "chat", "completion_only_loss": True, "train_file": tmp_path / "rows.json"}
    assert train(show_rows=2, **options) == 0
    out = capsys.readouterr().out
    assert "columns that are not used: id" in out
    assert re.search(r"---- row 1: \d+ tokens, \d+ with loss\n", out)
    assert out.count("⟦It is 2.</s>⟧") == 2
    assert "1 + 1?" in out.split("⟦")[0]
    assert not (tmp_path / "run").exists()
