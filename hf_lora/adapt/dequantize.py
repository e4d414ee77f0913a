"""Turn a quantised model into a dense one, layer by layer, with adapters folded in on the way.

A quantised weight is read in row blocks, the update is added in float64, and the sum is rounded once, to the dtype of
the model's other weights: for what transformers loads that is the `dtype` it was loaded with, so a bfloat16 model
becomes a bfloat16 model. Every quantised linear layer is turned, adapted or not, and the model forgets that it was
quantised: its saved folder is that of a dense model.

The weights are those that the adapter was trained on, rounding and all. Where the dense base is at hand, loading it
and merging into that gives a better model: docs/quantization.md.
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
from ..layers.contract import Storage, Update
from ..layers.ops import to_float64
from ..layers.shapes import shape_of
from ..layers.storages import QuantizedStorage, fits, is_packed, quantization_of, storage_of, why_unreadable
from .state import state_of
from .ties import untie_all
from .walk import original_modules

BLOCK_ELEMENTS = 1 << 18
"""Elements of a row block on CPU: 2 MiB of float64. With less, calls and the products of wide rows cost more; with
more, blocks leave the cache. Other devices, where a launch costs more, take 8 times that."""

"""(block, its rows) -> the block with the update in it; the block may be overwritten."""

FORGOTTEN = (
    "hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit",
    "is_4bit_serializable", "is_8bit_serializable",
)  # fmt: skip
"""What transformers notes on a model that it quantised."""


def dequantize(model: nn.Module, call: str = "dequantize") -> nn.Module:
    """Make every quantised linear layer of `model` a dense one, in place, and forget that it was quantised.

    Adapters stay beside the layers. `merge(model, keep=False)` does this, with the adapters folded in.

    Returns:
        `model`.

    Raises:
        MergeError: lists every layer whose form is not known. Nothing is changed then.
    """
    check_dequantizable(model, call)
    dequantize_with(model, {})
    return model


def quantized_layers(model: nn.Module) -> dict[str, tuple[nn.Module, QuantizedStorage]]:
    """Original name -> (layer, storage), of every linear layer that is quantised."""
    found = ((name, module, quantization_of(module)) for name, module in original_modules(model))
    return {name: (module, storage) for name, module, storage in found if storage is not None}


def is_quantized(model: nn.Module) -> bool:
    """Whether some linear layer of `model` is quantised in a form that can be read."""
    return any(storage.readable for _, storage in quantized_layers(model).values())


def check_dequantizable(model: nn.Module, call: str) -> None:
    """See that nothing quantised would be left over.

    Raises:
        MergeError: lists what would.
    """
    faults = Faults(call)
    for fault in leftovers(model):
        faults.add(fault)
    faults.check(MergeError, "Nothing was changed. Merge into the dense base: LoraModel.from_pretrained(adapter, "
                 "base_model=its folder, merge=True).")  # fmt: skip


def leftovers(model: nn.Module) -> Iterator[str]:
    """What stands in the way of a dense model: quantised modules of unknown form, and weights that are not here."""
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
                yield f"{name}.{kind}: {type(module).__name__} is quantised, and no linear layer"


@torch.no_grad()
def dequantize_with(model: Any, folds: dict[str, Callable[[], Update]]) -> None:
    """`dequantize`, unchecked, with what starts the updates of the layers named in `folds`.

    Raises:
        MergeError: a sum is not finite in the model's dtype; layers before it are dense by then.
    """
    dtype, state = dense_dtype(model), state_of(model)
    trains = state is not None and any(state.required_grad.values())
    shared: dict[int, nn.Parameter] = {}
    parted = False
    for name, (layer, storage) in quantized_layers(model).items():
        old: Any = layer.weight
        fold = folds.get(name)
        weight = shared.get(id(old)) if fold is None else None
        if weight is None:
            dense = _dense(layer, storage, fold, dtype)
            weight = nn.Parameter(dense, requires_grad=False)
            if fold is None:
                shared[id(old)] = weight
        parted |= _is_tied(model, f"{name}.weight")
        storage.make_dense(layer, weight)
        if state is not None:  # it was frozen since codes cannot be trained; numbers are as the rest of the base was
            state.required_grad[f"{name}.weight"] = trains
        if isinstance(layer, LoraLayer):
            own = layer._lora
            own.storage, own.shape = cast(Storage, storage_of(layer)), cast(Any, shape_of(layer))
    if parted:
        untie_all(model)
    forget_quantization(model, dtype)


def _dense(
    layer: nn.Module, storage: QuantizedStorage, start: Callable[[], Update] | None, dtype: torch.dtype
) -> Tensor:
    fold = None if start is None else start()
    outputs, inputs = storage.shape(layer)
    turned = issubclass(storage.dense_class(layer), Conv1D)
    device = cast(Tensor, layer.weight).device
    dense = torch.empty((inputs, outputs) if turned else (outputs, inputs), dtype=dtype, device=device)
    for rows, block in read_rows(storage, layer, reuse=True):
        block = block if fold is None else fold(block, rows)
        if not fits(block, dtype):
            raise MergeError(f"a merged value is not finite, or too large for {dtype}")
        (dense.t() if turned else dense)[rows] = block
    return dense


def read_rows(storage: Storage, layer: Any, reuse: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """(rows, block) of the layer's weight, float64 where the device has it.

    Args:
        reuse: one piece of memory for all blocks, so that each lasts until the next one is asked for.
    """
    count, *rest = storage.shape(layer)
    device = cast(Tensor, layer.weight).device
    elements = BLOCK_ELEMENTS * (1 if device.type == "cpu" else 8)
    step = storage.block_rows(layer, max(1, elements // max(1, prod(rest))))
    memory = to_float64(torch.empty(0, device=device)).new_empty(min(step, count), *rest)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        into = memory[: rows.stop - start]
        yield rows, storage.read(layer, rows, into if reuse else torch.empty_like(into))


def dense_dtype(model: Any) -> torch.dtype:
    """The dtype of most of the floating-point numbers that were not quantised; without any, the config's."""
    counts: dict[torch.dtype, int] = {}
    for _, module in original_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None and not is_packed(parameter):
                counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    if counts:
        return max(counts, key=lambda dtype: counts[dtype])
    named = getattr(getattr(model, "config", None), "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.bfloat16


def _is_tied(model: Any, key: str) -> bool:
    """Whether transformers takes a quantised weight for one that is tied: it no longer is one with its source."""
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return key in ties or key in ties.values()


def forget_quantization(model: nn.Module, dtype: torch.dtype) -> None:
    """Take away what transformers notes on a quantised model and in its configs: they decide how a folder loads."""
    for module in model.modules():
        for name in FORGOTTEN:
            module.__dict__.pop(name, None)
        if "_weight_conversions" in module.__dict__:
            module.__dict__["_weight_conversions"] = _without_quantizers(module.__dict__["_weight_conversions"])
        for config in _configs(module):
            was = config.__dict__.pop("quantization_config", None)
            config.__dict__.pop("_is_quantized", None)
            if was is not None:
                config.dtype = dtype


def _without_quantizers(conversions: Any) -> Any:
    """transformers' record of how files became tensors, which a save follows backwards, without the packing."""
    kept = []
    for conversion in conversions or ():
        if any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ())):
            continue
        if getattr(conversion, "quantization_operation", None) is not None:
            conversion = copy.copy(conversion)
            conversion.quantization_operation = None
        kept.append(conversion)
    return kept if conversions else conversions


def _configs(module: Any) -> Iterator[Any]:
    config = module.__dict__.get("config")
    if hasattr(config, "to_dict"):
        yield config
        yield from (getattr(config, name) for name in getattr(config, "sub_configs", {}) if hasattr(config, name))
