"""A site: one weight, as shapes, methods and storages see it.

Three independent axes meet here. A *shape* defines how factors act on a kind of layer. A *method* belongs to an
adapter and defines how its factors change the output and the weight. A *storage* defines how a backend stores the
weight. A site has one shape, one storage, and one method per adapter. The method declares each factor of an adapter
once, as a `FactorSpec`, which injection, files, counting and resizing read.

A layer with one weight is its own site (base.py). Each weight of a module with several is a `View` (views.py). An
adapter whose initialization subtracts a product from the base sees the site without that product (`Reduced`).

The law that all of them obey: the output of the site equals that of the plain layer whose weight is
`fold(read(layer))`; a new adapter changes nothing; merging and unmerging restores every bit.

Shapes in docstrings: B batch, T tokens, I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .contract import FactorSpec, Method, Shape, Storage, Update
from .hosts import Factor, Held, add_factor, at_hand, remove_factor
from .inits import Init, taken
from .ops import to_float64


@dataclass
class LayerAdapter:
    """The properties of one adapter at one site, except its tensors."""

    method: Method
    specs: dict[str, FactorSpec]
    r: int
    alpha: float
    scaling: float
    dropout: float
    init: Init

    def copy(self) -> LayerAdapter:
        return LayerAdapter(self.method, self.specs, self.r, self.alpha, self.scaling, self.dropout, self.init)

    @property
    def takes_out(self) -> bool:
        """Whether it acts on the base minus a frozen product: see `Reduced`."""
        return self.init.takes_out

    def declare(self, site: Any, shape: Shape) -> dict[str, FactorSpec]:
        """The declaration of its factors for the current size of `site`."""
        return self.init.declare(shape, self.method.declare(site, shape, self.r))


@dataclass
class LayerState(Held):
    """The plain data of a site."""

    shape: Shape
    storage: Storage
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    """The adapters whose initialization subtracted a product from the base."""
    group: tuple[Site, ...] = ()
    """The layers, including this one, that may be computed together: see sharing.py."""
    derived: dict[str, Any] = field(default_factory=dict)
    """What methods computed from the frozen weight, at most one row of it each."""
    evaluated: dict[str, Any] = field(default_factory=dict)
    """What methods computed from the weight and the factors of an adapter, for evaluation: adapter -> values."""

    def forget(self, weight: bool = True) -> None:
        self.evaluated.clear()
        if weight:
            self.derived.clear()

    def remove(self, name: str) -> None:
        super().remove(name)
        self.adapters.pop(name, None)
        self.evaluated.pop(name, None)
        self.taken = tuple(n for n in self.taken if n != name)


class Site:
    """One weight of a module, as shapes, methods and storages see it."""

    _lora: LayerState
    weight: Any
    bias: Any
    training: bool

    if TYPE_CHECKING:  # a layer has the attributes of its own class

        def __getattr__(self, name: str, /) -> Any: ...

    def host(self) -> nn.Module:
        """The module that holds the factors."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """The output without adapters: (…, I) -> (…, O), or as the shape defines it."""
        raise NotImplementedError

    def holder(self, kind: str) -> str:
        """The name of the child of `host` with the factors of one kind."""
        return kind

    def factor(self, kind: str, name: str) -> Tensor:
        """One factor of an adapter, whole and in float32."""
        held: Any = self.host()._modules[self.holder(kind)]
        return at_hand(held._modules[name])

    def factors(self, name: str) -> Iterator[tuple[str, Factor]]:
        """(kind, module) of one adapter's factors, in declaration order."""
        for kind in self._lora.adapters[name].specs:
            held: Any = self.host()._modules[self.holder(kind)]
            yield kind, held._modules[name]

    def read(self, rows: slice = slice(None)) -> Tensor:
        """A copy of rows of the weight in float32."""
        return self._lora.storage.read(cast(Any, self), rows)

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is the change of the weight without its scaling: see `Shape.factors`."""
        return self._lora.shape.factors(cast(Any, self), name)

    def whole(self) -> Site:
        """The site with the whole weight of the base, although an initialization subtracted a product from it."""
        return self

    def respond(self, x: Tensor) -> Tensor:
        """The output with the active adapters; shapes and dtype are those of `product`."""
        state = self._lora
        names = state.activity.acting[state.names]
        if not names:
            return self.product(x)
        site = self if not state.taken else self.seen_by(names)
        return state.adapters[names[0]].method.forward(site, x, names)

    def seen_by(self, names: tuple[str, ...]) -> Site:
        """The site as the adapters `names` see it: without the products that their initializations subtracted."""
        if not self._lora.taken:
            return self
        taken = tuple(name for name in names if name in self._lora.taken)
        return Reduced(self, taken) if taken else self

    def folding(self, names: tuple[str, ...]) -> Update:
        """(block, rows) -> the block of the weight with the adapters `names` folded in; it may overwrite `block`."""
        return self.seen_by(names)._folding(names)

    def _folding(self, names: tuple[str, ...]) -> Update:
        return self._lora.adapters[names[0]].method.folding(self, names)

    def lifted(self, start: Callable[[], Update]) -> tuple[Site, Callable[[], Update]]:
        """The site of the whole stored tensor, and `start` for it, for a site that is a piece of a tensor."""
        return self, start

    def add_lora(self, name: str, adapter: LayerAdapter, values: Mapping[str, Tensor]) -> None:
        """Add an adapter with values for all its declared factors."""
        state = self._lora
        for kind, spec in adapter.specs.items():
            add_factor(self.host(), self.holder(kind), name, values[kind], spec.trainable)
        state.adapters[name] = adapter
        if adapter.takes_out:
            state.taken = (*state.taken, name)
        state.add(name)

    def remove_lora(self, name: str) -> None:
        for kind in self._lora.adapters[name].specs:
            remove_factor(self.host(), self.holder(kind), name)
        self._lora.remove(name)

    def describe(self) -> str:
        return ", ".join(f"{n}: r={self._lora.adapters[n].r}" for n in self._lora.names)


class Seen(Site):
    """A proxy of a site; subclasses override parts of it."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["site"], name)

    @property
    def _lora(self) -> LayerState:  # type: ignore[override]
        return self.site._lora

    def host(self) -> nn.Module:
        return self.site.host()

    def product(self, x: Tensor) -> Tensor:
        return self.site.product(x)

    def factor(self, kind: str, name: str) -> Tensor:
        return self.site.factor(kind, name)


