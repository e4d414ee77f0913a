"""Walk over a model with the names that its modules had before LoRA was applied.

A `Replacement` adds `base_layer` and `copies` to the module tree, an adapted layer `lora_*`. Configurations, files and
tables use the original names; only these functions convert between the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..layers.copies import Replacement
from ..layers.hosts import Host
from ..layers.parts import PARTS, Part
from ..layers.site import Site
from ..layers.views import View, sites_of


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
    """(adapter, parameter) of all parameters that the adapters `names` train, in one pass without names of modules.

    Switching between adapters is this pass. It skips modules without children, which are most.
    """
    names = tuple(names)
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        is_host = isinstance(module, Host)
        for kind, child in module._modules.items():
            if child is None or not child._modules or id(child) in seen:
                continue
            seen.add(id(child))
            if (is_host and kind.startswith("lora_")) or (kind == "copies" and isinstance(module, Replacement)):
                for name in names:
                    held = child._modules.get(name)
                    if held is None or "frozen" in held.__dict__:
                        continue
                    for parameter in held.parameters() if held._modules else held._parameters.values():
                        if parameter is not None:
                            yield name, parameter
            else:
                stack.append(child)


def parts(model: nn.Module, name: str | None = None) -> Iterator[Part]:
    """All parts of adapter `name` (default: of every adapter), in the order of the model's modules.

    The walk is lazy: make a list before removing parts.
    """
    kinds = tuple(PARTS.values())
    for path, module in _walk(model):
        if not isinstance(module, (Host, Replacement)):
            continue
        for kind in kinds:
            for part in kind.at(path, module):
                if name is None or part.adapter == name:
                    yield part


def adapter_layers(model: nn.Module) -> dict[str, Site]:
    """Original name -> site, for every site with factors of any adapter.

    A site that is not a layer has the name of its weight.
    """
    return {
        f"{path}.{site.name}" if isinstance(site, View) else path: site
        for path, module in original_modules(model)
        for site in sites_of(module)
    }


def module_of(name: str, site: Site) -> str:
    """The original name of the module of a site that `adapter_layers` calls `name`."""
    return name.removesuffix(f".{site.name}") if isinstance(site, View) else name


def adapted_modules(model: nn.Module, name: str) -> set[str]:
    """Original names of the modules with factors of one adapter."""
    return {
        path for path, module in original_modules(model) if any(name in site._lora.names for site in sites_of(module))
    }


def replacements(model: nn.Module) -> dict[str, Replacement]:
    """Original name -> replacement, for every module that some adapter trains whole."""
    return {name: module for name, module in _walk(model) if isinstance(module, Replacement)}


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
    outer = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "__dict__")}
    inner = {id(c): c for config in outer.values() for c in vars(config).values() if hasattr(c, "to_dict")}
    return list({**inner, **outer}.values())
