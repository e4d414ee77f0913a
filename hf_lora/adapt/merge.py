"""Fold adapters into the base weights, and take them out again.

Rows of a weight are read as float64, the updates are computed in float64 and added, and the sum is rounded once, to
the weight's dtype. Blocks of rows bound the memory, and are small enough to stay in a core's cache: the weight is read
and written once, and no temporary is as large as a weight. A weight that is a map of its file gets memory of its own
instead, and gives its pages of the map back as it is read.

A quantised weight is never written. To merge for good makes the whole model dense (dequantize.py); to merge for a
while is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import Faults, MergeError, StateError
from ..layers.base import LoraLayer
from ..layers.mapped import let_go, lies_in, unwritten_maps
from ..layers.sharded import is_partitioned, is_sharded
from ..layers.storages import fits, put_rows, why_unreadable
from .dequantize import dense_dtype, dequantize_with, is_quantized, leftovers, read_rows
from .state import LoraState, require_state, set_active
from .ties import forward_asks_for_ties, untie_adapted, weight_users
from .walk import adapter_layers, bias_layers, parts


def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    keep: bool = True,
    call: str = "merge",
) -> tuple[str, ...]:
    """Fold the active adapters (or `names`, which become active) into the weights, in place.

    Args:
        untie: give an adapted layer that shares its weight with another its own copy of it first.
        keep: keep each folded weight's original, so that `unmerge` restores every bit: as much memory as the adapted
            layers' weights. Not over a quantised base; without it such a base becomes a dense model.

    Returns:
        The names that are merged now.

    Raises:
        StateError: already merged, nothing active, or the adapters are disabled.
        MergeError: lists every layer that cannot be folded. The weights are as they were.
    """
    state = require_state(model, call)
    state.refuse_merged(call)
    if not state.activity.enabled:
        raise StateError(f"{call}: the adapters are disabled. Call enable_adapters() first.")
    before = state.activity.active
    if names is not None:
        set_active(model, state, (names,) if isinstance(names, str) else tuple(names))
    active = state.activity.active
    if not active:
        raise StateError(f"{call}: no adapter is active. Call set_adapter(name) first.")
    layers = {n: layer for n, layer in adapter_layers(model).items() if _acting(layer, state)}
    try:
        check_mergeable(model, state, layers, active, untie, keep, call)
        if not keep:
            _try(model, state, layers, call)
    except MergeError:
        set_active(model, state, before)
        raise
    if untie:
        untie_adapted(model, layers)
    packed = {name: _folding(layer, state) for name, layer in layers.items() if layer._lora.storage.quantized}
    dense = {name: layer for name, layer in layers.items() if name not in packed}
    maps = unwritten_maps() if dense else []
    steps = {n: partial(_fold, layer, _acting(layer, state), keep, maps) for n, layer in dense.items()}
    if not keep and is_quantized(model):
        steps["the quantised layers"] = partial(dequantize_with, model, packed)
    for name, step in steps.items():
        try:
            step()
        except BaseException as error:  # such as no memory: a layer that stayed folded would be added to twice
            _restore(layers)
            set_active(model, state, before)
            if not isinstance(error, MergeError):
                raise
            undone = (
                "The weights are as they were."
                if keep
                else "Layers before this one hold their adapters already: load the base anew."
            )
            raise MergeError(f"{call}: {name}: {error}. {undone}") from None
    for biased in bias_layers(model).values():
        for n in biased._bias_names:
            if n in active:
                bias: Any = biased.bias
                biased._bias_original = bias.detach().clone() if keep else None
                bias.data.copy_(biased.lora_bias[n].weight)
    state.activity.set(merged=active)
    if not keep:
        forget_originals(model)
    return active


def unmerge(model: nn.Module) -> None:
    """Restore every bit of the base weights; the adapters act beside them again.

    Raises:
        StateError: nothing is merged.
    """
    state = require_state(model, "unmerge_adapter")
    if not state.activity.merged:
        raise StateError("unmerge_adapter: no adapter is merged.")
    if state.activity.enabled:
        _restore(adapter_layers(model))
        for biased in bias_layers(model).values():
            if biased._bias_original is not None:
                cast(Tensor, biased.bias).data.copy_(biased._bias_original)
    forget_originals(model)
    state.activity.set(merged=())


def forget_originals(model: nn.Module) -> None:
    for layer in adapter_layers(model).values():
        layer._lora.original = None
    for biased in bias_layers(model).values():
        biased._bias_original = None


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Let the active adapters act, or not; where they are merged, the kept originals are swapped with the weights."""
    state = require_state(model, "enable_adapters" if enabled else "disable_adapters")
    if state.activity.enabled == enabled:
        return
    if state.activity.merged:
        for layer in adapter_layers(model).values():
            own = layer._lora
            if own.original is not None:
                now = own.storage.keep(layer)
                own.storage.put_back(layer, own.original)
                own.original = now
        for biased in bias_layers(model).values():
            if biased._bias_original is not None:
                _swap(biased.bias, biased._bias_original)  # type: ignore[arg-type]
    state.activity.set(enabled=enabled)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """The base model for the time of a `with` block; afterwards the state that was found."""
    state = require_state(model, "disable_adapter")
    before = state.activity.enabled
    set_enabled(model, False)
    try:
        yield
    finally:
        set_enabled(model, before)


