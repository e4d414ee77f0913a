"""The loss over the frozen head in a training run: set up on the first batch, turned off if it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..evaluation.metrics import ComputeMetrics, Kept
from ..loss.frozen_head import Caught, FrozenHead, Scores, find_frozen_head

logger = logging.get_logger(__name__)
Result = TypeVar("Result")


class HeadLoss:
    """Computes the loss of a causal language model with a frozen head without the full logits.

    Args:
        enabled: if False, the model computes every loss.
        logs: whether this process logs which loss is used.
    """

    def __init__(self, enabled: bool = True, logs: bool = True) -> None:
        self.enabled, self.logs = enabled, logs
        self.head: FrozenHead | None = None
        """None before the first batch, and for other models."""
        self._model: nn.Module | None = None

    def restart(self) -> None:
        """Look for the head again, because the active adapter may have changed and may train it."""
        self._model = None

    def find(self, model: nn.Module, inputs: Mapping[str, Any]) -> FrozenHead | None:
        """The head for the loss of this batch; None if the model computes the loss."""
        labels = inputs.get("labels")
        if "shift_labels" in inputs or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        if self._model is not model:
            self._model = model
            self.head = find_frozen_head(model) if self.enabled else None
            if self.head is not None:
                self.head.prove(model, inputs)
                self._log()
        return self.head if self.head is not None and self.head.off is None else None

    def compute(self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[], Result]) -> Result | None:
        """The result of `forward`, with the model's loss over its frozen head; None if that does not fit.

        Args:
            model: without Accelerate's wrappers.
            inputs: the batch, with `labels` (B, T), that `forward` passes to the model.
        """
        found = self._under(model, inputs, forward)
        return None if found is None else found[0]

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[], Result]
    ) -> tuple[Result, Scores] | None:
        """Like `compute`, and with the labels' log-probabilities and the most likely tokens instead of logits."""
        found = self._under(model, inputs, forward, predictions=True)
        return None if found is None or found[1].scores is None else (found[0], found[1].scores)

    def give_up(self, fault: str | None) -> None:
        """Let the model compute the loss from now on."""
        if self.head is not None:
            self.head.off = fault
            self._log()

    def line(self) -> str:
        """A line that names the loss in use; empty if there was no choice."""
        if self.head is None:
            return ""
        if self.head.off is not None:
            return f"loss: the model's, over all logits, because {self.head.off}"
        return f"loss: over the frozen {self.head.name} in chunks of tokens, without storing the logits"

    def _under(
        self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[], Result], predictions: bool = False
    ) -> tuple[Result, Caught] | None:
        head = self.find(model, inputs)
        if head is None:
            return None
        with head.catch(model, inputs["labels"], predictions=predictions) as caught:
            result = forward()
        if caught.fault is None:
            return result, caught
        self.give_up(caught.fault)
        return None

    def _log(self) -> None:
        if self.logs:
            logger.info(self.line())


def predict_over_head(
    trainer: Trainer, head_loss: HeadLoss, model: nn.Module, inputs: dict[str, Any], loss_only: bool, plain: bool,
    loss: Callable[[dict[str, Any]], Any],
) -> tuple[Any, Any, Any] | None:  # fmt: skip
    """The result of `Trainer.prediction_step` without logits; None if it needs them.

    Args:
        model: without the wrappers of Accelerate.
        plain: whether the trainer's `prediction_step` is Trainer's.
        loss: Trainer's loss of a batch.
    """
    metrics, reduces = trainer.compute_metrics, trainer.preprocess_logits_for_metrics
    ours = isinstance(metrics, ComputeMetrics) and getattr(reduces, "__self__", None) is metrics  # no other use
    if not ours and not (plain and loss_only):
        return None
    with torch.no_grad(), trainer.compute_loss_context_manager():
        found = head_loss.predict(model, inputs, lambda: loss({**inputs, "use_cache": False}))
    if found is None:
        return None
    kept = (None, None) if loss_only else (Kept.of(found[1]), inputs["labels"])
    return found[0].detach().mean(), *kept
