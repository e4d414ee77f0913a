"""Undo changes to a model if a later step fails: the same module and parameter objects are restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .walk import configs_of


@contextmanager
def rollback_on(model: nn.Module, error: type[Exception]) -> Iterator[None]:
    """Restore a model's modules, parameters and configs if `error` is raised inside.

    Values are not copied, so in-place changes of values are not undone.
    """
    modules = [(module, type(module), _contents(module)) for module in model.modules()]
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    configs = [(config, dict(vars(config))) for config in configs_of(model)]
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


def _contents(module: nn.Module) -> dict[str, object]:
    """A module's attributes, with copies of its dicts (parameters, children, hooks)."""
    return {name: value.copy() if isinstance(value, dict) else value for name, value in module.__dict__.items()}
