"""How good a trained model is on a table: its loss over the answers, what it answers, or the classes it picks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapt.labels import task_type_of
from ..data.chat import is_templated
from ..data.encode import Prompt
from ..data.formats import RAW, Form, read_examples
from ..data.spans import IGNORED
from ..data.tables import Table
from ..data.tasks import choose_columns, classification_rows
from ..errors import ConfigError, DataError, Faults, StateError
from ..generate.texts import answering, generate_texts
from ..loss.frozen_head import find_frozen_head, shifted
from .metrics import build_compute_metrics, load_metric


@dataclass
class Answers:
    """What a model wrote, and how good it is.

    Args:
        texts: the answers, one a row.
        metrics: `exact_match`; where all references are JSON objects, those of `field_f1` too.
        fields: field -> its scores, see `field_table`; empty where the references are no JSON objects.
    """

    texts: list[str]
    metrics: dict[str, float]
    fields: dict[str, dict[str, float]]


def first_rows(table: Table, limit: int | None) -> Table:
    """The table's first rows; all of them where `limit` is None."""
    if limit is None or limit >= len(table):
        return table
    if limit < 1:
        raise ConfigError(f"limit={limit} must be at least 1.")
    columns = {name: values[:limit] for name, values in table.columns.items()}
    return Table(table.source, columns, table.positions[:limit], table.unit, table.names)


# The loss over the answers -------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rows(model: Any, rows: Sequence[dict[str, list[int]]], batch_size: int = 8) -> dict[str, float]:
    """The loss of a causal language model over labelled tokens, without holding the logits of a batch.

    Args:
        rows: `input_ids` and `labels` (-100 where there is none), as `chat_rows` makes them.

    Returns:
        `loss`: nats a token; `perplexity`: its exponential; `token_accuracy`: how often the label is the likeliest
        token, given those before it; `tokens`: how many have a label.

    Raises:
        StateError: the model is no causal language model.
    """
    head = find_frozen_head(model)
    if head is None:
        raise StateError(
            f"score_rows: {type(model).__name__} is no causal language model, whose loss over an answer this is. "
            "Compare what it writes instead (hf-lora eval --generate)."
        )
    total, hits, tokens = 0.0, 0, 0
    with answering(model):
        for batch in _padded(rows, batch_size, model.device):
            head.prove(model, batch)
            if head.off is None:
                with head.catch(model, shifted(batch["labels"])) as caught:
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
        raise DataError("score_rows: no token has a label. Give it rows with answers.")
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": hits / tokens, "tokens": tokens}


def _padded(rows: Sequence[dict[str, list[int]]], size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """Batches of rows that are alike in length, the longest first."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    for start in range(0, len(ordered), size):
        part = ordered[start : start + size]
        shape = (len(part), len(part[0]["input_ids"]))
        batch = {"input_ids": torch.zeros(shape, dtype=torch.long), "labels": torch.full(shape, IGNORED)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        for i, row in enumerate(part):
            length = len(row["input_ids"])
            batch["input_ids"][i, :length] = torch.tensor(row["input_ids"])
            batch["labels"][i, :length] = torch.tensor(row["labels"])
            batch["attention_mask"][i, :length] = 1
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _from_logits(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """As the first three of `Scores`, of a head that cannot be caught: one row's logits at a time."""
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


def questions_of(table: Table, form: Form, tokenizer: Any) -> tuple[list[Prompt], list[str], bool]:
    """(prompts, right answers, whether prompts go through the chat template), as the training has them.

    Of a chat, the assistant's last turn is the answer, and what stands before it the prompt.

    Raises:
        DataError: the form has no answers, or a row has no prompt; lists every such row.
    """
    if form.kind == "text":
        raise DataError(
            f"{table.source}: {form.columns[0]!r} holds whole texts, in which no answer can be told from its prompt. "
            "Give columns such as 'prompt' and 'completion', or leave --generate out."
        )
    templated = is_templated(form, tokenizer)
    faults = Faults(f"reading {table.source}")
    prompts: list[Prompt] = []
    answers: list[str] = []
    for row, example in enumerate(read_examples(table, form)):
        if example.messages is None:
            between = "" if templated or form.kind == RAW else "\n"  # as in training
            prompts.append(f"{example.prompt}{between}")
            answers.append(str(example.completion))
            continue
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        if last == 0:
            faults.add(f"{table.at(row)}: the assistant speaks first, so there is nothing to answer")
        if example.tools:
            faults.add(f"{table.at(row)}: it has tools, which are not handed on to the template here")
        prompts.append(example.messages[:last])
        answers.append(example.messages[last]["content"])
    faults.check(DataError, "Correct or remove these rows.")
    return prompts, answers, templated


def score_answers(
    model: Any,
    tokenizer: Any,
    table: Table,
    form: Form,
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
    system: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Let a model answer each row of a table, greedily, and compare with the answers there, without outer spaces.

    Raises:
        DataError: see `questions_of`, and `generate_texts` for prompts that are too long.
    """
    from .answers import field_table, whole_object

    prompts, references, templated = questions_of(table, form, tokenizer)
    texts = generate_texts(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, system=system,
        use_chat_template=templated, progress=progress,
    )  # fmt: skip
    found, true = [t.strip() for t in texts], [r.strip() for r in references]
    metrics = dict(load_metric("exact_match").compute(predictions=found, references=true))
    fields: dict[str, dict[str, float]] = {}
    if all(whole_object(text) is not None for text in true):
        metrics |= load_metric("field_f1").compute(predictions=found, references=true)
        fields = field_table(found, true)
    return Answers(texts, {name: float(value) for name, value in metrics.items()}, fields)


# Classes -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_classes(model: Any, tokenizer: Any, table: Table, batch_size: int = 8) -> dict[str, float]:
    """Accuracy and F1 of a text classifier on a table of texts with labels.

    Raises:
        StateError: the model is no text classifier.
        DataError: the columns cannot be told, or a label is none of the model's.
    """
    from transformers import DataCollatorWithPadding, EvalPrediction

    if task_type_of(model) != "SEQ_CLS":
        raise StateError(
            f"hf-lora eval: this is an adapter of a {type(model).__name__}; language models and text classifiers can "
            "be evaluated here. Evaluate it with LoraTrainer.evaluate."
        )
    labels = [str(model.config.id2label[i]) for i in range(model.config.num_labels)]
    rows = classification_rows(table, choose_columns(table), labels, tokenizer)
    if tokenizer.pad_token is None:
        batch_size = 1
    collate = DataCollatorWithPadding(tokenizer, padding=batch_size > 1)
    metric = build_compute_metrics(["accuracy", "f1"])
    results: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        end = min(start + batch_size, len(rows))
        batch = {name: t.to(model.device) for name, t in collate([rows[i] for i in range(start, end)]).items()}
        wanted = batch.pop("labels")
        kept = metric.preprocess_logits_for_metrics(model(**batch).logits, wanted)
        results = metric(EvalPrediction(kept.cpu().numpy(), wanted.cpu().numpy()), compute_result=end == len(rows))
    return results
