"""The state of a model's adapters that is not a tensor: which there are, their tasks, and which are active."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import Faults, StateError, nearest
from ..layers.contract import Storage
from ..layers.hosts import Activity
from ..layers.parts import Part
from .ties import Ties
from .walk import ATTRIBUTE, adapter_modules, held_parameters, parts

_FROZEN = "frozen_by_user"


@dataclass
class Task:
    """The task that an adapter was trained for, as transformers' config describes one."""

    num_labels: int | None = None
    id2label: dict[int, str] | None = None
    label2id: dict[str, int] | None = None
    problem_type: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Task:
        config = getattr(model, "config", None)
        if config is None or getattr(config, "id2label", None) is None:
            return cls()
        return cls(
            len(config.id2label),
            {int(k): v for k, v in config.id2label.items()},
            dict(config.label2id or {}),
            getattr(config, "problem_type", None),
        )

    @classmethod
    def from_labels(cls, num_labels: int | None, id2label: dict[int, str] | None) -> Task:
        if id2label is None:
            id2label = {i: f"LABEL_{i}" for i in range(num_labels or 0)}
        return cls(len(id2label), dict(id2label), {v: k for k, v in id2label.items()}, None)

    def take_from(self, model: nn.Module) -> Task:
        """Take over what the config says, where the user may have changed it, if it says anything."""
        now = Task.of(model)
        if now.id2label is not None:
            self.__dict__.update(now.__dict__)
        return self

    def apply(self, model: Any) -> None:
        """Write the task to the model and its config, which the losses read."""
        config = getattr(model, "config", None)
        if config is None or self.id2label is None:
            return
        config.id2label = dict(self.id2label)
        config.label2id = dict(self.label2id or {})
        config.problem_type = self.problem_type
        for module in model.modules():  # of a model around others, those that share its config
            if "num_labels" in module.__dict__ and getattr(module, "config", None) is config:
                module.num_labels = self.num_labels


@dataclass
class AdapterRecord:
    """Everything about one adapter of a model that is not a tensor.

    Args:
        heads: name -> reason, for the modules that it trains whole.
        skipped: name -> reason, for the modules that its configuration skips.
        notes: lines at the end of its table.
        named_by_user: whether the user named its layers (by a list or regular expression) rather than a preset.
        trainable: whether its tensors require gradients while it is active.
        has_labels: whether one of `heads` is the task head, whose outputs `task` describes.
    """

    config: LoraConfig
    task: Task
    heads: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named_by_user: bool = True
    trainable: bool = True
    has_labels: bool = False


@dataclass
class Original:
    """A tensor of the base before a merge. `site.weight` is the current tensor."""

    site: Any
    storage: Storage
    kept: Tensor
    merged: bool = True
    """Whether the merged tensor is in place, and `kept` the original; otherwise the other way round."""

    def put_back(self) -> None:
        self.storage.put_back(self.site, self.kept)

    def place(self, merged: bool) -> None:
        """Put the merged or the original tensor in place, and keep the other one."""
        if self.merged == merged:
            return
        now = self.storage.keep(self.site)
        try:
            self.put_back()
            self.__dict__.update(kept=now, merged=merged)
        except BaseException:
            if self.kept is not now:
                self.storage.put_back(self.site, now)
            raise