class _Taken(Seen):
    """The site with the frozen factors instead of the trained ones."""

    def factor(self, kind: str, name: str) -> Tensor:
        return self.site.factor(taken(kind), name)


class Reduced(Seen):
    """The site without the products that the initializations of the adapters `names` subtracted."""

    def __init__(self, site: Site, names: tuple[str, ...]) -> None:
        super().__init__(site)
        self.names = names

    def matrices(self, name: str) -> tuple[Tensor, Tensor]:
        left, right = super().matrices(name)
        if name not in self.names:
            return left, right
        less, of = self._lora.shape.factors(cast(Any, _Taken(self.site)), name)
        return torch.cat([left, -less], 1), torch.cat([right, of])

    def whole(self) -> Site:
        return self.site

    def product(self, x: Tensor) -> Tensor:
        y, state, frozen = self.site.product(x), self._lora, _Taken(self.site)
        for name in self.names:
            # A quantized layer has its own compute dtype, so the dtypes may differ.
            y = y - state.shape.update(frozen, name, x, state.adapters[name].scaling).to(y.dtype)
        return y

    def read(self, rows: slice = slice(None)) -> Tensor:
        rows = slice(*rows.indices(self._lora.storage.shape(cast(Any, self.site))[0]))
        block = self.site.read(rows)
        return self.without(to_float64(block), rows).to(block.dtype)

    def without(self, block: Tensor, rows: slice) -> Tensor:
        """Rows of the weight minus the subtracted products; it may overwrite `block`."""
        state, frozen = self._lora, _Taken(self.site)
        for name in self.names:
            block -= state.adapters[name].scaling * state.shape.delta(frozen, name, rows).view_as(block)
        return block

    def _folding(self, names: tuple[str, ...]) -> Update:
        fold = self._lora.adapters[names[0]].method.folding(self, names)
        return lambda block, rows: fold(self.without(block, rows), rows)
