"""Metrics of generated answers: `exact_match`, and `field_f1` for JSON objects.

Fields are compared as pairs of name and value:

- a value is compared as text, ignoring case and outer white space; a number by its value, so 5 equals 5.0 and "5";
- a list gives one pair for each element, in any order; a nested object gives pairs named `outer.inner`;
- null gives no pair, like a missing field.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import DataError, Faults

Pairs = Counter[tuple[str, str]]

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?", re.ASCII)
"""Numbers, which are compared by value. 007 and +49 30 are compared as text."""


def exact_match(
    predictions: Sequence[str],
    references: Sequence[str],
    regexes_to_ignore: Sequence[str] | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> dict[str, float]:
    """The fraction of texts that equal their references, with the arguments and results of `evaluate`'s metric."""
    ignored = (string.punctuation if ignore_punctuation else "") + (string.digits if ignore_numbers else "")
    table = str.maketrans("", "", ignored)

    def compared(text: str) -> str:
        for regex in regexes_to_ignore or ():
            text = re.sub(regex, "", text)
        return (text.lower() if ignore_case else text).translate(table)

    return {"exact_match": _mean([compared(a) == compared(b) for a, b in zip(predictions, references, strict=True)])}


def field_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 = 2 TP / (2 TP + FP + FN) over all pairs of field and value of JSON objects.

    The object that begins at the first `{` of a prediction is used; without a valid one, the prediction has no fields.

    Returns (keys):
        field_f1, field_precision, field_recall: micro-averaged over all answers; 0 if there are no pairs.
        valid_json: the fraction of predictions that contain an object.

    Raises:
        DataError: a reference is not a JSON object; lists them.
    """
    scores = _scores(sum(field_counts(predictions, references).values(), Counter[str]()))
    valid = _mean([first_object(text) is not None for text in predictions])
    return {f"field_{name}": scores[name] for name in ("f1", "precision", "recall")} | {"valid_json": valid}


def field_table(predictions: Sequence[str], references: Sequence[str]) -> dict[str, dict[str, float]]:
    """The scores of each field: name -> `f1`, `precision`, `recall` and `count`, the pairs in the references.

    Fields that are only in predictions have count 0. The most frequent come first.

    Raises:
        DataError: a reference is not a JSON object; lists them.
    """
    counts = field_counts(predictions, references)
    ordered = sorted(counts, key=lambda name: (-counts[name]["wanted"], name))
    return {name: {**_scores(counts[name]), "count": counts[name]["wanted"]} for name in ordered}


def field_counts(predictions: Sequence[str], references: Sequence[str]) -> dict[str, Counter[str]]:
    """Field -> number of pairs that are `right`, `found` in the predictions, and `wanted` by the references."""
    faults = Faults("field_f1")
    counts: dict[str, Counter[str]] = {}
    for row, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        wanted = whole_object(reference)
        if wanted is None:
            faults.add(f"reference {row}: {reference[:60]!r} is not a JSON object")
            continue
        true, found = pairs_of(wanted), pairs_of(first_object(prediction) or {})
        for kind, pairs in (("right", true & found), ("found", found), ("wanted", true)):
            for (name, _), number in pairs.items():
                counts.setdefault(name, Counter())[kind] += number
    faults.check(DataError, "field_f1 needs references that are JSON objects; exact_match accepts any text.")
    return counts


def whole_object(text: str) -> dict[str, Any] | None:
    """The text parsed as a JSON object, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def first_object(text: str) -> dict[str, Any] | None:
    """The JSON object that begins at the first `{` of a text, or None."""
    start = text.find("{")
    if start < 0:
        return None
    try:
        value, _ = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # a model may generate a thousand opening brackets
        return None
    return value if isinstance(value, dict) else None


def pairs_of(value: object, name: str = "") -> Pairs:
    """The pairs of field and value in an object, with their counts."""
    return Counter(_pairs(value, name))


def _pairs(value: object, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _pairs(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _pairs(inner, name)
    elif value is not None:
        yield name, _normalized(value)


def _normalized(value: object) -> str:
    text = str(value).strip().casefold()
    if isinstance(value, bool) or len(text) > 30 or not re.fullmatch(_NUMBER, text):
        return text
    if re.fullmatch(r"-?\d+", text, re.ASCII):
        return str(int(text))  # exact, also for long order or account numbers
    number = float(text)
    return str(int(number)) if number.is_integer() else repr(number)


def _scores(counts: Counter[str]) -> dict[str, float]:
    right, found, wanted = counts["right"], counts["found"], counts["wanted"]
    return {
        "f1": 2 * right / (found + wanted) if found + wanted else 0.0,
        "precision": right / found if found else 0.0,
        "recall": right / wanted if wanted else 0.0,
    }


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values) if values else float("nan")


ANSWER_METRICS: dict[str, Callable[..., dict[str, float]]] = {"exact_match": exact_match, "field_f1": field_f1}
"""Name -> a function of texts (`predictions`, `references`); it raises DataError if the references do not suit it."""
