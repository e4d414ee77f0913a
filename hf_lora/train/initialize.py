"""Initializations that look at batches: the adapter gets its first values when training starts.

Until then it changes nothing. Every process runs the same batches, so that all choose the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import Trainer
from transformers.utils import logging

from ..adapt.inject import reinitialize
from ..adapt.state import require_state
from ..config import OF_INITS, LoraConfig
from ..errors import ConfigError, LoraError, StateError
from ..files.format import read_config
from ..files.save import adapter_folder
from ..layers.distributed import is_partitioned
from ..layers.hosts import is_offloaded
from ..layers.inits import find_init
from ..layers.ops import kept_random_states
from .arguments import LoraArguments

logger = logging.get_logger(__name__)
DEFAULT_BATCHES = 64
NAME = "default"
"""Of the adapter that a trainer adds."""


def looks_at_batches(config: LoraConfig) -> bool:
    """Whether the initialization of a configuration needs batches."""
    found = find_init(config.init_lora_weights)
    return found is not None and found[0].needs in ("inputs", "gradients")


def initialize(trainer: Trainer, model: nn.Module, checkpoint: str | None) -> None:
    """Give an adapter that waits for batches its first values, or the form of those in the checkpoint to resume from.

    Raises:
        ConfigError: an optimizer for the former tensors exists already.
        StateError: this process does not hold the whole base.
    """
    call = f"{type(trainer).__name__}.train"
    state = require_state(model, call)
    if state.waiting is None:
        return
    name, record = NAME, state.adapters.get(NAME)
    if record is None:  # deleted meanwhile
        state.waiting = None
        return
    own = {field: getattr(state.waiting, field) for field in ("init_lora_weights", *OF_INITS)}
    config = replace(record.config, **own)
    before = f"call apply_lora(model, config, batches=[…]) before {type(trainer).__name__}(…)"
    if trainer.optimizer is not None:
        raise ConfigError(
            f"{call}: the initialization {config.init_lora_weights!r} looks at batches when training starts, but the "
            f"optimizer was made for the tensors before. Let the trainer make the optimizer, or {before}."
        )
    absent = any(parameter.is_meta for parameter in model.parameters()) and not is_offloaded(model)
    if absent or any(is_partitioned(parameter) for parameter in model.parameters()):
        raise StateError(
            f"{call}: the initialization {config.init_lora_weights!r} looks at batches, and this process does not "
            "hold the whole base (ZeRO-3 partitioned it, or FSDP's cpu_ram_efficient_loading left it out). In a run "
            f"of one process, {before} and save the adapter; then train with lora_adapter=folder."
        )
    found = find_init(config.init_lora_weights)
    assert found is not None
    with kept_random_states():
        if checkpoint is None:
            try:
                reinitialize(model, name, config, batches=_batches(trainer, model), call=call)
            except LoraError:
                raise
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"{call}: the initialization {config.init_lora_weights!r} calls the model with the batches of the "
                    f"training data, which are not arguments of its forward ({error}). With such arguments, {before}."
                ) from error
        elif found[0].takes_out:
            reinitialize(model, name, config, call=call)
        else:  # it may have chosen the ranks
            saved = read_config(adapter_folder(model, checkpoint, name))
            reinitialize(model, name, saved, from_file=True, call=call)
    state.waiting = None


def _batches(trainer: Trainer, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Batches of the training data, the same on every process, where the model is: an engine moves it later."""
    args: Any = trainer.args
    count = args.lora_init_batches if isinstance(args, LoraArguments) else DEFAULT_BATCHES
    loader: Any = trainer.get_train_dataloader()
    dataset = loader.dataset
    sampler = None
    if not isinstance(dataset, IterableDataset):
        sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(args.seed))
    logger.info(f"The initialization looks at up to {count} batches of the training data.")
    plain: Any = DataLoader(dataset, args.train_batch_size, sampler=sampler, collate_fn=loader.collate_fn)
    device = next((p.device for p in model.parameters() if not p.is_meta), args.device)
    for batch in islice(plain, count):
        yield send_to_device(batch, device)
