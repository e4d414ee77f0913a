"""What holds an adapter's tensors in a model: modules whose class is extended, with the tensors as child modules.

`Host` is any such extension. `LoraLayer` is that of a layer with low-rank factors. Three axes meet there and are never
multiplied. A *shape* knows how factors act on a kind of layer, a *method* belongs to an adapter and says what its
factors do to the layer's output and weight, a *storage* knows how the weight's bits are kept. The layer holds one
shape, one storage and a method for each adapter. Which factors an adapter has is declared once, by its method, as a
`FactorSpec` each; injection, files, counting and resizing read that declaration.

A shape, a method and a storage see a *site*: one weight, and what belongs to it. A layer with one weight is its own
site. Of a module with several, or with one that stands under another name, each is a `View`.

The law that all of them obey: the layer's output equals that of the plain layer whose weight is
`fold(read(layer))`; a fresh adapter changes no bit; merge then unmerge restores every bit.

Shapes in docstrings: B batch, T tokens, I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..errors import StateError
from .contract import FactorSpec, Method, Shape, Storage
from .extend import Extension, mixins_of
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
class Held:
    """Which adapters have something at one place, in the order in which they came.

    Plain data, as all that a host keeps beside tensors. It never holds a Parameter: sharding and loading replace
    parameters.
    """

    activity: Activity
    names: tuple[str, ...] = field(default=(), init=False)

    @property
    def acting(self) -> tuple[str, ...]:
        return self.activity.acting[self.names]

    def add(self, name: str) -> None:
        self.names = (*self.names, name)
        self.activity.watch(self.names)

    def remove(self, name: str) -> None:
        self.names = tuple(n for n in self.names if n != name)
        self.activity.watch(self.names)


class Host(Extension):
    """An extension that holds tensors of adapters. It owns its one attribute and children called `lora_*`."""

    attribute: ClassVar[str]
    """Where it keeps what it knows beside tensors."""
    knows: ClassVar[type[Held]] = Held
    """What that is, for `hold`."""

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        """Give `module` the class back that it had before, with nothing left of what was held here."""
        del module.__dict__[cls.attribute]
        next(mixin for mixin in mixins_of(module) if issubclass(mixin, cls)).shrink(module)

    @classmethod
    def hold(cls, module: nn.Module, activity: Activity) -> Held:
        """Extend `module`, unless it is already, and give what it says of its adapters."""
        if cls.attribute not in module.__dict__:
            cls.extend(module)
            module.__dict__[cls.attribute] = cls.knows(activity)
        held: Held = module.__dict__[cls.attribute]
        return held

    @classmethod
    def let_go(cls, module: nn.Module, name: str) -> None:
        """Forget an adapter, and `leave` where it was the last one."""
        held: Held = module.__dict__[cls.attribute]
        held.remove(name)
        if not held.names:
            cls.leave(module)


def add_factor(module: nn.Module, kind: str, name: str, weight: Tensor, trainable: bool = True) -> None:
    """Hold `weight` as `module.<kind>[name].weight`, a float32 master."""
    # Straight into the tables of nn.Module: its own setting costs as much as the rest of an injection.
    if kind not in module._modules:
        module._modules[kind] = nn.ModuleDict()
    cast(nn.ModuleDict, module._modules[kind])._modules[name] = Factor(weight, trainable)


def remove_factor(module: nn.Module, kind: str, name: str) -> None:
    held = cast(nn.ModuleDict, module._modules[kind])
    del held._modules[name]
    if not held._modules:
        del module._modules[kind]


def strip(module: nn.Module) -> None:
    """Give `module` and all in it the classes that they had before any adapter, and take off what adapters hold."""
    for each in list(module.modules()):
        hosts = [mixin for mixin in mixins_of(each) if issubclass(mixin, Host)]
        for kind in [k for k in each._modules if k.startswith("lora_")] if hosts else ():
            del each._modules[kind]
        for host in hosts:
            host.leave(each)


@dataclass
class LayerAdapter:
    """What one adapter is at one site, beside its tensors."""

    method: Method
    specs: dict[str, FactorSpec]
    r: int
    alpha: float
    scaling: float
    dropout: float


@dataclass
class LayerState(Held):
    """Plain data of a site."""

    shape: Shape
    storage: Storage
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    group: tuple[LoraLayer, ...] = ()
    """The layers, this one among them, that may be computed together: see sharing.py."""


class Site:
    """One weight of a module: all that a shape, a method and a storage see of it."""

    _lora: LayerState
    weight: Any
    bias: Any
    training: bool

    def host(self) -> nn.Module:
        """The module that holds the factors."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """What the weight gives without adapters, (…, I) -> (…, O) or whatever its shape makes of it."""
        raise NotImplementedError

    def holder(self, kind: str) -> str:
        """The name of the child of `host` that holds the factors of one kind."""
        return kind

    def factor(self, kind: str, name: str) -> Tensor:
        """One factor of an adapter, whole and in float32."""
        held: Any = self.host()._modules[self.holder(kind)]
        return cast(Tensor, held._modules[name].weight)

    def factors(self, name: str) -> Iterator[tuple[str, Factor]]:
        """(kind, module) of one adapter's factors, in the order of its declaration."""
        for kind in self._lora.adapters[name].specs:
            held: Any = self.host()._modules[self.holder(kind)]
            yield kind, held._modules[name]

    def read(self, rows: slice = slice(None)) -> Tensor:
        """Rows of the weight, a copy in float32."""
        return self._lora.storage.read(cast(Any, self), rows)

    def respond(self, x: Tensor) -> Tensor:
        """The output with the acting adapters in it; shapes and dtype are those of `product`."""
        state = self._lora
        names = state.activity.acting[state.names]
        if not names:
            return self.product(x)
        return state.adapters[names[0]].method.forward(self, x, names)

    def folding(self, names: tuple[str, ...]) -> Callable[[Tensor, slice], Tensor]:
        """(block, rows) -> the block of the weight with the adapters `names` in it; `block` may be overwritten."""
        return self._lora.adapters[names[0]].method.folding(self, names)

    def add_lora(self, name: str, adapter: LayerAdapter, values: Mapping[str, Tensor]) -> None:
        """Give the site an adapter with the values of all its declared factors."""
        for kind, spec in adapter.specs.items():
            add_factor(self.host(), self.holder(kind), name, values[kind], spec.trainable)
        self._lora.adapters[name] = adapter
        self._lora.add(name)

    def remove_lora(self, name: str) -> None:
        for kind in self._lora.adapters.pop(name).specs:
            remove_factor(self.host(), self.holder(kind), name)
        self._lora.remove(name)

    def describe(self) -> str:
        return ", ".join(f"{n}: r={self._lora.adapters[n].r}" for n in self._lora.names)


