"""PEFT's rules for matching names: a list matches exactly or by suffix, a string is a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable, Iterator
from typing import Any

from .patterns import Expressions, as_text, is_name, table_pattern

TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Task type -> the names that PEFT adds to `modules_to_save`."""


def matcher(patterns: str | Collection[str]) -> Callable[[str], list[str]]:
    """A function from a name to the patterns that match it.

    Args:
        patterns: a list, whose entries match a name or a suffix of whole components of it; or one regular expression,
            which must match the whole name.
    """
    if isinstance(patterns, str):
        pattern = patterns
        if is_name(pattern) and "." not in pattern:
            return lambda name: [pattern] if name == pattern else []
        expressions = Expressions([pattern])
        return lambda name: [pattern] if expressions.match(pattern, name) else []
    wanted = frozenset(patterns)

    def ends(name: str) -> list[str]:
        found, start = [], 0
        while True:
            if name[start:] in wanted:
                found.append(name[start:])
            dot = name.find(".", start)
            if dot < 0:
                return found
            start = dot + 1

    return ends


def ancestors(name: str) -> Iterator[str]:
    """The names of the modules that contain a module, outermost first, and its own name last."""
    for end, letter in enumerate(name):
        if letter == ".":
            yield name[:end]
    yield name


def holder(name: str, modules: Container[str]) -> str | None:
    """The outermost of `modules` that is the module `name` or contains it."""
    return next((path for path in ancestors(name) if path in modules), None)


def ending_with(names: Iterable[str], suffixes: Iterable[str]) -> list[str]:
    """Those of `names` that end with one of the texts, also within a component.

    PEFT matches `modules_to_save` in this way, so `classifier` includes `pre_classifier`.
    """
    wanted = set(suffixes)
    lengths = sorted({len(text) for text in wanted if text})
    return [name for name in names if any(name[-length:] in wanted for length in lengths)]


def layer_index(name: str, patterns: str | list[str] | None) -> int | None:
    """The index of the layer that contains `name`: its first number, or the one after a pattern such as `layers`."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


class PatternTable:
    """Values by pattern (`rank_pattern`, `alpha_pattern`): the first one that matches a suffix of the name is used.

    Keys are regular expressions, as in PEFT. Those that are names, in which a dot matches any character unless it is
    escaped, are looked up by their text instead of being matched one after the other.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self._rows = list(table.items())
        self._names: dict[tuple[int, bool, tuple[int, ...]], dict[str, int]] = {}
        """(length, whether it is the whole name, places of any character) -> text -> its row."""
        expressions = []
        for i, key in enumerate(table):
            found = as_text(key)
            if found is None:
                expressions.append((i, table_pattern(key)))
            else:
                kind = len(found.text), found.whole, found.dots
                self._names.setdefault(kind, {}).setdefault(found.text, i)
        self._patterns = expressions
        self._expressions = Expressions(pattern for _, pattern in expressions)
        self._used: set[int] = set()

    def get(self, name: str, default: Any) -> Any:
        if not self._rows:
            return default
        found = len(self._rows)
        for (length, whole, dots), keys in self._names.items():
            start = len(name) - length
            if start < 0 or (start and (whole or name[start - 1] != ".")):
                continue
            suffix = list(name[start:])
            for place in dots:
                suffix[place] = "."
            found = min(found, keys.get("".join(suffix), found))
        for i, pattern in self._patterns:
            if i > found:
                break
            if self._expressions.match(pattern, name):
                found = i
                break
        if found == len(self._rows):
            return default
        self._used.add(found)
        return self._rows[found][1]

    def of(self, name: str, path: str, default: Any) -> Any:
        """The value for a weight `name` of the module `path`: its own, else that of the module."""
        return self.get(name, default if name == path else self.get(path, default))

    def unused(self) -> list[str]:
        return [key for i, (key, _) in enumerate(self._rows) if i not in self._used]
