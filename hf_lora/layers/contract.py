"""The contract: what a shape, a method and a storage answer, and the declaration of a factor. Nothing here has state.

A *shape* knows how factors act on a kind of layer, a *method* belongs to an adapter and says what its factors do to
the layer's output and weight, a *storage* knows how the weight's bits are kept. They meet in `base.LoraLayer`, and
obey the law that stands there.

Shapes in docstrings: B batch, T tokens, I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .ops import to_float64

Update = Callable[[Tensor, slice], Tensor]
"""(block of rows of a stored tensor, which rows) -> the block as merged; it may be overwritten."""


def same(tensor: Tensor) -> Tensor:
    """The layout on disk of a factor that is written as it is."""
    return tensor


@dataclass(frozen=True)
class FactorSpec:
    """The declaration of one tensor of an adapter at one module.

    Args:
        shape: of the whole tensor, in memory.
        key: its name on disk, below the module's path; None for a tensor that is in no file.
        axes: what each axis runs along, a letter each: R rank, I inputs, O outputs; "" where that is not known.
        trainable: whether an active adapter trains it.
        joins: 0 for a tensor of its own in a file; else it follows the one of the same key there, along the axis of
            the ranks, multiplied by this number.
        to_disk, from_disk: the layout in a file and back, views where possible.
    """

    shape: tuple[int, ...]
    key: str | None
    axes: str = ""
    trainable: bool = True
    joins: int = 0
    to_disk: Callable[[Tensor], Tensor] = same
    from_disk: Callable[[Tensor], Tensor] = same

    @property
    def shape_on_disk(self) -> tuple[int, ...]:
        if self.to_disk is same:
            return self.shape
        return tuple(self.to_disk(torch.empty(self.shape, device="meta")).shape)


_spec = functools.lru_cache(maxsize=256)(FactorSpec)
"""Layers of one size, of which a model has hundreds, share their declarations."""


class Shape(ABC):
    """How two factors act on one kind of layer. Stateless: one instance a kind."""

    looks_up = False
    """Whether the layer's input are indices, of which rows are taken: nothing is multiplied, and nothing dropped."""
    fan_in_fan_out = False
    """Whether the weight is stored (I, O), which PEFT asks its users for."""
    keys: dict[str, str] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    """Factor -> its name on disk, below the layer's path."""
    is_matrix = False
    """Whether the layer multiplies its input (…, I) by one matrix, as `ops.lora_products` does."""

    mixin: Any = None
    """Of a module with several weights, whose own forward multiplies by them: the class, derived from
    `views.LoraViews`, whose forward does so with adapters. None where the layer is its own site."""

    def sites(self, layer: nn.Module) -> Sequence[Any]:
        """The weights that take factors: the layer itself, or a `views.View` of each."""
        return [layer]

    @abstractmethod
    def claims(self, layer: nn.Module) -> bool:
        """Whether this shape knows what the layer's forward computes."""

    def refuse(self, layer: nn.Module) -> str | None:
        """Why this layer, though of the right class, cannot be adapted; None where it can."""
        return None

    def refuse_rank(self, layer: nn.Module, r: int) -> str | None:
        """Why this layer cannot have factors of rank `r`; None where it can."""
        return None

    def refuse_folding(self, layer: nn.Module) -> str | None:
        """Why no update can be folded into this layer's weight, though it acts beside it; None where one can."""
        return None

    @abstractmethod
    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B as PEFT stores them; from attributes, since the weight may be packed or sharded."""

    def prefix(self, layer: Any) -> str:
        """What stands before the names on disk of a site's factors: those of one module would clash without."""
        return ""

    def specs(self, layer: nn.Module, r: int) -> dict[str, FactorSpec]:
        """The declaration of A and B."""
        a, b = self.shapes(layer, r)
        return {"lora_A": _spec(a, self.keys["lora_A"], "RI"), "lora_B": _spec(b, self.keys["lora_B"], "OR")}

    @abstractmethod
    def features(self, layer: nn.Module) -> tuple[int, int]:
        """(I, O) as a person would name them."""

    @abstractmethod
    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        """scaling · B A x, scaled where it is R wide, without base product and bias; in the dtype of its products."""

    def weight(self, layer: Any, x: Tensor) -> Tensor | None:
        """The weight (O, I) with which the whole forward of the layer is `F.linear(x, weight, bias)`.

        None where it is something else, or not in memory as a plain tensor: then the layer's own forward has to run.
        """
        return None

    @abstractmethod
    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is B A in the layout of the layer's weight, flattened behind its first axis."""

    def delta(self, layer: Any, name: str, rows: slice) -> Tensor:
        """Rows of B A in the layout of the layer's weight; float64 where the device has it."""
        left, right = self.factors(layer, name)
        return to_float64(left[rows]) @ to_float64(right)

    @abstractmethod
    def norm(self, weight: Tensor) -> Tensor:
        """The norm of the weights of each output: (O,)."""

    @abstractmethod
    def on_weight(self, layer: Any, v: Tensor, rows: slice) -> Tensor:
        """v (O,) as a factor that multiplies rows of the weight by outputs."""

    @abstractmethod
    def on_output(self, layer: Any, v: Tensor) -> Tensor:
        """v (O,) as a factor that multiplies the layer's output."""


