"""`apply_lora`: add an adapter to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers.utils import logging

from .adapt.inner import refuse_inner
from .adapt.labels import CLASSIFICATION, add_with_labels, is_backbone, with_task_head
from .adapt.state import LoraState, Task, state_of
from .adapt.undo import all_or_nothing
from .config import LoraConfig
from .file_merge.original import weights_of_checkpoint
from .files.base_config import base_settings
from .files.identity import identify
from .model import LoraModel

logger = logging.get_logger(__name__)
M = TypeVar("M", bound=nn.Module)


def apply_lora(
    model: M,
    config: object = None,
    adapter_name: str = "default",
    *,
    num_labels: int | None = None,
    id2label: dict[int, str] | None = None,
    allow_bypassed: bool = False,
    batches: Iterable[object] | None = None,
    original: Callable[[str], Tensor] | None = None,
) -> M:
    """Add a LoRA adapter to `model` in place, and freeze everything else.

    A `PreTrainedModel` gets the methods of `LoraModel`; `isinstance`, its forward, `generate` and tied weights do not
    change. Those inside any other module refuse to save themselves, because their file would lack the adapters. If the
    model has adapters already, this adds another one and makes it the active one. For a backbone without a head and a
    classification `task_type`, the result is the task's class around the same weights.

    Args:
        model: any `nn.Module`. Only transformers models get methods; the functions of `hf_lora.adapt` work for all.
        config: `LoraConfig`, a mapping of its fields, a `peft.LoraConfig`, or None for the defaults.
        adapter_name: a name without a dot.
        num_labels: number of labels of this adapter's own head; default: the model's.
        id2label: names of the labels.
        allow_bypassed: adapt a named layer even if its parent multiplies by its weight directly.
        batches: batches for an initialization that uses inputs or gradients: mappings of arguments of the forward.
        original: name of a layer -> its weight in the checkpoint, for an initialization that needs it; default: read
            from the safetensors files that the model was loaded from.

    Returns:
        `model`, or the model of the task around it.

    Raises:
        ConfigError: a field of `config` or the adapter's name is invalid.
        TargetError: lists every pattern that matches nothing and every named module that cannot be adapted.
        StateError: the name exists already, or the model is merged, sharded, or has PEFT layers.
    """
    config = LoraConfig.from_any(config)
    call = "apply_lora(model, config)"
    add: Any = partial(
        add_with_labels, config=config, name=adapter_name, allow_bypassed=allow_bypassed, batches=batches,
        original=original or weights_of_checkpoint(model, call), call=call,
    )  # fmt: skip
    if config.task_type in CLASSIFICATION and is_backbone(model):
        with all_or_nothing(model):
            if num_labels is not None or id2label is not None:
                Task.from_labels(num_labels, id2label).apply(model)
            model = with_task_head(model, config.task_type)
            add(model, then=_beginning(model, call))
        return model
    refuse_inner(model, call)
    add(
        model, num_labels=num_labels, id2label=id2label,
        then=_beginning(model, call) if state_of(model) is None else None,
    )  # fmt: skip
    return model


def _beginning(model: nn.Module, call: str) -> Callable[[LoraState], None]:
    """What ends the first injection. What the base is, is determined before."""
    identity, settings = identify(model), base_settings(model)
    if "not_files" in identity:
        logger.warning(
            f"{call}: the weights of this model are no longer those of {identity['name']} (merged, loaded or edited). "
            "To load the adapter later, save this base before apply_lora (model.save_pretrained(folder)) and pass it: "
            "base_model=folder."
        )

    def begin(state: LoraState) -> None:
        state.identity, state.settings = identity, settings
        LoraModel.begin(model)

    return begin


get_peft_model = apply_lora
"""`apply_lora` under the name that PEFT uses."""
