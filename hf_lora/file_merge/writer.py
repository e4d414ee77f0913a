"""The storage of weights that are read from files and written to another file, row by row."""

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
    """The file being written, for several threads: its descriptor, and the offset of each tensor."""

    file: int
    starts: Mapping[str, int]


class FileStorage(Storage):
    """A weight whose rows are read from files and written to the current output file.

    Rows of tensors in another output file are computed but not written; they are written with that file.
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
            dtype: the dtype to write.
            renamed: the name to write, if it differs from the name to read (for tied weights).
        """
        self._shape, self.runs, self._checkpoint = shape, runs, checkpoint
        self.dtype, self.renamed = dtype, renamed
        self.sink: Sink | None = None
        self._memory: dict[str, Tensor] = {}

    @property
    def targets(self) -> dict[str, int]:
        """Name in the output files -> number of rows written."""
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
        """Round rows to the output dtype, and write those that belong to the current file."""
        assert self.sink is not None
        raw = self._buffer("out", rows, self.dtype).copy_(block)
        # The sum is the fastest check; it may overflow although no element is infinite.
        if not math.isfinite(raw.sum().item()) and not bool(torch.isfinite(raw).all()):
            raise MergeError(f"a merged value is not finite, or too large for {self.dtype}")
        view, width = bytes_of(raw), raw[0].nbytes
        for key, place, at, count in self._parts(rows):
            begin = self.sink.starts.get(self.renamed or key)
            if begin is not None:
                write_from(self.sink.file, view[at * width : (at + count) * width], begin + place * width)

    def forget(self) -> None:
        """Free the buffers."""
        self._memory.clear()

    def _buffer(self, name: str, rows: slice, dtype: torch.dtype) -> Tensor:
        """Memory for some rows, reused at every call."""
        count, held = rows.stop - rows.start, self._memory.get(name)
        if held is None or len(held) < count:
            held = self._memory[name] = torch.empty(count, *self._shape[1:], dtype=dtype)
        return held[:count]

    def _parts(self, rows: slice) -> Iterator[tuple[str, int, int, int]]:
        """(tensor on disk, row in it, row in the block, count) of each contiguous part of a block."""
        for run in self.runs:
            begin, end = max(run.row, rows.start), min(run.row + run.length, rows.stop)
            if begin < end:
                yield run.key, run.place + begin - run.row, begin - rows.start, end - begin
