"""The metrics by name, and `build_compute_metrics`, which makes a `compute_metrics` for Trainer from their names.

To add a metric, write a function in `classes` or `answers` and add it to the table at the end of that file: Trainer,
`evaluate` and `hf-lora eval` all read the tables. Any other name or path is loaded by the package `evaluate`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from ..data.spans import IGNORED
from ..errors import ConfigError
from ..loss.frozen_head import Scores
from .answers import ANSWER_METRICS
from .classes import CLASS_METRICS, NUMBER_METRICS, perplexity

PERPLEXITY = "perplexity"
METRICS: dict[str, Callable[..., dict[str, Any]]] = {
    **CLASS_METRICS, PERPLEXITY: perplexity, **NUMBER_METRICS, **ANSWER_METRICS,
}  # fmt: skip
"""Name -> a function of `predictions` and `references`; for perplexity, `predictions` are the losses of the rows."""


@dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`, with the interface of an `evaluate` module."""

    name: str
    compute: Callable[..., dict[str, Any]]


def load_metric(name: str | os.PathLike[str]) -> Any:
    """The metric of that name in `METRICS`, else from `evaluate`; its method `compute` returns a dict of values.

    Raises:
        ConfigError: it could not be loaded.
    """
    name = os.fspath(name)
    if name in METRICS:
        return Metric(name, METRICS[name])
    import evaluate

    try:
        return evaluate.load(name)
    except Exception as error:  # the Hub, a proxy or the metric's imports may raise any exception
        raise ConfigError(
            f"The metric {name!r} could not be loaded ({type(error).__name__}: {error}). Without network, use one of "
            f"{', '.join(METRICS)}, the path of a metric's script, or a function of an EvalPrediction."
        ) from error


def build_compute_metrics(
    metric: object,
    *,
    shift_labels: bool | None = None,
    average: str | None = "auto",
    **compute_kwargs: Any,
) -> Any:
    """A `compute_metrics` for Trainer.

    The result has a method `preprocess_logits_for_metrics` that keeps class indices (and for perplexity the loss of
    each row) instead of logits, so the memory of an evaluation does not grow with the vocabulary. `LoraTrainer` uses
    it automatically; pass it to another Trainer as the argument of that name.

    Args:
        metric: a name in `METRICS` such as `"accuracy"`, `"f1"` or `"perplexity"`, another name or path for
            `evaluate.load`, an `evaluate.EvaluationModule`, a list of these, or a function of an `EvalPrediction`,
            which is returned unchanged.
        shift_labels: whether the logits at position t belong to the label at t + 1, as in a causal language model.
            Default: LoraTrainer determines it from its model; elsewhere True for perplexity only.
        average: how F1 is averaged over classes; `"auto"` is `"binary"` for two classes, else `"macro"`.
        compute_kwargs: passed to the `compute` of every metric.

    Raises:
        ConfigError: a metric could not be loaded, or is one of `ANSWER_METRICS`.
    """
    if callable(metric) and not hasattr(metric, "compute"):
        return metric
    metrics = list(metric) if isinstance(metric, (list, tuple)) else [metric]
    texts = [m for m in metrics if isinstance(m, str) and m in ANSWER_METRICS]
    if texts:
        raise ConfigError(
            f"{' and '.join(texts)} compare texts, but Trainer passes token ids. Use hf_lora.evaluate(..., "
            "generate=True) after training, or pass a function of an EvalPrediction that decodes them."
        )
    modules = [load_metric(m) if isinstance(m, (str, os.PathLike)) else m for m in metrics]
    return ComputeMetrics(modules, shift_labels, average, compute_kwargs)


class Kept(NamedTuple):
    """The inputs of the metrics for a batch of a causal language model, when no logits were computed.

    Args:
        predictions: (B, T) the most likely next token at each position with a label.
        losses: (B, 2) the sum of the negative log-likelihoods and the number of tokens of each row.
    """

    predictions: Tensor
    losses: Tensor

    @classmethod
    def of(cls, scores: Scores) -> Kept:
        assert scores.predictions is not None
        return cls(scores.predictions, torch.stack([-scores.log_probs.sum(-1), scores.mask.sum(-1)], dim=-1))


