"""Scale the update of an adapter."""

from __future__ import annotations

from torch import nn

from ..errors import ConfigError, listed
from .undo import all_or_nothing
from .walk import parts


def scale_adapter(model: nn.Module, name: str, weight: float, call: str, source: object = None) -> None:
    """Multiply the updates of adapter `name`, which will be merged, by `weight`.

    Args:
        source: what the user calls the adapter, for messages. Default: `name`.

    Raises:
        ConfigError: the adapter has parts that cannot be scaled: whole tensors, which replace those of the base, or
            factors of a method whose updates are not summed.
    """
    if weight == 1:
        return
    owned = list(parts(model, name))
    whole = sorted({part.name for part in owned if not part.scales})
    if whole:
        raise ConfigError(
            f"{call}: the adapter {str(source or name)!r} replaces tensors of the base or their "
            f"norms ({listed(whole)}), so its weight must be 1."
        )
    with all_or_nothing(model):
        for part in owned:
            part.scale(weight)
