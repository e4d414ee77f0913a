"""Exact match and field F1 against values counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from hf_lora.errors import DataError
from hf_lora.evaluation.answers import field_table, first_object, pairs_of
from hf_lora.evaluation.metrics import load_metric


def compute(name: str, found: list[str], true: list[str], **options: Any) -> Any:
    return load_metric(name).compute(predictions=found, references=true, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [  # the examples of evaluate's own page of exact_match
        ({}, 0.25),
        ({"regexes_to_ignore": ["the ", "yell"], "ignore_case": True, "ignore_punctuation": True}, 0.5),
        ({"regexes_to_ignore": ["the ", "yell", "YELL"], "ignore_case": True, "ignore_punctuation": True}, 0.75),
        (
            {
                "regexes_to_ignore": ["the ", "yell", "YELL"],
                "ignore_case": True,
                "ignore_punctuation": True,
                "ignore_numbers": True,
            },
            1.0,
        ),
    ],
)
def test_exact_match_gives_the_values_of_evaluates_page(options: dict[str, Any], expected: float) -> None:
    references = ["the cat", "theater", "YELLING", "agent007"]
    predictions = ["cat?", "theater", "yelling", "agent"]
    assert compute("exact_match", predictions, references, **options) == {"exact_match": expected}


def test_exact_match_does_not_strip() -> None:
    assert compute("exact_match", ["a ", "b"], ["a", "b"]) == {"exact_match": 0.5}


def test_field_f1_is_micro_over_the_pairs() -> None:
    """right 2 + 1 + 0 of found 3 + 1 + 0 and wanted 2 + 2 + 1."""
    references = ['{"intent": "move", "sum": 5}', '{"intent": "stop", "name": "Ann"}', '{"intent": "go"}']
    predictions = ['Here: {"intent": "Move ", "sum": 5.0, "day": "Monday"} Bye.', '{"intent": "stop"}', "go"]
    result = compute("field_f1", predictions, references)
    precision, recall = 3 / 4, 3 / 5
    assert result == pytest.approx(
        {
            "field_f1": 2 * precision * recall / (precision + recall),
            "field_precision": precision,
            "field_recall": recall,
            "valid_json": 2 / 3,
        }
    )
    table = field_table(predictions, references)
    assert list(table) == ["intent", "name", "sum", "day"]
    assert table["intent"] == pytest.approx({"f1": 4 / 5, "precision": 1, "recall": 2 / 3, "count": 3})
    assert table["day"] == {"f1": 0, "precision": 0, "recall": 0, "count": 0}


@pytest.mark.parametrize(
    ("found", "true", "same"),
    [
        ("5", 5, True),
        (5.0, 5, True),
        (1e3, "1000", True),
        (0.5, "0.50", True),
        (5, 5.5, False),
        ("007", 7, False),  # a name
        ("+49", 49, False),
        (2**63, 2**63 + 1, False),  # equal as floats
        (True, "true", True),
        (True, 1, False),
        (" Ann", "ann ", True),
        ("a b", "ab", False),
        (["b", "A"], ["a", "b"], True),
        (["a", "a"], ["a"], False),
        ({"b": 1}, {"b": "1"}, True),
        ({"b": 1}, {"c": 1}, False),
        ([{"b": 1}, {"b": 2}], [{"b": 2}, {"b": 1}], True),
        (None, [], True),
        (None, "none", False),
        ("STRASSE", "straße", True),
    ],
)
def test_values_are_compared_as_they_are_meant(found: Any, true: Any, same: bool) -> None:
    assert (pairs_of({"a": found}) == pairs_of({"a": true})) is same
    result = compute("field_f1", [json.dumps({"a": found, "z": 0})], [json.dumps({"a": true, "z": 0})])
    assert (result["field_f1"] == 1.0) is same


def test_a_list_earns_what_it_has_right() -> None:
    result = compute("field_f1", ['{"a": ["x", "y", "y"]}'], ['{"a": ["y", "y", "z"]}'])
    assert result["field_f1"] == pytest.approx(4 / 6)
    assert pairs_of({"a": ["y", "y"]}) == Counter({("a", "y"): 2})


@pytest.mark.parametrize(
    "text", ["", "no", '{"a": 1', "[1]", "{a: 1}", '{"a": {"b": 1}, ', "{" * 3, '{"a":' * 100_000]
)
def test_what_holds_no_object_has_no_fields(text: str) -> None:
    assert first_object(text) is None
    result = compute("field_f1", [text], ['{"a": 1}'])
    assert result == {"field_f1": 0, "field_precision": 0, "field_recall": 0, "valid_json": 0}


def test_references_that_are_no_objects_are_all_named() -> None:
    with pytest.raises(DataError, match=r"(?s)reference 1: 'yes'.*reference 2: '\[1\]'.*exact_match"):
        compute("field_f1", ["{}"] * 3, ["{}", "yes", "[1]"])
