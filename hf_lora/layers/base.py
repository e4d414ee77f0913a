"""The LoRA layer: an existing layer whose class is extended, with low-rank factors as child modules."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any, Self, cast

from torch import Tensor, nn

from ..errors import StateError
from .contract import Shape, Storage
from .hosts import Activity, Host, at_hand
from .site import LayerState, Site

MERGED_TRAINING = (
    "The adapters are merged into the weights, so training would have no effect on them. "
    "Call unmerge_adapter() first (or merge_and_unload() if you no longer need the adapters)."
)


class LoraLayer(Site, Host):
    """Mixin for a layer with a single weight: the layer is its own site."""

    attribute = "_lora"

    forward = Site.respond

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("_mixin") is not LoraLayer:  # another extension, or a class that FSDP2 derived
            return
        base: Any = cls.__dict__["_extended"]
        plain = list(inspect.signature(base.forward).parameters.values())[1:]
        if plain and plain[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            cls.forward = _respond_to(plain[0].name)

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
        return at_hand(held._modules[name])

    def train(self, mode: bool = True) -> Self:
        if mode and self._lora.activity.merged:
            raise StateError(MERGED_TRAINING)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lora({self.describe()})"


@functools.cache
def _respond_to(name: str) -> Any:
    """`Site.respond` whose input has the name that the forward of the plain layer gives it: `layer(input=x)`."""
    code = Site.respond.__code__
    own, _, *variables = code.co_varnames
    if name in variables:
        return Site.respond
    return types.FunctionType(code.replace(co_varnames=(own, name, *variables)), Site.respond.__globals__, "forward")


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
