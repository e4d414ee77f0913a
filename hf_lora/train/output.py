"""The output folder of a run: checked before the model is loaded; an earlier run there is replaced on request.

The adapter of the earlier run stays until the new one is complete: files are saved together (`safe_io.atomic`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import Faults
from ..files.format import CONFIG_NAME
from ..safe_io.atomic import why_not_writable
from .checkpoint.manifest import checkpoints

RESULTS = ("eval_results.json", "test_results.json", "train_results.json", "all_results.json", "trainer_state.json")
"""What a run writes at its end, beside the adapter."""


def check_output(folder: str, resume: str | bool | None, overwrite: bool, faults: Faults) -> None:
    """Add a fault if a run cannot write to `folder`, or would replace what an earlier run left there.

    Args:
        resume: the checkpoint to resume from, True for the newest, None for a new run.
        overwrite: replace the adapter and the checkpoints of an earlier run, unless the run resumes.
    """
    if not folder.strip():
        faults.add("--output-dir is empty: name a folder for the adapter")
        return
    path = Path(folder)
    reason = why_not_writable(path)
    if reason is not None:
        faults.add(f"--output-dir {folder}: {reason}. Name another folder")
        return
    found = checkpoints(path)
    if (path / "config.json").is_file():
        faults.add(f"--output-dir {folder} holds a full model (config.json). Name another folder")
    elif resume:
        if resume is True and not found:
            faults.add(f"--output-dir {folder} has no checkpoint to resume from. Omit --resume-from-checkpoint")
        elif resume is not True and not Path(resume).is_dir():
            faults.add(f"--resume-from-checkpoint {resume} is not a folder. True means the newest in --output-dir")
    elif not overwrite and ((path / CONFIG_NAME).is_file() or found):
        finished = (path / CONFIG_NAME).is_file()
        holds = "an adapter" if finished else f"checkpoints of a run that is not finished ({found[0].name})"
        faults.add(
            f"--output-dir {folder} holds {holds}. Name another folder with --output-dir, continue that run with "
            "--resume-from-checkpoint True, or replace it with --overwrite"
        )


def remove_checkpoints(folder: str) -> None:
    """Remove the checkpoints of an earlier run, so that none of them is taken for one of the new run."""
    for path in checkpoints(folder):
        shutil.rmtree(path)


def remove_results(folder: str) -> None:
    """Remove the results of an earlier run, once its adapter is replaced."""
    for name in RESULTS:
        Path(folder, name).unlink(missing_ok=True)
