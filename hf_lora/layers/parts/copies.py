"""A module that an adapter trains whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import FactorSpec
from ..copies import Replacement
from ..distributed import whole_shape
from ..fitting import fit_module
from ..hosts import Activity
from .base import Fold, Part, replace_the_same


class Copy(Part):
    """A module that is trained whole: a task head or an entry of `modules_to_save`."""

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
        for key, tensor in self._copy.state_dict(keep_vars=True).items():
            yield FactorSpec(whole_shape(tensor), key, trainable=isinstance(tensor, nn.Parameter)), tensor

    def remove(self, keep: bool = False) -> nn.Module | None:
        if keep and self.module.running() is self._copy:
            self.module.settle(self.adapter)
        self.module.remove_copy(self.adapter)
        return None if self.module._names else self.module.base_layer

    def folds(self, others: Sequence[Part]) -> Iterator[Fold]:
        return iter(())

    @property
    def is_tied(self) -> bool:  # type: ignore[override]
        return self.adapter in self.module.tied

    def refuse_resizing(self) -> str | None:
        return "its copy and that of another module have one weight" if self.is_tied else None

    def fit(self) -> None:
        fit_module(self._copy, self.module.base_layer)

    def conflict(self, others: Sequence[Part]) -> str | None:
        return f"{self.path}: {replace_the_same(self, others)}"

    def replaced(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        like = next(iter(self.module.base_layer.parameters()), torch.empty(0))
        for key, tensor in self._copy.state_dict().items():
            yield f"{self.path}.{key}", tensor, like if tensor.is_floating_point() else tensor

    @property
    def _copy(self) -> nn.Module:
        return self.module.copies[self.adapter]
