"""Reading tables of text: every fault is named with its file, line and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lora.data.classes import (
    choose_columns,
    classification_rows,
    find_labels,
)
from hf_lora.data.tables import Table, read_table
from hf_lora.errors import DataError


class Words:
    """A tokenizer of a number for each letter, which is all that these functions need."""

    model_max_length = 1000
    eos_token_id = 99

    def __call__(self, texts: list[str], pairs: list[str] | None = None, max_length: int = 1000, **_: Any) -> Any:
        joined = [a + b for a, b in zip(texts, pairs, strict=True)] if pairs else texts
        ids = [[ord(c) - 96 for c in text][:max_length] for text in joined]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}


def put(folder: Path, name: str, text: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\n"a, b",x\n\n"c\nd",y\n'),
        ("a.csv", '\ufefftext;label\r\n"a, b";x\r\n"c\nd";y\r\n'),
        ("a.tsv", 'text\tlabel\na, b\tx\n"c\nd"\ty\n'),
        ("a.jsonl", '{"text": "a, b", "label": "x"}\n\n{"text": "c\\nd", "label": "y"}\n'),
        ("a.json", '[{"text": "a, b", "label": "x"}, {"text": "c\\nd", "label": "y"}]'),
        ("a.json", '{"data": [{"text": "a, b", "label": "x"},\n {"text": "c\\nd", "label": "y"}]}'),
        ("b.json", '{"text": "a, b", "label": "x"}\n{"text": "c\\nd", "label": "y"}\n'),
    ],
)
def test_every_kind_of_file_gives_the_same_table(tmp_path: Path, name: str, text: str) -> None:
    assert read_table(put(tmp_path, name, text)).columns == {"text": ["a, b", "c\nd"], "label": ["x", "y"]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"id": 1, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        {"text": "a", "labels": ["x", "y"]},
    ],
)
def test_an_object_with_a_list_in_a_known_column_is_one_row(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read_table(put(tmp_path, "a.json", json.dumps(row))).columns == {name: [row[name]] for name in row}
    wrapped = {"conversations": [row, row]}
    assert len(read_table(put(tmp_path, "a.json", json.dumps(wrapped)))) == 2


def test_values_of_csv_stay_text(tmp_path: Path) -> None:
    assert read_table(put(tmp_path, "a.csv", "text,label\n1e3,01\nNA,\n")).columns == {
        "text": ["1e3", "NA"],
        "label": ["01", ""],
    }


def test_parquet_and_a_datasets_folder(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["a", "b"], "label": [0, 1]}), tmp_path / "rows.parquet")
    assert read_table(tmp_path / "rows.parquet").columns == {"text": ["a", "b"], "label": [0, 1]}
    assert read_table(tmp_path, split="train").columns == {"text": ["a", "b"], "label": [0, 1]}
    with pytest.raises(DataError, match=r"datasets.load_dataset\(.*split='validation'\) failed"):
        read_table(tmp_path, split="validation")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text,label\n", "a.csv has no rows"),
        ("a.csv", "text,label\na,x\nb\nc,y,z\n", "line 3: 1 fields, but line 1 names 2 columns\n  - line 4: 3 fields"),
        ("a.csv", 'text,label\n"a\nb",x\nc\n', "line 4: 1 fields"),
        ("a.csv", 'text,label\n"a,x\n', "line 2: unexpected end of data"),
        ("a.csv", "text,text\na,b\n", "'text' are listed more than once"),
        ("a.csv", b"text,label\na,x\n\xff\xfe,y\n", "a.csv, line 3: not valid UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": }\n[1]\n{"a"', "line 2, column 10: Expecting value\n  - line 4, column"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: [1] is not a JSON object"),
        ("a.jsonl", "\n", "a.jsonl has no rows"),
        ("a.json", "", "a.json is empty"),
        ("a.json", '[{"text": "a"},\n {"text": "b",}]', "a.json, line 2, column"),
        ("a.json", "3", "contains a int"),
        ("a.json", "[3]", "item 1: 3 is not a JSON object"),
        ("a.parquet", "PAR", "is not a complete Parquet file"),
        ("a.txt", "text", "unknown file type"),
    ],
)
def test_broken_files_are_named_with_their_lines(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        read_table(put(tmp_path, name, text))
    assert message in str(error.value)
    assert str(tmp_path / name) in str(error.value)


def table(**columns: list[Any]) -> Table:
    count = len(next(iter(columns.values())))
    return Table("rows.csv", columns, list(range(2, count + 2)), "line", {})


def test_columns_are_found_by_their_names() -> None:
    chosen = choose_columns(table(utterance=["a"], intent=["x"], id=[1]))
    assert (chosen.text, chosen.label) == ("utterance", "intent")
    chosen = choose_columns(table(premise=["a"], hypothesis=["b"], label=[0]), text="premise", pair="hypothesis")
    assert (chosen.text, chosen.pair, chosen.label) == ("premise", "hypothesis", "label")


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ({"text": ["a"], "label": ["x"]}, {"text": "texts"}, "no column 'texts' (did you mean 'text'?)"),
        ({"words": ["a"], "label": ["x"]}, {}, "which column holds the texts. It has 'words', 'label'"),
        ({"text": ["a"]}, {}, "which column holds the labels"),
    ],
)
def test_columns_that_cannot_be_told(columns: dict[str, list[Any]], named: dict[str, str], message: str) -> None:
    with pytest.raises(DataError) as error:
        choose_columns(table(**columns), **named)
    assert message in str(error.value)


def test_labels_have_a_natural_order_and_faults_have_lines() -> None:
    assert find_labels(table(label=["b", "a", "b"]), "label") == ["a", "b"]
    assert find_labels(table(label=[10, 9, 2]), "label") == ["2", "9", "10"]
    assert find_labels(table(label=["10", "-9", "01", "--5"]), "label") == ["-9", "01", "10", "--5"]
    declared = Table("d", {"label": [0, 0]}, [1, 2], "row", {"label": ["no", "yes"]})
    assert find_labels(declared, "label") == ["no", "yes"]
    with pytest.raises(DataError, match=r"only one label .'a'. in all 2 rows"):
        find_labels(table(label=["a", "a"]), "label")
    with pytest.raises(DataError) as error:
        find_labels(table(label=["a", None, "", 0.5]), "label")
    assert all(part in str(error.value) for part in ("line 3: no label", "line 4: no label", "line 5: 0.5"))


def test_classes_that_differ_only_in_writing_are_pointed_out(messages: list[str]) -> None:
    assert find_labels(table(label=["pos", "pos ", "neg", "Neg", "other"]), "label") == [
        "Neg", "neg", "other", "pos", "pos ",
    ]  # fmt: skip
    assert "'pos' and 'pos '; 'neg' and 'Neg'" in messages[-1]


def test_classification_rows() -> None:
    data = table(text=["abc", "d"], label=["y", "x"])
    rows = classification_rows(data, choose_columns(data), ["x", "y"], Words(), max_length=3)
    assert rows[0] == {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": 1}
    assert (len(rows), rows.cut, rows[1]["labels"]) == (2, 1, 0)
    declared = Table("d", {"text": ["a"], "label": [1]}, [1], "row", {"label": ["no", "yes"]})
    assert classification_rows(declared, choose_columns(declared), ["no", "yes"], Words())[0]["labels"] == 1
    bad = table(text=["a", " ", 3], label=["x", "yy", "x"])
    with pytest.raises(DataError) as error:
        classification_rows(bad, choose_columns(bad), ["x", "y"], Words())
    for part in ("line 3, column 'text': the text is empty", "line 4, column 'text': 3 is not text",
                 "line 3, column 'label': 'yy' is not a label of the training data (did you mean 'y'?)"):  # fmt: skip
        assert part in str(error.value)


def test_the_tables_of_a_real_line_of_json_keep_its_objects(tmp_path: Path) -> None:
    row = {"text": "a", "slots": {"time": "now"}, "n": None}
    file = put(tmp_path, "a.jsonl", json.dumps(row) + "\n")
    assert read_table(file).columns == {"text": ["a"], "slots": [{"time": "now"}], "n": [None]}


def test_a_file_with_one_chat_is_one_row(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for content in ({"messages": chat}, {"data": [{"messages": chat}]}):
        (tmp_path / "rows.json").write_text(json.dumps(content))
        assert read_table(tmp_path / "rows.json").columns == {"messages": [chat]}
