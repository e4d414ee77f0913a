"""Extractive question answering: the span of a context that answers a question, in the form of SQuAD."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import DataCollatorWithPadding, EvalPrediction, PretrainedConfig

from ..data.chat import marked_tokens
from ..data.classes import TokenRows, column_of
from ..data.columns import ANSWER_SPANS, CONTEXTS, QUESTIONS
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..errors import DataError, Faults
from ..evaluation.spans import best_span, score_spans
from .base import Collator, Data, Defaults, Given, Options, Task, counts, from_columns, padded

STRIDE = 128
"""Tokens that two windows of a long context share."""
PARAGRAPHS = "paragraphs"
"""A column of the files of SQuAD."""


@dataclass
class Window:
    """A row: a question, and as much of its context as fits.

    Args:
        example: the index of the question.
        offsets: for each token, its first and last character in the context; None outside the context.
    """

    example: int
    offsets: list[tuple[int, int] | None]


class SpanRows(TokenRows):
    """Tokenized windows for Trainer.

    Attributes:
        windows: where each row is from.
        contexts, answers: for each question, its context, and the answers that are right: none if it has none.
    """

    windows: list[Window]
    contexts: list[str]
    answers: list[list[str]]


class QuestionAnswering(Task):
    """`answers` is {"text": […], "answer_start": […]} or a list of {"text", "answer_start"}; empty without an answer.

    The files of SQuAD, whose rows are articles with `paragraphs`, are read too.
    """

    name = "question-answering"
    kinds = ("spans",)
    auto_class = "AutoModelForQuestionAnswering"
    defaults = Defaults(1e-3, 16, 64, 384)
    metrics = ("f1", "exact_match")
    outputs = ("start_logits", "end_logits")
    targets = ("start_positions", "end_positions")
    options = {"text_column": "question", "pair_column": "context", "label_column": "answers", "max_length": 384}
    metrics_of_rows = True

    def claims(self, table: Table, options: Options, config: PretrainedConfig) -> bool:
        if PARAGRAPHS in table.columns:
            return True
        named = (options.text_column, QUESTIONS), (options.pair_column, CONTEXTS), (options.label_column, ANSWER_SPANS)
        found = [name or next((usual for usual in known if usual in table.columns), None) for name, known in named]
        return None not in found and _holds_spans(table, str(found[-1]))

    def read(self, tables: Mapping[str, Table], given: Given) -> Data:
        tables = {split: _questions(table) for split, table in tables.items()}
        train, options, tokenizer = next(iter(tables.values())), given.options, padded(given.processor)
        known = given.trained or TrainedFormat()
        columns = [
            column_of(train, options.text_column, known.text_column, QUESTIONS, "text_column", "the questions"),
            column_of(train, options.pair_column, known.pair_column, CONTEXTS, "pair_column", "the contexts"),
            column_of(train, options.label_column, known.label_column, ANSWER_SPANS, "label_column", "the answers"),
        ]
        limit = min(options.max_length or self.defaults.max_length, int(tokenizer.model_max_length))
        limit = min(limit, given.window or limit)
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} does not tell where a token is in its text. Use a fast one.")
        data = Data(self, given.config, tokenizer)
        for split, table in tables.items():
            data.rows[split] = _rows(table, columns, tokenizer, limit)
        question, context, answers = columns
        data.trained = TrainedFormat(
            self.kinds[0], question, pair_column=context, label_column=answers, max_length=limit
        )
        questions = {split: rows.answers for split, rows in data.rows.items()}
        windows = f"{counts(data.rows)} windows of at most {limit:,} tokens"
        data.lines = [f"{from_columns(self.name, columns, questions, '')} questions in {windows}"]
        return data

    def settings(self, data: Data) -> dict[str, Any]:
        names = {0: "LABEL_0", 1: "LABEL_1"}  # the logits of the first and of the last token
        return {"id2label": names, "label2id": {name: i for i, name in names.items()}}

    def show_row(self, data: Data, row: Mapping[str, Any]) -> str:
        ids, first, last = row["input_ids"], row["start_positions"], row["end_positions"]
        return marked_tokens(data.processor, ids, [first <= i <= last for i in range(len(ids))])

    def collator(self, data: Data) -> Collator:
        return DataCollatorWithPadding(data.processor)

    def compute_metrics(self, data: Data, split: str) -> Any:
        return SpanMetrics(data.rows[split])


class SpanMetrics:
    """The `compute_metrics` of Trainer: `exact_match` and `f1` of the best spans, in the order of the rows."""

    def __init__(self, rows: SpanRows) -> None:
        self._rows = rows
        self._seen: tuple[list[Any], list[Any]] = ([], [])

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        found: Any = prediction.predictions
        for kept, part in zip(self._seen, found[:2], strict=True):
            kept.extend(part)
        if not compute_result:
            return {}
        (starts, ends), self._seen = self._seen, ([], [])
        return score_spans(self.answers(starts, ends), self._rows.answers)

    def answers(self, starts: Sequence[Any], ends: Sequence[Any]) -> list[str]:
        """The text of the best span of each question over all of its windows; empty where no answer is better.

        Args:
            starts, ends: the logits of each row.
        """
        rows = self._rows
        may_be_empty = any(not answers for answers in rows.answers)
        best: list[tuple[float, str]] = [(float("-inf"), "")] * len(rows.answers)
        none = [float("inf")] * len(rows.answers)
        for window, start, end in zip(rows.windows, starts, ends, strict=True):
            count, i = len(window.offsets), window.example
            score, span = best_span(start[:count], end[:count], window.offsets)
            none[i] = min(none[i], float(start[0] + end[0]))
            if span is not None and score > best[i][0]:
                best[i] = (score, rows.contexts[i][span[0] : span[1]])
        return ["" if may_be_empty and none[i] > score else text for i, (score, text) in enumerate(best)]


def _questions(table: Table) -> Table:
    """A table of questions, from one of articles with paragraphs as in the files of SQuAD.

    Raises:
        DataError: lists every article that does not have that form.
    """
    if PARAGRAPHS not in table.columns:
        return table
    columns: dict[str, list[Any]] = {name: [] for name in (*QUESTIONS, *CONTEXTS, *ANSWER_SPANS)}
    positions, faults = [], Faults(f"reading {table.source}")
    for row, paragraphs in enumerate(table.columns[PARAGRAPHS]):
        try:
            found = [(part["context"], each) for part in paragraphs for each in part["qas"]]
            for context, each in found:
                for name, cell in zip(columns, (each["question"], context, each.get("answers") or []), strict=True):
                    columns[name].append(cell)
                positions.append(table.positions[row])
        except (TypeError, KeyError, AttributeError) as error:
            faults.add(f"{table.at(row)}, column {PARAGRAPHS!r}: it is not in the form of SQuAD ({error!r})")
    faults.check(DataError, 'A paragraph is {"context": …, "qas": [{"question": …, "answers": […]}]}.')
    return Table(table.source, columns, positions, table.unit)


def _holds_spans(table: Table, column: str) -> bool:
    cell = next((value for value in table.columns.get(column, []) if value not in (None, "")), None)
    return isinstance(_spans(cell), dict)


def _spans(cell: object) -> Any:
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    keys = ("text", "answer_start")
    if isinstance(cell, list) and all(isinstance(each, dict) and {*keys} <= each.keys() for each in cell):
        return {key: [each[key] for each in cell] for key in keys}
    return cell if isinstance(cell, dict) and {*keys} <= cell.keys() else None


def _answers(table: Table, column: str, contexts: Sequence[str], faults: Faults) -> list[list[tuple[str, int]]]:
    """For each row, the answers and where they begin; adds a fault for each that is not there."""
    found: list[list[tuple[str, int]]] = []
    for row, cell in enumerate(table.column(column)):
        where, spans = f"{table.at(row)}, column {column!r}", _spans(cell)
        found.append([])
        if spans is None:
            faults.add(f'{where}: it is not {{"text": […], "answer_start": […]}}')
            continue
        texts, starts = list(spans["text"] or []), list(spans["answer_start"] or [])
        if len(texts) != len(starts):
            faults.add(f"{where}: {len(texts)} texts, but {len(starts)} values of answer_start")
            continue
        for text, start in zip(texts, starts, strict=True):
            context = contexts[row] if isinstance(contexts[row], str) else ""
            if not isinstance(text, str) or not isinstance(start, int) or not text:
                faults.add(f"{where}: {text!r} at {start!r} is not an answer")
            elif context[start : start + len(text)] != text:
                faults.add(f"{where}: the context has {context[start : start + len(text)]!r} at {start}, not {text!r}")
            else:
                found[-1].append((text, start))
    return found


def _rows(table: Table, columns: Sequence[str], tokenizer: Any, limit: int) -> SpanRows:
    faults = Faults(f"reading {table.source}")
    questions, contexts = (table.texts(name, faults) for name in columns[:2])
    answers = _answers(table, columns[2], contexts, faults)
    stride = min(STRIDE, limit // 4)
    if not faults.found:
        room = limit - tokenizer.num_special_tokens_to_add(pair=True) - stride - 1
        for row, ids in enumerate(tokenizer(questions, add_special_tokens=False)["input_ids"]):
            if len(ids) > room:
                faults.add(f"{table.at(row)}: the question has {len(ids)} tokens, and at most {room} leave room")
    faults.check(DataError, "Correct or remove these rows.")
    encoded = tokenizer(
        [question.lstrip() for question in questions], contexts, truncation="only_second", max_length=limit,
        stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    rows = SpanRows()
    rows.windows, rows.contexts, rows.answers = [], contexts, [[text for text, _ in each] for each in answers]
    of, offsets = encoded.pop("overflow_to_sample_mapping"), encoded.pop("offset_mapping")
    for row, example in enumerate(of):
        inside = [part == 1 for part in encoded.sequence_ids(row)]
        where = [tuple(pair) if is_inside else None for pair, is_inside in zip(offsets[row], inside, strict=True)]
        rows.windows.append(Window(example, where))
        start, end = _positions(where, answers[example])
        values = {name: encoded[name][row] for name in encoded}
        rows.append({**values, "start_positions": start, "end_positions": end})
    return rows


def _positions(offsets: Sequence[tuple[int, int] | None], answers: Sequence[tuple[str, int]]) -> tuple[int, int]:
    """The first and the last token of the first answer; the first token of the row if the window does not hold it."""
    inside = [(i, offset) for i, offset in enumerate(offsets) if offset is not None]
    if not answers or not inside:
        return 0, 0
    text, first = answers[0]
    last = first + len(text)
    if inside[0][1][0] > first or inside[-1][1][1] < last:
        return 0, 0
    start = max(i for i, offset in inside if offset[0] <= first)
    end = min(i for i, offset in inside if offset[1] >= last)
    return start, end
