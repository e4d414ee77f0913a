"""The LoRA layer: an existing layer whose class is extended, with low-rank factors as child modules.

Three axes meet here and are never multiplied. A *shape* knows how factors act on a kind of layer, a *method* belongs
to an adapter and says what its factors do to the layer's output and weight, a *storage* knows how the weight's bits
are kept. The layer holds one shape, one storage and a method for each adapter. Which factors an adapter has is
declared once, by its method, as a `FactorSpec` each; injection, files, counting and resizing read that declaration.

The law that all of them obey: the layer's output equals that of the plain layer whose weight is
`fold(read(layer))`; a fresh adapter changes no bit; merge then unmerge restores every bit.

Shapes in docstrings: B batch, T tokens, I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import StateError
from .contract import FactorSpec, Method, Shape, Storage
from .extend import Extension
from .ops import device_only
from .sharing import Leftovers

MERGED_TRAINING = (
    "The adapters are merged into the weights, so training would teach them nothing. "
    "Call unmerge_adapter() (or merge_and_unload() if the adapters are done with) first."
)


class Activity:
    """Which adapters act: one object shared by all adapted layers of a model, so that a switch touches no layer.

    `acting` maps a layer's adapter names to those of them that act now. A forward reads it once.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.acting: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.leftovers: Leftovers | None = None
        """Outputs that one layer of a group computed for the others: see sharing.py."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"leftovers": None}  # of a call under way, and never part of a copy

    def set(
        self,
        active: tuple[str, ...] | None = None,
        enabled: bool | None = None,
        merged: tuple[str, ...] | None = None,
    ) -> None:
        self.active = self.active if active is None else active
        self.enabled = self.enabled if enabled is None else enabled
        self.merged = self.merged if merged is None else merged
        for names in self.acting:
            self.acting[names] = self._acting(names)

    def watch(self, names: tuple[str, ...]) -> None:
        """Make `acting[names]` available: called by a layer whose adapters change."""
        self.acting[names] = self._acting(names)

    def _acting(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n for n in self.active if n in names) if self.enabled and not self.merged else ()


class Factor(nn.Module):
    """One tensor of one adapter: a float32 master, whatever the model around it is cast to."""

    def __init__(self, weight: Tensor, trainable: bool = True) -> None:
        super().__init__()
        self._parameters["weight"] = nn.Parameter(weight.to(torch.float32), requires_grad=trainable)
        if not trainable:
            self.frozen = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factor:
        super()._apply(device_only(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the file's tensor becomes the parameter: it must be float32 by then.
        super()._load_from_state_dict(as_masters(state_dict), prefix, *args)


def as_masters(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state_dict` whose floating-point tensors are float32."""
    return {
        key: value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in state_dict.items()
    }


@dataclass
class LayerAdapter:
    """What one adapter is on one layer, beside its tensors."""

    method: Method
    specs: dict[str, FactorSpec]
    r: int
    alpha: float
    scaling: float
    dropout: float


@dataclass
class LayerState:
    """Plain data of an adapted layer. It never holds a Parameter: sharding and loading replace parameters."""

    shape: Shape
    storage: Storage
    activity: Activity
    names: tuple[str, ...] = ()
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    original: Tensor | None = None
    """The weight before merge_adapter, kept so that unmerging restores every bit."""
    group: tuple[LoraLayer, ...] = ()
    """The layers, this one among them, that may be computed together: see sharing.py."""


class LoraLayer(Extension):
    """Mixed in before a layer's own class; owns the attributes `lora_*` and `_lora`, all else stays the layer's."""

    _lora: LayerState

    def product(self, x: Tensor) -> Tensor:
        """The layer's own forward: dense, quantised or hooked."""
        return cast(Tensor, super().forward(x))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the acting adapters in it; shapes and dtype are those of the plain layer."""
        state = self._lora
        names = state.activity.acting[state.names]
        if not names:
            return self.product(x)
        return state.adapters[names[0]].method.forward(self, x, names)

    def train(self, mode: bool = True) -> Any:
        if mode and self._lora.activity.merged:
            raise StateError(MERGED_TRAINING)
        return super().train(mode)

    def add_factor(self, kind: str, name: str, weight: Tensor, trainable: bool = True) -> None:
        """Hold `weight` as `self.<kind>[name].weight`, a float32 master."""
        # Straight into the tables of nn.Module: its own setting costs as much as the rest of an injection.
        if kind not in self._modules:
            self._modules[kind] = nn.ModuleDict()
        cast(nn.ModuleDict, self._modules[kind])._modules[name] = Factor(weight, trainable)

    def factors(self, name: str) -> Iterator[tuple[str, Factor]]:
        """(kind, factor) of one adapter, in the order of its declaration."""
        for kind in self._lora.adapters[name].specs:
            yield kind, cast(Factor, cast(nn.Module, self._modules[kind])._modules[name])

    def add_lora(self, name: str, adapter: LayerAdapter, values: Mapping[str, Tensor]) -> None:
        """Give the layer an adapter with the values of all its declared factors."""
        state = self._lora
        for kind, spec in adapter.specs.items():
            self.add_factor(kind, name, values[kind], spec.trainable)
        state.adapters[name] = adapter
        state.names = (*state.names, name)
        state.activity.watch(state.names)

    def remove_lora(self, name: str) -> None:
        state = self._lora
        for kind in state.adapters.pop(name).specs:
            del getattr(self, kind)[name]
        state.names = tuple(n for n in state.names if n != name)
        state.activity.watch(state.names)

    def extra_repr(self) -> str:
        ranks = ", ".join(f"{n}: r={self._lora.adapters[n].r}" for n in self._lora.names)
        return f"{super().extra_repr()}, lora({ranks})"


def start_layer(layer: nn.Module, shape: Shape, storage: Storage, activity: Activity) -> LoraLayer:
    """Extend `layer`'s class, in place; it has no adapter yet and computes what it did."""
    LoraLayer.extend(layer)
    assert isinstance(layer, LoraLayer)
    layer._lora = LayerState(shape, storage, activity)
    activity.watch(())
    return layer


def end_layer(layer: LoraLayer) -> nn.Module:
    """Give `layer` its own class back and remove all that `start_layer` and its adapters added."""
    ungroup(layer)
    for kind in [k for k in layer._modules if k.startswith("lora_") and k != "lora_bias"]:
        delattr(layer, kind)
    del layer._lora
    return LoraLayer.shrink(layer)


def ungroup(layer: LoraLayer) -> None:
    """Take `layer` and all that shared its input out of their group."""
    for member in layer._lora.group:
        member._lora.group = ()
    layer._lora.activity.leftovers = None
