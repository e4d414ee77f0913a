"""Layers that read one tensor, such as the query, key and value of an attention: their product is one.

Which layers these are is found in a recorded call (adapt/sharing.py) and only proposed here: in each call the tensor
itself decides. The first layer of a group that is called computes for all, and the others take what is theirs if they
are handed the very same tensor, unchanged, with the same adapter; else they compute alone. So a layer that is skipped,
called twice, called with something else or changed in between costs time and never a wrong value.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


class SharedOutputs(NamedTuple):
    """What the first layer of a group computed for the others. One is kept a model, so the next group replaces it."""

    x: weakref.ref[Tensor]
    version: int
    names: tuple[str, ...]
    dtype: torch.dtype | None
    outputs: dict[int, tuple[Any, Tensor]]
    """id of a layer -> the layer, which keeps the id its own, and its output."""


def pop_output(layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor | None:
    """The output for `x` that another layer of the group computed, once; None where there is none."""
    activity = layer._lora.activity
    left: SharedOutputs | None = activity.leftovers
    if left is None or left.x() is not x or id(layer) not in left.outputs:
        return None
    if left.version != x._version or left.names != names or left.dtype != _autocast(x):
        return None
    _, y = left.outputs.pop(id(layer))
    if not left.outputs:
        activity.leftovers = None
    return y


def store_outputs(layer: Any, x: Tensor, names: tuple[str, ...], outputs: dict[int, tuple[Any, Tensor]]) -> None:
    """Keep the outputs of the other layers of the group until they are called."""
    layer._lora.activity.leftovers = SharedOutputs(weakref.ref(x), x._version, names, _autocast(x), outputs)


def _autocast(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
