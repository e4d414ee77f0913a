"""No optimizer step is made with a non-finite loss or gradient, and no such weight is saved.

After the last backward pass of a step, and before clipping (which spreads one NaN to every gradient), the norm of all
gradients is computed. This takes one device synchronization, which Trainer's NaN filter of the logged loss needs
anyway. Single tensors are checked only if the norm is not finite. The run then stops with an error that names the step
and the tensors, or (`nonfinite="skip"`) skips the step: weights and optimizer state do not change, and the schedule of
the learning rate continues. All processes decide the same. With loss scaling (fp16), the scaler skips such steps
itself. DeepSpeed steps within its backward pass, so the loss is checked before it (`check_loss`).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ...compat import scales_loss
from ...errors import ConfigError, TrainingError
from ...layers.distributed import all_ranks_true, has_peers, is_sharded, local_part, of_all_ranks
from .base import Watch, listed

logger = logging.get_logger(__name__)

ACTIONS = ("stop", "skip")
PATIENCE = 10
"""This many consecutive skipped steps stop the run."""


class FiniteWatch(Watch):
    """Checks the loss and the gradients of every optimizer step; see the module's docstring.

    Args:
        action: "stop" or "skip".

    Raises:
        ConfigError: `action` is unknown.
        TrainingError: during training: a loss or gradient is not finite, or too many steps in a row were skipped.
    """

    def __init__(self, action: str = "stop") -> None:
        if action not in ACTIONS:
            raise ConfigError(f"nonfinite={action!r} is unknown. It is one of {', '.join(ACTIONS)}.")
        self.action = action
        self.skipped: list[int] = []
        """The skipped steps, counted from 1."""

    def before_step(self, model: nn.Module, optimizer: Optimizer, loss: Tensor, step: int) -> None:
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
            return  # only the squares overflowed
        what = ["the loss"] if bad_loss else []
        what += [f"the gradients of {len(bad)} of {len(parameters)} tensors ({listed(bad)})"] if bad else []
        self._stop_or_skip(step, f"Step {step}: {' and '.join(what)} {'are' if bad else 'is'} not finite.")
        for parameter in parameters:
            parameter.grad = None  # optimizers skip parameters without a gradient

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.skipped = []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.skipped and state.is_world_process_zero:
            logger.warning(
                f"{len(self.skipped)} of {state.global_step} steps were skipped because their loss or gradients were "
                f"not finite: {listed([str(step) for step in self.skipped])}."
            )

    def _stop_or_skip(self, step: int, fault: str) -> None:
        if self.action == "stop":
            raise TrainingError(
                f"{fault} The weights are those of the previous step, and earlier checkpoints are unchanged. Common "
                "causes: a batch whose labels are all ignored, a learning rate that is too high, fp16 without loss "
                "scaling, non-finite values in the data. Resume with a lower learning rate or other data, or skip "
                'such steps with nonfinite="skip".'
            )
        if not self.skipped:
            logger.warning(f"{fault} This step and others like it are skipped and counted.")
        self.skipped.append(step)
        if self.skipped[-PATIENCE:] == list(range(step - PATIENCE + 1, step + 1)):
            raise TrainingError(
                f"{fault} The last {PATIENCE} steps were all skipped, so the model is no longer trained. Resume from "
                "an earlier checkpoint with a lower learning rate, or check the data."
            )


def check_loss(loss: Tensor, step: int) -> None:
    """Refuse a non-finite loss before DeepSpeed's backward pass. All processes must call it, and all raise.

    Raises:
        TrainingError: the loss is not finite on some process.
    """
    if not _all_fine(loss):
        raise TrainingError(
            f"Step {step}: the loss is not finite. The weights are those of the previous step, and earlier "
            "checkpoints are unchanged. Resume with a lower learning rate or other data. Under DeepSpeed such a step "
            "cannot be skipped."
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
        good = all_ranks_true(good)  # each process has only its own shards, and all must stop
    bad = [name for name, fine in zip(trained, good.tolist(), strict=True) if not fine]
    if bad:
        raise TrainingError(
            f"{call}: {len(bad)} of {len(trained)} trained tensors have values that are not finite: {listed(bad)}. "
            "Nothing was written, and earlier checkpoints are unchanged. Resume from one of them with a lower "
            "learning rate or more warmup."
        )


def _foreach(gradients: dict[int, Tensor]) -> bool | None:
    """One call for all tensors; torch chooses this by default only on accelerators."""
    return True if all(g.device.type == "cpu" for g in gradients.values()) else None


def _all_fine(*values: Tensor) -> bool:
    """Whether values are finite on every process: one device synchronization. All processes must call it."""
    device = values[-1].device
    bad = torch.stack([v.detach().to(device).isfinite().all() for v in values]).all().logical_not().to(torch.uint8)
    if has_peers():
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    return not bool(bad)
