"""The methods of `LoraTrainer` that concern the Hub: the adapter's card, its repository, and pushes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..compat import add_push, push_is_running
from .card import CardWriter, card_options
from .checkpoint.pushing import Pusher, log_failure, make_repository

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class HubMethods(_Trainer):
    """What `LoraTrainerMixin` overrides of Trainer's methods for the Hub."""

    _card: CardWriter
    _pusher: Pusher

    if TYPE_CHECKING:

        @property
        def _adapted_model(self) -> Any: ...

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of the adapter to `output_dir`: see `write_card`.

        Takes the arguments of `Trainer.create_model_card`: `finetuned_from` is the base's name on the Hub, `dataset`
        and `dataset_args` are the data and the split of the evaluation. Later calls, as in a push, reuse them. If the
        existing README cannot be kept, this is an AdapterFileError, or a warning during training.
        """
        if self.is_world_process_zero():
            names = list(inspect.signature(Trainer.create_model_card).parameters)[1:]
            self._card.write(self, self._adapted_model, {**dict(zip(names, args, strict=False)), **kwargs})

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before training starts, so that a HubError is raised early."""
        if self.is_world_process_zero():
            self.hub_model_id: Any = make_repository(self.args, token, private)
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
            blocking: wait for the push; if False, return a future.
            token: default: `hub_token`, else the client's.
            revision: default: `hub_revision`, else the main branch.
            private: visibility of a new repository.
            kwargs: arguments of `create_model_card`.

        Raises:
            HubError: the Hub refused the push or could not be reached; `output_dir` has all files to try again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)  # on all processes
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**card_options(self._adapted_model, str(self.hub_model_id), kwargs))
        self._finish_current_push()
        job = self._pusher.push_output(self.args, str(self.hub_model_id), commit_message, token, revision)
        return job.result() if blocking else log_failure(job)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        waits = push_is_running(self) and not self.args.hub_always_push
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or waits:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.create_model_card()
        made = (self.args, str(self.hub_model_id), self.state, Path(checkpoint_folder), self.processing_class)
        job = self._pusher.push_checkpoint(*made)
        add_push(self, job and log_failure(job))
