"""PEFT's rules of matching names: a list matches exactly or by suffix, a string is a regular expression."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container
from typing import Any

from .patterns import Expressions, is_name, table_pattern


def matcher(patterns: str | Collection[str]) -> Callable[[str], list[str]]:
    """A function from a name to the patterns that match it.

    Args:
        patterns: a list, each of which matches a name itself or a suffix of whole components; or one regular
            expression, which matches names in full.
    """
    if isinstance(patterns, str):
        pattern = patterns
        if is_name(pattern) and "." not in pattern:
            return lambda name: [pattern] if name == pattern else []
        expressions = Expressions([pattern])
        return lambda name: [pattern] if expressions.match(pattern, name) else []
    wanted = frozenset(patterns)
    return lambda name: _suffixes(name, wanted)


def _suffixes(name: str, known: Container[str]) -> list[str]:
    """Those of the name and its suffixes of whole components that are known, the longest first."""
    found, start = [], 0
    while True:
        suffix = name[start:]
        if suffix in known:
            found.append(suffix)
        dot = name.find(".", start)
        if dot < 0:
            return found
        start = dot + 1


def layer_index(name: str, patterns: str | list[str] | None) -> int | None:
    """The index of the layer that `name` lies in: its first number, or the one after a pattern such as `layers`."""
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


class PatternTable:
    """Values by pattern (`rank_pattern`, `alpha_pattern`): the first that matches a suffix of the name counts.

    A key of letters, digits, `_`, `-` and dots is a name, whose dots are dots; any other is a regular expression.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self._table = table
        self._order = {key: i for i, key in enumerate(table)}
        self._patterns = {key: table_pattern(key) for key in table if not is_name(key)}
        self._expressions = Expressions(self._patterns.values())
        self._used: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        if not self._table:
            return default
        found = min(_suffixes(name, self._order), key=self._order.__getitem__, default=None)
        for key, pattern in self._patterns.items():
            if found is not None and self._order[found] < self._order[key]:
                break
            if self._expressions.match(pattern, name):
                found = key
                break
        if found is None:
            return default
        self._used.add(found)
        return self._table[found]

    def unused(self) -> list[str]:
        return [key for key in self._table if key not in self._used]
