"""Which task the columns of a table are for, and the rows of a text classification."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import DataError, Faults, nearest
from .columns import ANSWERS, CHATS, CLASSIFIED, LABELS
from .tables import Table
from .trained import TrainedFormat

logger = logging.get_logger(__name__)

CLASSIFICATION = "text-classification"
CAUSAL_LM = "causal-lm"
TASKS = (CLASSIFICATION, CAUSAL_LM)
REGRESSION = "regression"
PROBLEM_TYPES = ("single_label_classification", REGRESSION)
"""What the labels of a classification file are: classes, or numbers."""
FEW_CLASSES = 10
"""So many labels are classes, however few rows there are."""
MOST_TOKENS = 512
"""Default length limit in tokens for classification; the tokenizer's limit may be lower."""


@dataclass
class Columns:
    """The columns of a classification: `text`, optionally `pair` as a second text, and `label`."""

    text: str
    label: str
    pair: str | None = None


def choose_task(table: Table, *, label: str | None = None, completion: str | None = None) -> str:
    """The task that a table's columns are for.

    Args:
        label, completion: columns that the user named, if any.

    Raises:
        DataError: a named column does not exist, or the columns fit both tasks.
    """
    for name in (label, completion):
        if name is not None:
            table.column(name)
    if label is not None or completion is not None:
        return CLASSIFICATION if completion is None else CAUSAL_LM
    if any(name in table.columns for name in CHATS):
        return CAUSAL_LM  # these names are unambiguous, whatever other columns there are
    has_label = any(c in table.columns for c in LABELS)
    has_pair = any(c in table.columns for c in ANSWERS)
    if has_label and has_pair:
        raise DataError(
            f"{table.source}: the columns {', '.join(map(repr, table.columns))} fit both classification and a "
            f"language model. Choose one with task={CLASSIFICATION!r} or task={CAUSAL_LM!r}."
        )
    return CLASSIFICATION if has_label else CAUSAL_LM


def choose_columns(
    table: Table,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    trained: TrainedFormat | None = None,
) -> Columns:
    """Find the columns of a classification that were not named: those of an adapter's training, or by the usual names.

    Raises:
        DataError: a named column does not exist, one was not found, or the second text of the training is missing.
    """
    if trained is not None:
        pair = pair or trained.pair_column
        if pair == trained.pair_column and pair is not None and pair not in table.columns:
            raise DataError(
                f"{table.source}: the adapter was trained on pairs of texts, and there is no column {pair!r} of the "
                f"second ones. It has {', '.join(map(repr, table.columns))}. Name it with pair_column."
            )
        text, label = (
            named or (known if known in table.columns else None)
            for named, known in ((text, trained.text_column), (label, trained.label_column))
        )
    for name in (text, pair, label):
        if name is not None:
            table.column(name)
    label = label or _find(table, LABELS, "label_column", "the labels")
    text = text or _find(table, CLASSIFIED, "text_column", "the texts", skip=(label, pair))
    return Columns(text, label, pair)


def _find(table: Table, usual: Iterable[str], option: str, what: str, skip: Iterable[str | None] = ()) -> str:
    found = next((c for c in usual if c in table.columns and c not in skip), None)
    if found is None:
        raise DataError(
            f"{table.source}: cannot determine which column holds {what}. It has "
            f"{', '.join(map(repr, table.columns))}. Name it with {option}."
        )
    return found


def suggest_columns(table: Table) -> tuple[str, str]:
    """The columns that may hold the texts (the longest) and the classes (the fewest values), for a message."""
    sizes = {name: sum(len(str(value)) for value in values) for name, values in table.columns.items()}
    text = max(sizes, key=lambda name: sizes[name])
    counts = {name: len(set(map(str, values))) for name, values in table.columns.items() if name != text}
    several = {name: count for name, count in counts.items() if count > 1} or counts
    return text, min(several, key=lambda name: several[name], default="LABELS")


def find_labels(table: Table, column: str, problem_type: str | None = None) -> list[str]:
    """The classes of a training table in order: as declared, numeric, or alphabetical.

    Args:
        problem_type: single_label_classification accepts any values; by default they must look like classes.

    Raises:
        DataError: a label is missing, there are fewer than two classes, or the values are rather numbers or texts.
    """
    if problem_type is None and column not in table.names:
        _refuse_fractions(table, column)
    faults = Faults(f"the labels in column {column!r} of {table.source}")
    for row, value in enumerate(table.column(column)):
        if value is None or value == "":
            faults.add(f"{table.unit} {table.positions[row]}: no label")
        elif not isinstance(value, (str, int)):
            faults.add(f"{table.unit} {table.positions[row]}: {value!r} is neither a string nor an integer")
    faults.check(DataError, "Every row needs one label: a string or an integer.")
    if column in table.names:
        return table.names[column]
    found = {str(value) for value in table.column(column)}
    if problem_type is None and len(found) > FEW_CLASSES and 2 * len(found) > len(table):
        raise DataError(
            f"{table.source}: column {column!r} holds {len(found)} different labels in {len(table)} rows, so few "
            "texts would show each class. Name the right column with label_column, or pass problem_type="
            f"{PROBLEM_TYPES[0]!r} if each is a class."
        )
    _warn_of_variants(table, column)
    if len(found) < 2:
        raise DataError(
            f"{table.source}: column {column!r} holds only one label ({next(iter(found))!r}) in all {len(table)} "
            "rows, and classification needs two or more. Name the right column with label_column."
        )
    return sorted(found, key=lambda name: (0, int(name), name) if name.removeprefix("-").isdecimal() else (1, 0, name))


