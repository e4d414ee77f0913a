"""bitsandbytes: 4-bit and 8-bit weights, each in its own layer class.

This file does not import bitsandbytes: a program with such weights has imported it. Values are read with its
dequantization, which rounds to the dtype that the weight had before quantization.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .quantized import QuantizedStorage, features, is_a

BITSANDBYTES = "bitsandbytes"

CPU_GROUP = 32
"""Rows per group in the packed format of bitsandbytes' CPU kernel for inference."""

_PACKS, _PACKED_BEFORE = "support_avx512bf16_for_cpu", "_hf_lora_packs_for_cpu"
"""Attributes of a layer: whether it uses that format, and whether it did before training."""


class Bits4Storage(QuantizedStorage):
    """bitsandbytes NF4 and FP4, with or without double quantization: two values per byte, blocks along the rows."""

    kind = "bitsandbytes 4-bit"
    library = BITSANDBYTES
    attributes = (
        "compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", _PACKS, "source_cls",
    )  # fmt: skip

    def owns(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        if not is_a(weight, BITSANDBYTES, "Params4bit"):
            return False
        state = _state_of(layer)
        return state is not None and tuple(state.shape) == features(layer)

    def form(self, layer: nn.Module) -> str:
        return f"bitsandbytes {str(_state_of(layer).quant_type).upper()}"

    def dense_class(self, layer: nn.Module) -> type[nn.Module]:
        return _source_class(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        outputs, width = self.shape(layer)
        start, stop, _ = rows.indices(outputs)
        state, data = _state_of(layer), cast(Tensor, layer.weight).data
        if getattr(state, "packing_format_for_cpu", False):
            block = _from_cpu_form(data, state, start, stop)
        else:
            size = state.blocksize
            first, last = start * width // size, -(-stop * width // size)
            count = min(last * size, outputs * width) - first * size
            packed = data.reshape(-1).view(torch.uint8)[first * size // 2 : first * size // 2 + (count + 1) // 2]
            operation: Any = torch.ops.bitsandbytes.dequantize_4bit
            values = operation(packed, _scales(state, first, last), size, state.quant_type, [count], state.dtype)
            begin = start * width - first * size
            block = values.reshape(-1)[begin : begin + (stop - start) * width].view(-1, width)
        return block.to(torch.float32) if into is None else into.copy_(block)

    def unfinished(self, layer: Any) -> bool:
        four_bit = is_a(layer, BITSANDBYTES, "Linear4bit")
        return four_bit and _state_of(layer) is None and tuple(layer.weight.shape) == features(layer)

    def numel(self, parameter: Tensor) -> int | None:
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        return None if shape is None else int(shape.numel())

    def before_training(self, module: nn.Module) -> None:
        """Prevent an evaluation from converting 4-bit weights to a format that cannot be trained.

        On CPUs with AVX512-BF16, bitsandbytes repacks a weight permanently in its first forward outside training. No
        gradient passes through a repacked weight. One that was repacked earlier is converted back, as bitsandbytes
        does when it saves it; but that leaves the scales in the order of the repacked weight, so they are set here.
        """
        if not module.__dict__.get(_PACKS):
            return
        module.__dict__[_PACKED_BEFORE] = module.__dict__[_PACKS]
        module.__dict__[_PACKS] = False
        state = _state_of(module)
        if getattr(state, "packing_format_for_cpu", False):
            scales = state.absmax.t().to(torch.float32).reshape(-1)
            module._save_to_state_dict({}, "", False)
            if not state.nested:
                state.absmax = scales

    def after_training(self, module: nn.Module) -> None:
        """Undo `before_training`, except for the format of the weight, which the next evaluation converts."""
        if _PACKED_BEFORE in module.__dict__:
            before = module.__dict__.pop(_PACKED_BEFORE)
            if _PACKS in module.__dict__:
                module.__dict__[_PACKS] = before


def _state_of(layer: nn.Module) -> Any:
    """The quantization state of a 4-bit weight; if a copy of the weight lost it, that of the layer."""
    state = getattr(layer._parameters["weight"], "quant_state", None)
    return layer.__dict__.get("quant_state") if state is None else state


def _scales(state: Any, first: int, last: int) -> Tensor:
    """The scales of blocks `first` to `last` in float32, dequantized if they are quantized."""
    scales = state.absmax[first:last]
    if not state.nested:
        return cast(Tensor, scales.to(torch.float32))
    outer = state.state2
    block = torch.arange(first, last, device=scales.device) // outer.blocksize
    return cast(Tensor, (outer.code[scales.long()] * outer.absmax[block] + state.offset).to(torch.float32))


def _from_cpu_form(data: Tensor, state: Any, start: int, stop: int) -> Tensor:
    """Rows of a weight (O, I/2) with the byte layout (groups of rows, I/2, row of the group)."""
    width = 2 * data.shape[1]
    first, last = start // CPU_GROUP, -(-stop // CPU_GROUP)
    groups = data[first * CPU_GROUP : last * CPU_GROUP].reshape(-1, width // 2, CPU_GROUP)
    pairs = torch.cat([groups & 15, groups >> 4], -1).view(-1, width // 2, CPU_GROUP, 2)
    codes = pairs.transpose(1, 2).reshape(-1, width)[start - first * CPU_GROUP :][: stop - start]
    scales = state.absmax[:, start:stop].t().to(torch.float32).repeat_interleave(state.blocksize, 1)
    return cast(Tensor, state.code.to(torch.float32)[codes.long()] * scales)


class Int8Storage(QuantizedStorage):
    """bitsandbytes LLM.int8: one byte per value, one scale per row. Its forward may also round the activations."""

    kind = "bitsandbytes int8"
    library = BITSANDBYTES
    attributes = ("state", "index", "source_cls")

    def owns(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        if not is_a(weight, BITSANDBYTES, "Int8Params") or weight.dtype != torch.int8:
            return False
        return _row_scales(layer) is not None and tuple(weight.shape) == features(layer)

    def dense_class(self, layer: nn.Module) -> type[nn.Module]:
        return _source_class(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        scales = cast(Tensor, _row_scales(layer))[rows].to(torch.float32).mul(1 / 127)
        block = cast(Tensor, layer.weight).data[rows].to(torch.float32) * scales[:, None]
        return block if into is None else into.copy_(block)

    def unfinished(self, layer: Any) -> bool:
        return is_a(layer, BITSANDBYTES, "Linear8bitLt") and not layer.state.has_fp16_weights


def _row_scales(layer: nn.Module) -> Tensor | None:
    """The scales, which move from the weight to the layer's state in the first forward."""
    scales = getattr(layer._parameters["weight"], "SCB", None)
    return getattr(layer.state, "SCB", None) if scales is None else scales


def _source_class(layer: nn.Module) -> type[nn.Module]:
    """The class that transformers replaced by the bitsandbytes layer."""
    source = layer.__dict__.get("source_cls", nn.Linear)
    return source if issubclass(source, (nn.Linear, Conv1D)) else nn.Linear
