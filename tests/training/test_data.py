"""Prompts to the byte, labels on the answer alone, and one stream of rows whatever the number of ranks."""

import json

import pytest
import torch
from datasets import Dataset
from support import CHAT_TEMPLATE, make_tiny, read_lines, tiny_config
from transformers import AutoTokenizer, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from ist.loss import token_loss_sum
from ist.probe import probe_rows
from ist.training.command_line import UsageError
from ist.training.data import IGNORE, GlobalBatches, collate, micro_batches, pack
from ist.training.encoding import encode, encode_rows, make_prompt
from ist.training.reading import load_rows
from ist.training.word_problems import arithmetic_rows

ROW = {"instruction": "Add 2 and 3.", "input": "", "output": "2 + 3 = 5.", "answer": "5"}


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def test_llm_adapters_prompt_to_the_byte(tokenizer):
    # As finetune.py of LLM-Adapters has it: an f-string indented in its source, two spaces after the preamble.
    data_point = {**ROW}
    published = f"""Below is an instruction that describes a task. Write a response that appropriately completes the \
request.  

                ### Instruction:
                {data_point["instruction"]}
                
                ### Response:
                {data_point["output"]}"""
    assert make_prompt(ROW, "llm_adapters", tokenizer) + ROW["output"] == published
    data_point = {**ROW, "input": "In decimal."}
    published = f"""Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request. 

                ### Instruction:
                {data_point["instruction"]}
                
                ### Input:
                {data_point["input"]}
                
                ### Response:
                {data_point["output"]}"""
    assert make_prompt(data_point, "llm_adapters", tokenizer) + ROW["output"] == published
    # The authors of IST have the same without blanks in empty lines.
    bare = "\n".join(line if line.strip() else "" for line in published.split("\n"))
    assert make_prompt(data_point, "ist_repository", tokenizer) + ROW["output"] == bare
    bare_alone = make_prompt(ROW, "ist_repository", tokenizer)
    assert bare_alone == make_prompt(ROW, "llm_adapters", tokenizer).replace("\n" + " " * 16 + "\n", "\n\n")


@pytest.mark.parametrize("template", ["alpaca", "llm_adapters", "ist_repository", "chat", "none"])
def test_completion_only_labels_are_the_answer(tokenizer, template):
    whole = encode(ROW, template, tokenizer, 256, completion_only_loss=False)
    assert whole["labels"] == whole["input_ids"]
    row = encode(ROW, template, tokenizer, 256, completion_only_loss=True)
    assert row["input_ids"] == whole["input_ids"]
    learnt = [label for label in row["labels"] if label != IGNORE]
    # (the last of llm_adapters' 16 spaces and the answer's first character are one token)
    assert tokenizer.decode(learnt).removeprefix(" ") == ROW["output"] + "</s>"
    after = row["input_ids"][max(i for i, label in enumerate(row["labels"]) if label != IGNORE) + 1 :]
    assert tokenizer.decode(after).strip(" ") == ("\n" if template == "chat" else "")
    assert row["input_ids"].count(tokenizer.eos_token_id) == (2 if template == "chat" else 1)


def test_every_assistant_turn_carries_loss(tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ]
    row = encode({"messages": json.dumps(messages)}, "chat", tokenizer, 256, completion_only_loss=True)
    spans, span = [], []
    for label in [*row["labels"], IGNORE]:
        if label != IGNORE:
            span.append(label)
        elif span:
            spans.append(tokenizer.decode(span))
            span = []
    assert spans == ["2</s>", "It is 4.</s>"]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert row["input_ids"] == whole


def test_eos_only_where_it_fits_and_cut_answers_are_dropped(tokenizer):
    length = len(encode(ROW, "alpaca", tokenizer, 256, True)["input_ids"])
    assert encode(ROW, "alpaca", tokenizer, length, True)["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(ROW, "alpaca", tokenizer, length - 1, True)["input_ids"][-1] != tokenizer.eos_token_id
    long = {**ROW, "instruction": "Add 2 and 3. " * 50}
    encoded, dropped = encode_rows(Dataset.from_list([ROW, long]), "train_file", "alpaca", tokenizer, length, True)
    assert (len(encoded), dropped.dropped, dropped.longest > length) == (1, 1, True)
    encoded, dropped = encode_rows(Dataset.from_list([ROW, long]), "train_file", "alpaca", tokenizer, length, False)
    assert (len(encoded), dropped.dropped, dropped.cut) == (2, 0, 1)
    with pytest.raises(UsageError, match=r"no row has an answer left.*max_length 20"):
        encode_rows(Dataset.from_list([long]), "train_file", "alpaca", tokenizer, 20, True)


def test_a_row_that_holds_no_text_is_refused(tokenizer):
    with pytest.raises(UsageError, match=r'row 0 has \["a"\] in output'):
        encode_rows(Dataset.from_list([{**ROW, "output": ["a"]}]), "train_file", "alpaca", tokenizer, 99, True)


def test_a_chat_template_that_refuses_the_row_names_it(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        UsageError, match=r"shows no text of a user: does not suit the model's chat template: roles must alternate"
    ):
        encode_rows(Dataset.from_list([ROW]), "train_file", "chat", tokenizer, 99, True)
    tokenizer.chat_template = CHAT_TEMPLATE


def test_tokenised_rows_are_not_kept_for_another_tokenizer(tokenizer):
    rows, arguments = Dataset.from_list([ROW]), ("train_file", "alpaca")
    first = encode_rows(rows, *arguments, tokenizer, 256, False)[0]["input_ids"][0]
    tokenizer.eos_token = "<s>"
    second = encode_rows(rows, *arguments, tokenizer, 256, False)[0]["input_ids"][0]
    tokenizer.eos_token = "</s>"
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1] == 1


