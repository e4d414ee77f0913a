"""The plan of a merge from file to file: every output tensor and every fault, before the first byte is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapt.folding import merged_rows
from ..adapt.merge import by_tensor, check_mergeable, folds_of
from ..adapt.ties import names_by_place, tied_folds
from ..adapt.walk import parts
from ..errors import Faults, MergeError
from ..layers.ops import to_float64
from ..layers.parts import Fold
from ..layers.storages import fits
from ..safe_io.headers import Entry, header_of
from .lazy_model import IN_MEMORY, NAME, Shell
from .naming import Run, misnamed
from .ranges import CHUNK
from .writer import FileStorage


@dataclass
class Out:
    """One tensor to write. `base` is the tensor whose bytes are copied before any change, or None."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    base: Entry | None = None
    start: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class OutShard:
    """One file to write."""

    name: str
    outs: list[Out]
    header: bytes = b""
    size: int = 0


@dataclass
class Change:
    """A tensor whose rows differ from the base: they are folded, or come from the adapter.

    Args:
        blocks: its new rows, block by block.
        shape: shape of the tensor if it replaces a whole one or is new; None if it changes some rows of some tensors.
    """

    name: str
    storage: FileStorage
    blocks: Callable[[], Iterator[tuple[slice, Tensor]]]
    shape: tuple[int, ...] | None = None


@dataclass
class Plan:
    """Everything that will be written.

    Args:
        dtype: of all floating-point tensors in the result; None: each keeps its own.
        untied: whether the config must state that nothing is tied.
    """

    shell: Shell
    dtype: torch.dtype | None
    shards: list[OutShard] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    untied: bool = False
    places: dict[str, list[str]] = field(default_factory=dict)
    """First name -> all names of each module that the model has at several places."""

    def dtype_of(self, held: torch.dtype) -> torch.dtype:
        """The dtype in the result of a tensor whose dtype in the base is `held`."""
        return self.dtype if self.dtype is not None and held.is_floating_point and held.itemsize > 1 else held

    def changes_in(self, shard: OutShard) -> list[Change]:
        """The changes in a file."""
        names = {out.name for out in shard.outs}
        return [change for change in self.changes if names & change.storage.targets.keys()]

    def index(self) -> dict[str, Any] | None:
        """The index of the result; None if the base has none."""
        held = self.shell.checkpoint.index
        if held is None:
            return None
        table = {out.name: shard.name for shard in self.shards for out in shard.outs}
        metadata = dict(held.get("metadata") or {})
        if "total_size" in metadata:
            metadata["total_size"] = sum(out.size for shard in self.shards for out in shard.outs)
        if "total_parameters" in metadata and table.keys() != held["weight_map"].keys():
            del metadata["total_parameters"]
        order = [n for n in held["weight_map"] if n in table] + [n for n in table if n not in held["weight_map"]]
        return held | {"metadata": metadata, "weight_map": {name: table[name] for name in order}}


def make_plan(shell: Shell, dtype: torch.dtype | None, untie: bool, call: str) -> Plan:
    """Decide every tensor of the result.

    Raises:
        MergeError: lists everything that cannot be merged, or not from file to file.
    """
    plan, faults = Plan(shell, dtype, places=names_by_place(shell.model)), Faults(call)
    folds = folds_of(shell.model, (NAME,), added=True)
    extra = _untied(plan, folds, untie)
    replaced = _replacements(plan)
    each = [replace(fold, name=name) for fold in folds for name in _names_of(plan, *fold.name.rsplit(".", 1))]
    each = [fold for fold in each if not _added_to_bias(fold, replaced)]
    _plan_folds(plan, each, replaced.keys(), faults)
    try:
        check_mergeable(shell.model, folds, (NAME,), untie=untie, keep=False, call=call)
    except MergeError as error:
        faults.include(error)
    for name, (values, held) in replaced.items():
        _plan_replacement(plan, name, values, held, faults)
    _check_shapes(shell, replaced.keys(), extra, faults)
    _lay_out(plan, extra)
    new = {out.name for shard in plan.shards for out in shard.outs} - shell.checkpoint.tensors.keys()
    for name in misnamed(shell.model, sorted(new), shell.known):
        faults.add(f"{name}: transformers would not find it under this name in a checkpoint with this layout")
    faults.check(MergeError, f"Nothing was written. {IN_MEMORY}")
    _try(plan, faults)
    faults.check(MergeError, "Nothing was written. Use the adapter unmerged.")
    return plan


