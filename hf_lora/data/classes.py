"""The columns and labels of a classification, and the rows of a text classification."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import DataError, Faults, nearest
from .columns import CLASSIFIED, IMAGES, LABELS
from .tables import IMAGE_FILES, Table
from .trained import TrainedFormat

logger = logging.get_logger(__name__)

REGRESSION = "regression"
MULTI_LABEL = "multi_label_classification"
PROBLEM_TYPES = ("single_label_classification", REGRESSION, MULTI_LABEL)
"""What the labels of a classification file are: a class, a number, or several classes for each row."""
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
    label = label or find_column(table, LABELS, "label_column", "the labels")
    text = text or find_column(table, CLASSIFIED, "text_column", "the texts", skip=(label, pair))
    return Columns(text, label, pair)


def find_column(table: Table, usual: Iterable[str], option: str, what: str, skip: Iterable[str | None] = ()) -> str:
    """The first of the usual names that a table has.

    Raises:
        DataError: it has none; the message names the `option`.
    """
    found = next((c for c in usual if c in table.columns and c not in skip), None)
    if found is None:
        raise DataError(
            f"{table.source}: cannot determine which column holds {what}. It has "
            f"{', '.join(map(repr, table.columns))}. Name it with {option}."
        )
    return found


def column_of(
    table: Table,
    named: str | None,
    recorded: str | None,
    usual: Iterable[str],
    option: str,
    what: str,
    skip: Iterable[str | None] = (),
) -> str:
    """The column that the user named, else that of the training of an adapter, else the first of the usual names.

    Raises:
        DataError: there is none; the message names the `option`.
    """
    if named is not None:
        table.column(named)
        return named
    return recorded if recorded in table.columns and recorded else find_column(table, usual, option, what, skip)


def image_column(table: Table) -> str | None:
    """The column of images, by its name and its first cell: the path of an image, or no text."""
    for name in IMAGES:
        cell = next((value for value in table.columns.get(name, ()) if value not in (None, "")), None)
        if cell is not None and (not isinstance(cell, str) or Path(cell).suffix.lower() in IMAGE_FILES):
            return name
    return None


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
    return in_order(found)


def in_order(labels: Iterable[str]) -> list[str]:
    """Labels in order: numeric, or alphabetical."""
    return sorted(
        labels, key=lambda name: (0, int(name), name) if name.removeprefix("-").isdecimal() else (1, 0, name)
    )


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

    def select(self, indices: Iterable[int]) -> Self:
        """Some of the rows."""
        return type(self)(self[i] for i in indices)


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
    targets = (
        _numbers(table, columns.label, faults)
        if labels is None
        else class_indices(table, columns.label, labels, faults)
    )
    faults.check(DataError, "Correct or remove these rows.")
    limit = length_limit(tokenizer, max_length, window)
    return encoded_rows(tokenizer(texts, pairs, truncation=True, max_length=limit), targets, limit)


def encoded_rows(encoded: Mapping[str, Any], targets: Sequence[Any], limit: int) -> TokenRows:
    """Rows of what a tokenizer returned, and their labels."""
    rows = TokenRows(
        {**{name: values[row] for name, values in encoded.items()}, "labels": target}
        for row, target in enumerate(targets)
    )
    rows.cut = sum(len(row["input_ids"]) == limit for row in rows)
    return rows


def class_indices(table: Table, column: str, labels: list[str], faults: Faults) -> list[int]:
    """The index of each row's label; adds a fault for each that is not one of `labels`."""
    finder = LabelFinder(table, column, labels)
    return [finder.index(value, row, faults) for row, value in enumerate(table.column(column))]


class LabelFinder:
    """From labels in the cells of a column to their indices."""

    def __init__(self, table: Table, column: str, labels: list[str]) -> None:
        self._table, self._column, self._labels = table, column, labels
        self._declared = table.names.get(column)
        self._indices = {name: i for i, name in enumerate(labels)}

    def index(self, value: object, row: int, faults: Faults) -> int:
        """The index of a label; 0 after adding a fault."""
        name = str(value)
        if self._declared is not None and isinstance(value, int) and 0 <= value < len(self._declared):
            name = self._declared[value]
        if name not in self._indices:
            known = nearest(name, self._labels) or f"; there are {', '.join(map(repr, self._labels[:10]))}"
            faults.add(
                f"{self._table.at(row)}, column {self._column!r}: {value!r} is not a label of the training data{known}"
            )
        return self._indices.get(name, 0)


def _numbers(table: Table, column: str, faults: Faults) -> list[float]:
    numbers = [as_number(value) for value in table.column(column)]
    for row, number in enumerate(numbers):
        if number is None:
            faults.add(f"{table.at(row)}, column {column!r}: {table.column(column)[row]!r} is not a finite number")
    return [number or 0.0 for number in numbers]
