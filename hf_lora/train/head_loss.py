"""The loss over the frozen head, for a training run: found on the first batch, given up where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.utils import logging

from ..loss.frozen_head import Caught, FrozenHead, Scores, find_frozen_head, shifted

logger = logging.get_logger(__name__)
Result = TypeVar("Result")


class HeadLoss:
    """Where a model is a causal language model with a frozen head, its logits are never made as a whole.

    Args:
        enabled: False leaves every loss to the model.
        speaks: whether this process logs which loss it is.
    """

    def __init__(self, enabled: bool = True, speaks: bool = True) -> None:
        self.enabled, self.speaks = enabled, speaks
        self.head: FrozenHead | None = None
        """None before the first batch, and for other models."""
        self._of: Any = None

    def restart(self) -> None:
        """Look for the head again: another adapter may train it, which the last one left frozen."""
        self._of = None

    def find(self, model: nn.Module, inputs: Mapping[str, Any]) -> FrozenHead | None:
        """The head that the loss of this batch can be computed over; None where it is left to the model."""
        labels = inputs.get("labels")
        if "shift_labels" in inputs or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        if self._of is not model:
            self._of = model
            self.head = find_frozen_head(model) if self.enabled else None
            if self.head is not None:
                self.head.prove(model, inputs)
                self._say()
        return self.head if self.head is not None and self.head.off is None else None

    def compute(self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[], Result]) -> Result | None:
        """What `forward` returns, with the model's loss over its frozen head; None where that does not fit.

        Args:
            model: without what Accelerate puts around it.
            inputs: the batch, with `labels` (B, T), that `forward` calls the model with.
        """
        found = self._under(model, inputs, forward)
        return None if found is None else found[0]

    def predict(
        self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[], Result]
    ) -> tuple[Result, Scores] | None:
        """As `compute`, with what the labels are worth and the likeliest tokens, in place of logits."""
        found = self._under(model, inputs, forward, predictions=True)
        return None if found is None or found[1].scores is None else (found[0], found[1].scores)

    def give_up(self, fault: str | None) -> None:
        """Leave the loss to the model from here on."""
        if self.head is not None:
            self.head.off = fault
            self._say()

    def line(self) -> str:
        """Which loss it is, for people; empty where there was no choice."""
        if self.head is None:
            return ""
        if self.head.off is not None:
            return f"loss: the model's own, over all its logits, since {self.head.off}"
        return f"loss: over the frozen {self.head.name} in chunks of tokens; the logits are never held"

    def _under(
        self, model: nn.Module, inputs: Mapping[str, Any], forward: Callable[[], Result], predictions: bool = False
    ) -> tuple[Result, Caught] | None:
        head = self.find(model, inputs)
        if head is None:
            return None
        with head.catch(model, shifted(inputs["labels"]), predictions=predictions) as caught:
            result = forward()
        if caught.fault is None:
            return result, caught
        self.give_up(caught.fault)
        return None

    def _say(self) -> None:
        if self.speaks:
            logger.info(self.line())
