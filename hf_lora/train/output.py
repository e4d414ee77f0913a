"""The output folder of a run: checked before the model is loaded; an earlier run there is replaced on request.

The adapter of the earlier run stays until the new one is complete: files are saved together (`safe_io.atomic`).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from ..errors import Faults
from ..files.format import CONFIG_NAME
from ..safe_io.atomic import why_not_writable
from .checkpoint.manifest import checkpoints

RESULTS = ("eval_results.json", "test_results.json", "train_results.json", "all_results.json", "trainer_state.json")
"""What a run writes at its end, beside the adapter."""
INPUTS = {
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "preprocessor_config.json",
    "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
}  # fmt: skip
"""Files of tokenizers and processors."""


def check_output(folder: str, resume: str | bool | None, overwrite: bool, faults: Faults) -> None:
    """Add a fault if a run cannot write to `folder`, or would replace what an earlier run left there.

    Args:
        resume: the checkpoint to resume from, True for the newest, None for a new run.
        overwrite: replace the adapter and the checkpoints of an earlier run, unless this one goes on with it.
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
    elif resume is True:
        if not found:
            faults.add(f"--output-dir {folder} has no checkpoint to resume from. Omit --resume-from-checkpoint")
    elif resume and not Path(resume).is_dir():
        faults.add(f"--resume-from-checkpoint {resume} is not a folder. True means the newest in --output-dir")
    elif not overwrite and not continues(folder, resume) and ((path / CONFIG_NAME).is_file() or found):
        finished = (path / CONFIG_NAME).is_file()
        holds = "an adapter" if finished else f"checkpoints of a run that is not finished ({found[0].name})"
        faults.add(
            f"--output-dir {folder} holds {holds}. Name another folder with --output-dir, continue that run with "
            "--resume-from-checkpoint True, or replace it with --overwrite"
        )


def continues(folder: str, resume: str | bool | None) -> bool:
    """Whether a run that resumes from this checkpoint goes on with the run in `folder`, and not with another one."""
    return resume is True or (bool(resume) and Path(folder).resolve() in Path(str(resume)).resolve().parents)


def files_of_inputs(folder: str) -> dict[Path, int]:
    """The files of a tokenizer or processor in a folder, each with the time of its last change, in nanoseconds."""
    found = [path for path in Path(folder).glob("*") if path.name in INPUTS and path.is_file()]
    return {path: path.stat().st_mtime_ns for path in found}


def remove_unchanged(files: Mapping[Path, int]) -> None:
    """Remove what an earlier run left and this one did not replace, such as the template of another tokenizer."""
    for path, changed in files.items():
        if path.is_file() and path.stat().st_mtime_ns == changed:
            path.unlink()


def remove_checkpoints(folder: str) -> None:
    """Remove the checkpoints of an earlier run, so that none of them is taken for one of the new run."""
    for path in checkpoints(folder):
        shutil.rmtree(path)


def remove_results(folder: str) -> None:
    """Remove the results of an earlier run, once its adapter is replaced."""
    for name in RESULTS:
        Path(folder, name).unlink(missing_ok=True)
