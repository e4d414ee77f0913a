"""The interfaces of shapes, methods and storages, and the declaration of a factor. Nothing here has state.

A *shape* defines how factors act on a kind of layer. A *method* belongs to an adapter and defines how its factors
change the output and the weight of the layer. A *storage* defines how a backend stores the weight. `site.Site` uses
all three, and its docstring states the law that they obey.

Shapes in docstrings: B batch, T tokens, I in features, O out features, R rank, V vocabulary.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from .ops import to_float64

Update = Callable[[Tensor, slice], Tensor]
"""(block of rows of a stored tensor, rows) -> the merged block; it may overwrite the block."""


def same(tensor: Tensor) -> Tensor:
    """The layout of a factor whose file holds it as memory does."""
    return tensor


@dataclass(frozen=True)
class FactorSpec:
    """The declaration of one tensor that an adapter has at one module.

    Args:
        shape: shape of the whole tensor in memory.
        key: name in the file, relative to the module's path; None for a tensor that is not saved.
        axes: one letter per axis: R rank, I inputs, O outputs; "" if not known.
        trainable: whether an active adapter trains it.
        joins: 0 for a tensor with its own key in the file. Otherwise it is multiplied by this number and concatenated
            along the rank axis to the tensor with the same key.
        to_disk: converts the layout to that of the file; a view where possible.
        from_disk: the reverse.
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
"""Layers of the same size (a model has hundreds) share their declarations."""


class Inputs(NamedTuple):
    """What `Method.before` gets of a call.

    Args:
        ids: (B, T) tokens.
        positions: (B, T) their positions, if the call has them.
        past: the number of tokens in the cache before them.
    """

    ids: Tensor
    positions: Tensor | None
    past: int


class AdaptedLayer(Protocol):
    """A weight with factors, as shapes and methods see it. `site.Site` implements it.

    Attributes that are not listed are those of the layer's own class.
    """

    @property
    def _lora(self) -> Any: ...

    @property
    def weight(self) -> Any: ...

    @property
    def bias(self) -> Any: ...

    @property
    def training(self) -> bool: ...

    def product(self, x: Tensor) -> Tensor: ...

    def factor(self, kind: str, name: str) -> Tensor: ...

    def __getattr__(self, name: str, /) -> Any: ...


