"""No optimizer step is made with a loss or a gradient that is not finite, and no such weight is saved.

After the last backward pass of a step, and before clipping (which spreads one NaN over every gradient), the norm of
all gradients is taken. That is one wait for the device, where Trainer's filter of NaN in the logged loss waits anyway.
Only where the norm is not finite the tensors are looked at. Either a run stops, with the step and the tensors named,
or (`nonfinite="skip"`) the step is left out: weights and the optimizer's state stay as they are, and the learning rate
goes on with the count of steps. Processes decide alike. Loss scaling (fp16) leaves out steps by itself. DeepSpeed
steps inside its backward pass, so there the loss is checked before it (`check_loss`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers.utils import logging

from ...compat import scales_loss
from ...errors import ConfigError, TrainingError
from ...layers.distributed import all_ranks_true, has_peers, is_sharded, local_part, of_all_ranks
from .base import Watch, listed

logger = logging.get_logger(__name__)

ACTIONS = ("stop", "skip")
PATIENCE = 10
"""So many steps without a finite one between them stop a run that skips."""


class FiniteWatch(Watch):
    """Looks at the loss and the gradients of every optimizer step; see the module's docstring.

    Args:
        action: "stop" or "skip".

    Raises:
        ConfigError: `action` is neither.
        TrainingError: from within training: a loss or gradient is not finite, or too many steps were skipped in a row.
    """

    def __init__(self, action: str = "stop") -> None:
        if action not in ACTIONS:
            raise ConfigError(f"nonfinite={action!r} is unknown. It is one of {', '.join(ACTIONS)}.")
        self.action = action
        self.skipped: list[int] = []
        """The steps that were left out, counted from 1."""

    def before_step(self, model: nn.Module, optimizer: Any, loss: Tensor, step: int) -> None:
        if scales_loss(optimizer):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {id(p): local_part(p.grad) for p in parameters if p.grad is not None}
        gradients = {i: g for i, g in gradients.items() if g.numel()}
        if _all_fine(get_total_norm(gradients.values(), foreach=_foreach(gradients)), loss):
            return
        names = {id(p): name for name, p in model.named_parameters()}
        own = [names.get(i, "a parameter") for i, g in gradients.items() if not g.isfinite().all()]
        found = of_all_ranks((own, not bool(loss.isfinite().all())))
        bad, bad_loss = list(dict.fromkeys(n for some, _ in found for n in some)), any(lost for _, lost in found)
        if not bad and not bad_loss:
            return  # the squares overflowed, the values did not
        what = ["the loss"] if bad_loss else []
        what += [f"the gradients of {len(bad)} of {len(parameters)} tensors ({listed(bad)})"] if bad else []
        self._judge(step, f"Step {step}: {' and '.join(what)} {'are' if bad else 'is'} not finite.")
        for parameter in parameters:
            parameter.grad = None  # every optimizer passes over a parameter without gradient

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skipped and state.is_world_process_zero:
            logger.warning(
                f"{len(self.skipped)} of {state.global_step} steps were skipped, since their loss or gradients were "
                f"not finite: {listed([str(step) for step in self.skipped])}."
            )

    def _judge(self, step: int, said: str) -> None:
        if self.action == "stop":
            raise TrainingError(
                f"{said} The weights are still those of the step before, and earlier checkpoints are as they were. "
                "Common causes: a batch whose labels are all ignored, a learning rate that is too high, fp16 without "
                "loss scaling, values that are not finite in the data. Resume with a lower rate or other data, or "
                'leave such steps out with nonfinite="skip".'
            )
        if not self.skipped:
            logger.warning(f"{said} This step is skipped, and so are others like it; they are counted.")
        self.skipped.append(step)
        if self.skipped[-PATIENCE:] == list(range(step - PATIENCE + 1, step + 1)):
            raise TrainingError(
                f"{said} The last {PATIENCE} steps were all skipped for it, so nothing is learned any more. Resume "
                "from an earlier checkpoint with a lower learning rate, or look at the data."
            )


def check_loss(loss: Tensor, step: int) -> None:
    """Refuse a loss that is not finite before DeepSpeed's backward pass. All processes call it, and all raise.

    Raises:
        TrainingError: it is not finite on one of them.
    """
    if not _all_fine(loss):
        raise TrainingError(
            f"Step {step}: the loss is not finite. The weights are still those of the step before, and earlier "
            "checkpoints are as they were. Resume with a lower rate or other data. Under DeepSpeed such a step cannot "
            "be skipped."
        )


def check_finite(model: nn.Module, call: str) -> None:
    """Refuse to write weights that are not finite.

    Raises:
        TrainingError: lists the trained tensors with NaN or infinite values.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return
    device = next(iter(trained.values())).device
    parts = [local_part(p).detach().isfinite().all().to(device, non_blocking=True) for p in trained.values()]
    good = torch.stack(parts)
    if any(is_sharded(p) for p in trained.values()):
        good = all_ranks_true(good)  # each process sees its own parts only, and all have to stop
    bad = [name for name, fine in zip(trained, good.tolist(), strict=True) if not fine]
    if bad:
        raise TrainingError(
            f"{call}: {len(bad)} of {len(trained)} trained tensors hold values that are not finite: {listed(bad)}. "
            "Nothing was written, and earlier checkpoints are as they were. Resume from one of them with a lower "
            "learning rate or more warm-up."
        )


def _foreach(gradients: dict[int, Tensor]) -> bool | None:
    """One call for all tensors; torch chooses it by itself on accelerators alone."""
    return True if all(g.device.type == "cpu" for g in gradients.values()) else None


def _all_fine(*values: Tensor) -> bool:
    """Whether numbers are finite on every process: one wait for the device. All processes call it."""
    device = values[-1].device
    bad = torch.stack([v.detach().to(device).isfinite().all() for v in values]).all().logical_not().to(torch.uint8)
    if has_peers():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    return not bool(bad)
