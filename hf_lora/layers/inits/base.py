"""What an initialization is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..contract import FactorSpec, Shape


class InitCall(NamedTuple):
    """One layer whose factors want values. The draws come from PyTorch's global generator, as a model's own do."""

    layer: nn.Module
    shape: Shape
    specs: Mapping[str, FactorSpec]
    device: torch.device

    def zeros(self) -> dict[str, Tensor]:
        """Every factor, of zeros, in float32."""
        return {n: torch.zeros(s.shape, dtype=torch.float32, device=self.device) for n, s in self.specs.items()}


class Init(ABC):
    """Initial values of the factors. Stateless: one instance an initialization."""

    in_files: bool | str = True
    """What a saved configuration says instead of its name: a file's factors have their values, and PEFT knows only
    its own words."""

    @abstractmethod
    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        """A value in float32 for each factor that `call.specs` declares."""


class Unset(Init):
    """Memory alone, and no draw: for factors that a file fills at once. No configuration names it."""

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        return {n: torch.empty(s.shape, dtype=torch.float32, device=call.device) for n, s in call.specs.items()}