def _replacements(plan: Plan) -> dict[str, tuple[Tensor, torch.dtype]]:
    """Name in memory -> (values, dtype) of the tensors that the adapter replaces: heads, embeddings, biases.

    A bias that is tied to another one, and stays so, is written under the name that the files have for it.
    """
    shell = plan.shell
    found: dict[str, tuple[Tensor, torch.dtype]] = {}
    alike: dict[str, list[str]] = {}  # the names under which the files hold a tensor that is tied
    for name in sorted(shell.names.held):
        alike.setdefault(shell.owners.get(name, name), []).append(name)
    for part in parts(shell.model, NAME):
        stays_tied = (part.is_tied or not part.whole_module) and not plan.untied
        for name, own, base in part.replaced():
            owner = shell.owners.get(name, name)
            other = _names_of(plan, part.path, name.removeprefix(f"{part.path}."))
            for each in alike.get(owner, [owner]) if stays_tied else other:
                found[each] = own.detach(), base.dtype
    return found


def _added_to_bias(fold: Fold, replaced: dict[str, tuple[Tensor, torch.dtype]]) -> bool:
    """Add an update to the bias that the adapter has in place of the base's, if it is for one."""
    if fold.name not in replaced or not fold.name.endswith(".bias"):
        return False
    values, dtype = replaced[fold.name]
    replaced[fold.name] = fold.start()(to_float64(values), slice(0, len(values))), dtype
    return True


def _names_of(plan: Plan, path: str, leaf: str) -> list[str]:
    """The names in the result of a tensor of a module, which the model may have at several places."""
    first, *others = [f"{name}.{leaf}" for name in plan.places.get(path, [path])]
    held, apart = plan.shell.names.held, plan.shell.tied if plan.untied else ()
    return [first, *(name for name in others if name in held or name in apart)]


def _untied(plan: Plan, folds: Sequence[Fold], untie: bool) -> list[tuple[str, str]]:
    """(name, the tied name whose bytes it starts from) of the tensors to add to the files.

    A config has one flag for all ties, so removing one tie removes them all.
    """
    shell = plan.shell
    whole = tuple(f"{part.path}." for part in parts(shell.model, NAME) if part.whole_module and not part.is_tied)
    tied = shell.tied & shell.owners.keys()
    adapted = untie and any(fold.name in tied for fold in tied_folds(shell.model, folds))
    parted = any(key.startswith(p) != source.startswith(p) for p in whole for key, source in shell.ties.items())
    plan.untied = adapted or parted
    return [(name, shell.owners[name]) for name in sorted(tied - shell.names.held)] if plan.untied else []


def _plan_folds(plan: Plan, folds: Sequence[Fold], replaced: Collection[str], faults: Faults) -> None:
    """Plan the weights that get an update: where their rows are in the files."""
    shell, found = plan.shell, set[str]()
    for fold in folds:
        name = fold.name
        if name in replaced:
            faults.add(f"{name}: the adapter both replaces and updates it, which only works in memory. {IN_MEMORY}")
        if fold.holders is None and plan.untied and name in shell.tied:
            faults.add(f"{name}: rows of a weight that is untied can only be merged in memory. {IN_MEMORY}")
        if name in shell.misshapen or (name not in shell.owners and name not in shell.names.held):
            continue  # reported separately
        storage = _rows_in_files(plan, name, tuple(fold.site.weight.shape), faults)
        if storage is not None:
            fold.storage = storage
            found.add(name)
    for name, fold in by_tensor(folds).items():
        if name in found and isinstance(fold.storage, FileStorage):
            plan.changes.append(Change(name, fold.storage, partial(merged_rows, fold, reuse=True)))


def _plan_replacement(plan: Plan, name: str, values: Tensor, held: torch.dtype, faults: Faults) -> None:
    """Plan a tensor of the adapter: as a whole, or by rows if the files hold it converted."""
    shape, names = tuple(values.shape), plan.shell.names
    converted = name in names.converted
    if converted:
        storage = _rows_in_files(plan, name, shape, faults)
    else:
        run = Run(0, names.direct.get(name, name), 0, len(values) if values.dim() else 1)
        storage = FileStorage(shape, [run], plan.shell.checkpoint, plan.dtype_of(held))
    if storage is None:
        return
    if storage.dtype.is_floating_point and not fits(values.to(torch.float32), storage.dtype):
        faults.add(f"{name}: a value of the adapter is not finite, or too large for {storage.dtype}")
    plan.changes.append(Change(name, storage, partial(_in_blocks, values), None if converted else shape))


