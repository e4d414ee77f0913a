"""Take back what was done to a model where a later step is refused: the very modules and parameters, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def rollback_on(model: nn.Module, error: type[Exception]) -> Iterator[None]:
    """Restore a model's modules, parameters and config where `error` is raised inside; values are not copied.

    What changes values in place is not undone.
    """
    modules = [(module, type(module), _contents(module)) for module in model.modules()]
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    configs = [(config, dict(vars(config))) for config in _configs(model)]
    try:
        yield
    except error:
        for module, cls, contents in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(contents)
        for parameter, data, requires_grad in parameters:
            parameter.data = data
            parameter.requires_grad_(requires_grad)
        for config, values in configs:
            vars(config).clear()
            vars(config).update(values)
        raise


def _contents(module: nn.Module) -> dict[str, Any]:
    """A module's attributes; of its dicts (parameters, children, hooks) a copy."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}


def _configs(model: Any) -> list[Any]:
    """The configs of a transformers model, each once."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "__dict__")}
    inner = {id(c): c for config in found.values() for c in vars(config).values() if hasattr(c, "to_dict")}
    return list({**inner, **found}.values())
