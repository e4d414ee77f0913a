"""Modules that hold the tensors of adapters: their class is extended, and the tensors are child modules.

In: a module and tensors. Out: the module, with an extended class, a `Factor` for each tensor, and the names of the
adapters that have tensors there. `Activity`, one per model, says which adapters are active.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from ..compat import model_being_saved
from ..errors import StateError
from .class_swap import Extension, mixins_of
from .ops import device_only
from .sharing import SharedOutputs


class Activity:
    """Which adapters are active. All adapted layers of a model share this object, so switching changes no layer.

    `acting` maps the adapter names of a layer to those that act now. A forward reads it once.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.acting: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.shared_outputs: SharedOutputs | None = None
        """Outputs that one layer of a group computed for the others: see sharing.py."""

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"shared_outputs": None}  # they belong to a running call, never to a copy

    def set(
        self,
        active: tuple[str, ...] | None = None,
        enabled: bool | None = None,
        merged: tuple[str, ...] | None = None,
    ) -> None:
        self.active = self.active if active is None else active
        self.enabled = self.enabled if enabled is None else enabled
        self.merged = self.merged if merged is None else merged
        for names in self.acting:
            self.acting[names] = self._acting(names)

    def lose(self, message: str) -> None:
        """Make every forward of an adapted layer raise."""
        self.acting = _Lost(message)

    def watch(self, names: tuple[str, ...]) -> None:
        """Make `acting[names]` available. A layer calls this when its adapters change."""
        self.acting[names] = self._acting(names)

    def _acting(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n for n in self.active if n in names) if self.enabled and not self.merged else ()


class _Lost(dict[tuple[str, ...], tuple[str, ...]]):
    """In place of `Activity.acting`: looking something up raises."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def __missing__(self, _names: tuple[str, ...]) -> tuple[str, ...]:
        raise StateError(self.message)


_EMPTY = nn.Module().__dict__


def _begin(module: nn.Module) -> None:
    """`nn.Module.__init__` in half the time: an injection creates thousands of modules and spends most time here."""
    module.__dict__.update({k: v.copy() if hasattr(v, "copy") else v for k, v in _EMPTY.items()})


class Factor(nn.Module):
    """One tensor of one adapter: a float32 master that no cast of the model changes."""

    def __init__(self, weight: Tensor, trainable: bool = True) -> None:
        _begin(self)
        self._parameters["weight"] = nn.Parameter(weight.to(torch.float32), requires_grad=trainable)
        if not trainable:
            self.frozen = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factor:
        super()._apply(device_only(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, object], prefix: str, *args: Any) -> None:
        # With assign=True the tensor of the file becomes the parameter, so it must be float32.
        super()._load_from_state_dict(as_masters(state_dict), prefix, *args)


def at_hand(module: Any, key: str = "weight") -> Tensor:
    """A parameter of a module, such as a `Factor`. If accelerate offloaded it, a copy on the device of its hook."""
    tensor: Tensor = getattr(module, key)
    if not tensor.is_meta:
        return tensor
    hook = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):  # accelerate joins several hooks in one
        kept = getattr(each, "weights_map", None)
        if kept is not None:
            tensor = kept[key].to(each.execution_device)
    return tensor


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a parameter of `module`, or of a module in it, elsewhere."""
    hooked = (each for each in module.modules() if "_hf_hook" in each.__dict__)
    return any(p is not None and p.is_meta for each in hooked for p in each._parameters.values())


def as_masters(state_dict: Mapping[str, object]) -> dict[str, object]:
    """A copy of `state_dict` whose floating-point tensors are float32."""
    return {
        key: value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in state_dict.items()
    }


@dataclass
class Held:
    """Which adapters have tensors at one place, in the order in which they were added.

    Plain data, without any Parameter: sharding and loading replace parameters.
    """

    activity: Activity
    names: tuple[str, ...] = field(default=(), init=False)

    @property
    def acting(self) -> tuple[str, ...]:
        return self.activity.acting[self.names]

    def forget(self, weight: bool = True) -> None:
        """Drop what was computed from the tensors of the adapters, and from the base's if `weight`."""
        return None

    def add(self, name: str) -> None:
        self.names = (*self.names, name)
        self.activity.watch(self.names)

    def remove(self, name: str) -> None:
        self.names = tuple(n for n in self.names if n != name)
        self.activity.watch(self.names)


