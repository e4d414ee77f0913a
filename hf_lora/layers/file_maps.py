"""Weights that are still a map of their file, as `from_pretrained` leaves them on a CPU under Linux.

To write into such a map is slow: each page that is changed for the first time is copied, and every core that runs a
thread of the process is told so. Five times the time of the same work in memory of its own, with two threads.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_DONTNEED = 4  # of Linux' madvise: a page that nobody wrote to is read from the file again where it is asked for


def unwritten_maps() -> list[tuple[int, int]]:
    """(begin, end) of the files that are mapped for this process alone, and into which it has written nothing yet."""
    table = Path("/proc/self/smaps")
    if not sys.platform.startswith("linux") or not table.exists():
        return []
    found: list[tuple[int, int]] = []
    current: tuple[int, int] | None = None
    for line in table.read_text(errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0]:
            private = words[1].startswith("rw") and words[1].endswith("p")
            named = len(words) == 6 and words[5].endswith(".safetensors")
            begin, _, end = words[0].partition("-")
            current = (int(begin, 16), int(end, 16)) if private and named else None
        elif words[0] == "Anonymous:" and current is not None and words[1] == "0":
            found.append(current)
    return found


def lies_in(tensor: Tensor, maps: list[tuple[int, int]]) -> bool:
    """Whether all of a tensor's memory is part of one of `maps`."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    begin, end = _range(tensor)
    return any(low <= begin and end <= high for low, high in maps)


def let_go(tensor: Tensor) -> None:
    """Take the pages of a tensor that lies in an unwritten map out of this process's memory; their values stay."""
    begin, end = _range(tensor)
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (end - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(length), _DONTNEED)


@functools.cache
def _madvise() -> Callable[..., int]:
    found: Callable[..., int] = ctypes.CDLL(None).madvise
    return found


def _range(tensor: Tensor) -> tuple[int, int]:
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()
