"""The record of the training rows' format that an adapter keeps, see `data.trained`."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers.utils import logging

from ..data.formats import RAW, TEXT, Format, common_system, common_variables
from ..data.tables import Table
from ..data.trained import TrainedFormat
from ..hub.card.escape import clean

logger = logging.get_logger(__name__)


def format_of_table(
    table: Table, data_format: Format, templated: bool, max_length: int | None, last_turn_only: bool = False
) -> TrainedFormat:
    """The record for the rows of a language model that `chat_rows` makes."""
    system = common_system(table, data_format)
    if system is not None and any(clean(line) != line.strip() for line in system.replace("\t", " ").splitlines()):
        logger.warning(
            "The system message of all chats seems to hold a path or a secret, so it is not kept with the adapter: "
            "pass it to hf-lora chat, generate and eval with --system."
        )
        system = None
    variables = common_variables(table, data_format)
    if any(isinstance(value, str) and clean(value) != value.strip() for value in (variables or {}).values()):
        logger.warning("chat_template_kwargs seem to hold a path or a secret, so they are not kept with the adapter.")
        variables = None
    text, answer = (*data_format.columns[:2], None)[:2]
    return TrainedFormat(
        data_format.kind, text, answer, use_chat_template=templated,
        separator=data_format.between if answer is not None and not templated else None,
        last_turn_only=last_turn_only, system=system, variables=variables, max_length=max_length,
    )  # fmt: skip


def format_of_dataset(data: Any, text_column: str, max_length: int | None) -> TrainedFormat | None:
    """The record for rows of texts of which TRL's SFTTrainer makes tokens; None for others.

    Args:
        text_column: SFTConfig's `dataset_text_field`.
    """
    if not isinstance(data, Dataset) or not len(data) or "input_ids" in data.column_names:
        return None
    first = data[0]
    if isinstance(first.get("prompt"), str) and isinstance(first.get("completion"), str):
        return TrainedFormat(RAW, "prompt", "completion", use_chat_template=False, separator="", max_length=max_length)
    if isinstance(first.get(text_column), str):
        return TrainedFormat(TEXT, text_column, use_chat_template=False, max_length=max_length)
    return None
