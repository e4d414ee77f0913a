"""A site: one weight, and all that a shape, a method and a storage see of it.

Three axes meet here and are never multiplied. A *shape* knows how factors act on a kind of layer, a *method* belongs
to an adapter and says what its factors do to the layer's output and weight, a *storage* knows how the weight's bits
are kept. A site has one shape, one storage and a method for each adapter. Which factors an adapter has is declared
once, by its method, as a `FactorSpec` each; injection, files, counting and resizing read that declaration.

A layer with one weight is its own site (base.py). Of a module with several, each is a `View` (views.py). An adapter
whose initialization takes something out of the base sees a site as if the base were without it (`Reduced`).

The law that all of them obey: the site's output equals that of the plain layer whose weight is `fold(read(layer))`; a
fresh adapter changes nothing; merge then unmerge restores every bit.

Shapes in docstrings: B batch, T tokens, I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, nn

from .contract import FactorSpec, Method, Shape, Storage, Update
from .hosts import Factor, Held, add_factor, remove_factor
from .inits import Init, taken
from .ops import to_float64


@dataclass
class LayerAdapter:
    """What one adapter is at one site, beside its tensors."""

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
        """Whether it acts on the base without something: see reduced.py."""
        return self.init.takes_out

    def declare(self, site: Any, shape: Shape) -> dict[str, FactorSpec]:
        """The declaration of its factors at a site of the size that `site` has now."""
        return self.init.declare(shape, self.method.declare(site, shape, self.r))


@dataclass
class LayerState(Held):
    """Plain data of a site."""

    shape: Shape
    storage: Storage
    adapters: dict[str, LayerAdapter] = field(default_factory=dict)
    taken: tuple[str, ...] = ()
    """The adapters that took something out of the base."""
    group: tuple[Site, ...] = ()
    """The layers, this one among them, that may be computed together: see sharing.py."""

    def remove(self, name: str) -> None:
        super().remove(name)
        self.adapters.pop(name, None)
        self.taken = tuple(n for n in self.taken if n != name)


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
        site = self if not state.taken else self.seen_by(names)
        return state.adapters[names[0]].method.forward(site, x, names)

    def seen_by(self, names: tuple[str, ...]) -> Site:
        """The site as the adapters `names` have it: without what initializations of theirs took out of the base."""
        if not self._lora.taken:
            return self
        taken = tuple(name for name in names if name in self._lora.taken)
        return Reduced(self, taken) if taken else self

    def folding(self, names: tuple[str, ...]) -> Update:
        """(block, rows) -> the block of the weight with the adapters `names` in it; `block` may be overwritten."""
        return self.seen_by(names)._folding(names)

    def _folding(self, names: tuple[str, ...]) -> Update:
        return self._lora.adapters[names[0]].method.folding(self, names)

    def lifted(self, start: Callable[[], Update]) -> tuple[Site, Callable[[], Update]]:
        """What holds the whole stored tensor, and what starts an update of that: of a site that is a piece of one."""
        return self, start

    def add_lora(self, name: str, adapter: LayerAdapter, values: Mapping[str, Tensor]) -> None:
        """Give the site an adapter with the values of all its declared factors."""
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
    """A site that is another one but for what a subclass changes."""

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
    """The site with the frozen factors in place of the trained ones."""

    def factor(self, kind: str, name: str) -> Tensor:
        return self.site.factor(taken(kind), name)


class Reduced(Seen):
    """The site without what the adapters `names` took out."""

    def __init__(self, site: Site, names: tuple[str, ...]) -> None:
        super().__init__(site)
        self.names = names

    def product(self, x: Tensor) -> Tensor:
        y, state, frozen = self.site.product(x), self._lora, _Taken(self.site)
        for name in self.names:
            # A layer of codes has a dtype of its own to compute in: the product is that of the adapter's update.
            y = y - state.shape.update(frozen, name, x, state.adapters[name].scaling).to(y.dtype)
        return y

    def read(self, rows: slice = slice(None)) -> Tensor:
        rows = slice(*rows.indices(self._lora.storage.shape(cast(Any, self.site))[0]))
        block = self.site.read(rows)
        return self.without(to_float64(block), rows).to(block.dtype)

    def without(self, block: Tensor, rows: slice) -> Tensor:
        """Rows of the weight, which may be overwritten, without what was taken out."""
        state, frozen = self._lora, _Taken(self.site)
        for name in self.names:
            block -= state.adapters[name].scaling * state.shape.delta(frozen, name, rows).view_as(block)
        return block

    def _folding(self, names: tuple[str, ...]) -> Update:
        fold = self._lora.adapters[names[0]].method.folding(self, names)
        return lambda block, rows: fold(self.without(block, rows), rows)
