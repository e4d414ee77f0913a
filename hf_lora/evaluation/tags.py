"""Metrics of tagged words: of entities where the tags have a scheme such as BIO, else of single words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from .classes import f1

_FIRST, _LAST = "BSU", "ESLU"
"""The prefixes of words that begin an entity, and of those that end one."""


def score_tags(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores of tags, one list for each text.

    Returns (keys):
        f1, precision, recall: of entities, micro-averaged, if each tag is `O` or has a prefix as in `B-PER`: an entity
            is right if its first word, its last word and its type are. For other tags: of single words, the mean over
            tags.
        accuracy: the fraction of words with the right tag.
    """
    found, true = list(chain.from_iterable(predictions)), list(chain.from_iterable(references))
    accuracy = float(np.mean([a == b for a, b in zip(found, true, strict=True)])) if true else float("nan")
    if not all(_is_of_scheme(tag) for tag in {*true, *found}):
        return {**_of_words(np.array(found), np.array(true)), "accuracy": accuracy}
    chosen, wanted = _all_entities(predictions), _all_entities(references)
    right = len(chosen & wanted)
    return {
        "f1": 2 * right / (len(chosen) + len(wanted)) if chosen or wanted else 0.0,
        "precision": right / len(chosen) if chosen else 0.0,
        "recall": right / len(wanted) if wanted else 0.0,
        "accuracy": accuracy,
    }


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(type, first word, last word) of each entity, by the rules of CoNLL's evaluation: an entity begins at `B-`, and
    at `I-` after `O` or another type."""
    found: list[tuple[str, int, int]] = []
    is_open = False
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if tag == "O":
            is_open = False
            continue
        if is_open and prefix not in _FIRST and found[-1][0] == kind:
            found[-1] = (kind, found[-1][1], i)
        else:
            found.append((kind, i, i))
        is_open = prefix not in _LAST
    return found


def _all_entities(rows: Sequence[Sequence[str]]) -> set[tuple[int, str, int, int]]:
    return {(row, *entity) for row, tags in enumerate(rows) for entity in entities(tags)}


def _is_of_scheme(tag: str) -> bool:
    return tag == "O" or (tag[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") and len(tag) > 2)


def _of_words(found: np.ndarray, true: np.ndarray) -> dict[str, float]:
    tags = np.union1d(found, true)
    hits = np.array([((found == tag) & (true == tag)).sum() for tag in tags])
    chosen, wanted = (np.array([(each == tag).sum() for tag in tags]) for each in (found, true))
    return {
        "f1": float(f1(found, true, average="macro")["f1"]),
        "precision": float(np.divide(hits, chosen, out=np.zeros(len(tags)), where=chosen > 0).mean()),
        "recall": float(np.divide(hits, wanted, out=np.zeros(len(tags)), where=wanted > 0).mean()),
    }
