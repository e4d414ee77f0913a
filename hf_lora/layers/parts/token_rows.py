"""Rows of an embedding that an adapter trains, one for each chosen token, and no others.

Every module that shares the embedding's weight, such as a tied output layer, uses the same rows. In a file they are
under the name of the embedding, as in PEFT. The rest of the embedding is frozen. As in PEFT, modules that share a
weight and are named with different tokens have rows of their own; an empty list is one of no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import Faults, StateError, nearest
from ..base import LoraLayer
from ..contract import FactorSpec
from ..hosts import Activity, Held, Host, add_factor, at_hand, put_factor, remove_factor
from ..ops import lasting, to_compute_dtype, to_float64
from ..storages import DenseStorage
from .base import Fold, Part, Planned

ROWS = "lora_token_rows"


class RowsState(Held):
    """The plain data of a `RowsHost`."""

    def __init__(self, activity: Activity) -> None:
        super().__init__(activity)
        self.ids: dict[str, list[int]] = {}
        """Adapter -> the tokens that its rows belong to."""
        self.owns: set[str] = set()
        """The adapters whose rows are saved under this module."""
        self.alone: set[str] = set()
        """Those whose rows are not used by the other modules that share its weight."""
        self._tensors: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def remove(self, name: str) -> None:
        super().remove(name)
        self.ids.pop(name, None)
        self.owns.discard(name)
        self.alone.discard(name)
        self._tensors.clear()

    def sorted_ids(self, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """(the sorted ids, the index of the row of each)."""
        found = self._tensors.get((name, device))
        if found is None:
            ids, order = found = torch.tensor(self.ids[name], device=device).sort()
            kept = lasting(ids), lasting(order)
            if kept[0] is not None and kept[1] is not None:
                self._tensors[name, device] = kept[0], kept[1]
        return found[0], found[1]


class RowsHost(Host):
    """An embedding, or a linear layer, some of whose rows are those of the active adapters."""

    attribute = "_lora_rows"
    data_class = RowsState
    order = 20  # outside factors and biases: the rows replace what these compute
    _lora_rows: RowsState

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y = cast(Tensor, super().forward(*args, **kwargs))
        (x,) = (*args, *kwargs.values())
        for name in self._lora_rows.acting:
            held: Any = self._modules[ROWS]
            rows = at_hand(held._modules[name])
            ids, order = self._lora_rows.sorted_ids(name, x.device)
            y = (
                self._looked_up(x, y, rows, ids, order)
                if isinstance(self, nn.Embedding)
                else self._multiplied(x, y, rows[order], ids)
            )
        return y

    def _looked_up(self, x: Tensor, y: Tensor, rows: Tensor, ids: Tensor, order: Tensor) -> Tensor:
        places = torch.searchsorted(ids, x).clamp_max(len(ids) - 1)
        chosen, scale = F.embedding(order[places], rows), getattr(self, "embed_scale", None)
        if scale is not None:
            chosen = chosen * scale
        return torch.where((ids[places] == x)[..., None], chosen.to(y.dtype), y)

    def _multiplied(self, x: Tensor, y: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        weight, bias, x = cast(Tensor, self.weight), cast("Tensor | None", self.bias), to_compute_dtype(x)
        if isinstance(self, LoraLayer):  # its factors change y, but not these rows
            z = F.linear(x, rows.to(x.dtype), None if bias is None else bias[ids].to(x.dtype))
            return y.index_copy(-1, ids, z.to(y.dtype))
        # Rows that are not trained yet add zero.
        return y.index_add(-1, ids, F.linear(x, (rows - weight[ids].to(rows.dtype)).to(x.dtype)).to(y.dtype))


class TokenRows(Part):
    """The rows of chosen tokens: `trainable_token_indices`."""

    keys = ("token_adapter.trainable_tokens_delta",)  # PEFT's name; it holds the rows, not their change

    @classmethod
    def plan(cls, wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> Iterator[Planned]:
        for group in row_groups(wanted, modules, faults):
            module, shown = modules[group.path], f"trainable_token_indices: {group.path}"
            weight = module._parameters.get("weight")
            if not isinstance(module, (nn.Embedding, nn.Linear)) or not DenseStorage().owns(module):
                faults.add(f"{shown} is not an embedding or linear layer with a dense weight")
                continue
            if wrong := [i for i in group.ids if not 0 <= i < len(cast(Tensor, weight))]:
                faults.add(f"{shown} has {len(cast(Tensor, weight))} rows, and so no tokens {wrong[:5]}")
            elif not group.ids:
                faults.add(f"{shown} must have at least one token")
            else:
                options = group.ids, module, group.alone
                yield Planned(group.path, module, {"rows": _spec(module, group.ids)}, options)
                for name in group.followers:
                    if isinstance(modules[name], (nn.Embedding, nn.Linear)):
                        yield Planned(name, modules[name], {}, options)
                    else:
                        faults.add(
                            f"trainable_token_indices: {name} uses the weight of {group.path} in an unknown way"
                        )

    @classmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        if isinstance(module, RowsHost):
            for name in module._lora_rows.names:
                yield cls(path, module, name)

    def attach(self, activity: Activity, planned: Any) -> None:
        ids, owner, alone = planned.options
        held: Any = RowsHost.hold(self.module, activity)
        if owner is self.module:
            held.owns.add(self.adapter)
            values = at_hand(owner).detach()[ids].to(torch.float32)
            add_factor(self.module, ROWS, self.adapter, values)
        else:  # the same child, so that moving, sharding and training change both
            put_factor(self.module, ROWS, self.adapter, owner._modules[ROWS]._modules[self.adapter])
        if alone:
            held.alone.add(self.adapter)
        held.ids[self.adapter] = ids
        held.add(self.adapter)

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        if self.owns:
            yield _spec(self.module, self.ids), self._rows

    def remove(self, keep: bool = False) -> None:
        remove_factor(self.module, ROWS, self.adapter)
        RowsHost.let_go(self.module, self.adapter)

    def conflict(self, others: Sequence[Part]) -> str | None:
        ids = [i for part in (self, *others) for i in cast(TokenRows, part).ids]
        if len(set(ids)) == len(ids):
            return None
        return f"{self.path}: {' and '.join(repr(p.adapter) for p in (self, *others))} have rows of the same tokens"

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        everyone = [cast(TokenRows, part) for part in (self, *others)]
        if not any(part.owns for part in everyone):
            return
        kinds = {part.alone for part in everyone}

        def put(block: Tensor, rows: slice) -> Tensor:
            for part in everyone:
                for i, row in zip(part.ids, part._rows.detach(), strict=True):
                    if rows.start <= i < rows.stop:
                        block[i - rows.start] = to_float64(row)
            return block

        refused = "rows of all modules with this weight, and rows of one of them" if len(kinds) > 1 else None
        holders = (self.path,) if True in kinds else None
        yield Fold(f"{self.path}.weight", self.module, DenseStorage(), lambda: put, holders, refused)

    def fit(self) -> None:
        if max(self.ids) >= len(self.module.weight):
            raise StateError(f"{self.path}: the adapter {self.adapter!r} trains rows that the vocabulary would lose.")

    @property
    def ids(self) -> list[int]:
        held: RowsState = self.module._lora_rows
        return held.ids[self.adapter]

    @property
    def alone(self) -> bool:
        """Whether other modules share the weight, but not these rows."""
        return self.adapter in self.module._lora_rows.alone

    @property
    def owns(self) -> bool:
        return self.adapter in self.module._lora_rows.owns

    @property
    def _rows(self) -> nn.Parameter:
        found: nn.Parameter = self.module._modules[ROWS]._modules[self.adapter].weight
        return found


def _identity(modules: Mapping[str, nn.Module], path: str) -> object:
    """Equal for modules with one weight. If it is offloaded, each has another object, and the tie is known by name."""
    weight = modules[path]._parameters.get("weight")
    if weight is None or not weight.is_meta:
        return id(modules[path]) if weight is None else id(weight)
    ties: Mapping[str, str] = getattr(modules.get(""), "all_tied_weights_keys", None) or {}
    return ties.get(f"{path}.weight", f"{path}.weight")


def _spec(module: Any, ids: Sequence[int]) -> FactorSpec:
    size = module.embedding_dim if isinstance(module, nn.Embedding) else module.in_features
    return FactorSpec((len(ids), size), TokenRows.keys[0])


@dataclass
class RowGroup:
    """Rows of one weight that are trained together."""

    path: str
    """The module under which they are saved."""
    ids: list[int]
    followers: list[str] = field(default_factory=list)
    """The other modules that use them."""
    alone: bool = False
    """Whether other modules share the weight, but not these rows."""


def row_groups(wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> list[RowGroup]:
    """The rows that a configuration asks for, each token once.

    Modules with one weight have the same rows, saved under the input embedding if it is one of them, unless several of
    them are named with different tokens.
    """
    named: dict[object, dict[str, list[int]]] = {}
    for path, ids in rows_by_path(wanted, modules, faults):
        named.setdefault(_identity(modules, path), {})[path] = list(dict.fromkeys(ids))
    found, embedding = [], input_embedding(modules)
    for weight, tokens in named.items():
        sharing = [name for name in modules if _identity(modules, name) == weight]
        lists = list(tokens.values())
        if any(ids != lists[0] for ids in lists):
            found += [RowGroup(path, ids, alone=True) for path, ids in tokens.items() if ids]
        else:
            owner = embedding if embedding in sharing else next(iter(tokens))
            found.append(RowGroup(owner, lists[0], [name for name in sharing if name != owner]))
    return found


def rows_by_path(wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> list[tuple[str, list[int]]]:
    """(name of a module, tokens) as a configuration has them: a list is of the input embedding.

    As in PEFT, a name that is not a whole one means every module whose name ends with it.
    """
    if not isinstance(wanted, Mapping):
        path = input_embedding(modules)
        if not path:
            faults.add("trainable_token_indices: the model has no input embedding; name a module: {name: [...]}")
        return [(path, list(wanted))] if path else []
    found = []
    for name, ids in wanted.items():
        hits = [name] if name in modules else [path for path in modules if path.endswith(f".{name}")]
        if not hits:
            faults.add(f"trainable_token_indices: {name!r} matches no module{nearest(name, modules)}")
        found += [(path, list(ids)) for path in hits]
    return found


def input_embedding(modules: Mapping[str, nn.Module]) -> str:
    """The name of the token embedding of a model; empty if it has none."""
    get: Any = getattr(modules.get(""), "get_input_embeddings", None)
    try:
        embedding = None if get is None else getattr(get(), "base_layer", get())
    except (NotImplementedError, AttributeError):
        return ""
    return next((name for name, module in modules.items() if module is embedding), "")
