"""The trainers of sentence-transformers, for LoRA adapters of the transformers model inside.

Losses, batches and data are those of sentence-transformers. Its classes load what is saved, if PEFT is installed:
modules such as pooling and dense layers are saved beside the adapter.
"""

from __future__ import annotations

import dataclasses

from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments
from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments

from .arguments import LoraArguments
from .former_names import accepts_former_names
from .trainer import LoraTrainerMixin


@accepts_former_names
@dataclasses.dataclass
class LoraSentenceTransformerTrainingArguments(LoraArguments, SentenceTransformerTrainingArguments):
    """A drop-in replacement for `SentenceTransformerTrainingArguments` with the LoRA fields."""


class LoraSentenceTransformerTrainer(LoraTrainerMixin, SentenceTransformerTrainer):
    """A drop-in replacement for `SentenceTransformerTrainer` that trains a LoRA adapter; see `LoraTrainerMixin`."""


@accepts_former_names
@dataclasses.dataclass
class LoraCrossEncoderTrainingArguments(LoraArguments, CrossEncoderTrainingArguments):
    """A drop-in replacement for `CrossEncoderTrainingArguments` with the LoRA fields."""


class LoraCrossEncoderTrainer(LoraTrainerMixin, CrossEncoderTrainer):
    """A drop-in replacement for `CrossEncoderTrainer` that trains a LoRA adapter and the head."""
