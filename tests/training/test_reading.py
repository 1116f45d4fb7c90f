"""Rows as people have them: every format, text as it is written, nothing cut, dropped or left out in silence."""

import gzip
import json

import datasets
import pandas
import pyarrow as pa
import pyarrow.ipc
import pytest
from datasets import Dataset, DatasetDict

from ist.training.command_line import UsageError
from ist.training.reading import load_rows, read_rows, unused_columns
from ist.training.sources import find_sources

ROWS = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(4)]


def texts(rows: Dataset) -> list[dict]:
    return rows.select_columns(["instruction", "input", "output"]).to_list()


def write(folder, name: str) -> str:
    """ROWS in the format of the name."""
    file, frame = folder / name, pandas.DataFrame(ROWS)
    plain = name.removesuffix(".gz")
    if plain.endswith(".json"):
        content = json.dumps(ROWS).encode()
    elif plain.endswith((".jsonl", ".ndjson")):
        content = "\n".join(map(json.dumps, ROWS)).encode()
    elif plain.endswith((".csv", ".tsv")):
        content = frame.to_csv(index=False, sep="," if plain.endswith("csv") else "\t").encode()
    elif plain.endswith(".parquet"):
        content = frame.to_parquet(index=False)
    else:
        sink = pa.BufferOutputStream()
        table = pa.Table.from_pylist(ROWS)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue().to_pybytes()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return str(file)


KINDS = ["a.json", "a.jsonl", "a.ndjson", "a.csv", "a.tsv", "a.parquet", "a.arrow"]


@pytest.mark.parametrize("name", [*KINDS, *(f"{kind}.gz" for kind in KINDS)])
def test_every_format_holds_the_same_rows(tmp_path, name):
    assert texts(load_rows("train_file", [write(tmp_path, name)])) == ROWS


def test_files_folders_patterns_and_saved_datasets(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("b.csv", "a.json", "c.parquet"):
        write(folder, name)
    (folder / "README.md").write_text("About the rows.")
    assert texts(load_rows("train_file", [str(folder)])) == ROWS * 3
    assert texts(load_rows("train_file", [str(folder / "*.[cp]*")])) == ROWS * 2
    assert load_rows("train_file", [str(folder)])["file"][4] == str(folder / "b.csv")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS[:1]), "test": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "two")
    assert texts(load_rows("train_file", [str(tmp_path / "one")])) == ROWS
    assert texts(read_rows("train_file", find_sources("train_file", [str(tmp_path / "two")], "test"))) == ROWS
    with pytest.raises(UsageError, match="has no split other, only train, test; --dataset_split names one"):
        read_rows("train_file", find_sources("train_file", [str(tmp_path / "two")], "other"))
    with pytest.raises(UsageError, match="holds no files of rows"):
        (tmp_path / "empty").mkdir()
        load_rows("train_file", [str(tmp_path / "empty")])


def test_a_saved_dataset_with_other_names(tmp_path):
    """As gsm8k: one of its names is ours, for something else."""
    Dataset.from_list([{"question": "1 + 1?", "answer": "2", "id": 7}]).save_to_disk(tmp_path / "d")
    mapping = {"question": "instruction", "answer": "output"}
    rows = read_rows("train_file", find_sources("train_file", [str(tmp_path / "d")]), mapping)
    assert (rows["instruction"], rows["output"], rows["unused"]) == (["1 + 1?"], ["2"], ["id"])


def test_jsonl_under_the_name_of_json(tmp_path):
    lines = [json.dumps({"instruction": "a\u2028b", "output": "c"}, ensure_ascii=False)] * 2
    for count in (1, 2):
        (tmp_path / f"{count}.json").write_text("\n".join(lines[:count]))
        assert load_rows("train_file", [str(tmp_path / f"{count}.json")])["instruction"] == ["a\u2028b"] * count


def test_plain_text_is_a_row_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\n  Two.\r\nThree.")
    assert load_rows("train_file", [str(tmp_path / "a.txt")])["text"] == ["One.", "  Two.", "Three."]


@pytest.mark.parametrize(
    ("text", "outputs"),
    [
        ("[2, 0.5, 1e3, 2.50, 1234567890123456789]", ["2", "0.5", "1e3", "2.50", "1234567890123456789"]),
        ("[true, false]", ["true", "false"]),
        ('["2024-01-02", "2024-01-03T00:00:00Z"]', ["2024-01-02", "2024-01-03T00:00:00Z"]),
        ('["nan", "null", "None", "NA", " x ", "1.0"]', ["nan", "null", "None", "NA", " x ", "1.0"]),
        ("[NaN, null, Infinity]", ["", "", ""]),
    ],
)
def test_values_are_learnt_as_they_are_written(tmp_path, text, outputs):
    values = text.strip("[]").split(", ")
    lines = [f'{{"instruction": "a", "output": {value}}}' for value in values]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.json").write_text(f"[{', '.join(lines)}]")
    for name in ("a.jsonl", "a.json"):
        read = load_rows("train_file", [str(tmp_path / name)])["output"]
        assert read == outputs


def test_parquet_of_pandas(tmp_path):
    """Integers with holes are floats there; a column of floats stays one; dates are dates."""
    frame = pandas.DataFrame({"instruction": ["a"] * 3, "input": [5, None, 7], "output": [2.0, 0.5, 3.0]})
    frame["system"] = pandas.to_datetime(["2024-01-02"] * 3).date
    frame.to_parquet(tmp_path / "a.parquet")
    rows = load_rows("train_file", [str(tmp_path / "a.parquet")])
    assert rows["input"] == ["5", "", "7"]
    assert rows["output"] == ["2.0", "0.5", "3.0"]
    assert rows["system"] == ["2024-01-02"] * 3


def test_csv_is_text(tmp_path):
    (tmp_path / "a.csv").write_text('instruction,output\n"Say ""hi"", twice","hi\nhi"\n007,1.50\nNA,null\n')
    rows = load_rows("train_file", [str(tmp_path / "a.csv")])
    assert rows["instruction"] == ['Say "hi", twice', "007", "NA"]
    assert rows["output"] == ["hi\nhi", "1.50", "null"]
    (tmp_path / "b.csv").write_text("instruction,output\na,b,c\n")
    with pytest.raises(UsageError, match="has a row 0 of more cells than its first line"):
        load_rows("train_file", [str(tmp_path / "b.csv")])


def test_files_of_other_columns_types_and_forms_go_together(tmp_path):
    (tmp_path / "a.json").write_text('[{"output": 2, "instruction": "1 + 1?", "id": 7}]')
    (tmp_path / "b.jsonl").write_text('{"instruction": "x", "output": "two", "source": {"a": 1}}\n{"text": "plain"}')
    messages = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]
    columns = {"id": 1, "source": "s", "model": "m", "system_prompt": "Be brief.", "messages": messages}
    (tmp_path / "c.json").write_text(json.dumps([columns]))
    rows = load_rows("train_file", [str(tmp_path / name) for name in ("a.json", "b.jsonl", "c.json")])
    assert rows["output"] == ["2", "two", None, None]
    assert json.loads(rows["messages"][3]) == messages
    assert rows["system"][3] == "Be brief."
    assert list(zip([file[-6:] for file in rows["file"]], rows["row"], strict=True))[2] == (".jsonl"[-6:], 1)
    said = unused_columns(rows)
    assert [line.split("/")[-1] for line in said] == [
        "a.json: columns that are not used: id",
        "b.jsonl: columns that are not used: source",
        "c.json: columns that are not used: id, model, source",
    ]


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"instruction": "a", "context": "b", "response": "c", "category": "d"}, ("instruction", "input", "output")),
        ({"conversations": [{"from": "human", "value": "a"}]}, ("messages",)),
        ({"prompt": "a", "completion": "b"}, ("prompt", "completion")),
        ({"text": "a"}, ("text",)),
    ],
)
def test_names_that_people_use(tmp_path, row, columns):
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert {*load_rows("train_file", [str(tmp_path / "a.json")]).column_names} == {
        "file",
        "row",
        "unused",
        "renamed",
        *columns,
    }


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"instruction": "a", "output": "b"}\n{"instruction": "caf\xe9"',
            "the byte 0xe9 in line 2. Save it as UTF-8",
        ),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n{"a": ', "is not valid JSONL: line 2: "),
        ("a.jsonl", b'{"instruction": "a", "output": "b"}\n[1]', r"row 1 is not an object with columns, but \[1\]"),
        ("a.json", b'{"data": [{"instruction": "a"}]}', "must hold a list of rows.*an object with the keys data"),
        ("a.json", b'[{"instruction": "a", "output": ["b"]}]', "row 0 has a list in output"),
        ("a.json", b'[{"instruction": "\\ud800", "output": "b"}]', "row 0 has half of a character"),
        ("a.json.gz", b"[]", "cannot be read"),
        ("a.parquet", b"PAR1", "is not valid Parquet"),
        ("a.json", b'[{"messages": "hello"}]', "row 0 has a text in messages that is not JSON"),
        (
            "a.json",
            b'[{"question": "a", "answer": "b"}]',
            "it has question, answer. --column_mapping THEIRS=OURS renames",
        ),
    ],
)
def test_what_cannot_be_read_names_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"--train_file {tmp_path / name}.*{message}") as error:
        load_rows("train_file", [str(tmp_path / name)])
    assert "\n" not in str(error.value)


