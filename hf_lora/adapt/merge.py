"""Fold adapters into the base weights, and undo it.

Rows of a weight are read as float64, the updates are computed and added in float64, and the sum is rounded once, to
the weight's dtype. This is done in blocks of rows, small enough for a core's cache: the weight is read and written
once, and no temporary is as large as a weight. A memory-mapped weight gets new memory instead, and its pages are
released as they are read.

A quantized weight is never written. A permanent merge makes the whole model dense (dequantize.py); a temporary one is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ..config import as_tuple
from ..errors import Faults, MergeError, StateError
from ..layers.contract import Update
from ..layers.distributed import is_partitioned, is_sharded
from ..layers.file_maps import lies_in, unwritten_maps
from ..layers.parts import Fold
from ..layers.storages import fits, why_unreadable
from .activation import acting_together, set_active, switch
from .dequantize import dense_dtype, dequantization_faults, dequantize, dequantize_with, is_quantized
from .folding import Folding, merged_rows
from .inject import eject, refuse_shared
from .inner import outermost_models
from .state import LoraState, require_state, state_of
from .ties import forward_reads_tie_flag, tensor_users, untie_adapted
from .undo import Undo, all_or_nothing
from .walk import parts

_UNMERGED = "Adapters also work unmerged."
MERGED = "merged_adapters"
"""The attribute of a plain model with the names of the adapters that its weights contain."""


def merge(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    keep: bool = True,
    call: str = "merge",
) -> tuple[str, ...]:
    """Fold the active adapters (or `names`, which are active until `unmerge`) into the weights, in place.

    Args:
        untie: first give an adapted layer that shares its weight its own copy.
        keep: keep the original of each merged weight, so that `unmerge` restores every bit. This takes as much memory
            as the weights of the adapted layers. Not possible for a quantized base; with False it becomes dense.

    Returns:
        The names of the merged adapters.

    Raises:
        StateError: the model is already merged, no adapter is active, or the adapters are disabled.
        MergeError: lists every layer that cannot be merged. The weights are unchanged.
    """
    state = require_state(model, call)
    with all_or_nothing(model) as undo:
        merging = _Merging(model, state, names, untie, keep, call, undo)
        merging.run()
    return state.activity.merged


def merge_for_good(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    call: str = "merge_and_unload",
) -> None:
    """Fold the active adapters (or `names`) into the weights and remove all adapters.

    A quantized base becomes a dense model, in the dtype of its other weights: see dequantize.py. Interrupted before
    the first weight is written, it changes nothing; afterwards, it is completed before the error is raised.

    Raises:
        StateError, MergeError: as `merge`; also if the model is merged with other adapters than `names`.
    """
    state = require_state(model, call)
    refuse_shared(model, call)
    wanted = None if names is None else as_tuple(names)
    with all_or_nothing(model) as undo:
        if not state.activity.merged:
            merging = _Merging(model, state, wanted, untie, False, call, undo)
            merging.then = partial(_leave_merged, model, merging.active)
            merging.run()
            return
        if not state.activity.enabled:
            raise StateError(f"{call}: the adapters are disabled. Call enable_adapters() first.")
        if wanted not in (None, state.activity.merged):
            state.refuse_merged(f"{call}({names!r})")
        if is_quantized(model):  # only its dense layers were merged
            dequantize(model, call)
        _leave_merged(model, state.activity.merged)


def unmerge(model: nn.Module) -> None:
    """Restore every bit of the base weights and their ties; those adapters are active that were before the merge. If
    that is interrupted, it is completed before the error is raised.

    Raises:
        StateError: nothing is merged.
    """
    state = require_state(model, "unmerge_adapter")
    if not state.activity.merged:
        raise StateError("unmerge_adapter: no adapter is merged.")
    state.refuse_permanent("unmerge_adapter")
    _twice(partial(_unmerge, model, state))


def unload(model: nn.Module) -> None:
    """Remove every adapter, merged or not, and restore every bit of the base."""
    state = require_state(model, "unload")
    if not state.activity.merged:
        eject(model)
        return
    state.refuse_permanent("unload")
    refuse_shared(model, "unload")

    def run() -> None:
        _unmerge(model, state)
        if state_of(model) is not None:
            eject(model)

    _twice(run)


def _unmerge(model: nn.Module, state: LoraState) -> None:
    """May be repeated, wherever it was interrupted."""
    for original in state.originals:
        if original.merged:
            original.put_back()
    if state.ties is not None:
        state.ties.restore(model)
    state.__dict__.update(originals=[], ties=None)
    state.activity.set(merged=())
    if state.active_unmerged is not None:
        set_active(model, state, state.active_unmerged)
        state.active_unmerged = None


def _leave_merged(model: nn.Module, merged: tuple[str, ...]) -> None:
    """Remove merged adapters, and note in the model that its weights contain them. May be repeated."""
    if state_of(model) is not None:
        eject(model, keep_heads=True)
    for each in {id(m): m for m in (model, *outermost_models(model))}.values():
        each.__dict__[MERGED] = tuple(dict.fromkeys((*each.__dict__.get(MERGED, ()), *merged)))


def _twice(change: Callable[[], object], back: Callable[[], object] = bool) -> None:
    """Complete a change that may be repeated, also if an error or an interruption ends it; else undo it by `back`."""
    try:
        change()
    except BaseException:
        try:
            change()
        except BaseException:
            back()
            raise
        raise


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Enable or disable the active adapters. If they are merged, the weights and the kept originals are swapped."""
    state = require_state(model, "enable_adapters" if enabled else "disable_adapters")
    if state.activity.enabled == enabled:
        return
    state.refuse_permanent("disable_adapters")

    def change(enabled: bool) -> None:
        for original in state.originals:
            original.place(merged=enabled)
        switch(model, state, enabled=enabled)

    _twice(partial(change, enabled), partial(change, not enabled))


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable the adapters within a `with` block; restore the previous state afterwards, if they are still there."""
    state = require_state(model, "disable_adapter")
    before = state.activity.enabled

    def restore() -> None:
        if state_of(model) is state:
            set_enabled(model, before)

    try:
        set_enabled(model, False)
        yield
        restore()
    except BaseException:
        restore()
        raise


def folds_of(model: nn.Module, names: tuple[str, ...], added: bool = False) -> list[Fold]:
    """How merging the adapters `names` changes the tensors of the base, jointly for those that act together.

    Args:
        added: only updates that are added, without parts that replace tensors of the base.
    """
    together = acting_together(model, names)
    return [fold for first, *others in together if not (added and first.replaces) for fold in first.folds(others)]


def by_tensor(folds: Sequence[Fold]) -> dict[str, Fold]:
    """Name of a tensor -> all its folds combined, so that it is read and rounded once."""
    found: dict[str, Fold] = {}
    for fold in folds:
        before = found.get(fold.name)
        start = fold.start if before is None else partial(_one_after_another, before.start, fold.start)
        found[fold.name] = replace(fold, start=start)
    return found


def _one_after_another(first: Callable[[], Update], second: Callable[[], Update]) -> Update:
    before, after = first(), second()
    return lambda block, rows: after(before(block, rows), rows)


class _Merging:
    """A merge in steps. A permanent one that was cut off can be continued, so that it is completed.

    Raises:
        StateError, MergeError: the adapters cannot be merged.
    """

    def __init__(
        self, model: nn.Module, state: LoraState, names: str | Sequence[str] | None, untie: bool, keep: bool,
        call: str, undo: Undo,
    ) -> None:  # fmt: skip
        state.refuse_merged(call)
        if not state.activity.enabled:
            raise StateError(f"{call}: the adapters are disabled. Call enable_adapters() first.")
        wanted = state.activity.active if names is None else as_tuple(names)
        if not wanted:
            raise StateError(f"{call}: no adapter is active. Call set_adapter(name) first.")
        if names is not None:
            state.active_unmerged = state.activity.active
            set_active(model, state, wanted)
        folds = folds_of(model, wanted)
        check_mergeable(model, folds, wanted, untie, keep, call)
        stored = by_tensor(folds)
        if not keep:
            _check_overflow(model, stored.values(), call)
        if untie:
            state.ties = untie_adapted(model, folds)
        self.model, self.state, self.keep, self.call, self.undo, self.active = model, state, keep, call, undo, wanted
        self.packed = {n.rpartition(".")[0]: fold.start for n, fold in stored.items() if fold.storage.quantized}
        dense = [fold for fold in stored.values() if not fold.storage.quantized]
        maps = unwritten_maps() if dense else []
        self.becomes_dense = not keep and is_quantized(model)
        self.foldings = [Folding(fold, lies_in(fold.site.weight, maps), keep) for fold in dense]
        self.then: Callable[[], object] = lambda: None

    def run(self) -> None:
        for folding in self.foldings:
            self._step(folding.label, partial(folding.run, self._before_writing))
        if self.becomes_dense:
            self._passes_no_return()
            self._step("the quantized layers", partial(dequantize_with, self.model, self.packed))
        self.state.permanent = not self.keep
        self.state.activity.set(merged=self.active)
        self.then()

    def _step(self, label: str, step: Callable[[], object]) -> None:
        try:
            step()
        except MergeError as error:
            outcome = "Earlier layers may be merged already, so reload the base."
            raise MergeError(
                f"{self.call}: {label}: {error}. {'The weights are unchanged.' if self.keep else outcome}"
            ) from None

    def _before_writing(self, folding: Folding) -> None:
        """Keep the original, or make sure that the merge will be completed."""
        if not self.keep:
            self._passes_no_return()
            return
        original = folding.original()
        if not folding.mapped:  # the original is still there
            self.undo.restoring(original.put_back)
        self.state.originals = [*self.state.originals, original]

    def _passes_no_return(self) -> None:
        self.undo.no_return(self._complete)

    def _complete(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self.state.lose(f"{self.call} could be neither completed nor undone ({error}). Load the base again.")
            raise


@torch.no_grad()
def _check_overflow(model: nn.Module, stored: Iterable[Fold], call: str) -> None:
    """Fold float16 layers without writing: only float16 overflows if base and update have ordinary magnitudes.

    Without kept originals, an overflow halfway could not be undone. This doubles the work but takes no memory.
    """
    faults = Faults(call)
    for fold in stored:
        dtype = dense_dtype(model) if fold.storage.quantized else fold.site.weight.dtype
        if dtype == torch.float16 and not all(fits(block, dtype) for _, block in merged_rows(fold, reuse=True)):
            faults.add(f"{fold.label}: a merged value is not finite, or too large for {dtype}")
    faults.check(MergeError, f"The weights are unchanged. {_UNMERGED}")


def check_mergeable(
    model: nn.Module, folds: Sequence[Fold], active: tuple[str, ...], untie: bool, keep: bool, call: str
) -> None:
    """Check that the adapters `active`, with these `folds`, can be merged. Weights are not folded for this.

    Raises:
        MergeError: lists everything that prevents it.
    """
    faults = Faults(call)
    next_step = _UNMERGED
    becomes_dense = not keep and is_quantized(model)
    if becomes_dense:
        for fault in dequantization_faults(model):
            faults.add(fault)
    elif any(fold.storage.quantized for fold in folds):
        next_step = (
            "Keep the adapter unmerged; or call merge_and_unload(), which makes a model of known format dense; "
            "or, best, merge into the dense base: LoraModel.from_pretrained(adapter, base_model=…, merge=True)."
        )
    for name in active:
        for part in parts(model, name):
            for spec, tensor in part.tensors():
                if is_sharded(tensor) or tensor.is_meta:
                    continue  # the weights are refused below
                if tensor.is_floating_point() and not fits(tensor.detach(), tensor.dtype):
                    faults.add(f"adapter {name!r}: {part.path}.{spec.key} holds NaN or infinity")
    for fold in folds:
        if fold.storage.readable:
            _check_weight(fold, keep, faults)
        elif not becomes_dense:  # otherwise it is reported already
            faults.add(f"{fold.label}: {why_unreadable(fold.site)}")
    _check_ties(model, folds, untie, faults)
    faults.check(MergeError, f"Nothing was changed. {next_step}")


def _check_weight(fold: Fold, keep: bool, faults: Faults) -> None:
    path, storage, weight = fold.label, fold.storage, fold.site.weight
    if storage.quantized and keep:
        faults.add(
            f"{path}: its weight is quantized ({storage.kind}), and rounding the sum to that format again would lose "
            "most of the update"
        )
    if fold.refused is not None:
        faults.add(f"{path}: {fold.refused}")
    if weight is None:  # a bias that the layer does not have, which `refused` reports
        return
    if weight.is_meta:
        faults.add(
            f"{path}: its weight is offloaded; load the base without offloading (no device_map, or one that fits)"
        )
    elif is_partitioned(weight) or not storage.owns(fold.site):
        kind = "partitioned by ZeRO-3" if is_partitioned(weight) else f"a {type(weight).__name__}"
        why = "; pickling a quantized weight removes its class: load the base again" if storage.quantized else ""
        faults.add(f"{path}: its weight is now {kind}, which cannot be merged in place{why}")
    elif weight.dim() == 1 and not all(fits(block, weight.dtype) for _, block in merged_rows(fold)):
        faults.add(f"{path}: a merged value is not finite, or too large for {weight.dtype}")


def _check_ties(model: nn.Module, folds: Sequence[Fold], untie: bool, faults: Faults) -> None:
    """Add a fault for each weight that is shared with modules which its update must not reach."""
    users = tensor_users(model)
    meant_for_several = {id(f.site.weight) for f in folds if f.holders is None or len(f.holders) > 1}
    for fold in folds:
        if not fold.storage.readable or fold.site.weight is None or fold.holders is None:
            continue
        shared = [name for name in users[id(fold.site.weight)] if name not in fold.holders]
        if not shared:
            continue
        tied = f"{fold.label}: its weight is tied to {', '.join(shared)}"
        if not untie:
            faults.add(
                f"{tied}, which the update must not change. Either keep the adapter unmerged, or pass untie=True to "
                "give the layer its own weight (the saved model then contains both)"
            )
        elif id(fold.site.weight) in meant_for_several:
            faults.add(f"{tied}, and another update applies to all of them")
        elif forward_reads_tie_flag(model):
            faults.add(
                f"{tied}, and untying would change what the model computes, because its forward depends on whether "
                "embeddings are tied. Keep the adapter unmerged"
            )
