"""How backends store the weight of a layer, one file per backend, and the functions that other files use.

    dense.py      ordinary parameters; rounding a block of values to their dtype
    quantized.py  the base class of quantized layers, and layers of unknown backends
    bnb.py        bitsandbytes, 4-bit and 8-bit
    ao.py         torchao

No other file depends on a backend. `hf_lora.register` adds a new one to `STORAGES`.

Optional libraries are found by `sys.modules` and by the names of classes, and never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Storage
from ..registry import Registry
from .ao import TorchaoStorage
from .bnb import Bits4Storage, Int8Storage
from .dense import DenseStorage, fits, put_rows
from .quantized import OpaqueStorage, QuantizedStorage, is_packed, why_unreadable

__all__ = [
    "STORAGES", "DenseStorage", "OpaqueStorage", "QuantizedStorage", "end_differentiable", "execution_device", "fits",
    "is_packed", "is_unfinished", "keep_differentiable", "libraries_of", "numel", "put_rows",
    "quantization_of", "storage_of", "unshardable", "why_no_storage", "why_unreadable",
]  # fmt: skip

STORAGES: Registry[Storage] = Registry(
    "storage",
    {
        "dense": DenseStorage(),
        "bnb_4bit": Bits4Storage(),
        "bnb_int8": Int8Storage(),
        "torchao": TorchaoStorage(),
        "opaque": OpaqueStorage(),
    },
)
"""Name -> storage, in search order; storages of other packages come first."""


# Layers --------------------------------------------------------------------------------------------------------------


def storage_of(layer: nn.Module) -> Storage | None:
    """The storage that owns `layer`'s weight, or None."""
    for storage in STORAGES.search():
        if storage.owns(layer):
            return storage
        if storage.refuse(layer) is not None:
            return None  # its backend refuses it, so no other storage may claim it
    return None


def quantization_of(layer: nn.Module) -> QuantizedStorage | None:
    """How a linear layer's weight is quantized; None if it is dense or the layer is not linear."""
    if not isinstance(layer.__dict__.get("out_features"), int):
        return None
    storage = storage_of(layer)
    return storage if isinstance(storage, QuantizedStorage) else None


def why_no_storage(layer: nn.Module) -> str:
    """Why no storage supports a layer's weight."""
    if "weight" not in layer._parameters:
        return "its weight is computed from other tensors (a parametrization), so a merged weight would be lost"
    weight = layer._parameters["weight"]
    for storage in STORAGES.search():
        why = storage.refuse(layer)
        if why is not None:
            return why
    return f"its weight is a {type(weight).__name__} of {getattr(weight, 'dtype', None)}, which is not supported"


def is_unfinished(layer: nn.Module) -> bool:
    """Whether a quantized layer has a weight that was never quantized, so that its forward fails.

    transformers leaves modules in this state if the base checkpoint lacks them, such as a new task head.
    """
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.dtype.is_floating_point:
        return False
    return any(storage.unfinished(layer) for storage in STORAGES.search())


def execution_device(layer: Any) -> torch.device:
    """The device on which the layer computes: that of its hook if it has one (offloading), otherwise its weight's."""
    hook = layer.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    if device is None:
        tensors = (*layer._parameters.values(), *layer._buffers.values())
        return next(t.device for t in tensors if t is not None)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


# Parameters and models -----------------------------------------------------------------------------------------------


def numel(parameter: Tensor) -> int | None:
    """How many elements a packed parameter represents; None if it is not packed."""
    counts = (storage.numel(parameter) for storage in STORAGES.search())
    return next((count for count in counts if count is not None), None)


def libraries_of(model: nn.Module) -> list[str]:
    """The optional libraries whose layers or tensors `model` contains."""
    held = {type(m).__module__.partition(".")[0] for m in model.modules()}
    held |= {type(p.data).__module__.partition(".")[0] for p in model.parameters()}
    return list(dict.fromkeys(s.library for s in STORAGES.values() if s.library is not None and s.library in held))


def unshardable(model: nn.Module) -> list[str]:
    """Names of the quantized parameters that FSDP2 does not shard.

    Accelerate keeps weights with integer codes whole on every process, with only a warning; weights of some backends
    fail under `fully_shard`.
    """
    storages = tuple(STORAGES.search())
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.dtype.is_floating_point or any(storage.unshardable(parameter) for storage in storages)
    ]


# Training ------------------------------------------------------------------------------------------------------------


def keep_differentiable(modules: Iterable[nn.Module]) -> None:
    """Prevent an evaluation from converting weights to a format in which they cannot be trained further."""
    storages = _present()
    for module in modules if storages else ():
        for storage in storages:
            storage.before_training(module)


def end_differentiable(modules: Iterable[nn.Module]) -> None:
    """Undo `keep_differentiable`."""
    storages = _present()
    for module in modules if storages else ():
        for storage in storages:
            storage.after_training(module)


def _present() -> list[Storage]:
    """The storages of imported libraries: without one, there is no need to walk over a model's modules."""
    return [storage for storage in STORAGES.search() if storage.library in sys.modules]
