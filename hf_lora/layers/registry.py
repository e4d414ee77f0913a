"""Tables of named entries that other packages can extend: methods, initializations, shapes, storages and parts."""

from __future__ import annotations

import re
from typing import TypeVar

from ..errors import ConfigError, nearest

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(dict[str, T]):
    """Name -> entry. Searches try entries of other packages first, newest first.

    Args:
        what: what messages call an entry, such as `"method"`.
        entries: the built-in entries, in search order.
    """

    def __init__(self, what: str, entries: dict[str, T]) -> None:
        super().__init__(entries)
        self.what = what
        self._built_in = tuple(entries)
        self._order: tuple[tuple[str, ...], tuple[T, ...]] = (), ()

    def search(self) -> tuple[T, ...]:
        """The entries in search order: those of other packages before the built-in ones."""
        names = tuple(self)
        if self._order[0] != names:  # read for each layer of a model, and rarely changed
            others = [name for name in reversed(names) if name not in self._built_in]
            self._order = names, tuple(self[name] for name in (*others, *self._built_in))
        return self._order[1]

    def why_unknown(self, name: str) -> str:
        """The message for a name that is not registered."""
        return (
            f"there is no {self.what} {name!r}{nearest(name, self)}; known: {', '.join(self)}. "
            "An entry of another package exists once that package has called hf_lora.register"
        )


def register(registry: Registry[T], name: str, entry: T) -> T:
    """Add an entry to one of the registries: see docs/extending.md.

    Args:
        registry: `METHODS`, `INITS`, `SHAPES`, `STORAGES` or `PARTS`.
        name: the entry's name in lower case, such as `"my_method"`. Configurations and files use it.
        entry: an instance of the registry's base class; for `PARTS`, a subclass of it.

    Returns:
        `entry`.

    Raises:
        ConfigError: the name is invalid, or another entry has it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"register: {name!r} is not a valid name: use lower-case letters, digits and underscores, beginning with "
            "a letter."
        )
    if registry.get(name, entry) is not entry:
        raise ConfigError(f"register: the {registry.what} {name!r} already exists. Choose another name.")
    registry[name] = entry
    return entry
