"""A loss that rose far above its start, as with a learning rate that is much too high."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .base import Watch

logger = logging.get_logger(__name__)

FACTOR, DIFFERENCE = 2.0, 0.5
"""The mean at the end must exceed the loss of the first step by both."""
_KEPT = 0.9
"""Weight of the earlier steps in the moving mean."""


class LossRise(Watch):
    """Logs a warning at the end of a run whose loss is far above that of its first step. No synchronization before."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._mean: Tensor | None = None

    def before_step(self, model: nn.Module, optimizer: Optimizer, loss: Tensor, step: int) -> None:
        loss = loss.detach().float()
        self._first = loss if self._first is None else self._first
        self._mean = loss if self._mean is None else _KEPT * self._mean + (1 - _KEPT) * loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._first = self._mean = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._first is None or self._mean is None or not state.is_world_process_zero:
            return
        first, last = float(self._first), float(self._mean)
        if last > FACTOR * first and last > first + DIFFERENCE:
            logger.warning(
                f"The loss rose from {first:.4g} at the first step to {last:.4g} at the end, so the adapter is worse "
                f"than none. The learning rate of {args.learning_rate:g} is probably too high."
            )
