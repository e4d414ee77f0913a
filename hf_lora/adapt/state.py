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
from .walk import adapter_tensors, parts

ATTRIBUTE = "_hf_lora"


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

    def apply(self, model: Any) -> None:
        """Write the task to the model and its config, which the losses read."""
        config = getattr(model, "config", None)
        if config is None or self.id2label is None:
            return
        config.id2label = dict(self.id2label)
        config.label2id = dict(self.label2id or {})
        config.problem_type = self.problem_type
        if hasattr(model, "num_labels"):
            model.num_labels = self.num_labels


@dataclass
class AdapterRecord:
    """Everything about one adapter of a model that is not a tensor.

    Args:
        heads: name -> reason, for the modules that it trains whole.
        skipped: name -> reason, for the modules that its configuration skips.
        notes: lines at the end of its table.
        named_by_user: whether the user named its layers (by a list or regular expression) rather than a preset.
        trainable: whether its tensors require gradients while it is active.
    """

    config: LoraConfig
    task: Task
    heads: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named_by_user: bool = True
    trainable: bool = True


@dataclass
class Original:
    """A tensor of the base before a merge. `site.weight` is the current tensor."""

    site: Any
    storage: Storage
    kept: Tensor

    def put_back(self) -> None:
        self.storage.put_back(self.site, self.kept)

    def swap(self) -> None:
        """Swap it with the current tensor."""
        now = self.storage.keep(self.site)
        self.put_back()
        self.kept = now


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


def base_task(model: nn.Module) -> Task:
    """The task of the base model's head, independent of the active adapter."""
    state = state_of(model)
    return Task.of(model) if state is None else state.base_task


def require_state(model: nn.Module, call: str) -> LoraState:
    state = state_of(model)
    if state is None:
        raise StateError(f"{call}: this {type(model).__name__} has no adapters. Call apply_lora(model, config) first.")
    return state


def update_requires_grad(model: nn.Module, state: LoraState, names: Iterable[str]) -> None:
    """Set `requires_grad` of the tensors of `names`: true if the adapter is active and trainable."""
    wanted = {name: state.adapters[name].trainable and name in state.activity.active for name in names}
    if not wanted:
        return
    for name, parameter in adapter_tensors(model, wanted):
        parameter.requires_grad = wanted[name]
        if not wanted[name]:
            parameter.grad = None


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
    state.activity.set(active=names)
    switched = {n for n in (*before, *names) if (n in before) != (n in names)}
    changed = {n for n in switched if n in state.adapters and state.adapters[n].trainable}
    update_requires_grad(model, state, changed)
    for name in names[:1]:
        state.adapters[name].task.apply(model)


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
