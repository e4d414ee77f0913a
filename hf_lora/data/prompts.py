"""From a table to prompts, and reference answers if there are any, and from answers back to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, Faults
from ..safe_io.atomic import replace_together
from .chat import is_templated
from .columns import CHATS, GENERATED, TO_ANSWER, TOOLS, pair_of, with_more
from .encode import Prompt
from .formats import TEXT, Format, read_examples, read_list, read_messages
from .tables import Table


def read_prompts(table: Table, column: str | None = None) -> list[Prompt]:
    """The prompt of each row: a text, or a chat up to its last user turn.

    Args:
        column: with texts, or lists of messages (also as JSON text). Default: found by its usual name. To
            `instruction`, a column `input` is appended.

    Raises:
        DataError: no column was found, or a row has no prompt; lists every such row.
    """
    column = column or next((c for c in TO_ANSWER if c in table.columns), None)
    if column is None:
        raise DataError(
            f"{table.source}: cannot determine which column holds the prompts. It has "
            f"{', '.join(map(repr, table.columns))}; known names are {', '.join(TO_ANSWER)}. Name it with --column."
        )
    faults = Faults(f"reading {table.source}")
    more = table.columns.get(pair_of(column).more or "", [None] * len(table))
    tools = table.columns.get(TOOLS, [None] * len(table))
    prompts: list[Prompt] = []
    for row, value in enumerate(table.column(column)):
        where = f"{table.at(row)}, column {column!r}"
        if isinstance(value, list) or column in CHATS:
            prompts.append(_question(value, where, faults))
            if tools[row]:
                faults.add(f"{table.at(row)}, column {TOOLS!r}: tools are not supported here")
            continue
        if not isinstance(value, str) or not value.strip():
            faults.add(f"{where}: {'the text is empty' if isinstance(value, str) else 'this is not text'}")
        prompts.append(with_more(value, more[row]))
    faults.check(DataError, "Correct or remove these rows.")
    return prompts


def _question(cell: object, where: str, faults: Faults) -> list[Any]:
    before = len(faults.found)
    messages = list(read_messages(read_list(cell, where, faults), where, faults))
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if last < 0 and len(faults.found) == before:
        faults.add(f"{where}: there is no user message, so there is nothing to answer")
    return messages[: last + 1]


def read_answered(
    table: Table, data_format: Format, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Prompt], list[str], bool]:
    """(prompts, reference answers, whether the chat template is applied to prompts), as in training.

    In a chat, the last assistant turn is the answer, and everything before it is the prompt.

    Raises:
        DataError: the format has no answers, or a row has no prompt; lists every such row.
    """
    if data_format.kind == TEXT:
        raise DataError(
            f"{table.source}: {data_format.columns[0]!r} holds texts that are not split into prompt and answer. "
            "Provide columns such as 'prompt' and 'completion', or omit --generate."
        )
    templated = is_templated(data_format, tokenizer)
    faults = Faults(f"reading {table.source}")
    prompts: list[Prompt] = []
    answers: list[str] = []
    for row, example in enumerate(read_examples(table, data_format)):
        if example.messages is None:
            prompts.append(f"{example.prompt}{'' if templated else data_format.between}")
            answers.append(str(example.completion))
            continue
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        if last == 0:
            faults.add(f"{table.at(row)}: the assistant message is the first, so there is nothing to answer")
        if example.tools:
            faults.add(f"{table.at(row)}: it has tools, which are not supported here")
        prompts.append(example.messages[:last])
        answers.append(example.messages[last]["content"])
    faults.check(DataError, "Correct or remove these rows.")
    return prompts, answers, templated


def check_output(out: str | os.PathLike[str], table: Table) -> Path:
    """Check, before anything is generated, that the rows of `table` and their answers can be written to `out`.

    Raises:
        ConfigError: `out` is the input itself or a folder, its folder does not exist, or the input already has a
            column with the name of the answers; lists every fault.
    """
    path = Path(out)
    faults = Faults(f"writing {path}")
    if path.resolve() == Path(table.source).resolve():
        faults.add("this is the input itself")
    if path.is_dir():
        faults.add("this is a folder")
    if not path.parent.is_dir():
        faults.add(f"the folder {path.parent} does not exist")
    if GENERATED in table.columns:
        faults.add(f"the input already has a column {GENERATED!r}, which the answers would replace")
    faults.check(ConfigError, "Nothing was generated. Name another file, or rename the column.")
    return path


def write_answers(table: Table, answers: Sequence[str], out: str | os.PathLike[str]) -> None:
    """Write a JSONL file with the table's columns and the answers; an existing file is replaced atomically."""
    lines = []
    for row, answer in enumerate(answers):
        values = {name: column[row] for name, column in table.columns.items()} | {GENERATED: answer}
        lines.append(json.dumps(values, ensure_ascii=False, default=str) + "\n")
    path = Path(out)
    replace_together(path.parent, {path.name: lambda file: file.write_text("".join(lines), encoding="utf-8")})
