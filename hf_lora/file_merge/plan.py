"""What a merge from file to file will write: decided, and every fault found, before the first byte is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..adapt.merge import by_tensor, check_mergeable, folds_of, merged_rows
from ..adapt.walk import parts
from ..errors import Faults, MergeError
from ..layers.parts import Fold
from ..layers.storages import fits
from .lazy_model import IN_MEMORY, NAME, Shell
from .naming import Run, misnamed
from .ranges import Entry, header_of
from .writer import FileStorage, Sources


class Stretch(NamedTuple):
    """Bytes of a base's file that stand unchanged in the result."""

    entry: Entry
    place: int
    length: int


@dataclass
class Out:
    """One tensor to write. `base` is where its bytes come from, but for those that a fold or a replacement writes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    base: Entry | None = None
    start: int = 0
    end: int = 0
    touched: bool = False
    """Whether some of it passes through torch."""


@dataclass
class OutShard:
    """One file to write."""

    name: str
    outs: list[Out]
    header: bytes = b""
    size: int = 0

    def stretches(self) -> list[Stretch]:
        """What is copied as it is: neighbours in both files as one."""
        found: list[Stretch] = []
        for out in self.outs:
            if out.base is None or out.touched:
                continue
            last = found[-1] if found else None
            follows = last is not None and last.entry.file == out.base.file
            if (
                last
                and follows
                and last.entry.start + last.length == out.base.start
                and last.place + last.length == out.start
            ):
                found[-1] = Stretch(last.entry, last.place, last.length + out.base.end - out.base.start)
            else:
                found.append(Stretch(out.base, out.start, out.base.end - out.base.start))
        return found


@dataclass
class Folded:
    """A tensor that gets the adapter's update. `fold` reads from files and writes to the one under way."""

    fold: Fold
    storage: FileStorage


@dataclass
class Put:
    """Values of the adapter's own that stand in place of the base's."""

    values: Tensor
    storage: FileStorage
    whole: bool
    """Whether it is one tensor in the files too."""


@dataclass
class Plan:
    """Everything that will be written.

    Args:
        writes: name on disk -> what writes to it.
        untied: whether the config has to say that nothing is tied any more.
    """

    shell: Shell
    shards: list[OutShard] = field(default_factory=list)
    folds: dict[str, Folded] = field(default_factory=dict)
    puts: dict[str, Put] = field(default_factory=dict)
    untied: bool = False

    @property
    def changes(self) -> list[Folded | Put]:
        """All that passes through memory."""
        return [*self.folds.values(), *self.puts.values()]

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    def index(self) -> dict[str, Any] | None:
        """The index of the result; None where one file holds all and no index was there."""
        held = self.shell.checkpoint.index
        if held is None:
            return None
        table = {out.name: shard.name for shard in self.shards for out in shard.outs}
        total = sum(out.end - out.start for shard in self.shards for out in shard.outs)
        metadata = dict(held.get("metadata") or {})
        if "total_size" in metadata:
            metadata["total_size"] = total
        if "total_parameters" in metadata and table.keys() != held["weight_map"].keys():
            del metadata["total_parameters"]
        order = [n for n in held["weight_map"] if n in table] + [n for n in table if n not in held["weight_map"]]
        return held | {"metadata": metadata, "weight_map": {name: table[name] for name in order}}


def make_plan(shell: Shell, sources: Sources, dtype: torch.dtype | None, untie: bool, call: str) -> Plan:
    """Decide every tensor of the result.

    Raises:
        MergeError: lists everything that cannot be merged, or not file to file.
    """
    plan = Plan(shell)
    faults = Faults(call)
    folds = folds_of(shell.model, (NAME,), added=True)
    owned = {name: name for name in (*shell.names.direct, *shell.names.converted)}
    extra = _untied(plan, folds, untie)
    tensors = shell.checkpoint.tensors
    replaced = _replacements(shell)

    def storage(name: str, shape: tuple[int, ...]) -> FileStorage | None:
        """Where the rows of a weight in memory are read from, and written to."""
        owner = name if name in owned else shell.owners[name]
        runs = shell.names.runs(owner, shape, tensors)
        if isinstance(runs, str):
            faults.add(f"{name}: {runs}")
            return None
        held = tensors[runs[0].key].dtype
        return FileStorage(shape, runs, tensors, sources, _as(dtype, held), name if owner != name else None)

    def place(name: str, values: Tensor, held: torch.dtype) -> FileStorage | None:
        """Where the adapter's own tensor is written to: as a whole, unless the files hold it otherwise."""
        if name in shell.names.converted:
            return storage(name, tuple(values.shape))
        runs = [Run(0, name, 0, len(values) if values.dim() else 1)]
        like = {name: Entry(name, held, tuple(values.shape), 0, 0, shell.checkpoint.folder)}
        return FileStorage(
            tuple(values.shape), runs, like, sources, _as(dtype, held), shell.names.direct.get(name, name)
        )

    for fold in folds:
        name, weight = fold.name, fold.site.weight
        if name in replaced:
            faults.add(f"{name}: the adapter replaces it and adds to it, which is merged in memory only. {IN_MEMORY}")
        if name in shell.misshapen or (name not in shell.owners and name not in owned):
            continue  # which is said below
        found = storage(name, tuple(weight.shape))
        if found is not None:
            fold.storage = found
    plan.folds = {
        name: Folded(fold, fold.storage)
        for name, fold in by_tensor(folds).items()
        if isinstance(fold.storage, FileStorage)
    }
    try:
        check_mergeable(shell.model, folds, (NAME,), untie=untie, keep=False, call=call)
    except MergeError as error:
        lines = str(error).splitlines()
        faults.found += [line.removeprefix("  - ") for line in lines if line.startswith("  - ")]
    for name, (values, held) in replaced.items():
        found = place(name, values, held)
        if found is not None:
            plan.puts[name] = Put(values, found, name not in shell.names.converted)
            if not fits(values.to(torch.float32), found.dtype):
                faults.add(f"{name}: a value of the adapter is not finite, or too large for {found.dtype}")
    for name, why in shell.misshapen.items():
        if name not in replaced:
            faults.add(f"shape: {why}")
    for name, owner in extra:
        if owner in shell.misshapen and name not in replaced:
            faults.add(f"{name}: it was tied to {owner}, whose rows grew, and its own new rows are in no file")
    for name in sorted(shell.missing - replaced.keys()):
        faults.add(f"missing: {name} is neither in the base's files nor in the adapter, so it would be random")
    _lay_out(plan, dtype, extra)
    new = {o.name for shard in plan.shards for o in shard.outs} - tensors.keys()
    for name in misnamed(shell.model, sorted(new), shell.known):
        faults.add(f"{name}: loading would not find it under this name in a checkpoint of this layout")
    faults.check(MergeError, f"Nothing was written. {IN_MEMORY}")
    _try(plan, faults)
    faults.check(MergeError, "Nothing was written. Adapters work unmerged in any case.")
    return plan


