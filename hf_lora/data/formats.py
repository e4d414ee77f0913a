"""The data format of a table for causal language models, recognized by its columns, and its rows.

- `messages`: a list of `{"role", "content"}`; the assistant's turns are trained.
- `conversations`: a list of `{"from", "value"}`; the same.
- `prompt` and `completion`: two texts that are concatenated as they are, or two lists of messages; the completion is
  trained.
- a pair, such as `instruction` (with an optional `input`) and `output`, or two columns that the user names (see
  columns.py). The second is trained: as the assistant's turn if the tokenizer has a chat template, else after the
  first and a line break.
- `text` or `content`: every token is trained.

A list of messages may also be JSON text, as in CSV. The columns `tools` and `chat_template_kwargs` (further variables)
are passed to the chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import DataError, Faults, nearest
from . import columns
from .columns import pair_of, with_more
from .tables import HALF, Table, is_unicode
from .trained import TrainedFormat, is_prose, is_variables

CHAT, PAIR, RAW, TEXT = "chat", "pair", "raw", "text"

Message = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """Which columns of a table are used, and how.

    Args:
        name: as it is printed, such as "messages" or "question+answer".
        kind: "chat" for lists of messages; "pair" for two texts that become a user and an assistant turn if the
            tokenizer has a chat template; "raw" for a prompt and a completion without template; "text".
        columns: one column; or prompt, completion and, if there is one, the input of an instruction.
        tools: the column of the tools of a chat.
        variables: the column of further variables of its template.
        rows: the number of rows of the table.
        turns: mean number of messages of a chat.
        unused: the table's other columns.
        trained: how an adapter that is evaluated was trained; it decides how these rows become tokens.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    tools: str | None = None
    variables: str | None = None
    rows: int = 0
    turns: float = 0.0
    unused: tuple[str, ...] = ()
    trained: TrainedFormat | None = None

    @property
    def chat(self) -> bool:
        """Whether the cells hold lists of messages."""
        return self.kind == CHAT

    @property
    def between(self) -> str:
        """The separator of a prompt and its answer without a chat template."""
        separator = self.trained.separator if self.trained is not None else None
        return separator if separator is not None else "" if self.kind == RAW else columns.ANSWER


@dataclass
class Example:
    """One row: `messages` (with `tools` and `variables`, if any), or `prompt` and `completion`, or `text`.

    Args:
        train_from: assistant messages before this index are not trained; they are the prompt of a pair of lists.
    """

    messages: list[Message] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    train_from: int = 0


def recognize_format(
    table: Table, text: str | None = None, completion: str | None = None, trained: TrainedFormat | None = None
) -> Format:
    """Recognize the format of a table by its columns, the most specific first.

    Args:
        text, completion: columns that the user named: prompts and answers, or `text` alone for lists of messages or
            for texts of which every token is trained.
        trained: the format of an adapter's training. If the table has all of its columns, they are used; named ones
            are preferred.

    Raises:
        DataError: a named column is missing, no format or more than one fits, or the rows have different formats.
    """
    for name in (text, completion):
        if name is not None:
            table.column(name)
    if trained is not None:
        return replace(_like(table, text, completion, trained), trained=trained)
    if text is not None or completion is not None:
        return _complete(table, _named(table, text, completion))
    candidates = _candidates(table)
    # A column that is empty in every row is ignored, unless there is no other.
    found = [
        data_format for data_format in candidates if any(_filled(table, data_format, row) for row in range(len(table)))
    ] or candidates
    if not found:
        raise DataError(
            f"{table.source}: its columns {', '.join(map(repr, table.columns))} match no known format. The formats "
            f"are: {_known_formats()}. Rename the columns, or name them with text_column and completion_column; for a "
            "classification, with text_column and label_column."
        )
    _check_one_form(table, found)
    pairs = [data_format for data_format in found if data_format.kind in (PAIR, RAW)]
    if found[0] in pairs[:1] and len(pairs) > 1:
        several = "; or ".join(" and ".join(map(repr, data_format.columns[:2])) for data_format in pairs)
        raise DataError(
            f"{table.source}: the columns could be {several}. Choose a pair with text_column and completion_column."
        )
    return _complete(table, found[0])


