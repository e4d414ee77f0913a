"""Where the assistant's turns are in a rendered chat, and which tokens they consist of.

`{% generation %}` marks in the template are used if it has any. Otherwise the chat up to a turn is rendered with the
generation prompt; it must be a prefix of the whole chat, and the turn follows it. A turn ends with the token that
closes it, so that the model learns to stop; white space after that is never generated and not trained.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import DataError
from .formats import Message

IGNORED = -100
"""The label of a token that is not trained; PyTorch's cross entropy ignores it."""

MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = "CONTENT0OF0THE0TURN"
"""Replaces the content of a turn, to find what the template puts after it."""

Variables = Mapping[str, Any]
"""What a chat template gets besides the messages: `tools`, and others by their names."""


class LabelError(DataError):
    """The trained tokens of a chat could not be determined.

    Args:
        fault: what is wrong with it.
        hint: the next step.
    """

    def __init__(self, fault: str, hint: str) -> None:
        super().__init__(f"{fault}. {hint}")
        self.fault = fault
        self.hint = hint


@dataclass(frozen=True)
class Span:
    """Range of characters of a rendered chat that the model generates; `turn` is the index of the message."""

    turn: int
    begin: int
    end: int


@dataclass
class Labeled:
    """Tokens of one row and their labels, of equal length; a label is its token, or -100 if it is not trained.

    Args:
        split: whether a prompt tokenized alone has different tokens than within the row.
    """

    input_ids: list[int]
    labels: list[int]
    split: bool = False


class Template:
    """The chat template of a tokenizer, and how its turns end.

    Raises:
        LabelError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise LabelError(
                "the tokenizer has no chat template",
                "Start from a chat model, set tokenizer.chat_template, or provide the data as columns 'prompt' and "
                "'completion'.",
            )
        self.tokenizer = tokenizer
        tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
        tokens = [token for token in {*tokens, *tokenizer.all_special_tokens} if token.strip()]
        tokens.sort(key=len, reverse=True)
        self.tokens = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
        self.closing: str | None = None

    def marked(self, variables: Variables) -> bool:
        """Whether the template marks what the assistant generates."""
        return MARKS.search(self.tokenizer.get_chat_template(tools=variables.get("tools"))) is not None

    def render(self, messages: list[Message], variables: Variables, prompt: bool = False) -> str:
        """The chat as text; with `prompt`, it ends with the generation prompt."""
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **variables)
            )
        except Exception as error:  # a template is a program and may raise any exception
            raise _refused(error) from error

    def spans(self, messages: list[Message], variables: Variables, turns: list[int]) -> tuple[str, list[Span]]:
        """The text of a chat and the spans of the assistant's `turns` (indices of messages).

        Raises:
            LabelError: the template rejects the chat, marks nothing in a turn, or rewrites earlier turns.
        """
        if self.marked(variables):
            return self._by_marks(messages, variables, turns)
        text = self.render(messages, variables)
        return text, [self._by_prefix(messages, variables, turn, text) for turn in turns]

    def _by_marks(self, messages: list[Message], variables: Variables, turns: list[int]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # Not apply_chat_template(return_assistant_tokens_mask=True): if the last marked character belongs to no token
        # (white space that the tokenizer drops), it marks everything after it.
        rendered: Any  # annotated as str by transformers
        given: dict[str, Any] = {**self.tokenizer.special_tokens_map, **variables}
        try:
            rendered = render_jinja_template(
                conversations=[[{k: v for k, v in m.items() if v is not None} for m in messages]],
                chat_template=self.tokenizer.get_chat_template(tools=variables.get("tools")),
                return_assistant_tokens_mask=True,
                **given,
            )
        except Exception as error:
            raise _refused(error) from error
        text, marks = rendered[0][0], rendered[1][0]
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marks) == len(assistants):  # one each, so they need not be located
            at = dict(zip(assistants, marks, strict=True))
            by_turn = {turn: [at[turn]] for turn in turns}
        else:
            begins = [self._begin(messages[:turn], variables, text, turn == assistants[0]) for turn in turns]
            ends = [*begins[1:], len(text)]
            by_turn = {
                turn: [(a, b) for a, b in marks if begin <= a < end]
                for turn, begin, end in zip(turns, begins, ends, strict=True)
            }
        spans = []
        for turn, found in by_turn.items():
            found = [Span(turn, a, b) for a, b in found if b > a]
            if not found:
                raise LabelError(
                    f"message {turn + 1}: the template marks nothing of the assistant's turn as generated",
                    "In the template, put {% generation %} and {% endgeneration %} around the assistant's content.",
                )
            spans += found
        return text, spans

    def _begin(self, before: list[Message], variables: Variables, text: str, is_first: bool) -> int:
        """Where the messages before an assistant turn end; a template may append text to the end of a chat."""
        try:
            return len(os.path.commonprefix([self.render(before, variables), text])) if before else 0  # noqa: RUF071
        except LabelError as error:  # for example a template that requires a user message
            if is_first:
                return 0
            raise LabelError(
                f"message {len(before) + 1}: the template does not mark one range for each assistant turn and rejects "
                "the messages before this one alone, so it is unknown which marks belong to this turn",
                "In the template, put one pair of {% generation %} and {% endgeneration %} around each turn.",
            ) from error

    def _by_prefix(self, messages: list[Message], variables: Variables, turn: int, text: str) -> Span:
        at = f"message {turn + 1}"
        if turn == 0:
            raise LabelError(
                f"{at}: the assistant message is the first, so there is no prompt",
                "Begin these chats with a user or system message.",
            )
        head = self.render(messages[:turn], variables, prompt=True)
        whole = text if turn + 1 == len(messages) else self.render(messages[: turn + 1], variables)
        if not whole.startswith(head):
            raise LabelError(
                f"{at}: the template does not begin the turn with its generation prompt ({head[-30:]!r})",
                "Use a template with {% generation %} marks.",
            )
        ends = self._ends(messages[: turn + 1], variables, whole, len(head))
        ends = [end for end in ends if text.startswith(whole[:end])]
        if not ends:
            raise LabelError(
                f"{at}: the template rewrites earlier turns, so the turn differs from what the model generated",
                "Use a template with {% generation %} marks, or train only on the last answer of each chat "
                "(last_turn_only=True, --last-turn-only), with one chat for each answer.",
            )
        return Span(turn, len(head), max(ends))

    def _ends(self, messages: list[Message], variables: Variables, whole: str, begin: int) -> list[int]:
        """Possible ends of the last message: after each of the adjacent tokens that close it.

        Some templates close a turn with two tokens; others append one more at the end of the chat.
        """
        if messages[-1].get("tool_calls"):  # the calls follow the content and contain special tokens
            return [token.end() for token in self.tokens.finditer(whole, begin)][-1:] or [len(whole.rstrip())]
        closing = self.closing
        if closing is None or not whole.endswith(closing):
            probed = self.render([*messages[:-1], {**messages[-1], "content": PROBE}], variables)
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
        f"the chat template rejects the chat ({type(error).__name__}: {error})",
        "Write the chats as the template requires, or set another tokenizer.chat_template.",
    )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The special tokens, including those without a role such as EOS."""
    named = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return named | set(tokenizer.all_special_ids)


