"""Faults that a `LocalHub` commits when it is told to."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

KINDS = ("drop", "lose", "stall", "status", "truncate", "corrupt", "garble")
Step = str | Callable[[str, str], bool]


@dataclass
class Fault:
    """What goes wrong, at which requests.

    Attributes:
        on: `"METHOD pattern"`, such as `"POST /api/models/*/commit/*"` (a method `*` is any), or a function of method
            and path. The path is without its query, and decoded.
        kind: `drop`: the connection is closed and nothing was done. `lose`: it was done, and the answer is lost.
            `stall`: no answer for `seconds`. `status`: the answer is `status` with `headers`. `truncate`: the answer
            breaks off half-way. `corrupt`: a byte of the answer's body is another one. `garble`: a byte of the
            request's body is, as if it had changed on its way.
        after: matching requests that go well first.
        times: matching requests that then fail.
    """

    on: Step
    kind: str
    after: int = 0
    times: int = 1
    status: int = 500
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 3600.0
    seen: int = 0
    fired: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"fault {self.kind!r} is unknown. It is one of {', '.join(KINDS)}.")

    def matches(self, method: str, path: str) -> bool:
        if callable(self.on):
            return self.on(method, path)
        wanted, _, pattern = self.on.partition(" ")
        return wanted in ("*", method) and fnmatch.fnmatchcase(path, pattern or "*")

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request fails; counts it."""
        if not self.matches(method, path):
            return False
        self.seen += 1
        if self.seen <= self.after or self.seen > self.after + self.times:
            return False
        self.fired += 1
        return True


def other_byte(data: bytes) -> bytes:
    """The same length with one byte changed, past the middle."""
    if not data:
        return data
    at = len(data) * 2 // 3
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
