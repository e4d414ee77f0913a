"""Extend the class of an existing object, and remove the extension again.

An object of class `C` becomes an instance of a subclass `(Mixin, C)` with the name of `C`, created once per pair.
`isinstance`, hooks and code that reads `type(x).__name__` still work, and nothing is wrapped.
`torch.distributed.fsdp.fully_shard` does the same, and may run before or after.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar, SupportsIndex

from torch import nn

_MADE: dict[tuple[type, type], type] = {}


class Extension(nn.Module):
    """Base class of the mixins. `extend` and `shrink` change the class of one object in place."""

    _mixin: ClassVar[type[Extension]]
    _extended: ClassVar[type]
    order: ClassVar[int] = 0
    """Of several on one module, the one with the lowest order is innermost: it gets the plain module's output."""

    @classmethod
    def extend(cls, module: nn.Module) -> nn.Module:
        """Put this mixin before the class of `module` in the MRO, and after extensions of a higher order."""
        base, above = type(module), []
        while "_mixin" in base.__dict__ and base._mixin.order > cls.order:  # type: ignore[attr-defined]
            above.append(base._mixin)  # type: ignore[attr-defined]
            base = base._extended  # type: ignore[attr-defined]
        for mixin in (cls, *reversed(above)):
            base = extended(mixin, base)
        module.__class__ = base
        _rewire(module)
        return module

    @classmethod
    def shrink(cls, module: nn.Module) -> nn.Module:
        """Remove this mixin, wherever in the MRO it is now."""
        module.__class__ = _without(cls, type(module))
        _rewire(module)
        return module

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        """Pickle and deepcopy rebuild the class: it cannot be imported by its name, which is the name of the base."""
        chain: list[type] = []
        cls = type(self)
        while "_mixin" in cls.__dict__:
            chain.append(cls._mixin)
            cls = cls._extended
        if not chain:  # a class that another library derived from an extended one, such as FSDP's
            return super().__reduce_ex__(protocol)
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        return _rebuild, (cls, *reversed(chain)), state


def extended(mixin: type, cls: type) -> type:
    """The subclass `(mixin, cls)` with the name of `cls`; every call returns the same one."""
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
    """The extensions on `module`, outermost first."""
    return [cls._mixin for cls in type(module).__mro__ if "_mixin" in cls.__dict__]  # type: ignore[attr-defined]


def rebase(module: nn.Module, cls: type) -> None:
    """Change the base class of `module` to `cls`, and keep its extensions."""
    mixins, base = [], type(module)
    while "_mixin" in base.__dict__:
        mixins.append(base._mixin)  # type: ignore[attr-defined]
        base = base._extended  # type: ignore[attr-defined]
    for mixin in reversed(mixins):
        cls = extended(mixin, cls)
    module.__class__ = cls
    _rewire(module)


def unwrap_class(cls: type) -> type:
    """`cls` without any extension from this library, and without the one that `fully_shard` adds."""
    while True:
        extension = next((c for c in cls.__mro__ if "_mixin" in c.__dict__), None)
        if extension is None:
            sharded = len(cls.__bases__) == 2 and cls.__bases__[0].__name__ == "FSDPModule"
            return cls.__bases__[1] if sharded else cls
        cls = _without(extension._mixin, cls)  # type: ignore[attr-defined]


def _without(mixin: type, cls: type) -> type:
    if cls.__dict__.get("_mixin") is mixin:
        return cls._extended  # type: ignore[attr-defined]
    if not any(c.__dict__.get("_mixin") is mixin for c in cls.__mro__):
        return cls
    bases = tuple(_without(mixin, base) for base in cls.__bases__)
    if "_mixin" in cls.__dict__:  # another extension is outside this one
        return extended(cls._mixin, bases[1])  # type: ignore[attr-defined]
    namespace = {k: v for k, v in cls.__dict__.items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, namespace)


def _rebuild(cls: type, *mixins: type) -> object:
    for mixin in mixins:
        cls = extended(mixin, cls)
    return object.__new__(cls)


def _rewire(module: nn.Module) -> None:
    """Point a `forward` that hooks store on the instance to the new forward of the class.

    The hooks of accelerate replace `module.forward` and keep the bound forward of the class in `_old_forward`.
    """
    bound = module.__dict__.get("forward")
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
    elif isinstance(bound, types.MethodType) and _is_class_forward(bound, module):
        del module.__dict__["forward"]  # a removed hook leaves the bound forward of the class behind


def _is_class_forward(bound: types.MethodType, module: nn.Module) -> bool:
    classes = (*type(module).__mro__, *(mixin for mixin, _ in _MADE), *_MADE.values())
    return any(bound.__func__ is cls.__dict__.get("forward") for cls in classes)


def refuse_instance_forward(module: nn.Module) -> str | None:
    """Why a `forward` set on the instance prevents extending `module`; None if it does not."""
    if "forward" not in module.__dict__ or "_old_forward" in module.__dict__:
        return None
    bound = module.__dict__["forward"]
    if isinstance(bound, types.MethodType) and _is_class_forward(bound, module):
        return None
    return "its forward was replaced on the instance, so the forward with the adapter would never run"
