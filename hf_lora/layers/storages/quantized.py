"""Quantised linear layers: what the backends share, read row by row as the backend itself would multiply by it.

A quantised layer computes its own product; LoRA is added to what it gives. Here stand what all backends have in common
and the layer of a backend that is not known; each known backend has a file of its own.

Nothing is ever written back. The values of a quantised weight lie on a coarse grid, an update is smaller than half a
step of it nearly everywhere, and rounding the sum to the grid again would take most of the update away. Merging makes
a dense layer instead: see adapt/dequantize.py.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import MergeError
from ..class_swap import rebase, unwrap_class
from ..contract import Storage
from ..distributed import is_sharded


class QuantizedStorage(Storage):
    """What the backends share: the layer is a linear one, multiplies by itself, and is never written to."""

    quantized = True
    attributes: tuple[str, ...] = ()
    """What the backend keeps on a layer and a dense one has no use for."""

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return features(layer)

    def form(self, layer: nn.Module) -> str:
        """Which of the backend's forms the weight has: values of one form are not those of another."""
        return self.kind

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        raise MergeError(f"its weight is quantised ({self.kind}); rounding a sum to that form would lose the update")

    def keep(self, layer: nn.Module) -> Tensor:
        raise MergeError(f"its weight is quantised ({self.kind}), and is never written to")

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        """In which dtype the layer multiplies whatever its input is; None where it has none of its own."""
        own = layer.__dict__.get("compute_dtype")  # so called by more than one backend
        return own if isinstance(own, torch.dtype) else None

    def dense_class(self, layer: Any) -> type[nn.Module]:
        """The class of the layer once its weight is dense."""
        return nn.Linear

    def make_dense(self, layer: Any, weight: nn.Parameter) -> None:
        """Give `layer`, in place, a dense weight (O, I) and a class that multiplies by it.

        What stood as a `Conv1D` before it was quantised is one again, and the weight (I, O) then.
        """
        cls = self.dense_class(layer)
        for name in self.attributes:
            layer.__dict__.pop(name, None)
        hooks = layer._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if _library(getattr(hook, "hook", hook)) == self.library]:
            del hooks[key]
        del layer.weight
        layer.weight = weight
        if layer.bias is not None:  # a backend may have cast it to the dtype of an input
            layer.bias.data = layer.bias.data.to(weight.dtype)
        if issubclass(cls, Conv1D):
            layer.nx, layer.nf = layer.__dict__.pop("in_features"), layer.__dict__.pop("out_features")
        rebase(layer, cls)


class OpaqueStorage(QuantizedStorage):
    """A quantised linear layer of another kind: it trains by its own forward, and cannot be read."""

    kind = "opaque"
    readable = False

    def owns(self, layer: nn.Module) -> bool:
        return _is_packed_linear(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        raise MergeError(f"{why_unreadable(layer)}")


def why_unreadable(layer: nn.Module) -> str:
    """What is to be said of a layer that `OpaqueStorage` owns, where its weight is wanted."""
    weight = layer._parameters.get("weight")
    kept = "" if weight is None else f" with a weight kept as {type(weight).__name__} of {weight.dtype}"
    kind = unwrap_class(type(layer))
    return f"{kind.__module__}.{kind.__name__}{kept} is a quantised layer whose form is not known"


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a parameter holds codes rather than numbers."""
    if tensor is None or is_sharded(tensor):
        return False
    ordinary = type(tensor) in (nn.Parameter, Tensor, nn.Buffer)
    return not ordinary or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2


def _is_packed_linear(layer: nn.Module) -> bool:
    """in_features, out_features, codes in place of a weight, and a forward of one tensor."""
    counts = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(n, int) for n in counts) or hasattr(layer, "parametrizations"):
        return False
    weight = layer._parameters.get("weight")
    if weight is not None:
        if not is_packed(weight):
            return False
        if type(weight) is nn.Parameter and unwrap_class(type(layer)).forward is nn.Linear.forward:  # type: ignore[attr-defined]
            return False  # integers that an ordinary product would take for numbers
    held = [*layer._parameters.values(), *layer._buffers.values()]
    if not any(is_packed(t) and cast(Tensor, t).dim() > 1 for t in held):
        return False
    taken = list(inspect.signature(unwrap_class(type(layer)).forward).parameters.values())[1:]  # type: ignore[attr-defined]
    needed = [p for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1 or (not needed and any(p.kind is p.VAR_POSITIONAL for p in taken))


def features(layer: Any) -> tuple[int, int]:
    """(O, I): the shape of the weight that the layer stands for."""
    return layer.out_features, layer.in_features


def is_a(value: Any, library: str, name: str) -> bool:
    """Whether `value` is of the class `name` of a library that may not be there."""
    return comes_from(type(value), library, name)


def comes_from(cls: Any, library: str, name: str | None = None) -> bool:
    """Whether `cls` is a class of `library`, or derived from one; the one called `name` where that is given."""
    return _comes_from(cls, library, name)


@functools.lru_cache(maxsize=1024)  # a model has thousands of layers, of a few classes
def _comes_from(cls: Any, library: str, name: str | None) -> bool:
    return any(c.__module__.partition(".")[0] == library and name in (None, c.__name__) for c in cls.__mro__)


def _library(value: Any) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]
