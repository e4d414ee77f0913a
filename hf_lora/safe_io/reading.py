"""Reading the files of strangers: what is opened, how much of it, and what it may say.

An adapter's folder may come from anyone. Only JSON and safetensors are read from it, no name and no link leads out of
it, and each size is bounded before memory is taken for it. Nothing here knows what the files mean.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..errors import AdapterFileError, Faults

MAX_JSON_BYTES = 4 * 2**20
"""Of adapter_config.json and hf_lora.json. Those of the largest models are a few hundred kB."""
MAX_JSON_VALUES = 250_000
MAX_JSON_DEPTH = 32
HEADER_BYTES = 2**20
"""A safetensors header may have so many bytes in any case …"""
HEADER_SHARE = 16
"""… and beyond that one for each 16 bytes of tensors …"""
MAX_HEADER_BYTES = 64 * 2**20
"""… up to here."""
MAX_NAME = 1024
"""Characters of a tensor's name."""
MAX_DIMENSIONS = 8

BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""The dtypes that an adapter may hold: those of factors and heads, and of a head's counters."""
FLOATS = ("F64", "F32", "F16", "BF16")
REPAIR = "Copy or download it again."

_JSON_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors header; its bytes are counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def is_name(name: Any) -> bool:
    """Whether it can name a file in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def own_file(folder: Path, name: str) -> Path | None:
    """A file of a folder, with links resolved; None where there is none.

    Raises:
        AdapterFileError: it lies outside the folder, or is no regular file. The blobs of the Hub's cache, which its
            snapshots consist of links to, belong to the folder.
    """
    if not is_name(name):
        raise AdapterFileError(f"{folder}: {name!r} is no name of a file in this folder. {REPAIR}")
    place = folder / name
    try:
        if not os.path.lexists(place):
            return None
        target, home = place.resolve(strict=True), folder.resolve(strict=True)
        if not target.is_relative_to(home) and target.parent not in _blobs(home):
            raise AdapterFileError(
                f"{place} is a link that leads out of its folder, to {target}. If it is yours, put the file itself "
                "there."
            )
        if not stat.S_ISREG(target.stat().st_mode):
            raise AdapterFileError(f"{place} is no regular file. {REPAIR}")
    except (OSError, RuntimeError, ValueError) as error:  # a broken link, a circle of links, a NUL in the path
        if isinstance(error, AdapterFileError):
            raise
        if isinstance(error, FileNotFoundError) and not os.path.lexists(place):
            return None  # another process has just moved it
        raise AdapterFileError(f"{place} cannot be opened ({error}). {REPAIR}") from error
    return target


def own_folder(folder: Path, subfolder: str) -> Path:
    """A folder in a folder, which need not be there.

    Raises:
        AdapterFileError: a link leads out of the folder on the way.
    """
    inside = folder / subfolder
    try:
        target = inside.resolve()
        out = not target.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a NUL in the path
        raise AdapterFileError(f"{inside} cannot be opened ({error}). {REPAIR}") from error
    if out:
        raise AdapterFileError(
            f"{inside} is a link that leads out of its folder, to {target}. If it is yours, name that."
        )
    return inside


def _blobs(home: Path) -> list[Path]:
    """Where the Hub's cache keeps the contents for a folder `<repository>/snapshots/<commit>[/…]`."""
    return [
        parent.parent / "blobs"
        for child, parent in zip((home, *home.parents), home.parents, strict=False)
        if parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", child.name)
    ]


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a folder; None where there is no such file.

    Raises:
        AdapterFileError: it is no JSON object, too large, nested too deep, or says a thing twice.
    """
    file = own_file(folder, name)
    if file is None:
        return None
    place = folder / name
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:  # another process has just moved it
        return None
    except OSError as error:
        raise AdapterFileError(f"{place} cannot be read ({error}).") from error
    if len(data) > MAX_JSON_BYTES:
        raise AdapterFileError(f"{place} has more than {MAX_JSON_BYTES:,} bytes: it is no file of an adapter.")
    values = parse_json(data, str(place))
    if not isinstance(values, dict):
        raise AdapterFileError(f"{place} holds {type(values).__name__}, not an object.")
    return values


def parse_json(data: bytes, place: str, most: int = MAX_JSON_VALUES) -> Any:
    """JSON as its standard has it, in UTF-8: no NaN, no name twice in an object, and no more than `most` values."""
    depth = values = 0
    for token in _JSON_TOKENS.finditer(data):
        sign = token[0]
        depth += (sign in b"[{") - (sign in b"]}")
        values += sign in b"[{,"
        if depth > MAX_JSON_DEPTH or values > most:
            what = (
                f"is nested more than {MAX_JSON_DEPTH} deep" if values <= most else f"holds more than {most:,} values"
            )
            raise AdapterFileError(f"{place} {what}: it is no file of an adapter.")
    try:
        text = data.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a character cannot be shown or written again
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{place} is not JSON ({error}).") from error
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} stands twice in an object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is larger than any number that can be held")
    return value


def read_header(file: Path, place: Path) -> dict[str, Entry]:
    """The header of a safetensors file, of which every claim holds; the tensors are not touched.

    Args:
        place: how the file is called in messages.

    Raises:
        AdapterFileError: lists what is wrong.
    """
    broken = f"{place} is not a whole safetensors file"
    data, behind = _header_bytes(file, place, broken)
    if not data.startswith(b"{"):
        raise AdapterFileError(f"{broken} (its header is no JSON object). {REPAIR}")
    try:
        values = parse_json(data, f"The header of {place}", most=len(data))
    except AdapterFileError as error:
        raise AdapterFileError(f"{broken}: {error} {REPAIR}") from error
    del data
    faults = Faults(broken)
    _check_metadata(values.pop("__metadata__", None), faults)
    entries: dict[str, Entry] = {}
    while values:
        name, value = values.popitem()
        fault = _fault_of_name(name) or _fault_of_entry(value)
        if fault:
            faults.add(f"{name[:100]!r}: {fault}")
        elif not faults.found:
            dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
            entries[name] = Entry(dtype, tuple(shape), begin, end)
    if not faults.found:
        _check_places(entries, behind, faults)
    faults.check(AdapterFileError, REPAIR)
    return dict(reversed(entries.items()))


def _header_bytes(file: Path, place: Path, broken: str) -> tuple[bytes, int]:
    """(the header, how many bytes follow it)."""
    try:
        with open(file, "rb") as opened:
            size = os.fstat(opened.fileno()).st_size
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            behind = size - 8 - length
            if len(start) < 8 or behind < 0:
                raise AdapterFileError(f"{broken} (it ends in its header). {REPAIR}")
            allowed = min(MAX_HEADER_BYTES, HEADER_BYTES + behind // HEADER_SHARE)
            if length > allowed:
                what = f"its header has {length:,} bytes, at most {allowed:,} here"
                raise AdapterFileError(f"{broken} ({what}). {REPAIR}")
            return opened.read(length), behind
    except OSError as error:
        raise AdapterFileError(f"{place} cannot be read ({error}).") from error


def _check_metadata(metadata: Any, faults: Faults) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        faults.add("__metadata__ must map names to texts")


def _fault_of_name(name: str) -> str | None:
    if not name or len(name) > MAX_NAME:
        return f"a name has from 1 to {MAX_NAME} characters"
    if not name.isprintable():
        return "a name with characters that cannot be shown"
    return None


def _fault_of_entry(value: Any) -> str | None:
    if not isinstance(value, Mapping) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return "a tensor has dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES_OF:
        return f"dtype {str(dtype)[:40]!r} is not one of {', '.join(BYTES_OF)}"
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        return f"its shape must be a list of at most {MAX_DIMENSIONS} whole numbers"
    if not _are_counts(offsets) or len(offsets) != 2:
        return "its data_offsets must be two whole numbers"
    if 0 in shape:
        return f"it is empty ({shape})"
    begin, end = offsets
    if end - begin != math.prod(shape) * BYTES_OF[dtype]:
        return f"{dtype} {shape} does not fill its bytes {begin} to {end}"
    return None


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_places(entries: Mapping[str, Entry], size: int, faults: Faults) -> None:
    """Tensors lie end to end: each byte behind the header belongs to one of them."""
    at, before = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin != at:
            faults.add(f"{name}: {'overlaps with' if entry.begin < at else 'leaves a gap to'} {before}")
        at, before = max(at, entry.end), name
    if at > size:
        faults.add(f"its tensors reach to byte {at:,} of {size:,}")
    elif at < size and entries:
        faults.add(f"{size - at:,} bytes at its end belong to no tensor")
