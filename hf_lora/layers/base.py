"""The LoRA layer: an existing layer whose class is extended, with low-rank factors as child modules."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..errors import StateError
from .contract import Shape, Storage
from .hosts import Activity, Host
from .site import LayerState, Site

MERGED_TRAINING = (
    "The adapters are merged into the weights, so training would teach them nothing. "
    "Call unmerge_adapter() (or merge_and_unload() if the adapters are done with) first."
)


class LoraLayer(Site, Host):
    """Mixed in before the class of a layer that multiplies by its one weight: the layer is its own site."""

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
        """The layer's own forward: dense, quantised or hooked."""
        return cast(Tensor, super().forward(x))

    def factor(self, kind: str, name: str) -> Tensor:
        held: Any = self._modules[kind]  # nn.Module finds its children by failing first: too slow for a forward
        return cast(Tensor, held._modules[name].weight)

    def train(self, mode: bool = True) -> Any:
        if mode and self._lora.activity.merged:
            raise StateError(MERGED_TRAINING)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora({self.describe()})"


def start_layer(layer: nn.Module, shape: Shape, storage: Storage, activity: Activity) -> LoraLayer:
    """Extend `layer`'s class, in place; it has no adapter yet and computes what it did."""
    LoraLayer.extend(layer)
    assert isinstance(layer, LoraLayer)
    layer._lora = LayerState(activity, shape, storage)
    activity.watch(())
    return layer


def ungroup(layer: Site) -> None:
    """Take `layer` and all that shared its input out of their group."""
    for member in layer._lora.group:
        member._lora.group = ()
    layer._lora.activity.leftovers = None
