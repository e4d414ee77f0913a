"""From a table to prompts, and reference answers if there are any, and from answers back to a file."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ConfigError, DataError, Faults
from ..safe_io.atomic import replace_together
from .chat import is_templated
from .columns import CHATS, GENERATED, TO_ANSWER, TOOLS, VARIABLES, pair_of, with_more
from .encode import Prompt
from .formats import CHAT, TEXT, Format, holds_messages, read_examples, read_list, read_messages, read_variables
from .tables import HALF, Table, is_unicode
from .trained import TrainedFormat

logger = logging.get_logger(__name__)


def read_prompts(table: Table, column: str | None = None, trained: TrainedFormat | None = None) -> list[Prompt]:
    """The prompt of each row: a text, or a chat up to its last user turn.

    Args:
        column: with texts, or lists of messages (also as JSON text). Default: found by its usual name. To
            `instruction`, a column `input` is appended.
        trained: the format of an adapter's training, whose column is used if the table has it and none is named.

    Raises:
        DataError: no column was found, or a row has no prompt; lists every such row.
    """
    known = trained.text_column if trained is not None else None
    column = column or (known if known in table.columns else None)
    answers = (trained.completion_column if trained is not None and column == known else None) or ""
    column = column or next((c for c in TO_ANSWER if c in table.columns), None)
    if column is None:
        raise DataError(
            f"{table.source}: cannot determine which column holds the prompts. It has "
            f"{', '.join(map(repr, table.columns))}; known names are {', '.join(TO_ANSWER)}. Name it with --column."
        )
    faults = Faults(f"reading {table.source}")
    added = pair_of(column, answers).more
    more = table.columns.get(added if added and added != answers else "", [None] * len(table))
    chats = _are_chats(table, column, answers, trained)
    variables = VARIABLES if VARIABLES in table.columns else None
    known_variables = trained.variables if trained is not None else None
    prompts: list[Prompt] = []
    for row, value in enumerate(table.column(column)):
        where = f"{table.at(row)}, column {column!r}"
        if isinstance(value, list) or chats:
            prompts.append(_question(value, where, faults))
            if TOOLS in table.columns and table.columns[TOOLS][row] not in (None, "", [], "[]"):
                faults.add(f"{table.at(row)}, column {TOOLS!r}: tools are not supported here")
            given = read_variables(table, variables, row, faults) if variables else {}
            _check_variables(given, known_variables, table.at(row), faults)
            continue
        if not isinstance(value, str) or not value.strip():
            faults.add(f"{where}: {'the text is empty' if isinstance(value, str) else 'this is not text'}")
        elif not is_unicode(value):
            faults.add(f"{where}: the text holds {HALF}")
        prompts.append(with_more(value, more[row]))
    faults.check(DataError, "Correct or remove these rows.")
    return prompts


def _are_chats(table: Table, column: str, answers: str, trained: TrainedFormat | None) -> bool:
    """Whether a column of prompts holds lists of messages, also as JSON text, by the rule of `recognize_format`.

    Two columns are a chat only if both hold messages; rows of preferences may have one of both.
    """
    if column in CHATS:
        return True
    alone = answers not in table.columns or (trained is not None and trained.kind == CHAT)
    return holds_messages(table, column) and (alone or holds_messages(table, answers))


def _check_variables(given: dict[str, Any], known: dict[str, Any] | None, where: str, faults: Faults) -> None:
    """Add a fault for variables of a template that the prompts would not be rendered with."""
    if given and given != known:
        faults.add(f"{where}: {VARIABLES} other than those of the training are not supported here")


def _question(cell: object, where: str, faults: Faults) -> list[Any]:
    before = len(faults.found)
    messages = list(read_messages(read_list(cell, where, faults), where, faults))
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if last < 0 and len(faults.found) == before:
        faults.add(f"{where}: there is no user message, so there is nothing to answer")
    return messages[: last + 1]


def read_answered(
    table: Table, data_format: Format, tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
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
    templated = is_templated(data_format, tokenizer, use_chat_template)
    faults = Faults(f"reading {table.source}")
    known = data_format.trained.variables if data_format.trained is not None else None
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
        _check_variables(example.variables, known, table.at(row), faults)
        prompts.append(example.messages[:last])
        answers.append(example.messages[last]["content"])
    faults.check(DataError, "Correct or remove these rows.")
    return prompts, answers, templated


class AnswerFile:
    """Writes a JSONL file of the rows of a table, each with its answer; a context manager.

    Answers are appended to `<out>.partial` as they come. `finish` writes all rows in order and replaces an existing
    file; if the block ends before, the partial file is kept and named in a warning, unless it is empty. That of an
    earlier run is renamed to `<out>.partial.1`, or the next number, at the first answer.

    Args:
        table: the table that the prompts are from.
        out: the file.

    Raises:
        ConfigError: `out` is the input itself or a folder or cannot be written, its folder does not exist, or the
            input already has a column with the name of the answers; lists every fault.
    """

    def __init__(self, table: Table, out: str | os.PathLike[str]) -> None:
        self.table, self.path = table, Path(out)
        self.partial = self.path.with_name(f"{self.path.name}.partial")
        self.lines: dict[int, str] = {}
        self._file: TextIO | None = None
        faults = Faults(f"writing {self.path}")
        if self.path.resolve() == Path(table.source).resolve():
            faults.add("this is the input itself")
        if self.path.is_dir():
            faults.add("this is a folder")
        if GENERATED in table.columns:
            faults.add(f"the input already has a column {GENERATED!r}, which the answers would replace")
        if not self.path.parent.is_dir():
            faults.add(f"the folder {self.path.parent} does not exist")
        if not faults.found:
            try:
                is_new = not os.path.lexists(self.partial)
                self.partial.open("a").close()  # an earlier run's is kept: this one may still fail before it answers
                if is_new:
                    self.partial.unlink()
            except OSError as error:
                faults.add(f"{self.partial.name} cannot be written in its folder ({error.strerror})")
        faults.check(ConfigError, "Nothing was generated. Name another file, or rename the column.")

    def __enter__(self) -> AnswerFile:
        return self

    def add(self, row: int, answer: str) -> None:
        """Append the row with its answer; ConfigError if the file cannot be written."""
        values = {name: column[row] for name, column in self.table.columns.items()} | {GENERATED: answer}
        line = _json_line(values)
        try:
            if self._file is None:
                self._keep_earlier()
                self._file = self.partial.open("w", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise ConfigError(
                f"writing {self.partial}: {error.strerror}. It holds {len(self.lines)} of {len(self.table)} rows."
            ) from error
        self.lines[row] = line

    def _keep_earlier(self) -> None:
        if not self.partial.exists() or not self.partial.stat().st_size:
            return
        names = (self.path.with_name(f"{self.partial.name}.{number}") for number in itertools.count(1))
        kept = next(name for name in names if not os.path.lexists(name))
        self.partial.rename(kept)
        logger.warning(f"{self.partial} of an earlier run is now {kept}.")

    def finish(self) -> None:
        """Replace `out`, once all rows are added."""
        text = "".join(self.lines[row] for row in sorted(self.lines))
        name = self.path.name
        replace_together(self.path.parent, {name: lambda file: file.write_text(text, encoding="utf-8")})
        self.lines = {}

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # what could not be flushed is lost
            self._file.close()
        if self.lines:
            logger.warning(
                f"{self.partial} holds the {len(self.lines)} rows that were answered; {self.path} is unchanged."
            )
        else:
            self.partial.unlink(missing_ok=True)


def _json_line(values: dict[str, Any]) -> str:
    """A line of JSON. A lone surrogate, which is not valid in UTF-8, is escaped."""
    line = json.dumps(values, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(values, default=str)
    return f"{line}\n"
