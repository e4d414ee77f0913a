"""One product for layers that read the same tensor, such as query, key and value of an attention.

A recorded call finds the groups (adapt/sharing.py), and every call checks them again. The first layer of a group that
is called computes the outputs of all. The others use theirs if they get the same tensor object, unchanged, with the
same adapter; otherwise they compute their own. So a layer that is skipped, called twice, or called with another or a
changed tensor costs time but never gives a wrong value.
"""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import AdaptedLayer


class SharedOutputs(NamedTuple):
    """Outputs that the first layer of a group computed for the others. A model keeps those of the last group only."""

    x: weakref.ref[Tensor]
    version: int
    names: tuple[str, ...]
    dtype: torch.dtype | None
    outputs: dict[int, tuple[AdaptedLayer, Tensor]]
    """id of a layer -> the layer (a reference, so that the id stays unique) and its output."""


def pop_output(layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor | None:
    """Remove and return the output for `x` that another layer of the group computed; None if there is none."""
    activity = layer._lora.activity
    shared: SharedOutputs | None = activity.shared_outputs
    if shared is None or shared.x() is not x or id(layer) not in shared.outputs:
        return None
    if shared.version != x._version or shared.names != names or shared.dtype != _autocast(x):
        return None
    _, y = shared.outputs.pop(id(layer))
    if not shared.outputs:
        activity.shared_outputs = None
    return y


def store_outputs(
    layer: AdaptedLayer, x: Tensor, names: tuple[str, ...], outputs: dict[int, tuple[AdaptedLayer, Tensor]]
) -> None:
    """Store the outputs of the other layers of the group until they are called."""
    layer._lora.activity.shared_outputs = SharedOutputs(weakref.ref(x), x._version, names, _autocast(x), outputs)


def _autocast(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