def test_a_chat_template_that_numbers_its_turns_is_split(tokenizer):
    """Earlier turns are another text once there are further ones: the whole conversation decides."""
    tokenizer.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "abcd", strict=True)]
    row = encode({"messages": messages}, "chat", tokenizer, 256, True)
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORE]) == "b</s>d</s>"
    tokenizer.chat_template = CHAT_TEMPLATE


def write(path, text):
    path.write_text(text)
    return [str(path)]


def test_json_jsonl_and_parquet_hold_the_same_rows(tmp_path):
    rows = arithmetic_rows(5, 0, held_out=False)
    as_json = load_rows("train_file", write(tmp_path / "a.json", json.dumps(rows)))
    as_jsonl = load_rows("train_file", write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    as_parquet = load_rows("train_file", [str(tmp_path / "a.parquet")])
    for read in (as_json, as_jsonl, as_parquet):
        assert read.select_columns(list(rows[0])).to_list() == rows
        assert read["row"] == [0, 1, 2, 3, 4]
    both = load_rows("train_file", [str(tmp_path / "a.json"), str(tmp_path / "a.jsonl")])
    assert both.select_columns(list(rows[0])).to_list() == rows + rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("missing.json", None, "no such file"),
        ("empty.json", "", "is empty"),
        ("rows.doc", "a,b", r"must end in \.json, \.jsonl, .*, or in one of these and \.gz"),
        ("broken.json", '[{"instruction": "a", ', "is not valid JSON"),
        ("prose.jsonl", "Once upon a time", "is not valid JSONL"),
        ("null.json", "null", "must hold a list of rows, or a row on each line; it holds None"),
        ("none.json", "[]", "holds no rows|is not valid JSON"),
        ("columns.json", '[{"question": "a", "answer": "b"}]', "needs the columns instruction and output.*question"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, text, message):
    files = [str(tmp_path / name)] if text is None else write(tmp_path / name, text)
    with pytest.raises(UsageError, match=message) as error:
        load_rows("train_file", files)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("row", "template", "message"),
    [
        ({**ROW, "output": ""}, "alpaca", "row 1 has no answer"),
        ({**ROW, "output": None}, "alpaca", "row 1 has no answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "chat", "row 1 has no answer"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "alpaca", "--prompt_template chat"),
        ({**ROW, "instruction": None}, "alpaca", "row 1 has no instruction"),
        ({"messages": [{"from": "human", "value": "a"}]}, "chat", "row 1 must hold messages as a list of"),
        ({"messages": [{"role": "assistant", "content": None}]}, "chat", "row 1 must hold messages as a list of"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer, row, template, message):
    good = {"messages": [{"role": "assistant", "content": "a"}]} if "messages" in row else ROW
    with pytest.raises(UsageError, match=message):
        encode_rows(Dataset.from_list([good, row]), "train_file", template, tokenizer, 256, True)


def test_the_stream_is_whole_epochs_end_to_end():
    stream = GlobalBatches(10, 4, seed=3)
    places = [i for step in range(10) for i in stream.rows(step)]
    assert len(places) == 40
    for epoch in range(4):
        assert sorted(places[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert places[:10] != places[10:20]
    assert GlobalBatches(10, 4, seed=3).rows(7) == stream.rows(7)  # from the middle, as a resumed run asks
    assert GlobalBatches(10, 20, seed=3).rows(0) == places[:20]  # batch size cuts the stream, it does not change it
    assert GlobalBatches(10, 4, seed=4).rows(0) != stream.rows(0)


def test_ranks_share_a_global_batch_and_masked_rows_fill_up():
    rows = Dataset.from_list([{"input_ids": [i + 1] * (i + 2), "labels": [i + 1] * (i + 2)} for i in range(7)])
    for world_size in (1, 2, 3):
        seen, counts = [], []
        for rank in range(world_size):
            batches = list(micro_batches(rows, range(7), 2, rank, world_size, pad_token_id=0))
            counts.append(len(batches))
            seen += [row[0] for batch in batches for row in batch["labels"].tolist() if row[0] != IGNORE]
            for batch in batches:
                assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
        assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]
        assert len(set(counts)) == 1
    padded = next(micro_batches(rows, [0, 2], 2, 0, 1, pad_token_id=9))
    assert padded["input_ids"].tolist() == [[1, 1, 9, 9], [3, 3, 3, 3]]
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert padded["labels"].tolist() == [[1, 1, IGNORE, IGNORE], [3, 3, 3, 3]]


def test_probe_rows():
    assert len(set(probe_rows(50, 8, seed=1, step=10))) == 8
    assert probe_rows(50, 8, 1, 10) == probe_rows(50, 8, 1, 10) != probe_rows(50, 8, 1, 20)
    assert sorted(probe_rows(3, 8, 1, 10)) == [0, 1, 2]


def test_held_out_word_problems_share_no_number_and_no_template():
    def numbers(rows):
        return {word.strip(".,?") for row in rows for word in row["instruction"].split() if word.strip(".,?").isdigit()}

    train, test = arithmetic_rows(300, 0, held_out=False), arithmetic_rows(80, 0, held_out=True)
    assert not numbers(train) & numbers(test)
    assert len({row["instruction"] for row in train + test}) == 380
    for row in train + test:
        left, right = row["output"].split(". ")[1].split(" = ")
        assert str(eval(left)) == right == row["answer"]
        assert row["output"].endswith(f"The answer is {right}.")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_have_the_loss_of_single_rows(attention):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(attn_implementation=attention)).double()
    rows = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17, 18]]
    labels = [[-100, -100, 7, 8, 9], [10, 11], [-100, 13, 14, -100, 16, 17, 18]]
    packed, padded = pack(rows, labels), collate(rows, labels, pad_token_id=0)
    assert packed["input_ids"].shape == (1, 14)
    gradients = []
    for batch in (packed, padded):
        model.zero_grad()
        loss = token_loss_sum(model, batch)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    apart = sum(token_loss_sum(model, collate([ids], [wanted], 0)) for ids, wanted in zip(rows, labels, strict=True))
    assert loss.item() == pytest.approx(apart.item(), rel=1e-6)
    assert token_loss_sum(model, packed).item() == pytest.approx(apart.item(), rel=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
    shifted = {**packed, "position_ids": torch.arange(14)[None]}  # one row of 14: not the same
    assert token_loss_sum(model, shifted).item() != pytest.approx(apart.item(), rel=1e-3)


@pytest.mark.parametrize("documents", [False, True])
def test_a_packed_run_is_the_padded_run(train, tmp_path, rows, tiny, documents):
    options = {"score_lr": 1000, "validation_size": 5, "lora_dropout": 0}
    if documents:
        texts = [{"text": f"{row['instruction']} {row['output']}"} for row in rows]
        (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
        options["train_file"] = tmp_path / "texts.jsonl"
        read = load_rows("train_file", [str(tmp_path / "texts.jsonl")])
        encoded, _ = encode_rows(read, "train_file", "alpaca", AutoTokenizer.from_pretrained(tiny), 256, False)
        batch = pack(encoded[:3]["input_ids"], encoded[:3]["labels"])
        stops = (batch["input_ids"][0] == AutoTokenizer.from_pretrained(tiny).eos_token_id).nonzero().flatten()
        lengths = [len(ids) for ids in encoded[:3]["input_ids"]]
        assert stops.tolist() == [sum(lengths[: i + 1]) - 1 for i in range(3)]  # each document ends in EOS
    for name, packing in (("padded", False), ("packed", True)):
        assert train(output_dir=tmp_path / name, packing=packing, probe="cheap", **options) == 0
    for file in ("metrics.jsonl", "importance.jsonl"):
        packed, padded = (read_lines(tmp_path / name / file) for name in ("packed", "padded"))
        for one, two in zip(packed, padded, strict=True):
            for key in one.keys() & {"trained_layers", "tokens", "candidates"}:
                assert one[key] == two[key]
            for key in one.keys() & {"loss", "losses", "validation_loss"}:
                assert one[key] == pytest.approx(two[key], abs=1e-4)


def test_a_model_that_sees_across_packed_rows_is_refused(train, tmp_path, rows):
    folder = make_tiny(tmp_path / "mamba", rows)
    MambaForCausalLM(MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8)).save_pretrained(
        folder
    )
    with pytest.raises(UsageError, match="--packing true changes this model's loss"):
        train(model_name_or_path=folder, packing=True)
