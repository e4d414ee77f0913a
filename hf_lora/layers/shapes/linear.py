"""Linear layers, dense or quantized."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..class_swap import unwrap_class
from ..contract import AdaptedLayer
from ..storages import quantization_of
from .matrix import Matrix, runs_forward_of


class LinearShape(Matrix):
    """`nn.Linear` and quantized linear layers: weight (O, I)."""

    plain_forward = staticmethod(nn.Linear.forward)

    def weight(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        weight = self._parameter(layer, x)
        return weight if weight is not None and weight.shape[-1] == x.shape[-1] else None

    def claims(self, layer: nn.Module) -> bool:
        if isinstance(layer, nn.Linear) and (runs_forward_of(layer, nn.Linear) or _computes_linear(layer)):
            return True
        return quantization_of(layer) is not None

    def features(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Linear, layer)
        weight = layer._parameters.get("weight")
        if type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_floating_point():
            # An output layer tied to a larger vocabulary has more rows than its out_features.
            return layer.in_features, max(layer.out_features, weight.shape[0])
        return layer.in_features, layer.out_features

    def factors(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        return layer.factor("lora_B", name), layer.factor("lora_A", name)

    def norm(self, weight: Tensor) -> Tensor:
        return weight.norm(dim=1)

    def on_weight(self, layer: AdaptedLayer, v: Tensor, rows: slice) -> Tensor:
        return v[rows, None]


@torch.no_grad()
def _computes_linear(layer: nn.Linear) -> bool:
    """Whether a linear layer with an overridden forward still computes W x + b: it is tested on two rows."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or not weight.dtype.is_floating_point:
        return False
    if weight.shape != (layer.out_features, layer.in_features) or weight.dtype.itemsize < 2:
        return False
    kept = {*layer._parameters, *layer._buffers, *(name for name in layer._modules if not name.startswith("lora_"))}
    if not kept <= {"weight", "bias"}:
        return False  # it has further state, such as bounds that two rows may not reach
    x = torch.arange(2 * layer.in_features, device=weight.device).cos().view(2, -1)
    x = torch.stack([x[0], 64 * x[1]]).to(weight.dtype)
    try:
        cls: Any = unwrap_class(type(layer))
        found = cls.forward(layer, x)
        wanted = F.linear(x, weight, layer.bias)
    except Exception:  # another signature, other inputs, no kernel: in any case it is not known to be linear
        return False
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    allowed = 16 * torch.finfo(weight.dtype).eps * wanted.float().norm()
    return bool((found.float() - wanted.float()).norm() <= allowed)
