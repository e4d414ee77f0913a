"""What columns mean by their names, and what is put between texts, for training, evaluation and generation alike.

A new form of data is an entry here: `PAIRS` for a prompt and its answer, `CHATS` for lists of messages.
"""

from __future__ import annotations

from typing import NamedTuple


class Pair(NamedTuple):
    """Two columns of texts, the second of which is learned.

    Args:
        more: a column that is put behind the prompt where it is there and not empty.
        as_is: the answer follows the prompt without a chat template and without a separator.
    """

    prompt: str
    answer: str
    more: str | None = None
    as_is: bool = False


# The surest first.
CHATS = ("messages", "conversations")
PAIRS = (
    Pair("prompt", "completion", as_is=True),
    Pair("question", "answer"),
    Pair("instruction", "output", more="input"),
    Pair("instruction", "response", more="input"),
)
PROMPTS = (*dict.fromkeys(pair.prompt for pair in PAIRS), "input")
"""A prompt also pairs with an answer of another row of `PAIRS` where no row is there as a whole."""
ANSWERS = tuple(dict.fromkeys(pair.answer for pair in PAIRS))
TEXTS = ("text", "content")
TO_ANSWER = (*CHATS, *PROMPTS[:-1], *TEXTS, PROMPTS[-1])
"""Of a file without answers: the columns of prompts."""
TOOLS = "tools"
"""Beside a chat: what its template gets as tools."""
GENERATED = "generated"
"""The column that a model's answers are written to."""

# Of a classification.
CLASSIFIED = ("text", "sentence", "utterance", "content", "review", "question")
LABELS = ("label", "labels", "intent", "category", "class", "sentiment", "topic", "target")

MORE = "\n\n"
"""Between a prompt and the column `more`."""
ANSWER = "\n"
"""Between a prompt and its answer where there is no chat template, but for pairs that are put together as they are."""

# The messages of a chat.
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
MAY_BE_EMPTY = ("system", "developer", "tool")
"""An empty system message is how a chat says that it has none, and a tool may return nothing."""


def pair_of(prompt: str, answer: str = "") -> Pair:
    """The row of `PAIRS` for two columns; for any other two, a row with the `more` of that prompt."""
    rows = [pair for pair in PAIRS if pair.prompt == prompt]
    more = rows[0].more if rows else None
    return next((pair for pair in rows if pair.answer == answer), Pair(prompt, answer, more))


def with_more(prompt: str, more: object) -> str:
    """A prompt with what is put behind it, if anything."""
    return f"{prompt}{MORE}{more}" if str(more or "").strip() else prompt
