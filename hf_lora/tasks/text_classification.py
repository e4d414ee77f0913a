"""Text classification: one class, or one number, for each text or pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import DataCollatorWithPadding, PretrainedConfig

from ..data import classes
from ..data.classes import REGRESSION, Columns
from ..data.columns import CHATS, CLASSIFIED, LABELS
from ..data.formats import parsed
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..evaluation.metrics import build_compute_metrics
from .base import Collator, Data, Defaults, Given, Options, Task, from_columns, truncation


class TextClassification(Task):
    name = "text-classification"
    kinds = ("classes",)
    auto_class = "AutoModelForSequenceClassification"
    pools = starts_at_means = True
    defaults = Defaults(1e-3, 16, 64, classes.MOST_TOKENS)
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    files = {"train_file": "train.csv", "test_file": "test.csv"}
    options = {
        "text_column": "text", "pair_column": "second", "label_column": "label", "problem_type": REGRESSION,
        "max_length": classes.MOST_TOKENS, "pooling": "mean", "head_init": "class-means",
    }  # fmt: skip

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        label = options.label_column or next((name for name in LABELS if name in table.columns), None)
        if label is None or options.label_columns or holds_lists(table, label):
            return False
        image, text = classes.image_column(table), options.text_column
        if image is not None and text is None:
            return any(name in table.columns for name in CLASSIFIED)
        chats = options.label_column is None and any(name in table.columns for name in CHATS)
        return not chats and (image is None or text != image)

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        train, options, tokenizer = next(iter(tables.values())), given.options, given.processor
        if not given.known and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        columns = classes.choose_columns(
            train, text=options.text_column, pair=options.pair_column, label=options.label_column,
            trained=given.trained,
        )  # fmt: skip
        data = Data(self, given.config, tokenizer, labels=self._labels(train, columns, given))
        for split, table in tables.items():
            data.rows[split] = classes.classification_rows(
                table, columns, data.labels, tokenizer, options.max_length, given.window
            )
        data.trained = TrainedFormat(
            self.kinds[0], columns.text, pair_column=columns.pair, label_column=columns.label,
            max_length=classes.length_limit(tokenizer, options.max_length, given.window),
        )  # fmt: skip
        data.kind = "one number each" if data.labels is None else f"{len(data.labels)} labels"
        data.lines = [from_columns(self.name, (columns.text, columns.pair, columns.label), data.rows, data.kind)]
        data.lines += truncation(sum(rows.cut for rows in data.rows.values()), "texts")
        return data

    def _labels(self, table: Table, columns: Columns, given: Given) -> list[str] | None:
        if given.known:
            return None if given.config.problem_type == REGRESSION else given.labels
        if given.options.problem_type == REGRESSION:
            return None
        return classes.find_labels(table, columns.label, given.options.problem_type)

    def settings(self, data: Data) -> dict[str, Any]:
        if data.labels is not None:
            return super().settings(data)
        return {"id2label": {0: "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": REGRESSION}

    def metrics_of(self, options: Options, table: Table) -> tuple[str, ...]:
        return ("mse", "mae") if options.problem_type == REGRESSION else self.metrics

    def collator(self, data: Data) -> Collator:
        return DataCollatorWithPadding(data.processor, padding=data.processor.pad_token is not None)

    def compute_metrics(self, data: Data, split: str) -> Any:
        return build_compute_metrics(list(self.metrics if data.labels is not None else ("mse", "mae")))


def holds_lists(table: Table, column: str) -> bool:
    """Whether the first cell of a column that is not empty holds a list."""
    return isinstance(parsed(next((value for value in table.column(column) if value not in (None, "")), None)), list)