class Shape(ABC):
    """How two factors act on one kind of layer. Stateless: one instance per kind."""

    looks_up = False
    """Whether the input holds indices of rows, as for an embedding: nothing is multiplied, and dropout is off."""
    fan_in_fan_out = False
    """Whether the weight is stored as (I, O). In PEFT the user sets this."""
    by_input = False
    """Whether the weight has one row per input, so that the weights of an output are a column."""
    keys: dict[str, str] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    """Factor -> its name in the file, relative to the layer's path."""
    is_matrix = False
    """Whether the layer multiplies its input (…, I) by one matrix, as `ops.lora_products` does."""

    mixin: Any = None
    """For a module whose forward multiplies by several weights: a subclass of `views.LoraViews` whose forward does the
    same with adapters. None if the layer is its own site."""

    def sites(self, layer: nn.Module) -> Sequence[Any]:
        """The weights that can have factors: the layer itself, or a `views.View` of each."""
        return [layer]

    @abstractmethod
    def claims(self, layer: nn.Module) -> bool:
        """Whether the forward of the layer is the one that this shape supports."""

    def refuse(self, layer: nn.Module) -> str | None:
        """Why a layer of the right class still cannot be adapted; None if it can."""
        return None

    def refuse_rank(self, layer: nn.Module, r: int) -> str | None:
        """Why this layer cannot have factors of rank `r`; None if it can."""
        return None

    def groups(self, layer: nn.Module) -> int:
        """The number of groups of inputs and outputs; the weight connects only those of one group."""
        return 1

    def refuse_folding(self, layer: nn.Module) -> str | None:
        """Why no update can be folded into this layer's weight, though it works unmerged; None if it can."""
        return None

    @abstractmethod
    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B as PEFT stores them; from attributes, because the weight may be packed or sharded."""

    def prefix(self, layer: Any) -> str:
        """Prefix of the file names of a site's factors, so that the sites of one module do not clash."""
        return ""

    def specs(self, layer: nn.Module, r: int) -> dict[str, FactorSpec]:
        """The declaration of A and B."""
        a, b = self.shapes(layer, r)
        return {"lora_A": _spec(a, self.keys["lora_A"], "RI"), "lora_B": _spec(b, self.keys["lora_B"], "OR")}

    @abstractmethod
    def features(self, layer: nn.Module) -> tuple[int, int]:
        """(I, O) for reports."""

    @abstractmethod
    def update(self, layer: AdaptedLayer, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        """scaling · B A x without base product and bias; scaled at width R, in the dtype of its products."""

    def weight(self, layer: AdaptedLayer, x: Tensor) -> Tensor | None:
        """The weight (O, I), if the whole forward of the layer is `F.linear(x, weight, bias)`.

        None if the forward differs or the weight is not a plain tensor in memory: then the layer's forward must run.
        """
        return None

    @abstractmethod
    def factors(self, layer: AdaptedLayer, name: str) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is B A in the layout of the weight, flattened after its first axis."""

    def delta(self, layer: AdaptedLayer, name: str, rows: slice) -> Tensor:
        """Rows of B A in the layout of the weight; float64 if the device supports it."""
        left, right = self.factors(layer, name)
        return to_float64(left[rows]) @ to_float64(right)

    @abstractmethod
    def norm(self, weight: Tensor) -> Tensor:
        """The norm of the weights of each output, (O,)."""

    @abstractmethod
    def on_weight(self, layer: AdaptedLayer, v: Tensor, rows: slice) -> Tensor:
        """v (O,) as a factor that multiplies rows of the weight by outputs."""

    @abstractmethod
    def on_output(self, layer: AdaptedLayer, v: Tensor) -> Tensor:
        """v (O,) as a factor that multiplies the layer's output."""


class Method(ABC):
    """How the factors of an adapter change a layer. Stateless: one instance per method; each adapter has a method."""

    kind = ""
    keys: dict[str, str] = {}
    """Factor -> its name in the file, for factors in addition to those of the shape, such as
    `{"lora_magnitude_vector": "lora_magnitude_vector"}`. Names of factors begin with `lora_`."""
    additive = False
    """Whether updates of several adapters of this method can be summed."""
    of_product = False
    """Whether A and B matter only through their product B A. Then factors of rank 2 R can hold a difference of two
    products, as the files of some initializations do."""

    acts_everywhere = True
    """Whether it acts on every token. Otherwise nothing can be subtracted from the base where it acts."""
    sees_calls = False
    """Whether `before` is called before each call of the model."""

    def refuse(self, layer: Any, shape: Shape) -> str | None:
        """Why this method cannot act on a layer; None if it can."""
        return None

    def refuse_model(self, model: nn.Module) -> str | None:
        """Why this method cannot act in a model; None if it can."""
        return None

    def before(self, config: LoraConfig, inputs: Inputs, former: Any) -> tuple[Tensor, object]:
        """What its layers must know about a call: they read it with `calls.known`.

        Args:
            config: the adapter's.
            former: what this returned in the former call with the same cache; None in the first.

        Returns:
            what the layers must know, and what the next call with the same cache must know.
        """
        raise NotImplementedError

    def refuse_resizing(self, layer: AdaptedLayer) -> str | None:
        """Why the layer cannot change its number of rows while it has an adapter of this method; None if it can.

        New rows get the values that `start` returns for the new size.
        """
        return None

    def factors(self, layer: nn.Module, shape: Shape, r: int) -> dict[str, FactorSpec]:
        """The declaration of all factors of an adapter of rank `r` on `layer`, adapted or not."""
        return shape.specs(layer, r)

    def declare(self, layer: Any, shape: Shape, r: int) -> dict[str, FactorSpec]:
        """`factors`, with file names relative to the module's path."""
        specs = self.factors(layer, shape, r)
        if not (prefix := shape.prefix(layer)):
            return specs
        return {n: s if s.key is None else replace(s, key=prefix + s.key) for n, s in specs.items()}

    def refuse_folding(self, layer: AdaptedLayer) -> str | None:
        """Why an adapter of this method cannot be folded into the layer's weight; None if it can."""
        refused: str | None = layer._lora.shape.refuse_folding(layer)
        return refused

    def start(self, layer: AdaptedLayer, name: str) -> dict[str, Tensor]:
        """Initial values of factors that are computed from the weight; A and B of the new adapter exist already."""
        return {}

    @abstractmethod
    def forward(self, layer: AdaptedLayer, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """The output of the layer with the adapters `names`; `layer.product(x)` is the output without them."""

    @abstractmethod
    def fold(self, layer: AdaptedLayer, block: Tensor, names: tuple[str, ...], rows: slice) -> Tensor:
        """Rows of the weight with the adapters folded in. May overwrite `block` (float64 if the device has it)."""

    def folding(self, layer: AdaptedLayer, names: tuple[str, ...]) -> Update:
        """`fold` of one layer as a function of (block, rows), called for each block."""
        return lambda block, rows: self.fold(layer, block, names, rows)

    def folding_bias(self, layer: AdaptedLayer, names: tuple[str, ...]) -> Update | None:
        """The same for the bias (O,); None if the adapters do not change it.

        `refuse_folding` must refuse a layer without a bias.
        """
        return None


class Storage(ABC):
    """How a backend stores the weight of a layer."""

    kind = ""
    quantized = False
    """Whether the layer holds quantized codes, so that only its own forward can multiply by the weight."""
    readable = True
    library: str | None = None
    """The optional library that these weights belong to; None for PyTorch.

    `before_training` and `after_training` are called only if it is imported.
    """

    @abstractmethod
    def owns(self, layer: nn.Module) -> bool:
        """Whether the layer's weight is stored this way."""

    def block_rows(self, layer: nn.Module, wanted: int) -> int:
        """How many rows to read at a time; `wanted` unless the backend needs another number."""
        return wanted

    @abstractmethod
    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        """The shape of the weight as `read` returns it."""

    @abstractmethod
    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        """A copy of rows of the weight: float32, or written to `into` in its dtype."""

    @abstractmethod
    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        """Round `block` once into the stored rows.

        Raises:
            MergeError: the storage cannot hold a value (not finite after rounding).
        """

    def keep(self, layer: nn.Module) -> Tensor:
        """The data that `put_back` needs to restore every bit of the weight after `write`."""
        return cast(Tensor, layer.weight).detach().clone()

    def put_back(self, layer: nn.Module, kept: Tensor) -> None:
        """Restore the weight from the result of `keep`, which does not change."""
        cast(Tensor, layer.weight).data.copy_(kept)

    def refuse(self, layer: nn.Module) -> str | None:
        """Why a weight of this backend that `owns` rejects cannot be adapted; None for weights of other backends."""
        return None

    def unfinished(self, layer: nn.Module) -> bool:
        """Whether the layer belongs to this backend but its floating-point weight was never converted."""
        return False

    def before_training(self, module: nn.Module) -> None:
        """Make sure that gradients still pass through `module` (of any class) after an evaluation."""
        return None

    def after_training(self, module: nn.Module) -> None:
        """Undo `before_training`."""
        return None

    def numel(self, parameter: Tensor) -> int | None:
        """How many elements a packed parameter of this backend represents; None for any other parameter."""
        return None

    def unshardable(self, parameter: Tensor) -> bool:
        """Whether FSDP2 fails to shard this parameter of the backend although its dtype is floating-point."""
        return False