@dataclass
class LoraState:
    """Everything about a model's adapters that is not a tensor. The root module holds it."""

    activity: Activity = field(default_factory=Activity)
    originals: list[Original] = field(default_factory=list)
    """Tensors of the base before merging, so that unmerging restores every bit."""
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    """Name -> adapter, in the order in which they were added."""
    required_grad: dict[str, bool] = field(default_factory=dict)
    """Original parameter name -> requires_grad before the first adapter."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Identity of the base model before anything changed: see files/identity.py."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings in the files of the base model: see files/base_config.py."""
    base_task: Task = field(default_factory=Task)
    """The task of the model before the first adapter."""
    random_base: bool = False
    vocabulary: int | None = None
    """Rows of the input embedding in the base checkpoint, if known."""
    new_modules: list[str] = field(default_factory=list)
    """Modules that the base checkpoint lacks; sharding removes the marks that show them."""
    has_batchnorm: bool = False
    resumable: bool = False
    """Whether a LoraTrainer trains the model, which can resume from the saved checkpoints."""
    borrowed: list[str] = field(default_factory=list)
    """Attributes that a Trainer set on the model and that are removed with the adapters."""
    ties: Ties | None = None
    """The ties of the base before a merge untied weights."""
    active_unmerged: tuple[str, ...] | None = None
    """The adapters that were active before others were merged by name, to be active again after `unmerge`."""
    permanent: bool = False
    """Whether the merged adapters cannot be unmerged, because the originals were not kept."""
    lost: str = ""
    """Why the model cannot be used any more: a permanent merge could be neither undone nor completed."""

    def refuse_permanent(self, call: str) -> None:
        if self.permanent:
            raise StateError(f"{call}: the adapters were merged without keeping the original weights (keep=False).")

    def lose(self, message: str) -> None:
        """Make every verb and every forward of an adapted layer raise."""
        self.lost = message
        self.activity.lose(message)

    def require(self, name: str) -> None:
        if name not in self.adapters:
            raise StateError(
                f"There is no adapter {name!r}{nearest(name, self.adapters)}. "
                f"The model has {', '.join(map(repr, self.adapters)) or 'none'}."
            )

    def refuse_merged(self, call: str) -> None:
        if self.activity.merged:
            raise StateError(
                f"{call}: the adapters {', '.join(map(repr, self.activity.merged))} are merged into the weights. "
                "Call unmerge_adapter() first."
            )


def state_of(model: nn.Module) -> LoraState | None:
    """The state of a model with adapters; None for any other model."""
    return model.__dict__.get(ATTRIBUTE)


def is_over(model: nn.Module) -> bool:
    """Whether a model that had adapters has none any more, or is lost."""
    state = state_of(model)
    return state is None or bool(state.lost)


def base_task(model: nn.Module) -> Task:
    """The task of the base model's head, independent of the active adapter."""
    state = state_of(model)
    if state is None:
        return Task.of(model)
    task = state.base_task
    return task.take_from(model) if running_task(state) is task else task


def running_task(state: LoraState) -> Task:
    """The task of the head that runs: that of the active adapter with a head of its own, otherwise that of the base.

    An adapter without a head may have names for the outputs of the base's head, from the model that it was trained on.
    """
    active = [state.adapters[name] for name in state.activity.active] if state.activity.enabled else []
    for record in active:
        if record.has_labels:
            return record.task
    if active and active[0].task.num_labels == state.base_task.num_labels:
        return active[0].task
    return state.base_task


def task_of(model: nn.Module, name: str) -> Task:
    """The task of an adapter; that in the config while its head runs."""
    state = require_state(model, "task_of")
    task = state.adapters[name].task
    return task.take_from(model) if running_task(state) is task else task


def switch(
    model: nn.Module, state: LoraState, active: tuple[str, ...] | None = None, enabled: bool | None = None
) -> None:
    """Change which adapters act. The labels in model and config are always those of the head that runs."""
    activity, before = state.activity, running_task(state)
    was_active, was_enabled = activity.active, activity.enabled
    before.take_from(model)
    try:
        activity.set(active=active, enabled=enabled)
        now = running_task(state)
        if now is not before:
            now.apply(model)
    except BaseException:
        activity.set(active=was_active, enabled=was_enabled)
        before.apply(model)
        raise


def require_state(model: nn.Module, call: str) -> LoraState:
    state = state_of(model)
    if state is not None and state.lost:
        raise StateError(f"{call}: {state.lost}")
    if state is None:
        raise StateError(f"{call}: this {type(model).__name__} has no adapters. Call apply_lora(model, config) first.")
    return state


