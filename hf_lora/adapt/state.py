"""The state of a model's adapters that is not a tensor: which there are, their tasks, and which are active."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..config import LoraConfig
from ..data.trained import TrainedFormat
from ..errors import ConfigError, Faults, StateError, nearest
from ..layers.contract import Storage
from ..layers.hosts import Activity
from .ties import Ties
from .walk import ATTRIBUTE


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
        """The task with this number of labels, or with these names.

        Raises:
            ConfigError: there is no such number of labels, or the names are for another one.
        """
        faults = Faults(f"num_labels={num_labels!r}, id2label={id2label!r}")
        if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
            faults.add("num_labels must be an integer >= 1")
        elif id2label is not None and num_labels not in (None, len(id2label)):
            faults.add(f"id2label has {len(id2label)} names")
        if id2label is not None and (not id2label or set(id2label) != set(range(len(id2label)))):
            faults.add("the keys of id2label must be the integers from 0 on, without gaps")
        faults.check(ConfigError, "Nothing was changed.")
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
        trained_format: the format of the rows that it was trained on, if known.
    """

    config: LoraConfig
    task: Task
    heads: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    named_by_user: bool = True
    trainable: bool = True
    has_labels: bool = False
    trained_format: TrainedFormat | None = None


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
    waiting: LoraConfig | None = None
    """The configuration of the adapter if its initialization waits for the batches of a Trainer."""
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


def trained_format(model: nn.Module) -> TrainedFormat | None:
    """The format of the rows that the active adapter was trained on, if known."""
    state = state_of(model)
    active = [state.adapters[name] for name in state.activity.active] if state is not None else []
    return next((record.trained_format for record in active if record.trained_format is not None), None)


def set_trained_format(model: nn.Module, trained: TrainedFormat) -> None:
    """Record the format of the rows with the adapters that are trained."""
    state = require_state(model, "set_trained_format")
    for name in state.activity.active:
        if state.adapters[name].trainable:
            state.adapters[name].trained_format = trained


def require_state(model: nn.Module, call: str) -> LoraState:
    state = state_of(model)
    if state is not None and state.lost:
        raise StateError(f"{call}: {state.lost}")
    if state is None:
        raise StateError(f"{call}: this {type(model).__name__} has no adapters. Call apply_lora(model, config) first.")
    return state
