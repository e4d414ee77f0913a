"""PEFT's rules for matching names: a list matches exactly or by suffix, a string is a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any

from .patterns import Expressions, is_name, table_pattern


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

    A key of letters, digits, `_`, `-` and dots is a name, with literal dots; any other is a regular expression.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self._rows = list(table.items())
        self._names = {key: i for i, key in enumerate(table) if is_name(key)}
        self._components = max((key.count(".") + 1 for key in self._names), default=0)
        self._patterns = [(i, table_pattern(key)) for i, key in enumerate(table) if key not in self._names]
        self._expressions = Expressions(pattern for _, pattern in self._patterns)
        self._used: set[int] = set()

    def get(self, name: str, default: Any) -> Any:
        if not self._rows:
            return default
        found, start = len(self._rows), len(name)
        for _ in range(self._components):
            start = name.rfind(".", 0, max(start, 0))
            found = min(found, self._names.get(name[start + 1 :], found))
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

    def unused(self) -> list[str]:
        return [key for i, (key, _) in enumerate(self._rows) if i not in self._used]
