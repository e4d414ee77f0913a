"""A watch over the first optimizer steps: does every adapted layer take part, and does it learn?

An adapter on a layer whose forward never runs (a pooler that the task leaves out, a layer whose parent multiplies by
its weight itself) stays at its initial values without any error. So for a few steps the guard counts forwards and
looks at the gradients of whole layers. Single factors say nothing: at B = 0 every gradient of A is zero.

What it finds:
    never called, named by the user       an error that lists all such layers
    never called, found by a preset       the adapter is taken off these layers, with a warning that lists them
    called, no gradient reached A or B    listed, kept
    a gradient that is not finite         an error, before the optimizer writes it into the weights (under LoraTrainer
                                          for the whole run, by finite.py)
A layer of a list whose sisters are called only now and then (dropped layers, routed experts) is given four times as
many steps, and kept in any case. Afterwards the hooks are gone and nothing is looked at any more.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.utils import logging

from ...adapt.inject import drop_layers
from ...adapt.state import require_state, state_of
from ...adapt.walk import adapter_layers
from ...compat import scales_loss
from ...errors import TrainingError
from ...layers.base import LoraLayer
from ...layers.distributed import agreed, is_sharded, local_part

logger = logging.get_logger(__name__)

NEVER_CALLED = "never called in training"
"""Why a layer was left out, in tables and checkpoints."""
PATIENCE = 4
"""How many times the given number of steps the guard waits for what may be a matter of chance."""


@dataclass
class _Watched:
    """One adapted layer under watch, and what was seen of it."""

    name: str
    layer: Any
    adapters: list[str]
    calls: int = 0
    learned: bool = False

    @property
    def ran(self) -> bool:
        return self.calls > 0 or self.learned

    def count(self, module: Any, args: Any) -> None:
        if module.training or torch.is_grad_enabled():  # an evaluation in between proves nothing about training
            self.calls += 1

    def has_values(self) -> bool:
        """Whether an adapter acts, as one that was loaded does: it is not taken off, whatever this task calls."""
        return any(
            bool(factor.weight.count_nonzero())
            for a in self.adapters
            for kind, factor in self.layer.factors(a)
            if self.layer._lora.adapters[a].specs[kind].axes == "OR"
        )

    def is_held(self, parameters: set[int]) -> bool:
        """Whether the optimizer has the adapters' parameters as they are: DeepSpeed glues them together."""
        factors = [f.weight for a in self.adapters for _, f in self.layer.factors(a)]
        return not parameters or all(id(weight) in parameters for weight in factors if weight.requires_grad)

    def gradients(self) -> list[Tensor]:
        found = []
        for adapter in self.adapters:
            for _, factor in self.layer.factors(adapter):
                if factor.weight.grad is not None:
                    found.append(local_part(factor.weight.grad))
        return found


