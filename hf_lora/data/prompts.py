"""From a table to prompts that a model answers, with the right answers where they are known, and back to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, Faults
from ..safe_io.atomic import replace_together
from .chat import is_templated
from .columns import CHATS, GENERATED, TO_ANSWER, TOOLS, pair_of, with_more
from .encode import Prompt
from .formats import TEXT, Form, read_examples, read_list, read_messages
from .tables import Table


def read_prompts(table: Table, column: str | None = None) -> list[Prompt]:
    """The prompt of each row: a text, or a chat up to its last turn of the user.

    Args:
        column: with texts, or lists of messages (also as JSON text); None finds it by its usual name. The column
            `instruction` takes `input` with it, where there is one.

    Raises:
        DataError: no column can be told, or a row holds no prompt; lists every such row.
    """
    column = column or next((c for c in TO_ANSWER if c in table.columns), None)
    if column is None:
        raise DataError(
            f"{table.source}: cannot tell which column holds the prompts. It has "
            f"{', '.join(map(repr, table.columns))}; usual are {', '.join(TO_ANSWER)}. Name it with --column."
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
                faults.add(f"{table.at(row)}, column {TOOLS!r}: tools are not handed on to the template here")
            continue
        if not isinstance(value, str) or not value.strip():
            faults.add(f"{where}: {'the text is empty' if isinstance(value, str) else 'this is not a text'}")
        prompts.append(with_more(value, more[row]))
    faults.check(DataError, "Correct or remove these rows.")
    return prompts


def _question(cell: Any, where: str, faults: Faults) -> list[Any]:
    before = len(faults.found)
    messages = list(read_messages(read_list(cell, where, faults), where, faults))
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if last < 0 and len(faults.found) == before:
        faults.add(f"{where}: the user never speaks, so there is nothing to answer")
    return messages[: last + 1]


def read_answered(table: Table, form: Form, tokenizer: Any) -> tuple[list[Prompt], list[str], bool]:
    """(prompts, right answers, whether prompts go through the chat template), as the training has them.

    Of a chat, the assistant's last turn is the answer, and what comes before it the prompt.

    Raises:
        DataError: the form has no answers, or a row has no prompt; lists every such row.
    """
    if form.kind == TEXT:
        raise DataError(
            f"{table.source}: {form.columns[0]!r} holds whole texts, in which no answer can be told from its prompt. "
            "Give columns such as 'prompt' and 'completion', or leave --generate out."
        )
    templated = is_templated(form, tokenizer)
    faults = Faults(f"reading {table.source}")
    prompts: list[Prompt] = []
    answers: list[str] = []
    for row, example in enumerate(read_examples(table, form)):
        if example.messages is None:
            prompts.append(f"{example.prompt}{'' if templated else form.between}")
            answers.append(str(example.completion))
            continue
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        if last == 0:
            faults.add(f"{table.at(row)}: the assistant speaks first, so there is nothing to answer")
        if example.tools:
            faults.add(f"{table.at(row)}: it has tools, which are not handed on to the template here")
        prompts.append(example.messages[:last])
        answers.append(example.messages[last]["content"])
    faults.check(DataError, "Correct or remove these rows.")
    return prompts, answers, templated


def check_output(out: str | os.PathLike[str], table: Table) -> Path:
    """See, before anything is generated, that answers can be written beside the rows of `table`.

    Raises:
        ConfigError: `out` is the input itself or a folder, its folder does not exist, or the input has a column of
            the answers' name; lists every fault.
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
        faults.add(f"the input has a column {GENERATED!r} already, which the answers would replace")
    faults.check(ConfigError, "Nothing was generated. Name another file, or rename the column.")
    return path


def write_answers(table: Table, answers: Sequence[str], out: str | os.PathLike[str]) -> None:
    """Write a JSONL file with the table's columns and the answers; it takes its place when it is whole."""
    lines = []
    for row, answer in enumerate(answers):
        values = {name: column[row] for name, column in table.columns.items()} | {GENERATED: answer}
        lines.append(json.dumps(values, ensure_ascii=False, default=str) + "\n")
    path = Path(out)
    replace_together(path.parent, {path.name: lambda file: file.write_text("".join(lines), encoding="utf-8")})
