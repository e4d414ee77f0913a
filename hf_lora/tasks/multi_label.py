"""Multi-label classification of texts: any number of classes for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import PretrainedConfig

from ..adapt.labels import generates
from ..data import classes
from ..data.chat import marked
from ..data.classes import MULTI_LABEL, LabelFinder, TokenRows, column_of
from ..data.columns import CHATS, CLASSIFIED, LABELS, TOKENS
from ..data.formats import parsed, read_list
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import DataError, Faults
from ..evaluation.classes import f1
from .base import Collected, Data, Given, Options, decoded, from_columns, truncation
from .text_classification import TextClassification, holds_lists


class MultiLabel(TextClassification):
    """The labels are lists in one column, or one column of 0 and 1 for each class."""

    name = "multi-label-classification"
    kinds = ("several classes",)
    starts_at_means = False
    metrics: ClassVar[tuple[str, ...]] = ("f1", "macro_f1", "accuracy")
    options = {
        "text_column": "text", "pair_column": "second", "label_column": "labels", "label_columns": ["angry", "happy"],
        "problem_type": MULTI_LABEL, "max_length": classes.MOST_TOKENS, "pooling": "mean",
    }  # fmt: skip

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        if options.label_columns:
            return True
        if options.label_column is not None:
            return holds_lists(table, options.label_column) and not _tokens(table, options)
        if {*CHATS} & table.columns.keys() or _tokens(table, options):
            return False
        named = [name for name in LABELS if name in table.columns]
        if named or generates(config):  # a table of texts with flags may be for a language model
            return any(holds_lists(table, name) for name in named)
        return len(_flags(table, options)) > 1

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        train, options, known = next(iter(tables.values())), given.options, given.trained or TrainedFormat()
        flags = self._flag_columns(train, given)
        label = None
        if not flags:
            label = column_of(train, options.label_column, known.label_column, LABELS, "label_column", "the labels")
        text = column_of(
            train, options.text_column, known.text_column, CLASSIFIED, "text_column", "the texts", (label,)
        )
        pair = options.pair_column or known.pair_column
        labels = given.labels or flags or _labels_in(train, str(label))
        tokenizer = given.processor
        if not given.known and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        data = Data(self, given.config, tokenizer, labels=labels, kind=f"{len(labels)} labels, any number for each")
        limit = classes.length_limit(tokenizer, options.max_length, given.window)
        for split, table in tables.items():
            data.rows[split] = _rows(table, text, pair, label, labels, tokenizer, limit)
        data.trained = TrainedFormat(self.kinds[0], text, pair_column=pair, label_column=label, max_length=limit)
        data.lines = [from_columns(self.name, (text, pair, label, *flags), data.rows, data.kind)]
        data.lines += truncation(sum(rows.cut for rows in data.rows.values()), "texts")
        return data

    def _flag_columns(self, table: Table, given: Given) -> list[str]:
        """The columns of 0 and 1; empty if the labels are lists."""
        options = given.options
        if options.label_columns:
            return [name for name in options.label_columns if table.column(name) is not None]
        if options.label_column is not None:
            return []
        if given.labels is not None:
            return given.labels if set(given.labels) <= table.columns.keys() else []
        return [] if any(name in table.columns for name in LABELS) else _flags(table, options)

    def settings(self, data: Data) -> dict[str, Any]:
        return {**super().settings(data), "problem_type": MULTI_LABEL}

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        chosen = [name for name, value in zip(data.labels or (), row["labels"], strict=True) if value]
        return f"{decoded(data.processor, row['input_ids'])} → {marked(', '.join(chosen))}"

    def metrics_of(self, options: Options, table: Table) -> tuple[str, ...]:
        return self.metrics

    def compute_metrics(self, data: Data, split: str) -> Any:
        return Collected(lambda logits, _: (logits > 0).long(), _scores)


def _scores(found: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
    """`f1` over all pairs of row and class, `macro_f1` as the mean over classes, `accuracy` of whole rows."""
    chosen, wanted = np.stack(found).astype(int), np.stack(true).astype(int)
    each = [float(f1(chosen[:, i], wanted[:, i], labels=[1], average="macro")["f1"]) for i in range(wanted.shape[1])]
    return {
        "f1": float(f1(chosen.ravel(), wanted.ravel(), labels=[1], average="macro")["f1"]),
        "macro_f1": float(np.mean(each)),
        "accuracy": float((chosen == wanted).all(-1).mean()),
    }


def _tokens(table: Table, options: Options) -> bool:
    text = options.text_column
    return any(name in table.columns for name in TOKENS) or (text in table.columns and holds_lists(table, str(text)))


def _flags(table: Table, options: Options) -> list[str]:
    """The columns that hold only 0 and 1, and at least one 1, if all others are not numbers and one is of texts."""
    if not (options.text_column or any(name in table.columns for name in CLASSIFIED)):
        return []
    kinds = {name: {str(value).strip() for value in values} for name, values in table.columns.items()}
    return [name for name, values in kinds.items() if values <= _BOTH and values & _YES]


_NO, _YES = {"0", "0.0", "False", "false"}, {"1", "1.0", "True", "true"}
_BOTH = _NO | _YES


def _labels_in(table: Table, column: str) -> list[str]:
    """The classes in the lists of a column.

    Raises:
        DataError: a cell is not a list of strings or integers; or there is no class.
    """
    if column in table.names:
        return table.names[column]
    faults, found = Faults(f"the labels in column {column!r} of {table.source}"), set[str]()
    for row in range(len(table)):
        found |= {str(value) for value in _list(table, column, row, faults)}
    if not faults.found and not found:
        faults.add("all lists are empty")
    faults.check(DataError, 'Every row needs a list of labels, such as ["angry", "late"], which may be empty.')
    return classes.in_order(found)


def _list(table: Table, column: str, row: int, faults: Faults) -> list[Any]:
    cell = parsed(table.column(column)[row])
    if cell is None or cell in ("", []):
        return []
    values = read_list(cell, f"{table.at(row)}, column {column!r}", faults)
    wrong = [value for value in values if not isinstance(value, (str, int))]
    if wrong:
        faults.add(f"{table.at(row)}, column {column!r}: {wrong[0]!r} is neither a string nor an integer")
    return [value for value in values if isinstance(value, (str, int))]


def _rows(
    table: Table, text: str, pair: str | None, label: str | None, labels: list[str], tokenizer: Any, limit: int
) -> TokenRows:
    faults = Faults(f"reading {table.source}")
    texts = table.texts(text, faults)
    pairs = table.texts(pair, faults) if pair else None
    if label is None:
        targets = _of_flags(table, labels, faults)
    else:
        finder, targets = LabelFinder(table, label, labels), []
        for row in range(len(table)):
            found = {finder.index(value, row, faults) for value in _list(table, label, row, faults)}
            targets.append([float(i in found) for i in range(len(labels))])
    faults.check(DataError, "Correct or remove these rows.")
    return classes.encoded_rows(tokenizer(texts, pairs, truncation=True, max_length=limit), targets, limit)


def _of_flags(table: Table, labels: list[str], faults: Faults) -> list[list[float]]:
    targets = [[0.0] * len(labels) for _ in range(len(table))]
    for i, name in enumerate(labels):
        for row, value in enumerate(table.column(name)):
            word = str(value).strip()
            if word not in _BOTH:
                faults.add(f"{table.at(row)}, column {name!r}: {value!r} is neither 0 nor 1")
            targets[row][i] = float(word in _YES)
    return targets
