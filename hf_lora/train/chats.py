"""The datasets of `LoraSFTTrainer`: chats become labeled tokens, and the results of a `formatting_func` texts.

TRL prepares all others, and truncates, packs and shuffles all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging
from trl.trainer.sft_config import SFTConfig

from ..data.chat import chat_rows
from ..data.formats import recognize_format
from ..data.tables import Table, table_of
from ..data.trained import TrainedFormat
from ..errors import ConfigError
from ..tasks.record import format_of_table

logger = logging.get_logger(__name__)
IMAGES = {"image", "images"}
"""Columns of images; TRL prepares their rows in its collator."""


def first_row(data: Any) -> Mapping[str, Any]:
    """The first row of a dataset; empty if there is none."""
    return next(iter(data), {}) if data is not None else {}


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row holds a list of messages, and neither tokens nor images."""
    return not {"input_ids", *IMAGES} & row.keys() and any(map(_is_messages, row.values()))


def _is_messages(cell: object) -> bool:
    first = cell[0] if isinstance(cell, list) and cell else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def labeled(
    data: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, completion_only: bool, packing: bool
) -> tuple[Any, TrainedFormat]:
    """A dataset of chats as `input_ids` and `labels`, and their format; a streamed one row by row, as it is read.

    Rows of a `Dataset` are truncated, so that those without a trained token are errors, unless TRL divides them.

    Args:
        name: for messages.
        completion_only: do not train on the assistant's turns in the column `prompt`.

    Raises:
        DataError: lists every chat without trainable tokens; of a streamed dataset, when the row is read.
    """
    options: Any = {"completion_only": completion_only, "keep_end": args.truncation_mode == "keep_end"}

    def rows_of(table: Table, limit: int | None) -> tuple[list[dict[str, list[int]]], int]:
        return chat_rows(table, recognize_format(table), tokenizer, limit or sys.maxsize, **options)

    if isinstance(data, Dataset):
        limit = args.max_length if not packing or args.packing_strategy == "bfd" else None
        table = table_of(data, name)
        rows, cut = rows_of(table, limit)
        if cut:
            logger.warning(
                f"{name}: {cut:,} of {len(rows):,} chats are longer than {limit:,} tokens and are truncated."
            )
        found = Dataset.from_dict({key: [row[key] for row in rows] for key in ("input_ids", "labels")})
        return found, format_of_table(table, recognize_format(table), True, args.max_length)

    def table_with(row: Mapping[str, Any], index: int) -> Table:
        return Table(name, {key: [cell] for key, cell in row.items()}, [index + 1], "row")

    def label(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        return rows_of(table_with(row, index), None)[0][0]

    table = table_with(first_row(data), 0)
    trained = format_of_table(table, recognize_format(table), True, args.max_length)
    found = data.map(label, with_indices=True, remove_columns=list(table.columns))
    return found, replace(trained, system=None, variables=None)  # other rows may have others


def formatted(data: Any, function: Callable[[dict[str, Any]], str], args: SFTConfig) -> Any:
    """A dataset of the texts that a `formatting_func` returns, and of nothing else, in the column of texts.

    With the other columns, TRL would train on a column of chats in place of the texts.
    """

    def text_of(row: dict[str, Any]) -> dict[str, str]:
        text = function(row)
        if not isinstance(text, str):
            raise ConfigError(
                f"formatting_func must return the text of one row as a str, not a {type(text).__name__}. If it "
                "returns a list of texts for a batch of rows, return the text of the one row that it gets."
            )
        return {args.dataset_text_field: text}

    others = [key for key in first_row(data) if key != args.dataset_text_field]
    options: Any = {"num_proc": args.dataset_num_proc} if isinstance(data, Dataset) else {}
    return data.map(text_of, remove_columns=others, **options)
