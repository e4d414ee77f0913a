"""LoRA-FA (Zhang et al. 2023, arXiv:2308.03303): A keeps its initial values, and only B is trained.

The layer's input is then not stored for the backward, only A x (…, R).
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from ..contract import FactorSpec, Shape
from .additive import Additive


class LoraFA(Additive):
    kind = "lora_fa"

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        specs = shape.specs(layer, r)
        return {**specs, "lora_A": replace(specs["lora_A"], trainable=False)}
