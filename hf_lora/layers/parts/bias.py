"""A bias of an adapter's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..contract import FactorSpec
from ..copies import BiasLayer
from ..distributed import whole_shape
from ..fitting import fitted
from ..hosts import Activity, add_factor, remove_factor
from ..ops import to_float64
from ..storages import DenseStorage
from ..views import View
from .base import Fold, Part, each_its_own
from .factors import Factors


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
            added = block - to_float64(self.module.bias.detach()[rows])  # by a method that folds into the bias too
            return to_float64(self._own.detach()[rows]) + added

        yield Fold(f"{self.path}.bias", View(self.module, "bias"), DenseStorage(), lambda: own, None)

    def fit(self) -> None:
        self.module.lora_bias[self.adapter].weight = fitted(self._own, self.module.bias.detach().float())

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}.bias: {each_its_own(self, others)}"

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        yield f"{self.path}.bias", self._own, self.module.bias

    @property
    def _own(self) -> Any:
        return self.module.lora_bias[self.adapter].weight


def bias_key(adapted: bool) -> str:
    """A bias's name on disk, below its layer's path; PEFT names that of an adapted layer otherwise."""
    return "base_layer.bias" if adapted else "bias"
