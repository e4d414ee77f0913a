"""Which task the columns of a table are for, and the rows of a text classification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import DataError, Faults, nearest
from .columns import ANSWERS, CHATS, CLASSIFIED, LABELS
from .tables import Table

CLASSIFICATION = "text-classification"
CAUSAL_LM = "causal-lm"
TASKS = (CLASSIFICATION, CAUSAL_LM)
MOST_TOKENS = 512
"""Tokens kept of a text that is classified where no limit is given, or fewer where the tokenizer has a lower one."""


@dataclass
class Columns:
    """Which columns of a table are classified: `text` (with `pair` as the second text, if any) into `label`."""

    text: str
    label: str
    pair: str | None = None


def choose_task(table: Table, *, label: str | None = None, completion: str | None = None) -> str:
    """The task that a table's columns are for.

    Args:
        label, completion: columns that the user named, if any.

    Raises:
        DataError: a column that was named is not there, or the columns would do for both tasks.
    """
    for name in (label, completion):
        if name is not None:
            table.column(name)
    if label is not None or completion is not None:
        return CLASSIFICATION if completion is None else CAUSAL_LM
    if any(name in table.columns for name in CHATS):
        return CAUSAL_LM  # nothing else has these names, whatever is beside it
    has_label = any(c in table.columns for c in LABELS)
    has_pair = any(c in table.columns for c in ANSWERS)
    if has_label and has_pair:
        raise DataError(
            f"{table.source}: the columns {', '.join(map(repr, table.columns))} would do for classification and for a "
            f"language model. Say which with task={CLASSIFICATION!r} or task={CAUSAL_LM!r}."
        )
    return CLASSIFICATION if has_label else CAUSAL_LM


def choose_columns(
    table: Table, *, text: str | None = None, pair: str | None = None, label: str | None = None
) -> Columns:
    """Find the columns of a classification that were not named, by the usual names.

    Raises:
        DataError: a column that was named is not there, or one cannot be told.
    """
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
            f"{table.source}: cannot tell which column holds {what}. It has {', '.join(map(repr, table.columns))}. "
            f"Name it with {option}."
        )
    return found


def find_labels(table: Table, column: str) -> list[str]:
    """The classes of a training table in their order: as declared, by number, or by the alphabet.

    Raises:
        DataError: a label is missing or fractional, or there are fewer than two classes.
    """
    faults = Faults(f"the labels in column {column!r} of {table.source}")
    for row, value in enumerate(table.column(column)):
        if value is None or value == "":
            faults.add(f"{table.unit} {table.positions[row]}: no label")
        elif not isinstance(value, (str, int)):
            faults.add(f"{table.unit} {table.positions[row]}: {value!r} is neither a name nor an integer")
    faults.check(DataError, "Every row needs one label: a name or an integer.")
    if column in table.names:
        return table.names[column]
    found = {str(value) for value in table.column(column)}
    if len(found) < 2:
        raise DataError(
            f"{table.source}: column {column!r} holds only one label ({next(iter(found))!r}) in all {len(table)} "
            "rows, so there is nothing to tell apart. Name the right column with label_column."
        )
    return sorted(found, key=lambda name: (0, int(name), name) if name.removeprefix("-").isdecimal() else (1, 0, name))


class TokenRows(list[dict[str, Any]]):
    """Tokenized rows for Trainer: lists of different lengths, which the collator pads.

    Attributes:
        cut: how many rows reach the limit of tokens, so that they may have lost their end.
    """

    cut = 0


def classification_rows(
    table: Table, columns: Columns, labels: list[str], tokenizer: Any, max_length: int | None = None
) -> TokenRows:
    """Tokenize texts with their class indices.

    Args:
        labels: the classes in their order: see `find_labels`.
        max_length: tokens kept of a text; default: the tokenizer's limit, at most `MOST_TOKENS`.

    Raises:
        DataError: lists every text that is empty or not a text, and every label that is none of `labels`.
    """
    faults = Faults(f"reading {table.source}")
    texts = table.texts(columns.text, faults)
    pairs = table.texts(columns.pair, faults) if columns.pair else None
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
    faults.check(DataError, "Correct or remove these rows.")
    limit = max_length or min(int(tokenizer.model_max_length), MOST_TOKENS)
    encoded = tokenizer(texts, pairs, truncation=True, max_length=limit)
    rows = TokenRows(
        {**{name: values[row] for name, values in encoded.items()}, "labels": target}
        for row, target in enumerate(targets)
    )
    rows.cut = sum(len(row["input_ids"]) == limit for row in rows)
    return rows
