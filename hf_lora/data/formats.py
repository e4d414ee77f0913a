"""The form of a table for causal language models, told by its columns, and its rows in that form.

- `messages`: a list of `{"role", "content"}`; the assistant's turns are learned.
- `conversations`: a list of `{"from", "value"}`; the same.
- `prompt` and `completion`: two texts that are put together as they are, or two lists of messages; the completion is
  learned.
- a pair, such as `instruction` (with `input`, if any) and `output`, or two columns that the user names (see
  columns.py). The second is learned: as the assistant's turn where the tokenizer has a chat template, else after the
  first and a line break.
- `text` or `content`: every token is learned.

A list of messages may also be JSON text in its cell, as it must be in CSV. A column `tools` goes to the template of a
chat.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import DataError, Faults, nearest
from . import columns
from .columns import pair_of, with_more
from .tables import Table

CHAT, PAIR, RAW, TEXT = "chat", "pair", "raw", "text"

Message = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """Which columns of a table are used, and how.

    Args:
        name: as it is printed, such as "messages" or "question+answer".
        kind: "chat" for lists of messages; "pair" for two texts that are a user's and an assistant's turn where the
            tokenizer has a chat template; "raw" for a prompt and a completion without template; "text".
        columns: one column; or prompt, completion and, for instructions with an input, that.
        tools: the column of the tools of a chat.
        rows: the table's.
        turns: messages of a chat, in the mean.
        unused: the table's other columns.
    """

    name: str
    kind: str
    columns: tuple[str, ...]
    tools: str | None = None
    rows: int = 0
    turns: float = 0.0
    unused: tuple[str, ...] = ()

    @property
    def chat(self) -> bool:
        """Whether the cells hold messages already."""
        return self.kind == CHAT

    @property
    def between(self) -> str:
        """What is put between a prompt and its answer where there is no chat template."""
        return "" if self.kind == RAW else columns.ANSWER


@dataclass
class Example:
    """One row: `messages` (with `tools`, if any), or `prompt` and `completion`, or `text`.

    Args:
        learned_from: index of the first message whose turn is learned if it is the assistant's; those before are the
            prompt of a pair of lists.
    """

    messages: list[Message] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    tools: list[Any] | None = None
    learned_from: int = 0


def recognise(table: Table, text: str | None = None, completion: str | None = None) -> Form:
    """Tell the form of a table by its columns, the surest first.

    Args:
        text, completion: columns that are named by the user: prompts and answers, or `text` alone for lists of
            messages or texts that are learned whole.

    Raises:
        DataError: a named column is absent, no form fits, several do, or the rows are of several forms.
    """
    for name in (text, completion):
        if name is not None:
            table.column(name)
    if text is not None or completion is not None:
        return _complete(table, _named(table, text, completion))
    candidates = _candidates(table)
    # A column that is empty in every row says nothing, unless there is no other.
    found = [form for form in candidates if any(_filled(table, form, row) for row in range(len(table)))] or candidates
    if not found:
        raise DataError(
            f"{table.source}: cannot tell what its columns {', '.join(map(repr, table.columns))} are. The forms are: "
            f"{_known_forms()}. Name the columns so, or name them with text_column and completion_column."
        )
    _check_one_form(table, found)
    pairs = [form for form in found if form.kind in (PAIR, RAW)]
    if found[0] in pairs[:1] and len(pairs) > 1:
        several = "; or ".join(" and ".join(map(repr, form.columns[:2])) for form in pairs)
        raise DataError(
            f"{table.source}: the columns could be {several}. Name those that are meant with text_column and "
            "completion_column."
        )
    return _complete(table, found[0])


def describe(form: Form, templated: bool = False) -> str:
    """The form in one line, as it is printed before training.

    Args:
        templated: pairs of texts go through the chat template.
    """
    names = [repr(name) for name in form.columns]
    rest = f"; not used: {', '.join(map(repr, form.unused))}" if form.unused else ""
    if form.chat:
        tools = f" with the tools in {form.tools!r}" if form.tools else ""
        learned = f"the assistant's tokens in {names[1]}" if len(names) > 1 else "the assistant's tokens"
        where = " and ".join(names)
        chats = f"{form.rows:,} chats from {where}, {form.turns:.1f} turns each{tools}"
        return f"{form.name}: {chats}; loss on {learned}{rest}"
    if form.kind == TEXT:
        return f"{form.name}: {form.rows:,} texts from {names[0]}; loss on every token{rest}"
    prompt = " with ".join([names[0], *names[2:]])
    how = "through the chat template" if templated else "without a chat template"
    return f"{form.name}: {form.rows:,} pairs from {prompt} and {names[1]}, {how}; loss on {names[1]}{rest}"


def read_examples(table: Table, form: Form) -> list[Example]:
    """The rows of a table in their form.

    Raises:
        DataError: lists every cell that is empty or of the wrong kind, every message without a known role or content,
            and every chat in which the assistant never speaks.
    """
    faults = Faults(f"reading {table.source} as {form.name}")
    if form.chat:
        examples = [_read_chat(table, form, row, faults) for row in range(len(table))]
        faults.check(
            DataError,
            'Correct or remove these rows. A message is {"role": "user", "content": "..."}; the roles are '
            f"{', '.join(columns.ROLES)}.",
        )
        return examples
    if form.kind == TEXT:
        texts = table.texts(form.columns[0], faults)
        faults.check(DataError, "Correct or remove these rows.")
        return [Example(text=text) for text in texts]
    prompts = table.texts(form.columns[0], faults, empty=form.kind == RAW)
    completions = table.texts(form.columns[1], faults)
    inputs: list[Any] = table.column(form.columns[2]) if len(form.columns) > 2 else [None] * len(table)
    for row, value in enumerate(inputs):
        if value is not None and not isinstance(value, str):
            faults.add(f"{table.at(row)}, column {form.columns[2]!r}: {value!r} is not a text")
    faults.check(DataError, "Correct or remove these rows.")
    triples = zip(prompts, inputs, completions, strict=True)
    return [Example(prompt=with_more(prompt, more), completion=answer) for prompt, more, answer in triples]


def _known_forms() -> str:
    pairs = [f"{p.prompt!r}{f' (with {p.more!r})' if p.more else ''} and {p.answer!r}" for p in columns.PAIRS]
    return "; ".join([*map(repr, columns.CHATS), *pairs, *map(repr, columns.TEXTS)])


def _named(table: Table, text: str | None, completion: str | None) -> Form:
    if completion is None:
        assert text is not None
        return Form(text, CHAT if _holds_messages(table, text) else TEXT, (text,))
    text = text or next((name for name in columns.PROMPTS if name in table.columns and name != completion), None)
    if text is None:
        raise DataError(
            f"{table.source}: cannot tell which column holds the prompts for {completion!r}. It has "
            f"{', '.join(map(repr, table.columns))}. Name it with text_column."
        )
    return _pair(table, text, completion)


def _candidates(table: Table) -> list[Form]:
    """The forms that the table has the columns of, the surest first."""
    found = [Form(name, CHAT, (name,)) for name in columns.CHATS if name in table.columns]
    pairs = [(p.prompt, p.answer) for p in columns.PAIRS if p.prompt in table.columns and p.answer in table.columns]
    if not pairs:
        prompts = [name for name in columns.PROMPTS if name in table.columns]
        added = {pair_of(name).more for name in prompts}
        pairs = [(p, a) for p in prompts if p not in added for a in columns.ANSWERS if a in table.columns]
    found += [_pair(table, *pair) for pair in pairs]
    return found + [Form(name, TEXT, (name,)) for name in columns.TEXTS if name in table.columns]


def _pair(table: Table, prompt: str, completion: str) -> Form:
    name = f"{prompt}+{completion}"
    if _holds_messages(table, prompt) and _holds_messages(table, completion):
        return Form(name, CHAT, (prompt, completion))
    pair = pair_of(prompt, completion)
    more = (pair.more,) if pair.more in table.columns and pair.more != completion else ()
    return Form(name, RAW if pair.as_is else PAIR, (prompt, completion, *more))


def _complete(table: Table, form: Form) -> Form:
    """The form with what is only printed of it."""
    tools = columns.TOOLS if form.chat and columns.TOOLS in table.columns else None
    lists = [_parsed(value) for name in form.columns for value in table.column(name)] if form.chat else []
    turns = sum(len(value) for value in lists if isinstance(value, list)) / max(len(table), 1)
    unused = tuple(name for name in table.columns if name not in {*form.columns, tools})
    return replace(form, tools=tools, rows=len(table), turns=turns, unused=unused)


def _filled(table: Table, form: Form, row: int) -> bool:
    return all(table.columns[name][row] not in (None, "", []) for name in form.columns[:2])


def _check_one_form(table: Table, found: list[Form]) -> None:
    """Rows that leave the surest form empty and fill another are of another form."""
    chosen = found[0]
    first = next((row for row in range(len(table)) if _filled(table, chosen, row)), 0)
    for other in found[1:]:
        for row in range(len(table)):
            if _filled(table, other, row) and not _filled(table, chosen, row):
                kinds = [" and ".join(map(repr, form.columns[:2])) for form in (chosen, other)]
                raise DataError(
                    f"{table.source} mixes forms: {table.unit} {table.positions[first]} fills {kinds[0]}, "
                    f"{table.unit} {table.positions[row]} fills {kinds[1]} alone. Write every row in one form, or "
                    "make a file of each."
                )


def _holds_messages(table: Table, column: str) -> bool:
    """Whether the first cell of a column that is filled holds a list of messages."""
    cell = next((value for value in table.column(column) if value not in (None, "")), None)
    value = _parsed(cell)
    return isinstance(value, list) and all(isinstance(part, dict) for part in value)


def _parsed(cell: Any) -> Any:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    return cell


def _read_chat(table: Table, form: Form, row: int, faults: Faults) -> Example:
    messages: list[Message] = []
    learned_from = 0
    before = len(faults.found)
    for name in form.columns:
        learned_from = len(messages)
        where = f"{table.at(row)}, column {name!r}"
        messages += read_messages(read_list(table.columns[name][row], where, faults), where, faults)
    if len(faults.found) == before and all(m["role"] != "assistant" for m in messages[learned_from:]):
        faults.add(f"{table.at(row)}, column {form.columns[-1]!r}: the assistant never speaks")
    tools = table.columns[form.tools][row] if form.tools is not None else None
    if tools not in (None, "", []):
        tools = read_list(tools, f"{table.at(row)}, column {form.tools!r}", faults)
    return Example(messages=messages, tools=tools or None, learned_from=learned_from)


def read_list(cell: Any, where: str, faults: Faults) -> list[Any]:
    """A cell that holds a list, or the JSON text of one; an empty list after adding a fault."""
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError as error:
            faults.add(f"{where}: not JSON ({error.msg} at character {error.pos + 1})")
            return []
    if cell is None or cell in ("", []):
        faults.add(f"{where}: it is empty")
    elif not isinstance(cell, list):
        faults.add(f"{where}: a {type(cell).__name__} where a list is needed")
    return cell if isinstance(cell, list) else []


def read_messages(cell: list[Any], where: str, faults: Faults) -> Iterator[Message]:
    """The messages of a cell, each with `role` and `content`; those that cannot be read are added to the faults."""
    for number, message in enumerate(cell, 1):
        if not isinstance(message, dict):
            faults.add(f"{where}, message {number}: a {type(message).__name__} where an object is needed")
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
    return None
