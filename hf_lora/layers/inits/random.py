"""A and B both random, so that a new adapter changes the model. For tests."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .base import Init, InitCall


class Random(Init):
    """Both Kaiming-uniform; for an embedding, both normal."""

    in_files = False

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        for name, spec in call.specs.items():
            if spec.axes in ("RI", "OR"):
                if call.shape.looks_up:
                    nn.init.normal_(values[name])
                else:
                    nn.init.kaiming_uniform_(values[name], a=math.sqrt(5))
        return values
