"""A method, an initialization, a shape and a storage such as another package may register."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_lora import INITS, METHODS, SHAPES, STORAGES, register
from hf_lora.layers.contract import FactorSpec, Method, Shape
from hf_lora.layers.inits import Init, InitCall
from hf_lora.layers.shapes.linear import LinearShape
from hf_lora.layers.storages import DenseStorage


class Gain(Method):
    """y = W x + g ∘ (scaling · B A x), with a third factor g (O,), stored as a column in a file."""

    kind = "gain"
    keys = {"lora_gain": "lora_gain.column"}

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        gain = FactorSpec(
            (shape.features(layer)[1],), self.keys["lora_gain"], "O", to_disk=as_column, from_disk=from_column
        )
        return {**shape.specs(layer, r), "lora_gain": gain}

    def start(self, layer: Any, name: str) -> dict[str, Tensor]:
        return {"lora_gain": torch.ones(layer.weight.shape[0])}

    def forward(self, layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
        (name,) = names
        update = layer._lora.shape.update(layer, name, x, layer._lora.adapters[name].scaling)
        y: Tensor = layer.product(x)
        return y + (layer.lora_gain[name].weight * update).to(y.dtype)

    def fold(self, layer: Any, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        (name,) = names
        gain = layer.lora_gain[name].weight[rows, None].to(block.dtype)
        delta = layer._lora.shape.delta(layer, name, rows).to(block.dtype)
        return block + layer._lora.adapters[name].scaling * gain * delta


def as_column(gain: Tensor) -> Tensor:
    return gain[:, None]


def from_column(gain: Tensor) -> Tensor:
    return gain[:, 0]


class Constant(Init):
    """A of 0.1 throughout, B zero."""

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        values["lora_A"].fill_(0.1)
        return values


class Doubled(nn.Module):
    """y = 2 W x, and no linear layer."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * 2


class DoubledShape(LinearShape):
    plain_forward: Any = None

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, Doubled)

    def features(self, layer: Any) -> tuple[int, int]:
        return layer.weight.shape[1], layer.weight.shape[0]

    def weight(self, layer: Any, x: Tensor) -> Tensor | None:
        return None

    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        return super().update(layer, name, x, 2 * scaling)

    is_matrix = False


class Negated(Doubled):
    """y = -2 W x: its weight is kept with the other sign."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) * -2


class NegatedStorage(DenseStorage):
    kind = "negated"

    def owns(self, layer: nn.Module) -> bool:
        return isinstance(layer, Negated)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        return super().read(layer, rows, into).neg_()

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        super().write(layer, rows, -block)


TOYS: list[tuple[Any, str, Any]] = [
    (METHODS, "gain", Gain()),
    (INITS, "constant", Constant()),
    (SHAPES, "doubled", DoubledShape()),
    (STORAGES, "negated", NegatedStorage()),
]
"""(registry, name, entry)"""


@contextmanager
def registered() -> Iterator[None]:
    """The toys, for the time of a `with` block."""
    for registry, name, entry in TOYS:
        register(registry, name, entry)
    try:
        yield
    finally:
        for registry, name, _ in TOYS:
            registry.pop(name, None)