def update_requires_grad(model: nn.Module, state: LoraState, names: Iterable[str]) -> None:
    """Set `requires_grad` of the tensors of `names`: true if the adapter is active and trainable, except for what
    `keep_frozen` noted."""
    wanted = {name: state.adapters[name].trainable and name in state.activity.active for name in names}
    for name, held in adapter_modules(model, wanted) if wanted else ():
        frozen = held.__dict__.get(_FROZEN, ())
        for key, parameter in held_parameters(held):
            parameter.requires_grad = wanted[name] and key not in frozen
            if not parameter.requires_grad:
                parameter.grad = None


def keep_frozen(model: nn.Module, state: LoraState) -> None:
    """Note which tensors of the active adapters the user froze, so that they stay frozen after the adapters were
    inactive. Called before `requires_grad` of an active adapter changes."""
    trained = [n for n, record in state.adapters.items() if record.trainable and n in state.activity.active]
    for _, held in adapter_modules(model, trained):
        _note_frozen(held, held_parameters(held))


def _note_frozen(held: nn.Module, parameters: list[tuple[str, nn.Parameter]]) -> None:
    frozen = [key for key, parameter in parameters if not parameter.requires_grad]
    if frozen or _FROZEN in held.__dict__:
        held.__dict__[_FROZEN] = frozen


def set_active(model: nn.Module, state: LoraState, names: tuple[str, ...]) -> None:
    """Make `names` the active adapters.

    Raises:
        StateError: a name is unknown, the model is merged, or the adapters conflict.
    """
    state.refuse_merged("set_adapter")
    for name in names:
        state.require(name)
    if len(set(names)) != len(names):
        raise StateError(f"set_adapter({list(names)}): an adapter is named twice.")
    if len(names) > 1:
        _refuse_conflicts(model, names)
    before = state.activity.active
    switched = {n for n in (*before, *names) if (n in before) != (n in names)}
    changed = {n for n in switched if n in state.adapters and state.adapters[n].trainable}
    tensors: list[tuple[nn.Parameter, bool]] = []  # whose `requires_grad` changes, and to what
    grads: list[tuple[nn.Parameter, Tensor]] = []  # of those that are not trained then
    for name, held in adapter_modules(model, changed) if changed else ():
        leaves, parameters = name in before, held_parameters(held)
        if leaves:
            _note_frozen(held, parameters)
        frozen = held.__dict__.get(_FROZEN, ())
        for key, tensor in parameters:
            wanted = not leaves and key not in frozen
            if tensor.requires_grad is not wanted:
                tensors.append((tensor, wanted))
            if not wanted and tensor.grad is not None:
                grads.append((tensor, tensor.grad))
    try:
        switch(model, state, active=names)
        for tensor, wanted in tensors:
            tensor.requires_grad = wanted
        for tensor, _ in grads:
            tensor.grad = None
    except BaseException:
        switch(model, state, active=before)
        for tensor, wanted in tensors:
            tensor.requires_grad = not wanted
        for tensor, grad in grads:
            tensor.grad = grad
        raise


def acting_together(model: nn.Module, names: tuple[str, ...]) -> list[list[Part]]:
    """The parts of the adapters `names`, in this order, grouped by the module or weight that they act on."""
    together: dict[tuple[type[Part], str], list[Part]] = {}
    for part in parts(model):
        if part.adapter in names:
            together.setdefault((type(part), part.name), []).append(part)
    for group in together.values():
        group.sort(key=lambda part: names.index(part.adapter))
    return list(together.values())


def _refuse_conflicts(model: nn.Module, names: tuple[str, ...]) -> None:
    faults = Faults(f"set_adapter({list(names)}): these adapters cannot be active together")
    together = acting_together(model, names)
    for first, *others in together:
        if others and (conflict := first.conflict(others)) is not None:
            faults.add(conflict)
    everything = [part for group in together for part in group]
    for whole in (part for part in everything if part.whole_module):
        for part in everything:
            below = f"{part.path}.".startswith(f"{whole.path}.") and not (
                part.path == whole.path and part.whole_module
            )
            if below and part.adapter != whole.adapter:
                faults.add(
                    f"{whole.path}: {whole.adapter!r} replaces this module, so what {part.adapter!r} has at "
                    f"{part.name} would have no effect"
                )
    faults.check(StateError, "Set one of them at a time.")
