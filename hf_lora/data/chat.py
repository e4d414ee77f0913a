"""From the rows of a table to labeled tokens for causal language models, and a view of which tokens are trained.

A row is `{"input_ids", "labels"}`, two lists of equal length; a label is its token, or -100 for no loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, Faults
from .columns import VARIABLES
from .encode import with_system
from .formats import PAIR, RAW, TEXT, Example, Format, Message, read_examples
from .spans import IGNORED, Labeled, LabelError, Template, Variables, label_spans, special_ids
from .tables import Table
from .trained import of_the_call

TRAINED_MARKS = ("⟦", "⟧")
"""Put around trained text by `show_batch`."""


def label_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Any] | None = None,
    *,
    last_turn_only: bool = False,
    train_from: int = 0,
    variables: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a chat; labels are -100 outside the assistant's turns.

    If the template has `{% generation %}` marks, they are used. Otherwise each assistant turn is located by rendering
    the chat up to it. A turn is trained including the token that closes it, but not the white space after that.

    Args:
        messages: mappings {"role", "content"}, at least one of them the assistant's.
        last_turn_only: train on the assistant's last turn only, and cut the chat after it. Use it for templates that
            rewrite earlier turns, for example to remove their reasoning.
        train_from: messages before this index are never trained.
        variables: further variables of the template, such as `{"enable_thinking": False}`.

    Returns:
        Two lists of equal length.

    Raises:
        LabelError: a DataError; the template rejects the chat, or a turn could not be located in it.
    """
    given = {"tools": tools, **_checked(variables or {})}
    row = _label_chat(Template(tokenizer), messages, given, last_turn_only, train_from)
    return row.input_ids, row.labels


def _checked(variables: Variables) -> Variables:
    wrong = sorted(of_the_call() & variables.keys())
    if wrong:
        raise LabelError(
            f"{VARIABLES} may not set {', '.join(wrong)}", "Tools are a column of their own; leave all others out."
        )
    return variables


def _label_chat(
    template: Template, messages: list[Message], variables: Variables, last_turn_only: bool, train_from: int
) -> Labeled:
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= train_from]
    if not turns:
        raise LabelError("there is no assistant message", "Add an assistant message to each chat.")
    if last_turn_only:
        turns = turns[-1:]
        messages = messages[: turns[0] + 1]
    text, spans = template.spans(messages, variables, turns)
    return label_spans(template.tokenizer, text, spans)


def label_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of a prompt, which is not trained, and of a completion with its EOS token, which is.

    The two are tokenized separately, with nothing between them. The prompt begins with the BOS token if the tokenizer
    adds one.

    Raises:
        LabelError: a DataError; the tokenizer has no EOS token.
    """
    end = _end_token(tokenizer)
    before = tokenizer(prompt, verbose=False)["input_ids"]
    if before[-1:] == [end]:
        before = before[:-1]  # some tokenizers add EOS to every text
    after = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
    after = after if after[-1:] == [end] else [*after, end]
    return [*before, *after], [IGNORED] * len(before) + after


def label_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of a text and the EOS token, all of them trained.

    Raises:
        LabelError: a DataError; the tokenizer has no EOS token.
    """
    end = _end_token(tokenizer)
    ids = tokenizer(text, verbose=False)["input_ids"]
    ids = list(ids) if ids[-1:] == [end] else [*ids, end]
    return ids, list(ids)


def _end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise LabelError(
            "the tokenizer has no EOS token, so a model would never learn to stop",
            'Set tokenizer.eos_token to the token that ends a text (tokenizer_config.json: "eos_token").',
        )
    return int(tokenizer.eos_token_id)


def is_templated(
    data_format: Format, tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None
) -> bool:
    """Whether the tokenizer's chat template is applied to rows of this format.

    Args:
        use_chat_template: True applies it to every pair of texts, False to none. Default: it is applied to chats, and
            to pairs as in the training of an adapter that is evaluated, else if the tokenizer has one, except to the
            columns `prompt` and `completion`.

    Raises:
        ConfigError: chats without a template, or a template was requested for texts without turns or does not exist.
    """
    has = bool(getattr(tokenizer, "chat_template", None))
    if use_chat_template is None and data_format.trained is not None and data_format.kind in (PAIR, RAW):
        use_chat_template = data_format.trained.use_chat_template
    if use_chat_template and data_format.kind == TEXT:
        raise ConfigError(
            f"use_chat_template=True, but {data_format.columns[0]!r} holds texts without turns. Omit it, or name the "
            "columns of prompts and answers."
        )
    if (data_format.chat or use_chat_template) and not has:
        raise ConfigError(
            f"{data_format.name} needs a chat template, and the tokenizer has none. Start from a chat model, set "
            "tokenizer.chat_template, or provide the data as columns 'prompt' and 'completion'."
        )
    if data_format.chat:
        if use_chat_template is False:
            raise ConfigError(
                f"use_chat_template=False, but {data_format.name} holds chats, which need the template. Omit it."
            )
        return True
    return data_format.kind == PAIR and has if use_chat_template is None else use_chat_template


