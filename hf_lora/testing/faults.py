"""Faults of a `LocalHub` for tests."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

KINDS = ("drop", "lose", "stall", "status", "truncate", "corrupt", "garble")
Step = str | Callable[[str, str], bool]


@dataclass
class Fault:
    """A fault and the requests that it affects.

    Attributes:
        on: `"METHOD pattern"`, such as `"POST /api/models/*/commit/*"` (method `*`: any), or a function of method and
            path. The path is decoded and has no query.
        kind: `drop`: close the connection without processing the request. `lose`: process the request, but send no
            response. `stall`: no response for `seconds`. `status`: respond with `status` and `headers`. `truncate`:
            send half of the response. `corrupt`: change a byte of the response's body. `garble`: change a byte of the
            request's body before processing it.
        after: how many matching requests succeed first.
        times: how many matching requests then fail.
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
            raise ValueError(f"Unknown fault {self.kind!r}. Choose one of {', '.join(KINDS)}.")

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
    """`data` with one byte past the middle changed."""
    if not data:
        return data
    at = len(data) * 2 // 3
    return data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :]
