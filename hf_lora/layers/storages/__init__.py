"""How the bits of a layer's weight are kept: a file a backend, and what the other files ask of them.

    dense.py      an ordinary parameter; rounding a block of values into one
    quantized.py  what quantised layers share, and those of a backend that is not known
    bnb.py        bitsandbytes, 4 bits and 8
    ao.py         torchao

No other file knows a backend. A new one is a class, added to `STORAGES` by `hf_lora.register`.

Optional libraries are noticed in `sys.modules` and in the names of classes, and never imported.
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
"""Name -> storage, in the order in which they are asked; one from outside is asked before these."""


# Of a layer ----------------------------------------------------------------------------------------------------------


def storage_of(layer: nn.Module) -> Storage | None:
    """The storage that owns `layer`'s weight, or None."""
    for storage in STORAGES.search():
        if storage.owns(layer):
            return storage
        if storage.refuse(layer) is not None:
            return None  # its backend is known, and knows why not: no other storage may take it for its own
    return None


def quantization_of(layer: nn.Module) -> QuantizedStorage | None:
    """How a linear layer's weight is quantised; None where it is dense, or is no linear layer."""
    if not isinstance(layer.__dict__.get("out_features"), int):
        return None
    storage = storage_of(layer)
    return storage if isinstance(storage, QuantizedStorage) else None


def why_no_storage(layer: nn.Module) -> str:
    """What is unusual about a weight that no storage owns."""
    if "weight" not in layer._parameters:
        return "its weight is computed from other tensors (a parametrisation), so a merged value would be lost"
    weight = layer._parameters["weight"]
    for storage in STORAGES.search():
        why = storage.refuse(layer)
        if why is not None:
            return why
    return f"its weight is kept as {type(weight).__name__} of {getattr(weight, 'dtype', None)}, which is not supported"


def is_unfinished(layer: nn.Module) -> bool:
    """Whether a quantised layer holds a weight that was never quantised: its forward fails.

    transformers leaves a module so that the base checkpoint did not hold, such as a new task head.
    """
    weight = layer._parameters.get("weight")
    if weight is None or weight.is_meta or not weight.dtype.is_floating_point:
        return False
    return any(storage.unfinished(layer) for storage in STORAGES.search())


def execution_device(layer: Any) -> torch.device:
    """Where the layer computes: its weight's device, or its hook's where the weight is offloaded."""
    hook = layer.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None)
    if device is None:
        own = (*layer._parameters.values(), *layer._buffers.values())
        return next(t.device for t in own if t is not None)
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


# Of a parameter, and of a model --------------------------------------------------------------------------------------


def numel(parameter: Tensor) -> int | None:
    """How many elements a packed parameter stands for; None where it holds its elements one by one."""
    counts = (storage.numel(parameter) for storage in STORAGES.search())
    return next((count for count in counts if count is not None), None)


def libraries_of(model: nn.Module) -> list[str]:
    """The optional libraries whose layers or tensors `model` holds."""
    held = {type(m).__module__.partition(".")[0] for m in model.modules()}
    held |= {type(p.data).__module__.partition(".")[0] for p in model.parameters()}
    return list(dict.fromkeys(s.library for s in STORAGES.values() if s.library is not None and s.library in held))


def unshardable(model: nn.Module) -> list[str]:
    """Names of the quantised parameters that FSDP2 does not split between processes.

    Accelerate leaves weights whole on every process whose codes are kept as integers, and says so in a warning only;
    those of some backends fail under `fully_shard`.
    """
    storages = tuple(STORAGES.search())
    return [
        name
        for name, parameter in model.named_parameters()
        if not parameter.dtype.is_floating_point or any(storage.unshardable(parameter) for storage in storages)
    ]


# Training ------------------------------------------------------------------------------------------------------------


def keep_differentiable(modules: Iterable[nn.Module]) -> None:
    """Let no evaluation put weights into a form from which training cannot go on."""
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
    """The storages of libraries that were imported: without one, no walk over a model's modules is needed."""
    return [storage for storage in STORAGES.search() if storage.library in sys.modules]