def folded(layer: LoraLayer, names: tuple[str, ...], reuse: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the layer's weight with the adapters `names` in it, float64 where the device has it.

    Args:
        reuse: one piece of memory for all blocks, so that each lasts until the next one is asked for.
    """
    state = layer._lora
    fold = state.adapters[names[0]].method.folding(layer, names)
    for rows, block in read_rows(state.storage, layer, reuse):
        yield rows, fold(block, rows)


@torch.no_grad()
def _try(model: nn.Module, state: LoraState, layers: dict[str, LoraLayer], call: str) -> None:
    """Fold float16 layers and write nothing: only float16 overflows where base and update are of ordinary size.

    Without kept originals nothing could undo that half way. It costs the work twice, and no memory.
    """
    faults = Faults(call)
    for name, layer in layers.items():
        dtype = dense_dtype(model) if layer._lora.storage.quantized else cast(Tensor, layer.weight).dtype
        if dtype == torch.float16:
            if not all(fits(block, dtype) for _, block in folded(layer, _acting(layer, state), reuse=True)):
                faults.add(f"{name}: a merged value is not finite, or too large for {dtype}")
    faults.check(MergeError, "The weights are as they were. Adapters work unmerged in any case.")


@torch.no_grad()
def _fold(layer: LoraLayer, names: tuple[str, ...], keep: bool, maps: list[tuple[int, int]]) -> None:
    state = layer._lora
    weight: Any = layer.weight
    if lies_in(weight, maps):  # read there, and written to memory of its own
        before, own = weight.data, torch.empty_like(weight)
        for rows, block in folded(layer, names, reuse=True):
            put_rows(own, rows, block)
            if not keep:
                let_go(before[rows])
        weight.data, state.original = own, before if keep else None
        return
    if keep:
        state.original = state.storage.keep(layer)
    for rows, block in folded(layer, names, reuse=True):
        state.storage.write(layer, rows, block)


@torch.no_grad()
def _restore(layers: dict[str, LoraLayer]) -> None:
    for layer in layers.values():
        if layer._lora.original is not None:
            layer._lora.storage.put_back(layer, layer._lora.original)
            layer._lora.original = None


def _swap(parameter: Tensor, kept: Tensor) -> None:
    now = parameter.detach().clone()
    parameter.data.copy_(kept)
    kept.copy_(now)


def _acting(layer: LoraLayer, state: LoraState) -> tuple[str, ...]:
    return tuple(n for n in state.activity.active if n in layer._lora.names)


def _folding(layer: LoraLayer, state: LoraState) -> Callable[[Tensor, slice], Tensor]:
    names = _acting(layer, state)
    return layer._lora.adapters[names[0]].method.folding(layer, names)


def check_mergeable(
    model: nn.Module,
    state: LoraState,
    layers: dict[str, LoraLayer],
    active: tuple[str, ...],
    untie: bool,
    keep: bool,
    call: str,
) -> None:
    """See that the adapters `active` can be folded into `layers`; nothing is computed for it.

    Raises:
        MergeError: lists everything that stands in the way.
    """
    faults = Faults(call)
    next_step = "Adapters work unmerged in any case."
    becomes_dense = not keep and is_quantized(model)
    if any(layer._lora.storage.quantized for layer in layers.values()) and not becomes_dense:
        next_step = (
            "Keep the adapter unmerged; or call merge_and_unload(), which makes a model dense whose form is known; "
            "or, best, merge into the dense base: LoraModel.from_pretrained(adapter, base_model=…, merge=True)."
        )
    if becomes_dense:
        for fault in leftovers(model):
            faults.add(fault)
    for name in active:
        for part in parts(model, name):
            for spec, tensor in part.tensors():
                if is_sharded(tensor):
                    continue  # the weights are refused below
                if tensor.is_floating_point() and not fits(tensor.detach(), tensor.dtype):
                    faults.add(f"adapter {name!r}: {part.path}.{spec.key} holds NaN or infinity")
    for path, biased in bias_layers(model).items():
        for name in (n for n in active if n in biased._bias_names):
            bias: Any = biased.bias
            own: Any = biased.lora_bias[name].weight
            if torch.isfinite(own).all() and not torch.isfinite(own.to(bias.dtype)).all():
                faults.add(f"{path}.bias: a merged value is too large for {bias.dtype}")
    users = weight_users(model)
    for path, layer in layers.items():
        storage = layer._lora.storage
        if not storage.readable:
            if not becomes_dense:  # else it is among the leftovers
                faults.add(f"{path}: {why_unreadable(layer)}")
            continue
        weight: Any = layer.weight
        if storage.quantized and keep:
            faults.add(
                f"{path}: its weight is quantised ({storage.kind}), and rounding the sum to that form again would "
                "take most of the update away"
            )
        refused = layer._lora.shape.refuse_folding(layer)
        if refused is not None:
            faults.add(f"{path}: {refused}")
        if weight.is_meta:
            faults.add(
                f"{path}: its weight is offloaded; load the base without offloading (no device_map, or one that fits)"
            )
        elif is_partitioned(weight) or not storage.owns(layer):
            kind = "a part of ZeRO-3's" if is_partitioned(weight) else type(weight).__name__
            faults.add(f"{path}: its weight is {kind} now, which cannot be folded in place")
        shared = [n for n in users[id(weight)] if n != path]
        if shared and untie and forward_asks_for_ties(model):
            faults.add(
                f"{path}: its weight is tied to {', '.join(shared)}, and untying would change what the model "
                "computes, as its forward asks whether embeddings are tied. Keep the adapter unmerged"
            )
        elif shared and not untie:
            faults.add(
                f"{path}: its weight is tied to {', '.join(shared)}, which the update must not reach. Either keep the "
                "adapter unmerged, or pass untie=True to give the layer its own weight (the model then saves both)"
            )
    faults.check(MergeError, f"Nothing was changed. {next_step}")