def _refuse_fractions(table: Table, column: str) -> None:
    """Refuse labels that are numbers, some with a fraction.

    Raises:
        DataError: names an example, and what to do.
    """
    numbers = [as_number(value) for value in table.column(column) if value not in (None, "")]
    fractions = [number for number in numbers if number is not None and not number.is_integer()]
    if fractions and None not in numbers:
        raise DataError(
            f"{table.source}: column {column!r} holds numbers such as {fractions[0]:g}, and classes are names or "
            f"integers. To predict numbers, pass problem_type={REGRESSION!r}. Otherwise name the right column with "
            "label_column."
        )


def as_number(value: object) -> float | None:
    """A finite number that a cell holds, also as text; else None."""
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _warn_of_variants(table: Table, column: str) -> None:
    """Warn about classes that differ only in case or outer white space, which are probably one."""
    variants: dict[str, dict[str, None]] = {}
    for value in map(str, table.column(column)):
        variants.setdefault(value.strip().casefold(), {})[value] = None
    alike = [" and ".join(map(repr, names)) for names in variants.values() if len(names) > 1]
    if alike:
        logger.warning(
            f"{table.source}: labels in column {column!r} differ only in case or outer white space: they become "
            f"separate classes. {'; '.join(alike[:5])}."
        )


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, window: int | None = None) -> int:
    """The maximum tokens of a row of `classification_rows`, from its arguments."""
    limit = max_length or min(int(tokenizer.model_max_length), MOST_TOKENS)
    return min(limit, window or limit)


class TokenRows(list[dict[str, Any]]):
    """Tokenized rows for Trainer, of different lengths; the collator pads them.

    Attributes:
        cut: how many rows reach the length limit, so that they may have been truncated.
    """

    cut = 0


def classification_rows(
    table: Table,
    columns: Columns,
    labels: list[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    window: int | None = None,
) -> TokenRows:
    """Tokenize texts and add their class indices.

    Args:
        labels: the classes in order, see `find_labels`; None: the labels are numbers.
        max_length: limit in tokens; default: the tokenizer's, at most `MOST_TOKENS`.
        window: number of positions of the model, which no row exceeds.

    Raises:
        DataError: lists every value that is empty or not text, and every label that is not one of `labels`.
    """
    faults = Faults(f"reading {table.source}")
    texts = table.texts(columns.text, faults)
    pairs = table.texts(columns.pair, faults) if columns.pair else None
    targets: Sequence[float]
    targets = _numbers(table, columns.label, faults) if labels is None else _classes(table, columns, labels, faults)
    faults.check(DataError, "Correct or remove these rows.")
    limit = length_limit(tokenizer, max_length, window)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=limit)
    rows = TokenRows(
        {**{name: values[row] for name, values in encoded.items()}, "labels": target}
        for row, target in enumerate(targets)
    )
    rows.cut = sum(len(row["input_ids"]) == limit for row in rows)
    return rows


def _classes(table: Table, columns: Columns, labels: list[str], faults: Faults) -> list[int]:
    declared = columns.label in table.names
    index = {name: i for i, name in enumerate(labels)}
    targets: list[int] = []
    for row, value in enumerate(table.column(columns.label)):
        name = str(value)
        if declared and isinstance(value, int) and 0 <= value < len(table.names[columns.label]):
            name = table.names[columns.label][value]
        if name not in index:
            known = nearest(name, labels) or f"; there are {', '.join(map(repr, labels[:10]))}"
            faults.add(
                f"{table.at(row)}, column {columns.label!r}: {value!r} is not a label of the training data{known}"
            )
        targets.append(index.get(name, 0))
    return targets


def _numbers(table: Table, column: str, faults: Faults) -> list[float]:
    numbers = [as_number(value) for value in table.column(column)]
    for row, number in enumerate(numbers):
        if number is None:
            faults.add(f"{table.at(row)}, column {column!r}: {table.column(column)[row]!r} is not a finite number")
    return [number or 0.0 for number in numbers]
