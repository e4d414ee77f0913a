"""What the parts of `LoraTrainerMixin` have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import Trainer

if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class TrainerPart(_Trainer):
    """Written as if it were a Trainer, and mixed in before one."""

    @property
    def _bare_model(self) -> Any:
        """The model without what Accelerate and torch.compile put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
