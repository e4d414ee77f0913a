"""Walk a model under the names that its modules had before anything was adapted.

A `Replacement` adds `base_layer` and `copies` to the tree, an adapted layer `lora_*`. Configurations, files and tables
speak of the original names; these functions are the one place that knows the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..layers.copies import Replacement
from ..layers.hosts import Host
from ..layers.parts import PARTS, Part
from ..layers.site import Site
from ..layers.views import View, sites_of


def original_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(original name, module) of every module of the unadapted model, each once, parents first."""
    for name, module in _walk(model):
        if not isinstance(module, Replacement):
            yield name, module


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if isinstance(module, Replacement):
            stack.append((name, module.base_layer))
            continue
        ours = isinstance(module, Host)
        for child_name, child in reversed(list(module._modules.items())):
            if child is not None and not (ours and child_name.startswith("lora_")):
                stack.append((f"{name}.{child_name}" if name else child_name, child))


def adapter_tensors(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """(adapter, parameter) of all that the adapters `names` train, in one pass without names of modules.

    A switch between adapters is this pass: modules without children, which are most, are not even looked at.
    """
    names = tuple(names)
    stack, seen = [model], {id(model)}
    while stack:
        module = stack.pop()
        ours = isinstance(module, Host)
        for kind, child in module._modules.items():
            if child is None or not child._modules or id(child) in seen:
                continue
            seen.add(id(child))
            if (ours and kind.startswith("lora_")) or (kind == "copies" and isinstance(module, Replacement)):
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
    """All that adapter `name` (or any) owns, in the order of the model's modules.

    The walk is not finished when the first part comes out: take a list before removing any.
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
    """Original name -> site, of everything that holds factors of any adapter.

    A site that is no layer has the name of its weight.
    """
    return {
        f"{path}.{site.name}" if isinstance(site, View) else path: site
        for path, module in original_modules(model)
        for site in sites_of(module)
    }


def adapted_modules(model: nn.Module, name: str) -> set[str]:
    """Original names of the modules that hold factors of one adapter."""
    return {
        path for path, module in original_modules(model) if any(name in site._lora.names for site in sites_of(module))
    }


def replacements(model: nn.Module) -> dict[str, Replacement]:
    """Original name -> replacement, of every module that is kept whole for some adapter."""
    return {name: module for name, module in _walk(model) if isinstance(module, Replacement)}


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module of an original name, looked up through replacements."""
    module: Any = model
    for part in path.split(".") if path else []:
        module = _inside(module)._modules[part]
    found = _inside(module)
    assert isinstance(found, nn.Module)
    return found


def placed(model: nn.Module, path: str) -> nn.Module:
    """What stands at an original name, a replacement included."""
    parent, _, leaf = path.rpartition(".")
    found = module_at(model, parent)._modules[leaf]
    assert found is not None
    return found


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set what stands at an original name, a replacement included."""
    parent, _, leaf = path.rpartition(".")
    setattr(module_at(model, parent), leaf, module)


def _inside(module: Any) -> Any:
    return module.base_layer if isinstance(module, Replacement) else module
