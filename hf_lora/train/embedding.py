"""The trainers of sentence-transformers, for LoRA adapters of the transformers model inside.

Losses, batches and data are those of sentence-transformers. Its classes load what is saved, if PEFT 0.20 or later is
installed: modules such as pooling and dense layers are saved beside the adapter.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sentence_transformers.cross_encoder.trainer import CrossEncoderTrainer
from sentence_transformers.cross_encoder.training_args import CrossEncoderTrainingArguments
from sentence_transformers.sentence_transformer.trainer import SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from transformers.utils import logging

from ..versions import installed, is_older
from .arguments import LoraArguments
from .former_names import accepts_former_names
from .trainer import LoraTrainerMixin

logger = logging.get_logger(__name__)
READS = "0.20"
"""The first version of PEFT that reads an adapter of a model without a head for transformers."""


class EmbeddingMixin(LoraTrainerMixin):
    """`LoraTrainerMixin`, which says if sentence-transformers cannot load the result."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if is_older("peft", READS):
            logger.warning(
                f"PEFT {installed('peft')} is installed, with which sentence-transformers loads the base without the "
                f"adapter. To load what is trained here, run: pip install 'peft>={READS}'"
            )


@accepts_former_names
@dataclasses.dataclass
class LoraSentenceTransformerTrainingArguments(LoraArguments, SentenceTransformerTrainingArguments):
    """A drop-in replacement for `SentenceTransformerTrainingArguments` with the LoRA fields."""


class LoraSentenceTransformerTrainer(EmbeddingMixin, SentenceTransformerTrainer):
    """A drop-in replacement for `SentenceTransformerTrainer` that trains a LoRA adapter; see `LoraTrainerMixin`."""


@accepts_former_names
@dataclasses.dataclass
class LoraCrossEncoderTrainingArguments(LoraArguments, CrossEncoderTrainingArguments):
    """A drop-in replacement for `CrossEncoderTrainingArguments` with the LoRA fields."""


class LoraCrossEncoderTrainer(EmbeddingMixin, CrossEncoderTrainer):
    """A drop-in replacement for `CrossEncoderTrainer` that trains a LoRA adapter and the head."""
