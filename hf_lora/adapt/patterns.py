"""Regular expressions matched in bounded time, since those of an adapter's file are a stranger's.

Python's own matcher tries one way after another, and a pattern of a few letters can make that take for ever. A pattern
with few choices goes to it all the same. Any other is walked here by the positions it can have reached, each of which
is looked at once for every part of the pattern. What can be matched neither way (a backreference, hundreds of
choices) is named, so that a file that holds it can be refused.
"""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_parser: Any = importlib.import_module("re._parser")
_names: Any = importlib.import_module("re._constants")

MAX_LENGTH = 2**16
"""Characters of a pattern."""
MAX_INTRICATE_LENGTH = 2048
"""Characters of a pattern that has to be walked."""
FEW_CHOICES = 3
"""So many repeats and alternatives, none in another repeat, cost at most the third power of a name's length."""
MAX_CHOICES = 64

_REPEATS = (_names.MAX_REPEAT, _names.MIN_REPEAT, _names.POSSESSIVE_REPEAT)
_ASSERTS = (_names.ASSERT, _names.ASSERT_NOT)
_PLAIN = re.compile(r"[\w.-]*")


def table_pattern(key: str) -> str:
    """The expression that a key of `rank_pattern` stands for: it matches a suffix of whole components."""
    return rf"(?:.*\.)?(?:{key})$"


