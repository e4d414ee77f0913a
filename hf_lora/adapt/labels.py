"""Heads for a number of labels, and the task's class around a backbone: always as transformers builds them."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config import LoraConfig
from ..errors import StateError, TargetError
from ..layers.class_swap import plain
from .embeddings import output_embedding
from .heads import find_heads, outside_backbone
from .match import matcher
from .state import Task, base_task, state_of
from .walk import module_at, original_modules


def twin(model: Any, num_labels: int, cls: type | None = None) -> Any:
    """A model of `model`'s own class (or `cls`) and config but for the number of labels, without memory (on meta)."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    with torch.device("meta"):
        return (cls or plain(type(model)))(config)


def new_head(twin_model: Any, path: str, like: nn.Module) -> nn.Module:
    """The head `path` of a `twin`, given memory where `like` lives and initialised as its own class does it."""
    head: nn.Module = twin_model.get_submodule(path)
    device = next((p.device for p in like.parameters()), torch.device("cpu"))
    head.to_empty(device=device)
    for module in head.modules():
        twin_model._init_weights(module)
    return head


def with_task_head(backbone: Any, task_type: str) -> Any:
    """A model of the task's own class around the weights of a backbone; its head is new.

    Raises:
        TargetError: transformers has no class of that task for this model.
    """
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[task_type])
    try:
        cls = auto._model_mapping[type(backbone.config)]
    except KeyError:
        raise TargetError(
            f"task_type={task_type!r}: transformers has no {AUTO_CLASSES[task_type]} for {type(backbone).__name__}. "
            "Load a model that has the head you want, or leave task_type out."
        ) from None
    cls = cls[0] if isinstance(cls, (list, tuple)) else cls
    whole = twin(backbone, backbone.config.num_labels, cls)
    whole._modules[whole.base_model_prefix] = backbone
    for name in outside_backbone(whole) or [n for n in whole._modules if n != whole.base_model_prefix]:
        new_head(whole, name, backbone)
    whole.config = backbone.config
    whole.train(backbone.training)
    return whole


AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
CLASSIFICATION = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def task_type_of(model: Any) -> str | None:
    """PEFT's task type for a transformers class, read off the mappings of transformers' auto classes."""
    import transformers

    cls = plain(type(model))
    for task, auto in AUTO_CLASSES.items():
        mapping = getattr(transformers, auto)._model_mapping
        config = type(getattr(model, "config", None))
        if config in mapping and cls in _as_tuple(mapping[config]):
            return task
    return None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def is_backbone(model: Any) -> bool:
    if not isinstance(model, PreTrainedModel) or state_of(model) is not None:
        return False
    from transformers import AutoModel

    mapping = AutoModel._model_mapping
    config = type(model.config)
    found = mapping.get(config, ())
    return type(model) in (found if isinstance(found, (list, tuple)) else (found,))


def own_heads(model: Any, config: LoraConfig, task: Task, call: str) -> tuple[dict[str, nn.Module], LoraConfig]:
    """New heads for an adapter with labels of its own, and its configuration with them named."""
    if config.modules_to_save:
        hits = matcher(config.modules_to_save)
        paths = [name for name, _ in original_modules(model) if hits(name)]
    else:
        paths = list(find_heads(model)) or ([] if output_embedding(model) else outside_backbone(model))
        config = dataclasses.replace(config, modules_to_save=paths)
    heads: dict[str, nn.Module] = {}
    if paths and task.num_labels == base_task(model).num_labels:
        return heads, config
    if paths and task.num_labels is not None:
        other = twin(model, task.num_labels)
        for path in paths:  # a head is what depends on the number of labels; the rest stays a copy of the base's
            if _shapes(other.get_submodule(path)) != _shapes(module_at(model, path)):
                heads[path] = new_head(other, path, module_at(model, path))
    if not heads:
        raise StateError(
            f"{call}: {type(model).__name__} has no task head that could take num_labels={task.num_labels}."
        )
    return heads, config


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for key, tensor in module.state_dict().items() if "lora_" not in key]
