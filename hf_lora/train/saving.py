"""What of a Trainer writes and reads files: checkpoints that hold the adapter alone, resuming, the best model."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import OPTIMIZER_NAME, TRAINING_ARGS_NAME
from transformers.utils import logging

from ..adapt.inject import drop_layers
from ..adapt.state import require_state
from ..compat import push_is_running
from ..errors import AdapterFileError
from ..files.adapters import load_adapter_weights, save_adapter
from ..files.format import CONFIG_NAME, EXTRAS_NAME, WEIGHTS_NAME
from ..model import LoraModel
from .checkpoint import (
    adapter_folders,
    begin_checkpoint,
    check_parameter_order,
    finish_checkpoint,
    read_manifest,
    require_complete,
)
from .guard import NEVER_CALLED, check_finite
from .part import TrainerPart

logger = logging.get_logger(__name__)


class SavingMixin(TrainerPart):
    """The part of `LoraTrainerMixin` that writes adapters and checkpoints, and reads them again."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (and the tokenizer) to `output_dir`, as `Trainer.save_model` does with a whole model.

        Raises:
            TrainingError: a trained tensor holds NaN or infinity; nothing was written.
        """
        check_finite(self._bare_model, f"save_model({str(output_dir or self.args.output_dir)!r})")
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._bare_model
        if isinstance(model, LoraModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:  # a module without save_pretrained: Trainer would write all its weights
            folder = str(output_dir or self.args.output_dir)
            for name in require_state(model, "save_model").configs:
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
        with self._manifest_after_state():
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
            left_out = _left_out(self._bare_model)
            finish_checkpoint(Path(json_path).parent, state.global_step, self._parameters_in_order(), left_out)

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
        groups = getattr(self.optimizer, "param_groups", [])
        ordered = [names.get(id(p)) for group in groups for p in group["params"]]
        return None if None in ordered else [n for n in ordered if n is not None]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        logger.info(f"Loading best model from {best} (score: {self.state.best_metric}).")
        self._load_adapters(best)

    def _load_adapters(self, folder: str) -> None:
        if not adapter_folders(folder):
            raise AdapterFileError(
                f"{folder} holds no {CONFIG_NAME}, so it is no checkpoint of an adapter. A checkpoint of a whole "
                "model goes on with transformers.Trainer, or is loaded with from_pretrained and adapted anew."
            )
        require_complete(folder)
        model = self._bare_model
        manifest = read_manifest(folder) or {}
        for name, paths in (manifest.get("left_out") or {}).items():
            drop_layers(model, name, set(paths), NEVER_CALLED)
        for name in require_state(model, "load_adapter_weights").configs:
            load_adapter_weights(model, _folder_of(model, folder, name), name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            check_parameter_order(checkpoint, self._parameters_in_order())
            if not any(Path(checkpoint).glob(f"{Path(OPTIMIZER_NAME).stem}*")) and not self.is_deepspeed_enabled:
                logger.warning(
                    f"{checkpoint} holds the adapter without the optimizer's state (save_only_model), so the "
                    "optimizer and its schedule start anew and the run will not end as an uninterrupted one."
                )
        super()._load_optimizer_and_scheduler(checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer copies the files of an adapter only where PEFT is installed, and never our own.
        pushes = self.is_world_process_zero() and self.args.hub_strategy != "end"
        if pushes and (self.args.hub_always_push or not push_is_running(self)):
            for folder in adapter_folders(checkpoint_folder):
                target = Path(str(self.args.output_dir), folder.relative_to(checkpoint_folder))
                target.mkdir(parents=True, exist_ok=True)
                for name in (CONFIG_NAME, WEIGHTS_NAME, EXTRAS_NAME):
                    if (folder / name).is_file():
                        shutil.copy(folder / name, target / name)
        super()._push_from_checkpoint(checkpoint_folder)


def _folder_of(model: nn.Module, folder: str | Path, name: str) -> Path:
    """Where `LoraModel.save_pretrained(folder)` puts one of the model's adapters."""
    several = len(require_state(model, "save_pretrained").configs) > 1
    return Path(folder, name) if several and name != "default" else Path(folder)


def _left_out(model: nn.Module) -> dict[str, list[str]]:
    """Adapter -> layers that the guard took it off: a fresh model has to lose them before it can resume."""
    skipped = require_state(model, "save_model").skipped
    found = {name: [p for p, why in table.items() if why == NEVER_CALLED] for name, table in skipped.items()}
    return {name: paths for name, paths in found.items() if paths}
