"""Rows of preferences: a prompt with a better and a worse answer, or answers that are marked as good or bad.

In TRL's form: `prompt`, `chosen`, `rejected`; or `prompt`, `completion`, `label`. Each cell is a text, or a list of
messages that goes through the chat template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..errors import DataError, Faults
from .formats import CHAT, RAW, Message, as_messages, holds_messages, read_messages
from .tables import Table
from .trained import TrainedFormat

PROMPT, CHOSEN, REJECTED = "prompt", "chosen", "rejected"
MARKED = {True: True, "true": True, "1": True, False: False, "false": False, "0": False}
"""Cells of marks; 1 is True, and 0 False."""
Text = str | list[Message]


def read_pairs(table: Table, as_chat: bool = False) -> list[dict[str, Any]]:
    """The rows of a table with the columns `chosen`, `rejected` and, unless both begin with it, `prompt`.

    Args:
        as_chat: make messages of texts: the prompt is the user's turn, and the answers are the assistant's.

    Raises:
        DataError: lists every row without two different answers to one prompt.
    """
    for name in (CHOSEN, REJECTED):
        if name not in table.columns:
            raise DataError(
                f"{table.source}: pairs need the columns {CHOSEN!r} and {REJECTED!r}, and {PROMPT!r} unless both "
                f"begin with it. It has {', '.join(map(repr, table.columns))}."
            )
    faults, rows = Faults(f"reading pairs of {table.source}"), []
    for row in range(len(table)):
        chosen, rejected = (_cell(table, name, row, faults) for name in (CHOSEN, REJECTED))
        prompt = _cell(table, PROMPT, row, faults) if _has(table, PROMPT, row) else None
        if not any(cell in ("", []) for cell in (chosen, rejected, prompt)):
            rows.append(_pair(prompt, chosen, rejected, table.at(row), faults, as_chat))
    faults.check(DataError, "Correct or remove these rows.")
    return rows


def read_marked(table: Table, answers: str, marks: str, as_chat: bool = False) -> list[dict[str, Any]]:
    """The rows of a table with the columns `prompt`, `answers` and `marks`.

    Raises:
        DataError: lists every row without a prompt, an answer and a mark; or all marks are the same.
    """
    for name in (PROMPT, answers, marks):
        table.column(name)
    faults, rows = Faults(f"reading marked answers of {table.source}"), []
    for row in range(len(table)):
        prompt, answer = (_cell(table, name, row, faults) for name in (PROMPT, answers))
        cell = table.columns[marks][row]
        key = cell.strip().lower() if isinstance(cell, str) else cell
        mark = MARKED.get(key) if isinstance(key, (bool, int, float, str)) else None
        if mark is None:
            faults.add(f"{table.at(row)}, column {marks!r}: {cell!r} is not true or false")
        elif prompt not in ("", []) and answer not in ("", []):
            prompt, answer = _alike(prompt, answer, as_chat)
            rows.append({PROMPT: prompt, "completion": answer, "label": mark})
    faults.check(DataError, "Correct or remove these rows.")
    found = {row["label"] for row in rows}
    if len(found) < 2:
        raise DataError(
            f"{table.source}: {marks!r} is {found.pop()} in every row, but training compares good answers with bad "
            "ones. Add rows of the other kind."
        )
    return rows


def as_trained(table: Table, trained: TrainedFormat | None) -> Table:
    """The table with prompts and answers as an adapter's training on preferences read them; any other as it is.

    Answers that repeat the prompt are cut to what follows it, and a text beside messages is a turn.

    Raises:
        DataError: see `read_pairs`; or a cell beside messages is neither a text nor messages.
    """
    # Only the record of a language model's own training says which turns were trained; it joins columns as they are.
    if trained is None or trained.kind not in (CHAT, RAW) or trained.last_turn_only is not None:
        return table
    prompts, answers = trained.text_column or "", trained.completion_column or ""
    if answers == CHOSEN and {CHOSEN, REJECTED} <= table.columns.keys():
        rows = read_pairs(table)
        if is_chat(rows):
            rows = read_pairs(table, as_chat=True)
        return replace(table, columns=table.columns | {name: [row[name] for row in rows] for name in rows[0]})
    if trained.kind != CHAT or not {prompts, answers} <= table.columns.keys():
        return table
    if holds_messages(table, prompts) == holds_messages(table, answers):
        return table
    faults = Faults(f"reading {table.source}")
    cells = [tuple(_cell(table, name, row, faults) for name in (prompts, answers)) for row in range(len(table))]
    faults.check(DataError, "Correct or remove these rows.")
    turns = [_alike(prompt, answer, True) for prompt, answer in cells]
    first, second = (list(column) for column in zip(*turns, strict=True))
    return replace(table, columns=table.columns | {prompts: first, answers: second})


def joined(row: dict[str, Any]) -> dict[str, Any]:
    """A pair whose answers begin with the prompt, as a reward model reads them."""
    return {name: row[PROMPT] + row[name] for name in (CHOSEN, REJECTED)}


def is_chat(rows: list[dict[str, Any]]) -> bool:
    """Whether any cell holds messages."""
    return any(isinstance(cell, list) for row in rows for cell in row.values())


def check_one_form(tables: Mapping[str, Table], rows: Mapping[str, list[dict[str, Any]]]) -> None:
    """Check that the rows of all tables hold texts, or that all hold messages: a chat template is for all or none.

    Args:
        rows: split -> what was read of each row of its table.

    Raises:
        DataError: lists every row of texts beside others of messages.
    """
    if not any(map(is_chat, rows.values())):
        return
    faults = Faults("reading preferences: some rows hold messages, and others texts")
    for split, part in rows.items():
        for i, row in enumerate(part):
            if not is_chat([row]):
                faults.add(f"{tables[split].at(i)}: this row holds texts")
    faults.check(DataError, "Provide messages in these rows too, or make messages of texts: --use-chat-template true.")


def _has(table: Table, name: str, row: int) -> bool:
    return name in table.columns and table.columns[name][row] not in (None, "")


def _cell(table: Table, name: str, row: int, faults: Faults) -> Any:
    """A text or a list of messages; empty after adding a fault."""
    cell, where = as_messages(table.columns[name][row]), f"{table.at(row)}, column {name!r}"
    if isinstance(cell, list):
        before, messages = len(faults.found), list(read_messages(cell, where, faults))
        if not messages and len(faults.found) == before:
            faults.add(f"{where}: the cell is empty")
        return messages if len(faults.found) == before else []
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        faults.add(f"{where}: the cell is empty")
    elif not isinstance(cell, str):
        faults.add(f"{where}: a {type(cell).__name__} instead of a text or a list of messages")
    return cell if isinstance(cell, str) and cell.strip() else ""


def _pair(prompt: Any, chosen: Any, rejected: Any, where: str, faults: Faults, as_chat: bool) -> dict[str, Any]:
    if isinstance(chosen, str) != isinstance(rejected, str):
        faults.add(f"{where}: {CHOSEN!r} and {REJECTED!r} must both be texts or both be lists of messages")
        return {}
    if chosen == rejected:
        faults.add(f"{where}: {CHOSEN!r} and {REJECTED!r} are equal")
        return {}
    whole = prompt is None
    if prompt is None:
        prompt = _common(chosen, rejected)
        if not prompt:
            faults.add(f"{where}: {CHOSEN!r} and {REJECTED!r} have no common beginning, and there is no {PROMPT!r}")
            return {}
    elif isinstance(prompt, str) and isinstance(chosen, list):
        prompt = [{"role": "user", "content": prompt}]
    if whole or (_begins(chosen, prompt) and _begins(rejected, prompt)):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
        if isinstance(answer, list) and answer and answer[0]["role"] not in ("assistant", "tool"):
            faults.add(f"{where}: {name!r} begins with a {answer[0]['role']} message, and not with {PROMPT!r}")
        elif not answer or (isinstance(answer, str) and not answer.strip()):
            faults.add(f"{where}: {name!r} has no answer after the prompt")
    first, chosen = _alike(prompt, chosen, as_chat)
    return {PROMPT: first, CHOSEN: chosen, REJECTED: _alike(prompt, rejected, as_chat)[1]}


def _begins(answer: Any, prompt: Any) -> bool:
    return type(answer) is type(prompt) and answer[: len(prompt)] == prompt


def _common(chosen: Any, rejected: Any) -> Any:
    """The common beginning of two lists of messages, or of two texts, whose last word may differ."""
    shorter = min(len(chosen), len(rejected))
    length = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):
        length = max(chosen.rfind(space, 0, length) for space in (" ", "\n"))
    return chosen[: max(length, 0)]


def _alike(prompt: Text, answer: Text, as_chat: bool) -> tuple[Text, Text]:
    """Both as messages if one is, or `as_chat`; else both as texts."""
    if not as_chat and isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    as_list = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return as_list, [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
