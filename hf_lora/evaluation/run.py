"""Evaluate a model on a table: its loss on the answers, its generated answers, or its predicted classes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from ..adapt.labels import task_type_of
from ..data.chat import chat_rows, is_templated
from ..data.formats import Format, recognize_format
from ..data.prompts import AnswerFile, read_answered
from ..data.spans import IGNORED
from ..data.tables import Table, read_table
from ..data.tasks import REGRESSION, Columns, choose_columns, classification_rows
from ..data.trained import TrainedFormat
from ..errors import ConfigError, DataError, StateError
from ..generate.loading import Loading, loaded, recorded_format
from ..generate.texts import answering, collect_answers, evaluating, iterate_texts, window_of
from ..loss.frozen_head import find_frozen_head, shifted
from .answers import ANSWER_METRICS, field_table
from .classes import CLASS_METRICS, NUMBER_METRICS
from .metrics import build_compute_metrics


@dataclass
class Evaluation:
    """The results of a model on a file.

    Args:
        metrics: for a language model `loss`, `perplexity`, `token_accuracy` and `tokens`; for generated answers those
            of `ANSWER_METRICS` that suit the references (`field_f1`: if all are JSON objects); for a classifier those
            of `CLASS_METRICS`.
        rows: number of rows evaluated.
        cut: number of rows that were truncated to the length limit.
        answers: the generated answers, one per row; empty without `generate`.
        fields: field -> its scores, see `field_table`; empty if the references are not JSON objects.
    """

    metrics: dict[str, float]
    rows: int = 0
    cut: int = 0
    answers: list[str] = field(default_factory=list)
    fields: dict[str, dict[str, float]] = field(default_factory=dict)


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
    max_new_tokens: int = 256,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    **loading: Unpack[Loading],
) -> Evaluation:
    """Evaluate a model on a file, as `hf-lora eval` does.

    For a language model: perplexity and token accuracy on the answers; with `generate`, the fraction of generated
    answers that are right and, if they are JSON, the F1 of their fields. For a classifier: accuracy and F1.

    Rows become tokens as in the training of the adapter, which `hf-lora train` records with it. The options of the
    format override that; without a record their defaults are those of `hf-lora train`.

    Args:
        source: an adapter or a full model, its folder or its name on the Hub; or a model in memory with `tokenizer`.
        file: CSV, TSV, JSON, JSONL or Parquet, with the columns of a training file.
        generate: generate answers and compare them with those of the file, ignoring surrounding white space.
        predictions: JSONL file to write the rows with the generated answers to.
        limit: use only the first rows of the file; default: all.
        text_column, completion_column: the column of texts or prompts, and of answers or labels; default: those of the
            training if the file has them, else found by their usual names.
        pair_column: the second text of a classification.
        use_chat_template: whether pairs of texts are turns of a chat, see `is_templated`.
        last_turn_only: evaluate only the assistant's last turn of each chat.
        max_length: truncate rows to this many tokens; default: as in training, else the model's context window, for a
            classifier at most 512.
        system: a system message for chats that have none.
        max_new_tokens: for generated answers, see `generate_texts`.
        progress: called with the number of generated answers and the total.
        loading: see `load_for_generation`.

    Raises:
        ConfigError: arguments contradict each other.
        DataError: the file is missing or malformed, or does not fit the model; lists every such row.
        AdapterFileError, StateError: the model could not be loaded, or models of its type cannot be evaluated here.
    """
    if not generate and predictions is not None:
        raise ConfigError("evaluate: predictions need generate=True (--generate). Add it, or omit them.")
    numbers = {"batch_size": batch_size, "max_length": max_length}
    low = [f"{name}={value}" for name, value in numbers.items() if value is not None and value < 1]
    if low:
        raise ConfigError(f"evaluate: {', '.join(low)} must be at least 1.")
    table = read_table(file).first(limit)
    cut = 0
    with nullcontext() if predictions is None else AnswerFile(table, predictions) as answers:
        trained = recorded_format(source, **loading)
        model, tokenizer = loaded("evaluate", source, tokenizer, any_task=not generate, **loading)
        max_length = max_length or (trained.max_length if trained is not None else None)
        chats = {"system": system, "use_chat_template": use_chat_template, "last_turn_only": last_turn_only}
        if not model.can_generate():
            _refuse("a classifier", chats)
            columns = choose_columns(
                table, text=text_column, pair=pair_column, label=completion_column, trained=trained
            )
            result = Evaluation(score_classes(model, tokenizer, table, columns, batch_size, max_length))
        else:
            _refuse("a language model", {"pair_column": pair_column})
            if system is not None:
                trained = replace(trained or TrainedFormat(), system=system)
            data_format = recognize_format(table, text_column, completion_column, trained)
            if not is_templated(data_format, tokenizer, use_chat_template):
                _refuse(f"{data_format.name} without a chat template", {"system": system})
            if generate:
                result = score_answers(
                    model, tokenizer, table, data_format, max_new_tokens=max_new_tokens, batch_size=batch_size,
                    use_chat_template=use_chat_template, file=answers,
                    progress=None if progress is None else lambda done: progress(done, len(table)),
                )  # fmt: skip
            else:
                rows, cut = chat_rows(
                    table, data_format, tokenizer, max_length or window_of(model) or 2**31,
                    use_chat_template=use_chat_template, last_turn_only=last_turn_only,
                )  # fmt: skip
                result = Evaluation(score_rows(model, rows, batch_size))
    result.rows, result.cut = len(table), cut
    return result


def _refuse(what: str, options: Mapping[str, object]) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(f"evaluate: {', '.join(given)} has no effect on {what}. Omit it.")


# The loss on the answers ---------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rows(model: PreTrainedModel, rows: Sequence[dict[str, list[int]]], batch_size: int = 8) -> dict[str, float]:
    """The loss of a causal language model on labeled tokens, without the logits of a whole batch in memory.

    Args:
        rows: `input_ids` and `labels` (-100 to ignore a token), from `chat_rows`.

    Returns:
        `loss`: in nats per token; `perplexity`: exp of the loss; `token_accuracy`: fraction of labels that are the
        most likely next token; `tokens`: number of labeled tokens.

    Raises:
        StateError: the model is not a causal language model.
    """
    head = find_frozen_head(model)
    if head is None:
        raise StateError(
            f"score_rows: {type(model).__name__} is not a causal language model. Evaluate its generated answers "
            "instead (hf-lora eval --generate)."
        )
    total, hits, tokens = 0.0, 0, 0
    with answering(model):
        for batch in _padded(rows, batch_size, model.device):
            head.prove(model, batch)
            if head.off is None:
                with head.catch(model, batch["labels"]) as caught:
                    model(**batch, use_cache=False)
                if caught.scores is None or caught.fault is not None:
                    raise StateError(f"score_rows: {caught.fault}.")
                log_probs, right, mask = caught.scores[:3]
            else:
                log_probs, right, mask = _from_logits(model, batch)
            total -= float(log_probs.double().sum())
            hits += int(right[mask].sum())
            tokens += int(mask.sum())
    if not tokens:
        raise DataError("score_rows: no token has a label. Pass rows with answers.")
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": hits / tokens, "tokens": tokens}


def _padded(rows: Sequence[dict[str, list[int]]], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Batches of rows of similar length, the longest first."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        ids, labels = ([torch.tensor(row[name]) for row in part] for name in ("input_ids", "labels"))
        batch = {
            "input_ids": pad_sequence(ids, True),
            "labels": pad_sequence(labels, True, IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
        }
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _from_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The first three fields of `Scores`, from the logits of one row at a time, if the head cannot be intercepted."""
    targets = shifted(batch["labels"])
    log_probs = torch.zeros(targets.shape, dtype=torch.float64, device=targets.device)
    right = torch.zeros_like(targets, dtype=torch.bool)
    for i, target in enumerate(targets):
        inputs = {name: tensor[i : i + 1] for name, tensor in batch.items() if name != "labels"}
        where = (target != IGNORED).nonzero().squeeze(-1)
        logits = model(**inputs, use_cache=False).logits[0, where]
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs[i, where] = -F.cross_entropy(exact, target[where], reduction="none").double()
        right[i, where] = logits.argmax(-1) == target[where]
    return log_probs, right, targets != IGNORED


