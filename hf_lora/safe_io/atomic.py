"""Several files that take their places together, or not at all.

Each file is written beside its place. Once all are whole and on the disk, a journal that names the moves is written:
from then on the new files count, and whoever reads the folder next finishes moves that were cut off. Before that the
old files count. So a process may be killed at any moment, and no mixture of old and new is ever read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterFileError
from .reading import is_name, read_json

JOURNAL_NAME = ".hf_lora_moves.json"
_STALE = 3600.0
"""After so many seconds a half-written file beside its place is taken for that of a process that was killed."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (
    *(os.strerror(code).lower() for code in _FULL),
    *("pytorchstreamwriter failed", "inline_container.cc", "iostream error"),  # torch's own texts
)


def replace_together(
    folder: Path, writers: Mapping[str, Callable[[Path], Any]], ready: Mapping[str, Path] | None = None
) -> None:
    """Let each writer make its file beside its place; once all are whole and on the disk, move them there.

    Args:
        ready: name -> a file of `beside_name` that is whole and on the disk already. It moves with the others, and
            before them; if they cannot be written, it stays where it is.

    Raises:
        AdapterFileError: no space is left; the files that were there are unchanged, and nothing half-written is left.
    """
    finish_moves(folder)
    _sweep(folder, writers)
    ready = ready or {}
    staged: dict[str, Path] = {}
    umask = os.umask(0)
    os.umask(umask)
    name = JOURNAL_NAME
    try:
        for name, write in writers.items():
            staged[name] = _beside(folder, name)
            write(staged[name])
            with staged[name].open("rb") as file:
                os.fsync(file.fileno())
            staged[name].chmod(0o666 & ~umask)
        name = JOURNAL_NAME
        staged[name] = _beside(folder, name)
        with staged[name].open("w", encoding="utf-8") as text:
            moves = {**ready, **staged}
            json.dump({place: path.name for place, path in moves.items() if place != JOURNAL_NAME}, text)
            text.flush()
            os.fsync(text.fileno())
        staged.pop(name).rename(folder / name)
    except BaseException as error:
        for left in staged.values():
            left.unlink(missing_ok=True)
        if isinstance(error, Exception) and is_full(error):
            raise AdapterFileError(
                f"{folder}: {name} cannot be written, since {no_space(folder)} ({error}). Nothing half-written is "
                "left, and files that were there are unchanged. Free space or name another folder, and save again."
            ) from error
        raise
    sync_folder(folder)
    try:
        finish_moves(folder)
    except OSError:
        if all(path.exists() for path in (*ready.values(), *staged.values())):  # none was moved: the old files count
            (folder / JOURNAL_NAME).unlink(missing_ok=True)
            for left in staged.values():
                left.unlink(missing_ok=True)
        raise


def finish_moves(folder: str | os.PathLike[str]) -> None:
    """Finish the moves of a save that was cut off during them, if there was one.

    Several processes may do so at once.

    Raises:
        AdapterFileError: the journal is not one of ours.
        OSError: the folder cannot be written.
    """
    path = Path(folder)
    journal = path / JOURNAL_NAME
    moves = read_json(path, JOURNAL_NAME)
    if moves is None:
        return
    if not all(is_name(name) and _is_beside(beside, name) for name, beside in moves.items()):
        raise AdapterFileError(f"{journal} names files that are not its own. Copy or save the adapter again.")
    for name, beside in moves.items():
        with contextlib.suppress(FileNotFoundError):  # moved before the cut, or by another process
            (path / beside).replace(path / name)
    sync_folder(path)
    journal.unlink(missing_ok=True)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Write the names in a folder to the disk, where the system can do so."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed because the disk, the quota or the largest size of a file is used up.

    safetensors raises an error with the system's text, and torch one with a text of its own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error).lower() for text in _FULL_TEXTS):
            return True
        error = error.__cause__
    return False


def no_space(folder: str | os.PathLike[str]) -> str:
    """The text "no space is left", with what the system says is free."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return "no space is left"
    return f"no space is left ({usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB are free)"


def beside_name(name: str, middle: str) -> str:
    """What a file is called while it waits beside its place."""
    return f".{name.lstrip('.')}.{middle}.tmp"


def _is_beside(beside: Any, name: str) -> bool:
    """Whether `beside_name` may have made this name."""
    return is_name(beside) and beside.startswith(f".{name.lstrip('.')}.") and beside.endswith(".tmp")


def _beside(folder: Path, name: str) -> Path:
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name.lstrip('.')}.", suffix=".tmp")
    os.close(handle)
    return Path(temporary)


def _sweep(folder: Path, names: Mapping[str, Any]) -> None:
    """Remove what a process that was killed long ago left half-written."""
    for name in names:
        for left in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