def why_unbounded(pattern: str) -> str | None:
    """Why a pattern cannot be matched in bounded time, or at all; None where it can."""
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern):,} characters (at most {MAX_LENGTH:,})"
    if _PLAIN.fullmatch(pattern):
        return None
    try:
        tree = _parsed(pattern)
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        return f"it is not a regular expression ({type(error).__name__}: {str(error)[:200]})"
    if _is_simple(tree):
        return None
    if len(pattern) > MAX_INTRICATE_LENGTH:
        return f"it has {len(pattern):,} characters, and too many choices for its length"
    return _why_not_walked(tree)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether the whole of a name matches. A pattern for which `why_unbounded` has an answer is left to Python."""
    return _matcher(pattern) if len(pattern) <= MAX_INTRICATE_LENGTH else _new_matcher(pattern)


def _new_matcher(pattern: str) -> Callable[[str], bool]:
    regex = _compiled(pattern)
    if _PLAIN.fullmatch(pattern) is None:
        tree = _parsed(pattern)
        if not _is_simple(tree) and len(pattern) <= MAX_INTRICATE_LENGTH and _why_not_walked(tree) is None:
            return lambda name: _Walk(name).matches(tree)
    return lambda name: regex.fullmatch(name) is not None


_matcher = functools.lru_cache(maxsize=256)(_new_matcher)


def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of sets within sets, which may come to mean something else
        return re.compile(pattern)


def _parsed(pattern: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return _parser.parse(pattern)


def _nodes(tree: Any, repeated: bool = False) -> Iterator[tuple[Any, Any, bool]]:
    """(operator, its arguments, whether it lies in a repeat) of every part of a parsed pattern."""
    for op, value in tree:
        yield op, value, repeated
        for inner in _inside(op, value):
            yield from _nodes(inner, repeated or (op in _REPEATS and value[1] > 1))


def _inside(op: Any, value: Any) -> list[Any]:
    """The patterns within a part."""
    if op in _REPEATS:
        return [value[2]]
    if op is _names.BRANCH:
        return list(value[1])
    if op is _names.SUBPATTERN:
        return [value[3]]
    if op in _ASSERTS:
        return [value[1]]
    if op is _names.ATOMIC_GROUP:
        return [value]
    if op is _names.GROUPREF_EXISTS:
        return [part for part in value[1:] if part is not None]
    return []


def _is_choice(op: Any, value: Any) -> bool:
    return op is _names.BRANCH or op is _names.GROUPREF_EXISTS or (op in _REPEATS and value[0] != value[1])


def _is_simple(tree: Any) -> bool:
    choices = 0
    for op, value, repeated in _nodes(tree):
        if _is_choice(op, value):
            choices += 1
            if repeated or choices > FEW_CHOICES:
                return False
        elif op in _REPEATS and value[0] > 1 and value[2].getwidth()[0] == 0:
            return False  # each round of it may take nothing, so that no name's end ends it
    return True


def _why_not_walked(tree: Any) -> str | None:
    if tree.state.flags & ~re.UNICODE:
        return "it has flags and too many choices"
    choices = 0
    for op, value, _ in _nodes(tree):
        choices += _is_choice(op, value)
        if choices > MAX_CHOICES:
            return f"it has more than {MAX_CHOICES} choices"
        flagged = op is _names.SUBPATTERN and (value[1] or value[2])
        behind = op in _ASSERTS and value[0] < 0
        if op not in _WALKED or flagged or behind:
            return f"it has too many choices beside a part of the kind {str(op).lower()}"
    return None


_WALKED = {
    _names.LITERAL, _names.NOT_LITERAL, _names.ANY, _names.IN, _names.BRANCH, _names.SUBPATTERN, _names.MAX_REPEAT,
    _names.MIN_REPEAT, _names.AT, _names.ASSERT, _names.ASSERT_NOT, _names.FAILURE,
}  # fmt: skip


class _Walk:
    """One name, and where each part of a pattern ends in it if it starts at a position; both as bits of a number."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.known: dict[tuple[int, int], int] = {}

    def matches(self, tree: Any) -> bool:
        return bool(self.sequence(tree, 1) >> len(self.name) & 1)

    def sequence(self, tree: Any, starts: int) -> int:
        for op, value in tree:
            if not starts:
                break
            starts = self.step(op, value, starts)
        return starts

    def step(self, op: Any, value: Any, starts: int) -> int:
        ends = 0
        compound = op in _REPEATS or op in _ASSERTS or op is _names.BRANCH or op is _names.SUBPATTERN
        for at in _bits(starts):
            if not compound:
                ends |= self.simple(op, value, at)
                continue
            key = (id(value), at)
            if key not in self.known:
                self.known[key] = self.compound(op, value, at)
            ends |= self.known[key]
        return ends

    def simple(self, op: Any, value: Any, at: int) -> int:
        if op is _names.AT:
            return self.position(value, at) << at
        if op is _names.FAILURE or at == len(self.name):
            return 0
        return _takes(op, value, self.name[at]) << (at + 1)

    def compound(self, op: Any, value: Any, at: int) -> int:
        start = 1 << at
        if op is _names.SUBPATTERN:
            return self.sequence(value[3], start)
        if op is _names.BRANCH:
            ends = 0
            for branch in value[1]:
                ends |= self.sequence(branch, start)
            return ends
        if op in _ASSERTS:
            return start if bool(self.sequence(value[1], start)) == (op is _names.ASSERT) else 0
        least, most, inner = value
        rounds = len(self.name) + 1  # any further round of the repeat takes nothing
        for _ in range(min(least, rounds)):
            start = self.sequence(inner, start)
        ends = new = start
        for _ in range(min(most - min(least, most), rounds)):
            new = self.sequence(inner, new) & ~ends
            if not new:
                break
            ends |= new
        return ends

    def position(self, kind: Any, at: int) -> bool:
        name = self.name
        if kind in (_names.AT_BEGINNING, _names.AT_BEGINNING_STRING):
            return at == 0
        if kind is _names.AT_END_STRING:
            return at == len(name)
        if kind is _names.AT_END:
            return at == len(name) or (at == len(name) - 1 and name[at] == "\n")
        sides = [_is_word(c) for c in (name[at - 1 : at], name[at : at + 1])]
        return (sides[0] != sides[1]) == (kind is _names.AT_BOUNDARY)


def _takes(op: Any, value: Any, char: str) -> bool:
    if op is _names.LITERAL:
        return ord(char) == value
    if op is _names.NOT_LITERAL:
        return ord(char) != value
    if op is _names.ANY:
        return char != "\n"
    negated = bool(value) and value[0][0] is _names.NEGATE
    return any(_is_of(kind, item, char) for kind, item in value[negated:]) != negated


def _is_of(kind: Any, item: Any, char: str) -> bool:
    """Whether a character is in one part of a set such as `[a-z_\\d]`."""
    if kind is _names.LITERAL:
        return ord(char) == item
    if kind is _names.RANGE:
        return bool(item[0] <= ord(char) <= item[1])
    tests = {"DIGIT": str.isdecimal, "SPACE": str.isspace, "WORD": _is_word}
    name = str(item).removeprefix("CATEGORY_")
    return tests[name.removeprefix("NOT_")](char) != name.startswith("NOT_")


def _is_word(char: str) -> bool:
    return char.isalnum() or char == "_"


def _bits(number: int) -> Iterator[int]:
    while number:
        low = number & -number
        yield low.bit_length() - 1
        number ^= low
