"""Writes and reads the content of a checkpoint: adapters, the optimizer's and the schedule's state, the manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from ...adapt.state import require_state
from ...compat import zero_partitions
from ...errors import AdapterFileError
from ...files.format import CONFIG_NAME
from ...files.load import load_adapter_weights
from ...files.save import adapter_folder, save_adapters
from ..average import Average
from ..engines import groups_of, load_optimizer_state, load_schedule_state, optimizer_state, schedule_state
from ..watch.finite import check_finite
from ..watch.guard import layers_left_out
from .fields import FIELDS, Run, resume_fields
from .manifest import (
    adapter_folders,
    atomic_checkpoint,
    begin_checkpoint,
    finish_checkpoint,
    other_complete,
    read_manifest,
    require_complete,
    why_incomplete,
)
from .outside import outside_of, save_outside

logger = logging.get_logger(__name__)


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        quantization: the quantization formats of the base's layers, before an engine shards them.
    """

    def __init__(self, quantization: list[str] | None = None) -> None:
        self.quantization = quantization or []
        self.whole: nn.Module | None = None
        """The model around the one with the adapters, if there is one; set when it is adapted."""
        self.groups: list[dict[str, Any]] = []
        """The optimizer's original groups, under DeepSpeed, which flattens their parameters."""
        self.average = Average()

    def record_groups(self, optimizer: Any) -> None:
        """Record an optimizer's parameter groups before DeepSpeed wraps it."""
        if zero_partitions(getattr(optimizer, "optimizer", optimizer)) is None:
            self.groups = groups_of(optimizer)

    # Writing ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def writing(self, folder: Path, model: nn.Module, writes: bool, wait: Callable[[], object]) -> Iterator[None]:
        """Write a checkpoint within: afterwards it is complete, or unchanged after an error.

        Args:
            writes: whether this process writes the files that are common to all processes.
            wait: waits for all processes.
        """
        check_finite(model if self.whole is None else self.whole, f"Saving {folder}")
        if writes:
            begin_checkpoint(folder)
        wait()
        with atomic_checkpoint(folder, writes):
            yield

    def finish(self, folder: Path, step: int, model: nn.Module, optimizer: Any) -> None:
        """Write what is outside the adapted model; then the manifest, which makes the checkpoint complete."""
        save_outside(self.whole, folder)
        run = self._run(model, optimizer)
        finish_checkpoint(folder, step, {name: field.save(folder, run) for name, field in FIELDS.items()})

    def save_optimizer(self, folder: str, optimizer: Any, schedule: Any, writes: bool) -> None:
        """Write the state of an optimizer under FSDP or DeepSpeed in the format of an unsharded one."""
        state = optimizer_state(optimizer, self.groups)
        if writes:
            torch.save(state, Path(folder, OPTIMIZER_NAME))
            torch.save(schedule_state(schedule, optimizer, self.groups), Path(folder, SCHEDULER_NAME))

    # Reading ---------------------------------------------------------------------------------------------------------

    def load_adapters(self, folder: str, model: nn.Module, optimizer: Callable[[], Any] | None = None) -> None:
        """Load the adapters of a checkpoint into the model; AdapterFileError if it is incomplete or does not fit.

        Args:
            optimizer: returns the one that will load its state next: if that does not fit, the weights are unchanged.
        """
        if not adapter_folders(folder):
            raise AdapterFileError(
                f"{folder} has no {CONFIG_NAME}, so it is not the checkpoint of an adapter. Resume a checkpoint of a "
                "whole model with transformers.Trainer, or load it with from_pretrained and adapt it."
            )
        require_complete(folder)
        manifest = read_manifest(folder) or {}
        resume_fields(Path(folder), manifest, self._run(model, None), of_optimizer=False)
        if optimizer is not None and _has_optimizer(folder):
            resume_fields(Path(folder), manifest, self._run(model, optimizer()), of_optimizer=True)
        rest = outside_of(self.whole, folder)
        for name, record in require_state(model, "load_adapter_weights").adapters.items():
            since = layers_left_out(record)  # a checkpoint from before has tensors of them
            load_adapter_weights(model, adapter_folder(model, folder, name), name, without=since)
        with torch.no_grad():
            for tensor, value in rest:
                tensor.copy_(value)

    def load_best(self, folder: str, model: nn.Module) -> None:
        """Load the adapters of the best checkpoint into the model; if it is damaged, the model is unchanged."""
        faults = why_incomplete(folder, contents=True)
        if faults:
            others = ", ".join(map(str, other_complete(folder))) or "none"
            lines = [f"The best checkpoint, {folder}, is damaged:", *(f"  - {fault}" for fault in faults),
                     f"Other complete checkpoints: {others}.",
                     "The model has the weights of the last step. Save it, or load one of these with "
                     "load_adapter."]  # fmt: skip
            raise AdapterFileError("\n".join(lines))
        self.load_adapters(folder, model)

    def has_optimizer(self, folder: str, model: nn.Module, optimizer: Any) -> bool:
        """Whether the checkpoint has the optimizer's state; warns if not. AdapterFileError if it does not fit."""
        if not _has_optimizer(folder):
            logger.warning(
                f"{folder} has the adapter without the optimizer's state (save_only_model), so the optimizer and its "
                "schedule start from the beginning, and the result will differ from an uninterrupted run."
            )
            return False
        resume_fields(Path(folder), read_manifest(folder) or {}, self._run(model, optimizer), of_optimizer=True)
        return True

    def load_optimizer(self, folder: str, optimizer: Any, schedule: Any) -> None:
        """Load the state that `save_optimizer`, or a Trainer without these engines, wrote."""
        state = torch.load(Path(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        load_optimizer_state(optimizer, self.groups, state)
        state = torch.load(Path(folder, SCHEDULER_NAME), map_location="cpu", weights_only=True)
        load_schedule_state(schedule, optimizer, self.groups, state)

    def _run(self, model: nn.Module, optimizer: Any) -> Run:
        return Run(model, optimizer, self.groups, self.quantization, self.average)


def _has_optimizer(folder: str) -> bool:
    return any(Path(folder).glob(f"{Path(OPTIMIZER_NAME).stem}*"))


def save_run(
    model: nn.Module, folder: str, state_dict: Mapping[str, Tensor] | None, processing: Any, args: TrainingArguments
) -> None:
    """Write the adapters of a model, and beside them what Trainer writes: the tokenizer and the arguments."""
    save_adapters(model, folder, state_dict)
    if processing is not None:
        processing.save_pretrained(folder)
    torch.save(args, Path(folder, TRAINING_ARGS_NAME))


def forget_incomplete_best(state: TrainerState, output_dir: str) -> None:
    """Clear the best checkpoint of `state` if it is not complete, so that the next evaluation chooses another."""
    recorded, step = state.best_model_checkpoint, state.best_global_step
    # The next save uses the folder of that step in output_dir, whatever is recorded.
    own = Path(output_dir, f"checkpoint-{step}")
    candidates = [Path(recorded)] if recorded else []
    candidates += [own] if step and (own.is_dir() or not recorded) else []
    for best in candidates:
        faults = why_incomplete(best, contents=True)
        if faults:
            logger.warning(f"{best}, the best checkpoint so far, is not complete and is skipped: {faults[0]}.")
            state.best_model_checkpoint = state.best_global_step = state.best_metric = None
            return