def describe(data_format: Format, templated: bool = False) -> str:
    """The format in one line, as it is printed before training.

    Args:
        templated: the chat template is applied to pairs of texts.
    """
    names = [repr(name) for name in data_format.columns]
    rest = f"; not used: {', '.join(map(repr, data_format.unused))}" if data_format.unused else ""
    if data_format.chat:
        tools = f" with the tools in {data_format.tools!r}" if data_format.tools else ""
        tools += f" with {data_format.variables!r}" if data_format.variables else ""
        trained = f"the assistant's tokens in {names[1]}" if len(names) > 1 else "the assistant's tokens"
        where = " and ".join(names)
        chats = f"{data_format.rows:,} chats from {where}, {data_format.turns:.1f} turns each{tools}"
        return f"{data_format.name}: {chats}; loss on {trained}{rest}"
    if data_format.kind == TEXT:
        return f"{data_format.name}: {data_format.rows:,} texts from {names[0]}; loss on every token{rest}"
    prompt = " with ".join([names[0], *names[2:]])
    how = "through the chat template" if templated else "without a chat template"
    return (
        f"{data_format.name}: {data_format.rows:,} pairs from {prompt} and {names[1]}, {how}; loss on {names[1]}{rest}"
    )


def read_examples(table: Table, data_format: Format) -> list[Example]:
    """The rows of a table in their format.

    Raises:
        DataError: lists every cell that is empty or of the wrong type, every message without a known role or content,
            and every chat without an assistant message.
    """
    faults = Faults(f"reading {table.source} as {data_format.name}")
    if data_format.chat:
        examples = [_read_chat(table, data_format, row, faults) for row in range(len(table))]
        faults.check(
            DataError,
            'Correct or remove these rows. A message is {"role": "user", "content": "..."}; the roles are '
            f"{', '.join(columns.ROLES)}.",
        )
        return examples
    if data_format.kind == TEXT:
        texts = table.texts(data_format.columns[0], faults)
        faults.check(DataError, "Correct or remove these rows.")
        return [Example(text=text) for text in texts]
    prompts = table.texts(data_format.columns[0], faults, empty=data_format.kind == RAW)
    completions = table.texts(data_format.columns[1], faults)
    inputs: list[Any] = table.column(data_format.columns[2]) if len(data_format.columns) > 2 else [None] * len(table)
    for row, value in enumerate(inputs):
        if value is not None and not isinstance(value, str):
            faults.add(f"{table.at(row)}, column {data_format.columns[2]!r}: {value!r} is not text")
    faults.check(DataError, "Correct or remove these rows.")
    triples = zip(prompts, inputs, completions, strict=True)
    return [Example(prompt=with_more(prompt, more), completion=answer) for prompt, more, answer in triples]


def _like(table: Table, text: str | None, completion: str | None, trained: TrainedFormat) -> Format:
    """The format with the columns of the training, if the table has them."""
    prompts, answers = text or trained.text_column, completion or trained.completion_column
    if prompts is None or not {prompts, answers} - {None} <= table.columns.keys():
        return recognize_format(table, text, completion)
    if answers is not None:
        return _complete(table, _pair(table, prompts, answers))
    return _complete(table, _named(table, prompts, None) if text else Format(prompts, trained.kind, (prompts,)))


def common_system(table: Table, data_format: Format) -> str | None:
    """The system message of all chats of a table, if they have the same and it can be kept with an adapter."""
    if not data_format.chat:
        return None
    first = [example.messages[0] for example in read_examples(table, data_format) if example.messages]
    found = {message["content"] if message["role"] == "system" else None for message in first}
    system = found.pop() if len(found) == 1 else None
    return system if is_prose(system) else None


