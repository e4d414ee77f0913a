"""What merging at load adds to loading: several adapters with weights, and a form that the merged model gets after.

An adapter is folded into dense weights before they are quantised: the sum is rounded once, as if the merged model had
been on disk all along.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .adapt.state import require_state
from .adapt.walk import parts
from .errors import ConfigError, Faults

AFTERWARDS = ("quantization_config", "device_map", "max_memory", "offload_folder", "offload_buffers")
"""Arguments of `from_pretrained` that say how the weights are kept and where: with a quantisation they come last."""


def sources_of(adapter: Any) -> list[str | os.PathLike[str]]:
    """The adapters that were asked for: one, or a sequence."""
    return [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)


def check_mix(
    call: str, count: int, weights: Sequence[float] | None, merge: bool, base_model: Any, quantised: bool, untie: bool
) -> None:
    """Refuse what cannot be merged at load.

    Raises:
        ConfigError: lists every fault.
    """
    faults = Faults(call)
    if not count:
        faults.add("no adapter is named")
    if count > 1 and not merge:
        faults.add("several adapters are named, which is for merge=True; load others with model.load_adapter")
    if weights is not None:
        if not merge:
            faults.add("weights= is for merge=True")
        if len(weights) != count:
            faults.add(f"{len(weights)} weights are given for {count} adapters")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                faults.add(f"{weight!r} is no weight")
    if untie and not merge:
        faults.add("untie= is for merge=True")
    if merge and quantised and isinstance(base_model, nn.Module):
        faults.add("quantization_config is given, but base_model is a model already; pass its folder or repository")
    faults.check(ConfigError, "Nothing was loaded.")


def weigh(model: nn.Module, name: str, weight: float, call: str) -> None:
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


def requantised(model: Any, afterwards: Mapping[str, Any]) -> Any:
    """A dense model as transformers loads it under `quantization_config`, from its tensors in memory."""
    config, generation = model.config, getattr(model, "generation_config", None)
    made = type(model).from_pretrained(
        None, config=config, state_dict=model.state_dict(), dtype=model.dtype, **afterwards
    )
    if generation is not None:
        made.generation_config = generation
    return made.eval()
