"""The progress bar of a command: Trainer's, with the loss and the speed."""

from __future__ import annotations

import time

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from .base import Watch

INTERVAL = 0.5
"""Seconds between two updates of the loss, which a device must finish for it."""


class Progress(ProgressCallback, Watch):
    """Trainer's progress bar, with the loss of the last step and the mean speed so far.

    Args:
        count: what one epoch holds, in `unit`.
    """

    def __init__(self, count: int, unit: str) -> None:
        super().__init__()
        self._count, self._unit = count, unit
        self._loss: Tensor | None = None
        self._begin = self._shown = 0.0
        self._first_epoch = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._begin, self._shown, self._first_epoch = time.perf_counter(), 0.0, state.epoch or 0.0

    def before_step(self, model: nn.Module, optimizer: Optimizer, loss: Tensor, step: int) -> None:
        self._loss = loss

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        super().on_step_end(args, state, control, **kwargs)
        now = time.perf_counter()
        last = state.global_step >= state.max_steps
        if self.training_bar is None or self._loss is None or (now - self._shown < INTERVAL and not last):
            return
        self._shown = now
        speed = ((state.epoch or 0.0) - self._first_epoch) * self._count / max(now - self._begin, 1e-9)
        self.training_bar.set_postfix_str(f"loss {float(self._loss):.3g}, {speed:,.0f} {self._unit}/s")
