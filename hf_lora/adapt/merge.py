"""Fold adapters into the base weights, and take them out again.

Rows of a weight are read as float64, the updates are computed in float64 and added, and the sum is rounded once, to
the weight's dtype. Blocks of rows bound the memory, and are small enough to stay in a core's cache: the weight is read
and written once, and no temporary is as large as a weight. A weight that is a map of its file gets memory of its own
instead, and gives its pages of the map back as it is read.

A quantised weight is never written. To merge for good makes the whole model dense (dequantize.py); to merge for a
while is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import Faults, MergeError, StateError
from ..layers.contract import Update
from ..layers.distributed import is_partitioned, is_sharded
from ..layers.file_maps import let_go, lies_in, unwritten_maps
from ..layers.parts import Fold
from ..layers.site import Site
from ..layers.storages import fits, put_rows, why_unreadable
from .dequantize import dense_dtype, dequantize, dequantize_with, is_quantized, leftovers, read_rows
from .inject import eject
from .state import LoraState, Original, acting_together, require_state, set_active
from .ties import forward_asks_for_ties, tensor_users, untie_adapted
from .walk import parts


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
    wanted = before if names is None else (names,) if isinstance(names, str) else tuple(names)
    if not wanted:
        raise StateError(f"{call}: no adapter is active. Call set_adapter(name) first.")
    if names is not None:
        set_active(model, state, wanted)
    active = state.activity.active
    try:
        folds = folds_of(model, active)
        check_mergeable(model, folds, active, untie, keep, call)
        stored = by_tensor(folds)
        if not keep:
            _try(model, stored.values(), call)
    except MergeError:
        set_active(model, state, before)
        raise
    if untie:
        untie_adapted(model, folds)
    packed = {name.rpartition(".")[0]: fold.start for name, fold in stored.items() if fold.storage.quantized}
    dense = {name: fold for name, fold in stored.items() if not fold.storage.quantized}
    maps = unwritten_maps() if dense else []
    kept = state.originals if keep else None
    steps = {fold.label: partial(_fold, fold, kept, maps) for fold in dense.values()}
    if not keep and is_quantized(model):
        steps["the quantised layers"] = partial(dequantize_with, model, packed)
    for name, step in steps.items():
        try:
            step()
        except BaseException as error:  # such as no memory: a layer that stayed folded would be added to twice
            _restore(state)
            set_active(model, state, before)
            if not isinstance(error, MergeError):
                raise
            undone = (
                "The weights are as they were."
                if keep
                else "Layers before this one hold their adapters already: load the base anew."
            )
            raise MergeError(f"{call}: {name}: {error}. {undone}") from None
    state.activity.set(merged=active)
    return active


def merge_for_good(
    model: nn.Module, names: str | Sequence[str] | None = None, *, untie: bool = False, call: str = "merge_and_unload"
) -> None:
    """Fold the active adapters (or `names`) into the weights and take all adapters off.

    A quantised base becomes a dense model, in the dtype of its other weights: see dequantize.py.

    Raises:
        StateError, MergeError: as `merge`; or others are merged than `names`.
    """
    state = require_state(model, call)
    wanted = (names,) if isinstance(names, str) else names if names is None else tuple(names)
    if not state.activity.merged:
        merge(model, wanted, untie=untie, keep=False, call=call)
    elif not state.activity.enabled:
        raise StateError(f"{call}: the adapters are disabled. Call enable_adapters() first.")
    elif wanted not in (None, state.activity.merged):
        state.refuse_merged(f"{call}({names!r})")
    if is_quantized(model):  # its dense layers alone were merged before
        dequantize(model, call)
    eject(model, keep_heads=True)


def unmerge(model: nn.Module) -> None:
    """Restore every bit of the base weights; the adapters act beside them again.

    Raises:
        StateError: nothing is merged.
    """
    state = require_state(model, "unmerge_adapter")
    if not state.activity.merged:
        raise StateError("unmerge_adapter: no adapter is merged.")
    if state.activity.enabled:
        _restore(state)
    state.originals.clear()
    state.activity.set(merged=())


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Let the active adapters act, or not; where they are merged, the kept originals are swapped with the weights."""
    state = require_state(model, "enable_adapters" if enabled else "disable_adapters")
    if state.activity.enabled == enabled:
        return
    for original in state.originals:
        original.swap()
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


def folds_of(model: nn.Module, names: tuple[str, ...], added: bool = False) -> list[Fold]:
    """What merging the adapters `names` makes of the base's tensors, each with those that act on it together.

    Args:
        added: without what stands in place of a tensor of the base.
    """
    together = acting_together(model, names)
    return [fold for first, *others in together if not (added and first.replaces) for fold in first.folds(others)]


