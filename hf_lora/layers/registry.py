"""Tables of named things that can be added to from outside: methods, initializations, shapes and storages."""

from __future__ import annotations

import re
from typing import TypeVar

from ..errors import ConfigError, nearest

T = TypeVar("T")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class Registry(dict[str, T]):
    """Name -> entry. What is asked in order asks entries from outside first, the newest of them before all.

    Args:
        what: what an entry is called in messages, such as `"method"`.
        entries: the library's own, in the order in which they are asked.
    """

    def __init__(self, what: str, entries: dict[str, T]) -> None:
        super().__init__(entries)
        self.what = what
        self._own = tuple(entries)
        self._order: tuple[tuple[str, ...], tuple[T, ...]] = (), ()

    def search(self) -> tuple[T, ...]:
        """The entries, those from outside before the library's own."""
        names = tuple(self)
        if self._order[0] != names:  # asked for each layer of a model, and changed hardly ever
            others = [name for name in reversed(names) if name not in self._own]
            self._order = names, tuple(self[name] for name in (*others, *self._own))
        return self._order[1]

    def why_unknown(self, name: str) -> str:
        """What to say of a name that is not here."""
        return (
            f"there is no {self.what} {name!r}{nearest(name, self)}; known: {', '.join(self)}. "
            "One from another package is there once that package has called hf_lora.register"
        )


def register(registry: Registry[T], name: str, entry: T) -> T:
    """Add an entry to one of the registries: see docs/extending.md.

    Args:
        registry: `METHODS`, `INITS`, `SHAPES`, `STORAGES` or `PARTS`.
        name: of the entry, in lower case, such as `"my_method"`. Configurations and files use it.
        entry: an instance of the registry's base class; of `PARTS` a class derived from it.

    Returns:
        `entry`.

    Raises:
        ConfigError: the name is taken by another entry, or is no name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"register: {name!r} is no name: it has lower-case letters, digits and underscores.")
    if registry.get(name, entry) is not entry:
        raise ConfigError(f"register: the {registry.what} {name!r} is there already. Choose another name.")
    registry[name] = entry
    return entry
