"""Sequence to sequence: a text for each text, such as a translation or a summary, by an encoder-decoder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PretrainedConfig

from ..data import classes
from ..data.chat import marked
from ..data.classes import TokenRows
from ..data.columns import PAIRS, SEQUENCES, TRANSLATION, pair_of, with_more
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import DataError, Faults
from ..evaluation.language import compare
from ..evaluation.result import Evaluation
from ..evaluation.similarity import chrf, rouge_l
from ..generate.texts import answering, collect_answers, sampling
from .base import Asked, Collator, Data, Defaults, Given, Options, Task, decoded, from_columns, padded, truncation

LONGEST_TARGET = 128
"""Default limit in tokens of the texts that are learned."""


class TextPairs(TokenRows):
    """Tokenized sources and targets for Trainer.

    Attributes:
        references: the targets as texts.
        longest: the maximum tokens of a target, and of a text that is generated.
    """

    references: list[str]
    longest: int


class Seq2SeqLM(Task):
    name = "seq2seq-lm"
    kinds = ("source and target",)
    auto_class = "AutoModelForSeq2SeqLM"
    defaults = Defaults(1e-3, 8, 16, 512)
    metrics = ("accuracy", "perplexity")
    always_generates = True
    options = {
        "text_column": "document", "completion_column": "summary", "max_length": 512,
        "max_target_length": LONGEST_TARGET, "source_prefix": "summarize: ",
    }  # fmt: skip
    scored = ("exact_match", "rouge_l", "chrf")
    has_head = False

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        if options.label_column is not None or not config.is_encoder_decoder:
            return False
        return options.completion_column is not None or _pair_in(table) is not None

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        options, tokenizer = given.options, padded(given.processor)
        source, target = _columns(next(iter(tables.values())), options, given.trained)
        tables = {split: _with_languages(table) for split, table in tables.items()}
        recorded = given.trained.max_target_length if given.trained is not None else None
        longest = options.max_target_length or recorded or LONGEST_TARGET
        limit = options.max_length or min(self.defaults.max_length, int(tokenizer.model_max_length))
        limit = min(limit, given.window or limit)
        prefix = options.source_prefix
        if prefix is None and given.trained is not None:
            prefix = given.trained.source_prefix
        data = Data(self, given.config, tokenizer)
        for split, table in tables.items():
            data.rows[split] = _rows(table, source, target, prefix or "", tokenizer, limit, longest)
        data.trained = TrainedFormat(
            self.kinds[0], source, target, max_length=limit, max_target_length=longest, source_prefix=prefix
        )
        data.lines = [from_columns(self.name, (source, target), data.rows, "")]
        known = _prefixes(given.config)
        if prefix is None and known:
            data.lines.append(f"The base knows texts that begin with {' or '.join(known)}: --source-prefix sets one.")
        data.lines += truncation(sum(rows.cut for rows in data.rows.values()), "texts")
        return data

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        return f"{decoded(data.processor, row['input_ids'])} → {marked(decoded(data.processor, row['labels']))}"

    def collator(self, data: Data) -> Collator:
        return DataCollatorForSeq2Seq(data.processor)

    def score(self, model: Any, data: Data, split: str, asked: Asked) -> Evaluation:
        rows = data.rows[split]
        texts = collect_answers(_generated(model, data.processor, rows, asked), len(rows), asked.file)
        return compare(texts, rows.references, (rouge_l, chrf))


def _languages(table: Table) -> list[str]:
    """The languages of a column of translations; empty if there is none."""
    cells = table.columns.get(TRANSLATION) or [None]
    if not all(isinstance(cell, dict) for cell in cells):
        return []
    return list(dict.fromkeys(language for cell in cells for language in cell))


def _with_languages(table: Table) -> Table:
    """A table with a column for each language instead of one of translations."""
    names = _languages(table)
    others = {name: values for name, values in table.columns.items() if name != TRANSLATION or not names}
    added = {name: [cell.get(name) for cell in table.columns[TRANSLATION]] for name in names if name not in others}
    return Table(table.source, {**added, **others}, table.positions, table.unit, table.names)


def _pair_in(table: Table) -> tuple[str, str] | None:
    """The columns of the sources and the targets: two languages, or usual names; None if there are none."""
    languages = _languages(table)
    if len(languages) == 2:
        return languages[0], languages[1]
    known = [*SEQUENCES, *((pair.prompt, pair.answer) for pair in PAIRS)]
    return next((pair for pair in known if {*pair} <= table.columns.keys()), None)


def _columns(table: Table, options: Options, trained: TrainedFormat | None) -> tuple[str, str]:
    """The columns of the sources and of the targets: named, those of the training, or by their usual names."""
    usual, has = _pair_in(table) or (None, None), {*table.columns, *_languages(table)}
    recorded = (trained.text_column, trained.completion_column) if trained is not None else (None, None)
    source, target = (
        named or (known if known in has else None) or name
        for named, known, name in zip((options.text_column, options.completion_column), recorded, usual, strict=True)
    )
    if source is None or target is None:
        columns = ", ".join(map(repr, [*table.columns, *_languages(table)]))
        pairs = " or ".join(f"{a!r} and {b!r}" for a, b in SEQUENCES)
        raise DataError(
            f"{table.source}: cannot determine which columns hold the texts and what is to be written for them. It "
            f"has {columns}; usual names are {pairs}. Name them with text_column and completion_column."
        )
    return source, target


def _prefixes(config: PretrainedConfig) -> list[str]:
    """The prefixes with which the base was trained, as T5 names them in its config."""
    tasks = getattr(config, "task_specific_params", None) or {}
    found = [task.get("prefix") for task in tasks.values() if isinstance(task, Mapping)]
    return [repr(prefix) for prefix in found if isinstance(prefix, str) and prefix]


def _rows(table: Table, source: str, target: str, prefix: str, tokenizer: Any, limit: int, longest: int) -> TextPairs:
    faults = Faults(f"reading {table.source}")
    texts, references = (table.texts(name, faults) for name in (source, target))
    faults.check(DataError, "Correct or remove these rows.")
    more = pair_of(source, target).more
    if more in table.columns:
        texts = [with_more(text, cell) for text, cell in zip(texts, table.column(str(more)), strict=True)]
    texts = [f"{prefix}{text}" for text in texts]
    encoded = tokenizer(texts, truncation=True, max_length=limit)
    targets = tokenizer(text_target=references, truncation=True, max_length=longest)["input_ids"]
    rows = TextPairs(classes.encoded_rows(encoded, targets, limit))
    rows.cut = sum(len(row["input_ids"]) == limit or len(row["labels"]) == longest for row in rows)
    rows.references, rows.longest = references, longest
    return rows


@torch.no_grad()
def _generated(model: Any, tokenizer: Any, rows: TextPairs, asked: Asked) -> Iterator[tuple[int, str]]:
    """Each row's index with the text that is generated for it greedily."""
    options = sampling(model, tokenizer, 0.0, 1.0)
    with answering(model):
        for start in range(0, len(rows), asked.batch_size):
            part = [{"input_ids": row["input_ids"]} for row in rows[start : start + asked.batch_size]]
            batch = tokenizer.pad(part, return_tensors="pt").to(model.device)
            found = model.generate(**batch, max_new_tokens=min(asked.longest, rows.longest), **options)
            for row, tokens in enumerate(found, start):
                yield row, str(tokenizer.decode(tokens, skip_special_tokens=True))
            if asked.progress is not None:
                asked.progress(start + len(part))
