"""The model of a config on PyTorch's meta device, which holds no weights, and what an adapter of it has."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, PretrainedConfig

from ..adapt.targets import explain_targets
from ..compat import is_own_model
from ..config import LoraConfig
from ..pooled.build import pooled_for
from ..pooled.pooling import Pooling
from ..tasks.registry import TASKS
from .base_model import load_base


def empty_model(config: PretrainedConfig, name: str, task: str | None = None, pooling: Pooling | None = None) -> Any:
    """The model of a config on the meta device.

    Args:
        name: the base model, for messages.
        task: of `TASKS`. Default: the class that the config names.
        pooling: of a classifier; default: its class in transformers has its own way.
    """
    named = next(iter(config.architectures or []), "")
    own = getattr(transformers, named) if task is None and is_own_model(named) else None
    with torch.device("meta"):
        if own is not None:
            return own(config)
        if pooling is not None and (cls := pooled_for(config, pooling)) is not None:
            return cls(config)
        auto: Any = AutoModel if task is None else getattr(transformers, TASKS[task].auto_class)
        return load_base(auto.from_config, name, config)


def parameters_of_a_rank(model: nn.Module, config: LoraConfig) -> int:
    """The number of parameters that each rank of an adapter has, in all layers together.

    Raises:
        TargetError: see `explain_targets`.
    """
    return round(sum(layer.parameters / layer.r for layer in explain_targets(model, config).layers))
