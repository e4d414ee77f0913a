"""Checkpoints that are complete or do not count.

Trainer writes a checkpoint file by file, records it as the best, pushes it and deletes older ones. A process that is
killed in between leaves a folder that looks like the newest checkpoint. So a manifest with the size of every file is
written as the last one, before older checkpoints are deleted, and whoever resumes looks at it first.

An unmodified Trainer writes no manifest. Its folders count if the file that it writes last can be read.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..errors import AdapterFileError
from ..files.format import CONFIG_NAME, WEIGHTS_NAME

MANIFEST_NAME = "hf_lora_checkpoint.json"
_FORMAT = 1
_CHECKPOINT = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")

logger = logging.get_logger(__name__)


def begin_checkpoint(folder: str | Path) -> None:
    """Make a folder that is about to be written again count as no checkpoint, and rid it of an older run's state."""
    for pattern in (MANIFEST_NAME, TRAINER_STATE_NAME, "optimizer.*", "scheduler.*", "scaler.*", "rng_state*"):
        for path in Path(folder).glob(pattern):
            if path.is_file():
                path.unlink()


def finish_checkpoint(
    folder: str | Path,
    step: int,
    parameters: list[str] | None = None,
    left_out: dict[str, list[str]] | None = None,
) -> None:
    """Write the manifest: the folder counts as a checkpoint from here on.

    Args:
        folder: holds every file of the checkpoint, of all processes.
        step: the optimizer step that it belongs to.
        parameters: names of the trained parameters in the optimizer's order.
        left_out: adapter -> layers that its configuration matches and that it was taken off in training.
    """
    folder = Path(folder)
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    content = {"format": _FORMAT, "step": step, "files": files, "parameters": parameters, "left_out": left_out}
    aside = folder / (MANIFEST_NAME + ".tmp")
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, folder / MANIFEST_NAME)


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest's content, or None where there is none.

    Raises:
        AdapterFileError: it cannot be read.
    """
    path = Path(folder, MANIFEST_NAME)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        assert isinstance(content["files"], dict)
    except (ValueError, KeyError, AssertionError, OSError) as error:
        raise AdapterFileError(f"{path} cannot be read ({type(error).__name__}: {error}).") from error
    return content


def why_incomplete(folder: str | Path) -> list[str]:
    """What is missing or cut short in a checkpoint folder; an empty list where it is complete."""
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except AdapterFileError as error:
        return [str(error)]
    if manifest is not None:
        return [fault for name, size in manifest["files"].items() if (fault := _file_fault(folder / name, size))]
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
    return faults


def adapter_folders(folder: str | Path) -> list[Path]:
    """The folders of the adapters in a saved folder: itself, and those below it that bear an adapter's name."""
    folder = Path(folder)
    found = [folder, *(sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ())]
    return [path for path in found if (path / CONFIG_NAME).is_file()]


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete `checkpoint-*` in `output_dir`, or None; a warning names newer ones that do not count."""
    skipped: list[str] = []
    chosen = None
    for folder in checkpoints(output_dir):
        faults = why_incomplete(folder)
        if not faults:
            chosen = str(folder)
            break
        skipped.append(f"  - {folder}: {'; '.join(faults)}")
    if skipped:
        then = f"Going on from {chosen}." if chosen else "No complete checkpoint is left."
        logger.warning("\n".join(["These checkpoints are not complete and are skipped:", *skipped, then]))
    return chosen


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-*` folders in `output_dir`, the highest step first."""
    found = [
        (int(match[1]), path)
        for path in (Path(output_dir).iterdir() if Path(output_dir).is_dir() else ())
        if (match := _CHECKPOINT.match(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def require_complete(folder: str | Path) -> None:
    """Refuse a checkpoint that is not complete.

    Raises:
        AdapterFileError: says what is missing, and which checkpoint beside it is complete.
    """
    faults = why_incomplete(folder)
    if not faults:
        return
    others = [p for p in checkpoints(Path(folder).parent) if p != Path(folder) and not why_incomplete(p)]
    lines = [f"{folder} is not a complete checkpoint:", *(f"  - {fault}" for fault in faults)]
    if others:
        lines.append(f"Resume from {others[0]} instead, the newest complete one.")
    else:
        lines.append("No complete checkpoint lies beside it; start again, or load its adapter with load_adapter.")
    raise AdapterFileError("\n".join(lines))


def check_parameter_order(folder: str | Path, names: list[str] | None) -> None:
    """Refuse to give optimizer state to other parameters than it was saved from.

    Args:
        folder: the checkpoint.
        names: the trained parameters in the optimizer's order; None where the optimizer hides them.

    Raises:
        AdapterFileError: names what differs.
    """
    manifest = read_manifest(folder)
    saved = manifest.get("parameters") if manifest else None
    if saved is None or names is None or saved == names:
        return
    lines = [f"The optimizer state in {folder} belongs to other parameters than those that are trained now:"]
    lines += [f"  - saved and not trained now: {name}" for name in saved if name not in set(names)][:10]
    lines += [f"  - trained now and not saved: {name}" for name in names if name not in set(saved)][:10]
    if len(lines) == 1:
        lines.append("  - they are the same, in another order (the rates and the order of the adapters count)")
    lines.append("Resume with the arguments of the first run, or start a new run from the adapter alone.")
    raise AdapterFileError("\n".join(lines))


def _file_fault(path: Path, size: int) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    found = path.stat().st_size
    return None if found == size else f"{path.name} has {found} of {size} bytes"
