"""Weights other than the only `weight` of a layer: several in one module, or one with another name.

In: a module whose forward multiplies by its weights, such as an attention with its projections. The shape of such a
module provides a mixin derived from `LoraViews`, whose forward calls each site in place of the product. Methods and
storages treat a `View` like any layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StateError
from .base import MERGED_TRAINING, LoraLayer, start_layer
from .contract import Shape, Storage
from .hosts import Activity, Held, Host
from .site import LayerState, Site


class View(Site):
    """A weight of `module` with the interface of a layer.

    Args:
        module: holds the factors; its mixin calls the view to compute its output.
        name: name of the weight, such as `"in_proj_weight"`, or `"out_proj.weight"` if a child holds it.
        bias_name: name of the bias, if there is one.
    """

    def __init__(self, module: nn.Module, name: str, bias_name: str | None = None) -> None:
        self.module, self.name, self.bias_name = module, name, bias_name

    def host(self) -> nn.Module:
        return self.module

    def product(self, x: Tensor) -> Tensor:
        """The product with a matrix (O, I), as most weights are."""
        return F.linear(x, self.weight, self.bias)

    def holder(self, kind: str) -> str:
        return f"{kind}_{self.name.replace('.', '_')}"

    @property
    def _lora(self) -> LayerState:  # type: ignore[override]
        views: dict[str, LayerState] = self.module.__dict__[LoraViews.attribute]
        return views[self.name]

    @property
    def weight(self) -> Any:
        """The tensor of the base: of a bias too, whatever adapter acts."""
        path, _, last = self.name.rpartition(".")
        held = self.module.get_submodule(path)._parameters
        return held[last] if last in held else _named(self.module, self.name)

    @property
    def bias(self) -> Any:
        return None if self.bias_name is None else _named(self.module, self.bias_name)

    @property
    def training(self) -> bool:  # type: ignore[override]
        return self.module.training

    @property
    def _parameters(self) -> dict[str, Tensor | None]:
        """The tensors of the view under the names that a layer uses."""
        return {"weight": self.weight, "bias": self.bias}

    @property
    def _buffers(self) -> dict[str, Tensor | None]:
        return {}


def _named(module: nn.Module, name: str) -> Tensor | None:
    path, _, last = name.rpartition(".")
    found: Tensor | None = getattr(module.get_submodule(path), last)
    return found


class LoraViews(Host):
    """Mixin for a module with several adapted weights. The mixin of a shape derives from it, and its forward calls
    `self.site(name).respond(x)` where the forward of the module multiplies by the weight of that name."""

    attribute = "_lora_views"
    _lora_views: dict[str, LayerState]

    def site(self, name: str) -> View:
        """The site of one weight; its product includes the bias that the shape named."""
        shape = self._lora_views[name].shape
        return next(view for view in shape.sites(self) if view.name == name)

    @classmethod
    def states(cls, module: nn.Module) -> list[Held]:
        return list(module.__dict__[cls.attribute].values())

    def train(self, mode: bool = True) -> Self:
        if mode and any(state.activity.merged for state in self._lora_views.values()):
            raise StateError(MERGED_TRAINING)
        return super().train(mode)

    def extra_repr(self) -> str:
        listed = (f"{name}: lora({self.site(name).describe()})" for name in self._lora_views)
        return ", ".join([super().extra_repr(), *listed])


def sites_of(module: nn.Module) -> Iterator[Site]:
    """The sites of `module` that have factors of any adapter."""
    if isinstance(module, LoraLayer):
        yield module
    elif isinstance(module, LoraViews):
        yield from (module.site(name) for name in module._lora_views)


def start_site(site: Any, shape: Shape, storage: Storage, activity: Activity) -> Site:
    """Prepare `site` for adapters. It has none yet, so the output of its module does not change."""
    if not isinstance(site, View):
        return site if isinstance(site, LoraLayer) else start_layer(site, shape, storage, activity)
    module: Any = site.module
    if not isinstance(module, LoraViews):
        shape.mixin.extend(module)
        module._lora_views = {}
    if site.name not in module._lora_views:
        module._lora_views[site.name] = LayerState(activity, shape, storage)
        activity.watch(())
    return site


def end_site(site: Site) -> None:
    """Remove a site that has no adapter left; the module gets its class back once it has no sites."""
    module = site.host()
    if isinstance(module, LoraLayer):
        LoraLayer.leave(module)
    elif isinstance(module, LoraViews):
        assert isinstance(site, View)
        del module._lora_views[site.name]
        if not module._lora_views:
            LoraViews.leave(module)
