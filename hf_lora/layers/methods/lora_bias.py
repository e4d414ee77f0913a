"""LoRA whose second factor has a bias: y = W x + scaling · (B A x + b), b' = bias + scaling · b."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..contract import AdaptedLayer, FactorSpec, Shape, Update
from ..ops import to_float64
from .additive import Additive

BIAS = "lora_B_bias"


class LoraBias(Additive):
    kind = "lora_bias"
    keys = {BIAS: "lora_B.bias"}

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        bias = FactorSpec((shape.features(layer)[1],), self.keys[BIAS], "O")
        return {**shape.specs(layer, r), BIAS: bias}

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return "lora_bias is not possible here: an embedding has no bias" if shape.looks_up else None

    def refuse_folding(self, layer: AdaptedLayer) -> str | None:
        if layer.bias is None:
            return "the layer has no bias that could take up the bias of the adapter (lora_bias)"
        return super().refuse_folding(layer)

    def forward(self, layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor:
        y, state = super().forward(layer, x, names), layer._lora
        for name in names:
            added = state.adapters[name].scaling * layer.factor(BIAS, name)
            y = y + state.shape.on_output(layer, added).to(y.dtype)
        return y

    def folding_bias(self, layer: AdaptedLayer, names: tuple[str, ...]) -> Update:
        scalings = (layer._lora.adapters[name].scaling for name in names)
        biases = [s * to_float64(layer.factor(BIAS, name).detach()) for s, name in zip(scalings, names, strict=True)]

        def add(block: Tensor, rows: slice) -> Tensor:
            for bias in biases:
                block = block + bias[rows].to(block.dtype)
            return block

        return add
