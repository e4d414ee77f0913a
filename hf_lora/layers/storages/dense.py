"""The dense storage (ordinary PyTorch parameters), and writing to dense weights."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ...errors import MergeError
from ..contract import Storage


class DenseStorage(Storage):
    """An ordinary floating-point parameter, in memory."""

    kind = "dense"

    def owns(self, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        return type(weight) is nn.Parameter and weight.dtype.is_floating_point and weight.dtype.itemsize > 1

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return tuple(cast(Tensor, layer.weight).shape)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        weight = cast(Tensor, layer.weight).detach()[rows]
        return weight.to(torch.float32, copy=True) if into is None else into.copy_(weight)

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        put_rows(cast(Tensor, layer.weight).detach(), rows, block)


def put_rows(weight: Tensor, rows: slice, block: Tensor) -> None:
    """Round `block` into rows of `weight`.

    Raises:
        MergeError: a value is not finite, before or after rounding.
    """
    if not fits(block, weight.dtype):
        raise MergeError(f"a merged value is not finite, or too large for {weight.dtype}")
    weight[rows] = block


def fits(block: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element of `block` is finite, before and after rounding to `dtype`."""
    flat = block.reshape(-1)
    # No element exceeds the norm, so for ordinary values one pass without a mask is enough.
    if flat.dtype.itemsize > 1 and bool(flat.dot(flat).sqrt() < torch.finfo(dtype).max):
        return True
    return bool(torch.isfinite(block.to(dtype)).all())
