"""Where the assistant's turns are in a rendered chat, and which tokens those are.

A template with `{% generation %}` marks says it. Any other is asked: the chat up to a turn, with the generation
prompt, must be how the whole chat begins, and the turn follows it. It ends with the token that closes it, so that the
model learns to stop; white space after that is never generated and not learned.
"""

from __future__ import annotations

import os.path
import re
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from .formats import Message

IGNORED = -100
"""The label of a token that is not learned: what PyTorch's cross entropy leaves out."""

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = "CONTENT0OF0THE0TURN"
"""Stands in for a turn's content where we look at what the template puts behind it."""


class LabelError(DataError):
    """A chat whose learned tokens cannot be told.

    Args:
        fault: what is wrong with it.
        way: the next step.
    """

    def __init__(self, fault: str, way: str) -> None:
        super().__init__(f"{fault}. {way}")
        self.fault = fault
        self.way = way


@dataclass(frozen=True)
class Span:
    """Characters of a rendered chat that the model is to generate; `turn` is the message's index."""

    turn: int
    begin: int
    end: int


@dataclass
class Labelled:
    """Tokens of one row and their labels, of one length; a label is its token, or -100 where it is not learned.

    Args:
        split: whether some prompt alone has other tokens than the same text has within the row.
    """

    input_ids: list[int]
    labels: list[int]
    split: bool = False


