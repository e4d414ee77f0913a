"""Convolutions: A has the layer's kernel size, B has kernel size 1."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import AdaptedLayer, Shape
from ..ops import weight_like
from .matrix import runs_forward_of


class ConvShape(Shape):
    """`nn.Conv1d/2d/3d`: weight (O, I/groups, *kernel), A (R, I, *kernel), B (O, R/groups, 1, …).

    This is PEFT's format. With groups > 1 the update mixes groups, which a grouped weight cannot represent: such a
    layer can be trained and saved, but not merged. With A (R, I/groups, *kernel), the update stays in its groups.
    """

    CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, self.CLASSES) and any(runs_forward_of(layer, cls) for cls in self.CLASSES)

    def refuse_rank(self, layer: nn.Module, r: int) -> str | None:
        groups = cast(int, layer.groups)
        return f"its rank {r} must be divisible by the convolution's {groups} groups" if r % groups else None

    def groups(self, layer: nn.Module) -> int:
        return cast(int, layer.groups)

    def refuse_folding(self, layer: nn.Module) -> str | None:
        if cast(int, layer.groups) > 1:
            return (
                "the update of a grouped convolution crosses its groups, which a grouped weight cannot represent, "
                "except with method='lora_grouped'"
            )
        return None

    def features(self, layer: nn.Module) -> tuple[int, int]:
        return cast(nn.Conv2d, layer).in_channels, cast(nn.Conv2d, layer).out_channels

    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layer = cast(nn.Conv2d, layer)
        ones = (1,) * len(layer.kernel_size)
        return (r, layer.in_channels, *layer.kernel_size), (layer.out_channels, r // layer.groups, *ones)

    def _hidden(self, layer: AdaptedLayer, name: str, x: Tensor) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        convolve = self.FUNCTIONS[len(layer.kernel_size) - 1]
        weight = weight_like(layer.factor("lora_A", name), x)
        groups = layer.in_channels // weight.shape[1]
        return convolve(x, weight, None, layer.stride, padding, layer.dilation, groups)

    def _output(self, layer: AdaptedLayer, name: str, h: Tensor) -> Tensor:
        convolve = self.FUNCTIONS[len(layer.kernel_size) - 1]
        return convolve(h, weight_like(layer.factor("lora_B", name), h), groups=layer.groups)

    def update(self, layer: AdaptedLayer, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        return self._output(layer, name, self._hidden(layer, name, x) * scaling)

    def factors(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        a, b = layer.factor("lora_A", name).flatten(1), layer.factor("lora_B", name).flatten(1)
        if layer.groups > 1:  # each group of outputs has its own ranks
            b = torch.block_diag(*b.chunk(layer.groups))
        return b, a

    def delta(self, layer: AdaptedLayer, name: str, rows: slice) -> Tensor:
        return super().delta(layer, name, rows).unflatten(1, layer.factor("lora_A", name).shape[1:])

    def norm(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).norm(dim=1)

    def on_weight(self, layer: AdaptedLayer, v: Tensor, rows: slice) -> Tensor:
        return v[rows].view(-1, *[1] * (1 + len(layer.kernel_size)))

    def on_output(self, layer: AdaptedLayer, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(layer.kernel_size))
