"""Task heads for a number of labels, and the task's class around a backbone, both built by transformers."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..config import LoraConfig, as_tuple
from ..errors import StateError, TargetError
from ..layers.class_swap import unwrap_class
from .embeddings import output_embedding
from .heads import called_parts, find_heads, has_outputs, outside_backbone
from .inject import inject
from .match import matcher
from .state import Task, base_task, state_of
from .walk import module_at, original_modules

logger = logging.get_logger(__name__)


def model_on_meta(model: Any, num_labels: int | None, cls: type | None = None) -> PreTrainedModel:
    """A model on meta with the class (or `cls`) and config of `model`, except for the number of labels."""
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    with torch.device("meta"):
        return (cls or unwrap_class(type(model)))(config)


def new_head(meta_model: PreTrainedModel, path: str, like: nn.Module) -> nn.Module:
    """The head `path` of a model on meta, moved to the device of `like` and initialized by its class."""
    head: nn.Module = meta_model.get_submodule(path)
    device = next((p.device for p in like.parameters()), torch.device("cpu"))
    head.to_empty(device=device)
    for module in head.modules():
        meta_model._init_weights(module)
    return head


def with_task_head(backbone: Any, task_type: str) -> Any:
    """A model of the task's class around the weights of a backbone, with a new head.

    Raises:
        TargetError: transformers has no class for that task and this model.
    """
    import transformers

    auto = getattr(transformers, AUTO_CLASSES[task_type])
    try:
        cls = auto._model_mapping[type(backbone.config)]
    except KeyError:
        raise TargetError(
            f"task_type={task_type!r}: transformers has no {AUTO_CLASSES[task_type]} for {type(backbone).__name__}. "
            "Load a model with the head that you want, or omit task_type."
        ) from None
    cls = as_tuple(cls)[0]
    whole = model_on_meta(backbone, backbone.config.num_labels, cls)
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


def task_type_of(model: nn.Module) -> str | None:
    """PEFT's task type for a transformers class, according to the auto classes of transformers."""
    return next(_task_types(model), None)


def _task_types(model: nn.Module) -> Iterator[str]:
    import transformers

    cls, config = unwrap_class(type(model)), type(getattr(model, "config", None))
    if isinstance(own := getattr(cls, "task_type", None), str):  # a class of hf_lora.pooled
        yield own
    for task, auto in AUTO_CLASSES.items():
        mapping = getattr(transformers, auto)._model_mapping
        if config in mapping and cls in as_tuple(mapping[config]):
            yield task


def with_task_of_class(model: nn.Module, config: LoraConfig, call: str) -> LoraConfig:
    """The configuration, with the task type of the model's class if its own is that of another class.

    PEFT chooses the class and the heads of an adapter by it: with CAUSAL_LM, the head of a reward model is not saved.
    A backbone may get any head, so any task type fits it.
    """
    fitting = list(_task_types(model)) if config.task_type is not None else []
    if not fitting or fitting[0] == "FEATURE_EXTRACTION" or config.task_type in fitting:
        return config
    logger.warning(
        f"{call}: task_type={config.task_type!r} does not fit a {type(model).__name__}, so the adapter has "
        f"task_type={fitting[0]!r}."
    )
    return dataclasses.replace(config, task_type=fitting[0])


def generates(config: Any) -> bool:
    """Whether the checkpoint of a transformers config is a language model."""
    import transformers

    classes = [getattr(transformers, name, None) for name in config.architectures or []]
    if any(classes):
        return any(cls is not None and cls.can_generate() for cls in classes)
    mapping: Any = transformers.AutoModelForCausalLM
    return type(config) in mapping._model_mapping or bool(getattr(config, "auto_map", None))


def is_backbone(model: nn.Module) -> bool:
    if not isinstance(model, PreTrainedModel) or state_of(model) is not None:
        return False
    from transformers import AutoModel

    mapping: Any = AutoModel._model_mapping
    config = type(model.config)
    return type(model) in as_tuple(mapping.get(config, ()))


def heads_for_task(model: Any, config: LoraConfig, task: Task, call: str) -> tuple[dict[str, nn.Module], LoraConfig]:
    """New heads for an adapter with its own labels, and its configuration with the heads in `modules_to_save`."""
    if config.modules_to_save:
        hits = matcher(config.modules_to_save)
        paths = [name for name, _ in original_modules(model) if hits(name)]
    else:
        paths = list(find_heads(model)) or ([] if output_embedding(model) else outside_backbone(model))
        config = dataclasses.replace(config, modules_to_save=paths)
    paths = [part for path in paths for part in called_parts(path, module_at(model, path))]
    heads: dict[str, nn.Module] = {}
    present = base_task(model).num_labels
    if task.num_labels == present and any(has_outputs(module_at(model, path), present) for path in paths):
        return heads, config
    if paths and task.num_labels is not None:
        other = model_on_meta(model, task.num_labels)
        for path in paths:  # only heads depend on the number of labels; the rest stays a copy of the base's
            if _shapes(other.get_submodule(path)) != _shapes(module_at(model, path)):
                heads[path] = new_head(other, path, module_at(model, path))
    if not heads:
        raise StateError(
            f"{call}: {type(model).__name__} has no task head that depends on num_labels={task.num_labels}."
        )
    return heads, config


def add_with_labels(
    model: Any,
    config: LoraConfig,
    name: str,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    *,
    call: str,
    **kwargs: Any,
) -> None:
    """Add adapter `name`, with its own heads if labels are given. `kwargs` go to `inject`."""
    task, heads = None, None
    config = with_task_of_class(model, config, call)
    if num_labels is not None or id2label is not None:
        task = Task.from_labels(num_labels, id2label)
        heads, config = heads_for_task(model, config, task, call)
    inject(model, config, name, heads=heads, task=task, call=call, **kwargs)


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for key, tensor in module.state_dict().items() if "lora_" not in key]
