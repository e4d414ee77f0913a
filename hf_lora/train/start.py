"""What is checked and said before the first step of training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import TrainingArguments
from transformers.utils import logging

from ..adapt.report import trainable_line
from ..adapt.resize import frozen_new_rows
from ..adapt.sharing import share_inputs
from ..adapt.state import LoraState, require_state
from ..adapt.walk import adapter_layers
from ..errors import TrainingError

logger = logging.get_logger(__name__)

DEFAULT_RATE = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "learning_rate")
"""Trainer's own default, meant for full fine-tuning."""


def check_start(model: nn.Module, call: str) -> None:
    """Refuse to train in vain.

    Raises:
        StateError: the model has no adapters, or they are merged.
        TrainingError: no tensor is trainable, or rows of the embedding are new, frozen and in no file.
    """
    state = require_state(model, call)
    state.refuse_merged(call)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            f"{call}: no tensor of the adapters {_listed(state.adapters)} is trainable (active: "
            f"{_listed(state.activity.active) or 'none'}). Load the adapter with is_trainable=True, or activate one "
            "with set_adapter."
        )
    grown = frozen_new_rows(model)
    if grown is not None:
        raise TrainingError(
            f"{call}: the token embedding grew from {grown[0]} to {grown[1]} rows, and the new rows are random, "
            "frozen and in no adapter file. Train and save the embedding whole (modules_to_save with its name, and "
            "that of the output embedding where it is another), or do not resize: many tokenizers have unused tokens."
        )


def announce(model: nn.Module, learning_rate: float | None) -> None:
    """Print the trainable share and the targets; warn of a random base and of a rate that was not chosen.

    Args:
        learning_rate: None where the optimizer was made by the user.
    """
    state = require_state(model, "train")
    print(trainable_line(model))
    for name in state.activity.active:
        print(summary(model, state, name))
    if state.random_base:
        logger.warning(
            "The base model was made from a config: its weights are random. LoRA leaves them as they are, so little "
            "can be learned. Load a checkpoint with from_pretrained."
        )
    if learning_rate == DEFAULT_RATE:
        logger.warning_once(
            f"learning_rate is Trainer's default of {DEFAULT_RATE:g}, which suits full fine-tuning. LoRA usually "
            "wants 1e-4 to 5e-4, small models more."
        )


def summary(model: nn.Module, state: LoraState, name: str) -> str:
    """One line of an adapter: rank, alpha, how many layers of which names, and what is trained whole."""
    layers = [path for path, layer in adapter_layers(model).items() if name in layer._lora.names]
    record = state.adapters[name]
    config = record.config
    kinds = ", ".join(sorted({path.rpartition(".")[2] for path in layers}))
    line = f"LoRA {name!r}: r={config.r}, alpha={config.alpha:g}, {len(layers)} layers ({kinds})"
    whole = ", ".join(record.heads)
    return f"{line}; trained whole: {whole}" if whole else line


def base_dtype(model: Any) -> Any:
    """The dtype of the first frozen floating-point parameter, or None."""
    return next((p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)


def find_shared_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """`share_inputs` on a batch as the model gets it; a forward that fails there is told and stops nothing.

    Each layer then reads its input by itself, which is slower and no other result.
    """
    try:
        share_inputs(model, **batch)
    except Exception as error:  # whatever it is: if the batch is at fault, the step itself says so next
        logger.warning_once(
            f"Which layers share an input was not found out, since a forward on the first batch failed "
            f"({type(error).__name__}: {error}). Training goes on; share_inputs=False leaves the attempt out."
        )


def hold_batchnorm(model: nn.Module, _args: Any) -> None:
    """A forward hook for a module without `LoraModel.train`: a frozen BatchNorm stays in eval mode.

    Its running statistics are the base's, and in no adapter's file.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