class LayerGuard(TrainerCallback):
    """Watches the first optimizer steps of a run. `LoraTrainer` brings one; a plain Trainer takes it as a callback.

    Args:
        steps: how many optimizer steps with a gradient are watched; 0 turns the guard off. Steps in which nothing at
            all has a gradient (every label ignored) do not count.

    Raises:
        TrainingError: from within training; see the module's docstring.
    """

    STEPS = 4

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self.judges_values = True
        """Whether gradients that are not finite are an error here; `LoraTrainer` leaves them to finite.py."""
        self.watched: list[_Watched] = []
        self._handles: list[RemovableHandle] = []
        self._seen = self._idle = 0
        self._counts_calls = True
        self._sees_gradients = self._overflowed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.finish()
        if self.steps < 1 or model is None or state_of(model) is None:
            return
        self._seen = self._idle = 0
        self._sees_gradients = self._overflowed = False
        # A compiled model's hooks would be compiled in, and taking them off would compile it again.
        self._counts_calls = not getattr(args, "torch_compile", False)
        for name, layer in adapter_layers(model).items():
            adapters = [a for a in layer._lora.names if any(f.weight.requires_grad for _, f in layer.factors(a))]
            if adapters:
                watched = _Watched(name, layer, adapters)
                self.watched.append(watched)
                if self._counts_calls:
                    self._handles.append(watched.layer.host().register_forward_pre_hook(watched.count))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if not self.watched:
            return
        finite, moved = self._look()
        if any(_is_sharded(w.layer) for w in self.watched):
            finite = agreed(torch.tensor(finite)).tolist()  # each process sees its own parts only
        self._overflowed = not all(finite) and (scales_loss(optimizer) or not self.judges_values)
        if self._overflowed:
            return  # the step is not made, and says nothing
        if not all(finite):
            broken = [w.name for w, good in zip(self.watched, finite, strict=True) if not good]
            self.finish()
            raise TrainingError(
                f"Step {state.global_step + 1}: the gradients of {_some(broken)} are not finite. The weights are "
                "still those of the step before. Common causes: a batch whose labels are all ignored, a learning rate "
                "that is too high, fp16 without loss scaling, values that are not finite in the data."
            )
        for watched, good in zip(self.watched, moved, strict=True):
            watched.learned |= good

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not self.watched or self._overflowed:
            return
        self._share(args)
        if any(w.learned for w in self.watched):
            self._seen += 1
        else:
            self._idle += 1
        steps = self._seen if self._sees_gradients else self._idle
        if steps < self.steps:
            if self._idle >= PATIENCE * self.steps:
                self._end_without_gradient()
            return
        waiting = any(not w.ran and self._sisters(w) for w in self.watched)
        if waiting and steps < PATIENCE * self.steps:
            return
        self._judge(model, optimizer, state, steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A run that is shorter than the watch: too little was seen to take anything off, enough to say so.
        idle = [w.name for w in self.watched if not w.ran] if self._counts_calls else []
        if idle and self._seen and state.is_world_process_zero:
            logger.warning(f"In the {self._seen} steps of this run these layers were never called: {_some(idle)}.")
        self.finish()

    def finish(self) -> None:
        """Take all hooks off and forget the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.watched = [], []

    def _look(self) -> tuple[list[bool], list[bool]]:
        """For each layer: whether its gradients are finite, and whether one is not zero. One wait for the device."""
        flags: list[Tensor] = []
        for watched in self.watched:
            gradients = watched.gradients()
            if gradients:
                self._sees_gradients = True
                good = torch.stack([g.isfinite().all() for g in gradients]).all()
                moved = torch.stack([g.count_nonzero() > 0 for g in gradients]).any()
                flags.append(torch.stack([good, moved]))
            else:
                flags.append(torch.tensor([True, False]))
        device = next((f.device for f in flags if f.device.type != "cpu"), torch.device("cpu"))
        table = torch.stack([f.to(device, non_blocking=True) for f in flags]).cpu().tolist()
        return [good for good, _ in table], [moved for _, moved in table]

    def _share(self, args: Any) -> None:
        """Let every process know what any of them saw, so that all decide the same."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        seen = torch.tensor([[w.calls, int(w.learned)] for w in self.watched], device=args.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        for watched, (calls, learned) in zip(self.watched, seen.tolist(), strict=True):
            watched.calls, watched.learned = calls, bool(learned)

    def _sisters(self, watched: _Watched) -> list[_Watched]:
        """Called layers of the same name but for the numbers in it: other members of the same lists."""
        pattern = re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(watched.name))
        if pattern == re.escape(watched.name):
            return []
        return [w for w in self.watched if w.ran and re.fullmatch(pattern, w.name)]

    def _by_chance(self, watched: _Watched) -> bool:
        """Whether its sisters are called now and then, so that it may be called later."""
        sisters = self._sisters(watched)
        most = max((w.calls for w in sisters), default=0)
        return any(w.calls < most for w in sisters)

    def _judge(self, model: Any, optimizer: Any, trainer_state: Any, steps: int) -> None:
        watched = self.watched
        uncalled = [w for w in watched if not w.ran] if self._counts_calls else []
        chance = [w for w in uncalled if self._by_chance(w)]
        uncalled = [w for w in uncalled if w not in chance]
        # DeepSpeed keeps the gradients to itself: there, only the calls are known.
        called = [w for w in watched if w.ran or not self._counts_calls] if self._sees_gradients else []
        quiet = [w for w in called if not w.learned]
        self.finish()

        state = require_state(model, "LayerGuard")
        records = state.adapters
        named = [w for w in uncalled if any(a not in records or records[a].named_by_user for a in w.adapters)]
        if named:
            names = [w.name for w in named]
            raise TrainingError(
                "\n".join(
                    [
                        f"{len(names)} adapted layers were never called in {steps} training steps, so their adapters "
                        "learn nothing:",
                        *(f"  - {name}" for name in names),
                        f"Leave them out (exclude_modules={names!r}), or correct target_modules. A layer whose parent "
                        "multiplies by its weight without calling it cannot be adapted.",
                    ]
                )
            )
        main = trainer_state.is_world_process_zero
        if uncalled:
            self._drop(model, optimizer, uncalled, steps, main)
        if chance and main:
            logger.warning(
                f"Not called yet in {steps} steps, and kept since others of the same list are called now and then: "
                f"{_some([w.name for w in chance])}."
            )
        if quiet and main:
            listed = _some([w.name for w in quiet])
            if self._counts_calls:
                logger.warning(
                    f"Called, but no gradient reached their adapters in {steps} steps: {listed}. They are kept and "
                    "stay as they are."
                )
            else:
                logger.warning(
                    f"No gradient reached the adapters of these layers in {steps} steps (under torch.compile it is "
                    f"not seen whether they are called): {listed}. They are kept and stay as they are."
                )

    def _drop(self, model: Any, optimizer: Any, uncalled: list[_Watched], steps: int, main: bool) -> None:
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        kept = [w for w in uncalled if _is_sharded(w.layer) or w.has_values() or not w.is_held(held)]
        if kept and main:
            listed = _some([w.name for w in kept])
            logger.warning(f"Never called in {steps} training steps, so their adapters stay as they are: {listed}.")
        uncalled = [w for w in uncalled if w not in kept]
        if not uncalled:
            return
        names = [w.name for w in uncalled]
        gone = {id(f.weight) for w in uncalled for a in w.adapters for _, f in w.layer.factors(a)}
        for adapter in {a for w in uncalled for a in w.adapters}:
            drop_layers(model, adapter, set(names), NEVER_CALLED)
        # The optimizer's state is saved by position, so a run that resumes must find the same parameters.
        for group in getattr(optimizer, "param_groups", ()):
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        if main:
            logger.warning(
                f"Never called in {steps} training steps, so the adapter was taken off these layers: {_some(names)}. "
                "They are not saved."
            )

    def _end_without_gradient(self) -> None:
        steps = self._idle
        self.finish()
        raise TrainingError(
            f"In {steps} training steps no adapted layer had a gradient other than zero: nothing is learned. Common "
            "causes: every label is ignored (-100), the loss does not depend on the adapted layers, or the adapters "
            "are not active."
        )


def check_finite(model: nn.Module, call: str) -> None:
    """Refuse to write weights that are not finite.

    Raises:
        TrainingError: lists the trained tensors with NaN or infinite values.
    """
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trained:
        return
    device = trained[0][1].device
    parts = [local_part(p).detach() for _, p in trained]
    good = torch.stack([part.isfinite().all().to(device, non_blocking=True) for part in parts])
    if any(is_sharded(p) for _, p in trained):
        good = agreed(good)  # each process sees its own parts only, and all have to stop
    bad = [name for (name, _), fine in zip(trained, good.tolist(), strict=True) if not fine]
    if bad:
        raise TrainingError(
            f"{call}: {len(bad)} of {len(trained)} trained tensors hold values that are not finite: {_some(bad)}. "
            "Nothing was written, and earlier checkpoints are as they were. Resume from one of them with a lower "
            "learning rate or more warm-up."
        )


def _is_sharded(layer: LoraLayer) -> bool:
    return any(is_sharded(f.weight) for a in layer._lora.names for _, f in layer.factors(a))


def _some(names: list[str], shown: int = 20) -> str:
    listed = ", ".join(names[:shown])
    return listed if len(names) <= shown else f"{listed} … and {len(names) - shown} more"
