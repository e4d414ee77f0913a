"""PEFT's rules of matching names: a list matches exactly or by suffix, a string is a regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from .patterns import matcher, table_pattern


def matches(patterns: str | Iterable[str], name: str) -> list[str]:
    """The patterns that match `name`: itself or a suffix of whole components, or one regular expression in full."""
    if isinstance(patterns, str):
        return [patterns] if matcher(patterns)(name) else []
    wanted = patterns if isinstance(patterns, (set, frozenset, dict)) else set(patterns)
    found, start = [], 0
    while True:
        if name[start:] in wanted:
            found.append(name[start:])
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
    """Values by pattern (`rank_pattern`, `alpha_pattern`): the first that matches a suffix of the name counts."""

    def __init__(self, table: dict[str, Any]) -> None:
        self.rows = [(key, matcher(table_pattern(key)), value) for key, value in table.items()]
        self.used: set[str] = set()

    def get(self, name: str, default: Any) -> Any:
        for key, hits, value in self.rows:
            if hits(name):
                self.used.add(key)
                return value
        return default

    def unused(self) -> list[str]:
        return [key for key, _, _ in self.rows if key not in self.used]
