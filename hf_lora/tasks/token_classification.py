"""Token classification: a tag for each word, such as for named entities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import DataCollatorForTokenClassification, PretrainedConfig

from ..data import classes
from ..data.chat import marked
from ..data.classes import LabelFinder, TokenRows, column_of
from ..data.columns import LABELS, TAGS, TOKENS
from ..data.formats import parsed, read_list
from ..data.spans import IGNORED
from ..data.tables import Table, is_unicode
from ..data.trained import TrainedFormat
from ..errors import DataError, Faults
from ..evaluation.tags import score_tags
from .base import Collator, Collected, Data, Defaults, Given, Options, Task, from_columns, label_of, padded, truncation
from .text_classification import holds_lists


class TokenClassification(Task):
    """A row has a list of words and a list of their tags. The first token of each word is trained on its tag."""

    name = "token-classification"
    kinds = ("tags",)
    auto_class = "AutoModelForTokenClassification"
    defaults = Defaults(1e-3, 16, 64, classes.MOST_TOKENS)
    metrics = ("f1", "precision", "recall", "accuracy")
    options = {"text_column": "tokens", "label_column": "ner_tags", "max_length": classes.MOST_TOKENS}

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        text = options.text_column or next((name for name in TOKENS if name in table.columns), None)
        tags = options.label_column or next((name for name in TAGS if name in table.columns), None)
        if text is None or tags is None:
            return False
        named = text in TOKENS and tags in TAGS and tags not in LABELS  # cells that are no lists are then a fault
        return named or all(holds_lists(table, name) for name in (text, tags))

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        train, options, tokenizer = next(iter(tables.values())), given.options, padded(given.processor)
        known = given.trained or TrainedFormat()
        text = column_of(train, options.text_column, known.text_column, TOKENS, "text_column", "the lists of words")
        tags = column_of(
            train, options.label_column, known.label_column, TAGS, "label_column", "the lists of tags", (text,)
        )
        labels = given.labels or _tags_in(train, tags)
        data = Data(self, given.config, tokenizer, labels=labels, kind=f"{len(labels)} tags")
        limit = classes.length_limit(tokenizer, options.max_length, given.window)
        for split, table in tables.items():
            data.rows[split] = _rows(table, text, tags, labels, tokenizer, limit)
        data.trained = TrainedFormat(self.kinds[0], text, label_column=tags, max_length=limit)
        data.lines = [from_columns(self.name, (text, tags), data.rows, data.kind)]
        data.lines += truncation(sum(rows.cut for rows in data.rows.values()), "texts")
        return data

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        pieces = zip(row["input_ids"], row["labels"], strict=True)
        tokens = [(data.processor.convert_ids_to_tokens(token), label) for token, label in pieces]
        return " ".join(token + ("" if i == IGNORED else marked(label_of(data, i))) for token, i in tokens)

    def collator(self, data: Data) -> Collator:
        return DataCollatorForTokenClassification(data.processor)

    def compute_metrics(self, data: Data, split: str) -> Any:
        def compute(found: Sequence[Any], true: Sequence[Any]) -> dict[str, float]:
            names = list(data.labels or [])
            kept = [row != IGNORED for row in true]
            chosen = [[names[i] for i in row[mask]] for row, mask in zip(found, kept, strict=True)]
            wanted = [[names[i] for i in row[mask]] for row, mask in zip(true, kept, strict=True)]
            return score_tags(chosen, wanted)

        return Collected(lambda logits, _: logits.argmax(-1), compute)


def _tags_in(table: Table, column: str) -> list[str]:
    """The tags of a table in order.

    Raises:
        DataError: a cell is not a list of strings or integers.
    """
    if column in table.names:
        return table.names[column]
    faults, found = Faults(f"the tags in column {column!r} of {table.source}"), set[str]()
    for row, cell in enumerate(table.column(column)):
        where = f"{table.at(row)}, column {column!r}"
        for value in read_list(cell, where, faults):
            if isinstance(value, (str, int)):
                found.add(str(value))
            else:
                faults.add(f"{where}: the tag {value!r} is neither a string nor an integer")
    if not faults.found and len(found) < 2:
        faults.add(f"there is only one tag, {next(iter(found), '')!r}")
    faults.check(DataError, 'Every row needs a list of tags, such as ["O", "B-PER"].')
    return classes.in_order(found)


def _rows(table: Table, text: str, tags: str, labels: list[str], tokenizer: Any, limit: int) -> TokenRows:
    faults, finder = Faults(f"reading {table.source}"), LabelFinder(table, tags, labels)
    words: list[list[str]] = []
    found: list[list[int]] = []
    for row in range(len(table)):
        where = f"{table.at(row)}, column {text!r}"
        cell = read_list(parsed(table.column(text)[row]), where, faults)
        names = read_list(parsed(table.column(tags)[row]), f"{table.at(row)}, column {tags!r}", faults)
        wrong = [word for word in cell if not isinstance(word, str) or not is_unicode(word)]
        if wrong:
            faults.add(f"{where}: {wrong[0]!r} is not a word")
        elif cell and names and len(cell) != len(names):
            faults.add(f"{table.at(row)}: {len(cell)} words in {text!r}, but {len(names)} tags in {tags!r}")
        words.append(cell)
        found.append([finder.index(name, row, faults) for name in names])
    faults.check(DataError, "Correct or remove these rows.")
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which word a token is of. Use a model with a fast one."
        )
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit)
    targets = [_of_words(encoded.word_ids(row), each) for row, each in enumerate(found)]
    return classes.encoded_rows(encoded, targets, limit)


def _of_words(words: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """The label of each token: the tag of a word at its first token, otherwise none."""
    before = [None, *words]
    return [IGNORED if word is None or word == last else tags[word] for word, last in zip(words, before, strict=False)]
