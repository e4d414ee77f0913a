"""Checkpoints that are complete or do not count.

Trainer writes a checkpoint file by file, records it as the best, pushes it and deletes older ones. A process that is
killed in between leaves a folder that looks like the newest checkpoint. So a manifest with the size and the SHA-256 of
every file is written as the last one, before older checkpoints are deleted. Whoever resumes looks at it first and
reads every file against it; the best model and the deletion of older checkpoints look at sizes.

A checkpoint that is written a second time (a run that starts again, a signal right after resuming) is set aside, and
goes only when the new one is complete.

An unmodified Trainer writes no manifest. Its folders count if the file that it writes last can be read.
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
"""Ends the name of a complete checkpoint whose place is being written again."""
_FORMAT = 2  # 1 had sizes alone
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)({re.escape(ASIDE)})?$")
_NOT_LISTED = (MANIFEST_NAME, "checkpoint-is-incomplete.txt")
"""The second one is Trainer's mark around a save on SIGTERM: it goes after the manifest is written."""

logger = logging.get_logger(__name__)


def begin_checkpoint(folder: str | Path) -> None:
    """Make room for a checkpoint: a complete one in its place is set aside, an incomplete one loses its state."""
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
    """Around the writing of a checkpoint: where it fails, what is half-written goes and what it replaces comes back.

    Only the process that `writes` the manifest cleans up. A file that cannot be written is an AdapterFileError, which
    names it and the newest complete checkpoint.
    """
    folder = Path(folder)
    try:
        yield
    except Exception as error:
        if (folder / MANIFEST_NAME).is_file():
            raise  # it is complete; what failed came afterwards
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
            f"Saving {folder}: it cannot be written{named}{f', since {why}' if full else ''} ({error}). What was "
            f"half-written is removed. {intact}. Free space, set save_total_limit, or name another output_dir."
        ) from error