def _as(wanted: torch.dtype | None, held: torch.dtype) -> torch.dtype:
    """The dtype in the result of what is `held` in the base."""
    return wanted if wanted is not None and held.is_floating_point and held.itemsize > 1 else held


def _replacements(shell: Shell) -> dict[str, tuple[Tensor, torch.dtype]]:
    """Name in memory -> (values, dtype) of all that the adapter holds whole: heads, embeddings, biases."""
    found: dict[str, tuple[Tensor, torch.dtype]] = {}
    for part in parts(shell.model, NAME):
        for name, own, base in part.replaced():
            found[name] = own.detach(), base.dtype
    return found


def _untied(plan: Plan, folds: Sequence[Fold], untie: bool) -> list[tuple[str, str]]:
    """(name, the one whose bytes it starts from) of the tensors that the files get beside those that they hold.

    A config says of all ties at once whether they hold, so one that ends takes all others with it.
    """
    shell = plan.shell
    whole = tuple(f"{part.path}." for part in parts(shell.model, NAME) if part.whole_module)
    tied = {name for pair in shell.ties.items() for name in pair if name in shell.owners}
    adapted = untie and any(fold.name in tied for fold in folds)
    parted = any(key.startswith(p) != source.startswith(p) for p in whole for key, source in shell.ties.items())
    plan.untied = adapted or parted
    if not plan.untied:
        return []
    held = shell.names.direct.keys() | shell.names.converted.keys()
    return [(name, shell.owners[name]) for name in sorted(tied) if name not in held]


def _lay_out(plan: Plan, dtype: torch.dtype | None, extra: Sequence[tuple[str, str]]) -> None:
    """The files of the result: those of the base, in their order, with what is new at the end of one of them."""
    shell = plan.shell
    left_out = set(shell.names.unknown) if shell.foreign else set()
    where: dict[str, OutShard] = {}
    for shard in shell.checkpoint.shards:
        outs = [Out(e.name, _as(dtype, e.dtype), e.shape, e) for e in shard.entries if e.name not in left_out]
        plan.shards.append(OutShard(shard.path.name, outs))
        where |= {out.name: plan.shards[-1] for out in outs}
    for name, owner in extra:
        key = shell.names.direct.get(owner)
        if key is not None and key in where:
            base = shell.checkpoint.tensors[key]
            where[key].outs.append(Out(name, _as(dtype, base.dtype), base.shape, base))
            where[name] = where[key]
    outs_by_name = {out.name: out for shard in plan.shards for out in shard.outs}
    for put in plan.puts.values():
        for name in put.storage.targets:
            out = outs_by_name.get(name)
            shape = tuple(put.values.shape)
            if out is None:
                out = outs_by_name[name] = Out(name, put.storage.dtype, shape)
                plan.shards[-1].outs.append(out)
            elif put.whole:
                out.shape, out.dtype = shape, put.storage.dtype
    for part in plan.changes:
        for name, rows in part.storage.targets.items():
            if name in outs_by_name:
                out = outs_by_name[name]
                out.touched = True
                if rows == (out.shape[0] if out.shape else 1):
                    out.base = None
    for out in outs_by_name.values():
        out.touched |= out.base is not None and out.base.dtype != out.dtype
    for out_shard, read in zip(plan.shards, shell.checkpoint.shards, strict=True):
        described = [(o.name, o.dtype, o.shape) for o in out_shard.outs]
        if described == [(e.name, e.dtype, e.shape) for e in read.entries]:
            out_shard.header = len(read.header).to_bytes(8, "little") + read.header
        else:
            out_shard.header = header_of(described, read.metadata)
        place = len(out_shard.header)
        for out in out_shard.outs:
            count = out.dtype.itemsize
            for n in out.shape:
                count *= n
            out.start, out.end = place, place + count
            place = out.end
        out_shard.size = place


@torch.no_grad()
def _try(plan: Plan, faults: Faults) -> None:
    """Fold what becomes float16 and write nothing: only that overflows where base and update are of ordinary size."""
    for name, change in plan.folds.items():
        if change.storage.dtype == torch.float16:
            if not all(fits(block, torch.float16) for _, block in merged_rows(change.fold, reuse=True)):
                faults.add(f"{name}: a merged value is not finite, or too large for {torch.float16}")
            change.storage.forget()
