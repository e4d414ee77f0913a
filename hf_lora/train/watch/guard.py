"""A check of the first optimizer steps: is every adapted layer called, and does a gradient reach it?

An adapter on a layer whose forward never runs (a pooler that the task does not use, a layer whose parent multiplies by
its weight directly) keeps its initial values without any error. So for a few steps the guard counts calls and checks
the gradients of whole layers. A single factor is not enough: while B = 0, every gradient of A is zero.

Results:
    never called, named by the user       an error that lists all such layers
    never called, found by a preset       the adapter is removed from these layers, with a warning that lists them
    called, no gradient reached A or B    kept, with a warning
    no layer has a gradient               an error
If similar layers of a list are called only occasionally (layer dropout, routed experts), a layer gets four times as
many steps and is kept in any case. Afterwards the hooks are removed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ...adapt.inject import drop_layers
from ...adapt.inner import adapted_part
from ...adapt.state import AdapterRecord, require_state, state_of
from ...adapt.walk import adapter_layers
from ...errors import TrainingError
from ...layers.contract import FactorSpec
from ...layers.distributed import is_sharded, local_part, of_all_ranks
from ...layers.site import Site
from .base import Watch, listed

logger = logging.get_logger(__name__)

NEVER_CALLED = "never called in training"
"""The reason in tables and checkpoints for a layer without adapter."""
PATIENCE = 4
"""The guard waits this many times `steps` for layers that may be called later, or for a first gradient."""


@dataclass
class _Watched:
    """One adapted layer and what was observed."""

    name: str
    layer: Site
    adapters: list[str]
    calls: int = 0
    learned: bool = False

    @property
    def ran(self) -> bool:
        return self.calls > 0 or self.learned

    def count(self, module: nn.Module, args: object) -> None:
        if module.training or torch.is_grad_enabled():  # calls during an evaluation do not count
            self.calls += 1

    def factors(self) -> Iterator[tuple[FactorSpec, Any]]:
        for adapter in self.adapters:
            for kind, factor in self.layer.factors(adapter):
                yield self.layer._lora.adapters[adapter].specs[kind], factor.weight

    def droppable(self, held: set[int]) -> bool:
        """Whether the adapter can be removed: it has no effect yet, and the optimizer (ids `held`) has all of it."""
        acts = any(spec.axes == "OR" and bool(tensor.count_nonzero()) for spec, tensor in self.factors())
        whole = all(id(t) in held for _, t in self.factors() if t.requires_grad) or not held
        return whole and not acts and not any(is_sharded(t) for _, t in self.factors())

    def largest_gradient(self) -> Tensor | None:
        gradients = [local_part(t.grad) for _, t in self.factors() if t.grad is not None]
        gradients = [g for g in gradients if g.numel()]
        return torch.stack([g.abs().amax().float() for g in gradients]).amax() if gradients else None


class LayerGuard(Watch):
    """Checks the first optimizer steps of a run. `LoraTrainer` has one; a plain Trainer takes it as a callback.

    Args:
        steps: number of optimizer steps with a gradient to check; 0 turns the guard off. Steps without any gradient
            (every label ignored) do not count.

    Raises:
        TrainingError: during training; see the module's docstring.
    """

    STEPS = 4

    def __init__(self, steps: int = STEPS) -> None:
        self.steps = steps
        self.watched: list[_Watched] = []
        self._handles: list[RemovableHandle] = []
        self._seen = self._idle = 0
        self._counts_calls = True
        self._sees_gradients = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self.finished()
        model = adapted_part(model) if model is not None else None
        if self.steps < 1 or model is None or state_of(model) is None:
            return
        self._seen = self._idle = 0
        self._sees_gradients = False
        # Hooks of a compiled model would be compiled in, and removing them would compile it again.
        self._counts_calls = not getattr(args, "torch_compile", False)
        for name, layer in adapter_layers(model).items():
            adapters = [a for a in layer._lora.names if any(f.weight.requires_grad for _, f in layer.factors(a))]
            if adapters:
                watched = _Watched(name, layer, adapters)
                self.watched.append(watched)
                if self._counts_calls:
                    self._handles.append(layer.host().register_forward_pre_hook(watched.count))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        found = [(w, largest) for w in self.watched if (largest := w.largest_gradient()) is not None]
        if not found:
            return
        self._sees_gradients = True
        device = found[0][1].device
        values = torch.stack([largest.to(device, non_blocking=True) for _, largest in found]).tolist()
        for (watched, _), value in zip(found, values, strict=True):
            watched.learned |= 0 < value < math.inf  # an overflow, which loss scaling skips, does not count

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: object,
    ) -> None:
        if not self.watched or model is None:
            return
        self._share()
        if self._sees_gradients and not any(w.learned for w in self.watched):
            self._idle += 1
            if self._idle >= PATIENCE * self.steps:
                self.finished()
                raise TrainingError(
                    f"In {self._idle} training steps no adapted layer had a nonzero gradient, so no adapter is "
                    "trained. Common causes: every label is ignored (-100), the loss does not depend on the adapted "
                    "layers, or the adapters are not active."
                )
            return
        self._seen += 1
        waits = any(not w.ran and self._siblings(w) for w in self.watched)
        if self._seen >= (PATIENCE * self.steps if waits else self.steps):
            self._report(adapted_part(model), optimizer, state.is_world_process_zero)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        # The run was shorter than the check: too few steps to remove adapters, so this only warns.
        idle = [w.name for w in self.watched if not w.ran] if self._counts_calls else []
        if idle and self._seen and state.is_world_process_zero:
            logger.warning(f"In the {self._seen} steps of this run these layers were never called: {listed(idle)}.")
        self.finished()

    def finished(self) -> None:
        """Remove all hooks and release the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.watched = [], []

    def _share(self) -> None:
        """Combine the observations of all processes, so that all decide the same."""
        found = of_all_ranks((self._sees_gradients, [(w.calls, w.learned) for w in self.watched]))
        self._sees_gradients = any(sees for sees, _ in found)
        for watched, *seen in zip(self.watched, *(rows for _, rows in found), strict=True):
            watched.calls, watched.learned = max(calls for calls, _ in seen), any(learned for _, learned in seen)

    def _siblings(self, watched: _Watched) -> list[_Watched]:
        """Called layers whose names differ only in numbers: other members of the same lists."""
        same = re.compile(r"\.\d+(?=\.|$)")
        pattern = same.sub(".#", watched.name)
        return [w for w in self.watched if w.ran and same.sub(".#", w.name) == pattern != watched.name]

    def _may_run_later(self, watched: _Watched) -> bool:
        """Whether similar layers are called only occasionally."""
        return len({w.calls for w in self._siblings(watched)}) > 1

    def _report(self, model: nn.Module, optimizer: Optimizer | None, main: bool) -> None:
        uncalled = [w for w in self.watched if not w.ran] if self._counts_calls else []
        later = [w for w in uncalled if self._may_run_later(w)]
        uncalled = [w for w in uncalled if w not in later]
        called = [w for w in self.watched if w.ran or not self._counts_calls]
        # DeepSpeed does not expose the gradients, so only calls are checked.
        quiet = [w for w in called if not w.learned] if self._sees_gradients else []
        self.finished()
        records = require_state(model, "LayerGuard").adapters
        named = [w.name for w in uncalled if any(a not in records or records[a].named_by_user for a in w.adapters)]
        if named:
            lines = [f"{len(named)} adapted layers were never called in {self._seen} training steps, so their "
                     "adapters are not trained:", *(f"  - {name}" for name in named),
                     f"Exclude them (exclude_modules={named!r}) or correct target_modules. A layer whose parent "
                     "multiplies by its weight without calling it cannot be adapted."]  # fmt: skip
            raise TrainingError("\n".join(lines))
        held = {id(p) for group in getattr(optimizer, "param_groups", ()) for p in group["params"]}
        dropped = [w for w in uncalled if w.droppable(held)]
        kept = [w for w in uncalled if w not in dropped]
        _drop(model, optimizer, dropped)
        steps = f"in {self._seen} training steps"
        no_gradient = "Called, but no gradient reached their adapters {}: {}. They are kept but not trained."
        if not self._counts_calls:
            no_gradient = (
                "No gradient reached the adapters of these layers {} (under torch.compile, calls are not counted): "
                "{}. They are kept but not trained."
            )
        for found, text in (
            (kept, "Never called {}, so their adapters are not trained: {}."),
            (dropped, "Never called {}, so the adapter was removed from these layers: {}. They are not saved."),
            (later, "Not called yet {}, but kept because similar layers are called occasionally: {}."),
            (quiet, no_gradient),
        ):
            if found and main:
                logger.warning(text.format(steps, listed([w.name for w in found])))


def layers_left_out(record: AdapterRecord) -> list[str]:
    """The layers that the guard removed an adapter from."""
    return [path for path, why in record.skipped.items() if why == NEVER_CALLED]


def _drop(model: nn.Module, optimizer: Optimizer | None, dropped: list[_Watched]) -> None:
    """Remove the adapters of layers, and their parameters from the optimizer."""
    gone = {id(tensor) for w in dropped for _, tensor in w.factors()}
    for adapter in {a for w in dropped for a in w.adapters}:
        drop_layers(model, adapter, {w.name for w in dropped}, NEVER_CALLED)
    # The optimizer's state is saved by position, so a resumed run needs the same parameters.
    for group in getattr(optimizer, "param_groups", ()) if gone else ():
        group["params"] = [p for p in group["params"] if id(p) not in gone]
