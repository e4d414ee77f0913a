"""Embeddings of texts: pairs of texts that belong together, triplets, or pairs with a similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import ConfigError, DataError, Faults
from ..evaluation.result import Evaluation
from .base import Asked, Data, Defaults, Given, Options, Task, counts

FORMS = (
    ("anchor", "positive"), ("query", "positive"), ("question", "answer"), ("query", "document"),
    ("sentence1", "sentence2"), ("text1", "text2"),
)  # fmt: skip
"""The columns of two texts, the most specific first."""
NEGATIVES = ("negative", "hard_negative")
SCORES = ("score", "similarity_score", "similarity", "label")


class Embedding(Task):
    """Trained with the classes of sentence-transformers; it must be named, because others have such columns too."""

    name = "embedding"
    kinds = ("embedded",)
    auto_class = "AutoModel"
    has_head = False
    defaults = Defaults(1e-4, 32, 64, 256)
    metrics = ()
    scored = ("accuracy@1", "mrr", "spearman")
    commands = False
    loader = "SentenceTransformer"
    files = {"train_file": "pairs.csv", "test_file": "test.csv"}
    options = {"text_column": "anchor", "pair_column": "positive", "label_column": "score", "max_length": 256}
    packages = {"datasets": "datasets", "sentence_transformers": "sentence-transformers"}

    def claims(self, table: Table, options: Options, config: Any) -> bool:
        return False

    def metrics_of(self, options: Options, table: Table) -> tuple[str, ...]:
        columns = _columns(table, options)
        return self.scored[2:] if len(columns) > 2 and columns[2] not in NEGATIVES else self.scored[:2]

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        from datasets import Dataset

        data = Data(self, given.config, given.processor, length=given.options.max_length or self.defaults.max_length)
        columns = _columns(next(iter(tables.values())), given.options)
        for split, table in tables.items():
            data.rows[split] = Dataset.from_dict(_cells(table, columns))
        data.trained = TrainedFormat(
            self.kinds[0], columns[0], pair_column=columns[1], label_column=next(iter(columns[2:]), None),
            max_length=data.length,
        )  # fmt: skip
        what = "pairs" if len(columns) < 3 else "triplets" if columns[2] in NEGATIVES else "pairs with a similarity"
        data.lines = [f"{self.name}: {what} from {', '.join(map(repr, columns))}: {counts(data.rows)}"]
        return data

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        return "\n  ".join(f"{name}: {cell}" for name, cell in row.items())

    def compute_metrics(self, data: Data, split: str) -> Any:
        return None

    def evaluate(self, model: Any, table: Table, given: Given, asked: Asked) -> Evaluation:
        raise ConfigError(
            "evaluate: embeddings are made by sentence-transformers, with the modules in the adapter's folder. Pass "
            "the file as --test-file to hf-lora train, or use its evaluators on SentenceTransformer(folder)."
        )

    def score(self, model: Any, data: Data, split: str, asked: Asked) -> Evaluation:
        return Evaluation(metrics_of_embeddings(model, data.rows[split], asked.batch_size))


def _columns(table: Table, options: Options) -> list[str]:
    """The columns of the texts, and of a negative or a similarity, if there is one."""
    named = (options.text_column, options.pair_column)
    first, second = next((form for form in FORMS if {*form} <= table.columns.keys()), (None, None))
    texts = [name or usual for name, usual in zip(named, (first, second), strict=True)]
    if None in texts:
        known = " or ".join(f"{a!r} and {b!r}" for a, b in FORMS)
        raise DataError(
            f"{table.source}: cannot determine which columns hold the two texts of a pair. It has "
            f"{', '.join(map(repr, table.columns))}; usual names are {known}. Name them with text_column and "
            "pair_column."
        )
    for name in (*texts, options.label_column):
        if name is not None:
            table.column(name)
    score = options.label_column or next((name for name in SCORES if name in table.columns), None)
    negative = next((name for name in NEGATIVES if name in table.columns), None)
    return [str(name) for name in (*texts, score if score is not None else negative) if name is not None]


def _cells(table: Table, columns: list[str]) -> dict[str, list[Any]]:
    """The texts of a table and, as the column `score`, its similarities.

    Raises:
        DataError: lists every empty text, and every similarity that is not a number.
    """
    faults = Faults(f"reading {table.source}")
    texts = [name for i, name in enumerate(columns) if i < 2 or name in NEGATIVES]
    found: dict[str, list[Any]] = {name: table.texts(name, faults) for name in texts}
    for name in columns[len(texts) :]:
        found["score"] = []
        for row, cell in enumerate(table.column(name)):
            try:
                found["score"].append(float(cell))
            except (TypeError, ValueError):
                found["score"].append(math.nan)
            if not math.isfinite(found["score"][-1]):
                faults.add(f"{table.at(row)}, column {name!r}: {cell!r} is not a number")
    faults.check(DataError, "Correct or remove these rows.")
    return found


def is_scored(rows: Any) -> bool:
    """Whether rows are pairs with a similarity."""
    return "score" in rows.column_names


@torch.no_grad()
def metrics_of_embeddings(model: Any, rows: Any, batch_size: int) -> dict[str, float]:
    """How well a SentenceTransformer ranks the second texts of pairs: the share of first texts whose own one is the
    nearest, and the mean reciprocal rank; of pairs with a similarity, Spearman's correlation with the cosine."""
    first, second, *_ = rows.column_names
    vectors = [
        model.encode(
            list(rows[name]), batch_size=batch_size, convert_to_tensor=True, normalize_embeddings=True
        ).float()
        for name in (first, second)
    ]
    if is_scored(rows):
        found = (vectors[0] * vectors[1]).sum(1)
        return {"spearman": _spearman(found, torch.tensor(rows["score"], dtype=torch.float64))}
    scores = vectors[0] @ vectors[1].T
    places = 1 + (scores > scores.diagonal()[:, None]).sum(1).double()
    return {"accuracy@1": float((places == 1).double().mean()), "mrr": float((1 / places).mean())}


def _spearman(found: Tensor, wanted: Tensor) -> float:
    from scipy.stats import spearmanr  # sentence-transformers needs it

    return float(spearmanr(found.double().cpu().numpy(), wanted.numpy()).statistic)
