"""What is done, checked and said before the first step of training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..adapt.report import trainable_line
from ..adapt.resize import frozen_new_rows
from ..adapt.sharing import share_inputs
from ..adapt.state import LoraState, require_state, state_of
from ..adapt.walk import adapter_layers
from ..apply import apply_lora
from ..compat import shifts_labels
from ..errors import StateError, TrainingError
from ..layers.distributed import is_dtensor
from .arguments import LoraArguments
from .precision import precision_line

logger = logging.get_logger(__name__)

DEFAULT_RATE = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "learning_rate")
"""Trainer's own default, meant for full fine-tuning."""


@contextlib.contextmanager
def unused_parameters_found(args: TrainingArguments) -> Iterator[None]:
    """Within, DDP is told to search for unused parameters also under gradient checkpointing.

    Trainer turns the search off there, though only the reentrant kind cannot bear it. Adapters of layers that the task
    never calls need it: see guard.py.
    """
    asked = args.ddp_find_unused_parameters
    kwargs: Any = args.gradient_checkpointing_kwargs or {}
    if asked is None and args.gradient_checkpointing and not kwargs.get("use_reentrant", False):
        args.ddp_find_unused_parameters = True
    try:
        yield
    finally:
        args.ddp_find_unused_parameters = asked


def take_trial(args: TrainingArguments, trial: Any, space: Any) -> None:
    """Write a trial's values of the adapter into the arguments: Trainer does so only after the model is made."""
    values = trial if isinstance(trial, dict) else space(trial) if trial is not None and space is not None else None
    for name, value in (values or {}).items():
        if name.startswith("lora_") and hasattr(args, name):
            setattr(args, name, value)


def adapt(model: nn.Module, given: Any, args: TrainingArguments, trainer: str) -> None:
    """Put the adapter into a model that has none, as `given` (a `lora_config`) or else the LoRA fields of `args` say.

    Args:
        trainer: the class, for messages.
    """
    flags = args if isinstance(args, LoraArguments) else None
    call = f"{trainer}(…, lora_config=…)"
    state = state_of(model)
    reason = None
    if state is None:
        config = flags.lora_config() if given is None and flags is not None else given
        if apply_lora(model, config, allow_bypassed=bool(flags and flags.lora_allow_bypassed)) is not model:
            raise StateError(
                f"{call}: {type(model).__name__} has no task head. Call model = apply_lora(model, config, "
                f"num_labels=…), which builds one, and hand what it returns to {trainer}."
            )
        state = require_state(model, call)
        reason = "lora_config is given" if given is not None else None
    else:
        reason = f"the model already has the adapters {_listed(state.adapters)}"
        if given is not None:
            raise StateError(
                f"{call}: {reason}. Leave lora_config out to train the active one, call model.unload() to start "
                "again, or model.add_adapter(name, config) for one more."
            )
    state.resumable = True
    changed = flags.changed_lora_fields() if flags is not None and reason is not None else []
    configs = [record.config for record in state.adapters.values()]
    if flags is not None and changed and flags.lora_config() not in configs:
        logger.warning(f"These arguments have no effect, since {reason}: {', '.join(changed)}.")


def adopt_metrics(trainer: Trainer) -> None:
    """Use what `build_compute_metrics` made to its full: reduced logits, labels shifted as the model does."""
    metrics: Any = trainer.compute_metrics
    if not hasattr(metrics, "preprocess_logits_for_metrics"):
        return
    if getattr(metrics, "shift_labels", False) is None:
        trainer.compute_metrics = metrics = copy.copy(metrics)
        metrics.shift_labels = shifts_labels(trainer)
    if trainer.preprocess_logits_for_metrics is None:
        trainer.preprocess_logits_for_metrics = metrics.preprocess_logits_for_metrics


def may_share_inputs(trainer: Trainer, model: nn.Module) -> bool:
    """Whether layers may read an input together: not where others call them, cut them up or copy them."""
    args = trainer.args
    return getattr(args, "share_inputs", True) and not (
        args.torch_compile
        or args.n_gpu > 1
        or trainer.is_deepspeed_enabled
        or trainer.is_fsdp_enabled
        or any(is_dtensor(p) for p in model.parameters())
    )


def check_start(model: nn.Module, call: str) -> None:
    """Refuse to train where nothing would be learned, or where what is random would be in no file."""
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


def start_lines(model: nn.Module, accelerator: Any, optimizer: Any) -> list[str]:
    """The trainable share, each active adapter, the precision. `optimizer` may be its name in the arguments."""
    state = require_state(model, "train")
    adapters = [summary(model, state, name) for name in state.activity.active]
    own = getattr(optimizer, "optimizer", optimizer)  # a second run finds it wrapped
    name = type(own).__name__ if hasattr(own, "param_groups") else str(getattr(own, "value", own))
    return [trainable_line(model), *adapters, precision_line(model, accelerator, name)]


def warn_at_start(model: nn.Module, learning_rate: float | None, dtype: torch.dtype | None) -> None:
    """Warn of a base that is random or no longer of its first `dtype`, and of a rate that was not chosen."""
    if require_state(model, "train").random_base:
        logger.warning(
            "The base model was made from a config: its weights are random. LoRA leaves them as they are, so little "
            "can be learned. Load a checkpoint with from_pretrained."
        )
    if learning_rate == DEFAULT_RATE:
        logger.warning_once(
            f"learning_rate is Trainer's default of {DEFAULT_RATE:g}, which suits full fine-tuning. LoRA usually "
            "wants 1e-4 to 5e-4, small models more."
        )
    if base_dtype(model) != dtype:
        logger.warning(
            f"An evaluation in half precision turned the base from {dtype} to {base_dtype(model)}, so training starts "
            "from rounded weights. Train before evaluating, or load the model again."
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


def base_dtype(model: Any) -> torch.dtype | None:
    """The dtype of the first frozen floating-point parameter, or None."""
    return next((p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()), None)


def find_shared_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """`share_inputs` on a batch as the model gets it; if that forward fails, a warning says so and training goes on.

    Each layer then reads its input by itself: slower, with the same result.
    """
    try:
        share_inputs(model, **batch)
    except Exception as error:  # whatever it is: if the batch is at fault, the step itself says so next
        logger.warning_once(
            f"Which layers share an input was not found out, since a forward on the first batch failed "
            f"({type(error).__name__}: {error}). Training goes on; share_inputs=False leaves the attempt out."
        )


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
