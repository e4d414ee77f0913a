"""Frozen BatchNorm stays in eval mode: its running statistics belong to the base and are not saved with adapters."""

from __future__ import annotations

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from ...adapt.batchnorm import hold_batchnorm
from ...model import LoraModel
from .base import Watch


class FrozenBatchNorm(Watch):
    """Keeps frozen BatchNorms in eval mode in models without `LoraModel.train`, which does the same."""

    _handle: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        self.finished()
        if isinstance(model, nn.Module) and not isinstance(model, LoraModel):
            self._handle = model.register_forward_pre_hook(lambda module, _: hold_batchnorm(module))

    def finished(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
