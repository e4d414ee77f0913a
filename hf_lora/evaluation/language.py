"""Evaluate a causal language model: its loss on the answers, or its generated answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapt.positions import check_positions, learned_positions
from ..data.formats import Format
from ..data.prompts import AnswerFile, read_answered
from ..data.spans import IGNORED
from ..data.tables import Table
from ..errors import DataError, StateError
from ..generate.texts import answering, collect_answers, iterate_texts
from ..loss.frozen_head import find_frozen_head, shifted
from .answers import ANSWER_METRICS, field_table
from .result import Evaluation

Metric = Callable[..., dict[str, float]]
"""A function of texts: `predictions` and `references`."""


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
        DataError: no token has a label, or a row is longer than the model's table of positions.
    """
    head = find_frozen_head(model)
    if head is None:
        raise StateError(
            f"score_rows: {type(model).__name__} is not a causal language model. Evaluate its generated answers "
            "instead (hf-lora eval --generate)."
        )
    total, hits, tokens, positions = 0.0, 0, 0, learned_positions(model)
    with answering(model):
        for batch in _padded(rows, batch_size, model.device):
            check_positions(positions, batch)
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
    return compare(texts, references)


def compare(texts: list[str], references: Sequence[str], more: Sequence[Metric] = ()) -> Evaluation:
    """The metrics of generated texts that suit their references, both stripped of white space.

    Args:
        more: further metrics, beside `ANSWER_METRICS`.
    """
    found, true = [t.strip() for t in texts], [r.strip() for r in references]
    result = Evaluation({}, answers=texts)
    for metric in (*ANSWER_METRICS.values(), *more):
        with suppress(DataError):  # the references do not suit it
            result.metrics |= metric(predictions=found, references=true)
    if "field_f1" in result.metrics:
        result.fields = field_table(found, true)
    return result
