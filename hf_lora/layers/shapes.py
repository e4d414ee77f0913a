"""The shapes: how two factors act on a linear layer, a transposed one, an embedding and a convolution.

A new kind of layer is one class here. `SHAPES` is searched in order; the first that claims a layer has it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base import LoraLayer, Shape
from .extend import plain
from .ops import weight_like
from .storages import quantization_of


def runs_forward_of(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the layer's own class computes exactly what `cls` computes."""
    own: Any = plain(type(layer))
    return bool(own.forward is cls.forward)


@torch.no_grad()
def _computes_linear(layer: nn.Linear) -> bool:
    """Whether a linear layer whose class has a forward of its own still computes W x + b, by trying it on two rows."""
    weight = layer._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_meta or not weight.dtype.is_floating_point:
        return False
    if weight.shape != (layer.out_features, layer.in_features) or weight.dtype.itemsize < 2:
        return False
    kept = {*layer._parameters, *layer._buffers, *(name for name in layer._modules if not name.startswith("lora_"))}
    if not kept <= {"weight", "bias"}:
        return False  # it has more to compute with, such as bounds that two rows may not reach
    x = torch.arange(2 * layer.in_features, device=weight.device).cos().view(2, -1)
    x = torch.stack([x[0], 64 * x[1]]).to(weight.dtype)
    try:
        cls: Any = plain(type(layer))
        found = cls.forward(layer, x)
        wanted = F.linear(x, weight, layer.bias)
    except Exception:  # another signature, other inputs, no kernel: whatever it is, it is not known to be linear
        return False
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    allowed = 16 * torch.finfo(weight.dtype).eps * wanted.float().norm()
    return bool((found.float() - wanted.float()).norm() <= allowed)


class _Matrix(Shape):
    """What a linear layer and its transposed twin share: x (…, I) -> (…, O)."""

    is_matrix = True
    plain_forward: Any = None

    def _parameter(self, layer: Any, x: Tensor) -> Tensor | None:
        """The layer's weight, if it is an ordinary parameter beside `x` and nothing but `plain_forward` reads it."""
        # nn.DataParallel's replicas hold plain tensors as attributes; any other class keeps its bits in its own way.
        weight: Any = layer._parameters.get("weight", layer.__dict__.get("weight"))
        own: Any = super(LoraLayer, layer)
        if type(weight) not in (nn.Parameter, Tensor) or own.forward.__func__ is not self.plain_forward:
            return None
        if weight.device != x.device or (weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
            return None
        return cast(Tensor, weight)

    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        parts = layer._modules  # nn.Module finds its children by failing first: a third of a call at one token a step
        h = F.linear(x, weight_like(parts["lora_A"]._modules[name].weight, x))
        return F.linear(h if scaling == 1.0 else h * scaling, weight_like(parts["lora_B"]._modules[name].weight, x))

    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        i, o = self.features(layer)
        return (r, i), (o, r)

    def on_output(self, layer: Any, v: Tensor) -> Tensor:
        return v


class LinearShape(_Matrix):
    """`nn.Linear`, and what stands for one with a quantised weight: weight (O, I)."""

    plain_forward = staticmethod(nn.Linear.forward)

    def weight(self, layer: Any, x: Tensor) -> Tensor | None:
        weight = self._parameter(layer, x)
        return weight if weight is not None and weight.shape[-1] == x.shape[-1] else None

    def claims(self, layer: nn.Module) -> bool:
        if isinstance(layer, nn.Linear) and (runs_forward_of(layer, nn.Linear) or _computes_linear(layer)):
            return True
        return quantization_of(layer) is not None

    def features(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Linear, layer)
        weight = layer._parameters.get("weight")
        if type(weight) is nn.Parameter and weight.dim() == 2 and weight.is_floating_point():
            # A tie to a vocabulary that grew gives an output layer more rows than it says.
            return layer.in_features, max(layer.out_features, weight.shape[0])
        return layer.in_features, layer.out_features

    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        return layer.lora_B[name].weight, layer.lora_A[name].weight

    def norm(self, weight: Tensor) -> Tensor:
        return weight.norm(dim=1)

    def on_weight(self, layer: Any, v: Tensor, rows: slice) -> Tensor:
        return v[rows, None]


class _ByInput(_Matrix):
    """What shapes share whose weight has a row for each input: (I, O)."""

    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        return layer.lora_A[name].weight.t(), layer.lora_B[name].weight.t()

    def norm(self, weight: Tensor) -> Tensor:
        return weight.norm(dim=0)

    def on_weight(self, layer: Any, v: Tensor, rows: slice) -> Tensor:
        return v[None, :]


class TransposedShape(_ByInput):
    """transformers' `Conv1D`: weight (I, O)."""

    plain_forward = staticmethod(Conv1D.forward)

    def weight(self, layer: Any, x: Tensor) -> Tensor | None:
        weight = self._parameter(layer, x)
        return weight.t() if weight is not None and weight.shape[0] == x.shape[-1] else None

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, Conv1D) and runs_forward_of(layer, Conv1D)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        return cast(int, layer.nx), cast(int, layer.nf)


