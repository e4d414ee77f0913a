"""Evaluate a model on a table, by the metrics of its task."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Unpack

from ..data.prompts import AnswerFile
from ..data.tables import read_table
from ..errors import ConfigError, Faults, StateError
from ..evaluation.result import Evaluation
from ..generate.loading import Loading, loaded, recorded_format
from .base import Asked, Given, Options
from .registry import task_of_model


def evaluate(
    source: Any,
    file: str | os.PathLike[str],
    *,
    generate: bool = False,
    predictions: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    text_column: str | None = None,
    completion_column: str | None = None,
    pair_column: str | None = None,
    use_chat_template: bool | None = None,
    last_turn_only: bool | None = None,
    max_length: int | None = None,
    tokenizer: Any = None,
    system: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **loading: Unpack[Loading],
) -> Evaluation:
    """Evaluate a model on a file, as `hf-lora eval` does.

    For a language model: perplexity and token accuracy on the answers; with `generate`, the fraction of generated
    answers that are right and, if they are JSON, the F1 of their fields. For an encoder-decoder: its generated texts
    are compared with those of the file, also by ROUGE-L and chrF. For other models: the metrics of their task, such as
    accuracy and F1 of a classifier.

    Rows become tokens as in the training of the adapter, which `hf-lora train` records with it. The options of the
    format override that; without a record their defaults are those of `hf-lora train`.

    Args:
        source: an adapter or a full model, its folder or its name on the Hub; or a model in memory with `tokenizer`.
        file: CSV, TSV, JSON, JSONL or Parquet, with the columns of a training file.
        generate: generate answers and compare them with those of the file, ignoring surrounding white space.
        predictions: JSONL file to write the rows with the generated answers to.
        limit: use only the first rows of the file; default: all.
        text_column: the column of texts or prompts; default: that of the training if the file has it, else found by
            its usual names.
        completion_column: the same for answers or labels.
        pair_column: the second text of a classification, or the context of a question.
        use_chat_template: whether pairs of texts are turns of a chat, see `is_templated`.
        last_turn_only: evaluate only the assistant's last turn of each chat.
        max_length: truncate rows to this many tokens; default: as in training, else the model's context window, for a
            classifier at most 512.
        system: a system message for chats that have none.
        max_new_tokens: maximum length of a generated answer; default: 256.
        progress: called with the number of generated answers and the total.
        loading: see `load_for_generation`.

    Raises:
        ConfigError: arguments contradict each other.
        DataError: the file is missing or malformed, or does not fit the model; lists every such row.
        AdapterFileError, StateError: the model could not be loaded, or models of its type cannot be evaluated here.
    """
    if not generate and predictions is not None:
        raise ConfigError("evaluate: predictions need generate=True (--generate). Add it, or omit them.")
    numbers = {"batch_size": batch_size, "max_length": max_length, "max_new_tokens": max_new_tokens}
    low = [f"{name}={value}" for name, value in numbers.items() if value is not None and value < 1]
    if low:
        raise ConfigError(f"evaluate: {', '.join(low)} must be at least 1.")
    table = read_table(file).first(limit)
    count = len(table)
    with nullcontext() if predictions is None else AnswerFile(table, predictions) as answers:
        trained = recorded_format(source, **loading)
        model, tokenizer = loaded("evaluate", source, tokenizer, any_task=not generate, **loading)
        task = task_of_model(model, trained)
        if task is None:
            raise StateError(
                f"evaluate: this is a {type(model).__name__}, and no task of hf_lora is its. Use LoraTrainer.evaluate."
            )
        generates = model.can_generate()
        options = Options(
            text_column=text_column, pair_column=pair_column, use_chat_template=use_chat_template,
            last_turn_only=last_turn_only, max_length=max_length or (trained.max_length if trained else None),
            completion_column=completion_column if generates else None,
            label_column=None if generates else completion_column,
        )  # fmt: skip
        asked = Asked(
            batch_size, generate, system, max_new_tokens, answers,
            None if progress is None else lambda done: progress(done, count),
        )  # fmt: skip
        faults = Faults("evaluate")
        options.check(faults)
        faults.check(ConfigError, "Name another column, or omit one.")
        task.refuse(options, asked)
        result = task.evaluate(model, table, Given(model.config, tokenizer, options, trained, known=True), asked)
    result.rows = count
    return result
