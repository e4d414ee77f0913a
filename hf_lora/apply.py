"""`apply_lora`: put an adapter into a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

from .adapt.labels import CLASSIFICATION, add_with_labels, is_backbone, with_task_head
from .adapt.state import Task, require_state, state_of
from .config import LoraConfig
from .files.identity import identify
from .model import LoraModel, refuse_inner

M = TypeVar("M", bound=nn.Module)


def apply_lora(
    model: M,
    config: Any = None,
    adapter_name: str = "default",
    *,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    allow_bypassed: bool = False,
    batches: Iterable[Any] | None = None,
    original: Callable[[str], Tensor] | None = None,
) -> M:
    """Put a LoRA adapter into `model`, in place, and freeze everything else.

    A `PreTrainedModel` gains the verbs of `LoraModel` and stays what it was: `isinstance`, its forward, `generate` and
    its tied weights. A name that the model does not hold yet adds another adapter, and makes it the active one. A
    backbone without a head and a classification `task_type` gives the task's own class around the same weights.

    Args:
        model: any `nn.Module`; the verbs are there for transformers' models, the functions of `hf_lora.adapt` for all.
        config: `LoraConfig`, a mapping of its fields, a `peft.LoraConfig`, or None for the defaults.
        adapter_name: without a dot.
        num_labels: labels of this adapter's own head, where they are not the model's.
        id2label: their names.
        allow_bypassed: adapt a named layer although its parent multiplies by its weight itself.
        batches: what an initialization that looks at inputs or gradients runs the model on: mappings of the forward's
            arguments.
        original: name of a layer -> its weight as the checkpoint has it, for an initialization that asks for it.

    Returns:
        `model`, or the task's model around it.

    Raises:
        ConfigError: a field of `config` or the adapter's name cannot be used.
        TargetError: lists every pattern that matches nothing and every named module that cannot be adapted.
        StateError: the name is taken, the model is merged, sharded, or holds PEFT layers.
    """
    config = LoraConfig.from_any(config)
    if config.task_type in CLASSIFICATION and is_backbone(model):
        if num_labels is not None or id2label is not None:
            Task.from_labels(num_labels, id2label).apply(model)
            num_labels, id2label = None, None
        model = with_task_head(model, config.task_type)
    call = "apply_lora(model, config)"
    first = state_of(model) is None
    refuse_inner(model, call)
    identity = identify(model) if first else {}
    add_with_labels(
        model, config, adapter_name, num_labels, id2label, allow_bypassed=allow_bypassed, batches=batches,
        original=original, call=call,
    )  # fmt: skip
    if first:
        require_state(model, call).identity = identity
        if isinstance(model, PreTrainedModel):
            LoraModel.begin(model)
    return model


get_peft_model = apply_lora
"""The name under which PEFT's users know `apply_lora`."""
