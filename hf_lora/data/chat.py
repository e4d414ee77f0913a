"""From the rows of a table to labeled tokens for causal language models, and a look at what is learned.

A row is `{"input_ids", "labels"}`, two lists of one length; labels are the tokens, or -100 where nothing is learned.
"""

from __future__ import annotations

import warnings
from typing import Any

from ..errors import ConfigError, DataError, Faults
from .formats import PAIR, TEXT, Example, Form, Message, read_examples
from .spans import IGNORED, LabelError, Labelled, Template, label_spans, special_ids
from .tables import Table

LEARNED = ("⟦", "⟧")
"""What is put around learned text in `show_batch`."""


def label_chat(
    tokenizer: Any,
    messages: list[Message],
    tools: list[Any] | None = None,
    *,
    last_turn_only: bool = False,
    learned_from: int = 0,
) -> tuple[list[int], list[int]]:
    """The tokens of a chat and their labels, -100 except on what the assistant says.

    A template with `{% generation %}` marks is believed. With any other, each of the assistant's turns is located by
    rendering the chat up to it; it is learned with the token that closes it, but not the white space after that.

    Args:
        messages: of the form {"role", "content"}; the assistant speaks in at least one.
        last_turn_only: learn the assistant's last turn alone, as it is where the chat ends with it. It is the way for
            templates that rewrite earlier turns, such as those that take the reasoning out of them.
        learned_from: messages before this index are never learned.

    Returns:
        Two lists of one length.

    Raises:
        LabelError: a DataError; the template refuses the chat, or a turn cannot be located in it.
    """
    row = _label_chat(Template(tokenizer), messages, tools, last_turn_only, learned_from)
    return row.input_ids, row.labels


def _label_chat(
    template: Template, messages: list[Message], tools: list[Any] | None, last_turn_only: bool, learned_from: int
) -> Labelled:
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= learned_from]
    if not turns:
        raise LabelError("the assistant never speaks", "Give each chat an answer to learn.")
    if last_turn_only:
        turns = turns[-1:]
        messages = messages[: turns[0] + 1]
    text, spans = template.spans(messages, tools, turns)
    return label_spans(template.tokenizer, text, spans)


def label_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """A prompt's tokens, not learned, then those of a completion and the end token, learned.

    The two are tokenized apart, with nothing put between them; the prompt gets the token for the beginning where the
    tokenizer puts one.

    Raises:
        LabelError: a DataError; the tokenizer has no end token.
    """
    end = _end_token(tokenizer)
    before = tokenizer(prompt, verbose=False)["input_ids"]
    if before[-1:] == [end]:
        before = before[:-1]  # some tokenizers end every text themselves
    after = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    after = after if after[-1:] == [end] else [*after, end]
    return [*before, *after], [IGNORED] * len(before) + after


