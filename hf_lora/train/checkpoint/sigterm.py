"""SIGTERM: Trainer's own mechanism (`enable_jit_checkpoint`), made to save between steps and on all processes at once.

Trainer saves as soon as it sees the signal, also in the middle of a step: the dropout of that step has then been drawn
already, and a run that resumes draws it again. And each process of a distributed run sees the signal at a step of its
own, so one waits in a save and another in a backward pass. Here all processes save after the same step; that may take
as long as one more step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from ...compat import heeds_sigterm
from ...layers.distributed import has_peers


class SaveBetweenSteps(JITCheckpointCallback):
    """Takes the place of Trainer's callback, with the signal handler that it has set up.

    After SIGTERM and the manager's waiting time (3 seconds, in which SIGKILL may follow) the run saves a checkpoint at
    the end of the step and stops there; `train` returns as after its last step.
    """

    def __init__(self, callback: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer, self.jit_manager = callback.trainer, callback.jit_manager
        self._group: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.jit_manager is not None and not heeds_sigterm(self.jit_manager):
            self.jit_manager.setup_signal_handler()  # the end of an earlier `train` has taken it off
        # Of CPU tensors, so that no process waits for its device at every step.
        self._group = dist.new_group(backend="gloo") if has_peers() else None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Not here: the random numbers of this step are drawn already."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Not here: the batches of this step are drawn already."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        manager = self.jit_manager
        if manager is not None and self._asked(manager):
            manager.execute_jit_checkpoint()
            control.should_save = False
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_training_stop:
            self.on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _asked(self, manager: Any) -> bool:
        """Whether any process got the signal."""
        if self._group is None:
            return bool(manager.is_checkpoint_requested)
        asked = torch.tensor(int(manager.is_checkpoint_requested))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)


def save_between_steps(callbacks: list[Any]) -> None:
    """Put `SaveBetweenSteps` in the place of Trainer's callback, where `enable_jit_checkpoint` is on."""
    for i, callback in enumerate(callbacks):
        if type(callback) is JITCheckpointCallback:
            callbacks[i] = SaveBetweenSteps(callback)
