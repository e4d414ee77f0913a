"""What an adapter owns at one place of a model: factors, a bias, or a whole module. Each kind answers for itself.

In: a module of an adapted model. Out: parts, which tell their tensors with the names that they have on disk, attach
and take off what is theirs, say which of them cannot act together, and what merging makes of the base's tensors.
Saving, loading, deleting, merging, counting and scaling are loops over parts (`adapt.walk.parts`) and know no kinds.
`PARTS` is the table of the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Faults, StateError
from .contract import FactorSpec, Storage
from .fitting import fit_module, fitted
from .hosts import Activity, add_factor, remove_factor
from .inits import InitCall, Unset
from .ops import exact
from .registry import Registry
from .replacement import BiasLayer, Replacement
from .sharded import whole_shape
from .site import LayerAdapter
from .storages import DenseStorage, execution_device
from .views import View, end_site, sites_of, start_site


@dataclass
class Fold:
    """What merging makes of one tensor of the base.

    Args:
        name: original name of the tensor, such as `"encoder.query.weight"`.
        site: holds it as `site.weight`.
        storage: reads and writes it.
        update: (block, its rows) -> the block as merged; `block`, float64 where the device has it, may be overwritten.
        holders: original names of the modules that may hold the tensor, since the update is meant for each; None
            where it is meant for whichever does.
        refused: why it cannot be merged, though it acts unmerged; None where it can.
    """

    name: str
    site: Any
    storage: Storage
    update: Callable[[Tensor, slice], Tensor]
    holders: Sequence[str] | None
    refused: str | None = None

    @property
    def label(self) -> str:
        """What messages call it: a weight by the name of its layer."""
        return self.name.removesuffix(".weight")


@dataclass
class Planned:
    """A part to be made: what a configuration comes to at one module, before anything is changed."""

    path: str
    module: nn.Module
    specs: Mapping[str, FactorSpec]
    options: Any = None
    """What `Part.plan` found and `Part.attach` needs to know besides."""
    kind: type[Part] = field(init=False)


class Part(ABC):
    """One adapter's own at one module. It is made on a walk and holds no tensor: sharding and loading replace them.

    Args:
        path: original name of the module.
        module: the module itself; of a module that is kept whole, what stands in its place.
        adapter: the adapter's name.
    """

    replaces = False
    """Whether its tensors stand in place of the base's, each whole, rather than being added to them."""
    whole_module = False
    """Whether it is a module that is trained whole, such as a task head."""
    keys: Sequence[str] = ()
    """The names on disk of its tensors, below the module's path, where they are not a shape's or a method's."""

    def __init__(self, path: str, module: Any, adapter: str) -> None:
        self.path, self.module, self.adapter = path, module, adapter

    @property
    def name(self) -> str:
        """What tables call it: its module's name, or that of a weight where a module has several."""
        return self.path

    @classmethod
    def plan(cls, wanted: Any, modules: Mapping[str, nn.Module], faults: Faults) -> Iterable[Planned]:
        """The parts that a configuration asks for with `parts={"<name of the kind>": wanted}`.

        Args:
            modules: original name -> module.
            faults: takes everything that is wrong with `wanted`.
        """
        faults.add(f"parts of this kind are asked for by other fields of the configuration, not by {wanted!r}")
        return ()

    @classmethod
    @abstractmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        """The parts of this kind at `module`, of whichever adapter."""

    @abstractmethod
    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        """Put it on the module; what has to stand in the module's place then, where that is another one.

        Args:
            activity: of the model.
            planned: what the kind's planning came to; of a kind from outside a `Planned`.
        """

    @abstractmethod
    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        """Its tensors, each with its declaration."""

    @abstractmethod
    def remove(self, keep: bool = False) -> nn.Module | None:
        """Take it off the module; what has to stand in the module's place then, where that is another one.

        Args:
            keep: let what `replaces` a module stay in its place, as after a merge for good.
        """

    @abstractmethod
    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        """What merging it, together with `others` of its kind and at its module, makes of the base's tensors.

        None for what goes on acting, or stays in place, whether merged or not.
        """

    def fit(self) -> None:
        """Give its tensors the sizes that the module has now: see fitting.py. Of most modules they never change."""
        return None

    def conflict(self, others: Sequence[Part]) -> str | None:
        """Why it cannot act together with `others`, of its kind and at its module; None where it can."""
        return None

    def refuse_resizing(self) -> str | None:
        """Why the tensors of its module cannot get another number of rows; None where `fit` knows what to do then."""
        return None

    @property
    def scales(self) -> bool:
        """Whether it has an update that `scale` can multiply. What stands in place of the base's tensors has none."""
        return False

    def scale(self, weight: float) -> None:
        """Multiply its update, where it `scales`."""
        raise StateError(f"{self.name}: it has no update to multiply.")

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(original name of a tensor of the base, what stands in its place, the base's), where it `replaces`."""
        return iter(())


class Factors(Part):
    """The factors at one site: of an adapted layer, or of one weight of a module with several."""

    def __init__(self, path: str, module: Any, adapter: str, site: Any = None) -> None:
        super().__init__(path, module, adapter)
        self.site: Any = module if site is None else site

    @property
    def name(self) -> str:
        return f"{self.path}.{self.site.name}" if isinstance(self.site, View) else self.path

    @classmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        for site in sites_of(module):
            for name in site._lora.names:
                yield cls(path, module, name, site)

    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        site: Any = start_site(self.site, planned.shape, planned.storage, activity)
        own = planned.adapter
        init = Unset() if planned.from_file and not own.takes_out else own.init
        call = InitCall(
            site, planned.shape, planned.storage, own.specs, execution_device(site), own.scaling, planned.options,
            planned.statistics, planned.original,
        )  # fmt: skip
        site.add_lora(self.adapter, replace(own), init(call))
        if not planned.from_file:
            for kind, value in own.method.start(site.seen_by((self.adapter,)), self.adapter).items():
                add_factor(site.host(), site.holder(kind), self.adapter, value, own.specs[kind].trainable)
        return None

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        specs = self._own.specs
        for kind, factor in self.site.factors(self.adapter):
            yield specs[kind], factor.weight

    def remove(self, keep: bool = False) -> nn.Module | None:
        self.site.remove_lora(self.adapter)
        if not self.site._lora.names:
            end_site(self.site)
        return None

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        names = tuple(part.adapter for part in (self, *others))
        state = self.site._lora
        refused = self._own.method.refuse_folding(self.site) or state.shape.refuse_folding(self.site)
        site, update = self.site.lifted(self.site.folding(names))
        yield self._fold(site, "weight", state.storage, update, refused)
        update = self._own.method.folding_bias(self.site, names)
        if update is not None:
            bias = View(self.module, getattr(self.site, "bias_name", "bias"))
            yield self._fold(bias, "bias", DenseStorage(), update, refused)

    def _fold(self, site: Any, name: str, storage: Storage, update: Any, refused: str | None) -> Fold:
        path = f"{self.path}.{site.name if isinstance(site, View) else name}"
        return Fold(path, site, storage, update, (path.rpartition(".")[0],), refused)

    def refuse_resizing(self) -> str | None:
        if self._own.takes_out:
            return f"what {self.adapter!r} took out of it would not be found again"
        return self._own.method.refuse_resizing(self.site)

    def fit(self) -> None:
        own, before = self._own, dict(self.site.factors(self.adapter))
        old = {kind: factor.weight for kind, factor in before.items()}
        own.specs = own.declare(self.site, self.site._lora.shape)
        likes = {kind: torch.zeros(own.specs[kind].shape, device=w.device) for kind, w in old.items()}
        for kind, factor in before.items():
            factor.weight = fitted(old[kind], likes[kind])
        started = own.method.start(self.site.seen_by((self.adapter,)), self.adapter)  # with A and B of the new size
        for kind, value in started.items():
            before[kind].weight = fitted(old[kind], value.to(old[kind].device, torch.float32))

    def conflict(self, others: Sequence[Part]) -> str | None:
        methods = [self.site._lora.adapters[part.adapter].method for part in (self, *others)]
        if all(method.additive for method in methods) and len({method.kind for method in methods}) == 1:
            return None
        listed = ", ".join(dict.fromkeys(method.kind for method in methods))
        return f"{self.path}: adapters of the methods {listed} cannot act on one layer together"

    @property
    def scales(self) -> bool:
        return self._own.method.additive

    def scale(self, weight: float) -> None:
        self._own.scaling *= weight

    @property
    def _own(self) -> LayerAdapter:
        own: LayerAdapter = self.site._lora.adapters[self.adapter]
        return own


class Bias(Part):
    """A bias of the adapter's own."""

    replaces = True

    @classmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        if isinstance(module, BiasLayer):
            for name in module._lora_biases.names:
                yield cls(path, module, name)

    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        BiasLayer.hold(self.module, activity).add(self.adapter)
        add_factor(self.module, "lora_bias", self.adapter, self.module.bias.detach().clone())
        return None

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        adapted = any(part.adapter == self.adapter for part in Factors.at(self.path, self.module))
        yield FactorSpec(whole_shape(self._own), bias_key(adapted), "O"), self._own

    def remove(self, keep: bool = False) -> nn.Module | None:
        remove_factor(self.module, "lora_bias", self.adapter)
        BiasLayer.let_go(self.module, self.adapter)
        return None

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        def own(block: Tensor, rows: slice) -> Tensor:
            added = block - exact(self.module.bias.detach()[rows])  # by a method that folds into the bias too
            return exact(self._own.detach()[rows]) + added

        yield Fold(f"{self.path}.bias", View(self.module, "bias"), DenseStorage(), own, None)

    def fit(self) -> None:
        self.module.lora_bias[self.adapter].weight = fitted(self._own, self.module.bias.detach().float())

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}.bias: {_each(self, others)}"

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        yield f"{self.path}.bias", self._own, self.module.bias

    @property
    def _own(self) -> Any:
        return self.module.lora_bias[self.adapter].weight


