"""The result of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field


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
