"""Setup, checks and log messages before the first step of training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.utils import logging

from ..adapt.report import trainable_line
from ..adapt.state import LoraState, require_state, state_of
from ..adapt.undo import all_or_nothing
from ..adapt.unsaved import trained_rows, why_unsaved
from ..adapt.walk import adapter_layers
from ..apply import apply_lora
from ..compat import shifts_labels
from ..config import LoraConfig
from ..errors import ConfigError, Faults, StateError, TargetError, TrainingError
from ..layers.base import LoraLayer
from ..model import LoraModel
from .arguments import LoraArguments
from .engines import check_same_adapters
from .former_names import current_names
from .initialize import looks_at_batches
from .labels import check_labels
from .new_tokens import with_new_tokens
from .optimizer import refuse_projections
from .precision import precision_line

logger = logging.get_logger(__name__)

DEFAULT_RATE = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == "learning_rate")
"""Trainer's default, meant for full fine-tuning."""


@contextlib.contextmanager
def find_unused_parameters(args: TrainingArguments) -> Iterator[None]:
    """Within, `ddp_find_unused_parameters` is on by default also with gradient checkpointing.

    Trainer turns it off there, although only reentrant checkpointing does not support it. It is needed for adapters of
    layers that the task never calls: see guard.py.
    """
    requested = args.ddp_find_unused_parameters
    kwargs: Any = args.gradient_checkpointing_kwargs or {}
    if requested is None and args.gradient_checkpointing and not kwargs.get("use_reentrant", False):
        args.ddp_find_unused_parameters = True
    try:
        yield
    finally:
        args.ddp_find_unused_parameters = requested


def apply_trial(args: TrainingArguments, trial: Any, space: Any) -> None:
    """Set a trial's LoRA fields in the arguments, which Trainer does only after it creates the model."""
    values = trial if isinstance(trial, dict) else space(trial) if trial is not None and space is not None else None
    for name, value in (values or {}).items():
        if name.startswith("lora_") and hasattr(args, name):
            setattr(args, name, value)


