"""Metrics of answers that are spans of a text, as the evaluation of SQuAD defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

CANDIDATES, LONGEST = 20, 30
"""How many likely first and last tokens are combined, and the maximum tokens of an answer."""


def score_spans(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of answers, ignoring case, punctuation, articles and white space.

    Args:
        references: the right answers of each question, of which the best counts; none: the right answer is empty.

    Returns (keys):
        exact_match: the fraction of answers that equal a right one.
        f1: the mean F1 of the words that an answer and a right one share.
    """
    exact, shared = [], []
    for text, right in zip(predictions, references, strict=True):
        known = [answer for answer in right if words_of(answer)] or [""]
        exact.append(max(float(words_of(text) == words_of(answer)) for answer in known))
        shared.append(max(word_f1(text, answer) for answer in known))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(shared))}


def word_f1(prediction: str, reference: str) -> float:
    """F1 of the words of two texts; 1 if both have none."""
    found, true = words_of(prediction), words_of(reference)
    if not found or not true:
        return float(found == true)
    common = sum((Counter(found) & Counter(true)).values())
    return 2 * common / (len(found) + len(true))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation and the English articles."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def best_span(
    starts: Any, ends: Any, offsets: Sequence[tuple[int, int] | None]
) -> tuple[float, tuple[int, int] | None]:
    """The score, and the first and last character, of the best span in a window; None if there is none.

    Args:
        starts, ends: the logits of each token to be the first, and the last, of the answer.
        offsets: the characters of each token, None for those outside the text.
    """
    best: tuple[float, tuple[int, int] | None] = (float("-inf"), None)
    likely = [np.argsort(np.asarray(part))[-1 : -CANDIDATES - 1 : -1].tolist() for part in (starts, ends)]
    for start in likely[0]:
        for end in likely[1]:
            first, last = offsets[start], offsets[end]
            if first is None or last is None or end < start or end - start + 1 > LONGEST:
                continue
            score = float(starts[start] + ends[end])
            if score > best[0]:
                best = (score, (first[0], last[1]))
    return best
