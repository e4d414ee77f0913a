"""The base class of callbacks that check a training run."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """A Trainer callback (`on_train_begin`, `on_step_end`, …) with two more events.

    `LoraTrainer` calls them for every `Watch` among its callbacks: its own (`guard`, `finite`) and those passed to it.
    """

    def before_step(self, model: nn.Module, optimizer: Optimizer, loss: Tensor, step: int) -> None:
        """Called when all gradients of a step are computed, before clipping and the step. Not under DeepSpeed.

        Args:
            model: without Accelerate's wrappers.
            optimizer: as prepared by Accelerate.
            loss: of the whole step on this process.
            step: the optimizer step, counted from 1.
        """

    def finished(self) -> None:
        """Called at the end of a run, also after an error: release everything that belongs to it."""


def listed(names: Sequence[str], shown: int = 20) -> str:
    """The first names of a list, and the number of the others."""
    text = ", ".join(names[:shown])
    return text if len(names) <= shown else f"{text} … and {len(names) - shown} more"
