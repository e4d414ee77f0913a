"""Weights that several modules share, and untying them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..layers.class_swap import unwrap_class
from ..layers.parts import Fold
from .heads import mark_like
from .walk import module_at, original_modules


def tensor_users(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> original names of the modules that have it."""
    users: dict[int, list[str]] = {}
    for name, module in original_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def untie_adapted(model: nn.Module, folds: Iterable[Fold]) -> None:
    """Untie every tensor that will be merged, in memory and in the config."""
    users = tensor_users(model)
    shared = [f for f in folds if f.holders is not None and len(users[id(f.site.weight)]) > len(f.holders)]
    if not shared:
        return
    for fold in shared:
        if not fold.storage.quantized:  # quantized layers get their own dense weight in any case
            path, _, name = fold.name.rpartition(".")
            _copy_parameter(module_at(model, path), name)
    untie_all(model)


def untie_all(model: Any) -> None:
    """Copy all tied weights of a transformers model, and set its config to untied.

    The config has one flag for all ties, and a file of an untied model must contain every tensor.
    """
    ties = getattr(model, "all_tied_weights_keys", None)
    for key, source in (ties or {}).items():
        (path, _, name), (source_path, _, source_name) = key.rpartition("."), source.rpartition(".")
        holder: Any = module_at(model, path)
        if holder._parameters.get(name) is module_at(model, source_path)._parameters.get(source_name):
            _copy_parameter(holder, name)
    if ties is not None:
        model.all_tied_weights_keys = {}
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def _copy_parameter(module: nn.Module, name: str) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        made = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        mark_like(made, parameter)
        module._parameters[name] = made


def forward_reads_tie_flag(model: nn.Module) -> bool:
    """Whether the model's forward depends on the config's tie flag, such as for a scale."""
    cls: Any = unwrap_class(type(model))
    forward = inspect.unwrap(cls.forward)
    return "tie_word_embeddings" in getattr(getattr(forward, "__code__", None), "co_names", ())


def _configs(model: nn.Module) -> Iterator[Any]:
    config = getattr(model, "config", None)
    if config is not None:
        yield config
        if hasattr(config, "get_text_config"):
            yield config.get_text_config()
