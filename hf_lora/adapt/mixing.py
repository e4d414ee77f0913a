"""Arithmetic on adapters: an update multiplied by a weight."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError
from .state import require_state
from .walk import parts


def scale_adapter(model: nn.Module, name: str, weight: float, call: str) -> None:
    """Multiply the updates of adapter `name`, which is to be merged, by `weight`.

    Raises:
        ConfigError: the adapter keeps tensors whole, which are replaced and not added.
    """
    if weight == 1:
        return
    owned = list(parts(model, name))
    whole = sorted({part.name for part in owned if not part.scales})
    if whole:
        config = require_state(model, call).adapters[name].config
        raise ConfigError(
            f"{call}: the adapter {config.base_model_name_or_path or name!r} has "
            f"tensors that are not added to the base's ({', '.join(whole[:5])}), which no weight but 1 fits."
        )
    for part in owned:
        part.scale(weight)
