"""Activation checkpointing of frozen layers: an input must require a gradient, and both forwards must be the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..errors import StateError
from ..layers.calls import carried
from .embeddings import input_embedding

_CHECKPOINT = "_gradient_checkpointing_func"  # attribute of transformers for a layer's checkpoint function


def is_checkpointing(model: nn.Module) -> bool:
    # transformers renamed its property between the supported versions
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def require_input_grads(model: nn.Module) -> list[RemovableHandle]:
    """Make an input of every checkpointed layer require a gradient; without such layers, the outputs of embeddings.

    Returns:
        Hooks to remove to undo this, in addition to `release_input_grads`.
    """
    checkpointed = [m for m in model.modules() if _CHECKPOINT in m.__dict__]
    for module in checkpointed:
        module.__dict__[_CHECKPOINT] = partial(_with_gradient, module.__dict__[_CHECKPOINT])
    if checkpointed:
        return []
    found = (input_embedding(m) for m in model.modules() if isinstance(m, PreTrainedModel))
    embeddings = {id(m): m for m in found if m is not None}
    return [m.register_forward_hook(_require_gradients) for m in embeddings.values()]


def release_hooks(model: nn.Module) -> None:
    """Undo `enable_input_require_grads` of a transformers model, if it was called."""
    hooks = model.__dict__.pop("_require_grads_hooks", None)
    if hooks is None:
        return
    for hook in hooks:
        hook.remove()
    release_input_grads(model)


def release_input_grads(model: nn.Module) -> None:
    """Restore the checkpoint functions that `require_input_grads` wrapped."""
    for module in model.modules():
        function = module.__dict__.get(_CHECKPOINT)
        if isinstance(function, partial) and function.func is _with_gradient:
            module.__dict__[_CHECKPOINT] = function.args[0]


def _require_gradients(_module: nn.Module, _args: object, output: object) -> None:
    for tensor in output if isinstance(output, (tuple, list)) else (output,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.requires_grad:
            tensor.requires_grad_(True)


def _with_gradient(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `checkpoint(function, *args)` such that a floating-point argument requires a gradient.

    When the backward calls `function` again, layers know what they know now.
    """
    floats = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
    if floats and torch.is_grad_enabled() and not any(args[i].requires_grad for i in floats):
        first = args[floats[0]].detach().requires_grad_(True)
        args = (*args[: floats[0]], first, *args[floats[0] + 1 :])
    return checkpoint(carried(function), *args, **kwargs)


def refuse_checkpointed(model: nn.Module, _args: object) -> None:
    if model.training and torch.is_grad_enabled() and is_checkpointing(model):
        raise StateError(
            "disable_adapter: with activation checkpointing, the backward runs the forward again after the block, "
            "with the adapters enabled, so the gradients would be wrong. Run this forward under torch.no_grad() or in "
            "eval mode, or turn activation checkpointing off."
        )