def chat_rows(
    table: Table,
    data_format: Format,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    use_chat_template: bool | None = None,
    last_turn_only: bool | None = None,
    completion_only: bool = True,
    keep_end: bool = False,
) -> tuple[list[dict[str, list[int]]], int]:
    """Tokenize and label the rows of a table.

    Args:
        data_format: see `recognize_format`.
        max_length: longer rows are truncated to this many tokens.
        use_chat_template: see `is_templated`.
        last_turn_only: train on the last assistant turn of each chat only. Default: as in the training of an adapter
            that is evaluated, else False.
        completion_only: do not train on assistant turns in the column of prompts, if that holds lists of messages.
        keep_end: of longer rows, keep the last tokens instead of the first.

    Returns:
        (one row of `input_ids` and `labels` for each row of the table, the number of truncated rows).

    Raises:
        ConfigError: see `is_templated`.
        DataError: there are no rows; lists every row that does not fit the format, whose turns could not be located,
            or without a trained token among those that are kept.
    """
    if not len(table):
        raise DataError(f"{table.source} has no rows to train on.")
    templated = is_templated(data_format, tokenizer, use_chat_template)
    examples = read_examples(table, data_format)
    if last_turn_only is None:
        last_turn_only = bool(data_format.trained is not None and data_format.trained.last_turn_only)
    template = Template(tokenizer) if templated else None
    if template is None:
        _end_token(tokenizer)  # one error instead of one for each row
    faults, hints = Faults(f"labeling {table.source}"), dict[str, None]()
    rows: list[dict[str, list[int]]] = []
    kept, part = (slice(-max_length, None), "last") if keep_end else (slice(max_length), "first")
    cut = split = 0
    for i, example in enumerate(examples):
        try:
            row = _label(tokenizer, template, data_format, example, last_turn_only, completion_only)
        except LabelError as error:
            faults.add(f"{table.at(i)}: {error.fault}")
            hints[error.hint] = None
            continue
        count = len(row.input_ids)
        ids, labels = row.input_ids[kept], row.labels[kept]
        if all(label == IGNORED for label in labels[1:]):  # nothing predicts the first token
            if count > max_length:
                faults.add(f"{table.at(i)}: none of the {part} {max_length:,} of its {count:,} tokens is trained")
                hints["Raise max_length, or shorten or remove these rows."] = None
            else:
                faults.add(f"{table.at(i)}: none of its tokens is trained (all labels are ignored)")
                hints["Give each row an answer or a text of more than one token."] = None
        cut += count > max_length
        split += row.split
        rows.append({"input_ids": ids, "labels": labels})
    faults.check(DataError, " ".join(hints))
    if template is not None:
        _warn(table, template, rows, split)
    return rows, cut


def _label(
    tokenizer: PreTrainedTokenizerBase,
    template: Template | None,
    data_format: Format,
    example: Example,
    last_turn_only: bool,
    completion_only: bool,
) -> Labeled:
    if example.text is not None:
        return Labeled(*label_text(tokenizer, example.text))
    messages, prompt, completion = example.messages, str(example.prompt), str(example.completion)
    if template is None:
        return Labeled(*label_pair(tokenizer, prompt + data_format.between, completion))
    if messages is None:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    trained = data_format.trained
    whole = with_system(messages, trained.system if trained is not None else None)
    first = example.train_from + len(whole) - len(messages) if completion_only else 0
    common = (trained.variables if trained is not None else None) or {}
    variables = {"tools": example.tools, **common, **_checked(example.variables)}
    return _label_chat(template, whole, variables, last_turn_only, first)


def _warn(table: Table, template: Template, rows: list[dict[str, list[int]]], split: int) -> None:
    ends = set(template.tokenizer.added_tokens_decoder) | special_ids(template.tokenizer)
    if not any(ends.intersection(row["labels"]) for row in rows):
        warnings.warn(
            f"{table.source}: the chat template does not end assistant turns with a special token, so the model may "
            "not learn to stop.",
            stacklevel=3,
        )
    if split:
        warnings.warn(
            f"{table.source}: in {split:,} of {len(rows):,} rows the first token of an answer also holds the end of "
            "its prompt. It is not trained, and the prompt will be tokenized differently at generation.",
            stacklevel=3,
        )


def show_batch(tokenizer: PreTrainedTokenizerBase, batch: dict[str, Any], limit: int | None = None) -> str:
    """A training batch as text: each document with its ⟦trained text⟧, special tokens and token counts.

    Args:
        batch: `input_ids` and `labels`, (B, T); with `attention_mask`, padding is omitted; with `position_ids`, a row
            is divided where they restart.
        limit: how many documents are shown; default: all.
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
        # Padding without a mask has positions of 0, so each padding token is a document.
        documents = [d for d in documents if len(d) > 1 or ids[d[0]] != pad or labels[d[0]] != IGNORED]
        for d, document in enumerate(documents, 1):
            trained = [labels[t] != IGNORED for t in document]
            name = f"row {r}" if len(documents) == 1 else f"row {r}, document {d}"
            lines.append(f"{name}: trained {sum(trained):,} of {len(trained):,} tokens")
            lines.append(marked_tokens(tokenizer, [ids[t] for t in document], trained))
    return "\n".join(lines[: None if limit is None else 2 * limit])


def marked(text: str) -> str:
    """A text that is trained, in its marks."""
    return f"{TRAINED_MARKS[0]}{text}{TRAINED_MARKS[1]}"


def marked_tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]) -> str:
    """The text of tokens, in which the trained ones have marks."""

    def decoded(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    borders = [t for t in range(1, len(ids)) if trained[t] != trained[t - 1]]
    text, parts, at = decoded(ids), [], 0
    for begin, end in zip([0, *borders], [*borders, len(ids)], strict=True):
        # Sliced from the whole text, since a piece decoded alone may lose its leading space.
        upto = len(text) if end == len(ids) else len(decoded(ids[:end]))
        piece = text[at:upto]
        parts.append(marked(piece) if trained[begin] else piece)
        at = upto
    return "".join(parts)