def common_variables(table: Table, data_format: Format) -> dict[str, Any] | None:
    """The template's variables of all chats of a table, if they are the same and can be kept with an adapter."""
    if data_format.variables is None:
        return None
    first, *others = (example.variables for example in read_examples(table, data_format))
    return first if is_variables(first) and all(each == first for each in others) else None


def _known_formats() -> str:
    pairs = [f"{p.prompt!r}{f' (with {p.more!r})' if p.more else ''} and {p.answer!r}" for p in columns.PAIRS]
    return "; ".join([*map(repr, columns.CHATS), *pairs, *map(repr, columns.TEXTS)])


def _named(table: Table, text: str | None, completion: str | None) -> Format:
    if completion is None:
        assert text is not None
        return Format(text, CHAT if holds_messages(table, text) else TEXT, (text,))
    text = text or next((name for name in columns.PROMPTS if name in table.columns and name != completion), None)
    if text is None:
        raise DataError(
            f"{table.source}: cannot determine which column holds the prompts for {completion!r}. It has "
            f"{', '.join(map(repr, table.columns))}. Name it with text_column."
        )
    return _pair(table, text, completion)


def _candidates(table: Table) -> list[Format]:
    """The formats whose columns the table has, the most specific first."""
    found = [Format(name, CHAT, (name,)) for name in columns.CHATS if name in table.columns]
    pairs = [(p.prompt, p.answer) for p in columns.PAIRS if p.prompt in table.columns and p.answer in table.columns]
    if not pairs:
        prompts = [name for name in columns.PROMPTS if name in table.columns]
        added = {pair_of(name).more for name in prompts}
        pairs = [(p, a) for p in prompts if p not in added for a in columns.ANSWERS if a in table.columns]
    found += [_pair(table, *pair) for pair in pairs]
    return found + [Format(name, TEXT, (name,)) for name in columns.TEXTS if name in table.columns]


def _pair(table: Table, prompt: str, completion: str) -> Format:
    name = f"{prompt}+{completion}"
    if holds_messages(table, prompt) and holds_messages(table, completion):
        return Format(name, CHAT, (prompt, completion))
    pair = pair_of(prompt, completion)
    more = (pair.more,) if pair.more in table.columns and pair.more != completion else ()
    return Format(name, RAW if pair.as_is else PAIR, (prompt, completion, *more))


def _complete(table: Table, data_format: Format) -> Format:
    """The format with the fields that are only printed."""
    tools, variables = (
        name if data_format.chat and name in table.columns else None for name in (columns.TOOLS, columns.VARIABLES)
    )
    lists = [parsed(value) for name in data_format.columns for value in table.column(name)] if data_format.chat else []
    turns = sum(len(value) for value in lists if isinstance(value, list)) / max(len(table), 1)
    unused = tuple(name for name in table.columns if name not in {*data_format.columns, tools, variables})
    return replace(data_format, tools=tools, variables=variables, rows=len(table), turns=turns, unused=unused)


def _filled(table: Table, data_format: Format, row: int) -> bool:
    return all(table.columns[name][row] not in (None, "", []) for name in data_format.columns[:2])


def _check_one_form(table: Table, found: list[Format]) -> None:
    """Refuse rows that leave the columns of the chosen format empty and fill those of another."""
    chosen = found[0]
    first = next((row for row in range(len(table)) if _filled(table, chosen, row)), 0)
    for other in found[1:]:
        for row in range(len(table)):
            if _filled(table, other, row) and not _filled(table, chosen, row):
                kinds = [" and ".join(map(repr, data_format.columns[:2])) for data_format in (chosen, other)]
                raise DataError(
                    f"{table.source} mixes formats: {table.unit} {table.positions[first]} fills {kinds[0]}, "
                    f"{table.unit} {table.positions[row]} fills only {kinds[1]}. Use one format for all rows, or one "
                    "file for each format."
                )


def holds_messages(table: Table, column: str) -> bool:
    """Whether the first non-empty cell of a column holds a list of messages."""
    cell = next((value for value in table.column(column) if value not in (None, "")), None)
    value = as_messages(cell)
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def as_messages(cell: object) -> Any:
    """A cell; the list in it, if it is JSON text of messages. Other JSON text stays a text, such as an answer."""
    value = parsed(cell)
    return value if columns.is_messages(value) else cell


