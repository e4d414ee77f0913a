"""Tensors that other libraries write in other ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..layers.parts import PARTS
from .keys import PREFIX, factor_keys, key_of

_PEFT_WRAPPER = re.compile(r"(.+?)\.(original_module|modules_to_save)\.(.+)")
_ROWS_WRAPPER = ".token_adapter.base_layer"


def with_plain_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the keys of a file, where some are named as in a state dict, which PEFT reads too.

    Such a key has the adapter's name in it (`lora_A.default.weight`), or `.weight` at the end of a vector's name. Keys
    with the names of several adapters stay as they are, and so does one whose tensor is there under its plain name.
    """
    plain = {key: _plain(key) for key in tensors}
    several = len({name for _, name in plain.values() if name}) > 1
    return {key if several or new in tensors else new: tensors[key] for key, (new, _) in plain.items()}


def _plain(key: str) -> tuple[str, str]:
    """(a key as in a file, the adapter's name that was in it)."""
    suffixes = [*(suffix for suffix, _ in factor_keys()), *(s for kind in PARTS.values() for s in kind.keys)]
    if any(key.endswith(f".{suffix}") for suffix in suffixes):
        return key, ""
    for suffix in suffixes:
        head, _, leaf = suffix.rpartition(".")
        is_module = leaf in ("weight", "bias")
        if is_module and not key.endswith(f".{leaf}"):
            continue
        stem = key.removesuffix(f".{leaf}" if is_module else ".weight")
        path, found, name = f"{stem}.".rpartition(f".{head if is_module else suffix}.")
        if found and name.count(".") <= 1:
            return f"{path}.{suffix}", name.removesuffix(".")
    return key, ""


def split_base_copies(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the adapter's tensors, module -> weight of the base) from a file of PEFT.

    For an adapted embedding or output embedding, PEFT also saves a copy of the base's weight; with trained biases it
    saves those of whole modules twice more, under the names of its wrapper, and that of an output layer with rows of
    tokens under the name of theirs.
    """
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    suffixes = {suffix for suffix, _ in factor_keys()}
    for key, tensor in tensors.items():
        path, rows = key.removesuffix(".base_layer.weight"), key.removesuffix(f"{_ROWS_WRAPPER}.weight")
        if rows != key:
            copies[rows.removeprefix(PREFIX)] = tensor
        elif path != key and any(f"{path}.{suffix}" in tensors for suffix in suffixes):
            copies[path.removeprefix(PREFIX)] = tensor
        elif not _is_written_twice(key, tensors):
            own[key.replace(f"{_ROWS_WRAPPER}.bias", ".bias")] = tensor
    return own, copies


def with_biases_of_rows(tensors: Mapping[str, Tensor], paths: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file, with the bias of each module with rows of tokens under the name at which PEFT has it."""
    names = {key_of(path, "bias"): key_of(path, f"{_ROWS_WRAPPER[1:]}.bias") for path in paths}
    return {names.get(key, key): tensor for key, tensor in tensors.items()}


def _is_written_twice(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether `key` is a tensor inside PEFT's wrapper that the file also has under its plain name."""
    match = _PEFT_WRAPPER.match(key)
    if match is None:
        return False
    path, wrapper, inside = match.groups()
    plain = [f"{path}.{inside}"]
    if wrapper == "modules_to_save":  # may be followed by the adapter's name
        plain.append(f"{path}.{inside.partition('.')[2]}")
    return any(name in tensors for name in plain)
