"""The task that the columns of rows name, and rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import run_command, write_lines
from tasks.conftest import table
from transformers import AutoConfig, AutoTokenizer

from hf_lora import DataError
from hf_lora.tasks.base import Given, Options
from hf_lora.tasks.registry import choose_task

SPANS = [{"text": ["a"], "answer_start": [0]}]
TOLD: list[tuple[dict[str, list[Any]], dict[str, Any], str]] = [
    ({"utterance": ["a"], "intent": ["x"]}, {}, "text-classification"),
    ({"text": ["a"], "label": ["x"], "id": [0]}, {}, "text-classification"),
    ({"text": ["a"], "kind": ["x"]}, {"label_column": "kind"}, "text-classification"),
    ({"text": ["a"], "label": [["x", "y"]]}, {}, "multi-label-classification"),
    ({"text": ["a"], "label": ['["x"]']}, {}, "multi-label-classification"),
    ({"text": ["a", "b"], "rude": [0, 1], "late": ["1", "0"]}, {}, "multi-label-classification"),
    ({"text": ["a"], "label": ["x"], "late": [1]}, {"label_columns": ["late"]}, "multi-label-classification"),
    ({"tokens": ["a"], "ner_tags": ["O"]}, {}, "token-classification"),
    ({"text": ["a"], "kind": ["x"]}, {"problem_type": "multi_label_classification"}, "multi-label-classification"),
    ({"tokens": [["a"]], "ner_tags": [[0]], "id": ["1"]}, {}, "token-classification"),
    ({"words": ['["a"]'], "labels": ['["O"]']}, {}, "token-classification"),
    ({"w": [["a"]], "t": [["O"]]}, {"text_column": "w", "label_column": "t"}, "token-classification"),
    ({"id": [1], "question": ["a"], "context": ["a"], "answers": SPANS}, {}, "question-answering"),
    ({"question": ["a"], "context": ["a"], "answers": [json.dumps(SPANS[0])]}, {}, "question-answering"),
    ({"image": ["a.png"], "label": [1]}, {}, "image-classification"),
    ({"image": ["", {"bytes": b"x"}], "label": [1, 0]}, {}, "image-classification"),
    ({"image": ["a.png"], "kind": [1]}, {"label_column": "kind"}, "image-classification"),
    ({"image": ["a.png"], "text": ["a"], "label": [1]}, {"text_column": "text"}, "text-classification"),
    ({"image": ["a.png"], "text": ["a"], "label": [1]}, {"text_column": "image"}, "image-classification"),
    ({"file_name": ["a.txt"], "text": ["a"], "label": [1]}, {}, "text-classification"),
    ({"messages": [[{"role": "user", "content": "a"}]], "category": ["x"]}, {}, "causal-lm"),
    ({"question": ["a"], "answer": ["x"]}, {}, "causal-lm"),
    ({"question": ["a"], "answer": ["x"], "context": ["x"]}, {}, "causal-lm"),
    ({"text": ["a"]}, {}, "causal-lm"),
    ({"a": ["a"], "b": ["x"]}, {"completion_column": "b"}, "causal-lm"),
]


@pytest.mark.parametrize(("columns", "named", "task"), TOLD)
def test_the_task_is_told_by_the_columns(columns: dict[str, list[Any]], named: dict[str, Any], task: str) -> None:
    assert choose_task(table(**columns), Options(**named)).name == task


PAIRED: list[tuple[dict[str, list[Any]], dict[str, Any], tuple[str, str]]] = [
    ({"document": ["a"], "summary": ["b"]}, {}, ("document", "summary")),
    ({"question": ["a"], "answer": ["b"]}, {}, ("question", "answer")),
    ({"input": ["a"], "output": ["b"]}, {}, ("input", "output")),
    ({"id": ["1"], "translation": [{"en": "a", "de": "b"}]}, {}, ("en", "de")),
    ({"translation": [{"en": "a", "de": "b"}]}, {"text_column": "de", "completion_column": "en"}, ("de", "en")),
]


@pytest.mark.parametrize(("columns", "named", "pair"), PAIRED)
def test_pairs_are_for_encoder_decoders(
    columns: dict[str, list[Any]], named: dict[str, Any], pair: tuple[str, str], encoder_decoder: str
) -> None:
    config, options = AutoConfig.from_pretrained(encoder_decoder), Options(**named)
    task = choose_task(table(**columns), options, config)
    assert task.name == "seq2seq-lm"
    data = task.read(
        {"train": table(**columns)}, Given(config, AutoTokenizer.from_pretrained(encoder_decoder), options)
    )
    assert data.trained is not None
    assert (data.trained.text_column, data.trained.completion_column) == pair


def test_columns_for_several_tasks_name_them() -> None:
    with pytest.raises(DataError, match=r"task='text-classification' or task='image-classification'\."):
        choose_task(table(image=["a.png"], text=["a"], label=["x"]))
    with pytest.raises(DataError, match=r"Choose one with task='text-classification' or task='causal-lm'\."):
        choose_task(table(prompt=["a"], answer=["b"], label=["x"]))


# Mistakes ------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "tags": (
        "encoder",
        [{"tokens": ["a", "b"], "ner_tags": ["O"]}, {"tokens": ["a", 3], "ner_tags": ["O", "B"]}],
        ["line 1: 2 words in 'tokens', but 1 tags in 'ner_tags'", "line 2, column 'tokens': 3 is not a word"],
    ),
    "one tag": ("encoder", [{"tokens": ["a"], "ner_tags": ["O"]}], ["there is only one tag, 'O'"]),
    "answers": (
        "encoder",
        [
            {"question": "a", "context": "the door", "answers": {"text": ["door"], "answer_start": [3]}},
            {"question": "a", "context": "the door", "answers": {"text": ["door"], "answer_start": []}},
            {"question": "a", "context": "the door", "answers": "door"},
        ],
        [
            "line 1, column 'answers': the context has ' doo' at 3, not 'door'",
            "1 texts, but 0 values",
            "line 3, column",
        ],
    ),
    "articles": (
        "encoder",
        [{"paragraphs": [{"context": "a"}]}],
        ["line 1, column 'paragraphs': it is not in the form"],
    ),
    "a long question": (
        "encoder",
        [{"question": "door " * 40, "context": "the door", "answers": {"text": ["door"], "answer_start": [4]}}],
        ["the question has 40 tokens, and at most 20 leave room"],
    ),
    "labels": ("encoder", [{"text": "a", "label": ["x"]}, {"text": "b", "label": [0.5]}], ["0.5 is neither a string"]),
    "no labels": ("encoder", [{"text": "a", "label": []}], ["all lists are empty"]),
    "images": (
        "vision",
        [{"image": "none.png", "label": "x"}, {"image": __file__, "label": "y"}],
        ["none.png does not exist", "is not an image"],
    ),
    "a summary": ("encoder_decoder", [{"document": "door", "summary": ""}], ["column 'summary': the text is empty"]),
    "three languages": (
        "encoder_decoder",
        [{"translation": {"en": "a", "de": "b", "fr": "c"}}],
        ["It has 'translation', 'en', 'de', 'fr'; usual names"],
    ),
    "no lists": ("encoder", [{"tokens": "the door", "ner_tags": "O O"}], ["column 'ner_tags': not valid JSON"]),
    "one text": ("encoder_decoder", [{"text": "door"}], ["Name them with --text-column and --completion-column."]),
    "no form": ("encoder", [{"text": "door"}], ["--task masked-lm"]),
    "another model": (
        "encoder",
        [{"a": "x", "b": "y"}],
        ["is a bert, for which transformers has no AutoModelForSeq2SeqLM"],
    ),
    "no mask": (
        "encoder_decoder",
        [{"text": "door"}],
        ["is a t5, for which transformers has no AutoModelForMaskedLM"],
    ),
}
MORE = {"another model": ["--task", "seq2seq-lm"], "no mask": ["--task", "masked-lm"]}


@pytest.mark.parametrize("name", WRONG)
def test_rows_that_do_not_fit_are_one_message(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    base, lines, parts = WRONG[name]
    file, out = write_lines(tmp_path / "rows.jsonl", lines), tmp_path / "out"
    words = ("--model", request.getfixturevalue(base), "--train-file", file, "--output-dir", out, "--use-cpu")
    error = run_command("train", *words, *MORE.get(name, []), code=2).stderr
    assert error.startswith("Error: ")
    for part in parts:
        assert part in error
    assert not out.exists()
