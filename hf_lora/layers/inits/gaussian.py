"""A from a normal distribution, as in the first implementation of LoRA."""

from __future__ import annotations

from torch import Tensor, nn

from .base import InitCall
from .kaiming import Kaiming


class Gaussian(Kaiming):
    """A normal with standard deviation 1/r, B zero. For an embedding: A zero, B normal."""

    in_files = "gaussian"

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        if call.shape.looks_up:
            return super().__call__(call)
        values = call.zeros()
        for name, spec in call.specs.items():
            if spec.axes == "RI":
                nn.init.normal_(values[name], std=1 / spec.shape[0])
        return values
