"""Masked language modeling: the tokens of texts that were masked at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, PretrainedConfig

from ..data import classes
from ..data.chat import marked
from ..data.classes import TokenRows
from ..data.columns import TEXTS
from ..data.spans import IGNORED
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import ConfigError, DataError, Faults
from .base import Collator, Data, Defaults, Given, Options, Task, from_columns, truncation

SEED = 42
"""The masks of an evaluation are always the same, so that its results can be compared."""


class MaskedLM(Task):
    name = "masked-lm"
    kinds = ("masked",)
    auto_class = "AutoModelForMaskedLM"
    has_head = False
    defaults = Defaults(1e-3, 16, 64, classes.MOST_TOKENS)
    metrics = ("perplexity", "accuracy")
    options = {"text_column": "text", "max_length": classes.MOST_TOKENS}

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        return False  # texts without labels are more often those of a classification whose labels were not found

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        train, options, tokenizer = next(iter(tables.values())), given.options, given.processor
        if tokenizer.mask_token is None:
            raise ConfigError(f"{self.name} needs a tokenizer with a mask token. Use another model.")
        recorded = given.trained.text_column if given.trained is not None else None
        text = classes.column_of(train, options.text_column, recorded, TEXTS, "text_column", "the texts")
        limit = classes.length_limit(tokenizer, options.max_length, given.window)
        data = Data(self, given.config, tokenizer)
        for split, table in tables.items():
            rows = _rows(table, text, tokenizer, limit)
            data.rows[split] = rows if split == "train" else _masked(rows, tokenizer)
        data.trained = TrainedFormat(self.kinds[0], text, max_length=limit)
        data.lines = [from_columns(self.name, (text,), data.rows, "")]
        data.lines += truncation(sum(rows.cut for rows in data.rows.values()), "texts")
        return data

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        batch = self.collator(data)([dict(row)])
        pieces, tokens = zip(batch["input_ids"][0].tolist(), batch["labels"][0].tolist(), strict=True), data.processor
        names = [(tokens.convert_ids_to_tokens(token), label) for token, label in pieces]
        return " ".join(
            name + ("" if label == IGNORED else marked(tokens.convert_ids_to_tokens(label))) for name, label in names
        )

    def collator(self, data: Data) -> Collator:
        return MaskingCollator(data.processor)


class MaskingCollator:
    """Masks rows at random as in training; rows with labels were masked before."""

    def __init__(self, tokenizer: Any) -> None:
        self._mask = DataCollatorForLanguageModeling(tokenizer)
        self._pad = DataCollatorForTokenClassification(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return (self._pad if "labels" in rows[0] else self._mask)(rows)


def _rows(table: Table, text: str, tokenizer: Any, limit: int) -> TokenRows:
    faults = Faults(f"reading {table.source}")
    texts = table.texts(text, faults)
    faults.check(DataError, "Correct or remove these rows.")
    encoded = tokenizer(texts, truncation=True, max_length=limit)
    rows = TokenRows({name: values[row] for name, values in encoded.items()} for row in range(len(texts)))
    rows.cut = sum(len(row["input_ids"]) == limit for row in rows)
    return rows


def _masked(rows: TokenRows, tokenizer: Any) -> TokenRows:
    """The rows with random masks and their labels."""
    mask = DataCollatorForLanguageModeling(tokenizer, seed=SEED)
    masked = TokenRows()
    masked.cut = rows.cut
    for row in rows:
        masked.append({name: tensor[0].tolist() for name, tensor in mask([row]).items()})
    return masked
