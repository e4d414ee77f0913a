"""Whole adapter tensors of a model of which each process holds a part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from ..config import as_tuple
from ..layers.distributed import gather
from ..layers.hosts import at_hand
from .state import require_state
from .walk import parts


def gathered_state(model: nn.Module, adapter_names: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Whole copies of the adapters' tensors on the CPU, for models sharded by FSDP2 or ZeRO, or not sharded.

    Every process must call it, because each holds a part, and each gets the result. The base is not gathered. Pass the
    result to `save_pretrained`:

        state = gathered_state(model)
        first = accelerator.is_main_process
        model.save_pretrained(folder, state_dict=state, is_main_process=first)

    Args:
        model: the model with the adapters, unwrapped with `accelerator.unwrap_model(model)`.
        adapter_names: the adapters to gather; default: all.

    Returns:
        The tensors by their names in `model.state_dict()`. Trained tensors are the float32 masters.

    Raises:
        StateError: the model does not have these adapters.
    """
    state = require_state(model, "gathered_state")
    names = as_tuple(adapter_names or state.adapters)
    for name in names:
        state.require(name)
    wanted = {id(t) for name in names for part in parts(model, name) for _, t in part.tensors()}
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return gather({name: tensor for name, tensor in tensors.items() if id(tensor) in wanted})


def offloaded_tensors(model: nn.Module, name: str) -> dict[int, Tensor]:
    """id -> value of the tensors of one adapter that accelerate offloaded."""
    wanted = {id(tensor) for part in parts(model, name) for _, tensor in part.tensors() if tensor.is_meta}
    return {
        id(parameter): at_hand(module, key)
        for module in (model.modules() if wanted else ())
        for key, parameter in module._parameters.items()
        if id(parameter) in wanted
    }
