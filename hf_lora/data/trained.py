"""How training made tokens from its rows: a record kept with the adapter, which evaluation and generation follow."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from inspect import signature
from typing import Any

from ..safe_io.reading import is_one_line

LANGUAGE = ("chat", "pair", "raw", "text")
"""The kinds of `Format`, for language models."""
KINDS = (
    *LANGUAGE, "classes", "several classes", "tags", "spans", "images", "masked", "source and target", "ranked",
    "embedded",
)  # fmt: skip
"""Also those of the other tasks, see `hf_lora.tasks`."""

MAX_PROSE = 2**14
"""Maximum characters of a system message that is kept."""
MAX_VARIABLES = 32
"""Maximum number of template variables that are kept."""


@dataclass(frozen=True)
class TrainedFormat:
    """The format of the rows that an adapter was trained on, by the names of the options of `hf-lora train`.

    Args:
        kind: one of `KINDS`.
        text_column, completion_column: the columns of prompts or texts, and of answers.
        pair_column, label_column: columns of a classification, and contexts and answers of questions.
        use_chat_template: whether texts were turns of a chat.
        separator: the text between a prompt without a chat template and its answer.
        last_turn_only: whether only the last assistant turn of a chat was trained.
        system: the system message of all chats, if they had the same.
        variables: the further variables of the chat template, if all chats had the same.
        max_length: longer rows were truncated to this many tokens.
        source_prefix: the text that was put before every source of an encoder-decoder.
        max_target_length: the same for the texts that an encoder-decoder learned to write.
    """

    kind: str = ""
    text_column: str | None = None
    completion_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    use_chat_template: bool | None = None
    separator: str | None = None
    last_turn_only: bool | None = None
    system: str | None = None
    variables: dict[str, Any] | None = None
    max_length: int | None = None
    max_target_length: int | None = None
    source_prefix: str | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any] | None) -> TrainedFormat | None:
        """From values that were checked; fields that this version does not know are ignored."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known}) if values else None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        columns = (self.text_column, self.pair_column, self.completion_column, self.label_column)
        parts = [f"{self.kind} from {', '.join(repr(c) for c in columns if c)}"]
        if self.kind in LANGUAGE:
            parts.append("with the chat template" if self.use_chat_template else "without a chat template")
        if self.separator:
            parts.append(f"separator {self.separator!r}")
        if self.source_prefix:
            parts.append(f"source prefix {self.source_prefix!r}")
        if self.system is not None:
            parts.append(f"system message {self.system[:60]!r}{' …' if len(self.system) > 60 else ''}")
        if self.variables:
            parts.append(f"template variables {self.variables}")
        if self.last_turn_only:
            parts.append("last turn only")
        if self.max_length is not None:
            parts.append(f"at most {self.max_length:,} tokens")
        return "; ".join(parts)


def is_prose(value: object) -> bool:
    """Whether a value is a text of printable lines, and not too long for a record."""
    return isinstance(value, str) and len(value) <= MAX_PROSE and is_one_line(value.translate(_WHITE))


@functools.cache
def of_the_call() -> frozenset[str]:
    """Names that are not variables of a chat template, but arguments of the call that renders it."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}


def is_variables(value: object) -> bool:
    """Whether a value maps names that a chat template may read to numbers, truth values and texts."""
    return (
        isinstance(value, Mapping)
        and 0 < len(value) <= MAX_VARIABLES
        and all(isinstance(name, str) and name.isidentifier() and name not in of_the_call() for name in value)
        and all(isinstance(each, bool | int | float) or is_prose(each) for each in value.values())
    )


_WHITE = str.maketrans("\n\r\t", "   ")