def parsed(cell: object) -> Any:
    """A cell; the list in it, if it is JSON text of one."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _read_chat(table: Table, data_format: Format, row: int, faults: Faults) -> Example:
    messages: list[Message] = []
    train_from = 0
    before = len(faults.found)
    for name in data_format.columns:
        train_from = len(messages)
        where = f"{table.at(row)}, column {name!r}"
        messages += read_messages(read_list(table.columns[name][row], where, faults), where, faults)
    if len(faults.found) == before and all(m["role"] != "assistant" for m in messages[train_from:]):
        faults.add(f"{table.at(row)}, column {data_format.columns[-1]!r}: there is no assistant message")
    tools = table.columns[data_format.tools][row] if data_format.tools is not None else None
    if tools not in (None, "", []):
        tools = read_list(tools, f"{table.at(row)}, column {data_format.tools!r}", faults)
    variables = {} if data_format.variables is None else read_variables(table, data_format.variables, row, faults)
    return Example(messages=messages, tools=tools or None, variables=variables, train_from=train_from)


def read_variables(table: Table, column: str, row: int, faults: Faults) -> dict[str, Any]:
    """The variables of a row without those that are null, with which parquet fills the rows that do not have them."""
    where = f"{table.at(row)}, column {column!r}"
    cell = _from_json(table.columns[column][row], where, faults)
    if isinstance(cell, dict):
        return {name: value for name, value in cell.items() if value is not None}
    if cell not in (None, "", [], ...):
        faults.add(f"{where}: a {type(cell).__name__} instead of an object")
    return {}


def _from_json(cell: object, where: str, faults: Faults) -> Any:
    """A cell, which may be JSON text; `...` after adding a fault."""
    try:
        return json.loads(cell) if isinstance(cell, str) and cell.strip() else cell
    except json.JSONDecodeError as error:
        faults.add(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1})")
        return ...


def read_list(cell: object, where: str, faults: Faults) -> list[Any]:
    """The list in a cell, which may be JSON text; an empty list after adding a fault."""
    cell = _from_json(cell, where, faults)
    if cell is ...:
        return []
    if cell is None or cell in ("", []):
        faults.add(f"{where}: the cell is empty")
    elif not isinstance(cell, list):
        faults.add(f"{where}: a {type(cell).__name__} instead of a list")
    return cell if isinstance(cell, list) else []


def read_messages(cell: list[Any], where: str, faults: Faults) -> Iterator[Message]:
    """The valid messages of a cell, each with `role` and `content`; adds a fault for each of the others."""
    for number, message in enumerate(cell, 1):
        if not isinstance(message, dict):
            faults.add(f"{where}, message {number}: a {type(message).__name__} instead of an object")
            continue
        message = {key: value for key, value in message.items() if value is not None}  # parquet fills with nulls
        role = message["role"] if "role" in message else message.pop("from", None)
        content = message["content"] if "content" in message else message.pop("value", None)
        role = columns.ALIASES.get(role, role) if isinstance(role, str) else None
        calls = message.get("tool_calls")
        if content is None and role == "assistant" and calls:
            content = ""
        fault = _fault_of(role, content, bool(calls))
        if fault:
            faults.add(f"{where}, message {number}: {fault}")
        else:
            yield {**message, "role": role, "content": content}


def _fault_of(role: str | None, content: Any, calls: bool) -> str | None:
    if role is None:
        return "no role"
    if role not in columns.ROLES:
        return f"the role {role!r} is unknown{nearest(role, (*columns.ROLES, *columns.ALIASES))}"
    if content is None:
        return "no content"
    if not isinstance(content, str):
        return f"the content is a {type(content).__name__}, not text"
    if not content.strip() and role not in columns.MAY_BE_EMPTY and not calls:
        return "the content is empty"
    if not is_unicode(content):
        return f"the content holds {HALF}"
    return None