class Copy(Part):
    """A module that is kept whole: a task head, an entry of `modules_to_save`."""

    replaces = whole_module = True

    @classmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        if isinstance(module, Replacement):
            for name in module._names:
                yield cls(path, module, name)

    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        present = self.module
        if not isinstance(present, Replacement):
            self.module = Replacement(present, activity)
        self.module.add_copy(self.adapter, planned).train(present.training)
        return None if self.module is present else self.module

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        for key, tensor in self._own.state_dict(keep_vars=True).items():
            yield FactorSpec(whole_shape(tensor), key, trainable=isinstance(tensor, nn.Parameter)), tensor

    def remove(self, keep: bool = False) -> nn.Module | None:
        if keep and self.module.running() is self._own:
            self.module.settle(self.adapter)
        self.module.remove_copy(self.adapter)
        return None if self.module._names else self.module.base_layer

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        return iter(())

    def fit(self) -> None:
        fit_module(self._own, self.module.base_layer)

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}: {_each(self, others)}"

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        like = next(iter(self.module.base_layer.parameters()), torch.empty(0))
        for key, tensor in self._own.state_dict().items():
            yield f"{self.path}.{key}", tensor, like if tensor.is_floating_point() else tensor

    @property
    def _own(self) -> Any:
        return self.module.copies[self.adapter]


def bias_key(adapted: bool) -> str:
    """A bias's name on disk, below its layer's path; PEFT names that of an adapted layer otherwise."""
    return "base_layer.bias" if adapted else "bias"


def _each(part: Part, others: Sequence[Part]) -> str:
    return f"{' and '.join(repr(p.adapter) for p in (part, *others))} each have their own"


PARTS: Registry[type[Part]] = Registry("kind of part", {"factors": Factors, "bias": Bias, "copy": Copy})
"""Kind -> class, in the order in which they are attached and folded; one from outside comes after these."""
