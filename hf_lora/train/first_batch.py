"""What a run determines from its first batch: layers with shared inputs, and whether the model divides its loss.

Both need an additional forward, which leaves the random states, the gradients and the modes of the modules unchanged,
so that a run has the same values as without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.utils import logging

from ..adapt.sharing import share_inputs
from ..adapt.state import state_of
from ..layers.distributed import is_dtensor
from ..layers.ops import evaluation_mode, kept_random_states

logger = logging.get_logger(__name__)

Loss = Callable[[Mapping[str, Any], Tensor], Any]
"""(batch, number of its items) -> the loss of the trainer."""


class FirstBatch:
    """Looks at the first batch of each run."""

    def __init__(self) -> None:
        self._shares = self._divides = False

    def restart(self, trainer: Trainer, model: nn.Module) -> None:
        """Look at the next batch, for what is possible in this run."""
        self._shares = may_share_inputs(trainer, model)
        steps, processes = trainer.args.gradient_accumulation_steps, trainer.accelerator.num_processes
        self._divides = max(steps, processes, trainer.args.n_gpu) > 1

    def finished(self) -> None:
        self._shares = self._divides = False

    def look(self, trainer: Trainer, model: nn.Module, inputs: Mapping[str, Any], loss: Loss | None) -> None:
        """Look at a batch of the training, before its own forward.

        Args:
            model: without the wrappers of Accelerate.
            inputs: as passed to `compute_loss`.
            loss: the trainer's loss if the model computes it over its logits, else None.
        """
        if self._shares and state_of(model) is not None:  # not a wrapper, whose batches are its own
            self._shares = False
            popped = (
                {"labels"} if trainer.label_smoother is not None or trainer.compute_loss_func is not None else set()
            )
            find_shared_inputs(model, {k: v for k, v in inputs.items() if k not in popped})
        if self._divides and loss is not None:
            self._divides = False
            if trainer.model_accepts_loss_kwargs and trainer.compute_loss_func is None:
                trainer.model_accepts_loss_kwargs = divides_by_items(model, inputs, loss)
                if not trainer.model_accepts_loss_kwargs:
                    logger.info(
                        f"{type(model).__name__} returns the mean loss of each batch and ignores num_items_in_batch: "
                        "the losses of a step are averaged over its batches and processes."
                    )


def divides_by_items(model: nn.Module, inputs: Mapping[str, Any], loss: Loss) -> bool:
    """Whether the loss depends on `num_items_in_batch`: a NaN shows it.

    From `**kwargs` in the signature of a forward, Trainer assumes that the model divides by this number, and then does
    not average over the batches of a step; but most models with heads other than those of causal language models
    ignore it, and their loss and gradients would be multiplied by the number of batches and processes.
    """
    try:
        with evaluation_mode(model), kept_random_states(), torch.no_grad():
            value = torch.as_tensor(loss(dict(inputs), torch.tensor(float("nan"))))
    except (ValueError, OverflowError, RuntimeError):  # such as int(nan); any other cause is raised again by the step
        return True
    return bool(value.isnan().any())


def may_share_inputs(trainer: Trainer, model: nn.Module) -> bool:
    """Whether layers may share inputs: not if they are compiled, sharded or replicated."""
    args = trainer.args
    return getattr(args, "share_inputs", True) and not (
        args.torch_compile
        or args.n_gpu > 1
        or trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
        or any(is_dtensor(p) for p in model.parameters())
    )


def find_shared_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """`share_inputs` on a batch as passed to the model; if that forward fails, log a warning and continue.

    Each layer then computes its input's product separately: slower, with the same result. So it does for a trainer
    whose batches are not the inputs of its model, such as those that generate completions.
    """
    if getattr(model, "main_input_name", None) not in (None, *batch):
        return
    try:
        with kept_random_states():
            share_inputs(model, **batch)
    except Exception as error:  # of any kind: an error of the batch is raised again by the step
        logger.warning_once(
            f"Layers with shared inputs could not be detected because a forward on the first batch failed "
            f"({type(error).__name__}: {error}). Training continues; share_inputs=False turns the detection off."
        )
