"""Convert a quantized model to a dense one, layer by layer, and optionally fold adapters in.

A quantized weight is read in row blocks, the update is added in float64, and the sum is rounded once, to the dtype of
the model's other weights. For a model that transformers loaded, this is the `dtype` it was loaded with, so a bfloat16
model becomes a dense bfloat16 model. Every quantized linear layer is converted, adapted or not, and the quantization
is removed from the config, so the model is saved as a dense one.

The result has the rounded weights that the adapter was trained on. If the dense base is available, merging into it
gives a better model: docs/quantization.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import Faults, MergeError
from ..layers.base import LoraLayer
from ..layers.contract import Shape, Storage, Update
from ..layers.ops import to_float64
from ..layers.shapes import shape_of
from ..layers.storages import QuantizedStorage, fits, is_packed, quantization_of, storage_of, why_unreadable
from .heads import mark_like
from .state import state_of
from .ties import has_broken_ties, untie_all
from .undo import all_or_nothing
from .walk import configs_of, original_modules

BLOCK_ELEMENTS = 1 << 18
"""Elements of a row block on a CPU: 2 MiB of float64. Smaller blocks cost more calls and slower products of wide rows;
larger ones do not fit into the cache. Other devices, where a launch costs more, use 8 times as many."""


FORGOTTEN = (
    "hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit",
    "is_4bit_serializable", "is_8bit_serializable",
)  # fmt: skip
"""Attributes that transformers sets on a quantized model."""


def dequantize(model: nn.Module, call: str = "dequantize") -> nn.Module:
    """Convert every quantized linear layer of `model` to a dense one, in place, and remove its quantization config.

    Adapters stay unmerged. `merge(model, keep=False)` does the same with the adapters folded in.

    Returns:
        `model`.

    Raises:
        MergeError: lists every layer whose format is unknown. The model is unchanged.
    """
    check_dequantizable(model, call)
    with all_or_nothing(model):
        dequantize_with(model, {})
    return model


def quantized_layers(model: nn.Module) -> dict[str, tuple[nn.Module, QuantizedStorage]]:
    """Original name -> (layer, storage), for every quantized linear layer."""
    found = ((name, module, quantization_of(module)) for name, module in original_modules(model))
    return {name: (module, storage) for name, module, storage in found if storage is not None}


def is_quantized(model: nn.Module) -> bool:
    """Whether some linear layer of `model` is quantized in a known format."""
    return any(storage.readable for _, storage in quantized_layers(model).values())


def check_dequantizable(model: nn.Module, call: str) -> None:
    """Check that every quantized weight can be converted.

    Raises:
        MergeError: lists every one that cannot.
    """
    faults = Faults(call)
    for fault in dequantization_faults(model):
        faults.add(fault)
    faults.check(MergeError, "Nothing was changed. Merge into the dense base: LoraModel.from_pretrained(adapter, "
                 "base_model=its folder, merge=True).")  # fmt: skip


def dequantization_faults(model: nn.Module) -> Iterator[str]:
    """Why the model cannot become dense: quantized modules of unknown format, and weights that are not in memory."""
    known = quantized_layers(model)
    for name, (layer, storage) in known.items():
        if not storage.readable:
            yield f"{name}: {why_unreadable(layer)}"
        elif layer._parameters["weight"].is_meta:  # type: ignore[union-attr]
            yield f"{name}: its weight is offloaded; load the base without offloading"
    for name, module in original_modules(model):
        if name in known:
            continue
        for kind, parameter in module._parameters.items():
            if parameter is not None and is_packed(parameter):
                yield f"{name}.{kind}: {type(module).__name__} is quantized and is not a linear layer"


@torch.no_grad()
def dequantize_with(model: nn.Module, folds: dict[str, Callable[[], Update]]) -> None:
    """`dequantize` without the check. `folds`: name of a layer -> returns its update when that layer is converted.

    A call that was cut off anywhere is completed by another one.

    Raises:
        MergeError: a sum is not finite in the model's dtype; the layers before it are dense already.
    """
    dtype, state = dense_dtype(model), state_of(model)
    trains = state is not None and any(state.required_grad.values())
    shared: dict[int, nn.Parameter] = {}
    for name, (layer, storage) in quantized_layers(model).items():
        old: Any = layer.weight
        fold = folds.get(name)
        weight = shared.get(id(old)) if fold is None else None
        if weight is None:
            dense = _dense(layer, storage, fold, dtype)
            weight = nn.Parameter(dense, requires_grad=False)
            mark_like(weight, old)
            if fold is None:
                shared[id(old)] = weight
        if state is not None:  # codes cannot be trained, so it was frozen; now it is like the rest of the base
            state.required_grad[f"{name}.weight"] = trains
        with all_or_nothing(layer):
            storage.make_dense(layer, weight)
            if isinstance(layer, LoraLayer):
                data = layer._lora
                data.storage, data.shape = cast(Storage, storage_of(layer)), cast(Shape, shape_of(layer))
    if has_broken_ties(model):
        untie_all(model)
    forget_quantization(model, dtype)


def _dense(
    layer: nn.Module, storage: QuantizedStorage, start: Callable[[], Update] | None, dtype: torch.dtype
) -> Tensor:
    fold = None if start is None else start()
    outputs, inputs = storage.shape(layer)
    transposed = issubclass(storage.dense_class(layer), Conv1D)
    device = cast(Tensor, layer.weight).device
    dense = torch.empty((inputs, outputs) if transposed else (outputs, inputs), dtype=dtype, device=device)
    for rows, block in read_rows(storage, layer, reuse=True):
        block = block if fold is None else fold(block, rows)
        if not fits(block, dtype):
            raise MergeError(f"a merged value is not finite, or too large for {dtype}")
        (dense.t() if transposed else dense)[rows] = block
    return dense


def read_rows(storage: Storage, layer: Any, reuse: bool = False, first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the layer's weight; float64 if the device supports it.

    Args:
        reuse: use the same memory for all blocks, so that each is valid only until the next one.
        first: the row to begin with, at which a block begins.
    """
    count, *rest = storage.shape(layer)
    device = cast(Tensor, layer.weight).device
    elements = BLOCK_ELEMENTS * (1 if device.type == "cpu" else 8)
    step = storage.block_rows(layer, max(1, elements // max(1, prod(rest))))
    memory = to_float64(torch.empty(0, device=device)).new_empty(min(step, count), *rest)
    for start in range(first, count, step):
        rows = slice(start, min(start + step, count))
        into = memory[: rows.stop - start]
        yield rows, storage.read(layer, rows, into if reuse else torch.empty_like(into))


def dense_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of most floating-point elements that are not quantized; without any, the config's dtype."""
    counts: dict[torch.dtype, int] = {}
    for _, module in original_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and not is_packed(parameter):
                counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    if counts:
        return max(counts, key=lambda dtype: counts[dtype])
    named = getattr(getattr(model, "config", None), "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


def forget_quantization(model: nn.Module, dtype: torch.dtype) -> None:
    """Remove the quantization from the model and its configs, which decide how a saved folder loads."""
    for module in model.modules():
        for name in FORGOTTEN:
            module.__dict__.pop(name, None)
        if "_weight_conversions" in module.__dict__:
            module.__dict__["_weight_conversions"] = _without_quantizers(module.__dict__["_weight_conversions"])
    for config in configs_of(model):
        quantization = config.__dict__.pop("quantization_config", None)
        config.__dict__.pop("_is_quantized", None)
        if quantization is not None:
            config.dtype = dtype


def _without_quantizers(conversions: list[Any] | None) -> list[Any] | None:
    """The conversions from files to tensors that transformers recorded (a save reverses them), without packing."""
    kept = []
    for conversion in conversions or ():
        if any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ())):
            continue
        if getattr(conversion, "quantization_operation", None) is not None:
            conversion = copy.copy(conversion)
            conversion.quantization_operation = None
        kept.append(conversion)
    return kept if conversions else conversions
