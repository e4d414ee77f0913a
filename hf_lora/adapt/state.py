"""What is known of a model's adapters, and their tensors by the names of the unadapted model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import LoraConfig
from ..errors import StateError, nearest
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
    def of(cls, model: Any) -> Task:
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
        """Write the task to the model and its config, where the losses read it."""
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
        heads: name -> why, of the modules that it keeps whole.
        skipped: name -> why, of what its configuration left out.
        notes: what its table says below.
        named_by_user: whether its layers were named (a list or regular expression) rather than found by a preset.
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
    """A tensor of the base as it was before a merge. `site` holds it as `site.weight`, whichever parameter that is."""

    site: Any
    storage: Storage
    kept: Tensor

    def put_back(self) -> None:
        self.storage.put_back(self.site, self.kept)

    def swap(self) -> None:
        """Exchange it with what is in its place."""
        now = self.storage.keep(self.site)
        self.put_back()
        self.kept = now


@dataclass
class LoraState:
    """Everything about a model's adapters that is not a tensor. It lives on the root module."""

    activity: Activity = field(default_factory=Activity)
    originals: list[Original] = field(default_factory=list)
    """What merging kept of the base, so that unmerging restores every bit."""
    adapters: dict[str, AdapterRecord] = field(default_factory=dict)
    """What is known of each adapter, in the order in which they came."""
    required_grad: dict[str, bool] = field(default_factory=dict)
    """Original parameter name -> requires_grad before the first adapter."""
    identity: dict[str, Any] = field(default_factory=dict)
    """Of the base model, taken before anything changed: see files/fingerprint.py."""
    base_task: Task = field(default_factory=Task)
    """The model's own task, before the first adapter."""
    random_base: bool = False
    vocabulary: int | None = None
    """Rows of the input embedding in the base checkpoint, as far as is known: see resize.py."""
    has_batchnorm: bool = False
    resumable: bool = False
    """A LoraTrainer is in charge, which can resume from the checkpoints that are saved."""
    borrowed: list[str] = field(default_factory=list)
    """Attributes of the model itself that a Trainer set and that go when the adapters go."""

    def require(self, name: str) -> None:
        if name not in self.adapters:
            raise StateError(
                f"There is no adapter {name!r}{nearest(name, self.adapters)}. "
                f"The model holds {', '.join(map(repr, self.adapters)) or 'none'}."
            )

    def refuse_merged(self, call: str) -> None:
        if self.activity.merged:
            raise StateError(
                f"{call}: the adapters {', '.join(map(repr, self.activity.merged))} are merged into the weights. "
                "Call unmerge_adapter() first."
            )


def state_of(model: nn.Module) -> LoraState | None:
    """The adapters' state of a model that LoRA was applied to, else None."""
    return model.__dict__.get(ATTRIBUTE)


def base_task(model: nn.Module) -> Task:
    """The task of the base model's own head, whichever adapter is active."""
    state = state_of(model)
    return Task.of(model) if state is None else state.base_task


def require_state(model: nn.Module, call: str) -> LoraState:
    state = state_of(model)
    if state is None:
        raise StateError(f"{call}: this {type(model).__name__} has no adapters. Call apply_lora(model, config) first.")
    return state


def update_requires_grad(model: nn.Module, state: LoraState, names: Any) -> None:
    """Let the tensors of `names` require gradients where the adapter is active and trainable."""
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
        StateError: a name is unknown, the model is merged, or the adapters cannot act together.
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
    """The parts of the adapters `names`, in the order of these, grouped by what they act on."""
    together: dict[tuple[type[Part], str], list[Part]] = {}
    for part in parts(model):
        if part.adapter in names:
            together.setdefault((type(part), part.name), []).append(part)
    for group in together.values():
        group.sort(key=lambda part: names.index(part.adapter))
    return list(together.values())


def _refuse_conflicts(model: nn.Module, names: tuple[str, ...]) -> None:
    together = acting_together(model, names)
    faults = [first.conflict(others) for first, *others in together if others]
    found = [fault for fault in faults if fault is not None]
    everything = [part for group in together for part in group]
    for whole in (part for part in everything if part.whole_module):
        for part in everything:
            below = f"{part.path}.".startswith(f"{whole.path}.") and not (
                part.path == whole.path and part.whole_module
            )
            if below and part.adapter != whole.adapter:
                found.append(
                    f"{whole.path}: {whole.adapter!r} has a module of its own there, so what {part.adapter!r} has at "
                    f"{part.name} would not act"
                )
    if found:
        listed = "\n".join(f"  - {f}" for f in found[:20])
        raise StateError(f"set_adapter({list(names)}): these adapters cannot be active together:\n{listed}")