class EmbeddingShape(_ByInput):
    """`nn.Embedding`: weight (V, O), A (R, V), B (O, R); ids (B, T) -> (B, T, O).

    A subclass may multiply its rows by `embed_scale`; the update is then multiplied too.
    """

    takes_dropout = False
    is_matrix = False

    def claims(self, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Embedding):
            return False
        return runs_forward_of(layer, nn.Embedding) or hasattr(layer, "embed_scale")

    def refuse(self, layer: nn.Module) -> str | None:
        if cast(nn.Embedding, layer).max_norm is not None:
            return "an embedding with max_norm rewrites its own weight in forward"
        return None

    def features(self, layer: nn.Module) -> tuple[int, int]:
        layer = cast(nn.Embedding, layer)
        return layer.num_embeddings, layer.embedding_dim

    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        h = F.embedding(x, a.t(), layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)
        h = (h * scaling).to(layer.weight.dtype)
        u = F.linear(h, weight_like(b, h))
        scale = getattr(layer, "embed_scale", None)
        return u if scale is None else u * (scale.to(u.dtype) if isinstance(scale, Tensor) else scale)


class ConvShape(Shape):
    """`nn.Conv1d/2d/3d`: weight (O, I/groups, *kernel), A (R, I, *kernel), B (O, R/groups, 1, …).

    That is PEFT's form. With groups > 1 the update mixes groups, which no grouped weight can hold: such a layer trains
    and is saved, and folding it is refused.
    """

    CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d)

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, self.CLASSES) and any(runs_forward_of(layer, cls) for cls in self.CLASSES)

    def features(self, layer: nn.Module) -> tuple[int, int]:
        return cast(nn.Conv2d, layer).in_channels, cast(nn.Conv2d, layer).out_channels

    def shapes(self, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        layer = cast(nn.Conv2d, layer)
        ones = (1,) * len(layer.kernel_size)
        return (r, layer.in_channels, *layer.kernel_size), (layer.out_channels, r // layer.groups, *ones)

    def _hidden(self, layer: Any, name: str, x: Tensor) -> Tensor:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        convolve = self.FUNCTIONS[len(layer.kernel_size) - 1]
        weight = weight_like(layer.lora_A[name].weight, x)
        return convolve(x, weight, None, layer.stride, padding, layer.dilation)

    def _output(self, layer: Any, name: str, h: Tensor) -> Tensor:
        convolve = self.FUNCTIONS[len(layer.kernel_size) - 1]
        return convolve(h, weight_like(layer.lora_B[name].weight, h), groups=layer.groups)

    def update(self, layer: Any, name: str, x: Tensor, scaling: float = 1.0) -> Tensor:
        return self._output(layer, name, self._hidden(layer, name, x) * scaling)

    def factors(self, layer: Any, name: str) -> tuple[Tensor, Tensor]:
        return layer.lora_B[name].weight.flatten(1), layer.lora_A[name].weight.flatten(1)

    def delta(self, layer: Any, name: str, rows: slice) -> Tensor:
        return super().delta(layer, name, rows).unflatten(1, layer.lora_A[name].weight.shape[1:])

    def norm(self, weight: Tensor) -> Tensor:
        return weight.flatten(1).norm(dim=1)

    def on_weight(self, layer: Any, v: Tensor, rows: slice) -> Tensor:
        return v[rows].view(-1, *[1] * (1 + len(layer.kernel_size)))

    def on_output(self, layer: Any, v: Tensor) -> Tensor:
        return v.view(-1, *[1] * len(layer.kernel_size))


SHAPES: tuple[Shape, ...] = (LinearShape(), TransposedShape(), EmbeddingShape(), ConvShape())


def shape_of(layer: nn.Module) -> Shape | None:
    """The shape that claims `layer`, or None: its forward is not known, so LoRA on it could be wrong."""
    return next((shape for shape in SHAPES if shape.claims(layer)), None)
