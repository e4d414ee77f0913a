"""Weights that are read from one file and written to another, row by row: the storage of a merge from file to file."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..layers.contract import Storage
from .naming import Run
from .ranges import Entry, bytes_of, copy_range, read_into, write_from

CHUNK = 1 << 18
"""Bytes that are read or written at a time where rows are of no interest: they stay in a core's cache."""


class Sources:
    """The files that are read from, each opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __getitem__(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class Sink:
    """A file under way, for several threads. Of every tensor that is written through it, it keeps the check sum.

    Args:
        places: name -> (first byte, bytes) of each tensor in the file.
        words: name -> bytes of the words that its check sum adds up: rows are written as whole words.
        report: is told how many bytes were written, each time.
    """

    def __init__(
        self,
        file: int,
        places: Mapping[str, tuple[int, int]],
        words: Mapping[str, int],
        report: Callable[[int], object],
    ) -> None:
        self.file, self.places, self.words = file, places, words
        self._report = report
        self._sums: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def write(self, name: str, offset: int, view: memoryview) -> None:
        """Write bytes `offset` bytes into a tensor."""
        write_from(self.file, view, self.places[name][0] + offset)
        more = _added(view, self.words[name])
        with self._lock:
            done, value = self._sums.get(name, (0, 0))
            self._sums[name] = (done + len(view), (value + more) % _MODULUS)
            self._report(len(view))

    def copy(self, source: int, start: int, place: int, count: int) -> None:
        """Copy bytes of another file to a place in this one."""
        copy_range(source, start, self.file, place, count)
        with self._lock:
            self._report(count)

    def sums(self) -> dict[str, int]:
        """Name -> check sum of each tensor that was written; what was written over is read again for it."""
        found = {}
        for name, (done, value) in self._sums.items():
            start, size = self.places[name]
            found[name] = value if done == size else sum_of(self.file, start, size, self.words[name])
        return found


_MODULUS = 1 << 64
_WORDS = {8: np.uint64, 4: np.uint32, 2: np.uint16, 1: np.uint8}


def word_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of the largest word of which every row of a tensor is a whole number."""
    row = math.prod(shape[1:]) * dtype.itemsize
    return next(size for size in _WORDS if row % size == 0)


def _added(view: memoryview, word: int) -> int:
    """All words of some bytes, added up: the order in which a tensor's rows are written makes no difference."""
    return int(np.frombuffer(view, _WORDS[word]).sum(dtype=np.uint64))


def sum_of(file: int, start: int, count: int, word: int) -> int:
    """The check sum of bytes of a file."""
    value, buffer = 0, memoryview(bytearray(min(CHUNK, count)))
    for at in range(0, count, CHUNK):
        view = buffer[: min(CHUNK, count - at)]
        read_into(file, view, start + at)
        value += _added(view, word)
    return value % _MODULUS


def same_bytes(one: int, start: int, other: int, place: int, count: int) -> bool:
    """Whether two files hold the same bytes."""
    a, b = (memoryview(bytearray(min(CHUNK, count))) for _ in range(2))
    for at in range(0, count, CHUNK):
        size = min(CHUNK, count - at)
        read_into(one, a[:size], start + at)
        read_into(other, b[:size], place + at)
        if a[:size] != b[:size]:
            return False
    return True


class FileStorage(Storage):
    """A weight whose rows lie in files, and are written to the file under way.

    Rows whose tensors belong to another file are computed and not written: their turn comes with that file.
    """

    kind = "file"

    def __init__(
        self,
        shape: tuple[int, ...],
        runs: Sequence[Run],
        tensors: Mapping[str, Entry],
        sources: Sources,
        dtype: torch.dtype,
        renamed: str | None = None,
    ) -> None:
        self._shape, self.runs, self._tensors, self._sources = shape, runs, tensors, sources
        self.held = tensors[runs[0].key].dtype
        self.dtype = dtype
        self.renamed = renamed
        """The name that it is written under, where that is not the name that it is read under (of tied weights)."""
        self.sink: Sink | None = None
        self._memory: dict[tuple[str, int], tuple[Tensor, memoryview]] = {}

    @property
    def targets(self) -> dict[str, int]:
        """Name in the files to write -> how many rows of it are written."""
        found: dict[str, int] = {}
        for run in self.runs:
            key = self.renamed or run.key
            found[key] = found.get(key, 0) + run.length
        return found

    def owns(self, layer: nn.Module) -> bool:
        return self.held.is_floating_point and self.held.itemsize > 1

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return self._shape

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        raw, view = self._buffer("in", rows.stop - rows.start, self.held)
        width = self._width * self.held.itemsize
        for key, place, at, count in self._parts(rows):
            entry = self._tensors[key]
            piece = view[at * width : (at + count) * width]
            read_into(self._sources[entry.file], piece, entry.start + place * width)
        return raw.to(torch.float32, copy=True) if into is None else into.copy_(raw)

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        """Round rows to the dtype of the file under way, and write those that belong there."""
        assert self.sink is not None
        raw, view = self._buffer("out", rows.stop - rows.start, self.dtype)
        raw.copy_(block)
        # The sum of the rounded half is the fastest question; it may overflow where no element does.
        if not math.isfinite(raw.sum().item()) and not bool(torch.isfinite(raw).all()):
            raise MergeError(f"a merged value is not finite, or too large for {self.dtype}")
        width = self._width * self.dtype.itemsize
        for key, place, at, count in self._parts(rows):
            name = self.renamed or key
            if name in self.sink.places:
                self.sink.write(name, place * width, view[at * width : (at + count) * width])

    def forget(self) -> None:
        """Give the buffers back."""
        self._memory.clear()

    @property
    def _width(self) -> int:
        return math.prod(self._shape[1:])

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, memoryview]:
        """Memory for some rows, and its bytes: the same at every call."""
        held = self._memory.get((name, rows))
        if held is None:
            memory = torch.empty(rows, *self._shape[1:], dtype=dtype)
            held = self._memory[name, rows] = memory, bytes_of(memory)
        return held

    def _parts(self, rows: slice) -> Iterator[tuple[str, int, int, int]]:
        """(tensor on disk, row in it, row in the block, count) of each stretch of a block."""
        for run in self.runs:
            begin, end = max(run.row, rows.start), min(run.row + run.length, rows.stop)
            if begin < end:
                yield run.key, run.place + begin - run.row, begin - rows.start, end - begin
