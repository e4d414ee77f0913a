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

    Keys are regular expressions, as in PEFT. Those of letters, digits, `_`, `-` and dots, in which a dot matches any
    character, are looked up by their text instead of being matched one after the other.
    """

    def __init__(self, table: dict[str, Any]) -> None:
        self._rows = list(table.items())
        self._names: dict[tuple[int, tuple[int, ...]], dict[str, int]] = {}
        """(length, places of dots) -> key -> its row."""
        for i, key in enumerate(table):
            if is_name(key):
                dots = tuple(place for place, letter in enumerate(key) if letter == ".")
                self._names.setdefault((len(key), dots), {})[key] = i
        self._patterns = [(i, table_pattern(key)) for i, key in enumerate(table) if not is_name(key)]
        self._expressions = Expressions(pattern for _, pattern in self._patterns)
        self._used: set[int] = set()

    def get(self, name: str, default: Any) -> Any:
        if not self._rows:
            return default
        found = len(self._rows)
        for (length, dots), keys in self._names.items():
            start = len(name) - length
            if start < 0 or (start and name[start - 1] != "."):
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
