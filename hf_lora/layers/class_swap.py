"""Extend the class of an object that exists, and take the extension off again.

An object of class `C` becomes one of a subclass `(Mixin, C)` that carries C's own name, made once per pair. So
`isinstance`, names, hooks and code that looks at `type(x).__name__` go on working, and nothing is wrapped.
`torch.distributed.fsdp.fully_shard` does the same, and may come before or after.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar

from torch import nn

_MADE: dict[tuple[type, type], type] = {}


class Extension(nn.Module):
    """Base of the mixins. `extend` and `shrink` change the class of one object, in place."""

    _mixin: ClassVar[type[Extension]]
    _extended: ClassVar[type]
    order: ClassVar[int] = 0
    """Of several on one module, that of the lowest order is the innermost: it is handed the module's own output."""

    @classmethod
    def extend(cls, module: nn.Module) -> nn.Module:
        """Put this mixin in front of `module`'s class, and behind extensions of a higher order."""
        own, above = type(module), []
        while "_mixin" in own.__dict__ and own._mixin.order > cls.order:  # type: ignore[attr-defined]
            above.append(own._mixin)  # type: ignore[attr-defined]
            own = own._extended  # type: ignore[attr-defined]
        for mixin in (cls, *reversed(above)):
            own = extended(mixin, own)
        module.__class__ = own
        _rewire(module)
        return module

    @classmethod
    def shrink(cls, module: nn.Module) -> nn.Module:
        """Take this mixin off again, wherever in the class's ancestry it now stands."""
        module.__class__ = _without(cls, type(module))
        _rewire(module)
        return module

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and deepcopy by recipe: the class cannot be found by its name, which is the base's."""
        chain: list[type] = []
        cls = type(self)
        while "_mixin" in cls.__dict__:
            chain.append(cls._mixin)
            cls = cls._extended
        if not chain:  # a class that something else derived from ours, such as FSDP's
            return super().__reduce_ex__(protocol)
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return _rebuild, (cls, *reversed(chain)), state


def extended(mixin: type, cls: type) -> type:
    """The subclass `(mixin, cls)` named like `cls`; the same one at every call."""
    made = _MADE.get((mixin, cls))
    if made is None:
        namespace = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "_mixin": mixin,
            "_extended": cls,
        }
        made = _MADE[mixin, cls] = type(cls)(cls.__name__, (mixin, cls), namespace)
    return made


def mixins_of(module: nn.Module) -> list[type[Extension]]:
    """The extensions on `module`, the outermost first."""
    return [cls._mixin for cls in type(module).__mro__ if "_mixin" in cls.__dict__]  # type: ignore[attr-defined]


def rebase(module: nn.Module, cls: type) -> None:
    """Let `module` be of class `cls`, with the extensions that it has."""
    mixins, own = [], type(module)
    while "_mixin" in own.__dict__:
        mixins.append(own._mixin)  # type: ignore[attr-defined]
        own = own._extended  # type: ignore[attr-defined]
    for mixin in reversed(mixins):
        cls = extended(mixin, cls)
    module.__class__ = cls
    _rewire(module)


def unwrap_class(cls: type) -> type:
    """`cls` without any of our extensions, and without the one that `fully_shard` puts on."""
    while True:
        ours = next((c for c in cls.__mro__ if "_mixin" in c.__dict__), None)
        if ours is None:
            sharded = len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule"
            return cls.__bases__[1] if sharded else cls
        cls = _without(ours._mixin, cls)  # type: ignore[attr-defined]


def _without(mixin: type, cls: type) -> type:
    if cls.__dict__.get("_mixin") is mixin:
        return cls._extended  # type: ignore[attr-defined]
    if not any(c.__dict__.get("_mixin") is mixin for c in cls.__mro__):
        return cls
    bases = tuple(_without(mixin, base) for base in cls.__bases__)
    if "_mixin" in cls.__dict__:  # another extension of ours stands on top
        return extended(cls._mixin, bases[1])  # type: ignore[attr-defined]
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, namespace)


def _rebuild(cls: type, *mixins: type) -> Any:
    for mixin in mixins:
        cls = extended(mixin, cls)
    return object.__new__(cls)


def _rewire(module: nn.Module) -> None:
    """Let a `forward` that hooks keep on the instance call the class's new one.

    accelerate's hooks replace `module.forward` and keep the class's as a bound method in `_old_forward`.
    """
    bound = module.__dict__.get("forward")
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    elif isinstance(bound, types.MethodType) and _is_class_forward(bound, module):
        del module.__dict__["forward"]  # what a removed hook leaves behind: the class's forward, bound


def _is_class_forward(bound: types.MethodType, module: nn.Module) -> bool:
    ours = (m.__dict__.get("forward") for m, _ in _MADE)
    return any(
        bound.__func__ is forward for forward in (*(c.__dict__.get("forward") for c in type(module).__mro__), *ours)
    )


def refuse_instance_forward(module: nn.Module) -> str | None:
    """Why `module` cannot be extended because of a `forward` set on the instance; None where it can."""
    if "forward" not in module.__dict__ or "_old_forward" in module.__dict__:
        return None
    bound = module.__dict__["forward"]
    if isinstance(bound, types.MethodType) and _is_class_forward(bound, module):
        return None
    return "its forward was replaced on the instance, which would hide the adapter"
