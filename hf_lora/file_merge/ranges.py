"""The safetensors files of a checkpoint as byte ranges: where each tensor is, and how bytes are copied."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import AdapterFileError, Faults
from ..safe_io.headers import Entry, TensorFile, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK = 1 << 18
"""Bytes per read or write if rows do not matter; they fit into a core's cache."""


@dataclass
class Checkpoint:
    """A folder's safetensors files, and the index that lists them if there is one."""

    folder: Path
    shards: list[TensorFile] = field(default_factory=list)
    index: dict[str, Any] | None = None
    tensors: dict[str, Entry] = field(default_factory=dict)
    _maps: dict[Path, Any] = field(default_factory=dict)
    _files: dict[Path, int] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def mapped(self, entry: Entry) -> Tensor:
        """A memory-mapped tensor: bytes are read on access."""
        if entry.file not in self._maps:
            self._maps[entry.file] = safe_open(entry.file, framework="pt")
        tensor: Tensor = self._maps[entry.file].get_tensor(entry.name)
        return tensor

    def elements(self, entry: Entry, places: range) -> Tensor:
        """Single elements of a tensor; through the memory map each would load a large page."""
        size, file = entry.dtype.itemsize, self.file_of(entry)
        parts = [os.pread(file, size, entry.start + place * size) for place in places]
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=entry.dtype)

    def file_of(self, entry: Entry) -> int:
        """The descriptor of the file that holds a tensor."""
        with self._lock:
            if entry.file not in self._files:
                self._files[entry.file] = os.open(entry.file, os.O_RDONLY)
            return self._files[entry.file]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


def open_checkpoint(folder: Path, faults: Faults) -> Checkpoint:
    """Read the headers of a model's safetensors files; adds a fault for everything that is wrong with them."""
    found = Checkpoint(folder)
    names = [SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        found.index = _read_index(folder / INDEX_NAME, faults)
        names = sorted(set(found.index["weight_map"].values())) if found.index else []
    elif not (folder / SINGLE_NAME).is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.safetensors"))
        holds = f" It has {', '.join(others[:3])}." if others else ""
        faults.add(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.{holds}")
        return found
    for name in names:
        if Path(name).name != name:
            faults.add(f"{INDEX_NAME} names {name!r}, which is not in the same folder")
        elif not (folder / name).is_file():
            faults.add(f"{folder / name} is missing")
        else:
            try:
                found.shards.append(read_header(folder / name))
            except AdapterFileError as error:
                faults.add(str(error))
    found.tensors = {entry.name: entry for shard in found.shards for entry in shard.entries}
    if found.index is not None and len(found.shards) == len(names):
        _compare(found, found.index["weight_map"], faults)
    return found


def _compare(found: Checkpoint, listed: dict[str, str], faults: Faults) -> None:
    """Check the index against the files."""
    held = {entry.name: entry.file.name for entry in found.tensors.values()}
    for name in sorted(listed.keys() | held.keys()):
        if held.get(name) != listed.get(name):
            faults.add(f"{INDEX_NAME}: {name} is listed in {listed.get(name)} but is in {held.get(name)}")
    if sum(len(shard.entries) for shard in found.shards) > len(held):
        faults.add("two files have a tensor of the same name")


def _read_index(file: Path, faults: Faults) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        table = values["weight_map"]
        if table and all(isinstance(name, str) for name in table.values()):
            assert isinstance(values, dict)
            return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    faults.add(f"{file} is not an index of safetensors files")
    return None


# Bytes ---------------------------------------------------------------------------------------------------------------


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_into(file: int, view: memoryview, offset: int) -> None:
    """Fill `view` from an offset in a file."""
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise OSError("the file ended while it was read; was it changed?")
        done += count


def write_from(file: int, view: memoryview | bytes, offset: int) -> None:
    """Write all of `view` to an offset in a file."""
    view, done = memoryview(view), 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


def copy_range(source: int, start: int, target: int, place: int, count: int) -> None:
    """Copy bytes from file to file, within the kernel if the file systems support it.

    Not by sendfile, whose write position is shared between threads.
    """
    while count:
        try:
            done = os.copy_file_range(source, target, min(count, 1 << 26), start, place)
        except (OSError, AttributeError):  # between two file systems, or not on Linux
            done = 0
        if done == 0:  # some file systems return 0 if they do not support it
            data = os.pread(source, min(count, 1 << 20), start)
            if not data:
                raise OSError("the file ended while it was copied; was it changed?")
            done = os.pwrite(target, data, place)
        start, place, count = start + done, place + done, count - done
