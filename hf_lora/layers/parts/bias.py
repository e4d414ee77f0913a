"""The adapter's own bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..contract import FactorSpec
from ..copies import BiasLayer, base_bias
from ..distributed import whole_shape
from ..fitting import fitted
from ..hosts import Activity, add_factor, at_hand, remove_factor
from ..ops import to_float64
from ..storages import DenseStorage
from ..views import View
from .base import Fold, Part, replace_the_same
from .factors import Factors


class Bias(Part):
    """The adapter's own bias of one layer."""

    replaces = True

    @classmethod
    def at(cls, path: str, module: nn.Module) -> Iterator[Part]:
        if isinstance(module, BiasLayer):
            for name in module._lora_biases.names:
                yield cls(path, module, name)

    def attach(self, activity: Activity, planned: Any) -> nn.Module | None:
        held = BiasLayer.hold(self.module, activity)
        if not held.names:
            self.module._bias_is_read = False
            for parent, path in planned:
                self.module.read_by(parent, path)
        held.add(self.adapter)
        add_factor(self.module, "lora_bias", self.adapter, at_hand(self.module, "bias").detach().clone())
        return None

    def tensors(self) -> Iterator[tuple[FactorSpec, Tensor]]:
        adapted = any(part.adapter == self.adapter for part in Factors.at(self.path, self.module))
        yield FactorSpec(whole_shape(self._bias), bias_key(adapted), "O"), self._bias

    def remove(self, keep: bool = False) -> nn.Module | None:
        remove_factor(self.module, "lora_bias", self.adapter)
        BiasLayer.let_go(self.module, self.adapter)
        return None

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        def replace(block: Tensor, rows: slice) -> Tensor:
            added = block - to_float64(self._base.detach()[rows])  # by a method that also folds into the bias
            return to_float64(self._bias.detach()[rows]) + added

        yield Fold(f"{self.path}.bias", View(self.module, "bias"), DenseStorage(), lambda: replace, None)

    def fit(self) -> None:
        self.module.lora_bias[self.adapter].weight = fitted(self._bias, self._base.detach().float())

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}.bias: {replace_the_same(self, others)}"

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        yield f"{self.path}.bias", self._bias, self._base

    @property
    def _base(self) -> Tensor:
        found: Tensor = base_bias(self.module)
        return found

    @property
    def _bias(self) -> nn.Parameter:
        return self.module.lora_bias[self.adapter].weight


def bias_key(adapted: bool) -> str:
    """The name of a bias in a file, relative to its layer; PEFT uses another name for adapted layers."""
    return "base_layer.bias" if adapted else "bias"
