"""A watch over the whole run: no optimizer step is made with a loss or a gradient that is not finite.

After the last backward pass of a step, and before clipping (which spreads one NaN over every gradient), a norm of
every gradient is taken. It is finite where all elements are. What happens then:

    on a CPU, and for optimizers that cannot be told on the device     looked at at once: one wait for the device
    torch's fused optimizers on an accelerator (Trainer's default)     the flag is handed to the optimizer, whose
        kernel leaves weights and state as they are; Python looks at it only where Trainer logs, saves or evaluates

Either a run stops, with the step and the tensors named, or (`nonfinite="skip"`) the step is left out: weights and the
optimizer's state stay as they are, and the learning rate goes on with the count of steps. Processes share the flags,
so they decide alike. Loss scaling (fp16) leaves out steps by itself and is let be. DeepSpeed steps inside its backward
pass, so there the loss is looked at before it, and the gradients are DeepSpeed's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from ...errors import ConfigError, TrainingError
from ...layers.distributed import local_part
from ..part import TrainerPart

logger = logging.get_logger(__name__)

ACTIONS = ("stop", "skip")
PATIENCE = 10
"""So many steps without a finite one between them stop a run that skips."""
_HELD = 100
"""So many steps' flags are kept on the device before they are looked at."""


class FiniteWatch(TrainerCallback):
    """Looks at the gradients of every optimizer step. `LoraTrainer` brings one; see the module's docstring.

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
        self.waits = False
        """Look at every step at once, whatever the optimizer can do."""
        self._loss: Tensor | None = None
        self._held: list[tuple[int, list[int], Tensor]] = []
        self._told: Any = None

    def add(self, loss: Tensor) -> None:
        """Take in the loss of one backward pass."""
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def look(self, model: nn.Module, optimizer: Any, step: int) -> None:
        """Look at the gradients of optimizer step `step`, counted from 1, before they are clipped."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        flags = self._flags(parameters)
        if flags is None:
            return
        inner = getattr(optimizer, "optimizer", optimizer)
        if self.waits or not _takes_flag(inner, flags.device):
            if bool(flags.any()):
                self._judge(model, [(step, [id(p) for p in parameters], flags)], late=False)
                for parameter in parameters:
                    parameter.grad = None  # every optimizer passes over a parameter without gradient
            return
        self._told, inner.found_inf = inner, flags.any().float()
        self._held.append((step, [id(p) for p in parameters], flags))
        if len(self._held) >= _HELD:
            self.judge_held(model)

    def judge_held(self, model: nn.Module) -> None:
        """Look at the flags that were kept on the device: one wait for it."""
        held, self._held = self._held, []
        if not held:
            return
        bad = torch.stack([flags.any() for *_, flags in held]).tolist()
        found = [entry for entry, is_bad in zip(held, bad, strict=True) if is_bad]
        if found:
            self._judge(model, found, late=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()
        self.skipped = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.judge_held(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.skipped and state.is_world_process_zero:
            logger.warning(
                f"{len(self.skipped)} of {state.global_step} steps were skipped, since their loss or gradients were "
                f"not finite: {_some([str(step) for step in self.skipped])}."
            )
        self.finish()

    def finish(self) -> None:
        """Forget what was kept, and take the flag off the optimizer."""
        self._held, self._loss = [], None
        if self._told is not None:
            self._told.found_inf = None
            self._told = None

    def _flags(self, parameters: list[Tensor]) -> Tensor | None:
        """For each parameter, and the loss as the last: whether it is not finite; None where there is no gradient."""
        loss, self._loss = self._loss, None
        # Which parameters have a gradient here may differ from process to process; the flags' places must not.
        gradients = {i: local_part(p.grad) for i, p in enumerate(parameters) if p.grad is not None}
        gradients = {i: g for i, g in gradients.items() if g.numel()}
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if not parameters or (not gradients and not shared):
            return None
        device = local_part(parameters[0]).device
        zero = torch.zeros((), device=device)
        by_place = {i: size.to(device, torch.float32) for i, size in _sizes(gradients, device)}
        values = [by_place.get(i, zero) for i in range(len(parameters))]
        values.append(zero if loss is None else loss.to(device, torch.float32).sum())
        flags = torch.stack(values).isfinite().logical_not()
        if shared:
            numbers = flags.to(torch.uint8)
            dist.all_reduce(numbers, dist.ReduceOp.MAX)
            flags = numbers.bool()
        return flags

    def _judge(self, model: nn.Module, found: list[tuple[int, list[int], Tensor]], late: bool) -> None:
        step, order, flags = found[0]
        flagged = flags.tolist()
        names = {id(p): name for name, p in model.named_parameters()}
        bad = [names.get(i, "a parameter") for i, is_bad in zip(order, flagged[:-1], strict=True) if is_bad]
        what = ["the loss"] if flagged[-1] else []
        what += [f"the gradients of {len(bad)} of {len(order)} tensors ({_some(bad)})"] if bad else []
        said = f"Step {step}: {' and '.join(what)} {'are' if bad else 'is'} not finite."
        if self.action == "stop":
            self.finish()
            kept = (
                "No step was made with them, nor with those of any other such step"
                if late
                else ("The weights are still those of the step before")
            )
            raise TrainingError(
                f"{said} {kept}, and earlier checkpoints are as they were. Common causes: a batch whose labels are "
                "all ignored, a learning rate that is too high, fp16 without loss scaling, values that are not finite "
                'in the data. Resume with a lower rate or other data, or leave such steps out with nonfinite="skip".'
            )
        if not self.skipped:
            logger.warning(f"{said} This step is skipped, and so are others like it; they are counted.")
        self.skipped += [entry[0] for entry in found]
        run = _last_run(self.skipped)
        if run >= PATIENCE:
            self.finish()
            raise TrainingError(
                f"{said} The last {run} steps were all skipped for it, so nothing is learned any more. Resume from an "
                "earlier checkpoint with a lower learning rate, or look at the data."
            )


class FiniteMixin(TrainerPart):
    """The part of `LoraTrainerMixin` that shows every loss and gradient to a `FiniteWatch`."""

    finite: FiniteWatch

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Trainer.training_step`; then the loss and the gradients of a whole step are looked at."""
        loss = super().training_step(*args, **kwargs)
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None or self.optimizer is None:
            return loss
        self.finite.add(loss)
        if self.accelerator.sync_gradients:
            self.finite.look(self._bare_model, self.optimizer, self.state.global_step + 1)
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.compute_loss`; under DeepSpeed the loss is looked at before the backward pass.

        Raises:
            TrainingError: it is not finite.
        """
        result = super().compute_loss(*args, **kwargs)
        if self.is_deepspeed_enabled and self._bare_model.training and torch.is_grad_enabled():
            loss = result[0] if isinstance(result, tuple) else result
            bad = loss.detach().isfinite().all().logical_not().to(torch.uint8)
            if dist.is_initialized():
                dist.all_reduce(bad, dist.ReduceOp.MAX)
            if bool(bad):
                raise TrainingError(
                    f"Step {self.state.global_step + 1}: the loss is not finite. The weights are still those of the "
                    "step before, and earlier checkpoints are as they were. Resume with a lower rate or other data. "
                    "Under DeepSpeed such a step cannot be skipped."
                )
        return result


def _sizes(gradients: dict[int, Tensor], device: torch.device) -> Iterable[tuple[int, Tensor]]:
    """A number for each gradient that is finite where all elements are."""
    if not gradients:
        return ()
    if any(g.device.type != "cpu" for g in gradients.values()):
        return zip(gradients, torch._foreach_norm(list(gradients.values()), math.inf), strict=True)
    # The largest element takes a CPU eight times as long as the root of the squares, which may overflow.
    norms = torch._foreach_norm(list(gradients.values()))
    if not torch.stack([norm.float() for norm in norms]).isfinite().all():
        norms = tuple(g.abs().amax() for g in gradients.values())
    return zip(gradients, norms, strict=True)


def _takes_flag(optimizer: Any, device: torch.device) -> bool:
    """Whether an optimizer's kernel leaves everything as it is where `found_inf` says so, as GradScaler tells it."""
    fused = getattr(optimizer, "_step_supports_amp_scaling", False)
    return device.type != "cpu" and fused and all(group.get("fused") for group in optimizer.param_groups)


def _last_run(steps: list[int]) -> int:
    """How many consecutive numbers end a list."""
    run = 1
    while run < len(steps) and steps[-run - 1] == steps[-run] - 1:
        run += 1
    return run


def _some(names: list[str], shown: int = 20) -> str:
    listed = ", ".join(names[:shown])
    return listed if len(names) <= shown else f"{listed} … and {len(names) - shown} more"
