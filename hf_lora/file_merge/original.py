"""The weights of a model's checkpoint, for initializations that compare them with those in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn

from ..adapt.embeddings import checkpoint_file
from ..errors import ConfigError, Faults
from .ranges import INDEX_NAME, SINGLE_NAME, Checkpoint, open_checkpoint

_INSTEAD = "Pass original=…, a function from a layer's name to its weight in the checkpoint."


def weights_of_checkpoint(model: nn.Module, call: str) -> Callable[[str], Tensor]:
    """Name of a layer -> its weight (O, I) in the files that `model` was loaded from, of which only that is read.

    Raises (the result, when it is called):
        ConfigError: the files are not on this machine, or have no tensor of that name.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    opened = functools.cache(functools.partial(_open, model, call))

    def read(name: str) -> Tensor:
        tensors = opened().tensors
        for key in (f"{name}.weight", f"{prefix}{name}.weight", f"{name.removeprefix(prefix)}.weight"):
            if key in tensors:
                return opened().mapped(tensors[key])
        raise ConfigError(f"{call}: the files in {opened().folder} have no tensor {name}.weight. {_INSTEAD}")

    return read


def _open(model: nn.Module, call: str) -> Checkpoint:
    found = checkpoint_file(model, SINGLE_NAME) or checkpoint_file(model, INDEX_NAME)
    if found is None:
        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        raise ConfigError(f"{call}: the safetensors files of {name or 'this model'} are not here. {_INSTEAD}")
    faults = Faults(call)
    checkpoint = open_checkpoint(found.parent, faults)
    faults.check(ConfigError, _INSTEAD)
    return checkpoint