class Template:
    """The chat template of a tokenizer, and how its turns end.

    Raises:
        LabelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise LabelError(
                "the tokenizer has no chat template",
                "Start from a model that is tuned for chats, set tokenizer.chat_template, or give the data as "
                "columns 'prompt' and 'completion'.",
            )
        self.tokenizer = tokenizer
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
        tokens = [token for token in {*tokens, *tokenizer.all_special_tokens} if token.strip()]
        tokens.sort(key=len, reverse=True)
        self.tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self.closing: str | None = None

    def marked(self, tools: list[Any] | None) -> bool:
        """Whether the template marks what the assistant generates."""
        return MARKS.search(self.tokenizer.get_chat_template(tools=tools)) is not None

    def render(self, messages: list[Message], tools: list[Any] | None, prompt: bool = False) -> str:
        """The chat as text; with `prompt`, up to where the assistant is to speak."""
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tools, add_generation_prompt=prompt, tokenize=False)
            )
        except Exception as error:  # a template is a program: what it may raise is not one class
            raise _refused(error) from error

    def spans(self, messages: list[Message], tools: list[Any] | None, turns: list[int]) -> tuple[str, list[Span]]:
        """The text of a chat and where in it the assistant's `turns` (indices of messages) are generated.

        Raises:
            LabelError: the template refuses the chat, marks nothing of a turn, or rewrites earlier turns.
        """
        if self.marked(tools):
            return self._by_marks(messages, tools, turns)
        text = self.render(messages, tools)
        return text, [self._by_prefix(messages, tools, turn, text) for turn in turns]

    def _by_marks(self, messages: list[Message], tools: list[Any] | None, turns: list[int]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # What apply_chat_template(return_assistant_tokens_mask=True) does with these marks is not used: where the last
        # marked character belongs to no token (white space that the tokenizer drops), it marks all that follows.
        rendered: Any  # it is annotated as text
        try:
            rendered = render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(tools=tools),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _refused(error) from error
        text, marks = rendered[0][0], rendered[1][0]
        begins = [self._begin(messages[:turn], tools, text) for turn in turns]
        spans = []
        for turn, begin, end in zip(turns, begins, [*begins[1:], len(text)], strict=True):
            found = [Span(turn, a, b) for a, b in marks if begin <= a < end and b > a]
            if not found:
                raise LabelError(
                    f"message {turn + 1}: the template marks nothing of the assistant's turn as generated",
                    "Put {% generation %} and {% endgeneration %} around all that the assistant says in the template.",
                )
            spans += found
        return text, spans

    def _begin(self, before: list[Message], tools: list[Any] | None, text: str) -> int:
        """Where the messages before a turn end; templates may add something at the end of a chat."""
        try:
            return len(os.path.commonprefix([self.render(before, tools), text])) if before else 0  # noqa: RUF071
        except LabelError:  # such as a template that wants a user's message in every chat
            return 0

    def _by_prefix(self, messages: list[Message], tools: list[Any] | None, turn: int, text: str) -> Span:
        at = f"message {turn + 1}"
        if turn == 0:
            raise LabelError(
                f"{at}: the assistant speaks first, so there is no prompt that it answers",
                "Begin these chats with a user's or a system message.",
            )
        head = self.render(messages[:turn], tools, prompt=True)
        whole = text if turn + 1 == len(messages) else self.render(messages[: turn + 1], tools)
        if not whole.startswith(head):
            raise LabelError(
                f"{at}: the template begins the turn otherwise than its generation prompt ({head[-30:]!r}) says",
                "Use a template with {% generation %} marks.",
            )
        ends = [
            end for end in self._ends(messages[: turn + 1], tools, whole, len(head)) if text.startswith(whole[:end])
        ]
        if not ends:
            raise LabelError(
                f"{at}: the template rewrites earlier turns: within the whole chat the turn is not what the model "
                "said",
                "Use a template with {% generation %} marks, or learn the last answer of each chat alone "
                "(last_turn_only=True, --last-turn-only), with one chat for each answer.",
            )
        return Span(turn, len(head), max(ends))

    def _ends(self, messages: list[Message], tools: list[Any] | None, whole: str, begin: int) -> list[int]:
        """Where the last message may end: behind each of the tokens that close it, with no white space between them.

        Some templates close a turn with two, others end the chat with one more.
        """
        if messages[-1].get("tool_calls"):  # the calls follow the content and hold tokens of their own
            return [token.end() for token in self.tokens.finditer(whole, begin)][-1:] or [len(whole.rstrip())]
        closing = self.closing
        if closing is None or not whole.endswith(closing):
            probed = self.render([*messages[:-1], {**messages[-1], "content": PROBE}], tools)
            _, found, closing = probed.rpartition(PROBE)
            if not found or not whole.endswith(closing):
                return [len(whole.rstrip())]
            self.closing = closing
        content_end = max(begin, len(whole) - len(closing))
        token = self.tokens.search(closing)
        if token is None:
            return [content_end + len(closing.rstrip())]
        ends = []
        while token is not None:
            ends.append(content_end + token.end())
            token = self.tokens.match(closing, token.end())
        return ends


def _refused(error: Exception) -> LabelError:
    return LabelError(
        f"the chat template refuses the chat ({type(error).__name__}: {error})",
        "Write the chats as the template wants them, or set another tokenizer.chat_template.",
    )


def special_ids(tokenizer: Any) -> set[int]:
    """The tokens that stand for no text, those included that have no role such as "the end token"."""
    named = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return named | set(tokenizer.all_special_ids)


def label_spans(tokenizer: Any, text: str, spans: list[Span]) -> Labelled:
    """Tokenize a text once and label the tokens that lie wholly inside a span.

    Raises:
        LabelError: nothing of a turn is learned, or only special tokens are.
    """
    row, learned = (_label_offsets if tokenizer.is_fast else _label_pieces)(tokenizer, text, spans)
    silent = sorted({span.turn for span in spans} - learned)
    if silent:
        raise LabelError(
            f"message {', '.join(str(turn + 1) for turn in silent)}: no token of the assistant's content is learned",
            "Look at what the chat template makes of it: tokenizer.apply_chat_template(messages, tokenize=False).",
        )
    return row


def _label_offsets(tokenizer: Any, text: str, spans: list[Span]) -> tuple[Labelled, set[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    row = Labelled(ids, [IGNORED] * len(ids))
    special, learned = special_ids(tokenizer), set[int]()
    after, at = 0, 0  # up to where the row has been seen: the token and the character
    for span in spans:
        first = _first_token(tokenizer, text, ids, span, after, at)
        if first is None:
            row.split = True
            first = next((t for t, (start, _) in enumerate(offsets) if start >= span.begin), len(ids))
        after, at = 0, 0
        for token in range(first, len(ids)):
            start, end = offsets[token]
            if start >= span.end:
                break
            # A closing token may take the white space behind it.
            if end <= span.end or not text[span.end : end].strip():
                row.labels[token] = ids[token]
                if ids[token] not in special:
                    learned.add(span.turn)
                elif end == span.end:
                    after, at = token + 1, end
    return row, learned


def _first_token(tokenizer: Any, text: str, ids: list[int], span: Span, after: int, at: int) -> int | None:
    """The index of a span's first token, or None where the text before it alone has other tokens than in the row.

    That text is the prompt as the model meets it when it is asked. Where its tokens are how the row begins, they say
    where the span begins better than offsets, from which some tokenizers cut white space. Behind a special token (the
    one before `after`, which ends at the character `at`) it is enough to look from there on, as most texts are long.
    """
    for token, character in dict.fromkeys([(after, at), (0, 0)]):
        prompt = tokenizer(text[character : span.begin], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[token : token + len(prompt)] == prompt:
            return token + len(prompt)
    return None


def _label_pieces(tokenizer: Any, text: str, spans: list[Span]) -> tuple[Labelled, set[int]]:
    """Without offsets: the text between the borders of the spans, each piece tokenized alone."""
    row = Labelled([], [])
    special, learned = special_ids(tokenizer), set[int]()
    at = 0
    for span in (*spans, Span(-1, len(text), len(text))):
        for piece, inside in ((text[at : span.begin], False), (text[span.begin : span.end], True)):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] if piece else []
            row.input_ids += ids
            row.labels += ids if inside else [IGNORED] * len(ids)
            if inside and not special.issuperset(ids):
                learned.add(span.turn)
        at = span.end
    return row, learned
