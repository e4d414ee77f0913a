"""The meaning of column names, and the separators between texts, for training, evaluation and generation.

A new data format is an entry here: `PAIRS` for a prompt and its answer, `CHATS` for lists of messages.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Pair(NamedTuple):
    """Two text columns, the second of which is trained.

    Args:
        more: an optional column that is appended to the prompt if it is not empty.
        as_is: the answer follows the prompt without a chat template or a separator.
    """

    prompt: str
    answer: str
    more: str | None = None
    as_is: bool = False


# The most specific first.
CHATS = ("messages", "conversations")
PAIRS = (
    Pair("prompt", "completion", as_is=True),
    Pair("question", "answer"),
    Pair("instruction", "output", more="input"),
    Pair("instruction", "response", more="input"),
)
PROMPTS = (*dict.fromkeys(pair.prompt for pair in PAIRS), "input")
"""If a table has no complete row of `PAIRS`, a prompt may pair with the answer of another row."""
SEQUENCES = (("source", "target"), ("document", "summary"), ("article", "highlights"), ("input", "output"))
"""For encoder-decoders, beside `PAIRS`."""
TRANSLATION = "translation"
"""A text in two languages, such as {"en": "door", "de": "Tür"}."""
ANSWERS = tuple(dict.fromkeys(pair.answer for pair in PAIRS))
TEXTS = ("text", "content")
TO_ANSWER = (*CHATS, *PROMPTS[:-1], *TEXTS, PROMPTS[-1])
"""The columns of prompts in a file without answers."""
TOOLS = "tools"
"""The tools of a chat, which are passed to its template."""
VARIABLES = "chat_template_kwargs"
"""Further variables of a chat's template, such as {"enable_thinking": false}."""
GENERATED = "generated"
"""The column that a model's answers are written to."""

# Classification.
CLASSIFIED = ("text", "sentence", "utterance", "content", "review", "question")
TOKENS = ("tokens", "words")
TAGS = ("ner_tags", "tags", "pos_tags", "chunk_tags", "labels")
QUESTIONS, CONTEXTS, ANSWER_SPANS = ("question",), ("context",), ("answers",)
IMAGES = ("image", "img", "image_path", "image_file", "file_name")
LABELS = ("label", "labels", "intent", "category", "class", "sentiment", "topic", "target")

MORE = "\n\n"
"""Between a prompt and the column `more`."""
ANSWER = "\n"
"""Between a prompt and its answer without a chat template, except for pairs with `as_is`."""

# The messages of a chat.
ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
MAY_BE_EMPTY = ("system", "developer", "tool")
"""Some chats have an empty system message instead of none, and a tool may return nothing."""


def pair_of(prompt: str, answer: str = "") -> Pair:
    """The row of `PAIRS` for two columns; for any other two, a new one with the `more` of that prompt."""
    rows = [pair for pair in PAIRS if pair.prompt == prompt]
    more = rows[0].more if rows else None
    return next((pair for pair in rows if pair.answer == answer), Pair(prompt, answer, more))


LISTS = (*CHATS, *PROMPTS, *ANSWERS, *TOKENS, *TAGS, *LABELS)
"""Columns whose cells may be lists."""


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, and not other JSON: objects, of which at least one has a known role."""
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        return False
    known = {*ROLES, *ALIASES}
    return any(str(part.get("role") or part.get("from")).lower() in known for part in value)


def with_more(prompt: str, more: object) -> str:
    """A prompt with the content of the column `more`, if any."""
    return f"{prompt}{MORE}{more}" if str(more or "").strip() else prompt
