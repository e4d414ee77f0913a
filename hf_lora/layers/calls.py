"""What the layers know about the running call of their model, such as which of its tokens an adapter acts on.

Most calls have nothing to know. It belongs to the thread, and checkpointing carries it into the backward, which runs
the layers again after the call (`carried`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..errors import StateError

Known = Mapping[tuple[int, str], Tensor]
"""(id of the model's activity, adapter) -> what the adapter's method found out about the call."""
_KNOWN: ContextVar[Known] = ContextVar("known", default=MappingProxyType({}))


@contextmanager
def knowing(known: Known) -> Iterator[None]:
    """Within, layers know this too."""
    token = _KNOWN.set({**_KNOWN.get(), **known})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def is_known(activity: object, adapter: str) -> bool:
    return (id(activity), adapter) in _KNOWN.get()


def known(activity: object, adapter: str) -> Tensor:
    """What is known about the call for an adapter.

    Raises:
        StateError: the layer is called outside of its model's forward.
    """
    found = _KNOWN.get().get((id(activity), adapter))
    if found is None:
        raise StateError(
            f"The adapter {adapter!r} acts on some tokens of a call only, and this layer is called outside of its "
            "model's forward, where these are not known. Call the model itself. For activation checkpointing, use "
            "model.gradient_checkpointing_enable()."
        )
    return found


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` for a later call, in which layers know what they know now."""
    now = _KNOWN.get()
    return partial(_call, now, function) if now else function


def _call(now: Known, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with knowing(now):
        return function(*args, **kwargs)
