"""What holds an adapter's tensors in a model: modules whose class is extended, with the tensors as child modules.

In: a module and tensors. Out: the module, of an extended class, with a `Factor` for each tensor, and which adapters
have something there. `Activity`, one a model, says which of them act.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .class_swap import Extension, mixins_of
from .ops import device_only
from .sharing import SharedOutputs


class Activity:
    """Which adapters act: one object shared by all adapted layers of a model, so that a switch touches no layer.

    `acting` maps a layer's adapter names to those of them that act now. A forward reads it once.
    """

    def __init__(self) -> None:
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.acting: dict[tuple[str, ...], tuple[str, ...]] = {}
        self.leftovers: SharedOutputs | None = None
        """Outputs that one layer of a group computed for the others: see sharing.py."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"leftovers": None}  # of a call under way, and never part of a copy

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

    def watch(self, names: tuple[str, ...]) -> None:
        """Make `acting[names]` available: called by a layer whose adapters change."""
        self.acting[names] = self._acting(names)

    def _acting(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(n for n in self.active if n in names) if self.enabled and not self.merged else ()


_EMPTY = nn.Module().__dict__


def _begin(module: nn.Module) -> None:
    """Do what `nn.Module.__init__` does, in half its time: an injection makes modules by the thousand, and it is most
    of what that takes."""
    module.__dict__.update({k: v.copy() if hasattr(v, "copy") else v for k, v in _EMPTY.items()})


class Factor(nn.Module):
    """One tensor of one adapter: a float32 master, whatever the model around it is cast to."""

    def __init__(self, weight: Tensor, trainable: bool = True) -> None:
        _begin(self)
        self._parameters["weight"] = nn.Parameter(weight.to(torch.float32), requires_grad=trainable)
        if not trainable:
            self.frozen = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factor:
        super()._apply(device_only(fn), recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # With assign=True the file's tensor becomes the parameter: it must be float32 by then.
        super()._load_from_state_dict(as_masters(state_dict), prefix, *args)


def as_masters(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `state_dict` whose floating-point tensors are float32."""
    return {
        key: value.to(torch.float32) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in state_dict.items()
    }


@dataclass
class Held:
    """Which adapters have something at one place, in the order in which they came.

    Plain data, as all that a host keeps beside tensors. It never holds a Parameter: sharding and loading replace
    parameters.
    """

    activity: Activity
    names: tuple[str, ...] = field(default=(), init=False)

    @property
    def acting(self) -> tuple[str, ...]:
        return self.activity.acting[self.names]

    def add(self, name: str) -> None:
        self.names = (*self.names, name)
        self.activity.watch(self.names)

    def remove(self, name: str) -> None:
        self.names = tuple(n for n in self.names if n != name)
        self.activity.watch(self.names)


class Host(Extension):
    """An extension that holds tensors of adapters. It owns its one attribute and children called `lora_*`."""

    attribute: ClassVar[str]
    """Where it keeps what it knows beside tensors."""
    knows: ClassVar[type[Held]] = Held
    """What that is, for `hold`."""

    @classmethod
    def leave(cls, module: nn.Module) -> None:
        """Give `module` the class back that it had before, with nothing left of what was held here."""
        module.__dict__.pop(cls.attribute, None)
        next(mixin for mixin in mixins_of(module) if issubclass(mixin, cls)).shrink(module)

    @classmethod
    def states(cls, module: nn.Module) -> list[Held]:
        """What it knows of `module`, one for each site."""
        return [module.__dict__[cls.attribute]]

    @classmethod
    def hold(cls, module: nn.Module, activity: Activity) -> Held:
        """Extend `module`, unless it is already, and give what it says of its adapters."""
        if cls.attribute not in module.__dict__:
            cls.extend(module)
            module.__dict__[cls.attribute] = cls.knows(activity)
        held: Held = module.__dict__[cls.attribute]
        return held

    @classmethod
    def let_go(cls, module: nn.Module, name: str) -> None:
        """Forget an adapter, if it was there, and `leave` where no other is."""
        held: Held | None = module.__dict__.get(cls.attribute)  # absent where `hold` was cut off
        if held is not None:
            held.remove(name)
        if held is None or not held.names:
            cls.leave(module)


def add_factor(module: nn.Module, kind: str, name: str, weight: Tensor, trainable: bool = True) -> None:
    """Hold `weight` as `module.<kind>[name].weight`, a float32 master."""
    # Straight into the tables of nn.Module: its own setting costs as much as the rest of an injection.
    held = module._modules.get(kind)
    if held is None:
        held = module._modules[kind] = nn.ModuleDict.__new__(nn.ModuleDict)
        _begin(held)
    held._modules[name] = Factor(weight, trainable)


def remove_factor(module: nn.Module, kind: str, name: str) -> None:
    held = cast(nn.ModuleDict, module._modules[kind])
    held._modules.pop(name, None)
    if not held._modules:
        del module._modules[kind]


def states_of(module: nn.Module) -> list[Held]:
    """What all extensions of `module` know of its adapters."""
    return [held for mixin in mixins_of(module) if issubclass(mixin, Host) for held in mixin.states(module)]


def remove_all(module: nn.Module, name: str) -> None:
    """Take off whatever there is of an adapter, such as the half of what was being attached."""
    for host in [mixin for mixin in mixins_of(module) if issubclass(mixin, Host)]:
        for kind in [k for k, held in module._modules.items() if k.startswith("lora_") and _holds(held, name)]:
            remove_factor(module, kind, name)
        host.let_go(module, name)


def _holds(held: nn.Module | None, name: str) -> bool:
    return held is not None and (name in held._modules or not held._modules)


def strip(module: nn.Module) -> None:
    """Give `module` and all in it the classes that they had before any adapter, and take off what adapters hold."""
    for each in list(module.modules()):
        hosts = [mixin for mixin in mixins_of(each) if issubclass(mixin, Host)]
        for kind in [k for k in each._modules if k.startswith("lora_")] if hosts else ():
            del each._modules[kind]
        for host in hosts:
            host.leave(each)