def trainer_arguments(trainer: type, given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a trainer under their present names; see `former_names`."""
    known = {
        name for cls in trainer.__mro__ for name in inspect.signature(vars(cls).get("__init__", object)).parameters
    }
    return current_names(given, known.__contains__, f"{trainer.__name__}(…)")


def only_config(lora_config: Any, peft_config: Any, trainer: str) -> Any:
    """The one of two names of an argument that is given; ConfigError if both are."""
    if lora_config is not None and peft_config is not None:
        raise ConfigError(f"{trainer}(…): both lora_config and peft_config are given. Pass only one.")
    return peft_config if lora_config is None else lora_config


def adapt(
    model: nn.Module, given: Any, args: TrainingArguments, trainer: str, tokenizer: PreTrainedTokenizerBase | None
) -> bool:
    """Add an adapter to a model without one, from `given` (a `lora_config`) or else the LoRA fields of `args`.

    Returns whether the adapter is new, so that it changes nothing yet.

    Args:
        trainer: name of the class, for messages.
    """
    refuse_projections(args, trainer)
    flags = args if isinstance(args, LoraArguments) else None
    call = f"{trainer}(…, lora_config=…)"
    state = state_of(model)
    is_new, reason = False, None
    if flags is not None and flags.lora_adapter is not None:
        state = _load_adapter(model, flags.lora_adapter, state, given, trainer)
        reason = f"the adapter {flags.lora_adapter} is loaded"
    elif state is None:
        config = LoraConfig.from_any(flags.lora_config() if given is None and flags is not None else given)
        state, is_new = _begin(model, config, flags, tokenizer, trainer), True
        reason = "lora_config is given" if given is not None else None
        if given is None and flags is not None and flags.parsed_elsewhere:
            logger.warning(
                f"The flags {', '.join(flags.parsed_elsewhere)} are those of another class of the parser, so the "
                f"adapter has the defaults of {type(flags).__name__}. To use them, pass {trainer} a lora_config or "
                "peft_config with their values (in TRL's scripts: --use_peft)."
            )
    else:
        reason = f"the model already has the adapters {_listed(state.adapters)}"
        if given is not None:
            raise StateError(
                f"{call}: {reason}. Omit lora_config to train the active one, call model.unload() to start again, or "
                "model.add_adapter(name, config) to add another."
            )
    state.resumable = True
    _disable_dropout(args, model)
    changed = flags.changed_lora_fields() if flags is not None and reason is not None else []
    configs = [record.config for record in state.adapters.values()]
    if flags is not None and changed and flags.lora_config() not in configs:
        logger.warning(f"These arguments have no effect because {reason}: {', '.join(changed)}.")
    return is_new


def _begin(
    model: nn.Module, config: LoraConfig, flags: LoraArguments | None, tokenizer: Any, trainer: str
) -> LoraState:
    """Add an adapter; one whose initialization looks at batches waits for the start of training."""
    call = f"{trainer}(…, lora_config=…)"
    waits = looks_at_batches(config)
    with all_or_nothing(model):
        config = with_new_tokens(model, config, tokenizer, bool(flags and flags.lora_train_new_tokens), call)
        first = dataclasses.replace(config, init_lora_weights=True) if waits else config
        if apply_lora(model, first, allow_bypassed=bool(flags and flags.lora_allow_bypassed)) is not model:
            raise StateError(
                f"{call}: {type(model).__name__} has no task head. Call model = apply_lora(model, config, "
                f"num_labels=…), which adds one, and pass the result to {trainer}."
            )
        state = require_state(model, call)
        state.waiting = config if waits else None
    return state


def _load_adapter(model: nn.Module, source: str, state: LoraState | None, given: Any, trainer: str) -> LoraState:
    """Load an adapter to train into a model without one."""
    if state is not None or given is not None:
        what = "the model has adapters already" if state is not None else "lora_config is given"
        raise ConfigError(
            f"{trainer}(…): lora_adapter={source!r} names an adapter to load, but {what}. Pass only one."
        )
    LoraModel.from_pretrained(source, base_model=model, is_trainable=True)
    return require_state(model, trainer)


def refuse_adapted_head(model: nn.Module, fresh: bool, trainer: str) -> None:
    """Refuse an adapter of the output head in TRL's trainers, whose losses multiply by the weight of the head.

    Args:
        fresh: whether the adapter was added for this trainer, and is removed before the error.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if not isinstance(head, LoraLayer):
        return
    if fresh:
        model.unload()  # type: ignore[operator]
    raise TargetError(
        f"{trainer}(…): the output head is adapted, but the loss over it reads only its weight, so the adapter would "
        "not be trained. Exclude the head from target_modules, or train it whole with modules_to_save."
    )


def _disable_dropout(args: TrainingArguments, model: nn.Module) -> None:
    """Disable the adapters' dropout, which has no module, where TRL's `disable_dropout` disables that of modules."""
    if getattr(args, "disable_dropout", False):
        for site in adapter_layers(model).values():
            for adapter in site._lora.adapters.values():
                adapter.dropout = 0.0


def adopt_metrics(trainer: Trainer) -> None:
    """Connect the result of `build_compute_metrics`: reduce logits, and shift labels if the model does."""
    metrics: Any = trainer.compute_metrics
    if not hasattr(metrics, "preprocess_logits_for_metrics"):
        return
    if getattr(metrics, "shift_labels", False) is None:
        trainer.compute_metrics = metrics = copy.copy(metrics)
        metrics.shift_labels = shifts_labels(trainer)
    if trainer.preprocess_logits_for_metrics is None:
        trainer.preprocess_logits_for_metrics = metrics.preprocess_logits_for_metrics


def check_start(trainer: Trainer, model: nn.Module, call: str) -> None:
    """Refuse to train without trainable parameters, with labels that the head lacks, what no file would hold, or other
    adapters than those of the other processes."""
    state = require_state(model, call)
    state.refuse_merged(call)
    if not state.activity.enabled:
        raise TrainingError(f"{call}: the adapters are disabled. Call enable_adapters(), or leave disable_adapter().")
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError(
            f"{call}: no tensor of the adapters {_listed(state.adapters)} is trainable (active: "
            f"{_listed(state.activity.active) or 'none'}). Load the adapter with is_trainable=True, or activate one "
            "with set_adapter."
        )
    faults = Faults(call)
    for name in state.activity.active:
        record = state.adapters[name]
        unsaved = why_unsaved(model, record.heads, trained_rows(model, name)) if record.trainable else None
        if unsaved is not None:
            faults.add(f"{name!r}: {unsaved}")
    faults.check(
        TrainingError,
        "Load the base again, and call apply_lora with these settings.",
    )
    check_labels(trainer, model, call)
    check_same_adapters(model, call)


def start_lines(model: nn.Module, accelerator: Accelerator, optimizer: Any, args: TrainingArguments) -> list[str]:
    """Lines with the trainable share, each active adapter and the precision.

    Args:
        optimizer: None if it will be made from `args`.
    """
    state = require_state(model, "train")
    adapters = [summary(model, state, name) for name in state.activity.active]
    if optimizer is not None:
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__  # in a second run it is wrapped
    else:
        name = str(getattr(args.optim, "value", args.optim))
        if getattr(args, "muon_learning_rate", None) is not None:
            name = f"LoRA-Muon and {name}"
    return [trainable_line(model), *adapters, precision_line(model, accelerator, name)]


def warn_at_start(model: nn.Module, args: TrainingArguments | None, dtype: torch.dtype | None) -> None:
    """Warn about random base weights, a base that no longer has its first `dtype`, and the default learning rate.

    Args:
        args: None if the optimizer was not made from them.
    """
    if require_state(model, "train").random_base:
        logger.warning(
            "The base model was created from a config: its weights are random. LoRA does not train them, so results "
            "will be poor. Load a checkpoint with from_pretrained."
        )
    muon = getattr(args, "muon_learning_rate", None)
    own = None if args is None else type(args).__dataclass_fields__["learning_rate"].default
    if args is not None and args.learning_rate == own == DEFAULT_RATE and muon is None:
        logger.warning_once(
            f"learning_rate is Trainer's default of {DEFAULT_RATE:g}, which is for full fine-tuning. LoRA usually "
            "needs 1e-4 to 5e-4, small models more."
        )
    if base_dtype(model) != dtype:
        logger.warning(
            f"An evaluation in half precision converted the base from {dtype} to {base_dtype(model)}, so training "
            "starts from rounded weights. Train before evaluating, or load the model again."
        )


def summary(model: nn.Module, state: LoraState, name: str) -> str:
    """One line about an adapter: rank, alpha, number and names of the layers, and modules trained whole."""
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


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
