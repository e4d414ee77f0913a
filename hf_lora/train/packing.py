"""Packed rows: whether a model keeps the documents in a row apart, and padding for models that do not.

Most causal language models keep them apart by a mask that transformers derives from `position_ids`, which start at 0
for each document. Others mix them in other ways (recurrent states, convolutions, positions of their own), silently. So
each model is tried: the logits of a document behind another one must be those of the document alone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, PreTrainedModel, Trainer
from transformers.utils import logging

from ..data.spans import IGNORED
from ..layers.distributed import how_sharded
from ..layers.ops import evaluation_mode, kept_random_states

logger = logging.get_logger(__name__)
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]

DOCUMENTS = (6, 6, 9)
"""Tokens of the documents with which a model is tried: the third is packed behind each of the others."""


class Packing:
    """Tries the model of a trainer once, and replaces a collator that packs if the model mixes documents."""

    def __init__(self) -> None:
        self._tried: tuple[weakref.ref[nn.Module], str | None] | None = None

    def collator(self, trainer: Trainer, model: nn.Module) -> Any:
        """The trainer's collator, or `PaddedDocuments` in its place."""
        collator: Any = trainer.data_collator
        packs = isinstance(collator, DataCollatorWithFlattening) or getattr(collator, "padding_free", False) is True
        if not packs or not isinstance(model, PreTrainedModel):
            return collator
        if self._tried is None or self._tried[0]() is not model:
            if next(model.parameters()).device.type != trainer.args.device.type or how_sharded(model.modules()):
                return collator  # not on the device of training yet
            self._tried = weakref.ref(model), mixes_documents(model, collator)
        reason = self._tried[1]
        if reason is None:
            return collator
        logger.warning(
            f"{type(model).__name__} does not keep packed documents apart: {reason}. Batches hold the same documents, "
            "padded instead of packed."
        )
        return PaddedDocuments()


def unpacked(rows: Any) -> Any:
    """A dataset of packed rows as one of documents, so that an evaluation counts them; any other unchanged."""
    if "seq_lengths" not in (getattr(rows, "column_names", None) or ()):
        return rows
    documents: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for row in rows:
        edges = list(itertools.accumulate(row["seq_lengths"], initial=0))
        for name, parts in documents.items():
            tokens = row.get(name, row["input_ids"])
            parts += [tokens[start:end] for start, end in itertools.pairwise(edges)]
    return type(rows).from_dict(documents)


@torch.no_grad()
def mixes_documents(model: PreTrainedModel, collator: Collator) -> str | None:
    """Why the model mixes documents in one row; None if it does not, or its logits are not those of tokens.

    Args:
        collator: packs documents.
    """
    with evaluation_mode(model), kept_random_states():
        return _difference(model, collator)


def _difference(model: PreTrainedModel, collator: Collator) -> str | None:
    vocabulary = min(getattr(model.config.get_text_config(), "vocab_size", 0), 32_000)
    if vocabulary < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    first, other, last = (
        torch.randint(vocabulary // 2, vocabulary, (length,), generator=generator) for length in DOCUMENTS
    )
    alone = _logits(model, {"input_ids": last[None], "attention_mask": torch.ones_like(last[None])})
    if alone is None:
        return None
    found = []
    for before in (first, other):
        rows = [{"input_ids": document.tolist(), "labels": document.tolist()} for document in (before, last)]
        try:
            packed = _logits(model, collator(rows))
        except Exception as error:  # of any kind: some have no kernel for packed rows on this device
            return f"its forward on them fails ({type(error).__name__})"
        if packed is None:
            return None
        found.append(packed[-len(last) :])
    size, eps = alone.norm(), torch.finfo(model.dtype).eps
    # The same shapes and kernels, but for rounding where tokens are grouped by their content (routed experts).
    if (found[0] - found[1]).norm() > 8 * max(eps, 2**-20) * size:
        return "the logits of a document depend on the one before it"
    if (found[0] - alone).norm() > max(1e-3, 16 * eps) * size:
        return "the logits of a document are not those of the document alone"
    return None


def _logits(model: PreTrainedModel, batch: Mapping[str, Any]) -> Tensor | None:
    """Logits (T, V) of one row, or None if the model returns others."""
    inputs = {
        name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in batch.items() if name != "labels"
    }
    logits = model(**inputs, use_cache=False).logits
    right = logits.dim() == 3 and logits.shape[:2] == inputs["input_ids"].shape
    return logits[0].double() if right else None


class PaddedDocuments:
    """Collates the rows of a collator that packs, padded: each document is a row.

    In: rows with `input_ids`, optionally `labels`, and `seq_lengths` if a row holds several documents.
    Out: `input_ids`, `attention_mask` and `labels` (documents, T).
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]], return_tensors: str | None = None) -> dict[str, Tensor]:
        ids, labels = [], []
        for row in rows:
            lengths = list(row.get("seq_lengths") or [len(row["input_ids"])])
            own = torch.as_tensor(row["input_ids"])
            ids += own.split(lengths)
            labels += torch.as_tensor(row.get("labels", own)).split(lengths)
        return {
            "input_ids": pad_sequence(ids, True, 0),
            "attention_mask": pad_sequence([torch.ones_like(part) for part in ids], True, 0),
            "labels": pad_sequence(labels, True, IGNORED),
        }