class LoraLayer(Site, Host):
    """Mixed in before the class of a layer that multiplies by its one weight: the layer is its own site."""

    attribute = "_lora"

    forward = Site.respond

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        assert isinstance(module, LoraLayer)
        ungroup(module)
        super().leave(module)

    def host(self) -> nn.Module:
        return self

    def product(self, x: Tensor) -> Tensor:
        """The layer's own forward: dense, quantised or hooked."""
        return cast(Tensor, super().forward(x))

    def factor(self, kind: str, name: str) -> Tensor:
        held: Any = self._modules[kind]  # nn.Module finds its children by failing first: too slow for a forward
        return cast(Tensor, held._modules[name].weight)

    def train(self, mode: bool = True) -> Any:
        if mode and self._lora.activity.merged:
            raise StateError(MERGED_TRAINING)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora({self.describe()})"


def start_layer(layer: nn.Module, shape: Shape, storage: Storage, activity: Activity) -> LoraLayer:
    """Extend `layer`'s class, in place; it has no adapter yet and computes what it did."""
    LoraLayer.extend(layer)
    assert isinstance(layer, LoraLayer)
    layer._lora = LayerState(activity, shape, storage)
    activity.watch(())
    return layer


def ungroup(layer: Site) -> None:
    """Take `layer` and all that shared its input out of their group."""
    for member in layer._lora.group:
        member._lora.group = ()
    layer._lora.activity.leftovers = None
