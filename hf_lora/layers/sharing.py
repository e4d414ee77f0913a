"""One product for layers that read the same tensor, such as query, key and value of an attention.

A recorded call finds the groups (adapt/sharing.py), and every call checks them again. The first layer of a group that
is called computes the outputs of all. The others use theirs if everything that an output and its gradients depend on
is still the same: the tensor object and its value, the adapter, the parameters of the whole group, dropout, and the
modes of autograd. Otherwise they compute their own. So a layer that is skipped, called twice, checkpointed alone, or
called after a change costs time but never gives a wrong value.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import AdaptedLayer
from .ops import Operand

Modes = tuple[object, ...]
"""What the output for one tensor depends on besides parameters; compared with `==`."""


class SharedOutputs(NamedTuple):
    """Outputs that the first layer of a group computed for the others. A model keeps those of the last group only."""

    x: weakref.ref[Tensor]
    modes: Modes
    names: tuple[str, ...]
    dropout: float
    members: list[tuple[AdaptedLayer, Operand, Modes]]
    """The layers that were computed together, with their parameters and what these were like."""
    outputs: dict[int, Tensor]
    """id of a layer, which `members` keeps alive -> its output."""


def pop_output(
    layer: AdaptedLayer,
    x: Tensor,
    names: tuple[str, ...],
    dropout: float,
    operand: Callable[[AdaptedLayer], Operand | None],
) -> Tensor | None:
    """Remove and return the output for `x` that another layer of the group computed; None if there is none.

    Args:
        operand: returns the present parameters of a layer.
    """
    activity = layer._lora.activity
    shared: SharedOutputs | None = activity.shared_outputs
    if shared is None or shared.x() is not x or id(layer) not in shared.outputs:
        return None
    if (shared.names, shared.dropout, shared.modes) != (names, dropout, _modes(x)):
        return None
    for member, before, condition in shared.members:
        now = operand(member)
        if now is None or any(a is not b for a, b in zip(_tensors(now), _tensors(before), strict=True)):
            return None
        if _condition(now) != condition:
            return None
    y = shared.outputs.pop(id(layer))
    if not shared.outputs:
        activity.shared_outputs = None
    return y


def store_outputs(
    layer: AdaptedLayer,
    x: Tensor,
    names: tuple[str, ...],
    dropout: float,
    members: Sequence[tuple[AdaptedLayer, Operand]],
    outputs: dict[int, Tensor],
) -> None:
    """Store the outputs of the other layers of the group until they are called."""
    conditions = [(member, operand, _condition(operand)) for member, operand in members]
    shared = SharedOutputs(weakref.ref(x), _modes(x), names, dropout, conditions, outputs)
    layer._lora.activity.shared_outputs = shared


def _modes(x: Tensor) -> Modes:
    device = x.device.type
    return (
        x._version,
        x.data_ptr(),
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        # Checkpointing and offloading of activations: what is saved outside of their block is not restored by it.
        torch._C._autograd._top_saved_tensors_default_hooks(False),
    )


def _tensors(operand: Operand) -> list[Tensor | None]:
    """The parameters themselves, of which a weight may be a transposed view."""
    return [t if t is None or t._base is None else t._base for t in operand[:4]]


def _condition(operand: Operand) -> Modes:
    return operand.scaling, [None if t is None else (t._version, t.data_ptr(), t.requires_grad) for t in operand[:4]]
