"""Flags that two dataclasses of one parser define.

Published scripts parse a dataclass with `lora_r` and others, such as TRL's `ModelConfig`, and make a configuration of
it. With ours in place of the training arguments, argparse would refuse the second definition of a flag. So the other
class keeps its flags, and the fields of ours have their defaults.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

_CHANGED: set[type] = set()


def leave_out_shared_flags(parser: type, ours: type) -> None:
    """Make a class of parsers (`HfArgumentParser`, or TRL's) leave out the fields of `ours` that another class has.

    Other parsers do not change; such a one could not be made before.

    Args:
        ours: a dataclass; its subclasses are concerned.
    """
    if parser in _CHANGED:
        return
    original: Any = parser.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def init(self: object, dataclass_types: Any = None, **kwargs: Any) -> None:
        one = dataclass_types is None or not isinstance(dataclass_types, Iterable)
        original(self, dataclass_types if one else _without_shared(list(dataclass_types), ours), **kwargs)

    parser.__init__ = init  # type: ignore[misc]
    _CHANGED.add(parser)


def _without_shared(types: list[type], ours: type) -> list[type]:
    own = {field.name for field in dataclasses.fields(ours)}
    others = {name for cls in types if not issubclass(cls, ours) for name in getattr(cls, "__dataclass_fields__", ())}
    shared = own & others
    return [_without(cls, shared) if shared and issubclass(cls, ours) else cls for cls in types]


def _without(cls: Any, names: set[str]) -> type:
    """A stand-in for a dataclass: a parser sees it without some fields; calling it makes the dataclass itself."""
    fields = {name: copy.copy(field) for name, field in cls.__dataclass_fields__.items()}
    for name in names:
        fields[name].init = False

    def new(_: type, **values: Any) -> object:
        made = cls(**values)
        vars(made)["parsed_elsewhere"] = tuple(sorted(names))
        return made

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__dataclass_fields__": fields, "__new__": new})
