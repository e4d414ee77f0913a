"""The factors of a method at one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import FactorSpec, Storage, Update
from ..fitting import fitted
from ..hosts import Activity, add_factor
from ..inits import InitCall, Unset
from ..site import LayerAdapter
from ..storages import DenseStorage, execution_device
from ..views import View, end_site, sites_of, start_site
from .base import Fold, Part


class Factors(Part):
    """The factors at one site: an adapted layer, or one weight of a module with several."""

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
        adapter = planned.adapter
        init = Unset() if planned.from_file and not adapter.takes_out else adapter.init
        call = InitCall(
            site, planned.shape, planned.storage, adapter.specs, execution_device(site), adapter.scaling,
            planned.options, planned.statistics, planned.original,
        )  # fmt: skip
        site.add_lora(self.adapter, adapter.copy(), init(call))
        if not planned.from_file:
            for kind, value in adapter.method.start(site.seen_by((self.adapter,)), self.adapter).items():
                add_factor(site.host(), site.holder(kind), self.adapter, value, adapter.specs[kind].trainable)
        return None

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        specs = self._layer_adapter.specs
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
        method = self._layer_adapter.method
        refused = method.refuse_folding(self.site)
        site, start = self.site.lifted(partial(self.site.folding, names))
        yield self._fold(site, "weight", state.storage, start, refused)
        if method.folding_bias(self.site, names) is not None:
            bias = View(self.module, getattr(self.site, "bias_name", "bias"))
            started: Any = partial(method.folding_bias, self.site, names)
            yield self._fold(bias, "bias", DenseStorage(), started, None)

    def _fold(self, site: Any, name: str, storage: Storage, start: Callable[[], Update], refused: str | None) -> Fold:
        path = f"{self.path}.{site.name if isinstance(site, View) else name}"
        return Fold(path, site, storage, start, (path.rpartition(".")[0],), refused)

    def refuse_resizing(self) -> str | None:
        if self._layer_adapter.takes_out:
            return f"the initialization of {self.adapter!r} could not compute its frozen factors for the new size"
        return self._layer_adapter.method.refuse_resizing(self.site)

    def fit(self) -> None:
        adapter, before = self._layer_adapter, dict(self.site.factors(self.adapter))
        old = {kind: factor.weight for kind, factor in before.items()}
        adapter.specs = adapter.declare(self.site, self.site._lora.shape)
        likes = {
            kind: torch.zeros(adapter.specs[kind].shape, dtype=torch.float32, device=w.device)
            for kind, w in old.items()
        }
        for kind, factor in before.items():
            factor.weight = fitted(old[kind], likes[kind])
        started = adapter.method.start(self.site.seen_by((self.adapter,)), self.adapter)  # A and B have the new size
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
        return self._layer_adapter.method.additive

    def scale(self, weight: float) -> None:
        self._layer_adapter.scaling *= weight

    @property
    def _layer_adapter(self) -> LayerAdapter:
        found: LayerAdapter = self.site._lora.adapters[self.adapter]
        return found
