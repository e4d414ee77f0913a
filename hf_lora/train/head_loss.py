"""The loss over the frozen head, inside Trainer: training steps and evaluations of causal language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..evaluation.metrics import ComputeMetrics, Kept
from ..loss.frozen_head import FrozenHead, find_frozen_head, shifted
from .part import TrainerPart


class HeadLossMixin(TrainerPart):
    """Where the model is a causal language model with a frozen head, its logits are never made as a whole.

    Only calls of Trainer's own `compute_loss` and `prediction_step` are taken over, and those only where nobody asks
    for the logits: a Trainer that overrides them keeps them as they are.
    """

    _head: FrozenHead | None = None
    _head_of: Any = None

    def _frozen_head(self, inputs: Mapping[str, Any]) -> FrozenHead | None:
        """The head that the loss of this batch can be computed over; None where it is left to the model."""
        labels = inputs.get("labels")
        args = self.args
        plain = not (args.torch_compile or args.n_gpu > 1 or args.use_liger_kernel or "shift_labels" in inputs)
        if not plain or not isinstance(labels, Tensor) or labels.dim() != 2:
            return None
        if self.label_smoother is not None or self.compute_loss_func is not None:
            return None
        model = self._bare_model
        if self._head_of is not model:
            self._head = find_frozen_head(model) if getattr(args, "frozen_head_loss", True) else None
            self._head_of = model
            if self._head is not None:
                self._head.prove(model, inputs)
                self._say(self._head)
        return self._head if self._head is not None and self._head.off is None else None

    def _say(self, head: FrozenHead) -> None:
        if self.is_world_process_zero():
            if head.off is None:
                print(f"loss: over the frozen {head.name} in chunks of tokens; the logits are never held")
            else:
                print(f"loss: the model's own, over all its logits, since {head.off}")

    def _give_up(self, head: FrozenHead, fault: str | None) -> None:
        head.off = fault
        self._say(head)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As `Trainer.compute_loss`; over the frozen head where nobody asks for the outputs."""
        own = super().compute_loss
        head = None
        if not return_outputs and getattr(own, "__func__", None) is Trainer.compute_loss:
            head = self._frozen_head(inputs)
        if head is not None:
            with head.catch(self._bare_model, shifted(inputs["labels"])) as caught:
                loss = own(model, inputs, False, num_items_in_batch)
            if caught.fault is None:
                return loss
            self._give_up(head, caught.fault)
        return own(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """As `Trainer.prediction_step`; over the frozen head where the metrics are of `build_compute_metrics`."""
        own = super().prediction_step
        ours = isinstance(self.compute_metrics, ComputeMetrics) and self._metrics_see_scores()
        plain = getattr(own, "__func__", None) is Trainer.prediction_step
        if ours or (plain and prediction_loss_only):
            inputs = self._prepare_inputs(inputs)
            head = self._frozen_head(inputs)
            if head is not None:
                with (
                    torch.no_grad(),
                    self.compute_loss_context_manager(),
                    head.catch(self._bare_model, shifted(inputs["labels"]), predictions=True) as caught,
                ):
                    # Trainer counts the labels of a batch in its own way, and the value should be the one it shows.
                    count = self._get_num_items_in_batch([inputs], self.args.device)
                    loss: Any = Trainer.compute_loss(self, model, {**inputs, "use_cache": False}, False, count)
                if caught.fault is None and caught.scores is not None:
                    kept = None if prediction_loss_only else Kept.of(caught.scores)
                    return loss.detach().mean(), kept, None if prediction_loss_only else inputs["labels"]
                self._give_up(head, caught.fault)
        return own(model, inputs, prediction_loss_only, ignore_keys, **kwargs)

    def _metrics_see_scores(self) -> bool:
        """Whether what the metrics made is what reduces the logits, and nothing else looks at them."""
        preprocess: Any = self.preprocess_logits_for_metrics
        return getattr(preprocess, "__self__", None) is self.compute_metrics
