"""What a Trainer pushes to the Hub, with every `hub_strategy`.

Trainer uploads its whole output folder: logs, and `training_args.bin`, which holds the token. It takes several commits
for it, copies adapters only where PEFT is installed, and forgets errors of uploads in the background. Here a push is
one commit of the adapter's own files. A checkpoint, where the strategy asks for one, is part of the same commit, so
what is in `last-checkpoint` is always whole. What is pushed in the background is copied first: training goes on.
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
"""Holds the arguments as a pickle, and hub_token among them."""


def make_repository(args: TrainingArguments, token: str | None = None, private: bool | None = None) -> str:
    """Make the repository of a run; its whole name."""
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
    private = private if private is not None else args.hub_private_repo
    return ensure_repository(name, private=private, token=token or args.hub_token)


class Pusher:
    """Pushes to the Hub in the background, one push after the other."""

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
        """Push the adapter, the card, the tokenizer (`processing`) and, where asked for, the checkpoint.

        None where the copy to push cannot be made, as on a full disk; a warning says so.
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
        except OSError as error:  # the disk of temporary files is full, say
            logger.warning(f"{call}: the copy to push cannot be made; training goes on without this push. {error}")
            return None
        if name is not None:
            finish_copy(stage / name)
        if processing is not None:
            processing.save_pretrained(stage)
        by_steps = args.save_strategy == SaveStrategy.STEPS
        at = f"step {state.global_step}" if by_steps else f"epoch {int(state.epoch or 0)}"
        return self._push(stage, _target(args, repo_id), f"Training in progress, {at}")

    def _push(self, stage: Path, target: Repository, message: str) -> Future[CommitInfo]:
        """Push the files of a folder, which then goes away, as one commit."""

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


def reported(job: Future[Any]) -> Future[Any]:
    """Say it when a push in the background fails; training goes on."""

    def report(done: Future[Any]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            logger.warning(f"A push in the background failed; training goes on. {error}")

    job.add_done_callback(report)
    return job


def _copied(files: dict[str, Path]) -> Path:
    """A temporary folder with copies of files, by their paths in the repository."""
    stage = Path(tempfile.mkdtemp(prefix="hf_lora-push-"))
    try:
        for name, source in files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, stage / name)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    return stage
