"""Pushes of a Trainer to the Hub, for every `hub_strategy`.

Trainer uploads its whole output folder, with logs and `training_args.bin`, which contains the token. It makes several
commits, copies adapters only if PEFT is installed, and drops errors of background uploads. Here a push is one commit
of the adapter's files. A checkpoint, if the strategy includes one, is part of the same commit, so `last-checkpoint` is
always complete. Files are copied before a background push, so training can continue.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import logging

from ...hub.names import CARD_NAME, PICTURES
from ...hub.network import Repository
from ...hub.upload import commit_files, ensure_repository, pushed_files
from .manifest import finish_copy

logger = logging.get_logger(__name__)
NEVER_PUSHED = (TRAINING_ARGS_NAME,)
"""A pickle of the arguments, including hub_token."""


def make_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """Create the repository of a run; returns its full name."""
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    private = private if private is not None else args.hub_private_repo
    return ensure_repository(name, private=private, token=token or args.hub_token)


class Pusher:
    """Pushes to the Hub in the background, one push after another."""

    def __init__(self) -> None:
        self._queue = HfApi()

    def push_output(
        self,
        args: TrainingArguments,
        repo_id: str,
        message: str | None,
        token: str | None = None,
        revision: str | None = None,
    ) -> Future[CommitInfo]:
        """Push the adapter, the card and the tokenizer in `output_dir`."""
        target = _target(args, repo_id, token, revision)
        stage = _copied(pushed_files(str(args.output_dir), target.call))
        return self._push(stage, target, message or "End of training")

    def push_checkpoint(
        self, args: TrainingArguments, repo_id: str, state: TrainerState, folder: Path, processing: Any
    ) -> Future[CommitInfo] | None:
        """Push the adapter, the card, the tokenizer (`processing`) and, if the strategy includes it, the checkpoint.

        None, with a warning, if the files cannot be copied, such as on a full disk.
        """
        call = f"pushing {str(folder)!r} to {repo_id!r}"
        files = pushed_files(folder, call)
        output_dir = Path(str(args.output_dir))
        for path in (output_dir / CARD_NAME, *output_dir.glob(PICTURES)):
            if path.is_file():
                files.setdefault(path.name, path)
        names = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        name = names.get(HubStrategy(args.hub_strategy))
        if name is not None:
            inside = (path for path in folder.rglob("*") if path.is_file() and path.name not in NEVER_PUSHED)
            files |= {f"{name}/{path.relative_to(folder).as_posix()}": path for path in inside}
        try:
            stage = _copied(files)
        except OSError as error:  # such as a full disk
            logger.warning(f"{call}: the files could not be copied; training continues without this push. {error}")
            return None
        if name is not None:
            finish_copy(stage / name)
        if processing is not None:
            processing.save_pretrained(stage)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {state.global_step}" if by_steps else f"epoch {int(state.epoch or 0)}"
        return self._push(stage, _target(args, repo_id), f"Training in progress, {at}")

    def _push(self, stage: Path, target: Repository, message: str) -> Future[CommitInfo]:
        """Push the files of a folder as one commit, then delete the folder."""

        def work() -> CommitInfo:
            try:
                paths = sorted(path for path in stage.rglob("*") if path.is_file())
                return commit_files(target, {path.relative_to(stage).as_posix(): path for path in paths}, message)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

        return self._queue.run_as_future(work)


def _target(
    args: TrainingArguments, repo_id: str, token: str | None = None, revision: str | None = None
) -> Repository:
    call = f"pushing {str(args.output_dir)!r} to {repo_id!r}"
    revision, token = revision or args.hub_revision, token or args.hub_token
    return Repository(repo_id, revision, token, None, call, args.hub_private_repo)


def log_failure(job: Future[CommitInfo]) -> Future[CommitInfo]:
    """Log a warning if a background push fails; training continues."""

    def report(done: Future[CommitInfo]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            logger.warning(f"A background push failed; training continues. {error}")

    job.add_done_callback(report)
    return job


def _copied(files: dict[str, Path]) -> Path:
    """A temporary folder with copies of the files, at their paths in the repository."""
    stage = Path(tempfile.mkdtemp(prefix="hf_lora-push-"))
    try:
        for name, source in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, stage / name)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return stage
