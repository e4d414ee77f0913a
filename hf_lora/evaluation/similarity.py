"""Metrics of generated texts that need not equal their references: ROUGE-L and chrF."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

ORDER, BETA = 6, 2.0
"""chrF: the longest n-grams of characters, and the weight of recall."""


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F1 of the longest common subsequence of words (Lin 2004): words of letters and digits in lower case."""
    scores = [_rouge_l(_words(a), _words(b)) for a, b in zip(predictions, references, strict=True)]
    return {"rouge_l": sum(scores) / len(scores) if scores else float("nan")}


def chrf(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """chrF2 of a corpus from 0 to 1 (Popović 2015): F2 of n-grams of 1 to 6 characters without white space.

    As in sacreBLEU, precision and recall of each order are over all texts, and orders without n-grams are left out.
    """
    scores = []
    for n in range(1, ORDER + 1):
        right = found = wanted = 0
        for prediction, reference in zip(predictions, references, strict=True):
            a, b = _ngrams(prediction, n), _ngrams(reference, n)
            right, found, wanted = right + (a & b).total(), found + a.total(), wanted + b.total()
        if found and wanted:
            scores.append((right / found, right / wanted))
    if not scores:
        return {"chrf": 0.0}
    precision, recall = (sum(part) / len(scores) for part in zip(*scores, strict=True))
    weighted = BETA**2 * precision + recall
    return {"chrf": (1 + BETA**2) * precision * recall / weighted if weighted else 0.0}


def _rouge_l(found: Sequence[str], true: Sequence[str]) -> float:
    common = _common_subsequence(found, true)
    return 2 * common / (len(found) + len(true)) if common else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        above = row
        row = [0]
        for i, b in enumerate(second):
            row.append(above[i] + 1 if a == b else max(row[i], above[i + 1]))
    return row[-1]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _ngrams(text: str, n: int) -> Counter[str]:
    plain = "".join(text.split())
    return Counter(plain[i : i + n] for i in range(len(plain) - n + 1))
