"""Metrics that need no network: `evaluate.Metric`s made in this process, with the keys of those on the Hub.

Imported only where a metric is asked for, since `evaluate` takes a while to import.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .answers import ExactMatch, FieldF1


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their references. Keys, arguments and values are those of `accuracy`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of equal labels.", predictions="int64", references="int64")

    def _compute(
        self, predictions: Any, references: Any, normalize: bool = True, sample_weight: Any = None
    ) -> dict[str, float]:
        right = np.asarray(predictions) == np.asarray(references)
        if normalize:
            return {"accuracy": float(np.average(right, weights=sample_weight))}
        return {"accuracy": float(right.sum() if sample_weight is None else np.dot(right, sample_weight))}


class F1(evaluate.Metric):
    """F1 = 2 TP / (2 TP + FP + FN), zero where nothing is counted. Keys, arguments and values are those of `f1`."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("Harmonic mean of precision and recall.", predictions="int64", references="int64")

    def _compute(
        self,
        predictions: Any,
        references: Any,
        labels: Sequence[int] | None = None,
        pos_label: int = 1,
        average: str | None = "binary",
        sample_weight: Any = None,
    ) -> dict[str, Any]:
        found, true = np.asarray(predictions), np.asarray(references)
        weight = np.ones(len(true)) if sample_weight is None else np.asarray(sample_weight, dtype=float)
        present = np.union1d(found, true)
        if average == "binary":
            if len(present) > 2 or (len(present) == 2 and pos_label not in present):
                raise ValueError(
                    f"average='binary' needs two classes, one of them pos_label={pos_label}; found "
                    f"{present.tolist()}. Choose average='macro', 'micro' or 'weighted'."
                )
            labels = [pos_label]
        classes = present if labels is None else np.asarray(labels)
        chosen, actual = found[:, None] == classes, true[:, None] == classes
        hits = (weight[:, None] * (chosen & actual)).sum(0)
        counted = (weight[:, None] * chosen).sum(0) + (weight[:, None] * actual).sum(0)
        support = (weight[:, None] * actual).sum(0)
        if average == "micro":
            return {"f1": float(_ratio(2 * hits.sum(), counted.sum()))}
        scores = _ratio(2 * hits, counted)
        if average == "weighted":
            return {"f1": float(np.average(scores, weights=support)) if support.sum() else 0.0}
        if average in ("macro", "binary"):
            return {"f1": float(scores.mean())}
        if average is None:
            return {"f1": scores if scores.size > 1 else float(scores[0])}
        raise ValueError(f"average={average!r} must be 'binary', 'micro', 'macro', 'weighted' or None.")


class Perplexity(evaluate.Metric):
    """Perplexity from the model's own losses.

    The one on the Hub runs another model over texts; this one takes, for each row, the sum of the negative
    log-likelihoods in nats and the number of tokens that they belong to, as `ComputeMetrics` makes them.

    Returns (keys):
        perplexity: exp of the mean over all tokens.
        mean_perplexity: the mean over rows of each row's perplexity (the Hub's key).
    """

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Sequence(datasets.Value("float64"))})
        return evaluate.MetricInfo(description="exp of the mean loss a token.", citation="", features=features)

    def _compute(self, predictions: Any) -> dict[str, float]:
        rows = np.asarray(predictions, dtype=np.float64).reshape(-1, 2)
        rows = rows[rows[:, 1] > 0]
        if not len(rows):
            return {"perplexity": float("nan"), "mean_perplexity": float("nan")}
        with np.errstate(over="ignore"):
            whole = np.exp(rows[:, 0].sum() / rows[:, 1].sum())
            return {"perplexity": float(whole), "mean_perplexity": float(np.exp(rows[:, 0] / rows[:, 1]).mean())}


FALLBACKS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "perplexity": Perplexity,
    "exact_match": ExactMatch,
    "field_f1": FieldF1,
}


def fallback(name: str) -> evaluate.Metric:
    """The metric `name`, in this process and in memory."""
    return FALLBACKS[name](keep_in_memory=True)


def _info(description: str, **features: str) -> evaluate.MetricInfo:
    columns = datasets.Features({name: datasets.Value(kind) for name, kind in features.items()})
    return evaluate.MetricInfo(description=description, citation="", features=columns, format="numpy")


def _ratio(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.zeros_like(np.asarray(whole, dtype=float)), where=np.asarray(whole) != 0)