class Host(Extension):
    """An extension that holds tensors of adapters, in one attribute and in children named `lora_*`."""

    attribute: ClassVar[str]
    """Name of the attribute that holds its plain data."""
    data_class: ClassVar[type[Held]] = Held
    """Class of its plain data."""

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        """Restore the class that `module` had before, and remove the plain data."""
        module.__dict__.pop(cls.attribute, None)
        next(mixin for mixin in mixins_of(module) if issubclass(mixin, cls)).shrink(module)

    @classmethod
    def states(cls, module: nn.Module) -> list[Held]:
        """The plain data at `module`, one for each site."""
        return [module.__dict__[cls.attribute]]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Host:
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        refuse_full_model(prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def train(self, mode: bool = True) -> Self:
        self._forget(weight=False)
        return super().train(mode)

    def _forget(self, weight: bool = True) -> None:
        for held in states_of(self):
            held.forget(weight)

    @classmethod
    def hold(cls, module: nn.Module, activity: Activity) -> Held:
        """Extend `module` if it is not extended yet, and return its plain data."""
        if cls.attribute not in module.__dict__:
            cls.extend(module)
            module.__dict__[cls.attribute] = cls.data_class(activity)
        held: Held = module.__dict__[cls.attribute]
        return held

    @classmethod
    def let_go(cls, module: nn.Module, name: str) -> None:
        """Remove an adapter if it is here, and `leave` if it was the last one."""
        held: Held = module.__dict__[cls.attribute]
        held.remove(name)
        if not held.names:
            cls.leave(module)


def refuse_full_model(prefix: str) -> None:
    """Refuse to add tensors of adapters to the files of a full model.

    A model with adapters saves only these, so it is another one, which has a module with adapters too.

    Raises:
        StateError: `save_pretrained` of transformers is running.
    """
    model = model_being_saved()
    if model is not None:
        raise StateError(
            f"{type(model).__name__}.save_pretrained: {prefix.removesuffix('.')} has adapters of another model, of "
            "which it is a part too, and files of a full model cannot hold them. No weights were written. Call "
            "unload() or merge_and_unload() on that model first, or save that model."
        )


def add_factor(module: nn.Module, kind: str, name: str, weight: Tensor, trainable: bool = True) -> None:
    """Store `weight` as `module.<kind>[name].weight`, a float32 master."""
    put_factor(module, kind, name, Factor(weight, trainable))


def put_factor(module: nn.Module, kind: str, name: str, factor: nn.Module) -> None:
    """Store `factor`, which other modules may have too, as `module.<kind>[name]`."""
    # Written to the dicts of nn.Module directly: its __setattr__ costs as much as the rest of an injection.
    held = module._modules.get(kind)
    if held is None:
        held = module._modules[kind] = nn.ModuleDict.__new__(nn.ModuleDict)
        _begin(held)
        held.training = module.training
    held._modules[name] = factor
    factor.training = module.training


def remove_factor(module: nn.Module, kind: str, name: str) -> None:
    held = cast(nn.ModuleDict, module._modules[kind])
    held._modules.pop(name, None)
    if not held._modules:
        del module._modules[kind]


def activity_of(module: nn.Module) -> Activity:
    """The activity of the model whose adapters have tensors at `module`."""
    mixin: Any = type(module)._mixin  # type: ignore[attr-defined]
    held: list[Held] = mixin.states(module) if issubclass(mixin, Host) else states_of(module)
    return held[0].activity


def states_of(module: nn.Module) -> list[Held]:
    """The plain data of all extensions of `module`."""
    return [held for mixin in mixins_of(module) if issubclass(mixin, Host) for held in mixin.states(module)]


def strip(module: nn.Module) -> None:
    """Restore the original classes of `module` and its submodules, and remove all tensors of adapters."""
    for each in list(module.modules()):
        hosts = [mixin for mixin in mixins_of(each) if issubclass(mixin, Host)]
        for kind in [k for k in each._modules if k.startswith("lora_")] if hosts else ():
            del each._modules[kind]
        for host in hosts:
            host.leave(each)
