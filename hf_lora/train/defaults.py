"""The settings of a run that the user left open: what was measured best, by the task, the data and the width.

`LoraTrainer` and `LoraConfig` keep the defaults of Trainer and PEFT; these are for `hf-lora train` and `finetune`. The
measurements are in docs/classifiers.md and docs/language-models.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..tasks.base import Data
from ..tasks.causal_lm import rate_for_width
from ..tasks.registry import CAUSAL_LM
from .arguments import LoraTrainingArguments
from .parsing import Parsed
from .schedule import steps_of_epoch

STEPS = 400
"""A classifier's training is repeated until it has so many steps."""
EPOCHS = (3, 20)
"""The fewest and the most epochs that are chosen."""
PACKED_STEPS = 200
"""Rows are packed into shorter ones until a language model's training has so many steps."""
LENGTHS = (1024, 512, 256, 128)
"""The lengths of packed rows that are chosen."""
PLAIN_INITS = ("true", "gaussian", "orthogonal")
NARROW = 1024
"""Up to this width, language models bear a rate of B that is a multiple of A's."""


@dataclass
class Choice:
    """Settings with the reason for them."""

    values: Mapping[str, Any]
    reason: str


@dataclass
class Choices:
    """What was chosen for a run; `str()` is a line for the user."""

    made: list[Choice] = field(default_factory=list)

    def __str__(self) -> str:
        return "chosen: " + "; ".join(f"{_words(c.values)} ({c.reason})" for c in self.made)


def choose(parsed: Parsed, data: Data) -> Choices:
    """Set what the user left open, and say why. Also the length of packed rows, in `data`."""
    choices, training = Choices(), parsed.training
    for choice in _language_model(parsed, data) if data.task.name == CAUSAL_LM else _classifier(parsed, data):
        open_ = {name: value for name, value in choice.values.items() if name not in parsed.given}
        if training.lora_adapter is not None:  # which has its own configuration
            open_ = {name: value for name, value in open_.items() if not name.startswith("lora_")}
        for name, value in open_.items():
            if name == "max_length":
                data.length = value
            else:
                setattr(training, name, value)
        if open_:
            choices.made.append(Choice(open_, choice.reason))
    return choices


def _classifier(parsed: Parsed, data: Data) -> list[Choice]:
    if not data.task.pools or data.labels is None:
        return []
    rank = parsed.training.lora_r if "lora_r" in parsed.given else 32
    values = {"lora_r": rank, "lora_alpha": rank, "lora_bias": "all"}
    if bears_rates(parsed.training):
        values |= {"loraplus_lr_ratio": 4, "head_learning_rate": 3e-3}
    choices = [
        Choice(values, "measured best for small encoders"),
        Choice({"train_sampling_strategy": "group_by_length"}, "less padding"),
    ]
    training = parsed.training
    steps = steps_of_epoch(training, len(data.rows["train"]), training.train_batch_size * training.world_size)
    epochs = min(max(EPOCHS[0], math.ceil(STEPS / steps)), EPOCHS[1])
    if parsed.training.max_steps <= 0 and epochs > EPOCHS[0]:
        choices.append(Choice({"num_train_epochs": epochs}, f"{epochs * steps} steps"))
    return choices


def _language_model(parsed: Parsed, data: Data) -> list[Choice]:
    width = data.config.get_text_config().hidden_size
    rank = parsed.training.lora_r if "lora_r" in parsed.given else 64
    values: dict[str, Any] = {"lora_r": rank, "lora_alpha": rank, "learning_rate": rate_for_width(width)}
    values |= {"loraplus_lr_ratio": 4} if width <= NARROW and bears_rates(parsed.training) else {}
    choices = [Choice(values, f"for the width {width:,}")]
    if parsed.run.packing and parsed.run.max_length is None and parsed.training.max_steps <= 0:
        sizes = {split: [len(ids) for ids in rows["input_ids"]] for split, rows in data.rows.items()}
        total = sum(sizes["train"]) * parsed.training.num_train_epochs
        longest = max(max(lengths, default=0) for lengths in sizes.values())
        fitting = [length for length in LENGTHS if longest <= length <= data.length]
        batch = parsed.training.train_batch_size * parsed.training.world_size
        for length in fitting:
            steps = steps_of_epoch(parsed.training, math.ceil(total / length), batch)
            if steps >= PACKED_STEPS or length == fitting[-1]:
                if length < data.length:
                    choices.append(Choice({"max_length": length}, f"about {steps:,} steps"))
                break
    return choices


def bears_rates(training: LoraTrainingArguments) -> bool:
    """Whether other rates for B and the head were measured: with Adam, and factors that start as usual."""
    return "adam" in str(getattr(training.optim, "value", training.optim)) and training.lora_init in PLAIN_INITS


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(
        f"--{name.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )
