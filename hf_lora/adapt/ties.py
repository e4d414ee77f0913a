"""Weights that several modules hold, and how each gets its own."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..layers.class_swap import unwrap_class
from ..layers.parts import Fold
from .walk import module_at, original_modules


def tensor_users(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> original names of the modules that hold it."""
    users: dict[int, list[str]] = {}
    for name, module in original_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def untie_adapted(model: Any, folds: Iterable[Fold]) -> None:
    """Give every tensor that is to be merged to its own module, in memory and in what the model will save."""
    users = tensor_users(model)
    shared = [f for f in folds if f.holders is not None and len(users[id(f.site.weight)]) > len(f.holders)]
    if not shared:
        return
    for fold in shared:
        if not fold.storage.quantized:  # each of those gets a dense weight of its own in any case
            path, _, name = fold.name.rpartition(".")
            _own(module_at(model, path), name)
    untie_all(model)


def untie_all(model: Any) -> None:
    """Make copies of what a transformers model ties, and say in its config that nothing is tied.

    A config says of all ties at once whether they hold, and a file without ties must hold every tensor.
    """
    ties = getattr(model, "all_tied_weights_keys", None)
    for key, source in (ties or {}).items():
        (path, _, name), (source_path, _, source_name) = key.rpartition("."), source.rpartition(".")
        holder: Any = module_at(model, path)
        if holder._parameters.get(name) is module_at(model, source_path)._parameters.get(source_name):
            _own(holder, name)
    if ties is not None:
        model.all_tied_weights_keys = {}
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _own(module: Any, name: str) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def forward_asks_for_ties(model: nn.Module) -> bool:
    """Whether the model computes something else, such as a scale, where its config says that embeddings are tied."""
    cls: Any = unwrap_class(type(model))
    forward = inspect.unwrap(cls.forward)
    return "tie_word_embeddings" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _configs(model: Any) -> Iterator[Any]:
    config = getattr(model, "config", None)
    if config is not None:
        yield config
        if hasattr(config, "get_text_config"):
            yield config.get_text_config()
