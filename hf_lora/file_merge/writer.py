"""Weights that are read from files and written to another file, row by row: the storage of such a merge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..layers.contract import Storage
from .naming import Run
from .ranges import Checkpoint, bytes_of, read_into, write_from


@dataclass(frozen=True)
class Sink:
    """A file under way, for several threads: its descriptor, and where each of its tensors begins."""

    file: int
    starts: Mapping[str, int]


class FileStorage(Storage):
    """A weight whose rows lie in files, and are written to the file under way.

    Rows whose tensors belong to another file are computed and not written: their turn comes with that file.
    """

    kind = "file"

    def __init__(
        self,
        shape: tuple[int, ...],
        runs: Sequence[Run],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        renamed: str | None = None,
    ) -> None:
        """
        Args:
            dtype: in which it is written.
            renamed: the name that it is written under, if not the one that it is read under (of tied weights).
        """
        self._shape, self.runs, self._checkpoint = shape, runs, checkpoint
        self.dtype, self.renamed = dtype, renamed
        self.sink: Sink | None = None
        self._memory: dict[str, Tensor] = {}

    @property
    def targets(self) -> dict[str, int]:
        """Name in the files to write -> how many rows of it are written."""
        found: dict[str, int] = {}
        for run in self.runs:
            key = self.renamed or run.key
            found[key] = found.get(key, 0) + run.length
        return found

    def owns(self, layer: nn.Module) -> bool:
        return True

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return self._shape

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        raw = self._buffer("in", rows, self._checkpoint.tensors[self.runs[0].key].dtype)
        view, width = bytes_of(raw), raw[0].nbytes
        for key, place, at, count in self._parts(rows):
            entry, piece = self._checkpoint.tensors[key], view[at * width : (at + count) * width]
            read_into(self._checkpoint.file_of(entry), piece, entry.start + place * width)
        return raw.to(torch.float32, copy=True) if into is None else into.copy_(raw)

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        """Round rows to the dtype of the file under way, and write those that belong there."""
        assert self.sink is not None
        raw = self._buffer("out", rows, self.dtype).copy_(block)
        # The sum is the fastest question; it may overflow where no element does.
        if not math.isfinite(raw.sum().item()) and not bool(torch.isfinite(raw).all()):
            raise MergeError(f"a merged value is not finite, or too large for {self.dtype}")
        view, width = bytes_of(raw), raw[0].nbytes
        for key, place, at, count in self._parts(rows):
            begin = self.sink.starts.get(self.renamed or key)
            if begin is not None:
                write_from(self.sink.file, view[at * width : (at + count) * width], begin + place * width)

    def forget(self) -> None:
        """Give the buffers back."""
        self._memory.clear()

    def _buffer(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Memory for some rows: the same at every call."""
        count, held = rows.stop - rows.start, self._memory.get(name)
        if held is None or len(held) < count:
            held = self._memory[name] = torch.empty(count, *self._shape[1:], dtype=dtype)
        return held[:count]

    def _parts(self, rows: slice) -> Iterator[tuple[str, int, int, int]]:
        """(tensor on disk, row in it, row in the block, count) of each stretch of a block."""
        for run in self.runs:
            begin, end = max(run.row, rows.start), min(run.row + run.length, rows.stop)
            if begin < end:
                yield run.key, run.place + begin - run.row, begin - rows.start, end - begin
