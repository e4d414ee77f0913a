"""Complete checkpoints: each has a manifest of its files, and folders that are incomplete are ignored.

Trainer writes a checkpoint file by file, records it as the best, pushes it and deletes older ones. A process that is
killed in between leaves a folder that looks like the newest checkpoint. So a manifest with the size and the SHA-256 of
every file is written last, before older checkpoints are deleted. Resuming checks every file against it; the best model
and the deletion of older checkpoints compare sizes only.

If a checkpoint is written a second time (a run that starts again, a signal right after resuming), the old one is
renamed, and deleted only when the new one is complete.

A plain Trainer writes no manifest. Its folders count as complete if the file that it writes last can be read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ...errors import AdapterFileError
from ...files.format import CONFIG_NAME, WEIGHTS_NAME
from ...safe_io.atomic import finish_moves, is_full, no_space, sync_folder

MANIFEST_NAME = "hf_lora_checkpoint.json"
ASIDE = ".replaced"
"""Suffix of a complete checkpoint that is being replaced."""
_FORMAT = 2  # 1 had only sizes
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)({re.escape(ASIDE)})?$")
_NOT_LISTED = (MANIFEST_NAME, "checkpoint-is-incomplete.txt")
"""The second one is Trainer's marker for a save on SIGTERM, deleted after the manifest is written."""

logger = logging.get_logger(__name__)


def begin_checkpoint(folder: str | Path) -> None:
    """Prepare a checkpoint's folder: rename a complete one that exists, or delete the state in an incomplete one."""
    folder = Path(folder)
    if folder.is_dir() and not why_incomplete(folder):
        shutil.rmtree(_aside(folder), ignore_errors=True)
        folder.rename(_aside(folder))
        sync_folder(folder.parent)
        return
    for pattern in (MANIFEST_NAME, TRAINER_STATE_NAME, "optimizer.*", "scheduler.*", "scaler.*", "rng_state*"):
        for path in filter(Path.is_file, folder.glob(pattern)):
            path.unlink()


@contextlib.contextmanager
def atomic_checkpoint(folder: str | Path, writes: bool = True) -> Iterator[None]:
    """Write a checkpoint within; on an error, the incomplete one is deleted and the one that it replaces is restored.

    Only the process that `writes` the manifest cleans up. If a file cannot be written, an AdapterFileError names it
    and the newest complete checkpoint.
    """
    folder = Path(folder)
    try:
        yield
    except Exception as error:
        if (folder / MANIFEST_NAME).is_file():
            raise  # the checkpoint is complete; the error came later
        latest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns, default=None)
        full, why = is_full(error), no_space(folder.parent)
        if writes:
            _abandon(folder)
        if not full and not isinstance(error, OSError):
            raise
        left = next((p for p in checkpoints(folder.parent) if not why_incomplete(p)), None)
        intact = f"{left} is complete and intact; resume from it" if left else "No complete checkpoint is left"
        named = f", at {latest.relative_to(folder)}" if latest else ""
        raise AdapterFileError(
            f"Saving {folder}: it could not be written{named}{f', because {why}' if full else ''} ({error}). The "
            f"incomplete checkpoint was deleted. {intact}. Free space, set save_total_limit or use another output_dir."
        ) from error


