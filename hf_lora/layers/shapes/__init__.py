"""The shapes, one file each: how two factors act on the output and the weight of a kind of layer.

In: a module, or a layer and its input. Out: the declaration of the factors, their update, or rows of B A in the layout
of the weight. `SHAPES` maps names to shapes; a layer gets the first shape that claims it.
"""

from __future__ import annotations

from torch import nn

from ..contract import Shape
from ..registry import Registry
from .convolution import ConvShape
from .embedding import EmbeddingShape
from .linear import LinearShape
from .matrix import runs_forward_of
from .transposed import TransposedShape

SHAPES: Registry[Shape] = Registry(
    "shape",
    {
        "linear": LinearShape(),
        "transposed": TransposedShape(),
        "embedding": EmbeddingShape(),
        "convolution": ConvShape(),
    },
)

__all__ = ["SHAPES", "runs_forward_of", "shape_of"]


def shape_of(layer: nn.Module) -> Shape | None:
    """The shape that claims `layer`; None if its forward is not supported, so that LoRA could be wrong."""
    return next((shape for shape in SHAPES.search() if shape.claims(layer)), None)
