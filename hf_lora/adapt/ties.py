"""Weights that several modules share, and untying them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from ..errors import StateError
from ..layers.class_swap import unwrap_class
from ..layers.copies import Replacement
from ..layers.hosts import Host
from ..layers.parts import Fold
from .embeddings import input_embedding
from .heads import mark_like
from .match import holder, matcher
from .walk import module_at, original_modules, placed


@dataclass
class Ties:
    """The ties of a model, before some of its weights were untied.

    Args:
        parameters: (module, name, parameter) of each tied weight that got a parameter of its own.
        keys: the ties as transformers lists them.
        configs: the configs that said that weights are tied.
    """

    parameters: list[tuple[nn.Module, str, nn.Parameter]] = field(default_factory=list)
    keys: dict[str, str] | None = None
    configs: list[Any] = field(default_factory=list)

    def restore(self, model: nn.Module) -> None:
        for module, name, parameter in self.parameters:
            module._parameters[name] = parameter
        if self.keys is not None:
            setattr(model, _KEYS, self.keys)
        for config in self.configs:
            config.tie_word_embeddings = True


def tensor_users(model: nn.Module) -> dict[int, list[str]]:
    """id of a parameter -> original names of the modules that have it."""
    users: dict[int, list[str]] = {}
    for name, module in original_modules(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(name)
    return users


def tied_with_embedding(model: nn.Module) -> list[str]:
    """The modules with the weight of the input embedding, if there are several."""
    found = tensor_users(model).get(id(getattr(input_embedding(model), "weight", None)), [])
    return found if len(found) > 1 else []


def tie_copies(model: nn.Module, paths: Iterable[str], adapter: str) -> None:
    """Give an adapter's copies of some modules one weight, that of the first."""
    copies = [cast(Replacement, placed(model, path)) for path in paths]
    for each in copies:
        each.tied.add(adapter)
        each.copies[adapter]._parameters["weight"] = copies[0].copies[adapter]._parameters["weight"]


def parted_by(model: nn.Module, adapted: Iterable[str], whole: Iterable[str], rows: Iterable[str]) -> list[str]:
    """The modules with the weight of the input embedding to which an adapter gives other values than to the rest.

    Args:
        adapted, whole: names of the modules that it adapts, and of those that it trains whole.
        rows: names of the modules with rows of tokens of their own.
    """
    whole, given = list(whole), {*adapted, *rows}
    users = tied_with_embedding(model)
    return [name for name in users if name in given or holder(name, whole) is not None]


def join_embeddings(model: Any, name: str) -> None:
    """Make the input embedding, which is at `name`, one module with those that share its weight, as transformers does
    when it resizes the vocabulary. What the model computes does not change.

    Raises:
        StateError: one of the others has adapters, which would be lost.
    """
    users = tensor_users(model)[id(module_at(model, name)._parameters["weight"])]
    joined = [n for n in users if isinstance(module_at(model, n), nn.Embedding)]
    taken = [n for n in joined if n != name and isinstance(placed(model, n), (Host, Replacement))]
    if taken:
        raise StateError(
            f"The adapter was trained with {', '.join(joined)} as one module, and the model has adapters of "
            f"{', '.join(taken)}, which would be lost. Load this adapter into a model without these."
        )
    model.set_input_embeddings(model.get_input_embeddings())


def names_by_place(model: nn.Module) -> dict[str, list[str]]:
    """First name -> its names, one for each place, of every module that the model has at several places."""
    modules: dict[str, nn.Module] = {}
    names: dict[int, list[str]] = {}
    for path, module in original_modules(model, once=False):
        modules[path] = module
        names.setdefault(id(module), []).append(path)
    found: dict[str, list[str]] = {}
    for paths in names.values():
        places: dict[tuple[int, str], str] = {}
        for path in paths if len(paths) > 1 else ():
            parent, _, leaf = path.rpartition(".")
            places.setdefault((id(modules[parent]), leaf), path)
        if len(places) > 1:
            found[paths[0]] = list(places.values())
    return found


def same_module(model: nn.Module, patterns: str | Collection[str]) -> str:
    """For an error: which module `patterns` matches at another than its first name; empty if none."""
    hits = matcher(patterns)
    for first, names in names_by_place(model).items():
        if name := next(filter(hits, names[1:]), None):
            return f" of its own: {name} is the same module as {first} here; name that"
    return ""


