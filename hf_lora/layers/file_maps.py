"""Weights that are still memory-mapped from their file, as `from_pretrained` leaves them on a CPU under Linux.

Writing to such a map is slow: the first write to each page copies it and interrupts every core that runs a thread of
the process. With two threads it takes five times as long as the same work in ordinary memory.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

_DONTNEED = 4  # for madvise on Linux: an unwritten page is read from the file again when needed


def unwritten_maps() -> list[tuple[int, int]]:
    """(begin, end) of the private file maps of this process that it has not written to."""
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
    """Whether all of a tensor's memory lies in one of `maps`."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    begin, end = _range(tensor)
    return any(low <= begin and end <= high for low, high in maps)


def release_pages(tensor: Tensor) -> None:
    """Release the memory pages of a tensor in an unwritten map; its values stay readable from the file."""
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
