"""Per-adapter copies: of a whole module (a task head, an entry of `modules_to_save`) or of a bias."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from .hosts import Activity, Held, Host, as_masters, at_hand, refuse_full_model, strip
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
        self.tied: set[str] = set()
        """The adapters whose copy has its weight in common with a copy of another module."""
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
        self.tied.discard(name)
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

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        refuse_full_model(prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

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


@dataclass
class BiasState(Held):
    """The plain data of a `BiasLayer`."""

    hooks: list[RemovableHandle] = field(default_factory=list)
    """Of the parents that read the bias."""

    def unhook(self) -> None:
        while self.hooks:
            self.hooks.pop().remove()


class BiasLayer(Host):
    """Mixin for a module with a `bias`: in its forward, and in that of a parent which reads it, it is the adapter's.

    At all other times it is the parameter of the base, which other libraries read to move, shard or load it. An
    untrained adapter changes no bit of the output, since its float32 copy is rounded to the dtype of the base.
    """

    attribute = "_lora_biases"
    data_class = BiasState
    order = 10  # outside extensions of the forward
    lora_bias: nn.ModuleDict
    _lora_biases: BiasState
    _bias_is_read = False

    @property
    def bias(self) -> Tensor | None:
        base = base_bias(self)
        held: Any = self._modules.get("lora_bias") if self._bias_is_read else None
        for name in self._lora_biases.acting if held is not None else ():  # not more than one: two are in conflict
            return at_hand(held._modules[name]).to(base.device, base.dtype)
        return base

    @bias.setter
    def bias(self, value: Tensor | None) -> None:  # a Parameter does not get here: nn.Module.__setattr__ keeps it
        self.__dict__["bias"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        before = self._bias_is_read
        self._bias_is_read = True
        try:
            return cast(Tensor, super().forward(*args, **kwargs))
        finally:
            self._bias_is_read = before

    def read_by(self, parent: nn.Module, path: str) -> None:
        """Make it the adapter's bias during the forward of `parent` too, which has this module at `path`."""
        start, end = partial(_set_read, path, True), partial(_set_read, path, False)
        hooks = self._lora_biases.hooks
        hooks.append(parent.register_forward_pre_hook(start))
        hooks.append(parent.register_forward_hook(end, always_call=True))

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        held: BiasState | None = module.__dict__.get(cls.attribute)
        if held is not None:
            held.unhook()
        module.__dict__.pop("_bias_is_read", None)
        super().leave(module)


def _set_read(path: str, reads: bool, parent: nn.Module, *_: object) -> None:
    layer: Any = parent.get_submodule(path)
    layer._bias_is_read = reads


def base_bias(module: nn.Module) -> Any:
    """The bias of the base, whatever adapter acts; replicas of nn.DataParallel hold a plain tensor."""
    parameters = module._parameters
    return parameters["bias"] if "bias" in parameters else module.__dict__.get("bias")
