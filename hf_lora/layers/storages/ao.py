"""torchao: tensor subclasses that represent a dense weight, in an ordinary layer.

This file does not import torchao: a program with such weights has imported it. Values are read with torchao's
dequantization.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..class_swap import unwrap_class
from .quantized import QuantizedStorage, comes_from, features

TORCHAO = "torchao"


class TorchaoStorage(QuantizedStorage):
    """Weights of torchao in an ordinary `nn.Linear`."""

    kind = "torchao"
    library = TORCHAO
    attributes = ("extra_repr",)

    def owns(self, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        known = isinstance(layer, nn.Linear) and comes_from(type(weight), TORCHAO)
        if not known or type(weight).dequantize is Tensor.dequantize or _rounds_activations(weight):
            return False
        return tuple(weight.shape) == features(layer)

    def form(self, layer: nn.Module) -> str:
        weight: Any = layer.weight
        dtype = getattr(weight, "target_dtype", getattr(getattr(weight, "qdata", None), "dtype", None))
        return f"torchao {str(dtype).removeprefix('torch.') if dtype else type(weight).__name__}"

    def dense_class(self, layer: nn.Module) -> type[nn.Module]:
        return unwrap_class(type(layer))

    def block_rows(self, layer: nn.Module, wanted: int) -> int:
        """All rows if the packed weight cannot be sliced: it is then dequantized whole."""
        weight: Any = layer.weight
        count: int = weight.shape[0]
        try:
            return (
                wanted if weight.detach()[: min(wanted, count)].dequantize().shape[0] == min(wanted, count) else count
            )
        except (NotImplementedError, AssertionError, RuntimeError, ValueError):
            return count

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        weight: Any = layer.weight.detach()  # type: ignore[operator]
        start, stop, _ = rows.indices(weight.shape[0])
        whole = (start, stop) == (0, weight.shape[0])
        block = (weight if whole else weight[start:stop]).dequantize()
        return block.to(torch.float32) if into is None else into.copy_(block)

    def refuse(self, layer: nn.Module) -> str | None:
        weight = layer._parameters.get("weight")
        if comes_from(type(weight), TORCHAO) and _rounds_activations(weight):
            return "its activations are quantized as well, and no gradient passes through them"
        return None

    def unshardable(self, parameter: Tensor) -> bool:
        return comes_from(type(parameter), TORCHAO)  # they fail under `fully_shard`


def _rounds_activations(weight: object) -> bool:
    """Whether a torchao weight also quantizes its inputs: no gradient then passes to them."""
    chosen = getattr(weight, "act_quant_kwargs", None), getattr(weight, "activation_quantization", None)
    return any(each is not None for each in chosen)
