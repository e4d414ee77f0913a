"""Adapters whose names of modules are those of an older transformers.

transformers renames modules between versions, and renames the tensors of checkpoints when it loads them. The same
rules give the present names of the modules in an adapter's file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..adapt.patterns import is_name
from ..adapt.walk import original_modules
from ..config import as_tuple
from ..errors import AdapterFileError, listed
from .format import AdapterFile
from .keys import PREFIX, split_key


def with_present_names(model: nn.Module, file: AdapterFile, call: str) -> AdapterFile:
    """The file with the names that its modules have in `model`; the same file if it has none that were renamed.

    Raises:
        AdapterFileError: several layers of the file are one tensor in this version of transformers.
    """
    known = {name for name, _ in original_modules(model)}
    paths = {key: split_key(key) for key in file.tensors}
    modules = {path if role != "copy" else path.rpartition(".")[0] for path, role in paths.values()}
    modules |= file.base_copies.keys()
    old = sorted(modules - known)
    if not old or not isinstance(model, PreTrainedModel):
        return file
    named = [name for name in _names_in(file) if name not in known]
    new = _renamed(model, [*old, *named], known, call)
    if not new:
        return file
    config, tensors = file.config, {}
    for key, tensor in file.tensors.items():
        path, role = paths[key]
        module = path if role != "copy" else path.rpartition(".")[0]
        tensors[PREFIX + new.get(module, module) + key.removeprefix(PREFIX)[len(module) :]] = tensor
    layers = {new.get(path, path) for path, role in paths.values() if role not in ("copy", "bias")}
    saved = config.modules_to_save
    config = replace(
        config,
        target_modules=sorted(layers),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None if saved is None else [new.get(name, name) for name in saved],
        rank_pattern={new.get(name, name): r for name, r in config.rank_pattern.items()},
        alpha_pattern={new.get(name, name): alpha for name, alpha in config.alpha_pattern.items()},
    )
    copies = {new.get(path, path): tensor for path, tensor in file.base_copies.items()}
    return replace(file, config=config, tensors=tensors, base_copies=copies)


def _names_in(file: AdapterFile) -> Iterable[str]:
    """Names of modules in the configuration."""
    config = file.config
    found = (*as_tuple(config.modules_to_save or ()), *config.rank_pattern, *config.alpha_pattern)
    return dict.fromkeys(name for name in found if is_name(name) and "." in name)


def _renamed(model: PreTrainedModel, names: Iterable[str], known: set[str], call: str) -> dict[str, str]:
    """Old name -> present name, for those that transformers' rules map to a module of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    found: dict[str, str] = {}
    joined: dict[str, str] = {}
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = rename_source_key(f"{name}.weight", renamings, converters)
        path = renamed.removesuffix(".weight")
        if pattern is not None and path.rpartition(".")[0] in known:
            joined[name] = path
        elif path in known and path != name:
            found[name] = path
    if joined:
        raise AdapterFileError(
            f"{call}: the file adapts {listed(list(joined), 3)} as layers of their own, but this version of "
            "transformers converts their weights, as it joins those of all experts into one tensor: "
            f"{next(iter(joined.values()))} cannot be adapted yet. Nothing was changed. Load the adapter with PEFT, "
            "which converts it, or with transformers 4."
        )
    return found
