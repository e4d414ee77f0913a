"""Fit an adapter's tensors to a resized module of the base, such as the embedding of a larger vocabulary.

The part that both sizes share keeps its values. In: a tensor or module of the adapter, and one with the new shape.
Out: the new parameter, or the module with new ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def fitted(old: nn.Parameter, like: Tensor) -> nn.Parameter:
    """A parameter with the shape of `like`: the values of `old` where it has any, those of `like` elsewhere."""
    new = like.clone()
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    new[common] = old.detach()[common]
    return nn.Parameter(new, requires_grad=old.requires_grad)


def fit_module(copy: nn.Module, base: nn.Module) -> None:
    """Resize a copy of an embedding, or of a module with one, like its original, whose values new rows get."""
    made: dict[int, nn.Parameter] = {}  # parameters that the copy shares stay shared
    for path, module in copy.named_modules():
        like: Any = base.get_submodule(path)
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.shape != like._parameters[name].shape:
                new = made.setdefault(id(parameter), fitted(parameter, like._parameters[name].detach().float()))
                setattr(module, name, new)
        for attribute in ("num_embeddings", "out_features"):
            if hasattr(module, attribute):
                setattr(module, attribute, getattr(like, attribute))