# Answers -------------------------------------------------------------------------------------------------------------


def score_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    data_format: Format,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    use_chat_template: bool | None = None,
    file: AnswerFile | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Generate an answer for each row of a table greedily, and compare it with the reference, stripped of white space.

    Args:
        file: the rows with their answers are written to it.

    Raises:
        DataError: see `read_answered`, and `generate_texts` for prompts that are too long.
    """
    prompts, references, templated = read_answered(table, data_format, tokenizer, use_chat_template)
    each = iterate_texts(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
        use_chat_template=templated, progress=progress, trained=data_format.trained,
    )  # fmt: skip
    texts = collect_answers(each, len(prompts), file)
    found, true = [t.strip() for t in texts], [r.strip() for r in references]
    result = Evaluation({}, answers=texts)
    for metric in ANSWER_METRICS.values():
        with suppress(DataError):  # the references do not suit it
            result.metrics |= metric(predictions=found, references=true)
    if "field_f1" in result.metrics:
        result.fields = field_table(found, true)
    return result


# Classes -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_classes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: Table,
    columns: Columns,
    batch_size: int = 8,
    max_length: int | None = None,
) -> dict[str, float]:
    """The `CLASS_METRICS` of a text classifier, or `NUMBER_METRICS` of a regression, on a table of texts with labels.

    Raises:
        StateError: the model is not a text classifier.
        DataError: a text is empty, or a label is unknown to the model; lists every such row.
    """
    from transformers import DataCollatorWithPadding

    if task_type_of(model) != "SEQ_CLS":
        raise StateError(
            f"evaluate: this is a {type(model).__name__}; only language models and text classifiers are supported. "
            "Use LoraTrainer.evaluate."
        )
    config: Any = model.config
    number = config.problem_type == REGRESSION
    labels = None if number else [str(config.id2label[i]) for i in range(config.num_labels)]
    rows = classification_rows(table, columns, labels, tokenizer, max_length, window_of(model))
    if tokenizer.pad_token is None:
        batch_size = 1
    collate = DataCollatorWithPadding(tokenizer, padding=batch_size > 1)
    compute_metrics = build_compute_metrics(list(NUMBER_METRICS if number else CLASS_METRICS))
    scores: dict[str, float] = {}
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            batch = {name: t.to(model.device) for name, t in collate(rows[start : start + batch_size]).items()}
            true, last = batch.pop("labels"), start + batch_size >= len(rows)
            scores = compute_metrics(EvalPrediction(model(**batch).logits, true.numpy()), compute_result=last)
    return scores
