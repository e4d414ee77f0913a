"""Safetensors headers, which are validated before any tensor is read.

8 bytes     the header's length n, little endian
n bytes     JSON: {"name": {"dtype", "shape", "data_offsets": [start, end]}, …, "__metadata__": {…}}
the rest    the tensors, contiguous; offsets count from here
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import AdapterFileError, Faults
from .reading import REPAIR, is_one_line, parse_json, refuse_pointer

HEADER_BYTES = 2**20
"""Size of a header that is always allowed. …"""
HEADER_SHARE = 16
"""… Beyond that, one byte for each 16 bytes of tensors …"""
MAX_HEADER_BYTES = 64 * 2**20
"""… up to this limit."""
MAX_NAME = 1024
"""Maximum characters of a tensor's name."""
MAX_DIMENSIONS = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """One tensor of a file. `start` and `end` count bytes from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    file: Path


@dataclass
class TensorFile:
    """One safetensors file: its tensors in the order of their bytes, and its raw header."""

    path: Path
    entries: list[Entry]
    metadata: dict[str, str] | None
    header: bytes
    size: int


def read_header(file: Path, place: Path | None = None) -> TensorFile:
    """Read the header of a safetensors file, but not its tensors.

    Args:
        place: the name of the file in messages; default: `file`.

    Raises:
        AdapterFileError: lists what is wrong.
    """
    place = place or file
    broken = f"{place} is not a complete safetensors file"
    header, size = _header_bytes(file, place, broken)
    if not header.startswith(b"{"):
        raise AdapterFileError(f"{broken} (its header is not a JSON object). {REPAIR}")
    try:
        values = parse_json(header, f"The header of {place}", most=len(header))
    except AdapterFileError as error:
        raise AdapterFileError(f"{broken}: {error} {REPAIR}") from error
    faults = Faults(broken)
    metadata = values.pop("__metadata__", None)
    if metadata is not None and not _are_texts(metadata):
        faults.add("__metadata__ must map names to strings")
    entries: list[Entry] = []
    begin = 8 + len(header)
    while values:  # frees memory during the loop
        name, value = values.popitem()
        fault = _fault_of_name(name) or _fault_of_entry(value)
        if fault:
            faults.add(f"{name[:100]!r}: {fault}")
        elif not faults.found:
            start, end = (begin + offset for offset in value["data_offsets"])
            entries.append(Entry(name, DTYPES[value["dtype"]], tuple(value["shape"]), start, end, file))
    entries.reverse()
    entries.sort(key=lambda entry: (entry.start, entry.end))
    if not faults.found:
        _check_places(entries, begin, size, faults)
    faults.check(AdapterFileError, REPAIR)
    return TensorFile(place, entries, metadata, header, size)


def _header_bytes(file: Path, place: Path, broken: str) -> tuple[bytes, int]:
    """(the header, the size of the file)."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            behind = size - 8 - length
            if len(start) < 8 or behind < 0:
                refuse_pointer(start + opened.read(56), place)
                raise AdapterFileError(f"{broken} (it ends within its header). {REPAIR}")
            allowed = min(MAX_HEADER_BYTES, HEADER_BYTES + behind // HEADER_SHARE)
            if length > allowed:
                what = f"its header has {length:,} bytes; the maximum for this file is {allowed:,}"
                raise AdapterFileError(f"{broken} ({what}). {REPAIR}")
            return opened.read(length), size
    except OSError as error:
        raise AdapterFileError(f"{place} could not be read ({error}).") from error


def _are_texts(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _fault_of_name(name: str) -> str | None:
    if not name or len(name) > MAX_NAME:
        return f"a name must have 1 to {MAX_NAME} characters"
    if not is_one_line(name):
        return "a name must not have unprintable characters"
    return None


def _fault_of_entry(value: object) -> str | None:
    if not isinstance(value, Mapping) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return "a tensor must have dtype, shape and data_offsets, and nothing else"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {str(dtype)[:40]!r} is not one of {', '.join(DTYPES)}"
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        return f"its shape must be a list of at most {MAX_DIMENSIONS} integers >= 0"
    if not _are_counts(offsets) or len(offsets) != 2:
        return "its data_offsets must be two integers >= 0"
    start, end = offsets
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        return f"{dtype} {shape} does not match its byte range {start} to {end}"
    return None


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_places(entries: Iterable[Entry], begin: int, size: int, faults: Faults) -> None:
    """Check that the tensors are contiguous: each byte after the header belongs to exactly one of them."""
    at, before = begin, "the header"
    for entry in entries:
        if entry.start != at:
            faults.add(f"{entry.name}: {'overlaps with' if entry.start < at else 'leaves a gap to'} {before}")
        at, before = max(at, entry.end), entry.name
    if at > size:
        faults.add(f"its tensors end at byte {at:,}, but the file has {size:,} bytes")
    elif at < size:
        faults.add(f"{size - at:,} bytes at its end belong to no tensor")


def header_of(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """The header of a file with these tensors in this order, without the length field."""
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    place = 0
    for name, dtype, shape in tensors:
        end = place + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)