def _in_blocks(values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    values = values.reshape(-1) if values.dim() == 0 else values
    step = max(1, CHUNK // max(1, values[:1].numel()))
    for start in range(0, len(values), step):
        yield slice(start, min(start + step, len(values))), values[start : start + step]


def _rows_in_files(plan: Plan, name: str, shape: tuple[int, ...], faults: Faults) -> FileStorage | None:
    """Where the rows of a weight in memory are read from and written to; None and a fault if unknown."""
    shell = plan.shell
    owner = name if name in shell.names.held else shell.owners[name]
    runs = shell.names.runs(owner, shape, shell.checkpoint.tensors)
    if isinstance(runs, str):
        faults.add(f"{name}: {runs}")
        return None
    dtype = plan.dtype_of(shell.checkpoint.tensors[runs[0].key].dtype)
    renamed = name if owner != name and plan.untied else None
    return FileStorage(shape, runs, shell.checkpoint, dtype, renamed)


def _check_shapes(shell: Shell, replaced: Collection[str], extra: Sequence[tuple[str, str]], faults: Faults) -> None:
    """Check that each parameter is in the files with its shape, or in the adapter."""
    for name, why in shell.misshapen.items():
        if name not in replaced:
            faults.add(f"shape: {why}")
    for name, owner in extra:
        if owner in shell.misshapen and name not in replaced:
            faults.add(f"{name}: it was tied to {owner}, which got new rows, and its own new rows are in no file")
    for name in sorted(shell.missing - set(replaced)):
        faults.add(f"missing: {name} is neither in the base's files nor in the adapter, so it would be random")


def _lay_out(plan: Plan, extra: Sequence[tuple[str, str]]) -> None:
    """The files of the result: those of the base, in order, with new tensors at the end of one of them."""
    shell = plan.shell
    left_out = set(shell.names.unknown) if shell.foreign else set()
    where: dict[str, OutShard] = {}
    for read in shell.checkpoint.shards:
        outs = [Out(e.name, plan.dtype_of(e.dtype), e.shape, e) for e in read.entries if e.name not in left_out]
        plan.shards.append(OutShard(read.path.name, outs))
        where |= {out.name: plan.shards[-1] for out in outs}
    for name, owner in extra:
        key = shell.names.direct.get(owner)
        if key is not None and key in where:
            base = shell.checkpoint.tensors[key]
            where[key].outs.append(Out(name, plan.dtype_of(base.dtype), base.shape, base))
    outs_by_name = {out.name: out for shard in plan.shards for out in shard.outs}
    for change in plan.changes:
        for name, rows in change.storage.targets.items():
            out = outs_by_name.get(name)
            if out is None and change.shape is not None:
                out = outs_by_name[name] = Out(name, change.storage.dtype, change.shape)
                plan.shards[-1].outs.append(out)
            if out is None:
                raise MergeError(f"{change.name}: no file of the result would hold {name}. {IN_MEMORY}")
            if change.shape is not None:
                out.shape, out.dtype = change.shape, change.storage.dtype
            if rows == (out.shape[0] if out.shape else 1):
                out.base = None
    for shard, read in zip(plan.shards, shell.checkpoint.shards, strict=True):
        described = [(out.name, out.dtype, out.shape) for out in shard.outs]
        same = described == [(entry.name, entry.dtype, entry.shape) for entry in read.entries]
        header = read.header if same else header_of(described, read.metadata)
        shard.header = len(header).to_bytes(8, "little") + header
        shard.size = len(shard.header)
        for out in shard.outs:
            out.start = shard.size
            shard.size += out.size


@torch.no_grad()
def _try(plan: Plan, faults: Faults) -> None:
    """Fold float16 tensors without writing: only these overflow if base and update have ordinary magnitudes."""
    for change in plan.changes:
        if change.storage.dtype == torch.float16:
            if not all(fits(block, torch.float16) for _, block in change.blocks()):
                faults.add(f"{change.name}: a merged value is not finite, or too large for {torch.float16}")
            change.storage.forget()