def by_tensor(folds: Sequence[Fold]) -> dict[str, Fold]:
    """Name of a tensor -> all its folds as one: it is read once and rounded once."""
    found: dict[str, Fold] = {}
    for fold in folds:
        before = found.get(fold.name)
        start = fold.start if before is None else partial(_one_after_another, before.start, fold.start)
        found[fold.name] = replace(fold, start=start)
    return found


def _one_after_another(first: Callable[[], Update], second: Callable[[], Update]) -> Update:
    before, after = first(), second()
    return lambda block, rows: after(before(block, rows), rows)


def merged_rows(fold: Fold, reuse: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the tensor as merged, float64 where the device has it.

    Args:
        reuse: one piece of memory for all blocks, so that each lasts until the next one is asked for.
    """
    update = fold.start()
    for rows, block in read_rows(fold.storage, fold.site, reuse):
        yield rows, update(block, rows)


def folded(layer: Site, names: tuple[str, ...], reuse: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """`merged_rows` of one site with the adapters `names` in it."""
    fold = layer.folding(names)
    for rows, block in read_rows(layer._lora.storage, layer, reuse):
        yield rows, fold(block, rows)


@torch.no_grad()
def _try(model: nn.Module, stored: Iterable[Fold], call: str) -> None:
    """Fold float16 layers and write nothing: only float16 overflows where base and update are of ordinary size.

    Without kept originals nothing could undo that half way. It costs the work twice, and no memory.
    """
    faults = Faults(call)
    for fold in stored:
        dtype = dense_dtype(model) if fold.storage.quantized else fold.site.weight.dtype
        if dtype == torch.float16 and not all(fits(block, dtype) for _, block in merged_rows(fold, reuse=True)):
            faults.add(f"{fold.label}: a merged value is not finite, or too large for {dtype}")
    faults.check(MergeError, "The weights are as they were. Adapters work unmerged in any case.")


@torch.no_grad()
def _fold(fold: Fold, kept: list[Original] | None, maps: list[tuple[int, int]]) -> None:
    """Write one tensor as merged; what it was goes into `kept`, where it is to be restored."""
    weight = fold.site.weight
    if lies_in(weight, maps):  # read there, and written to memory of its own
        before, own = weight.data, torch.empty_like(weight)
        for rows, block in merged_rows(fold, reuse=True):
            put_rows(own, rows, block)
            if kept is None:
                let_go(before[rows])
        weight.data = own
        if kept is not None:
            kept.append(Original(fold.site, fold.storage, before))
        return
    if kept is not None:
        kept.append(Original(fold.site, fold.storage, fold.storage.keep(fold.site)))
    for rows, block in merged_rows(fold, reuse=True):
        fold.storage.write(fold.site, rows, block)


@torch.no_grad()
def _restore(state: LoraState) -> None:
    for original in state.originals:
        original.put_back()
    state.originals.clear()


def check_mergeable(
    model: nn.Module, folds: Sequence[Fold], active: tuple[str, ...], untie: bool, keep: bool, call: str
) -> None:
    """See that the adapters `active` can be merged, which makes `folds` of the base; nothing is computed for it.

    Raises:
        MergeError: lists everything that stands in the way.
    """
    faults = Faults(call)
    next_step = "Adapters work unmerged in any case."
    becomes_dense = not keep and is_quantized(model)
    if any(fold.storage.quantized for fold in folds) and not becomes_dense:
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
    users = tensor_users(model)
    together = {fold.name for fold in folds if fold.holders is None or len(fold.holders) > 1}
    for fold in folds:
        path, storage = fold.label, fold.storage
        if not storage.readable:
            if not becomes_dense:  # else it is among the leftovers
                faults.add(f"{path}: {why_unreadable(fold.site)}")
            continue
        weight = fold.site.weight
        if storage.quantized and keep:
            faults.add(
                f"{path}: its weight is quantised ({storage.kind}), and rounding the sum to that form again would "
                "take most of the update away"
            )
        if fold.refused is not None:
            faults.add(f"{path}: {fold.refused}")
        if weight is None:  # a bias that the layer does not have, which is the refusal
            continue
        if weight.is_meta:
            faults.add(
                f"{path}: its weight is offloaded; load the base without offloading (no device_map, or one that fits)"
            )
        elif is_partitioned(weight) or not storage.owns(fold.site):
            kind = "a part of ZeRO-3's" if is_partitioned(weight) else type(weight).__name__
            faults.add(f"{path}: its weight is {kind} now, which cannot be folded in place")
        elif weight.dim() == 1 and not all(fits(block, weight.dtype) for _, block in merged_rows(fold)):
            faults.add(f"{path}: a merged value is not finite, or too large for {weight.dtype}")
        shared = [n for n in users[id(weight)] if fold.holders is not None and n not in fold.holders]
        if shared and untie and fold.name in together:
            faults.add(
                f"{path}: its weight is tied to {', '.join(shared)}, and another update is meant for all of them"
            )
        elif shared and untie and forward_asks_for_ties(model):
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
