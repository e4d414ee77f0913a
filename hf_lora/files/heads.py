"""Heads in a file for other labels than the model's."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..adapt.labels import model_on_meta, new_head
from ..adapt.state import Task, base_task
from ..adapt.targets import Explanation
from ..adapt.walk import module_at
from ..layers.ops import kept_random_states
from .format import AdapterFile
from .keys import key_of


def task_in(file: AdapterFile) -> Task | None:
    """The labels that a file of this library names."""
    extras = file.extras
    if extras.get("id2label"):
        id2label = {int(k): v for k, v in extras["id2label"].items()}
        return Task(len(id2label), id2label, {v: k for k, v in id2label.items()}, extras.get("problem_type"))
    return None


def head_source(model: nn.Module, plan: Explanation, task: Task | None) -> PreTrainedModel | None:
    """A model on meta for an adapter whose number of labels differs from the model's; None if it does not."""
    labels = task.num_labels if task is not None else None
    present = base_task(model).num_labels
    if not plan.saved or labels is None or labels == present or getattr(model, "config", None) is None:
        return None
    return model_on_meta(model, labels)


def new_heads(model: nn.Module, plan: Explanation, other: PreTrainedModel | None) -> dict[str, nn.Module]:
    """New heads like those of `other`, which the file's tensors will fill."""
    if other is None:
        return {}
    with kept_random_states():
        return {path: new_head(other, path, module_at(model, path)) for path in plan.saved}


def task_by_shape(model: nn.Module, plan: Explanation, file: AdapterFile) -> Task | None:
    """The unnamed labels of another library's file; None if their number is the model's."""
    labels = _labels_by_shape(model, plan, file)
    return Task.from_labels(labels, None) if labels is not None else None


def _labels_by_shape(model: nn.Module, plan: Explanation, file: AdapterFile) -> int | None:
    """The number of outputs of the head in another library's file; None if it is the model's."""
    present = base_task(model).num_labels
    for path in plan.saved:
        for key, own in module_at(model, path).state_dict().items():
            held = file.tensors.get(key_of(path, key))
            if held is None or not own.dim() or held.shape == own.shape or own.shape[0] != present:
                continue
            if held.shape[1:] == own.shape[1:]:
                return int(held.shape[0])
    return None
