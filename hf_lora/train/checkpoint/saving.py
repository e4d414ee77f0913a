"""What of a Trainer writes and reads files: checkpoints that hold the adapter alone, resuming, the best model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from ...adapt.gather import gathered_state
from ...adapt.inject import drop_layers
from ...adapt.state import require_state
from ...compat import loads_to_plain_cpu, rotates_with, zero_partitions
from ...errors import AdapterFileError
from ...files.format import CONFIG_NAME
from ...files.load import load_adapter_weights
from ...files.save import save_adapter
from ...model import LoraModel
from ..engines import groups_of, load_optimizer_state, load_schedule_state, optimizer_state, schedule_state
from ..watch.guard import NEVER_CALLED, check_finite
from .manifest import (
    adapter_folders,
    begin_checkpoint,
    checkpoints,
    finish_checkpoint,
    read_manifest,
    require_complete,
    rotate_checkpoints,
    whole_or_nothing,
    why_incomplete,
)
from .pushing import PushingMixin
from .resume import check_optimizer, check_parameter_order, check_quantization

logger = logging.get_logger(__name__)


class SavingMixin(PushingMixin):
    """The part of `LoraTrainerMixin` that writes adapters and checkpoints, and reads them again."""

    _groups: list[dict[str, Any]] = []
    """What the optimizer was made for, where DeepSpeed has taken it over; see `engines.groups_of`."""
    _quantization: list[str] = []
    """The forms in which layers of the base are quantised, before an engine shards them."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (and the tokenizer) to `output_dir`, as `Trainer.save_model` does with a whole model.

        Raises:
            TrainingError: a trained tensor holds NaN or infinity; nothing was written.
        """
        folder = str(output_dir or self.args.output_dir)
        check_finite(self._bare_model, f"save_model({folder!r})")
        if not self._is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        # Trainer would gather the base here, or write the shards of this process.
        state = gathered_state(self._bare_model)
        if self.args.should_save:  # older transformers let every process write in `_save`
            self._save(folder, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    @property
    def _is_sharded(self) -> bool:
        """Whether the engine is one under which Trainer knows only PEFT's models and whole ones."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._bare_model
        if isinstance(model, LoraModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # a module without save_pretrained: Trainer would write all its weights
            folder = str(output_dir or self.args.output_dir)
            for name in require_state(model, "save_model").adapters:
                save_adapter(model, _folder_of(model, folder, name), name, state_dict)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, Path(folder, TRAINING_ARGS_NAME))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        check_finite(self._bare_model, f"Saving {folder}")
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()

        def rotate(output_dir: str, **settings: Any) -> None:
            settings.pop("use_mtime", None)
            rotate_checkpoints(output_dir, newest=folder, **settings)

        with whole_or_nothing(folder, self.args.should_save), self._manifest_after_state(), rotates_with(rotate):
            super()._save_checkpoint(model, trial)

    @contextlib.contextmanager
    def _manifest_after_state(self) -> Iterator[None]:
        """Write the manifest right after trainer_state.json.

        That is the last file of a checkpoint, and what follows (the push, the deletion of older checkpoints) counts on
        it being there.
        """
        state, write = self.state, self.state.save_to_json

        def write_both(json_path: str) -> None:
            write(json_path)
            finish_checkpoint(
                Path(json_path).parent, state.global_step, self._parameters_in_order(), _left_out(self._bare_model),
                self._quantization, _class_of(self.optimizer),
            )  # fmt: skip

        state.save_to_json = write_both  # type: ignore[method-assign]
        try:
            yield
        finally:
            del state.save_to_json

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # every process has written its own before the manifest lists them

    def _parameters_in_order(self) -> list[str] | None:
        """Names of the trained parameters as the optimizer counts them; None where it hides them."""
        names = {id(p): n for n, p in self._bare_model.named_parameters()}
        groups = self._groups or getattr(self.optimizer, "param_groups", [])
        ordered = [names.get(id(p)) for group in groups for p in group["params"]]
        return None if None in ordered else [n for n in ordered if n is not None]

    def _note_groups(self, optimizer: Any) -> None:
        """Keep which parameters the optimizer is made for, which DeepSpeed will glue together."""
        if self.is_deepspeed_enabled and zero_partitions(getattr(optimizer, "optimizer", optimizer)) is None:
            self._groups = groups_of(optimizer)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        self._started = False
        if resume_from_checkpoint is None or not self._is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # Under these engines Trainer would look for a whole model here, and for the engine's own files.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = optimizer_state(self.optimizer, self._groups)
        if self.args.should_save:
            torch.save(state, Path(output_dir, OPTIMIZER_NAME))
            schedule = schedule_state(self.lr_scheduler, self.optimizer, self._groups)
            torch.save(schedule, Path(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        faults = why_incomplete(best, contents=True)
        if faults:
            others = [str(p) for p in checkpoints(Path(best).parent) if p != Path(best) and not why_incomplete(p)]
            lines = [f"The best checkpoint, {best}, is damaged:", *(f"  - {fault}" for fault in faults)]
            lines.append(f"Complete ones beside it: {', '.join(others) or 'none'}.")
            lines.append(
                "The model holds the weights of the last step. Save it, or load one of these with load_adapter."
            )
            raise AdapterFileError("\n".join(lines))
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        self._load_adapters(best)

    def _forget_lost_best(self) -> None:
        """A best checkpoint that is no longer complete is the best no more: the next evaluation finds another."""
        recorded, step = self.state.best_model_checkpoint, self.state.best_global_step
        # The next save takes the folder of that step in output_dir, whatever is recorded.
        own = Path(self._get_output_dir(None), f"checkpoint-{step}")
        candidates = [Path(recorded)] if recorded else []
        candidates += [own] if step and (own.is_dir() or not recorded) else []
        for best in candidates:
            faults = why_incomplete(best, contents=True)
            if faults:
                logger.warning(f"{best}, the best checkpoint so far, is not complete and is skipped: {faults[0]}.")
                self.state.best_model_checkpoint = self.state.best_global_step = self.state.best_metric = None
                return

    def _load_adapters(self, folder: str) -> None:
        if not adapter_folders(folder):
            raise AdapterFileError(
                f"{folder} holds no {CONFIG_NAME}, so it is no checkpoint of an adapter. A checkpoint of a whole "
                "model goes on with transformers.Trainer, or is loaded with from_pretrained and adapted anew."
            )
        require_complete(folder)
        check_quantization(folder, self._quantization)
        model = self._bare_model
        manifest = read_manifest(folder) or {}
        for name, paths in (manifest.get("left_out") or {}).items():
            drop_layers(model, name, set(paths), NEVER_CALLED)
        for name in require_state(model, "load_adapter_weights").adapters:
            load_adapter_weights(model, _folder_of(model, folder, name), name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._forget_lost_best()
            check_parameter_order(checkpoint, self._parameters_in_order())
            present = any(Path(checkpoint).glob(f"{Path(OPTIMIZER_NAME).stem}*"))
            if present:
                check_optimizer(checkpoint, _class_of(self.optimizer))
            else:
                logger.warning(
                    f"{checkpoint} holds the adapter without the optimizer's state (save_only_model), so the "
                    "optimizer and its schedule start anew and the run will not end as an uninterrupted one."
                )
            if self._is_sharded:
                if present:
                    state = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
                    load_optimizer_state(self.optimizer, self._groups, state)
                    schedule = torch.load(Path(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
                    load_schedule_state(self.lr_scheduler, self.optimizer, self._groups, schedule)
                return
        with loads_to_plain_cpu(self.args):
            super()._load_optimizer_and_scheduler(checkpoint)


def _folder_of(model: nn.Module, folder: str | Path, name: str) -> Path:
    """Where `LoraModel.save_pretrained(folder)` puts one of the model's adapters."""
    several = len(require_state(model, "save_pretrained").adapters) > 1
    return Path(folder, name) if several and name != "default" else Path(folder)


def _left_out(model: nn.Module) -> dict[str, list[str]]:
    """Adapter -> layers that the guard took it off: a fresh model has to lose them before it can resume."""
    records = require_state(model, "save_model").adapters
    found = {n: [p for p, why in r.skipped.items() if why == NEVER_CALLED] for n, r in records.items()}
    return {name: paths for name, paths in found.items() if paths}


def _class_of(optimizer: Any) -> str | None:
    """An optimizer's library and class, such as torch.AdamW; None under DeepSpeed, which has classes of its own."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if inner is None or zero_partitions(inner) is not None:
        return None
    return f"{type(inner).__module__.partition('.')[0]}.{type(inner).__name__}"
