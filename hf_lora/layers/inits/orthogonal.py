"""A and B with orthogonal row and column spaces, so that B A is zero though neither of them is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..contract import Shape
from .base import Init, InitCall
from .decompositions import refuse_others


class Orthogonal(Init):
    """Both are random combinations of rows of one orthogonal matrix (R, R): A of every second one, B of the others.

    The random numbers are drawn as in PEFT. R must be even.
    """

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return super().refuse(layer, shape) or refuse_others(shape)

    def refuse_rank(self, layer: Any, shape: Shape, r: int) -> str | None:
        return f"orthogonal initialization needs an even rank, and its rank is {r}" if r % 2 else None

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values = call.zeros()
        (r, inputs), (outputs, _) = call.specs["lora_A"].shape, call.specs["lora_B"].shape
        q = torch.linalg.qr(torch.randn(r, r)).Q
        values["lora_A"].copy_((torch.randn(inputs, r // 2) @ q[0::2]).t() / 10)
        values["lora_B"].copy_(torch.randn(r // 2, outputs).t() @ q[1::2] / 10)
        return values