class Method(ABC):
    """What an adapter's factors do. Stateless: one instance a method, chosen for each adapter."""

    kind = ""
    keys: dict[str, str] = {}
    """Factor -> its name on disk, of those besides the shape's: `{"lora_magnitude_vector": "lora_magnitude_vector"}`.
    A factor's name begins with `lora_`."""
    additive = False
    """Whether adapters of this method add up, also with those of other additive methods."""

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        """Why this method cannot act on a layer; None where it can."""
        return None

    def refuse_resizing(self, layer: Any) -> str | None:
        """Why the layer cannot get another number of rows while an adapter of this method is there; None where it can.

        What `start` gives for the new size is taken for the new rows.
        """
        return None

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        """The declaration of all factors of an adapter of rank `r` on `layer`, which need not be adapted yet."""
        return shape.specs(layer, r)

    def declare(self, layer: Any, shape: Shape, r: int) -> dict[str, FactorSpec]:
        """`factors`, with the names on disk as they are below the module's path."""
        specs = self.factors(layer, shape, r)
        if not (prefix := shape.prefix(layer)):
            return specs
        return {n: s if s.key is None else replace(s, key=prefix + s.key) for n, s in specs.items()}

    def refuse_folding(self, layer: Any) -> str | None:
        """Why an adapter of this method cannot be folded into the layer's weight; None where it can."""
        return None

    def start(self, layer: Any, name: str) -> dict[str, Tensor]:
        """Values of a new adapter's factors that come from the weight; its A and B are there already."""
        return {}

    @abstractmethod
    def forward(self, layer: Any, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """The layer's output with the adapters `names` in it; `layer.product(x)` is the output without."""

    @abstractmethod
    def fold(self, layer: Any, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        """Rows of the weight with the adapters in it; `block` (float64 where the device has it) may be overwritten."""

    def folding(self, layer: Any, names: tuple[str, ...]) -> Update:
        """`fold` of one layer as a function of (block, rows), for one block after another."""
        return lambda block, rows: self.fold(layer, block, names, rows)

    def folding_bias(self, layer: Any, names: tuple[str, ...]) -> Update | None:
        """The same of the bias, a vector (O,); None where the adapters leave it alone.

        A layer without a bias is one that `refuse_folding` has to refuse.
        """
        return None


class Storage(ABC):
    """How a backend keeps a layer's weight."""

    kind = ""
    quantized = False
    """Whether the layer holds codes in place of numbers, so that only its own forward can multiply by them."""
    readable = True
    library: str | None = None
    """The optional library whose weights these are; None where there is none.

    `before_training` and `after_training` are called only where it was imported.
    """

    @abstractmethod
    def owns(self, layer: nn.Module) -> bool:
        """Whether the layer's weight is kept this way."""

    def block_rows(self, layer: nn.Module, wanted: int) -> int:
        """How many rows to read at a time where `wanted` would be right."""
        return wanted

    @abstractmethod
    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        """The shape of the weight as `read` returns it."""

    @abstractmethod
    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        """Rows of the weight, a copy: float32, or `into`, filled, in its own dtype."""

    @abstractmethod
    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        """Round `block` once into the stored rows.

        Raises:
            MergeError: the storage cannot hold a value (not finite after rounding).
        """

    def keep(self, layer: nn.Module) -> Tensor:
        """What `put_back` needs to restore every bit of the weight after `write`."""
        return cast(Tensor, layer.weight).detach().clone()

    def put_back(self, layer: nn.Module, kept: Tensor) -> None:
        """Restore what `keep` returned, which stays as it is."""
        cast(Tensor, layer.weight).data.copy_(kept)

    def refuse(self, layer: nn.Module) -> str | None:
        """Why a weight of this backend cannot be adapted, though `owns` denies it; None where it is another's."""
        return None

    def unfinished(self, layer: nn.Module) -> bool:
        """Whether the layer is of this backend and its weight, of floating-point numbers, was never converted."""
        return False

    def before_training(self, module: nn.Module) -> None:
        """See that gradients go on passing through `module`, which may be of any kind, also after an evaluation."""
        return None

    def after_training(self, module: nn.Module) -> None:
        """Undo `before_training`."""
        return None

    def numel(self, parameter: Tensor) -> int | None:
        """How many elements a packed parameter of this backend stands for; None for any other parameter."""
        return None

    def unshardable(self, parameter: Tensor) -> bool:
        """Whether the parameter is of this backend, and FSDP2 fails to split it though it is of a float dtype."""
        return False
