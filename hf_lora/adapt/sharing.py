"""Find the layers that read one tensor, so that their low-rank products become one: see layers/sharing.py."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.base import LoraLayer, ungroup
from ..layers.ops import used_devices
from .state import require_state
from .walk import adapter_layers


def share_inputs(model: nn.Module, *args: Any, **batch: Any) -> list[tuple[str, ...]]:
    """Let adapted layers that read the same tensor, such as query, key and value, compute their update together.

    One forward on a batch, without gradients and with the random state restored afterwards, shows which children of
    one module are handed one tensor, the very same object, whenever they are called. From then on, in training, the
    first of them that is called reads it once for all: one product with their A, one gradient of the input, one
    dropout mask (where each layer alone would draw its own). The values are otherwise those of before, to rounding.
    Whether the layers really get the same tensor is looked at in every call, so it is safe whatever later calls do.

    Call it after the adapters are made and before training; `LoraTrainer` does by itself. Under `torch.compile` it
    has no effect.

    Args:
        model: the model with adapters.
        args, batch: what the model's forward takes.

    Returns:
        The names of the layers of each group. Groups of an earlier call are forgotten.

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
    found = [tuple(sorted(group, key=order.__getitem__)) for group in _record(model, layers, args, batch)]
    for group in found:
        for layer in group:
            layer._lora.group = group
    return [tuple(layers[layer] for layer in group) for group in found]


class _Seen(Exception):
    """Ends the recorded call before the output layer, whose scores may be larger than all that came before."""


def _stop(module: nn.Module, args: Any) -> None:
    raise _Seen


def _output_layer(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    found = get() if callable(get) else None
    return found if isinstance(found, nn.Module) else None


def _record(
    model: nn.Module, layers: Mapping[LoraLayer, str], args: tuple[Any, ...], batch: dict[str, Any]
) -> list[frozenset[LoraLayer]]:
    """The sets of at least two children of one module that get one tensor whenever they are called."""
    open_sets: dict[str, tuple[weakref.ref[Tensor], set[LoraLayer]]] = {}
    closed: dict[str, list[set[LoraLayer]]] = {}

    def note(layer: Any, given: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        x = given[0] if given else next(iter(keywords.values()), None)
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

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    head = _output_layer(model)
    if head is not None and head not in layers:
        handles.append(head.register_forward_pre_hook(_stop))
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False  # not eval(): nothing is to be told, and no dropout, cache or checkpoint to act
        with torch.random.fork_rng(devices=used_devices()), torch.no_grad():
            model(*args, **batch)
    except _Seen:
        pass
    finally:
        for module in training:
            module.training = True
        for handle in handles:
            handle.remove()
    groups: list[frozenset[LoraLayer]] = []
    for sets in closed.values():
        for members in sets:
            always = all(members == other or not members & other for other in sets)
            if len(members) > 1 and always and frozenset(members) not in groups:
                groups.append(frozenset(members))
    return groups
