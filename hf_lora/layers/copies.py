"""Per-adapter copies: of a whole module (a task head, an entry of `modules_to_save`) or of a bias."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from .hosts import Activity, Held, Host, as_masters, at_hand, strip
from .ops import device_only


class Copies(nn.ModuleDict):
    """The copies, one per adapter: float32 masters that no cast of the model changes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Copies:
        super()._apply(device_only(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, object], prefix: str, *args: Any) -> None:
        # The copies are loaded after this, from the same dict.
        state_dict.update(as_masters({k: v for k, v in state_dict.items() if k.startswith(prefix)}))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Replacement(nn.Module):
    """Takes the place of a module and runs the active adapter's copy of it, or the frozen original.

    A copy is float32: floating-point inputs are cast to float32, and the output to the dtype of the original's output.
    Attributes are read from the module that runs; a parent that reads its `weight` gets it in the dtype of the
    original's. `weight` and `bias` are set on the original, so that tying works.
    """

    def __init__(self, base_layer: nn.Module, activity: Activity) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.copies = Copies()
        self._names: tuple[str, ...] = ()
        self._activity = activity
        activity.watch(())
        self.train(base_layer.training)

    @property
    def activity(self) -> Activity:
        return self._activity

    def add_copy(self, name: str, module: nn.Module | None = None) -> nn.Module:
        """Store `module` (default: a copy of the original) for an adapter, as float32."""
        added = copy.deepcopy(self.base_layer) if module is None else module
        strip(added)  # the copy is trained whole, so it has no factors
        self.copies[name] = added.to(torch.float32)
        for parameter in added.parameters():
            parameter.requires_grad_(True)
        self._rename((*self._names, name))
        return added

    def settle(self, name: str) -> None:
        """Replace the original by an adapter's copy, in the dtype of the original."""
        like = next(iter(self.base_layer.parameters()), None)
        self.base_layer = self.copies[name] if like is None else self.copies[name].to(like.dtype)

    def remove_copy(self, name: str) -> None:
        del self.copies[name]
        self._rename(tuple(n for n in self._names if n != name))

    def _rename(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._activity.watch(names)

    def running(self) -> nn.Module:
        """The copy of the active adapter, otherwise the original. Merging does not affect copies."""
        activity = self._activity
        if activity.enabled:
            for name in activity.active:
                if name in self._names:
                    return self.copies[name]
        return self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.running()
        if module is self.base_layer:
            return module(*args, **kwargs)
        given = next((a.dtype for a in (*args, *kwargs.values()) if _is_float(a)), None)
        device = next((a.device.type for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), "cpu")
        if given is not None and torch.is_autocast_enabled(device):
            return module(*args, **kwargs)
        if given is None:  # token ids: use the dtype of the original
            given = next((p.dtype for p in self.base_layer.parameters()), torch.float32)
        if given == torch.float32:
            return module(*args, **kwargs)
        args, kwargs = tree_map(lambda v: v.float() if _is_float(v) else v, (args, kwargs))
        return tree_map(lambda v: v.to(given) if _is_float(v) else v, module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            module, like = self.running(), self.base_layer._parameters.get(name)
            found = getattr(module, name)
            return found if like is None or module is self.base_layer else found.to(like.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class BiasHost(Host):
    """Mixin for a module with a parameter `bias`, of which each adapter has its own.

    The bias of the base does not change, and an untrained adapter changes no bit of the output.
    """

    attribute = "_lora_biases"
    order = 10  # outside extensions that multiply the output
    lora_bias: nn.ModuleDict
    _lora_biases: Held


class BiasLayer(BiasHost):
    """For a layer whose output is affine in its bias: the difference from the base's is added to the output."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = super().forward(*args, **kwargs)
        for name in self._lora_biases.acting:
            bias: Any = self.bias
            shift = at_hand(self.lora_bias[name]) - bias.to(torch.float32)
            y = y + shift.view(*shift.shape, *[1] * _dims_after_channel(self, y)).to(y.dtype)
        return y


class BiasInside(BiasHost):
    """For any other module: it runs with the adapter's bias, in the dtype of the base's, in place of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        held: Any = self._parameters["bias"]
        for name in self._lora_biases.acting:  # at most one: adapters with a bias each are not active together
            replaced: Any = at_hand(self.lora_bias[name]).to(held.dtype)
            self._parameters["bias"] = replaced
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._parameters["bias"] = held


def _dims_after_channel(layer: nn.Module, y: Tensor) -> int:
    """How many dimensions of the output y follow the channel dimension."""
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return len(layer.kernel_size)
    return y.dim() - 2 if isinstance(layer, (_BatchNorm, nn.GroupNorm)) else 0


BIAS_CLASSES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, _BatchNorm)
