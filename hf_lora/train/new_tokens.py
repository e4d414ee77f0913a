"""Tokens that a script added to the tokenizer, such as those of a chat template: rows for them, which are trained."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.utils import logging

from ..adapt.embeddings import checkpoint_vocabulary, input_embedding, output_embedding, vocabulary_of
from ..adapt.walk import original_modules
from ..config import LoraConfig
from ..errors import ConfigError

logger = logging.get_logger(__name__)


def tokenizer_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """The tokenizer among the arguments of a Trainer, also as a part of a processor."""
    names = [*inspect.signature(Trainer.__init__).parameters][1:]
    processing = {**dict(zip(names, args, strict=False)), **kwargs}.get("processing_class")
    found = getattr(processing, "tokenizer", processing)
    return found if isinstance(found, PreTrainedTokenizerBase) else None


def with_new_tokens(
    model: nn.Module, config: LoraConfig, tokenizer: PreTrainedTokenizerBase | None, wanted: bool, call: str
) -> LoraConfig:
    """Resize the model's vocabulary to the tokenizer's, and train the rows that the base's checkpoint lacks.

    Args:
        wanted: False changes nothing, with a warning if the vocabulary is too small.

    Raises:
        ConfigError: there is no tokenizer or vocabulary, or other rows are trained already.
    """
    rows = vocabulary_of(model)
    if tokenizer is None or rows is None or not isinstance(model, PreTrainedModel):
        if wanted:
            raise ConfigError(
                f"{call}: lora_train_new_tokens needs a transformers model of text, and its tokenizer as "
                "processing_class."
            )
        return config
    count = len(tokenizer)
    if not wanted:
        if count > rows and not config.trainable_token_indices:
            logger.warning(
                f"The tokenizer has {count} tokens, and the model has rows for {rows}. With "
                "lora_train_new_tokens=True (--lora_train_new_tokens), the model gets rows for the others, which are "
                "trained and saved with the adapter."
            )
        return config
    if config.trainable_token_indices:
        raise ConfigError(f"{call}: lora_train_new_tokens and trainable_token_indices are both given. Pass only one.")
    first = min(rows, checkpoint_vocabulary(model) or rows)
    if count > rows:
        model.resize_token_embeddings(count)
        rows = vocabulary_of(model) or count
    if first == rows:
        logger.warning(f"lora_train_new_tokens: the base has rows for all {count} tokens, so there are no new ones.")
        return config
    logger.info(f"The rows of the tokens {first} to {rows - 1} are new: they are trained, and saved with the adapter.")
    return replace(config, trainable_token_indices={path: [*range(first, rows)] for path in _embeddings(model)})


def _embeddings(model: PreTrainedModel) -> list[str]:
    """The name of the input embedding, and of the output embedding if it has a weight of its own."""
    names = {id(module): name for name, module in original_modules(model)}
    ends: list[Any] = [end for end in (input_embedding(model), output_embedding(model)) if end is not None]
    return [names[id(end)] for end in {id(end.weight): end for end in reversed(ends)}.values()][::-1]
