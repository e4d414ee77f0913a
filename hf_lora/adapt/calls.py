"""Calls of a model in which its layers must know something: `Method.before` finds it out, once for each call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..compat import cache_in
from ..errors import StateError
from ..layers.calls import Known, is_known, knowing
from ..layers.contract import Inputs
from ..layers.methods import METHODS
from .inner import state_around

_ON_CACHE = "_hf_lora_progress"


@dataclass
class Told:
    """What a call tells the layers of its model.

    Args:
        known: for the layers.
        progress: adapter -> what its method wants to know in the next call with the same cache.
        cache: the cache of the call, if it has one.
    """

    known: dict[tuple[int, str], Tensor]
    progress: dict[str, object]
    cache: Any

    def during(self) -> AbstractContextManager[None]:
        known: Known = self.known
        return knowing(known)

    def after(self, output: object) -> None:
        """Note the progress on the cache, where copies of the cache have it too."""
        cache = self.cache
        if cache is None and isinstance(output, Mapping):
            cache = cache_in(output)
        if hasattr(cache, "__dict__"):
            cache.__dict__[_ON_CACHE] = {**cache.__dict__.get(_ON_CACHE, {}), **self.progress}


def told(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Told | None:
    """What a call of `model` tells its layers; None if there is nothing, or a call around this one tells it."""
    state = state_around(model)
    if state is None or not state.activity.enabled or state.activity.merged:
        return None
    names = [name for name in state.activity.active if METHODS[state.adapters[name].config.method].sees_calls]
    names = [name for name in names if not is_known(state.activity, name)]
    if not names:
        return None
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        raise StateError(
            f"{type(model).__name__}(…): {', '.join(map(repr, names))} acts from its invocation tokens on, which it "
            "looks for in input_ids. Pass input_ids, or disable the adapter (with model.disable_adapter())."
        )
    cache = cache_in(kwargs)
    past = int(cache.get_seq_length()) if cache is not None else 0
    inputs = Inputs(ids, kwargs.get("position_ids"), past)
    known, progress = {}, {}
    for name in names:
        config = state.adapters[name].config
        former = getattr(cache, "__dict__", {}).get(_ON_CACHE, {}).get(name)
        known[id(state.activity), name], progress[name] = METHODS[config.method].before(config, inputs, former)
    return Told(known, progress, cache)
