"""Quantized linear layers: the base class of all backends, and layers of unknown backends.

A quantized layer computes its own product, and the LoRA update is added to it. The weight is read row by row, with the
values that the backend multiplies by. Each known backend has its own file.

Quantized weights are never written. Their values lie on a coarse grid, and an update is smaller than half a grid step
nearly everywhere, so rounding the sum to the grid would lose most of the update. Merging creates a dense layer
instead: see adapt/dequantize.py.
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
    """Base class: a linear layer with its own product, whose weight is never written."""

    quantized = True
    attributes: tuple[str, ...] = ()
    """Attributes of the backend's layers that a dense layer does not need."""

    def shape(self, layer: nn.Module) -> tuple[int, ...]:
        return features(layer)

    def form(self, layer: nn.Module) -> str:
        """The quantization format of the weight; the same weight has other values in another format."""
        return self.kind

    def write(self, layer: nn.Module, rows: slice, block: Tensor) -> None:
        raise MergeError(f"its weight is quantized ({self.kind}); rounding the sum to that would lose the update")

    def keep(self, layer: nn.Module) -> Tensor:
        raise MergeError(f"its weight is quantized ({self.kind}) and is never written")

    def compute_dtype(self, layer: nn.Module) -> torch.dtype | None:
        """The dtype in which the layer multiplies, independent of its input; None if it depends on the input."""
        dtype = layer.__dict__.get("compute_dtype")  # several backends use this name
        return dtype if isinstance(dtype, torch.dtype) else None

    def dense_class(self, layer: nn.Module) -> type[nn.Module]:
        """The class of the layer after it becomes dense."""
        return nn.Linear

    def make_dense(self, layer: Any, weight: nn.Parameter) -> None:
        """Give `layer`, in place, a dense weight (O, I) and the class for it.

        A layer that was a `Conv1D` before quantization becomes one again, with weight (I, O).
        """
        cls = self.dense_class(layer)
        for name in self.attributes:
            layer.__dict__.pop(name, None)
        hooks = layer._load_state_dict_pre_hooks
        for key in [k for k, hook in hooks.items() if _library(getattr(hook, "hook", hook)) == self.library]:
            del hooks[key]
        del layer.weight
        layer.weight = weight
        bias = layer._parameters["bias"]
        if bias is not None:  # a backend may have cast it to the dtype of its input
            bias.data = bias.data.to(weight.dtype)
        if issubclass(cls, Conv1D):
            layer.nx, layer.nf = layer.__dict__.pop("in_features"), layer.__dict__.pop("out_features")
        rebase(layer, cls)


class OpaqueStorage(QuantizedStorage):
    """A quantized linear layer of an unknown backend: it trains with its own forward, and cannot be read."""

    kind = "opaque"
    readable = False

    def owns(self, layer: nn.Module) -> bool:
        return _is_packed_linear(layer)

    def read(self, layer: nn.Module, rows: slice, into: Tensor | None = None) -> Tensor:
        raise MergeError(f"{why_unreadable(layer)}")


def why_unreadable(layer: nn.Module) -> str:
    """Why the weight of a layer that `OpaqueStorage` owns cannot be read."""
    weight = layer._parameters.get("weight")
    stored = "" if weight is None else f" (weight: {type(weight).__name__} of {weight.dtype})"
    kind = unwrap_class(type(layer))
    return f"{kind.__module__}.{kind.__name__}{stored} is a quantized layer of an unknown format"


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a parameter holds quantized codes."""
    if tensor is None or is_sharded(tensor):
        return False
    ordinary = type(tensor) in (nn.Parameter, Tensor, nn.Buffer)
    return not ordinary or not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2


def _is_packed_linear(layer: nn.Module) -> bool:
    """Whether it has in_features, out_features, codes instead of a weight, and a forward of one tensor."""
    counts = (getattr(layer, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(n, int) for n in counts) or hasattr(layer, "parametrizations"):
        return False
    weight = layer._parameters.get("weight")
    if weight is not None:
        if not is_packed(weight):
            return False
        if type(weight) is nn.Parameter and unwrap_class(type(layer)).forward is nn.Linear.forward:  # type: ignore[attr-defined]
            return False  # integers that an ordinary product would use as numbers
    held = [*layer._parameters.values(), *layer._buffers.values()]
    if not any(is_packed(t) and cast(Tensor, t).dim() > 1 for t in held):
        return False
    taken = list(inspect.signature(unwrap_class(type(layer)).forward).parameters.values())[1:]  # type: ignore[attr-defined]
    needed = [p for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(needed) == 1 or (not needed and any(p.kind is p.VAR_POSITIONAL for p in taken))


def features(layer: Any) -> tuple[int, int]:
    """(O, I): the shape of the weight that the layer represents."""
    return layer.out_features, layer.in_features


def is_a(value: object, library: str, name: str) -> bool:
    """Whether `value` is an instance of the class `name` of a library that may not be installed."""
    return comes_from(type(value), library, name)


def comes_from(cls: type, library: str, name: str | None = None) -> bool:
    """Whether `cls` is a class of `library` (with that `name`, if given) or derived from one."""
    return _comes_from(cls, library, name)


@functools.lru_cache(maxsize=1024)  # a model has thousands of layers but few classes
def _comes_from(cls: type, library: str, name: str | None) -> bool:
    return any(c.__module__.partition(".")[0] == library and name in (None, c.__name__) for c in cls.__mro__)


def _library(value: object) -> str:
    return str(getattr(value, "__module__", "")).partition(".")[0]
