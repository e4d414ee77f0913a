"""LoftQ (Li et al. 2023, arXiv:2310.08659): scaling · B A is what a weight lost when it was quantized."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from ...errors import StateError
from ..contract import Shape
from ..storages import quantization_of
from .base import Init, InitCall
from .decompositions import Pissa, refuse_others


class Loftq(Init):
    """The best approximation of rank R of the difference to the checkpoint's weight.

    This is one iteration of the method. Further ones would quantize another base, and this one keeps its codes; so the
    file of an adapter is plain LoRA for the quantized base.
    """

    needs: ClassVar[Literal["original"]] = "original"

    def of_file(self) -> None:
        """A file of PEFT that names it belongs to a base that PEFT quantized in its own way."""
        return None

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        if quantization_of(layer) is None:
            return "LoftQ starts from what a weight lost when it was quantized, and this one is not quantized"
        return super().refuse(layer, shape) or refuse_others(shape)

    def __call__(self, call: InitCall) -> dict[str, Tensor]:
        assert call.original is not None
        values, weight, original = call.zeros(), call.read(), call.original()
        if original.shape != weight.shape:
            raise StateError(
                f"LoftQ: the layer's weight is {list(weight.shape)}, and {list(original.shape)} in the checkpoint. "
                "Pass original=…, a function from a layer's name to its weight (O, I) before it was quantized."
            )
        lost = original.to(weight.device, weight.dtype) - weight
        r = min(call.specs["lora_A"].shape[0], *lost.shape)
        a, b = Pissa().factors(lost, r, call.scaling, "")
        values["lora_A"][:r], values["lora_B"][:, :r] = a, b
        return values
