"""What the shapes share whose layer multiplies its input by one matrix."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import LoraLayer
from ..class_swap import unwrap_class
from ..contract import Shape
from ..ops import weight_like


def runs_forward_of(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the layer's own class computes exactly what `cls` computes."""
    own: Any = unwrap_class(type(layer))
    return bool(own.forward is cls.forward)


class Matrix(Shape):
    """What a linear layer and its transposed twin share: x (…, I) -> (…, O)."""

    is_matrix = True
    plain_forward: Any = None

    def _parameter(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's weight, if it is an ordinary parameter beside `x` and nothing but `plain_forward` reads it."""
        if not isinstance(layer, LoraLayer):
            return None  # a view of a weight, whose product may be another one
        # nn.DataParallel's replicas hold plain tensors as attributes; any other class keeps its bits in its own way.
        weight: Any = layer._parameters.get("weight", layer.__dict__.get("weight"))
        own: Any = super(LoraLayer, layer)
        if type(weight) not in (nn.Parameter, Tensor) or own.forward.__func__ is not self.plain_forward:
            return None
        if weight.device != x.device or (weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
            return None
        return cast(Tensor, weight)

    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        h = F.linear(x, weight_like(layer.factor("lora_A", name), x))
        return F.linear(h if scaling == 1.0 else h * scaling, weight_like(layer.factor("lora_B", name), x))

    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        i, o = self.features(layer)
        return (r, i), (o, r)

    def on_output(self, layer: Any, v: Tensor) -> Tensor:
        return v


class MatrixByInput(Matrix):
    """What shapes share whose weight has a row for each input: (I, O)."""

    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        return layer.factor("lora_A", name).t(), layer.factor("lora_B", name).t()

    def norm(self, weight: Tensor) -> Tensor:
        return weight.norm(dim=0)

    def on_weight(self, layer: Any, v: Tensor, rows: slice) -> Tensor:
        return v[None, :]
