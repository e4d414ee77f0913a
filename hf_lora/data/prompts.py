"""From a table to prompts that a model answers, and back to a file with the answers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, Faults
from ..safe_io.atomic import replace_together
from .formats import CHAT_COLUMNS, read_list, read_messages
from .tables import Table, read_table

COLUMNS = (*CHAT_COLUMNS, "prompt", "question", "instruction", "text")
"""Where prompts usually stand, the surest first."""

GENERATED = "generated"
"""The column that answers are written to."""


def read_prompt_table(file: str | os.PathLike[str]) -> Table:
    """`read_table`, which also takes a .txt file with a prompt on each line that is not blank.

    Raises:
        DataError: the file is absent, empty or broken.
    """
    path = Path(file)
    if path.suffix.lower() != ".txt":
        return read_table(file)
    if not path.is_file():
        raise DataError(f"{path} does not exist.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: the bytes are not UTF-8 ({error.reason}). Save it as UTF-8.") from error
    kept = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise DataError(f"{path} holds no prompts: each line is one.")
    return Table(str(path), {"prompt": [line for _, line in kept]}, [number for number, _ in kept], "line", {})


def read_prompts(table: Table, column: str | None = None) -> list[Any]:
    """The prompt of each row: a text, or a chat up to its last turn of the user.

    Args:
        column: with texts, or lists of messages (also as JSON text); None finds it by its usual name. The column
            `instruction` takes `input` with it, where there is one.

    Raises:
        DataError: no column can be told, or a row holds no prompt; lists every such row.
    """
    if column is None:
        column = next((c for c in COLUMNS if c in table.columns), None)
    if column is None:
        raise DataError(
            f"{table.source}: cannot tell which column holds the prompts. It has "
            f"{', '.join(map(repr, table.columns))}; usual are {', '.join(COLUMNS)}. Name it with --column."
        )
    faults = Faults(f"reading {table.source}")
    more = table.columns.get("input") if column == "instruction" else None
    prompts: list[Any] = []
    for row, value in enumerate(table.column(column)):
        where = f"{table.at(row)}, column {column!r}"
        if isinstance(value, list) or column in CHAT_COLUMNS:
            prompts.append(_chat(value, where, faults))
            if table.columns.get("tools", [None] * len(table))[row]:
                faults.add(f"{table.at(row)}, column 'tools': tools are not handed on to the template here")
            continue
        if not isinstance(value, str) or not value.strip():
            faults.add(f"{where}: {'the text is empty' if isinstance(value, str) else 'this is no text'}")
        elif more is not None and str(more[row] or "").strip():
            value = f"{value}\n\n{more[row]}"  # as in training
        prompts.append(value)
    faults.check(DataError, "Correct or remove these rows.")
    return prompts


def _chat(cell: Any, where: str, faults: Faults) -> list[Any]:
    before = len(faults.found)
    messages = list(read_messages(read_list(cell, where, faults), where, faults))
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if last < 0 and len(faults.found) == before:
        faults.add(f"{where}: the user never speaks, so there is nothing to answer")
    return messages[: last + 1]


def check_output(out: str | os.PathLike[str], table: Table) -> Path:
    """See, before anything is generated, that answers can be written beside the rows of `table`.

    Raises:
        ConfigError: `out` is the input itself or a folder, its folder is not there, or the input has a column of the
            answers' name; lists every fault.
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
