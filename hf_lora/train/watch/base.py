"""The moments of a training run that a watch sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """A callback of Trainer (`on_train_begin`, `on_step_end` after a step, …) that sees two moments more.

    `LoraTrainer` calls them for every watch among its callbacks, its own (`guard`, `finite`) and those that were
    given to it.
    """

    def before_step(self, model: nn.Module, optimizer: Any, loss: Tensor, step: int) -> None:
        """All gradients of a step are there, and neither clipped nor used yet. DeepSpeed has no such moment.

        Args:
            model: without what Accelerate puts around it.
            optimizer: as Accelerate prepared it.
            loss: of the whole step on this process.
            step: the optimizer step, counted from 1.
        """

    def finished(self) -> None:
        """The run is over, also where it failed: let go of everything that belongs to it."""


def listed(names: Sequence[str], shown: int = 20) -> str:
    """The first names of a list, and how many more there are."""
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text} … and {len(names) - shown} more"
