"""Writing the merged tensor in blocks of rows, such that a merge that was cut off can be continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..layers.contract import Update
from ..layers.file_maps import release_pages
from ..layers.parts import Fold
from ..layers.storages import put_rows
from .dequantize import read_rows
from .state import Original


def merged_rows(fold: Fold, reuse: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the merged tensor; float64 if the device supports it.

    Args:
        reuse: use the same memory for all blocks, so that each is valid only until the next one.
    """
    update = fold.start()
    for rows, block in read_rows(fold.storage, fold.site, reuse):
        yield rows, update(block, rows)


class Folding:
    """One tensor that is merged in place.

    Args:
        mapped: whether the tensor is memory-mapped from its file, so that it gets new memory.
        keep: whether the original is kept, so that its pages are not released.
    """

    def __init__(self, fold: Fold, mapped: bool, keep: bool) -> None:
        self.fold, self.label, self.mapped, self.keep = fold, fold.label, mapped, keep
        self._update: Update | None = None
        self._new: Tensor | None = None
        self._saved: tuple[int, Tensor] | None = None
        """The first row of the block that is being written, and its values before."""
        self._done = 0
        """Rows that are written."""

    def original(self) -> Original:
        """The tensor before it is merged."""
        kept = self.fold.site.weight.data if self.mapped else self.fold.storage.keep(self.fold.site)
        return Original(self.fold.site, self.fold.storage, kept)

    @torch.no_grad()
    def run(self, before_writing: Callable[[Folding], object]) -> None:
        """Write what is not written yet; it may be repeated, wherever it was interrupted.

        Args:
            before_writing: called with this object before a row is written.
        """
        weight = self.fold.site.weight
        if self._done == len(weight) or (self._new is not None and weight.data_ptr() == self._new.data_ptr()):
            return
        if self._update is None:
            self._update = self.fold.start()  # once, because it may depend on rows that will be overwritten
            before_writing(self)
        if self.mapped:
            self._to_new_memory(weight, self._update)
        else:
            self._in_place(self._update)
        self._update = self._saved = None

    def _to_new_memory(self, weight: Tensor, update: Update) -> None:
        self._new, before = torch.empty_like(weight), weight.data
        for rows, block in read_rows(self.fold.storage, self.fold.site, reuse=True):
            put_rows(self._new, rows, update(block, rows))
            if not self.keep:
                release_pages(before[rows])
        weight.data = self._new

    def _in_place(self, update: Update) -> None:
        memory: Tensor | None = None
        for rows, block in read_rows(self.fold.storage, self.fold.site, reuse=True, first=self._done):
            if self._saved is not None and self._saved[0] == rows.start:
                block.copy_(self._saved[1])  # it may have been written before the interruption
            else:
                memory = torch.empty_like(block) if memory is None else memory
                self._saved = rows.start, memory[: len(block)].copy_(block)
            self.fold.storage.write(self.fold.site, rows, update(block, rows))
            self._done = rows.stop
