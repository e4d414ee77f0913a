"""Base classes of shapes whose layer multiplies its input by one matrix."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base import LoraLayer
from ..class_swap import unwrap_class
from ..contract import AdaptedLayer, Shape
from ..ops import weight_like


def runs_forward_of(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the layer's class inherits the forward of `cls` unchanged."""
    base: Any = unwrap_class(type(layer))
    return bool(base.forward is cls.forward)


class Matrix(Shape):
    """Base of linear and transposed linear layers: x (…, I) -> (…, O)."""

    is_matrix = True
    plain_forward: Any = None

    def _parameter(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """The layer's weight, if it is an ordinary parameter on the device of `x` that only `plain_forward` reads."""
        if not isinstance(layer, LoraLayer):
            return None  # the product of a view may differ
        # Replicas of nn.DataParallel hold plain tensors as attributes; other classes are other storages.
        weight: Any = layer._parameters.get("weight", layer.__dict__.get("weight"))
        plain: Any = super(LoraLayer, layer)
        if type(weight) not in (nn.Parameter, Tensor) or plain.forward.__func__ is not self.plain_forward:
            return None
        if weight.device != x.device or (weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
            return None
        return cast(Tensor, weight)

    def update(self, layer: AdaptedLayer, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        h = F.linear(x, weight_like(layer.factor("lora_A", name), x))
        return F.linear(h if scaling == 1.0 else h * scaling, weight_like(layer.factor("lora_B", name), x))

    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        i, o = self.features(layer)
        return (r, i), (o, r)

    def on_output(self, layer: AdaptedLayer, v: Tensor) -> Tensor:
        return v


class MatrixByInput(Matrix):
    """Base of shapes whose weight has one row per input: (I, O)."""

    by_input = True

    def factors(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        return layer.factor("lora_A", name).t(), layer.factor("lora_B", name).t()

    def norm(self, weight: Tensor) -> Tensor:
        return weight.norm(dim=0)

    def on_weight(self, layer: AdaptedLayer, v: Tensor, rows: slice) -> Tensor:
        return v[None, :]