def finish_checkpoint(folder: str | Path, step: int, fields: Mapping[str, Any] | None = None) -> None:
    """Write the manifest, when every file of all processes is there; what the checkpoint replaces goes.

    Args:
        fields: what else the manifest says; see fields.py.
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
    content: dict[str, Any] = {"format": _FORMAT, "step": step, "files": files, **(fields or {})}
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
    """Write the manifest of a copied checkpoint again, over the files that were copied."""
    content = read_manifest(folder)
    if content is not None:
        own = ("format", "step", "files", "seal")
        finish_checkpoint(folder, content["step"], {k: v for k, v in content.items() if k not in own})


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest's content, or None where there is none; AdapterFileError where it cannot be read."""
    path = Path(folder, MANIFEST_NAME)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content["files"], dict):
            raise ValueError("it lists no files")
        if content.get("format", 1) != 1 and content["seal"] != _seal(content):
            raise ValueError("its content is not what was written")
    except (ValueError, KeyError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    return content


def why_incomplete(folder: str | Path, contents: bool = False) -> list[str]:
    """What is missing, cut short or changed in a checkpoint folder; an empty list where it is complete.

    Sizes are compared and, with `contents`, every byte.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return ["there is no such folder"]
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
        faults.append(f"no {TRAINER_STATE_NAME}, which is written after all else")
    except ValueError:
        faults.append(f"{TRAINER_STATE_NAME} is cut short")
    if contents and not faults:
        faults += [f"{path.name} is cut short or changed" for path in sorted(folder.glob("*.pt*")) if _is_torn(path)]
    return faults


def adapter_folders(folder: str | Path) -> list[Path]:
    """The folders of the adapters in a saved folder: itself, and those below it that bear an adapter's name."""
    folder = Path(folder)
    found = [folder, *(sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ())]
    for path in found:
        with contextlib.suppress(OSError):  # it is read all the same, and says then what is wrong
            finish_moves(path)
    return [path for path in found if (path / CONFIG_NAME).is_file()]


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-*` that is complete to the byte, or None; a warning names newer ones that are not."""
    skipped: list[str] = []
    chosen = None
    for folder in checkpoints(output_dir):
        faults = why_incomplete(folder, contents=True)
        if not faults and folder.name.endswith(ASIDE):  # it counts only while nothing has taken its place
            faults = [f"{later.name} was written after it" for later in _written_after(folder)[:1]]
        if not faults:
            chosen = folder
            break
        skipped.append(f"  - {folder}: {'; '.join(faults)}")
    if skipped:
        then = f"Going on from {chosen}." if chosen else "No complete checkpoint is left."
        logger.warning("\n".join(["These checkpoints are not complete and are skipped:", *skipped, then]))
    later = [path for path in _written_after(chosen) if not path.name.endswith(ASIDE)] if chosen else []
    if later:
        logger.warning(
            f"{chosen} has the highest step and is resumed from, but {later[0]} was written after it: is it of an "
            "earlier run? Then name the other, and give each run a folder of its own."
        )
    return str(chosen) if chosen else None


def checkpoint_to_resume(asked: str | bool | None, output_dir: str) -> str | None:
    """The folder that `train(resume_from_checkpoint=asked)` resumes from; AdapterFileError if it is incomplete."""
    found = last_checkpoint(output_dir) if asked is True else asked or None
    if found is None and asked:
        raise AdapterFileError(
            f"train(resume_from_checkpoint=True): there is no complete checkpoint in {output_dir}. Call train() to "
            "start from the beginning."
        )
    if found is not None and asked is not True:
        require_complete(found, contents=True)
    return found


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-*` folders in `output_dir`, the highest step first; one set aside comes after its successor."""
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
    """Delete older checkpoints but for `save_total_limit` complete ones (None or below 1: all stay).

    Incomplete ones keep no place, and go with the complete ones of their age. The best one and the `newest` (default:
    the one that was written last) stay in any case.
    """
    if save_total_limit is None or save_total_limit < 1:
        return
    just = Path(newest) if newest is not None else None
    # By the time of writing and not by step: the folder may hold an earlier run of more steps.
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
    """Refuse a checkpoint that is not complete (with `contents`: to the byte), and name one beside it that is."""
    faults = why_incomplete(folder, contents)
    if faults:
        others = complete_beside(folder, contents)
        advice = "No complete checkpoint lies beside it; start again, or load its adapter with load_adapter."
        advice = f"Resume from {others[0]} instead, the newest complete one." if others else advice
        lines = [f"{folder} is not a complete checkpoint:", *(f"  - {fault}" for fault in faults), advice]
        raise AdapterFileError("\n".join(lines))


def complete_beside(folder: str | Path, contents: bool = False) -> list[Path]:
    """The other complete checkpoints in the same place, the newest first."""
    return [p for p in checkpoints(Path(folder).parent) if p != Path(folder) and not why_incomplete(p, contents)]


def _aside(folder: Path) -> Path:
    return folder.with_name(folder.name + ASIDE)


def _written_after(folder: Path) -> list[Path]:
    """The complete checkpoints in the same place that were finished later."""
    return [p for p in checkpoints(folder.parent) if _written(p)[0] > _written(folder)[0] and not why_incomplete(p)]


def _abandon(folder: Path) -> None:
    """Remove a half-written checkpoint, and put the one that it was to replace back in its place."""
    shutil.rmtree(folder, ignore_errors=True)
    if _aside(folder).is_dir() and not folder.exists():
        _aside(folder).rename(folder)
    if folder.parent.is_dir():
        sync_folder(folder.parent)


def _written(folder: Path) -> tuple[float, int]:
    """When a checkpoint was finished, and its step for those of one moment (or of a file system without times)."""
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
        return "is not what was written: its bytes have changed"
    return None


def _sha256(path: Path, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(content: Mapping[str, Any]) -> str:
    """A hash over the manifest itself."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _is_torn(path: Path) -> bool:
    """Whether a file of torch.save, which is a zip archive, fails its own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return True
