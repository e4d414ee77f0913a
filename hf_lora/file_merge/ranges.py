"""The safetensors files of a checkpoint as ranges of bytes: which tensor lies where, and nothing read but headers.

8 bytes     the header's length n, little endian
n bytes     JSON: {"name": {"dtype", "shape", "data_offsets": [start, end]}, …, "__metadata__": {…}}
the rest    the tensors, without gaps; offsets count from here
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import warnings
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterFileError, Faults
from ..safe_io.atomic import is_full
from ..safe_io.reading import parse_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER = 100_000_000
"""Bytes of a header; the format's own limit."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file. `start` and `end` count from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path


@dataclass
class Shard:
    """One file: its tensors in the order in which their bytes lie, and its header as it was read."""

    path: Path
    entries: list[Entry]
    metadata: dict[str, str] | None
    header: bytes
    size: int


@dataclass
class Checkpoint:
    """A folder's safetensors files, and the index that lists them where there is one."""

    folder: Path
    shards: list[Shard] = field(default_factory=list)
    index: dict[str, Any] | None = None
    tensors: dict[str, Entry] = field(default_factory=dict)
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict)

    def mapped(self, entry: Entry) -> Tensor:
        """A tensor over the file's own bytes: read when they are looked at, and never to be written to."""
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        held = self._maps.get(entry.file)
        if held is None:
            with entry.file.open("rb") as file:
                held = self._maps[entry.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it cannot be written to is what is wanted
            flat = torch.frombuffer(held, dtype=entry.dtype, count=prod(entry.shape), offset=entry.start)
        return flat.view(entry.shape)

    def elements(self, entry: Entry, places: range) -> Tensor:
        """Single elements of a tensor: through a map each would bring a large page of the system's with it."""
        size = entry.dtype.itemsize
        with entry.file.open("rb", buffering=0) as file:
            parts = [os.pread(file.fileno(), size, entry.start + place * size) for place in places]
        return torch.frombuffer(bytearray(b"".join(parts)), dtype=entry.dtype)

    def release(self) -> None:
        """Forget the bytes that were looked at: they count as this process's memory for as long as it holds them."""
        for held in self._maps.values():
            with contextlib.suppress(AttributeError, OSError):
                held.madvise(mmap.MADV_DONTNEED)


def open_checkpoint(folder: Path, faults: Faults) -> Checkpoint:
    """Read the headers of a model's safetensors files; a fault for everything that is wrong with them."""
    found = Checkpoint(folder)
    names = [SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        found.index = _read_index(folder / INDEX_NAME, faults)
        names = sorted(set(found.index["weight_map"].values())) if found.index else []
    elif not (folder / SINGLE_NAME).is_file():
        others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.safetensors"))
        holds = f" It holds {', '.join(others[:3])}." if others else ""
        faults.add(f"{folder} holds neither {SINGLE_NAME} nor {INDEX_NAME}.{holds}")
        return found
    for name in names:
        if Path(name).name != name:
            faults.add(f"{INDEX_NAME} names {name!r}, which is not in its own folder")
            continue
        shard = _read_shard(folder / name, faults)
        if shard is not None:
            found.shards.append(shard)
            found.tensors |= {entry.name: entry for entry in shard.entries}
    if found.index is not None and len(found.shards) == len(names):
        _compare(found, faults)
    return found


def _compare(found: Checkpoint, faults: Faults) -> None:
    """Whether the index says what the files hold."""
    assert found.index is not None
    listed: dict[str, str] = found.index["weight_map"]
    held = {entry.name: shard.path.name for shard in found.shards for entry in shard.entries}
    for name in sorted(listed.keys() | held.keys()):
        if held.get(name) != listed.get(name):
            faults.add(f"{INDEX_NAME}: {name} is listed in {listed.get(name)} and lies in {held.get(name)}")
    if sum(len(shard.entries) for shard in found.shards) > len(held):
        faults.add("a tensor of one name lies in two files")


def _read_index(file: Path, faults: Faults) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        table = values["weight_map"]
        if table and all(isinstance(name, str) for name in table.values()):
            assert isinstance(values, dict)
            return values
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    faults.add(f"{file} is not an index of safetensors files")
    return None


def _read_shard(file: Path, faults: Faults) -> Shard | None:
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(MAX_HEADER, size - 8):
                faults.add(f"{file} is cut off, or no safetensors file: its header would end at byte {length + 8}")
                return None
            header = opened.read(length)
        values = parse_json(header, f"The header of {file}", most=len(header))
        metadata = values.pop("__metadata__", None)
        entries = [_entry(name, value, 8 + length, file) for name, value in values.items()]
    except FileNotFoundError:
        faults.add(f"{file} is missing")
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AdapterFileError) as error:
        faults.add(f"{file} has no safetensors header ({type(error).__name__}: {error})")
        return None
    entries.sort(key=lambda e: (e.start, e.end))
    place = 8 + length
    for entry in entries:
        bits = prod(entry.shape) * entry.dtype.itemsize
        if entry.start != place or entry.end - entry.start != bits:
            faults.add(f"{file}: {entry.name} does not lie where the tensors before it end, or is not of its shape")
            return None
        place = entry.end
    if place != size:
        faults.add(f"{file} is {size} bytes, and its header speaks of {place}: it is cut off, or was written over")
        return None
    return Shard(file, entries, metadata, header, size)


def _entry(name: str, value: dict[str, Any], begin: int, file: Path) -> Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{name} is of the unknown dtype {value['dtype']}")
    start, end = value["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (start, end, *value["shape"])):
        raise ValueError(f"{name} has a size or place that is no whole number")
    return Entry(name, DTYPES[value["dtype"]], tuple(value["shape"]), begin + start, begin + end, file)


def header_of(entries: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str] | None) -> bytes:
    """The header, with its length before it, of a file that holds these tensors in this order."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    place = 0
    for name, dtype, shape in entries:
        end = place + prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# Bytes ---------------------------------------------------------------------------------------------------------------


def read_into(file: int, view: memoryview, offset: int) -> None:
    """Fill `view` from a place in a file."""
    done = 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], offset + done)
        if count == 0:
            raise OSError("the file ended while it was read: was it changed?")
        done += count


def write_from(file: int, view: memoryview, offset: int) -> None:
    """Write all of `view` to a place in a file."""
    done = 0
    while done < len(view):
        done += os.pwrite(file, view[done:], offset + done)


def reserve(file: int, size: int) -> None:
    """Give a new file its size, and its place on the disk where the system can: writing is faster then.

    `os.posix_fallocate` is not used: where the file system cannot, it writes to every block instead.
    """
    try:
        _fallocate(file, size)
    except (OSError, AttributeError) as error:
        if is_full(error):
            raise
    os.ftruncate(file, size)


def _fallocate(file: int, size: int) -> None:
    call = ctypes.CDLL(None, use_errno=True).fallocate  # of Linux alone
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(file, 0, 0, size) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def copy_range(source: int, start: int, target: int, place: int, count: int) -> None:
    """Copy bytes from file to file within the kernel, where it can; nothing passes through this process's memory."""
    ways = [_copy_file_range, _read_and_write]  # not sendfile: it writes at a position that threads would share
    while count:
        try:
            done = ways[0](source, start, target, place, min(count, 1 << 26))
        except (OSError, AttributeError):
            if len(ways) == 1:
                raise
            ways.pop(0)
            continue
        if done == 0:
            if len(ways) > 1:  # some file systems answer so where they cannot
                ways.pop(0)
                continue
            raise OSError("the file ended while it was copied: was it changed?")
        start, place, count = start + done, place + done, count - done


def _copy_file_range(source: int, start: int, target: int, place: int, count: int) -> int:
    return os.copy_file_range(source, target, count, start, place)


def _read_and_write(source: int, start: int, target: int, place: int, count: int) -> int:
    data = os.pread(source, min(count, 1 << 20), start)
    return os.pwrite(target, data, place) if data else 0


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