def part_modules(model: nn.Module, names: Iterable[str], call: str) -> None:
    """Give each of these names a module of its own, with the tensors of the one that is there and at other places.

    What the model computes does not change.

    Raises:
        StateError: one of them has adapters, which act at its other names too.
    """
    modules = {name: placed(model, name) for name in names}
    taken = [n for n, m in modules.items() if isinstance(m, (Host, Replacement)) or "forward" in vars(m)]
    if taken:
        raise StateError(
            f"{call}: the file has values for {', '.join(taken)} alone, but the model has the same module at other "
            "names, with adapters or hooks. Load this adapter into a model without these."
        )
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        twin = copy.copy(module)
        twin.__dict__ |= {key: value.copy() for key, value in vars(module).items() if isinstance(value, dict | set)}
        module_at(model, parent)._modules[leaf] = twin


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """Within, modules that are trained whole give the weights of their originals, as if no adapter were enabled."""
    activities = {id(m._activity): m._activity for m in model.modules() if isinstance(m, Replacement)}
    enabled = [(activity, activity.enabled) for activity in activities.values()]
    for activity, _ in enabled:
        activity.set(enabled=False)
    try:
        yield
    finally:
        for activity, before in enabled:
            activity.set(enabled=before)


def tied_folds(model: nn.Module, folds: Iterable[Fold]) -> list[Fold]:
    """The folds of tensors that other modules use too, which the update must not reach."""
    users = tensor_users(model)
    return [f for f in folds if f.holders is not None and len(users[id(f.site.weight)]) > len(f.holders)]


def untie_adapted(model: nn.Module, folds: Iterable[Fold]) -> Ties:
    """Untie every tensor that will be merged, in memory and in the config. Returns what was tied."""
    ties = Ties()
    shared = tied_folds(model, folds)
    if not shared:
        return ties
    for fold in shared:
        if not fold.storage.quantized:  # quantized layers get their own dense weight in any case
            path, _, name = fold.name.rpartition(".")
            _copy_parameter(module_at(model, path), name, ties)
    untie_all(model, ties)
    return ties


def untie_all(model: Any, ties: Ties | None = None) -> None:
    """Copy all tied weights of a transformers model, and set its config to untied.

    The config has one flag for all ties, and a file of an untied model must contain every tensor.

    Args:
        ties: notes what was tied.
    """
    ties = Ties() if ties is None else ties
    ties.keys = getattr(model, _KEYS, None)
    for key, source in (ties.keys or {}).items():
        if _parameter(model, key) is _parameter(model, source):
            path, _, name = key.rpartition(".")
            _copy_parameter(module_at(model, path), name, ties)
    if ties.keys is not None:
        setattr(model, _KEYS, {})
    for config in _configs(model):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
            ties.configs.append(config)


def part_embeddings(model: nn.Module) -> None:
    """Give each name of an embedding a module and a weight of its own, as files of a model without ties have them."""
    for first, names in names_by_place(model).items():
        if isinstance(module_at(model, first), nn.Embedding):
            part_modules(model, names[1:], "merge")
            for name in names[1:]:
                _copy_parameter(module_at(model, name), "weight", Ties())


def has_broken_ties(model: nn.Module) -> bool:
    """Whether weights that transformers treats as tied are separate, as quantized ones are once they are dense."""
    ties: dict[str, str] = getattr(model, _KEYS, None) or {}
    return any(_parameter(model, key) is not _parameter(model, source) for key, source in ties.items())


def _parameter(model: nn.Module, key: str) -> nn.Parameter | None:
    path, _, name = key.rpartition(".")
    return module_at(model, path)._parameters.get(name)


def _copy_parameter(module: nn.Module, name: str, ties: Ties) -> None:
    parameter = module._parameters[name]
    if parameter is not None:
        ties.parameters.append((module, name, parameter))
        made = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        mark_like(made, parameter)
        module._parameters[name] = made


def forward_reads_tie_flag(model: nn.Module) -> bool:
    """Whether the model's forward depends on the config's tie flag, such as for a scale."""
    cls: Any = unwrap_class(type(model))
    forward = inspect.unwrap(cls.forward)
    return "tie_word_embeddings" in getattr(getattr(forward, "__code__", None), "co_names", ())


_KEYS = "all_tied_weights_keys"
"""The attribute of a transformers model that maps each tied weight to its source."""


def _configs(model: nn.Module) -> Iterator[Any]:
    config = getattr(model, "config", None)
    if config is not None:
        yield config
        if hasattr(config, "get_text_config"):
            yield config.get_text_config()