def finish_checkpoint(folder: str | Path, step: int, fields: Mapping[str, object] | None = None) -> None:
    """Write the manifest, after every file of all processes; then delete the checkpoint that was replaced.

    Args:
        fields: further content of the manifest; see fields.py.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path, sync=True)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_LISTED
    }
    for inner in {folder, *(folder / name for name in files)}:
        if inner.is_dir():
            sync_folder(inner)
    content: dict[str, object] = {"format": _FORMAT, "step": step, "files": files, **(fields or {})}
    content["seal"] = _seal(content)
    aside = folder / (MANIFEST_NAME + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / MANIFEST_NAME)
    sync_folder(folder)
    sync_folder(folder.parent)
    shutil.rmtree(_aside(folder), ignore_errors=True)


def finish_copy(folder: Path) -> None:
    """Write the manifest of a copied checkpoint again, for the files that were copied."""
    content = read_manifest(folder)
    if content is not None:
        own = ("format", "step", "files", "seal")
        finish_checkpoint(folder, content["step"], {k: v for k, v in content.items() if k not in own})


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest's content, or None if there is none; AdapterFileError if it cannot be read."""
    path = Path(folder, MANIFEST_NAME)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content["files"], dict):
            raise ValueError("it lists no files")
        if content.get("format", 1) != 1 and content["seal"] != _seal(content):
            raise ValueError("its content was changed")
    except (ValueError, KeyError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    return content


def why_incomplete(folder: str | Path, contents: bool = False) -> list[str]:
    """What is missing, truncated or changed in a checkpoint folder; an empty list if it is complete.

    Compares sizes and, with `contents`, every byte.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["the folder does not exist"]
    try:
        manifest = read_manifest(folder)
    except AdapterFileError as error:
        return [str(error)]
    if manifest is not None:
        found = ((name, _file_fault(folder / name, entry, contents)) for name, entry in manifest["files"].items())
        return [f"{name} {fault}" for name, fault in found if fault]
    adapters = adapter_folders(folder)
    faults = [f"no {WEIGHTS_NAME} in {path}" for path in adapters if not (path / WEIGHTS_NAME).is_file()]
    if not adapters:
        faults.append(f"no {CONFIG_NAME}")
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        faults.append(f"no {TRAINER_STATE_NAME}, which is written last")
    except ValueError:
        faults.append(f"{TRAINER_STATE_NAME} is truncated")
    if contents and not faults:
        faults += [
            f"{path.name} is truncated or changed" for path in sorted(folder.glob("*.pt*")) if _is_damaged(path)
        ]
    return faults


def adapter_folders(folder: str | Path) -> list[Path]:
    """The folders with adapters in a saved folder: itself and its subfolders."""
    folder = Path(folder)
    found = [folder, *(sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ())]
    for path in found:
        with contextlib.suppress(OSError):  # reading it later reports the error
            finish_moves(path)
    return [path for path in found if (path / CONFIG_NAME).is_file()]


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-*` that is complete (every byte is checked), or None; warns about newer ones."""
    skipped: list[str] = []
    chosen = None
    for folder in checkpoints(output_dir):
        faults = why_incomplete(folder, contents=True)
        if not faults and folder.name.endswith(ASIDE):  # counts only if it was not replaced
            faults = [f"{later.name} was written after it" for later in _written_after(folder)[:1]]
        if not faults:
            chosen = folder
            break
        skipped.append(f"  - {folder}: {'; '.join(faults)}")
    if skipped:
        then = f"Resuming from {chosen}." if chosen else "No complete checkpoint is left."
        logger.warning("\n".join(["These checkpoints are not complete and are skipped:", *skipped, then]))
    later = [path for path in _written_after(chosen) if not path.name.endswith(ASIDE)] if chosen else []
    if later:
        logger.warning(
            f"Resuming from {chosen}, which has the highest step, but {later[0]} was written later. If the first is "
            "from an earlier run, pass the second one, and use a separate folder for each run."
        )
    return str(chosen) if chosen else None


def checkpoint_to_resume(requested: str | bool | None, output_dir: str) -> str | None:
    """The folder that `train(resume_from_checkpoint=requested)` resumes from; AdapterFileError if it is incomplete."""
    found = last_checkpoint(output_dir) if requested is True else requested or None
    if found is None and requested:
        raise AdapterFileError(
            f"train(resume_from_checkpoint=True): no complete checkpoint in {output_dir}. Call train() to start from "
            "the beginning."
        )
    if found is not None and requested is not True:
        require_complete(found, contents=True)
    return found


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-*` folders in `output_dir`, the highest step first; a replaced one comes after its successor."""
    found = [
        (int(match[1]), match[2] is None, path)
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := _CHECKPOINT.match(path.name)) and path.is_dir()
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def rotate_checkpoints(
    output_dir: str | Path,
    save_total_limit: int | None = None,
    best_model_checkpoint: str | Path | None = None,
    newest: str | Path | None = None,
) -> None:
    """Delete older checkpoints and keep `save_total_limit` complete ones (None or below 1: keep all).

    Incomplete ones do not count, and are deleted with complete ones of their age. The best one and the `newest`
    (default: the last one written) are always kept.
    """
    if save_total_limit is None or save_total_limit < 1:
        return
    just = Path(newest) if newest is not None else None
    # Sorted by time and not by step: the folder may hold an earlier run with more steps.
    ordered = sorted(checkpoints(output_dir), key=lambda p: (p == just, *_written(p)), reverse=True)
    complete = [path for path in ordered if not why_incomplete(path)]
    replaced = [_aside(path) for path in complete]
    complete = [path for path in complete if path not in replaced]
    if not complete:
        return
    best = Path(best_model_checkpoint).resolve() if best_model_checkpoint else None
    best = next((path for path in complete if path.resolve() == best), None)
    kept = {complete[0], best or complete[0]}
    kept |= set([path for path in complete if path not in kept][: max(0, save_total_limit - len(kept))])
    oldest = max(ordered.index(path) for path in kept if path != best or len(kept) == 1)
    for i, path in enumerate(ordered):
        if path not in kept and (path in complete or i > oldest):
            shutil.rmtree(path, ignore_errors=True)


def require_complete(folder: str | Path, contents: bool = False) -> None:
    """Refuse a checkpoint that is not complete (with `contents`: to the byte), and name another one that is."""
    faults = why_incomplete(folder, contents)
    if faults:
        others = other_complete(folder, contents)
        advice = "The folder has no other complete checkpoint; start again, or load its adapter with load_adapter."
        advice = f"Resume from {others[0]} instead, the newest complete one." if others else advice
        lines = [f"{folder} is not a complete checkpoint:", *(f"  - {fault}" for fault in faults), advice]
        raise AdapterFileError("\n".join(lines))


def other_complete(folder: str | Path, contents: bool = False) -> list[Path]:
    """The other complete checkpoints in the same folder, the newest first."""
    return [p for p in checkpoints(Path(folder).parent) if p != Path(folder) and not why_incomplete(p, contents)]


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ASIDE)


def _written_after(folder: Path) -> list[Path]:
    """The complete checkpoints in the same folder that were finished later."""
    return [p for p in checkpoints(folder.parent) if _written(p)[0] > _written(folder)[0] and not why_incomplete(p)]


def _abandon(folder: Path) -> None:
    """Delete an incomplete checkpoint, and restore the one that it would have replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    if _aside(folder).is_dir() and not folder.exists():
        _aside(folder).rename(folder)
    if folder.parent.is_dir():
        sync_folder(folder.parent)


def _written(folder: Path) -> tuple[float, int]:
    """When a checkpoint was finished, and its step in case times are equal."""
    marks = [path.stat().st_mtime for name in (MANIFEST_NAME, TRAINER_STATE_NAME) if (path := folder / name).is_file()]
    match = _CHECKPOINT.match(folder.name)
    return (marks or [folder.stat().st_mtime])[0], int(match[1]) if match else 0


def _file_fault(path: Path, entry: int | Mapping[str, Any], contents: bool) -> str | None:
    size, digest = (entry, None) if isinstance(entry, int) else (entry["size"], entry["sha256"])
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    if found != size:
        return f"has {found} of {size} bytes"
    if contents and digest is not None and _sha256(path) != digest:
        return "has changed: its SHA-256 differs"
    return None


def _sha256(path: Path, sync: bool = False) -> str:
    if sync:
        with open(path, "rb+") as file:  # Windows syncs no file that is open for reading alone
            os.fsync(file.fileno())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Mapping[str, object]) -> str:
    """A hash of the manifest itself."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_damaged(path: Path) -> bool:
    """Whether a file of torch.save, which is a zip archive, fails its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True
