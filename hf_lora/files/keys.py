"""The names of an adapter's tensors on disk, which are PEFT's: `base_model.model.<module>.lora_A.weight` and so on."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import LoraConfig
from ..layers.contract import Method, Shape
from ..layers.methods import METHODS
from ..layers.parts import PARTS, TokenRows
from ..layers.shapes import SHAPES

PREFIX = "base_model.model."


def key_of(path: str, key: str) -> str:
    """The file key of a tensor that a part at module `path` declares as `key`."""
    return f"{PREFIX}{path}.{key}"


def split_key(key: str) -> tuple[str, str]:
    """(path, role) of a file key: a factor's name, "bias" (with the path of its layer), or "copy" (with its own path).

    Tensors of registered custom parts count as copies, since they have no update to summarize.
    """
    path = key.removeprefix(PREFIX)
    if any(path.endswith(f".{suffix}") for kind in PARTS.values() for suffix in kind.keys):
        return path, "copy"
    for suffix, factor in factor_keys():
        if path.endswith(f".{suffix}"):
            return path.removesuffix(f".{suffix}"), factor
    module, _, last = path.rpartition(".")
    module, _, role = module.rpartition(".")
    if role.startswith("lora_") and last == "weight":
        return module, role  # a factor of a method that is not registered
    return (module, "bias") if role == "base_layer" and last == "bias" else (path, "copy")


def factor_keys() -> Iterator[tuple[str, str]]:
    """(name on disk relative to a module, factor) for all registered shapes and methods."""
    tables: tuple[Shape | Method, ...] = (*SHAPES.values(), *METHODS.values())
    for declaring in tables:
        for factor, suffix in declaring.keys.items():
            yield suffix, factor


def matrices() -> tuple[str, ...]:
    """The names of the two factors whose product is the update; (R, I) first."""
    return tuple(Shape.keys)


def factors_of(config: LoraConfig) -> tuple[str, ...]:
    """The names of all factors of a layer in a file with this configuration."""
    return (*matrices(), *METHODS[config.method].keys)


def is_row(key: str) -> bool:
    """Whether a file key is that of rows of tokens."""
    return any(key.endswith(f".{each}") for each in TokenRows.keys)
