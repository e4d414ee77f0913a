"""TRL's trainers for preferences, rewards and reinforcement learning, for LoRA adapters.

The losses, the data and the generation are TRL's. The reference model is `reference.Reference`, so only one base is in
memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Sampler
from transformers import AutoTokenizer, TrainingArguments
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from ..adapt.state import require_state, state_of
from ..compat import name_or_path
from ..errors import ConfigError
from ..files.format import CONFIG_NAME
from .arguments import TrlArguments, flag
from .former_names import accepts_former_names
from .generating import check_generation, merged_within
from .hub_methods import HubMethods
from .start import refuse_adapted_head
from .trainer import LoraTrainerMixin


class LoraPreferenceMixin(LoraTrainerMixin):
    """`LoraTrainerMixin`, where the model may also be the folder of an adapter, whose training then continues.

    The reference is then a frozen copy of that adapter; for a new adapter it is the base. See `reference.Reference`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        own = next(cls for cls in type(self).__mro__ if not issubclass(cls, HubMethods))  # TRL's
        given = inspect.signature(own.__init__).bind_partial(self, *args).arguments | kwargs
        if isinstance(given.get("ref_model"), TrainingArguments):
            raise ConfigError(
                f"{type(self).__name__}(…): ref_model is the second argument. Pass the config as args=…."
            )
        folder = given.get("model")
        if given.get("args") is None:
            name = folder if isinstance(folder, str) else name_or_path(folder)
            kind = own.__name__.removesuffix("Trainer")
            given["args"] = globals()[f"Lora{kind}Config"](f"{str(name).rpartition('/')[2] or 'model'}-{kind}")
        if isinstance(folder, str) and Path(folder, CONFIG_NAME).is_file():
            if given.get("processing_class") is None and Path(folder, "tokenizer_config.json").is_file():
                given["processing_class"] = AutoTokenizer.from_pretrained(folder)
        given.pop("self")
        super().__init__(**given)
        if "forward" in vars(self._bare_model):  # TRL's, with a loss over the head, is removed with the adapter
            require_state(self._adapted_model, type(self).__name__).borrowed.append("forward")

    def _adapt(self, model: nn.Module) -> None:
        fresh = state_of(model) is None
        super()._adapt(model)
        refuse_adapted_head(model, fresh, type(self).__name__)


class LoraReinforcementMixin(LoraPreferenceMixin):
    """`LoraPreferenceMixin` for trainers that generate completions, from a merged adapter on request."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._generates_merged = getattr(self.args, "lora_generate_merged", False)
        if self._generates_merged:
            check_generation(self)

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with merged_within(self._adapted_model) if self._generates_merged else contextlib.nullcontext():
            return super()._generate_single_turn(*args, **kwargs)  # type: ignore[misc]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        make: Callable[[], Any] = functools.partial(super()._get_train_sampler, *args, **kwargs)
        sampler = make()
        return OrderOfEpoch(make, self) if isinstance(sampler, RepeatSampler) else sampler


@dataclasses.dataclass
class GenerationArguments(TrlArguments):
    """The LoRA fields of the configs of trainers that generate completions."""

    lora_generate_merged: bool = flag(
        False,
        "Generate completions with the adapter merged into the weights, and restore every bit afterwards. This is "
        "faster, but takes as much memory as the adapted weights; in 16 bits, merged weights are rounded.",
    )


class OrderOfEpoch(Sampler[int]):
    """The order of the prompts of GRPO and RLOO, which depends on the seed and the epoch only.

    TRL's sampler draws a new order each time, so a run that is resumed in a later epoch has the order of the first.

    Args:
        make: creates TRL's sampler.
    """

    def __init__(self, make: Callable[[], RepeatSampler], trainer: LoraTrainerMixin) -> None:
        self.make, self.trainer = make, trainer

    def __iter__(self) -> Iterator[int]:
        sampler = self.make()
        for _ in range(int(self.trainer.state.epoch or 0)):
            next(iter(sampler), None)
        return iter(sampler)

    def __len__(self) -> int:
        return len(self.make())


@accepts_former_names
@dataclasses.dataclass
class LoraDPOConfig(TrlArguments, DPOConfig):
    """A drop-in replacement for `trl.DPOConfig` with the LoRA fields."""


class LoraDPOTrainer(LoraPreferenceMixin, DPOTrainer):
    """A drop-in replacement for `trl.DPOTrainer` that trains a LoRA adapter; see `LoraPreferenceMixin`."""


@accepts_former_names
@dataclasses.dataclass
class LoraKTOConfig(TrlArguments, KTOConfig):
    """A drop-in replacement for `trl.KTOConfig` with the LoRA fields."""


class LoraKTOTrainer(LoraPreferenceMixin, KTOTrainer):
    """A drop-in replacement for `trl.KTOTrainer` that trains a LoRA adapter; see `LoraPreferenceMixin`."""


@accepts_former_names
@dataclasses.dataclass
class LoraRewardConfig(TrlArguments, RewardConfig):
    """A drop-in replacement for `trl.RewardConfig` with the LoRA fields."""


class LoraRewardTrainer(LoraPreferenceMixin, RewardTrainer):
    """A drop-in replacement for `trl.RewardTrainer` that trains a LoRA adapter and the new head."""


@accepts_former_names
@dataclasses.dataclass
class LoraGRPOConfig(GenerationArguments, GRPOConfig):
    """A drop-in replacement for `trl.GRPOConfig` with the LoRA fields."""


class LoraGRPOTrainer(LoraReinforcementMixin, GRPOTrainer):
    """A drop-in replacement for `trl.GRPOTrainer` that trains a LoRA adapter; see `LoraPreferenceMixin`."""


@accepts_former_names
@dataclasses.dataclass
class LoraRLOOConfig(GenerationArguments, RLOOConfig):
    """A drop-in replacement for `trl.RLOOConfig` with the LoRA fields."""


class LoraRLOOTrainer(LoraReinforcementMixin, RLOOTrainer):
    """A drop-in replacement for `trl.RLOOTrainer` that trains a LoRA adapter; see `LoraPreferenceMixin`."""