class ComputeMetrics:
    """Turns an `EvalPrediction` into a dict of numbers; made by `build_compute_metrics`.

    Works with `batch_eval_metrics` too: each batch is added, and the last call returns the results.
    """

    def __init__(
        self, metrics: Sequence[Any], shift_labels: bool | None, average: str | None, compute_kwargs: dict[str, Any]
    ) -> None:
        self.metrics = list(metrics)
        self.shift_labels = shift_labels
        self.average = average
        self.compute_kwargs = compute_kwargs
        self._classes = 0
        self._losses = any(_name(m) == PERPLEXITY for m in self.metrics)
        self._has_labels = not all(_name(m) == PERPLEXITY for m in self.metrics)
        self._seen: dict[str, list[Any]] = {}
        """For each batch: `predictions` and `references` without ignored positions, and `losses` (B, 2)."""

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> Any:
        """Reduce logits (B, …, C) to class indices (B, …) and, for perplexity, losses (B, 2).

        Token ids from `generate` and regression outputs are returned unchanged.
        """
        if isinstance(logits, Kept):
            parts = [logits.predictions] * self._has_labels + [logits.losses] * self._losses
            return parts[0] if len(parts) == 1 else tuple(parts)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        if not logits.is_floating_point():
            return logits
        if labels is not None and labels.is_floating_point():
            if self._losses or (logits.shape[-1] != 1 and logits.dim() == labels.dim()):
                raise ConfigError(
                    "These metrics need single-label classification, but this is multi-label. Pass a function of an "
                    "EvalPrediction as compute_metrics."
                )
            return logits.squeeze(-1)
        self._classes = max(self._classes, logits.shape[-1])
        kept = []
        if self._has_labels:
            kept.append(logits.argmax(-1))
        if self._losses:
            shift = self.shift_labels is not False
            rows = zip(logits, labels, strict=True)
            kept.append(torch.stack([_row_loss(row, target, shift) for row, target in rows]))
        return kept[0] if len(kept) == 1 else tuple(kept)

    def __call__(self, prediction: Any, compute_result: bool = True) -> dict[str, float]:
        predictions, labels = prediction.predictions, prediction.label_ids
        if isinstance(labels, list):  # eval_do_concat_batches=False
            for part, targets in zip(predictions, labels, strict=True):
                self(EvalPrediction(part, targets), compute_result=False)
            return self._results() if compute_result else {}
        labels = labels[0] if isinstance(labels, tuple) else labels
        if not self._is_kept(predictions, labels):
            raw = predictions[0] if isinstance(predictions, (tuple, list)) else predictions
            kept = self.preprocess_logits_for_metrics(torch.as_tensor(raw), torch.as_tensor(labels))
            predictions = tuple(_array(k) for k in kept) if isinstance(kept, tuple) else _array(kept)
        parts = list(predictions) if isinstance(predictions, (tuple, list)) else [predictions]
        if self._has_labels:
            chosen, wanted = self._aligned(_array(parts[0]), _array(labels))
            if wanted.size and np.issubdtype(wanted.dtype, np.integer):
                self._classes = max(self._classes, int(wanted.max()) + 1, int(chosen.max()) + 1)
            self._seen.setdefault("predictions", []).append(chosen)
            self._seen.setdefault("references", []).append(wanted)
        if self._losses:
            self._seen.setdefault("losses", []).append(_array(parts[-1]))
        return self._results() if compute_result else {}

    def _results(self) -> dict[str, float]:
        """The values over all batches; resets the state for the next evaluation."""
        seen = {name: np.concatenate(parts) for name, parts in self._seen.items()}
        self._seen = {}
        results: dict[str, Any] = {}
        for metric in self.metrics:
            if _name(metric) == PERPLEXITY:
                data = {"predictions": seen["losses"]}
            else:
                data = {name: seen[name] for name in ("predictions", "references")}
            results |= metric.compute(**data, **self._arguments(metric))
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in results.items()}

    def _is_kept(self, predictions: Any, labels: Any) -> bool:
        """Whether `predictions` went through `preprocess_logits_for_metrics`."""
        if self._has_labels and self._losses:
            return isinstance(predictions, (tuple, list)) and np.ndim(predictions[0]) == np.ndim(labels)
        if isinstance(predictions, (tuple, list)):
            return False
        if self._losses:
            return np.ndim(predictions) == 2 and np.shape(predictions)[-1] == 2
        return np.ndim(predictions) == np.ndim(labels)

    def _aligned(self, predictions: Any, labels: Any) -> tuple[Any, Any]:
        """Predictions and labels without ignored positions, one-dimensional."""
        if labels.ndim < 2:
            return predictions, labels
        if self.shift_labels:
            predictions, labels = predictions[..., :-1], labels[..., 1:]
        if predictions.shape != labels.shape:
            raise ConfigError(
                f"Predictions {predictions.shape} and labels {labels.shape} have different shapes, as with generated "
                "text. Pass a function of an EvalPrediction that decodes and compares texts as compute_metrics."
            )
        keep = labels != IGNORED
        return predictions[keep], labels[keep]

    def _arguments(self, metric: object) -> dict[str, Any]:
        arguments = dict(self.compute_kwargs)
        if _name(metric) == "f1":
            automatic = "binary" if self._classes <= 2 else "macro"
            arguments["average"] = automatic if self.average == "auto" else self.average
        return arguments


def _row_loss(logits: Tensor, labels: Tensor, shift: bool) -> Tensor:
    """(sum of the negative log-likelihoods, number of tokens) of one row: logits (T, V), labels (T,)."""
    if shift:
        logits, labels = logits[:-1], labels[1:]
    loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return torch.stack([loss, (labels != IGNORED).sum().to(loss.dtype)])


def _array(value: object) -> Any:
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _name(metric: object) -> str:
    return str(getattr(metric, "name", ""))
