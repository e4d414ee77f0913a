"""Walk over a model with the names that its modules had before LoRA was applied.

A `Replacement` adds `base_layer` and `copies` to the module tree, an adapted layer `lora_*`. Configurations, files and
tables use the original names; only these functions convert between the two.

Two models may share layers, which then have the adapters of one of them: a walk over the adapters of a model passes
over those of another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..layers.copies import Replacement
from ..layers.hosts import Activity, Host, activity_of
from ..layers.parts import PARTS, Part
from ..layers.site import Site
from ..layers.views import View, sites_of

ATTRIBUTE = "_hf_lora"
"""Attribute of a model that holds the state of its adapters."""


def _activity(model: nn.Module) -> Activity | None:
    """The activity of a model with adapters; None for any other, such as a copy of a part of one."""
    state: Any = model.__dict__.get(ATTRIBUTE)
    return None if state is None else state.activity


def _belongs(module: nn.Module, activity: Activity | None) -> bool:
    """Whether `module` has tensors of adapters, namely of the model with that activity."""
    if isinstance(module, Replacement):
        return activity is None or module.activity is activity
    return isinstance(module, Host) and (activity is None or activity_of(module) is activity)


def of_other_models(model: nn.Module) -> list[str]:
    """Names of the modules that have adapters of another model, of which they are a part too."""
    activity = _activity(model)
    hosts = ((name, module) for name, module in _walk(model) if isinstance(module, (Host, Replacement)))
    return [name for name, module in hosts if activity is None or not _belongs(module, activity)]


def original_modules(model: nn.Module, once: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """(original name, module) of every module of the original model, parents first.

    Args:
        once: yield a module with several names only under the first one.
    """
    for name, module in _walk(model, once):
        if not isinstance(module, Replacement):
            yield name, module


def _walk(model: nn.Module, once: bool = True) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if once and id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if isinstance(module, Replacement):
            stack.append((name, module.base_layer))
            continue
        is_host = isinstance(module, Host)
        for child_name, child in reversed(list(module._modules.items())):
            if child is not None and not (is_host and child_name.startswith("lora_")):
                stack.append((f"{name}.{child_name}" if name else child_name, child))


def original_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that a module had before LoRA was applied, with the tensors themselves."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in original_modules(model, once=False)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def adapter_tensors(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """(adapter, parameter) of all parameters that the adapters `names` train."""
    for name, held in adapter_modules(model, names):
        for _, parameter in held_parameters(held):
            yield name, parameter


def held_parameters(held: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of a module that `adapter_modules` gives, by their names in it."""
    if held._modules:
        return list(held.named_parameters())
    return [(key, parameter) for key, parameter in held._parameters.items() if parameter is not None]


def adapter_modules(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """(adapter, factor or copy) of all modules that the adapters `names` train, in one pass without names of modules.

    Switching between adapters is this pass. It skips modules without children, which are most.
    """
    names, activity = tuple(names), _activity(model)
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        belongs = _belongs(module, activity)
        for kind, child in module._modules.items():
            if child is None or not child._modules or id(child) in seen:
                continue
            seen.add(id(child))
            if belongs and (kind.startswith("lora_") or (kind == "copies" and isinstance(module, Replacement))):
                for name in names:
                    held = child._modules.get(name)
                    if held is not None and "frozen" not in held.__dict__ and id(held) not in seen:
                        seen.add(id(held))
                        yield name, held
            else:
                stack.append(child)


def parts(model: nn.Module, name: str | None = None) -> Iterator[Part]:
    """All parts of adapter `name` (default: of every adapter), in the order of the model's modules.

    The walk is lazy: make a list before removing parts.
    """
    kinds, activity = tuple(PARTS.values()), _activity(model)
    for path, module in _walk(model):
        if not _belongs(module, activity):
            continue
        for kind in kinds:
            for part in kind.at(path, module):
                if name is None or part.adapter == name:
                    yield part


def adapter_layers(model: nn.Module) -> dict[str, Site]:
    """Original name -> site, for every site with factors of any adapter.

    A site that is not a layer has the name of its weight.
    """
    activity = _activity(model)
    return {
        f"{path}.{site.name}" if isinstance(site, View) else path: site
        for path, module in original_modules(model)
        if _belongs(module, activity)
        for site in sites_of(module)
    }


def module_of(name: str, site: Site) -> str:
    """The original name of the module of a site that `adapter_layers` calls `name`."""
    return name.removesuffix(f".{site.name}") if isinstance(site, View) else name


def adapted_modules(model: nn.Module, name: str) -> set[str]:
    """Original names of the modules with factors of one adapter."""
    layers = adapter_layers(model)
    return {
        path.removesuffix(f".{site.name}") if isinstance(site, View) else path
        for path, site in layers.items()
        if name in site._lora.names
    }


def replacements(model: nn.Module) -> dict[str, Replacement]:
    """Original name -> replacement, for every module that some adapter trains whole."""
    activity = _activity(model)
    found = {name: module for name, module in _walk(model) if isinstance(module, Replacement)}
    return {name: module for name, module in found.items() if _belongs(module, activity)}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module with an original name, looked up through replacements."""
    module: Any = model
    for part in path.split(".") if path else []:
        module = _inside(module)._modules[part]
    found = _inside(module)
    assert isinstance(found, nn.Module)
    return found


def placed(model: nn.Module, path: str) -> nn.Module:
    """The module at an original name, or its replacement."""
    parent, _, leaf = path.rpartition(".")
    found = module_at(model, parent)._modules[leaf]
    assert found is not None
    return found


Places = dict[int, list[tuple[nn.Module, str]]]
"""id of a module -> where a model has it: its parents, and its name in each."""


def places_of(model: nn.Module) -> Places:
    """Where a model has each module. Most are in one place; T5 has its embedding in three."""
    found: Places = {}
    for parent in model.modules():
        for leaf, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, leaf))
    return found


def put(model: nn.Module, path: str, module: nn.Module, places: Places | None = None) -> None:
    """Replace the module (or replacement) at an original name, and wherever else the model has the same module.

    Args:
        places: the result of `places_of`, which is updated, for several calls.
    """
    places = places_of(model) if places is None else places
    held = places.pop(id(placed(model, path)))
    for parent, leaf in held:
        if parent is not module:
            setattr(parent, leaf, module)
    places[id(module)] = held


def _inside(module: Any) -> Any:
    return module.base_layer if isinstance(module, Replacement) else module


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of a transformers model and of the models inside it, including nested ones, each once."""
    outer = {id(c): c for m in model.modules() if hasattr(c := m.__dict__.get("config"), "__dict__")}
    inner = {id(c): c for config in outer.values() for c in vars(config).values() if hasattr(c, "to_dict")}
    return list({**inner, **outer}.values())
