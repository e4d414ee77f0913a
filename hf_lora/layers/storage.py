"""The storages: how a backend keeps the bits of a layer's weight. A new backend is one class here."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import MergeError
from .base import Storage
from .quantized import QUANTIZED, rounds_activations
from .registry import Registry


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
        MergeError: a value is not finite, or is not when rounded.
    """
    if not fits(block, weight.dtype):
        raise MergeError(f"a merged value is not finite, or too large for {weight.dtype}")
    weight[rows] = block


def fits(block: Tensor, dtype: torch.dtype) -> bool:
    """Whether every element of `block` is finite, and still is when rounded to `dtype`."""
    flat = block.reshape(-1)
    # No element is larger than the norm: one pass, without a mask, settles it for values of ordinary size.
    if flat.dtype.itemsize > 1 and bool(flat.dot(flat).sqrt() < torch.finfo(dtype).max):
        return True
    return bool(torch.isfinite(block.to(dtype)).all())


STORAGES: Registry[Storage] = Registry(
    "storage", {"dense": DenseStorage(), **{storage.kind: storage for storage in QUANTIZED}}
)


def storage_of(layer: nn.Module) -> Storage | None:
    """The storage that owns `layer`'s weight, or None."""
    return next((storage for storage in STORAGES.search() if storage.owns(layer)), None)


def why_no_storage(layer: nn.Module) -> str:
    """What is unusual about a weight that no storage owns."""
    if "weight" not in layer._parameters:
        return "its weight is computed from other tensors (a parametrisation), so a merged value would be lost"
    weight = layer._parameters["weight"]
    if rounds_activations(weight):
        return "its activations are quantised too, and no gradient passes through them"
    return f"its weight is kept as {type(weight).__name__} of {getattr(weight, 'dtype', None)}, which is not supported"


def execution_device(layer: Any) -> torch.device:
    """Where the layer computes: its weight's device, or its hook's where the weight is offloaded."""
    hook = layer.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    if device is None:
        own = (*layer._parameters.values(), *layer._buffers.values())
        return next(t.device for t in own if t is not None)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
