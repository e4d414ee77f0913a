"""The precision of a run: a line about it, logged at the start of training, and what stays float32."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..adapt.dequantize import quantized_layers


class KeptDtypes:
    """Undoes TRL's conversion of trainable parameters to bfloat16 in a model with a 4- or 8-bit base.

    Adapters are float32 master weights, and the base's norms and head, which are frozen later, keep their values.

    Args:
        given: the arguments of a trainer.
    """

    def __init__(self, given: Iterable[object]) -> None:
        self.kept: dict[nn.Parameter, Tensor] = {}
        for value in given:
            self.add(value)

    def add(self, model: object) -> None:
        """Record the values of a model, if it is one with such a base."""
        if isinstance(model, nn.Module) and getattr(model, "is_quantized", False):
            self.kept |= {p: p.data for p in model.parameters() if p.requires_grad}

    def restore(self) -> None:
        """Restore the recorded values where their dtype was changed."""
        for parameter, values in self.kept.items():
            if parameter.dtype != values.dtype:
                parameter.data = values
        self.kept.clear()


def precision_line(model: nn.Module, accelerator: Accelerator, optimizer: str) -> str:
    """The precision of the base, the adapters, the products and the optimizer.

    Args:
        accelerator: an `accelerate.Accelerator`, for its mixed precision.
        optimizer: name of the optimizer.
    """
    base = base_precision(model)
    trained = _listed(Counter({_name(p.dtype): p.numel() for p in model.parameters() if p.requires_grad}))
    parts = [f"base {base}", f"adapters {trained}", f"products {_products(model, accelerator)}"]
    return f"precision: {'; '.join(parts)}; optimizer {optimizer} on {trained}"


def base_precision(model: nn.Module) -> str:
    """The formats of the frozen weights, most elements first: `"bitsandbytes NF4, bfloat16"`."""
    counts: Counter[str] = Counter()
    packed = set()
    for layer, storage in quantized_layers(model).values():
        packed |= {id(p) for p in (layer._parameters.get("weight"),) if p is not None}
        counts[storage.form(layer)] += prod(storage.shape(layer))
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) not in packed:
            counts[_name(parameter.dtype)] += parameter.numel()
    return _listed(counts) or "none"


def quantization(model: nn.Module) -> list[str]:
    """The quantization formats of the base's layers; empty if all are dense."""
    return sorted({storage.form(layer) for layer, storage in quantized_layers(model).values()})


def _products(model: nn.Module, accelerator: Accelerator) -> str:
    text = _dense_products(model, accelerator)
    own = {storage.compute_dtype(layer) for layer, storage in quantized_layers(model).values()}
    named = ", ".join(sorted(_name(dtype) for dtype in own if dtype is not None))
    return f"{text}, those of 4-bit layers in {named}" if named else text


def _dense_products(model: nn.Module, accelerator: Accelerator) -> str:
    mixed = str(accelerator.mixed_precision)
    if mixed == "fp8":
        return "float8 if Accelerate's backend supports it (experimental)"
    if mixed == "bf16":
        return "bfloat16 by autocast"
    if mixed == "fp16":
        if getattr(accelerator, "scaler", None) is not None:
            return "float16 by autocast, with loss scaling"
        if accelerator.device.type == "cpu":
            return "float16 by autocast, without loss scaling (Accelerate scales only on accelerators)"
        return "float16 by autocast"
    dtypes = {p.dtype for p in model.parameters() if not p.requires_grad and p.is_floating_point()}
    text = "in the base's dtype"
    if torch.float32 in dtypes and accelerator.device.type == "cuda" and _tf32():
        text += ", those of float32 as TF32"
    return text


@contextlib.contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices of a device in float32, whatever was allowed: TF32, bfloat16 on CPUs, autocast."""
    backends: Any = torch.backends
    kinds = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value


def _tf32() -> bool:
    backends: Any = torch.backends
    try:
        return "tf32" in (backends.fp32_precision, backends.cuda.matmul.fp32_precision)
    except (AttributeError, RuntimeError):  # with the older switches set, PyTorch refuses to read the newer ones
        return bool(torch.backends.cuda.matmul.allow_tf32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _listed(counts: Counter[str]) -> str:
    return ", ".join(kind for kind, _ in counts.most_common())
