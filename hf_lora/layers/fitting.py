"""Fit an adapter's tensors to a module of the base that has got another size, as a vocabulary that grew.

What both sizes have in common keeps its values. In: a tensor or module of the adapter, and what it is to be like. Out:
the new parameter, or the module with new ones.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def fitted(old: nn.Parameter, like: Tensor) -> nn.Parameter:
    """A parameter shaped like `like`, with the values of `old` where it has any and those of `like` elsewhere."""
    new = like.clone()
    common = tuple(slice(0, min(a, b)) for a, b in zip(old.shape, new.shape, strict=True))
    new[common] = old.detach()[common]
    return nn.Parameter(new, requires_grad=old.requires_grad)


def fit_module(copy: Any, base: Any) -> None:
    """Give a copy of an embedding, or of what holds one, the rows of its original, new ones with its values."""
    made: dict[int, nn.Parameter] = {}  # what is shared in the copy stays shared
    for path, own in copy.named_modules():
        like = base.get_submodule(path)
        for name, parameter in list(own._parameters.items()):
            if parameter is not None and parameter.shape != like._parameters[name].shape:
                new = made.setdefault(id(parameter), fitted(parameter, like._parameters[name].detach().float()))
                setattr(own, name, new)
        for attribute in ("num_embeddings", "out_features"):
            if hasattr(own, attribute):
                setattr(own, attribute, getattr(like, attribute))
