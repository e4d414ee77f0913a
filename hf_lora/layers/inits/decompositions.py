"""Initializations from a decomposition of the weight, which is subtracted from the base: PiSSA and OLoRA.

The base itself does not change: see `Init.takes_out`. Files hold the product as further ranks, so they are plain LoRA
of rank 2 R for the base as it is, which every library reads. In files of PEFT that name one of these, the product is
missing; it is computed again if the decomposition uses no random numbers.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..contract import Shape
from .base import Init, InitCall, taken


class Decomposition(Init):
    """A and B whose product is a part of the weight, scaled such that scaling · B A is that part."""

    takes_out = True
    repeatable = False
    computes_again = True
    """Whether it gives the same product for the same weight."""

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        return super().refuse(layer, shape) or refuse_others(shape)

    def refuse_rank(self, layer: Any, shape: Shape, r: int) -> str | None:
        return refuse_few_directions(layer, shape, r)

    def of_file(self) -> Init | None:
        if not self.computes_again:
            return None
        found = copy.copy(self)
        found.repeatable, found.in_files = True, None
        return found

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        weight = call.read()
        matrix = weight.t() if call.shape.by_input else weight
        a, b = self.factors(matrix, call.specs["lora_A"].shape[0], call.scaling, call.options)
        return subtracted(call, {"lora_A": a, "lora_B": b})

    @abstractmethod
    def factors(self, weight: Tensor, r: int, scaling: float, options: str) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R) for a weight (O, I)."""


class Pissa(Decomposition):
    """PiSSA (Meng et al. 2024, arXiv:2404.02948): the R largest singular values and their vectors.

    `pissa_niter_N` computes them with N iterations of a randomized method, which is much faster.
    """

    takes_options = True

    def refuse_options(self, options: str) -> str | None:
        kind, _, count = options.partition("_")
        known = not options or (kind == "niter" and count.isdecimal())
        return None if known else "write 'pissa', or 'pissa_niter_4' for 4 iterations of a fast approximation"

    def refuse_scaling(self, scaling: float) -> str | None:
        return None if scaling > 0 else f"a scaling of {scaling:g} has no square root to divide the factors by"

    def with_options(self, options: str) -> Init:
        if not options:
            return self
        found = copy.copy(self)
        found.computes_again = False  # its random numbers differ
        return found

    def factors(self, weight: Tensor, r: int, scaling: float, options: str) -> tuple[Tensor, Tensor]:
        if options:
            u, s, v = torch.svd_lowrank(weight, r, niter=int(options.rpartition("_")[2]))
            vh = v.t()
        else:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = (s[:r] / scaling).sqrt()
        return root[:, None] * vh[:r], u[:, :r] * root


class Olora(Decomposition):
    """OLoRA (Büyükakyüz 2024, arXiv:2406.01775): B and A are the first columns of Q and rows of R of W = Q R.

    scaling · Q R is subtracted, as in PEFT, so a scaling other than 1 subtracts a multiple of it.
    """

    def factors(self, weight: Tensor, r: int, scaling: float, options: str) -> tuple[Tensor, Tensor]:
        q, triangle = torch.linalg.qr(weight)
        return triangle[:r], q[:, :r]


def subtracted(call: InitCall, factors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Values of all factors, with the same ones frozen; zeros if they follow from a checkpoint (None)."""
    values = call.zeros()
    for kind, value in (factors or {}).items():
        values[kind].copy_(value)
    return values | {taken(kind): values[kind].clone() for kind in call.shape.keys}


def refuse_few_directions(layer: Any, shape: Shape, count: int) -> str | None:
    """Why a weight cannot give so many singular vectors; None if it can."""
    most = min(shape.features(layer))
    return None if count <= most else f"its weight has {most} directions, fewer than the rank {count}"


def refuse_others(shape: Shape) -> str | None:
    """Why a layer of this shape has no matrix to start from; None for linear layers."""
    return None if shape.is_matrix else "this initialization is for linear layers"
