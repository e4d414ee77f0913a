"""The usual initialization of LoRA (Hu et al. 2021, arXiv:2106.09685): A random, B zero."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .base import Init, InitCall


class Kaiming(Init):
    """A Kaiming-uniform, B zero. For an embedding, whose A is looked up and not multiplied: A zero, B normal."""

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        for name, spec in call.specs.items():
            if call.shape.looks_up and spec.axes == "OR":
                nn.init.normal_(values[name])
            elif not call.shape.looks_up and spec.axes == "RI":
                nn.init.kaiming_uniform_(values[name], a=math.sqrt(5))
        return values
