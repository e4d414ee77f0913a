"""Replace several files together, or none.

Each file is written under a temporary name in the same folder. Once all are complete and synced to disk, a journal of
the renames is written: from then on the new files count, and the next reader of the folder finishes interrupted
renames. Before that the old files count. So a process may be killed at any time, and a mixture of old and new files
is never read.
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
"""Seconds after which a temporary file is assumed to be left by a killed process."""
_PROBE = 2**20
"""Number of bytes that a folder must take to count as writable."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = (
    *(os.strerror(code).lower() for code in _FULL),
    *("pytorchstreamwriter failed", "inline_container.cc", "iostream error"),  # torch's texts
)


def replace_together(
    folder: Path, writers: Mapping[str, Callable[[Path], object]], ready: Mapping[str, Path] | None = None
) -> None:
    """Let each writer write a temporary file; once all are complete and synced to disk, rename them.

    Args:
        ready: name -> a complete and synced file with a name from `temporary_name`. It is renamed with the others, and
            before them; if they cannot be written, it is kept.

    Raises:
        AdapterFileError: no space is left; existing files are unchanged, and no partial file is left.
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
            staged[name] = _new_temporary(folder, name)
            write(staged[name])
            with staged[name].open("rb+") as file:  # Windows syncs no file that is open for reading alone
                os.fsync(file.fileno())
            staged[name].chmod(0o666 & ~umask)
        name = JOURNAL_NAME
        staged[name] = _new_temporary(folder, name)
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
                f"{folder}: {name} could not be written, since {no_space(folder)} ({error}). No partial file is left, "
                "and existing files are unchanged. Free space or name another folder, and save again."
            ) from error
        raise
    sync_folder(folder)
    try:
        finish_moves(folder)
    except OSError:
        if all(path.exists() for path in (*ready.values(), *staged.values())):  # none was renamed: the old files count
            (folder / JOURNAL_NAME).unlink(missing_ok=True)
            for left in staged.values():
                left.unlink(missing_ok=True)
        raise


def finish_moves(folder: str | os.PathLike[str]) -> None:
    """Finish the renames of an interrupted save, if there was one.

    Several processes may do so at once.

    Raises:
        AdapterFileError: the journal was not written by this module.
        OSError: the folder cannot be written.
    """
    path = Path(folder)
    journal = path / JOURNAL_NAME
    moves = read_json(path, JOURNAL_NAME)
    if moves is None:
        return
    if not all(is_name(name) and _is_temporary(source, name) for name, source in moves.items()):
        raise AdapterFileError(f"{journal} names unexpected files. Copy or save the adapter again.")
    for name, source in moves.items():
        with contextlib.suppress(FileNotFoundError):  # renamed before the interruption, or by another process
            (path / source).replace(path / name)
    sync_folder(path)
    journal.unlink(missing_ok=True)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Sync the names in a folder to disk, if the system supports it."""
    with contextlib.suppress(OSError):  # not every file system can
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_full(error: BaseException | None) -> bool:
    """Whether a write failed because the disk, the quota or the maximum file size is exhausted.

    safetensors raises an error with the system's text, torch one with other texts.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error).lower() for text in _FULL_TEXTS):
            return True
        error = error.__cause__
    return False


def no_space(folder: str | os.PathLike[str]) -> str:
    """The text "no space is left", with the free space."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return "no space is left"
    return f"no space is left ({usage.free / 2**20:.1f} of {usage.total / 2**20:.1f} MiB are free)"


def why_not_writable(folder: Path) -> str | None:
    """Why no file can be written below a folder, which need not exist; None if one can. Nothing is left there."""
    place = folder
    try:
        while not os.path.lexists(place) and place != place.parent:
            place = place.parent
        if not place.is_dir():
            return f"{place} is a file" if place.exists() else f"{place} is a link to nothing"
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_PROBE))
            file.flush()
            os.fsync(file.fileno())
        longest = max(folder.absolute().parts, key=lambda part: len(os.fsencode(part)))
        if hasattr(os, "pathconf") and len(os.fsencode(longest)) > os.pathconf(place, "PC_NAME_MAX"):
            return "the name is too long"
    except ValueError:
        return "the name holds a null character"
    except OSError as error:
        return no_space(place) if is_full(error) else f"it cannot be written ({error.strerror or error})"
    return None


def temporary_name(name: str, middle: str) -> str:
    """The temporary name of a file."""
    return f".{name.lstrip('.')}.{middle}.tmp"


def _is_temporary(temporary: object, name: str) -> bool:
    """Whether this may be a name from `temporary_name`."""
    return is_name(temporary) and temporary.startswith(f".{name.lstrip('.')}.") and temporary.endswith(".tmp")


def _new_temporary(folder: Path, name: str) -> Path:
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name.lstrip('.')}.", suffix=".tmp")
    os.close(handle)
    return Path(temporary)


def _sweep(folder: Path, names: Mapping[str, Any]) -> None:
    """Remove temporary files left by processes that were killed long ago."""
    for name in names:
        for left in folder.glob(f".{name}.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
