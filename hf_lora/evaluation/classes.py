"""Metrics of classes and numbers, and perplexity, with the keys, arguments and results of `evaluate`'s metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def accuracy(predictions: Any, references: Any, normalize: bool = True, sample_weight: Any = None) -> dict[str, float]:
    """The fraction of predictions that equal their references."""
    found, true = _same_length(predictions, references)
    weight = _weights(true, sample_weight)
    right = float(((found == true) * weight).sum())
    return {"accuracy": right / float(weight.sum()) if normalize else right}


def f1(
    predictions: Any,
    references: Any,
    labels: Sequence[int] | None = None,
    pos_label: int = 1,
    average: str | None = "binary",
    sample_weight: Any = None,
) -> dict[str, Any]:
    """F1 = 2 TP / (2 TP + FP + FN), or 0 if the denominator is 0."""
    found, true = _same_length(predictions, references)
    weight = _weights(true, sample_weight)
    present = np.union1d(found, true)
    if average == "binary":
        if len(present) > 2 or (len(present) == 2 and pos_label not in present):
            raise ValueError(
                f"average='binary' needs two classes, one of them pos_label={pos_label}; found {present.tolist()}. "
                "Choose average='macro', 'micro' or 'weighted'."
            )
        labels = [pos_label]
    classes = present if labels is None else np.asarray(labels)
    is_found, is_true = found[:, None] == classes, true[:, None] == classes
    hits, chosen, support = ((weight[:, None] * each).sum(0) for each in (is_found & is_true, is_found, is_true))
    if average == "micro":
        return {"f1": float(_ratio(2 * hits.sum(), chosen.sum() + support.sum()))}
    scores = _ratio(2 * hits, chosen + support)
    if average == "weighted":
        return {"f1": float(_ratio((scores * support).sum(), support.sum()))}
    if average in ("macro", "binary"):
        return {"f1": float(scores.mean())}
    if average is None:
        return {"f1": scores if scores.size > 1 else float(scores[0])}
    raise ValueError(f"average={average!r} must be 'binary', 'micro', 'macro', 'weighted' or None.")


def perplexity(predictions: Any) -> dict[str, float]:
    """Perplexity from the model's losses; the metric on the Hub runs another model over texts instead.

    Args:
        predictions: for each row, the sum of the negative log-likelihoods in nats and the number of tokens, as
            `ComputeMetrics` computes them.

    Returns (keys):
        perplexity: exp of the mean negative log-likelihood over all tokens.
        mean_perplexity: the mean of the perplexities of the rows (the Hub's key).
    """
    rows = np.asarray(predictions, dtype=np.float64).reshape(-1, 2)
    rows = rows[rows[:, 1] > 0]
    if not len(rows):
        return {"perplexity": float("nan"), "mean_perplexity": float("nan")}
    with np.errstate(over="ignore"):
        whole = np.exp(rows[:, 0].sum() / rows[:, 1].sum())
        return {"perplexity": float(whole), "mean_perplexity": float(np.exp(rows[:, 0] / rows[:, 1]).mean())}


def mse(predictions: Any, references: Any, squared: bool = True) -> dict[str, float]:
    """The mean squared error, or its root."""
    found, true = _same_length(predictions, references)
    value = float(np.mean((found.astype(np.float64) - true) ** 2))
    return {"mse": value if squared else value**0.5}


def mae(predictions: Any, references: Any) -> dict[str, float]:
    """The mean absolute error."""
    found, true = _same_length(predictions, references)
    return {"mae": float(np.mean(np.abs(found.astype(np.float64) - true)))}


def _same_length(predictions: Any, references: Any) -> tuple[Any, Any]:
    found, true = np.asarray(predictions), np.asarray(references)
    if found.shape != true.shape:
        raise ValueError(f"Predictions {found.shape} and references {true.shape} must have the same shape.")
    return found, true


def _weights(references: Any, sample_weight: Any) -> Any:
    return np.ones(len(references)) if sample_weight is None else np.asarray(sample_weight, dtype=float)


def _ratio(part: Any, whole: Any) -> Any:
    return np.divide(part, whole, out=np.zeros_like(np.asarray(whole, dtype=float)), where=np.asarray(whole) != 0)


CLASS_METRICS: dict[str, Callable[..., dict[str, Any]]] = {"accuracy": accuracy, "f1": f1}
"""Name -> a function of the class indices `predictions` and `references`."""
NUMBER_METRICS: dict[str, Callable[..., dict[str, Any]]] = {"mse": mse, "mae": mae}
"""Name -> a function of the numbers `predictions` and `references`."""