def label_spans(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> Labeled:
    """Tokenize a text once and label the tokens that lie completely inside a span.

    Raises:
        LabelError: a turn has no trained token, or only special ones.
    """
    row, trained = (_label_offsets if tokenizer.is_fast else _label_pieces)(tokenizer, text, spans)
    untrained = sorted({span.turn for span in spans} - trained)
    if untrained:
        raise LabelError(
            f"message {', '.join(str(turn + 1) for turn in untrained)}: no token of the assistant's text is trained",
            "Look at the output of the chat template: tokenizer.apply_chat_template(messages, tokenize=False).",
        )
    return row


def _label_offsets(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> tuple[Labeled, set[int]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = encoded["input_ids"]
    offsets: list[tuple[int, int]] = encoded["offset_mapping"]
    row = Labeled(ids, [IGNORED] * len(ids))
    special, trained = special_ids(tokenizer), set[int]()
    after, at = 0, 0  # position in the row: the token and the character
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
            # A closing token may include the white space after it.
            if end <= span.end or not text[span.end : end].strip():
                row.labels[token] = ids[token]
                if ids[token] not in special:
                    trained.add(span.turn)
                elif end == span.end:
                    after, at = token + 1, end
    return row, trained


def _first_token(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], span: Span, after: int, at: int
) -> int | None:
    """The index of a span's first token, or None if the text before it has different tokens when tokenized alone.

    That text is the prompt at generation. If its tokens are a prefix of the row, their number locates the span better
    than offsets, which exclude white space for some tokenizers. After a special token (the one before `after`, which
    ends at the character `at`) only the text from there on is tokenized, which saves time.
    """
    for token, character in dict.fromkeys([(after, at), (0, 0)]):
        prompt = tokenizer(text[character : span.begin], add_special_tokens=False, verbose=False)["input_ids"]
        if ids[token : token + len(prompt)] == prompt:
            return token + len(prompt)
    return None


def _label_pieces(tokenizer: PreTrainedTokenizerBase, text: str, spans: list[Span]) -> tuple[Labeled, set[int]]:
    """For tokenizers without offsets: split the text at the borders of the spans, and tokenize each piece alone."""
    row = Labeled([], [])
    special, trained = special_ids(tokenizer), set[int]()
    at = 0
    for span in (*spans, Span(-1, len(text), len(text))):
        for piece, inside in ((text[at : span.begin], False), (text[span.begin : span.end], True)):
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] if piece else []
            row.input_ids += ids
            row.labels += ids if inside else [IGNORED] * len(ids)
            if inside and not special.issuperset(ids):
                trained.add(span.turn)
        at = span.end
    return row, trained