def test_an_unwritable_cache_is_named(tmp_path, monkeypatch):
    file = write(tmp_path, "a.json")
    (tmp_path / "cache").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"its cache .* cannot be written .*; HF_DATASETS_CACHE names another place"):
        load_rows("train_file", [file])


@pytest.mark.parametrize("first", ["instruction;input;output\r\n", "sep=;\r\ninstruction;input;output\r\n"])
def test_csv_of_a_european_excel(tmp_path, first):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + f'{first}Add;;"1,50 €; yes"\r\n'.encode())
    assert texts(load_rows("train_file", [str(tmp_path / "a.csv")])) == [
        {"instruction": "Add", "input": "", "output": "1,50 €; yes"}
    ]


def test_a_folder_as_people_have_it(tmp_path):
    """Splits by name, hidden files and pages about the dataset beside them."""
    folder = tmp_path / "set"
    row = {"instruction": "Add.", "input": "", "output": "3"}
    for name in ("train-00000-of-00001.jsonl", "test.jsonl", "validation.jsonl", "data/train-2.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({**row, "output": name}))
    for name in ("._train.jsonl", ".ipynb_checkpoints/train.jsonl", "_SUCCESS", "README.md", "dataset_infos.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")

    def read(split):
        return read_rows("train_file", find_sources("train_file", [str(folder)], split))["output"]

    assert sorted(read("train")) == ["data/train-2.jsonl", "train-00000-of-00001.jsonl"]
    assert read("test") == ["test.jsonl"]
    with pytest.raises(UsageError, match="has no split dev, only train, validation, test; --dataset_split names one"):
        read("dev")


def test_keys_of_turns_that_are_not_used_are_named(tmp_path):
    turns = [
        {"role": "user", "content": "a", "audio": {"id": 1}},
        {"role": "assistant", "content": "b", "rank": 0, "name": "c"},
    ]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": turns}]))
    (line,) = unused_columns(load_rows("train_file", [str(tmp_path / "a.json")]))
    assert line.endswith("columns that are not used: messages[].audio, messages[].name, messages[].rank")


def test_a_column_is_left_out_by_a_mapping_to_nothing(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a", "tools": "not JSON"}]))
    rows = read_rows("train_file", find_sources("train_file", [str(tmp_path / "a.json")]), {"tools": ""})
    assert "tools" not in rows.column_names
    mixed = {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}
    (tmp_path / "b.json").write_text(json.dumps([mixed]))
    with pytest.raises(UsageError, match="row 0 has prompt as text and completion as turns: give both"):
        load_rows("train_file", [str(tmp_path / "b.json")])
