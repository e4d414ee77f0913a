"""Embeddings that are one module in training and several in a loaded base.

Resizing the vocabulary joins the embeddings of some encoder-decoders in one module, whose first name is that of one
which a loaded base never calls. A file has its tensors once for each name that is called: there PEFT finds them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt.bypass import called_embeddings
from ..adapt.match import PatternTable
from ..adapt.ties import names_by_place
from ..adapt.walk import module_at
from ..config import LoraConfig
from ..errors import AdapterFileError
from .keys import is_row, key_of

Joined = dict[str, list[str]]
"""First name of a module -> its names that are called in a loaded base; the first alone for all other modules."""


def joined_modules(model: nn.Module, paths: Iterable[str]) -> Joined:
    """Those of `paths` at which a module is that the model has at other places too."""
    wanted, found = set(paths), Joined()
    for first, names in names_by_place(model).items():
        if first in wanted:
            is_embedding = isinstance(module_at(model, first), nn.Embedding)
            called = called_embeddings(model, names) if is_embedding else []
            found[first] = [first] if first in called or not called else called
    return found


def renamed(joined: Joined) -> Joined:
    """Those with other names in a file."""
    return {first: called for first, called in joined.items() if called != [first]}


def under_called_names(tensors: Mapping[str, Tensor], joined: Joined) -> dict[str, Tensor]:
    """The tensors of a file with those of joined modules once for each of their names. Rows of tokens stay."""
    found, joined = dict[str, Tensor](), renamed(joined)
    for key, tensor in tensors.items():
        path = next((path for path in joined if key.startswith(key_of(path, "")) and not is_row(key)), None)
        rest = key.removeprefix(key_of(path or "", ""))
        found |= {key: tensor} if path is None else {key_of(name, rest): tensor for name in joined[path]}
    return found


def names_in_config(values: Mapping[str, Any], joined: Joined) -> dict[str, Any]:
    """The fields of an adapter_config.json with the called names of joined modules in place of the first."""
    found = dict(values)
    for first, called in renamed(joined).items():
        targets, whole = found["target_modules"], found["modules_to_save"]
        if whole and first in whole:
            found["modules_to_save"] = [*(name for name in whole if name != first), *called]
            continue
        if isinstance(targets, str):
            found["target_modules"] = f"(?:{targets}){_alternatives(called)}"
        else:
            own = (first, first.rpartition(".")[2])
            found["target_modules"] = [*(name for name in targets if name not in own), *called]
        for field in ("rank_pattern", "alpha_pattern"):
            value = PatternTable(found[field]).get(first, None)
            found[field] = {**(dict.fromkeys(called, value) if value is not None else {}), **found[field]}
    return found


def under_first_names(tensors: Mapping[str, Tensor], joined: Joined) -> dict[str, Tensor]:
    """The reverse of `under_called_names`.

    Raises:
        AdapterFileError: the file has different values for the names of one module.
    """
    found: dict[str, Tensor] = {}
    firsts = {name: first for first, called in renamed(joined).items() for name in called}
    for key, tensor in tensors.items():
        path = next((name for name in firsts if key.startswith(key_of(name, ""))), None)
        own = key if path is None else key_of(firsts[path], key.removeprefix(key_of(path, "")))
        if own in found and not torch.equal(found[own], tensor):
            raise AdapterFileError(f"{key}: its values are not those of {own}, which was the same module in training.")
        found[own] = tensor
    return found


def with_first_names(config: LoraConfig, joined: Joined) -> LoraConfig:
    """The reverse of `names_in_config`."""
    if not (joined := renamed(joined)):
        return config
    firsts = {name: first for first, called in joined.items() for name in called}

    def first_names(names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(firsts.get(name, name) for name in names))

    targets, whole = config.target_modules, config.modules_to_save
    if isinstance(targets, str):
        for called in reversed(joined.values()):
            end = f"){_alternatives(called)}"
            targets = targets.removeprefix("(?:").removesuffix(end) if targets.endswith(end) else targets
    return replace(
        config,
        target_modules=targets if isinstance(targets, str) else first_names(targets),
        modules_to_save=None if whole is None else first_names(whole),
        rank_pattern={key: r for key, r in config.rank_pattern.items() if key not in firsts},
        alpha_pattern={key: alpha for key, alpha in config.alpha_pattern.items() if key not in firsts},
    )


def _alternatives(names: Iterable[str]) -> str:
    return "".join(f"|{re.escape(name)}" for name in names)
