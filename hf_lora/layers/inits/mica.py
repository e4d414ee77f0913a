"""MiCA (2026, arXiv:2604.01694): B is fixed at the smallest singular directions of the weight, and A is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..contract import FactorSpec, Method, Shape
from .base import Init, InitCall
from .decompositions import refuse_few_directions


class Mica(Init):
    """B (O, R): the left singular vectors of the weight with the smallest singular values, frozen; A zero.

    Files keep the name, so that training goes on with B frozen, in PEFT too.
    """

    in_files = "mica"

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        if not shape.is_matrix and not shape.looks_up:
            return "this initialization is for linear layers and embeddings"
        return super().refuse(layer, shape)

    def refuse_rank(self, layer: Any, shape: Shape, r: int) -> str | None:
        return refuse_few_directions(layer, shape, r)

    def refuse_method(self, method: Method) -> str | None:
        return None if method.kind == "lora" else "it trains A alone, with plain LoRA"

    def declare(self, shape: Shape, specs: dict[str, FactorSpec]) -> dict[str, FactorSpec]:
        return {**specs, "lora_B": replace(specs["lora_B"], trainable=False)}

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        values, weight = call.zeros(), call.read()
        u = torch.linalg.svd(weight.t() if call.shape.by_input else weight, full_matrices=False).U
        values["lora_B"].copy_(u[:, -values["lora_B"].shape[1] :])
        return values
