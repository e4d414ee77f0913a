"""Reading untrusted files: which files are opened, and JSON with limits.

An adapter's folder may come from anyone. Only JSON and safetensors are read from it, names and links cannot point
outside it, and each size is checked before memory is allocated. This module does not interpret the files.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import unicodedata
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from ..errors import AdapterFileError

MAX_JSON_BYTES = 4 * 2**20
"""Limit for adapter_config.json and hf_lora.json. Those of the largest models are a few hundred kB."""
MAX_JSON_VALUES = 250_000
MAX_JSON_DEPTH = 32
REPAIR = "Copy or download it again."

_BREAKS = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
_JSON_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)


def is_one_line(text: str) -> bool:
    """Whether a text can be shown in a line: no control characters, line ends, lone surrogates or turned direction.

    `str.isprintable` also refuses spaces and joiners that names in many languages have.
    """
    return text.isprintable() or not any(
        unicodedata.category(c) in _BREAKS or unicodedata.bidirectional(c) in _TURNS for c in text
    )


def is_name(name: object) -> TypeGuard[str]:
    """Whether it is a valid file name without folders."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def own_file(folder: Path, name: str) -> Path | None:
    """A file of a folder, with links resolved; None if it does not exist.

    Raises:
        AdapterFileError: it is outside the folder, or not a regular file. In the Hub's cache, links to its blobs are
            allowed.
    """
    if not is_name(name):
        raise AdapterFileError(f"{folder}: {name!r} is not the name of a file in this folder. {REPAIR}")
    place = folder / name
    try:
        if not os.path.lexists(place):
            return None
        target, home = place.resolve(strict=True), folder.resolve(strict=True)
        if not target.is_relative_to(home) and target.parent not in _blobs(home):
            raise AdapterFileError(
                f"{place} is a link that points outside its folder, to {target}. If you trust it, copy the file there."
            )
        if not stat.S_ISREG(target.stat().st_mode):
            raise AdapterFileError(f"{place} is not a regular file. {REPAIR}")
    except (OSError, RuntimeError, ValueError) as error:  # a broken link, a cycle of links, a NUL in the path
        if isinstance(error, AdapterFileError):
            raise
        if isinstance(error, FileNotFoundError) and not os.path.lexists(place):
            return None  # another process has just moved it
        raise AdapterFileError(f"{place} could not be opened ({error}). {REPAIR}") from error
    return target


def own_folder(folder: Path, subfolder: str) -> Path:
    """A subfolder, which may not exist.

    Raises:
        AdapterFileError: a link in its path points outside the folder.
    """
    inside = folder / subfolder
    try:
        target = inside.resolve()
        out = not target.is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # a cycle of links, a NUL in the path
        raise AdapterFileError(f"{inside} could not be opened ({error}). {REPAIR}") from error
    if out:
        raise AdapterFileError(
            f"{inside} is a link that points outside its folder, to {target}. If you trust it, name the target."
        )
    return inside


def _blobs(home: Path) -> list[Path]:
    """The blob folders of the Hub's cache for a folder `<repository>/snapshots/<commit>[/…]`."""
    return [
        parent.parent / "blobs"
        for child, parent in zip((home, *home.parents), home.parents, strict=False)
        if parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", child.name)
    ]


def read_json(folder: Path, name: str) -> dict[str, Any] | None:
    """The object in a JSON file of a folder; None if there is no such file.

    Raises:
        AdapterFileError: it is not a JSON object, too large, nested too deeply, or has a duplicate name.
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
        raise AdapterFileError(f"{place} could not be read ({error}).") from error
    refuse_pointer(data, place)
    if len(data) > MAX_JSON_BYTES:
        raise AdapterFileError(f"{place} is larger than {MAX_JSON_BYTES:,} bytes, the limit for a file of an adapter.")
    values = parse_json(data, str(place))
    if not isinstance(values, dict):
        raise AdapterFileError(f"{place} contains {type(values).__name__}, not an object.")
    return values


def refuse_pointer(data: bytes, place: Path | str) -> None:
    """Refuse what a clone without Git LFS has in the place of a file.

    Raises:
        AdapterFileError: `data` is the beginning of such a pointer.
    """
    if data.startswith(b"version https://git-lfs.github.com/"):
        raise AdapterFileError(f"{place} is a pointer of Git LFS, not the file. Run git lfs pull in its repository.")


def parse_json(data: bytes, place: str, most: int = MAX_JSON_VALUES) -> Any:
    """Parse strict JSON in UTF-8: no NaN, no duplicate names in an object, and at most `most` values."""
    depth = values = 0
    for token in _JSON_TOKENS.finditer(data):
        sign = token[0]
        depth += (sign in b"[{") - (sign in b"]}")
        values += sign in b"[{,"
        if depth > MAX_JSON_DEPTH or values > most:
            what = f"has more than {MAX_JSON_DEPTH} levels" if values <= most else f"has more than {most:,} values"
            raise AdapterFileError(f"{place} {what}, the limit for a file of an adapter.")
    try:
        text = data.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # a lone surrogate cannot be encoded
    except (ValueError, RecursionError) as error:
        raise AdapterFileError(f"{place} is not valid JSON ({error}).") from error
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} is listed twice in an object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:40]} is too large for a float")
    return value
