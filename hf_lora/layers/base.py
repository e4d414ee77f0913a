"""The LoRA layer: an existing layer whose class is extended, with low-rank factors as child modules."""

from __future__ import annotations

from typing import Any, Self, cast

from torch import Tensor, nn

from ..errors import StateError
from .contract import Shape, Storage
from .hosts import Activity, Host
from .site import LayerState, Site

MERGED_TRAINING = (
    "The adapters are merged into the weights, so training would have no effect on them. "
    "Call unmerge_adapter() first (or merge_and_unload() if you no longer need the adapters)."
)


class LoraLayer(Site, Host):
    """Mixin for a layer with a single weight: the layer is its own site."""

    attribute = "_lora"

    forward = Site.respond

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        if isinstance(module, LoraLayer) and cls.attribute in module.__dict__:
            ungroup(module)
        super().leave(module)

    def host(self) -> nn.Module:
        return self

    def product(self, x: Tensor) -> Tensor:
        """The forward of the layer without adapters: dense, quantized or hooked."""
        return cast(Tensor, super().forward(x))

    def factor(self, kind: str, name: str) -> Tensor:
        # Not by attribute: nn.Module.__getattr__ runs only after a failed lookup, which is too slow for a forward.
        held: Any = self._modules[kind]
        return cast(Tensor, held._modules[name].weight)

    def train(self, mode: bool = True) -> Self:
        if mode and self._lora.activity.merged:
            raise StateError(MERGED_TRAINING)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora({self.describe()})"


def start_layer(layer: nn.Module, shape: Shape, storage: Storage, activity: Activity) -> LoraLayer:
    """Extend the class of `layer` in place. It has no adapter yet, so its output does not change."""
    LoraLayer.extend(layer)
    assert isinstance(layer, LoraLayer)
    layer._lora = LayerState(activity, shape, storage)
    activity.watch(())
    return layer


def ungroup(layer: Site) -> None:
    """Dissolve the group of layers that share the input of `layer`."""
    for member in layer._lora.group:
        member._lora.group = ()
    layer._lora.activity.shared_outputs = None
