"""Regular expressions of configurations, matched with a time limit, since an adapter's file may be untrusted.

Python's matcher backtracks, so a short pattern can take practically forever. `regex`, which transformers depends on,
accepts the same syntax and has a timeout. Patterns that Python's `re` rejects are rejected here too.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import regex

from ..errors import TargetError

SECONDS = 1.0
"""Time limit for all matches of one field of a configuration; plain names do not count."""
MAX_LENGTH = 2**16
"""Maximum characters of a pattern."""
MAX_SIZE = 2**18
"""Maximum of characters times counts such as `{3}`, which `regex` expands: a count of 10⁶ takes gigabytes."""

_NAME = re.compile(r"[\w.-]*")
_ESCAPED_NAME = re.compile(r"\^?(?:[\w.-]|\\[.-])*\$?")
_COUNT = re.compile(r"\{(\d+)(?:,\d*)?\}")


def is_name(pattern: str) -> bool:
    """Whether a pattern is the name of a module or a suffix of one, which is compared without a regular expression."""
    return _NAME.fullmatch(pattern) is not None


class Text(NamedTuple):
    """A pattern that is a text, except for dots that match any character."""

    text: str
    """With a dot at each place where any character may be."""
    dots: tuple[int, ...]
    """The places of those dots; other dots in the text are dots."""
    whole: bool
    """Whether it must match from the start of the name."""


def as_text(pattern: str) -> Text | None:
    """A key of `rank_pattern` as a text, if it is a name, which may be anchored and have escaped characters."""
    if _ESCAPED_NAME.fullmatch(pattern) is None:
        return None
    whole, pattern = pattern.startswith("^"), pattern.removeprefix("^").removesuffix("$")
    letters = re.findall(r"\\?.", pattern)
    dots = tuple(place for place, letter in enumerate(letters) if letter == ".")
    return Text("".join(letter[-1] for letter in letters), dots, whole)


def table_pattern(key: str) -> str:
    """The regular expression for a key of `rank_pattern`: it matches a suffix of whole components."""
    return rf"(?:.*\.)?(?:{key})$"


def why_invalid(pattern: str) -> str | None:
    """Why a pattern cannot be used; None if it can."""
    if len(pattern) > MAX_LENGTH:
        return f"it has {len(pattern):,} characters (at most {MAX_LENGTH:,})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about nested sets, whose meaning may change
            re.compile(pattern)
            counts = [max(int(count), 1) for count in _COUNT.findall(pattern)]
            if math.prod(counts, start=len(pattern)) > MAX_SIZE:
                return f"its counts {', '.join(map(str, counts[:5]))} are too large"
            regex.compile(pattern)
    except (re.error, regex.error, ValueError, RecursionError, OverflowError, MemoryError) as error:
        return f"it is not a regular expression ({type(error).__name__}: {str(error)[:200]})"
    return None


class Expressions:
    """Regular expressions that share one time limit.

    Raises:
        TargetError: a pattern cannot be used, see `why_invalid`.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._compiled: dict[str, regex.Pattern[str]] = {}
        for pattern in patterns:
            why = why_invalid(pattern)
            if why is not None:
                raise TargetError(f"The pattern {pattern[:200]!r} cannot be matched: {why}. Correct it.")
            self._compiled[pattern] = regex.compile(pattern)
        self._left = SECONDS

    def match(self, pattern: str, name: str) -> bool:
        """Whether `pattern`, one of those given, matches the whole of a name.

        Raises:
            TargetError: the time limit is exceeded; names the pattern.
        """
        start = time.perf_counter()
        try:
            return self._compiled[pattern].fullmatch(name, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise TargetError(
                f"Matching the pattern {pattern[:200]!r} takes more than {SECONDS:g} s. Write it with fewer "
                "repeats, or name the layers in a list."
            ) from None
        finally:
            self._left -= time.perf_counter() - start