def label_text(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """A text's tokens and the end token, all learned.

    Raises:
        LabelError: a DataError; the tokenizer has no end token.
    """
    end = _end_token(tokenizer)
    ids = tokenizer(text, verbose=False)["input_ids"]
    ids = list(ids) if ids[-1:] == [end] else [*ids, end]
    return ids, list(ids)


def _end_token(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise LabelError(
            "the tokenizer has no end token, so a model would never learn to stop",
            'Set tokenizer.eos_token to the token that ends a text (tokenizer_config.json: "eos_token").',
        )
    return int(tokenizer.eos_token_id)


def is_templated(form: Form, tokenizer: Any, use_chat_template: bool | None = None) -> bool:
    """Whether rows of this form go through the tokenizer's chat template.

    Args:
        use_chat_template: None: chats always do, pairs do where there is a template, columns called prompt and
            completion do not. True puts every pair of texts through it, False none.

    Raises:
        ConfigError: chats without a template, or a template asked for on a form that has no turns or where there is
            none.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if use_chat_template and form.kind == TEXT:
        raise ConfigError(
            f"use_chat_template=True, but {form.columns[0]!r} holds texts without turns. Leave it out, or name the "
            "columns of prompts and answers."
        )
    if (form.chat or use_chat_template) and not has:
        raise ConfigError(
            f"{form.name} needs a chat template, and the tokenizer has none. Start from a model that is tuned for "
            "chats, set tokenizer.chat_template, or give the data as columns 'prompt' and 'completion'."
        )
    if form.chat:
        if use_chat_template is False:
            raise ConfigError(f"{form.name} holds chats, which have no form without a template: leave it on.")
        return True
    return form.kind == PAIR and has if use_chat_template is None else use_chat_template


def chat_rows(
    table: Table,
    form: Form,
    tokenizer: Any,
    max_length: int,
    *,
    use_chat_template: bool | None = None,
    last_turn_only: bool = False,
) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenize and label the rows of a table.

    Args:
        form: see `recognise`.
        max_length: tokens kept of a row; the rest is cut off its end.
        use_chat_template: see `is_templated`.
        last_turn_only: of each chat, learn the assistant's last turn alone.

    Returns:
        A row of `input_ids` and `labels` for each of the table's, and how many were cut.

    Raises:
        ConfigError: see `is_templated`.
        DataError: there are no rows; lists every row that does not fit the form, whose turns cannot be told, or of
            which the first `max_length` tokens hold nothing to learn.
    """
    if not len(table):
        raise DataError(f"{table.source} holds no rows to learn from.")
    templated = is_templated(form, tokenizer, use_chat_template)
    examples = read_examples(table, form)
    template = Template(tokenizer) if templated else None
    faults, ways = Faults(f"labelling {table.source}"), dict[str, None]()
    rows: list[dict[str, list[int]]] = []
    cut = split = 0
    for i, example in enumerate(examples):
        try:
            row = _label(tokenizer, template, form, example, last_turn_only)
        except LabelError as error:
            faults.add(f"{table.at(i)}: {error.fault}")
            ways[error.way] = None
            continue
        count = len(row.input_ids)
        ids, labels = row.input_ids[:max_length], row.labels[:max_length]
        if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
            if count > max_length:
                faults.add(f"{table.at(i)}: of its {count:,} tokens the first {max_length:,} hold nothing to learn")
                ways["Raise max_length, or shorten or remove these rows."] = None
            else:
                faults.add(f"{table.at(i)}: nothing in it is learned (all labels are ignored)")
                ways["Give each row an answer or a text to learn, of more than one token."] = None
        cut += count > max_length
        split += row.split
        rows.append({"input_ids": ids, "labels": labels})
    faults.check(DataError, " ".join(ways))
    if template is not None:
        _warn(table, template, rows, split)
    return rows, cut


def _label(tokenizer: Any, template: Template | None, form: Form, example: Example, last_turn_only: bool) -> Labelled:
    if example.text is not None:
        return Labelled(*label_text(tokenizer, example.text))
    messages, prompt, completion = example.messages, str(example.prompt), str(example.completion)
    if template is None:
        return Labelled(*label_pair(tokenizer, prompt + form.between, completion))
    if messages is None:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _label_chat(template, messages, example.tools, last_turn_only, example.learned_from)


def _warn(table: Table, template: Template, rows: list[dict[str, list[int]]], split: int) -> None:
    ends = set(template.tokenizer.added_tokens_decoder) | special_ids(template.tokenizer)
    if not any(ends.intersection(row["labels"]) for row in rows):
        warnings.warn(
            f"{table.source}: the chat template closes the assistant's turns with no token of its own, so the model "
            "may not learn to stop.",
            stacklevel=3,
        )
    if split:
        warnings.warn(
            f"{table.source}: in {split:,} of {len(rows):,} rows the tokens at the beginning of an answer also hold "
            "the end of its prompt; they are not learned, and the model will be asked with other tokens there.",
            stacklevel=3,
        )


def show_batch(tokenizer: Any, batch: dict[str, Any]) -> str:
    """A training batch as text: each document with ⟦what is learned⟧, special tokens shown, and its counts.

    Args:
        batch: `input_ids` and `labels`, (B, T); with `attention_mask`, padding is left out; with `position_ids`, a row
            is divided where they begin anew.
    """
    lines = []
    pad = tokenizer.pad_token_id
    for r, (ids, labels) in enumerate(zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True), 1):
        mask = batch["attention_mask"][r - 1].tolist() if batch.get("attention_mask") is not None else [1] * len(ids)
        positions = batch.get("position_ids")
        places = positions[r - 1].tolist() if positions is not None else list(range(len(ids)))
        kept = [t for t in range(len(ids)) if mask[t]]
        begins = [k for k, t in enumerate(kept) if k == 0 or places[t] == 0]
        documents = [kept[a:b] for a, b in zip(begins, [*begins[1:], len(kept)], strict=True)]
        # Padding without a mask: positions of 0, each of them a document of its own.
        documents = [d for d in documents if len(d) > 1 or ids[d[0]] != pad or labels[d[0]] != IGNORED]
        for d, document in enumerate(documents, 1):
            learned = [labels[t] != IGNORED for t in document]
            name = f"row {r}" if len(documents) == 1 else f"row {r}, document {d}"
            lines.append(f"{name}: trained {sum(learned):,} of {len(learned):,} tokens")
            lines.append(_marked(tokenizer, [ids[t] for t in document], learned))
    return "\n".join(lines)


def _marked(tokenizer: Any, ids: list[int], learned: list[bool]) -> str:
    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    borders = [t for t in range(1, len(ids)) if learned[t] != learned[t - 1]]
    text, parts, at = decoded(ids), [], 0
    for begin, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        # Cut out of the whole text, since a piece alone may lose the space that it begins with.
        upto = len(text) if end == len(ids) else len(decoded(ids[:end]))
        piece = text[at:upto]
        parts.append(f"{LEARNED[0]}{piece}{LEARNED[1]}" if learned[begin] else piece)
        at = upto
    return "".join(parts)
