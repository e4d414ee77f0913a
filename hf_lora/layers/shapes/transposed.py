"""Linear layers whose weight is stored transposed."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..contract import AdaptedLayer
from .matrix import MatrixByInput, runs_forward_of


class TransposedShape(MatrixByInput):
    """`Conv1D` of transformers: weight (I, O)."""

    fan_in_fan_out = True
    plain_forward = staticmethod(Conv1D.forward)

    def weight(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        weight = self._parameter(layer, x)
        return weight.t() if weight is not None and weight.shape[0] == x.shape[-1] else None

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, Conv1D) and runs_forward_of(layer, Conv1D)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        return cast(int, layer.nx), cast(int, layer.nf)
