"""SIGTERM: Trainer's `enable_jit_checkpoint`, changed to save between steps and on all processes after the same step.

Trainer saves as soon as it receives the signal, also within a step: the step's dropout is then already drawn, and a
resumed run draws it again. The processes of a distributed run receive the signal at different steps, so one can wait
in a save while another waits in a backward pass. Here all save after the same step, which may take one more step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from ...compat import handles_sigterm
from ...layers.distributed import has_peers


class SaveBetweenSteps(JITCheckpointCallback):
    """Replaces Trainer's callback and uses its signal handler.

    After SIGTERM and the manager's delay (3 seconds, in which SIGKILL may follow), the run saves a checkpoint at the
    end of the step and stops; `train` returns as after its last step.
    """

    def __init__(self, callback: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer, self.jit_manager = callback.trainer, callback.jit_manager
        self._group: dist.ProcessGroup | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.jit_manager is not None and not handles_sigterm(self.jit_manager):
            self.jit_manager.setup_signal_handler()  # the end of an earlier `train` removed it
        # For CPU tensors, so that no process synchronizes with its device at every step.
        self._group = dist.new_group(backend="gloo") if has_peers() else None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Does not save here: the random numbers of this step are already drawn."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Does not save here: the batches of this step are already drawn."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        manager = self.jit_manager
        if manager is not None and self._requested(manager):
            manager.execute_jit_checkpoint()
            control.should_save = False
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if not control.should_training_stop:
            self.on_step_end(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _requested(self, manager: CheckpointManager) -> bool:
        """Whether any process received the signal."""
        if self._group is None:
            return bool(manager.is_checkpoint_requested)
        requested = torch.tensor(int(manager.is_checkpoint_requested))
        dist.all_reduce(requested, dist.ReduceOp.MAX, group=self._group)
        return bool(requested)


def save_between_steps(callbacks: list[TrainerCallback]) -> None:
    """Replace Trainer's callback by `SaveBetweenSteps`, if `enable_jit_checkpoint` is on."""
    for i, callback in enumerate(callbacks):
        if type(callback) is JITCheckpointCallback:
            callbacks[i] = SaveBetweenSteps(callback)
