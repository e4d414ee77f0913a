"""What of a Trainer pushes to the Hub, with every `hub_strategy`.

Trainer uploads its whole output folder: logs, and `training_args.bin`, which holds the token. It takes several commits
for it, copies adapters only where PEFT is installed, and forgets errors of uploads in the background. Here a push is
one commit of the adapter's own files. A checkpoint, where the strategy asks for one, is part of the same commit, so
what is in `last-checkpoint` is always whole. What is pushed in the background is copied first: training goes on.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging
from transformers.utils.hub import PushInProgress

from ...compat import push_is_running
from ...hub.names import CARD_NAME, PICTURES
from ...hub.network import Repository
from ...hub.upload import commit_files, ensure_repository, pushed_files
from ..part import TrainerPart
from .manifest import finish_checkpoint, read_manifest

logger = logging.get_logger(__name__)
NEVER_PUSHED = (TRAINING_ARGS_NAME,)
"""Holds the arguments as a pickle, and hub_token among them."""


class PushingMixin(TrainerPart):
    """The part of `LoraTrainerMixin` that pushes."""

    _pushing: ThreadPoolExecutor | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository before training starts, so that what is wrong with it is known then.

        Raises:
            HubError: it cannot be made or written; says why.
        """
        if not self.is_world_process_zero():
            return
        name = self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        private = private if private is not None else self.args.hub_private_repo
        made = ensure_repository(name, private=private, token=token or self.args.hub_token)
        self.hub_model_id = made  # type: ignore[assignment]
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the adapter, write its card, and push both, with the tokenizer, as one commit.

        Args:
            commit_message: of the commit.
            blocking: wait for it; else a future is returned.
            token: None: `hub_token`, else that of `hf auth login`.
            revision: the branch; None: `hub_revision`, else `main`.
            private: for a new repository.
            kwargs: for `create_model_card`.

        Raises:
            HubError: the Hub refused it or could not be reached; `output_dir` holds all that is needed to try again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # on all processes
        if not self.is_world_process_zero():
            return None
        tags = [kwargs["tags"]] if isinstance(kwargs.get("tags"), str) else list(kwargs.get("tags") or [])
        tags += [tag for tag in getattr(self._bare_model, "model_tags", None) or [] if tag not in tags]
        name = kwargs.pop("model_name", None) or str(self.hub_model_id).rpartition("/")[2]
        self.create_model_card(model_name=name, **{**kwargs, **({"tags": tags} if tags else {})})
        self._finish_current_push()
        call = f"pushing {str(self.args.output_dir)!r} to {self.hub_model_id!r}"
        stage = _copied(pushed_files(str(self.args.output_dir), call))
        job = self._push(stage, commit_message or "End of training", token, revision)
        return job.result() if blocking else _reported(job)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = str(getattr(self.args.hub_strategy, "value", self.args.hub_strategy))
        if not self.is_world_process_zero() or strategy == "end":
            return
        if not self.args.hub_always_push and push_is_running(self):
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        call = f"pushing {checkpoint_folder!r} to {self.hub_model_id!r}"
        files = pushed_files(checkpoint_folder, call)
        self.create_model_card()
        for path in (Path(str(self.args.output_dir), CARD_NAME), *Path(str(self.args.output_dir)).glob(PICTURES)):
            if path.is_file():
                files.setdefault(path.name, path)
        name = {"checkpoint": "last-checkpoint", "all_checkpoints": Path(checkpoint_folder).name}.get(strategy)
        if name is not None:
            files |= _of_checkpoint(Path(checkpoint_folder), name)
        try:
            stage = _copied(files)
        except OSError as error:  # the disk of temporary files is full, say
            logger.warning(f"{call}: the copy to push cannot be made; training goes on without this push. {error}")
            return
        if name is not None:
            _sealed_anew(stage / name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(stage)
        at = f"step {self.state.global_step}"
        if str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "steps":
            at = f"epoch {int(self.state.epoch or 0)}"
        job = _reported(self._push(stage, f"Training in progress, {at}", self.args.hub_token, None))
        running: Any = self.push_in_progress
        if push_is_running(self):
            running.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[assignment,arg-type]

    def _push(self, stage: Path, message: str, token: str | None, revision: str | None) -> Future[Any]:
        """Push the files of a folder, which then goes away, after the pushes before it."""
        call = f"pushing {str(self.args.output_dir)!r} to {self.hub_model_id!r}"
        revision = revision or self.args.hub_revision
        target = Repository(str(self.hub_model_id), revision, token, None, call, self.args.hub_private_repo)

        def work() -> Any:
            try:
                paths = sorted(path for path in stage.rglob("*") if path.is_file())
                files = {path.relative_to(stage).as_posix(): path for path in paths}
                return commit_files(target, files, message)
            finally:
                shutil.rmtree(stage, ignore_errors=True)

        if self._pushing is None:
            self._pushing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hf_lora-push")
        return self._pushing.submit(work)


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


def _of_checkpoint(folder: Path, name: str) -> dict[str, Path]:
    """All files of a checkpoint but those that are never pushed."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in NEVER_PUSHED)
    return {f"{name}/{path.relative_to(folder).as_posix()}": path for path in paths}


def _sealed_anew(folder: Path) -> None:
    """Let a copied checkpoint's manifest count no file that is not pushed: it is whole without them."""
    content = read_manifest(folder)
    if content is not None:
        facts = (content.get(name) for name in ("parameters", "left_out", "quantization", "optimizer"))
        finish_checkpoint(folder, content["step"], *facts)


def _reported(job: Future[Any]) -> Future[Any]:
    """Say it when a push in the background fails; training goes on."""

    def report(done: Future[Any]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            logger.warning(f"A push in the background failed; training goes on. {error}")

    job.add_done_callback(report)
    return job
