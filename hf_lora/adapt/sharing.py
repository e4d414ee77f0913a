"""Find the layers that read the same tensor, to compute their low-rank products as one: see layers/sharing.py."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import LoraLayer, ungroup
from ..layers.ops import evaluation_mode, kept_random_states
from .embeddings import output_embedding
from .state import require_state
from .undo import all_or_nothing
from .walk import adapter_layers


def share_inputs(model: nn.Module, *args: object, **batch: object) -> list[tuple[str, ...]]:
    """Compute the updates of adapted layers that read the same tensor, such as query, key and value, together.

    One forward on a batch, without gradients and with the random state restored afterwards, shows which children of
    a module always get the same tensor object. From then on, in training, the first of them that is called computes
    all of their updates: one product with their A, one gradient of the input, and one dropout mask (each layer alone
    would draw its own). Otherwise the values are the same up to rounding. Every call checks whether the layers really
    get the same tensor, and whether parameters and modes are still the same, so the result is correct in any case.

    Call it after adding the adapters and before training; `LoraTrainer` does this itself. It has no effect under
    `torch.compile`.

    Args:
        model: the model with adapters.
        args: arguments of the model's forward.
        batch: those with a name.

    Returns:
        The names of the layers of each group. They replace the groups of an earlier call.

    Raises:
        StateError: the model has no adapters.
    """
    require_state(model, "share_inputs")
    layers = {
        layer: name
        for name, layer in adapter_layers(model).items()
        if isinstance(layer, LoraLayer) and layer._lora.shape.is_matrix
    }
    for layer in layers:
        ungroup(layer)
    order = {layer: i for i, layer in enumerate(layers)}
    with all_or_nothing(model):
        found = [tuple(sorted(group, key=order.__getitem__)) for group in _record(model, layers, args, batch)]
        for group in found:
            for layer in group:
                layer._lora.group = group
    return [tuple(layers[layer] for layer in group) for group in found]


class _EndOfRecording(Exception):
    """Ends the recorded call before the output layer, whose scores may be larger than all tensors before it."""


def _stop(module: nn.Module, args: object) -> None:
    raise _EndOfRecording


def _record(
    model: nn.Module, layers: Mapping[LoraLayer, str], args: tuple[object, ...], batch: dict[str, object]
) -> list[frozenset[LoraLayer]]:
    """The sets of at least two children of a module that always get the same tensor."""
    open_sets: dict[str, tuple[weakref.ref[Tensor], set[LoraLayer]]] = {}
    closed: dict[str, list[set[LoraLayer]]] = {}

    def record(layer: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        parent = layers[layer].rpartition(".")[0]
        last = open_sets.pop(parent, None)
        if not isinstance(x, Tensor):
            return
        if last is not None and last[0]() is x and layer not in last[1]:
            last[1].add(layer)
            open_sets[parent] = last
        else:
            open_sets[parent] = (weakref.ref(x), {layer})
            closed.setdefault(parent, []).append(open_sets[parent][1])

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in layers]
    head = output_embedding(model)
    if head is not None and head not in layers:
        handles.append(head.register_forward_pre_hook(_stop))
    with evaluation_mode(model), kept_random_states(), torch.no_grad(), suppress(_EndOfRecording):
        model(*args, **batch)  # without dropout, cache or checkpointing
    for handle in handles:
        handle.remove()
    groups: list[frozenset[LoraLayer]] = []
    for sets in closed.values():
        for members in sets:
            always = all(members == other or not members & other for other in sets)
            if len(members) > 1 and always and frozenset(members) not in groups:
                groups.append(frozenset(members))
    return groups
